"""Hold some of the training data back to validate on."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import transferkit as tk
from tiny import make_images, make_trainer
from transferkit.data.open import open_data
from transferkit.data.selection import split_validation
from transferkit.data.sources import count_batches
from transferkit.errors import ArgumentError, EmptyDataError, NonFiniteError, TargetError

CLASSES = ["ant", "bee", "cat", "dog"]


def numbered(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that say which number they have, of four classes in turn."""
    numbers = torch.arange(count)
    return numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1), numbers % 4


def read(part) -> tuple[list[int], list[int], list[int]]:
    """The numbers on the images of a part, those of its targets, and its places."""
    images, targets, places = zip(*part.batches(3, seed=0, order=None), strict=True)
    return torch.cat(images)[:, 0, 0, 0].tolist(), torch.cat(targets).tolist(), [p for some in places for p in some]


def split(data: object, share: float, seed: int = 0):
    train, held_out = split_validation(open_data(data, CLASSES), share, seed)
    return read(train)[0], read(held_out)[0]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_the_parts_are_disjoint_and_complete(share):
    """Every image is in exactly one of the two parts, and the share is kept."""
    train, held_out = split(numbered(40), share)
    assert sorted(train + held_out) == list(range(40))
    assert len(held_out) == round(40 * share)


def test_each_image_keeps_its_target_and_its_place():
    """In both parts an image comes with its own target and with its place in the whole data."""
    for part in split_validation(open_data(numbered(40), CLASSES), 0.25, seed=0):
        images, targets, places = read(part)
        assert images == places
        assert targets == [number % 4 for number in images]


def test_a_part_says_how_much_it_is():
    """A part tells its number of images and of batches, the ragged one included."""
    train, held_out = split_validation(open_data(numbered(40), CLASSES), 0.25, seed=0)
    assert (train.num_images, held_out.num_images) == (30, 10)
    assert (count_batches(train, 8), count_batches(held_out, 5)) == (4, 2)


def test_a_part_is_read_in_the_order_asked_for():
    """An order of a part is one of its own images."""
    _, held_out = split_validation(open_data(numbered(40), CLASSES), 0.25, seed=0)
    order = torch.arange(10).flip(0)
    (_, targets, places), *others = held_out.batches(10, seed=0, order=order)
    assert others == []
    assert targets.tolist() == [place % 4 for place in places]
    assert places == sorted(places, reverse=True)


def test_the_split_depends_on_the_seed_alone():
    """The same seed holds back the same images, whatever was drawn before; another seed holds back others."""
    first = split(numbered(40), 0.25, seed=3)
    torch.rand(5)
    assert split(numbered(40), 0.25, seed=3) == first
    assert split(numbered(40), 0.25, seed=4) != first


def test_the_held_out_images_are_drawn_at_random():
    """Data sorted by class loses images of all parts of it, not its last ones as in Keras."""
    held_out = split(numbered(200), 0.2)[1]
    assert {number // 50 for number in held_out} == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", ["arrays", "list of targets", "data set", "samples"])
def test_every_kind_of_data_is_divided_alike(kind):
    """Tensors, arrays, lists and data sets lose the same images."""
    images, targets = numbered(20)
    data = {
        "arrays": (images.numpy().copy(), targets.numpy()),
        "list of targets": (images, targets.tolist()),
        "data set": TensorDataset(images, targets),
        "samples": list(zip(images, targets.tolist(), strict=True)),
    }[kind]
    assert split(data, 0.25) == split((images, targets), 0.25)


class LabelledColumn:
    """A column that is indexed by label and not by place, as a pandas Series is."""

    def __init__(self, labels: list[int], values: list[int]) -> None:
        self.labels, self.values = labels, np.array(values)

    def __len__(self) -> int:
        return len(self.values)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.values

    def __getitem__(self, labels: np.ndarray) -> np.ndarray:
        return self.values[[self.labels.index(label) for label in labels]]


def test_a_shuffled_column_keeps_its_images():
    """A pandas column whose rows were shuffled is divided by place, so that each image keeps its own target."""
    images, targets = numbered(20)
    column = LabelledColumn(list(reversed(range(20))), targets.tolist())
    train, held_out = split_validation(open_data((images, column), CLASSES), 0.25, seed=0)
    for part in (train, held_out):
        images, targets, _ = read(part)
        assert targets == [number % 4 for number in images]


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.97])
def test_every_class_is_in_both_parts(share):
    """A rare class is held back in proportion, and at least once; one of its images at least is left to train on."""
    targets = torch.tensor([0] * 60 + [1] * 30 + [2] * 2 + [3] * 1)
    images = torch.zeros(93, 3, 1, 1, dtype=torch.uint8)
    train, held_out = (part.all_targets() for part in split_validation(open_data((images, targets), CLASSES), share, 0))
    assert set(train.tolist()) == {0, 1, 2, 3}
    assert set(held_out.tolist()) == {0, 1, 2}  # the only image of the last trains
    assert abs(int((held_out == 0).sum()) - 60 * share) < 1.01


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan"), 5, "a fifth"])
def test_a_share_out_of_range_is_refused(share):
    """A share that is no number above 0 and below 1 is refused by name."""
    with pytest.raises(ArgumentError, match=rf"validation_split={share!r} .*expected a"):
        split(numbered(20), share)


@pytest.mark.parametrize(("count", "share", "left"), [(4, 0.1, "4 training and 0"), (4, 0.9, "0 training and 4")])
def test_a_part_without_images_is_refused(count, share, left):
    """A share that leaves one part empty is refused with the counts."""
    with pytest.raises(EmptyDataError, match=rf"of 4 images gives {left} validation images: expected at least 1"):
        split(numbered(count), share)


def test_a_loader_is_refused():
    """A DataLoader cannot be divided; the message says what can be done."""
    with pytest.raises(ArgumentError, match=r"cannot split a DataLoader.*pass .*validation_data="):
        split(DataLoader(TensorDataset(*numbered(20))), 0.25)


def test_validation_data_and_a_split_are_refused_together(model, data):
    """Two sources of validation data are one too many."""
    trainer = tk.Trainer(model, device="cpu", precision="fp32")
    with pytest.raises(ArgumentError, match=r"validation_data and validation_split are both given: expected one"):
        trainer.fit(data, validation_data=data, validation_split=0.25, epochs=1)


@pytest.mark.parametrize("count", [20, 28])
def test_another_number_of_targets_is_seen_before_the_split(model, data, count):
    """More or fewer targets than images are refused with a split as without one."""
    trainer = tk.Trainer(model, device="cpu", precision="fp32")
    with pytest.raises(TargetError, match=rf"24 images but {count} targets: expected one for each"):
        trainer.fit((data[0], torch.zeros(count, dtype=torch.int64)), validation_split=0.25, verbose=0, epochs=1)


@pytest.mark.parametrize("as_dataset", [False, True])
@pytest.mark.parametrize("index", [0, 11, 23])
def test_a_bad_target_is_named_by_its_place_in_the_whole_data(model, data, index, as_dataset):
    """With a split too, a bad target is named by its place in what the user passed."""
    images, targets = data
    targets[index] = 9
    trainer = tk.Trainer(model, device="cpu", precision="fp32")
    whole = TensorDataset(images, targets) if as_dataset else (images, targets)
    with pytest.raises(TargetError, match=rf"target 9 at index {index} is out of range"):
        trainer.fit(whole, validation_split=0.25, verbose=0, epochs=1)


def test_fit_validates_on_the_held_out_images(model, data):
    """`fit` with a split trains on the one part and validates on the other."""
    trainer = tk.Trainer(model, device="cpu", precision="fp32", lr=1e-2, seed=5)
    counts = []
    history = trainer.fit(
        data,
        validation_split=0.25,
        batch_size=4,
        verbose=0,
        callbacks=[lambda trainer, report: counts.append(trainer.global_step)],
        epochs=1,
    )
    assert counts == [5]  # 18 images in batches of 4
    places = split_validation(open_data(data, model.classes), 0.25, seed=5)[1].indices
    measured = trainer.evaluate((data[0][places], data[1][places]), batch_size=4)
    assert history.history["val_loss"] == [measured["loss"]]


@pytest.mark.parametrize(
    "call",
    [
        lambda trainer, data: trainer.evaluate(data),
        lambda trainer, data: trainer.assess(data),
        lambda trainer, data: trainer.predict_proba(data[0]),
        lambda trainer, data: trainer.fit(make_images(), validation_data=data, epochs=1, verbose=0),
    ],
)
def test_an_image_of_nan_is_refused_by_its_number(model, call):
    """No figure is made of an image that holds NaN: the error names it, in validation as in prediction."""
    images = torch.randn(12, 3, 32, 32)
    images[7] = torch.nan
    with pytest.raises(NonFiniteError, match="the logits of image 7 are infinite or NaN"):
        call(make_trainer(model), (images, torch.arange(12) % 3))
