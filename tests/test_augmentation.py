"""Random augmentation of raw training images."""

import random

import pytest
import torch
from torchvision.transforms import v2

from tiny import make_trainer
from transferkit.data.augmentation import augment_batch, build_augmentation
from transferkit.errors import ArgumentError, ImageError

NAMES = ["flip", "crop", "color", "trivial"]


def pixels(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)


def augmented(augment, images, places=None, *, seed=0, epoch=0):
    places = range(len(images)) if places is None else places
    return augment_batch(build_augmentation(augment, 32), images, list(places), seed=seed, epoch=epoch)


@pytest.mark.parametrize("name", NAMES)
def test_augmentation_depends_on_seed_epoch_and_place(name):
    """The same seed, epoch and place give the same image; another of each gives other images."""
    images = pixels(1).expand(24, 3, 32, 32)
    first = augmented(name, images)
    torch.rand(5)
    assert torch.equal(augmented(name, images), first)
    assert not torch.equal(augmented(name, images, seed=1), first)
    assert not torch.equal(augmented(name, images, epoch=1), first)
    assert not torch.equal(augmented(name, images, range(24, 48)), first)


@pytest.mark.parametrize("name", NAMES)
def test_augmentation_does_not_depend_on_the_batch(name):
    """An image is changed alike whatever images are with it."""
    images = pixels(8)
    together = augmented(name, images, [5, 3, 9, 1, 0, 2, 7, 4])
    assert torch.equal(augmented(name, images[2:5], [9, 1, 0]), together[2:5])


def test_flip_flips_some_images_of_a_batch():
    """Each image is drawn for on its own: some are flipped, some are not, and nothing else happens."""
    images = pixels(40)
    result = augmented("flip", images)
    flipped = [torch.equal(new, old.flip(-1)) for new, old in zip(result, images, strict=True)]
    kept = [torch.equal(new, old) for new, old in zip(result, images, strict=True)]
    assert all(one != other for one, other in zip(flipped, kept, strict=True))
    assert 8 < sum(flipped) < 32


@pytest.mark.parametrize("name", NAMES)
def test_augmentation_keeps_shape_and_type(name):
    """Raw images stay raw images."""
    result = augmented(name, pixels(3))
    assert (result.shape, result.dtype) == ((3, 3, 32, 32), torch.uint8)


def test_crop_moves_by_an_eighth_at_most():
    """A crop keeps the middle of the picture within an eighth of its size."""
    images = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 16, 16] = 255
    places = augmented("crop", images)[:, 0].nonzero()
    assert len(places) == 40
    moved = places[:, 1:] - 16
    assert moved.abs().max() <= 4
    assert len(moved.unique()) > 5


def test_color_keeps_brightness_within_a_fifth():
    """The colors of a plain gray image change by 20 % at most, and do change."""
    images = torch.full((40, 3, 32, 32), 100, dtype=torch.uint8)
    values = augmented("color", images).float()
    assert 100 * 0.8**2 <= values.min() < 95  # brightness and contrast may both darken
    assert 105 < values.max() <= 100 * 1.2**2
    assert len(values[:, 0, 0, 0].unique()) > 5


def test_several_are_applied_in_order():
    """A list is applied one after the other, names and callables mixed."""
    images = pixels(4)
    result = augmented([lambda image: image // 2, lambda image: image + 1], images)
    assert torch.equal(result, images // 2 + 1)
    assert torch.equal(augmented(["flip", lambda image: image], images), augmented("flip", images))


def test_torchvision_transform_serves():
    """A `transforms.v2` transform is drawn image by image like the named ones."""
    images = pixels(40)
    assert torch.equal(augmented(v2.RandomHorizontalFlip(), images), augmented("flip", images))


def test_nothing_to_do_changes_nothing():
    """An empty list of augmentations leaves the images."""
    images = pixels(4)
    assert torch.equal(augmented([], images), images)


@pytest.mark.parametrize(
    ("augment", "match"),
    [
        ("flop", r"augment='flop' is not known. Did you mean 'flip'\?"),
        (["flip", "zoom"], r"augment='zoom' is not known. Known: 'flip', 'crop', 'color', 'trivial'"),
        (["flip", 3], r"augment=3 is not known"),
    ],
)
def test_unknown_augmentation_is_refused(augment, match):
    """An unknown name is refused with those that exist."""
    with pytest.raises(ArgumentError, match=match):
        build_augmentation(augment, 32)


@pytest.mark.parametrize("augment", [True, 5])
def test_augmentation_of_another_type_is_refused(augment):
    """What is no name, callable or list is refused by name, not with Python's own error."""
    with pytest.raises(ArgumentError, match=rf"augment={augment!r} is not known.*'flip'"):
        build_augmentation(augment, 32)


@pytest.mark.parametrize(
    ("augment", "match"),
    [
        (lambda image: image[:, :16], r"changed image 0 from \(3, 32, 32\) torch.uint8 to \(3, 16, 32\) torch.uint8"),
        (
            lambda image: image / 255,
            r"from \(3, 32, 32\) torch.uint8 to \(3, 32, 32\) torch.float32: expected",
        ),
        (v2.ToPILImage(), r"changed image 0 .*expected the same shape and dtype"),
    ],
)
def test_transform_that_changes_shape_or_type_is_refused(augment, match):
    """A transform that crops smaller or normalises is refused with what it made."""
    with pytest.raises(ImageError, match=match):
        augmented(augment, pixels(2))


def test_augmentation_leaves_the_global_generators_alone():
    """The user's own random numbers do not move."""
    images = pixels(4)
    states = torch.get_rng_state(), random.getstate()
    augmented([*NAMES, lambda image: image + random.randint(0, 1)], images)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_preprocessed_images_are_not_augmented(model, data):
    """Augmentation together with preprocessed images is refused before a step, not ignored."""
    trainer = make_trainer(model)
    with pytest.raises(
        ImageError, match=r"augment works on raw images, but these are preprocessed \(float\): pass uin"
    ):
        trainer.fit((model.backbone.preprocess(data[0]), data[1]), augment="flip", verbose=0, epochs=1)
    assert trainer.global_step == 0


@pytest.mark.parametrize("augment", [None, "flip"])
def test_training_images_are_augmented_when_asked_and_only_then(model, data, augment):
    """Without `augment` the model trains on the images as they are, with it on changed ones."""
    seen = []
    handle = model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    make_trainer(model).fit(data, batch_size=24, augment=augment, verbose=0, epochs=1)
    handle.remove()
    expected = model.backbone.preprocess(data[0])
    unchanged = sum(any(torch.equal(image, other) for other in expected) for image in seen[0])
    assert (unchanged == 24) == (augment is None)
    assert unchanged > 0


def test_validation_and_prediction_are_not_augmented(model, data):
    """`augment` changes training images only: the validation figures are those of the plain images."""
    trainer = make_trainer(model)
    history = trainer.fit(data, validation_data=data, augment=lambda image: image * 0, verbose=0, epochs=1)
    assert history.history["val_loss"] == [trainer.evaluate(data)["loss"]]


def test_augmentation_changes_from_epoch_to_epoch(flat_model):
    """An image is drawn for anew in each epoch."""
    drawn = []
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    make_trainer(flat_model).fit(
        (images, [0, 1, 2, 0]), epochs=3, verbose=0, augment=lambda image: drawn.append(float(torch.rand(1))) or image
    )
    assert len(set(drawn)) == len(drawn) == 12
