"""Whatever the trainer accepts as data."""

import gc
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import transferkit as tk
from tiny import CLASSES, Stream, make_trainer
from transferkit.data.open import open_data
from transferkit.data.sources import count_batches, epoch_order
from transferkit.errors import ArgumentError, EmptyDataError, HeadMismatchError, ImageError, TargetError

ASSETS = Path(__file__).parent.parent / "examples" / "assets"


class Samples(Dataset):
    """A data set of given samples that keeps count of what was read."""

    def __init__(self, samples, transform=None):
        self.samples = samples
        self.transform = transform
        self.read = []

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.read.append(index)
        image, target = self.samples[index]
        return (self.transform(image) if self.transform else image), target


def pil_samples(count=6):
    """PIL images of different sizes, with targets."""
    generator = np.random.default_rng(0)
    sizes = [(32 + 5 * (index % 3), 32 + 7 * (index % 2), 3) for index in range(count)]
    return [
        (Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)), index % 3)
        for index, size in enumerate(sizes)
    ]


def all_batches(source, batch_size=4, *, seed=0, order=None):
    return list(source.batches(batch_size, seed=seed, order=order))


def assert_same_batches(one, other):
    assert len(one) == len(other)
    for (images, targets, places), (other_images, other_targets, other_places) in zip(one, other, strict=True):
        assert len(images) == len(other_images)
        assert all(torch.equal(image, other) for image, other in zip(images, other_images, strict=True))
        assert torch.equal(targets, other_targets)
        assert places == other_places


# ---- what is accepted


def test_every_kind_of_data_gives_the_same_evaluation(model, data):
    """Tensors, NHWC arrays, Keras-style columns, one-hot rows, data sets and loaders are one and the same data."""
    images, targets = data
    kinds = [
        (images.permute(0, 2, 3, 1).numpy(), targets.numpy()),
        (images, targets[:, None].numpy()),
        (images, targets.tolist()),
        (images, torch.nn.functional.one_hot(targets, 3)),
        TensorDataset(images, targets),
        list(zip(images, targets.tolist(), strict=True)),
        Samples([(v2.functional.to_pil_image(image), int(target)) for image, target in zip(*data, strict=True)]),
        DataLoader(TensorDataset(images, targets), batch_size=32),
        DataLoader(Stream(data), batch_size=32),
    ]
    trainer = make_trainer(model)
    expected = trainer.evaluate(data)
    for kind in kinds:
        measured = trainer.evaluate(kind)
        assert measured["accuracy"] == expected["accuracy"]
        assert measured["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_one_hot_targets_train_like_indices(make_backbone, data):
    """Training on one-hot rows gives nearly the weights of training on class indices."""
    images, targets = data
    trained = []
    for given_targets in (targets, torch.nn.functional.one_hot(targets, 3)):
        torch.manual_seed(1)
        model = tk.attach_head(make_backbone(), CLASSES)
        make_trainer(model, optimizer="sgd").fit((images, given_targets), epochs=2, batch_size=8, verbose=0)
        trained.append(model.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-4, atol=1e-6)


def test_soft_targets_are_what_is_trained_on(make_backbone, data):
    """A row of shares gives the loss of `nn.functional.cross_entropy` with these shares."""
    images = data[0]
    rows = torch.rand(24, 3)
    rows /= rows.sum(dim=1, keepdim=True)
    model = tk.attach_head(make_backbone(), CLASSES, pooling="flatten")
    with torch.no_grad():
        logits = model(model.backbone.preprocess(images))
        expected = torch.nn.functional.cross_entropy(logits, rows)
    step = next(make_trainer(model).steps((images, rows), batch_size=24))
    torch.testing.assert_close(step.loss, expected, rtol=1e-6, atol=0)


def test_pil_images_of_different_sizes_are_each_resized(model):
    """A data set of PIL images of different sizes is predicted as each image alone would be."""
    samples = pil_samples()
    trainer = make_trainer(model)
    together = trainer.predict_proba(Samples(samples), batch_size=4)
    alone = [trainer.predict_proba(np.asarray(image.convert("RGB")).copy()[None])[0] for image, _ in samples]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_image_folder_of_many_modes_and_sizes_trains(backbone, tmp_path):
    """An ImageFolder of gray, palette, alpha and CMYK files of several sizes trains as it is."""
    modes = {"gray": ("L", "png"), "alpha": ("RGBA", "png"), "palette": ("P", "png"), "print": ("CMYK", "jpg")}
    for number, (mode, suffix) in enumerate(modes.values()):
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (33 + number, 40), (90, 10 * number, 0)).convert(mode).save(
                tmp_path / name / f"{mode}.{suffix}"
            )
    folder = ImageFolder(tmp_path)
    model = tk.attach_head(backbone, folder.classes)
    trainer = make_trainer(model)
    history = trainer.fit(folder, epochs=1, batch_size=3, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert trainer.global_step == 3
    assert model.classes == ("cat", "dog")


def test_predict_takes_images_alone(model, data):
    """Images without targets, a list of PIL images and a data set with targets predict alike."""
    images, targets = data
    trainer = make_trainer(model)
    expected = trainer.predict_proba(images)
    pil = [v2.functional.to_pil_image(image) for image in images]
    for kind in (data, TensorDataset(images, targets), pil, DataLoader(images, batch_size=32)):
        np.testing.assert_allclose(trainer.predict_proba(kind), expected, rtol=1e-5)


def test_predict_takes_a_tensor_data_set_of_images_alone(model, data):
    """`TensorDataset(images)`, whose samples are tuples of one, is a data set of images alone."""
    trainer = make_trainer(model)
    assert trainer.predict(TensorDataset(data[0])).tolist() == trainer.predict(data[0]).tolist()


def test_predict_does_not_look_at_the_targets(model, data):
    """Targets that could not be trained on do not stop a prediction."""
    images = data[0]
    bad = [99] * len(images)
    trainer = make_trainer(model)
    expected = trainer.predict(images).tolist()
    assert trainer.predict((images, bad)).tolist() == expected
    assert trainer.predict(list(zip(images, bad, strict=True))).tolist() == expected


def test_predict_takes_a_folder_of_unknown_images(model, data, tmp_path):
    """An ImageFolder whose one folder is no class can be predicted: its targets are not looked at."""
    (tmp_path / "unknown").mkdir()
    for number, image in enumerate(data[0][:3]):
        v2.functional.to_pil_image(image).save(tmp_path / "unknown" / f"{number}.png")
    trainer = make_trainer(model)
    assert trainer.predict(ImageFolder(tmp_path)).tolist() == trainer.predict(data[0][:3]).tolist()


def test_images_given_are_not_changed(model, data):
    """Training, augmentation included, leaves the user's tensors as they were."""
    images, targets = data[0].clone(), data[1].clone()
    make_trainer(model).fit(data, augment=["flip", lambda image: image.fill_(0)], verbose=0, epochs=1)
    assert torch.equal(data[0], images)
    assert torch.equal(data[1], targets)


# ---- order, workers, seeds


@settings(deadline=None, database=None, max_examples=60, derandomize=True)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 2**31), epoch=st.integers(0, 100))
def test_every_image_comes_exactly_once_in_an_epoch(count, batch_size, seed, epoch):
    """Whatever size, seed and epoch: each image once, with its own target, in full batches but for the last."""
    numbers = torch.arange(count)
    images = numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    source = open_data((images, numbers), [str(number) for number in range(max(count, 2))])
    batches = all_batches(source, batch_size, order=epoch_order(count, seed, epoch))
    assert len(batches) == count_batches(source, batch_size)
    assert [len(targets) for _, targets, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    seen = [place for _, _, places in batches for place in places]
    assert sorted(seen) == list(range(count))
    for batch_images, targets, places in batches:
        assert batch_images[:, 0, 0, 0].tolist() == targets.tolist() == places


def test_order_depends_on_seed_and_epoch_alone():
    """The order is that of (seed, epoch), whatever was drawn before, and both change it."""
    order = epoch_order(50, 3, 7)
    torch.rand(5)
    assert torch.equal(epoch_order(50, 3, 7), order)
    assert not torch.equal(epoch_order(50, 3, 8), order)
    assert not torch.equal(epoch_order(50, 4, 7), order)


def test_fit_reads_each_epoch_in_its_own_order(flat_model):
    """`fit` reads every image once an epoch, shuffled anew in each."""
    dataset = Samples([(torch.zeros(3, 32, 32, dtype=torch.uint8), 0)] * 20)
    make_trainer(flat_model, seed=3).fit(dataset, epochs=2, batch_size=8, verbose=0)
    read = dataset.read[1:]  # the first is looked at before the run
    assert read[:20] == epoch_order(20, 3, 0).tolist()
    assert read[20:] == epoch_order(20, 3, 1).tolist()


def test_evaluate_and_predict_read_in_the_order_of_the_data(model):
    """Without training there is no shuffling."""
    dataset = Samples([(torch.zeros(3, 32, 32, dtype=torch.uint8), 0)] * 20)
    trainer = make_trainer(model)
    trainer.evaluate(dataset)
    trainer.predict(dataset)
    assert dataset.read == [0, *range(20), 0, *range(20)]


@pytest.mark.slow
def test_workers_read_the_same_batches():
    """Two workers give the batches that the main process gives, random transforms in the data set included."""
    jitter = v2.Compose(
        [v2.RandomHorizontalFlip(), v2.RandomResizedCrop(32), lambda image: image.rotate(random.uniform(0, 90))]
    )
    dataset = Samples(pil_samples(10), jitter)
    order = epoch_order(10, 0, 0)
    alone = all_batches(open_data(dataset, CLASSES), seed=5, order=order)
    workers = all_batches(open_data(dataset, CLASSES, num_workers=2), seed=5, order=order)
    assert_same_batches(alone, workers)


@pytest.mark.slow
def test_workers_train_the_same_weights(make_backbone):
    """`num_workers` does not change a bit of the result."""
    trained = []
    for num_workers in (0, 2):
        torch.manual_seed(1)
        model = tk.attach_head(make_backbone(), CLASSES)
        dataset = Samples(pil_samples(10), v2.RandomHorizontalFlip())
        make_trainer(model).fit(dataset, epochs=2, batch_size=4, num_workers=num_workers, verbose=0)
        trained.append(model.state_dict())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


@pytest.mark.slow
def test_bad_target_in_a_worker_is_named(model):
    """The message about a bad image reaches the user out of a worker process."""
    samples = [*pil_samples(5), (Image.new("I;16", (32, 32)), 0)]
    with pytest.raises(ImageError, match=r"image 5 has mode 'I;16': expected 8 bits"):
        make_trainer(model).evaluate(Samples(samples), num_workers=2)
    gc.collect()  # the traceback holds the loader and so a thread of its queues


def test_random_transforms_of_a_data_set_follow_the_seed():
    """A data set's own random transform draws by seed and place: the same seed the same images, another one others."""
    dataset = Samples(
        pil_samples(10), lambda image: v2.functional.rotate(image.resize((32, 32)), random.uniform(0, 90))
    )
    source = open_data(dataset, CLASSES)
    first = all_batches(source, seed=5)
    random.random()
    assert_same_batches(first, all_batches(source, seed=5))
    other = all_batches(source, seed=6)
    assert not torch.equal(first[0][0], other[0][0])


def test_random_transforms_do_not_depend_on_the_batch():
    """An image's random transform is the same whatever batch it is in."""
    dataset = Samples(
        pil_samples(10), lambda image: v2.functional.rotate(image.resize((32, 32)), random.uniform(0, 90))
    )
    source = open_data(dataset, CLASSES)
    by_four = torch.cat([images for images, _, _ in all_batches(source, 4, seed=5)])
    by_three = torch.cat([images for images, _, _ in all_batches(source, 3, seed=5)])
    assert torch.equal(by_four, by_three)


def test_a_data_set_is_augmented_anew_in_each_epoch(flat_model):
    """The same image is drawn differently in the next epoch."""
    angles = []
    dataset = Samples(
        [(torch.zeros(3, 32, 32, dtype=torch.uint8), 0)] * 4, lambda image: angles.append(random.random()) or image
    )
    make_trainer(flat_model).fit(dataset, epochs=2, batch_size=4, verbose=0)
    assert len(set(angles)) == len(angles) == 9


def test_reading_a_data_set_leaves_the_global_generators_alone():
    """Random transforms in the data set do not move the user's own random numbers."""
    dataset = Samples(pil_samples(10), v2.RandomResizedCrop(32))
    states = torch.get_rng_state(), random.getstate()
    all_batches(open_data(dataset, CLASSES), order=epoch_order(10, 0, 0))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


# ---- what is refused


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        ((torch.zeros(0, 3, 32, 32, dtype=torch.uint8), []), EmptyDataError, r"no images: got shape \(0, 3, 32, 32\)"),
        (
            (torch.zeros(0, 3, 32, 32, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)),
            EmptyDataError,
            r"no images: got shape \(0, 3, 32, 32\), expected 1 or more",
        ),
        (Samples([]), EmptyDataError, r"empty Samples: expected 1 image or more"),
        (
            DataLoader(Samples(pil_samples(5)), batch_size=8, drop_last=True),
            EmptyDataError,
            r"makes 0 batches: 5 images, batch_size 8, drop_last=True. Expected 1 batch",
        ),
        (
            (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), [0, 1]),
            TargetError,
            r"4 images but 2 targets: expected one for each",
        ),
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), TargetError, r"images but no targets: expected a pair"),
        (TensorDataset(torch.zeros(4, 3, 32, 32)), TargetError, r"sample 0 has 1 parts: expected a pair"),
        ([{"image": 1, "label": 2}], ImageError, r"image 0: image is a int: expected raw image"),
        (Stream([]), ArgumentError, r"a Stream, which has no length or order: wrap it in a DataLoader"),
        (None, ArgumentError, r"data is of type NoneType: expected a pair \(images, targets\), a torch Dataset"),
        ({"images": 1}, ArgumentError, r"data is a dict of 'images': which is .* is not clear"),
        ("photos/train", ArgumentError, r"data is a str: expected .*ImageFolder"),
        (Path("photos/train"), ArgumentError, r"data is a PosixPath: expected .*ImageFolder"),
    ],
)
def test_data_that_cannot_be_used_is_refused(data, error, match):
    """Empty data, data without targets and data of another kind are refused with what is expected."""
    with pytest.raises(error, match=match):
        open_data(data, CLASSES)


def test_a_list_of_images_of_one_size_trains_as_the_array_of_them(model, data):
    """A list of arrays beside the targets is the same data as one array."""
    trainer = make_trainer(model)
    assert trainer.evaluate((list(data[0]), data[1])) == trainer.evaluate(data)


@pytest.mark.parametrize("target", [-1, 3])
@pytest.mark.parametrize("kind", ["tensors", "data set", "targets of the data set", "loader"])
def test_target_out_of_range_is_named_by_value_and_place(model, data, kind, target):
    """A target out of range is named with its value and its place in the data set, however the epoch is shuffled."""
    images, targets = data
    targets[13] = target
    dataset = TensorDataset(images, targets)
    if kind == "targets of the data set":
        dataset.targets = targets.tolist()
    kinds = {"tensors": data, "loader": DataLoader(dataset, batch_size=5)}
    with pytest.raises(TargetError, match=rf"target {target} at index 13 is out of range: expected 0 to 2"):
        make_trainer(model).fit(
            kinds.get(kind, dataset), batch_size=None if kind == "loader" else 5, verbose=0, epochs=1
        )


def test_target_transform_is_applied_before_targets_are_judged(data):
    """A data set whose `target_transform` makes its 1-based `targets` usable is taken, as EMNIST's letters are."""
    images, targets = data
    dataset = Samples([(image, int(target)) for image, target in zip(images, targets, strict=True)])
    dataset.targets = (targets + 1).tolist()
    dataset.target_transform = lambda target: target - 1
    batches = all_batches(open_data(dataset, CLASSES), 24)
    assert torch.equal(batches[0][1], targets)


def test_a_bad_target_deep_in_a_data_set_is_seen_before_a_step(model):
    """A list beside the data set tells where to look, so that the sample is refused before an epoch is lost."""
    samples = pil_samples(6)
    samples[4] = (samples[4][0], 7)
    dataset = Samples(samples)
    dataset.targets = [target for _, target in samples]
    with pytest.raises(TargetError, match=r"target 7 at index 4 is out of range"):
        open_data(dataset, CLASSES)
    assert dataset.read == [0, 4]


@pytest.mark.parametrize("target", ["cat", None, [0, 1], 0.5])
def test_sample_whose_target_is_no_class_index_is_refused(target):
    """A name, None, a list or a fraction for a target is refused as a target, not with torch's own error."""
    with pytest.raises(TargetError, match=r"expected class indices"):
        open_data(Samples([(image, target) for image, _ in pil_samples(3)]), CLASSES)


def test_samples_whose_targets_differ_in_form_are_refused():
    """An index here and a row there are refused as targets, not with torch's own error."""
    samples = [(torch.zeros(3, 4, 4, dtype=torch.uint8), target) for target in (0, [1.0, 0.0, 0.0])]
    with pytest.raises(TargetError, match=r"expected class indices"):
        all_batches(open_data(samples, CLASSES))


def test_string_targets_of_a_loader_are_refused():
    """A loader that gives class names is refused with the way to make indices."""
    samples = [(torch.zeros(3, 4, 4, dtype=torch.uint8), "cat")] * 3
    with pytest.raises(TargetError, match=r"targets are not numbers.*for name in names"):
        all_batches(open_data(DataLoader(samples), CLASSES))


def test_sixteen_bit_image_is_refused_with_its_place(model):
    """A 16-bit PIL image deep in a data set is refused with its place there, though the epoch is shuffled."""
    samples = pil_samples(9)
    samples[7] = (Image.new("I;16", (32, 32)), 0)
    with pytest.raises(ImageError, match=r"image 7 has mode 'I;16': expected 8 bits per channel"):
        make_trainer(model).fit(Samples(samples), batch_size=2, verbose=0, epochs=1)


def test_mixed_raw_and_preprocessed_images_are_refused():
    """uint8 and float images in one batch are refused with their places."""
    samples = [(torch.zeros(3, 4, 4, dtype=dtype), 0) for dtype in (torch.uint8, torch.uint8, torch.float32)]
    with pytest.raises(ImageError, match=r"images \[0, 1, 2\] are partly raw .* and partly preprocessed"):
        all_batches(open_data(samples, CLASSES))


def test_preprocessed_images_of_different_sizes_are_refused():
    """Float images cannot be resized any more."""
    samples = [(-torch.ones(3, size, 4), 0) for size in (4, 5)]
    with pytest.raises(ImageError, match=r"images \[0, 1\] are preprocessed \(float\) but differ in size"):
        all_batches(open_data(samples, CLASSES))


@pytest.mark.parametrize("kind", ["tensors", "data set", "loader"])
def test_images_scaled_to_0_to_1_are_refused_before_a_step(model, data, kind):
    """ToTensor without normalisation, the commonest mistake, is refused before the first step with the remedy."""
    images, targets = data[0] / 255, data[1]
    dataset = TensorDataset(images, targets)
    kinds = {"tensors": (images, targets), "data set": dataset, "loader": DataLoader(dataset, batch_size=8)}
    trainer = make_trainer(model)
    before = model.head.logits.weight.clone()
    with pytest.raises(ImageError, match=r"values from 0 to .*not preprocessed.*without ToTensor"):
        trainer.fit(kinds[kind], verbose=0, epochs=1)
    assert torch.equal(model.head.logits.weight, before)


def test_preprocessed_images_of_another_size_are_refused(model, data):
    """Preprocessed images of another size than the backbone's are refused with both sizes."""
    images = model.backbone.preprocess.with_image_size(48)(data[0])
    with pytest.raises(ImageError, match=r"have 48x48 pixels: expected 32x32. Pass raw uint8 images"):
        make_trainer(model).fit((images, data[1]), verbose=0, epochs=1)


def test_batches_of_a_loader_need_two_parts(data):
    """A loader whose batches have another number of parts is refused."""
    loader = DataLoader(TensorDataset(*data, data[1]), batch_size=8)
    with pytest.raises(TargetError, match=r"batch 0 of the DataLoader has 3 parts: expected a pair"):
        all_batches(open_data(loader, CLASSES))


def test_loader_that_makes_no_batch_is_refused_when_read():
    """A loader without length that turns out empty is refused when it is read."""
    source = open_data(DataLoader(Stream(([], []))), CLASSES)
    assert count_batches(source, 4) is None
    with pytest.raises(EmptyDataError, match=r"made no batch in this epoch: expected 1 or more in every epoch"):
        all_batches(source)


# ---- classes


class Named(Samples):
    def __init__(self, classes, count=6):
        super().__init__([(torch.zeros(3, 32, 32, dtype=torch.uint8), 0)] * count)
        self.classes = classes


@pytest.mark.parametrize("classes", [["cat", "dog"], ["dog", "cat", "owl"], ["cat", "dog", "fox"]])
@pytest.mark.parametrize(
    "wrap",
    [lambda d: d, lambda d: Subset(d, [0, 1]), DataLoader, lambda d: DataLoader(Subset(Subset(d, [0, 1]), [1]))],
    ids=["data set", "subset", "loader", "loader of subsets"],
)
def test_data_of_other_classes_is_refused(classes, wrap):
    """A data set with other classes, or in another order, is refused, also inside subsets and loaders."""
    with pytest.raises(
        HeadMismatchError, match=rf"has {len(classes)} classes \({classes[0]}, .*the model 3 \(cat, dog"
    ):
        open_data(wrap(Named(classes)), CLASSES)


def test_data_of_the_same_classes_is_taken():
    """The model's own classes in the same order pass, and a numbered model takes any names of that number."""
    assert open_data(Named(CLASSES), CLASSES).num_images == 6
    assert open_data(Named(CLASSES), ["0", "1", "2"]).num_images == 6


def test_validation_data_of_other_classes_is_refused_before_a_step(model, data):
    """Validation folders that miss a class, which would shift every label, are refused before the first step."""
    trainer = make_trainer(model)
    with pytest.raises(HeadMismatchError, match=r"the data has 2 classes \(cat, owl\), the model 3"):
        trainer.fit(data, validation_data=Named(["cat", "owl"]), verbose=0, epochs=1)
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda images, targets: (images / 255, targets), ImageError, "not preprocessed"),
        (lambda images, targets: (images, targets + 1), TargetError, "target 3 at index 2 is out of range"),
        (lambda images, targets: (images[:0], targets[:0]), EmptyDataError, "no images"),
        (lambda images, targets: (images, targets[:5]), TargetError, "24 images but 5 targets"),
        (lambda images, targets: TensorDataset(images / 255, targets), ImageError, "not preprocessed"),
        (lambda images, targets: DataLoader(TensorDataset(images, targets + 7)), TargetError, "target 7 at index 0"),
        (lambda images, targets: DataLoader(Stream(([], []))), EmptyDataError, "made no batch"),
    ],
)
def test_validation_data_that_cannot_be_used_is_refused_before_a_step(model, data, make, error, match):
    """No epoch is lost on validation data that cannot be used: weights and step count stay."""
    trainer = make_trainer(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=match):
        trainer.fit(data, validation_data=make(*data), verbose=0, epochs=1)
    assert trainer.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("num_workers", [-1, 1.5, True, "2"])
def test_number_of_workers_is_checked(data, num_workers):
    """`num_workers` is a whole number of 0 or more."""
    with pytest.raises(
        ArgumentError, match=rf"num_workers={num_workers!r} cannot be used: expected a whole number of 0"
    ):
        open_data(data, CLASSES, num_workers=num_workers)


@pytest.mark.slow
def test_photographs_train_a_head(tmp_path):
    """A head on the real VGG16 tells real photographs apart better than chance, from files on disk."""
    with zipfile.ZipFile(ASSETS / "cifar10_subset.zip") as archive:
        archive.extractall(tmp_path)
    train = ImageFolder(tmp_path / "train")
    backbone = tk.load_backbone(
        "vgg16",
        weights=ASSETS / "vgg16_imagenet_features_bf16.pt",
        preprocessing="IMAGENET1K_FEATURES",
        image_size=32,
    )
    model = tk.attach_head(tk.freeze_until(backbone, "head"), train.classes)
    trainer = make_trainer(model, lr=1e-3)
    few = Subset(train, torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:300].tolist())
    trainer.fit(few, epochs=3, verbose=0)
    test = ImageFolder(tmp_path / "test")
    some = Subset(test, torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:100].tolist())
    assert trainer.evaluate(some)["accuracy"] > 0.3  # chance is 0.1
