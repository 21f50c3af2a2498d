"""Hold some of the training data back to validate on."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import transferkit as tk
from transferkit.errors import ArgumentError, EmptyDataError, TargetError
from transferkit.validation import split_validation


def numbered(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and targets that both say which number they have."""
    numbers = torch.arange(count)
    return numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1), numbers


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_the_parts_are_disjoint_and_complete(share):
    """Every image is in exactly one of the two parts, with its own target, and the share is kept."""
    train, held_out = split_validation(numbered(40), share, seed=0)
    assert sorted(train[1].tolist() + held_out[1].tolist()) == list(range(40))
    assert len(held_out[1]) == round(40 * share)
    for images, targets in (train, held_out):
        assert images[:, 0, 0, 0].tolist() == targets.tolist()


def test_the_split_depends_on_the_seed_alone():
    """The same seed holds back the same images, whatever was drawn before; another seed holds back others."""
    first = split_validation(numbered(40), 0.25, seed=3)[1][1]
    torch.rand(5)
    assert torch.equal(split_validation(numbered(40), 0.25, seed=3)[1][1], first)
    assert not torch.equal(split_validation(numbered(40), 0.25, seed=4)[1][1], first)


def test_the_held_out_images_are_drawn_at_random():
    """Data sorted by class loses images of all parts of it, not its last ones as in Keras."""
    held_out = split_validation(numbered(200), 0.2, seed=0)[1][1]
    assert [int(((held_out >= start) & (held_out < start + 50)).sum() > 0) for start in (0, 50, 100, 150)] == [1] * 4


@pytest.mark.parametrize("kind", ["tensors", "arrays", "list of targets", "data set"])
def test_every_kind_of_data_is_divided_alike(kind):
    """Tensors, arrays, lists and data sets lose the same images."""
    images, targets = numbered(20)
    data = {
        "tensors": (images, targets),
        "arrays": (images.numpy(), targets.numpy()),
        "list of targets": (images, targets.tolist()),
        "data set": TensorDataset(images, targets),
    }[kind]
    _, expected = split_validation((images, targets), 0.25, seed=0)
    _, held_out = split_validation(data, 0.25, seed=0)
    found = [int(target) for target in (held_out[1] if isinstance(held_out, tuple) else [pair[1] for pair in held_out])]
    assert found == expected[1].tolist()


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
    train, _ = split_validation((images, column), 0.25, seed=0)
    assert train[0][:, 0, 0, 0].tolist() == np.asarray(train[1]).tolist()


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan"), 5])
def test_a_share_out_of_range_is_refused(share):
    """A share that is not between 0 and 1 is refused with an example."""
    with pytest.raises(ArgumentError, match=r"validation_split=.* is out of range: expected a share between 0 and 1"):
        split_validation(numbered(20), share, seed=0)


def test_a_share_that_is_no_number_is_refused():
    """A share that is no number is refused by name, not with Python's own error."""
    with pytest.raises(ArgumentError, match=r"validation_split='a fifth'.*expected a share between 0 and 1"):
        split_validation(numbered(20), "a fifth", seed=0)


@pytest.mark.parametrize(("count", "share", "left"), [(4, 0.1, "4 to train and 0"), (4, 0.9, "0 to train and 4")])
def test_a_part_without_images_is_refused(count, share, left):
    """A share that leaves one part empty is refused with the counts."""
    with pytest.raises(EmptyDataError, match=rf"of 4 images leaves {left} to validate: expected at least 1 each"):
        split_validation(numbered(count), share, seed=0)


def test_a_loader_is_refused():
    """A DataLoader cannot be divided; the message says what can be done."""
    with pytest.raises(ArgumentError, match=r"cannot divide a DataLoader: expected .*Pass validation_data= instead"):
        split_validation(DataLoader(TensorDataset(*numbered(20))), 0.25, seed=0)


def test_something_else_is_refused():
    """What is no data at all is refused in the same words."""
    with pytest.raises(ArgumentError, match=r"cannot divide a NoneType: expected \(images, targets\) or a Dataset"):
        split_validation(None, 0.25, seed=0)


def test_validation_data_and_a_split_are_refused_together(model, data):
    """Two sources of validation data are one too many."""
    trainer = tk.Trainer(model, device="cpu", precision="fp32")
    with pytest.raises(ArgumentError, match=r"validation_data and validation_split are both given: expected one"):
        trainer.fit(data, validation_data=data, validation_split=0.25)


@pytest.mark.parametrize("count", [20, 28])
def test_another_number_of_targets_is_seen_before_the_split(model, data, count):
    """More or fewer targets than images are refused with a split as without one."""
    trainer = tk.Trainer(model, device="cpu", precision="fp32")
    with pytest.raises(TargetError, match=rf"24 images but {count} targets: expected one target for each image"):
        trainer.fit((data[0], torch.zeros(count, dtype=torch.int64)), validation_split=0.25, verbose=0)


@pytest.mark.parametrize("as_dataset", [False, True])
@pytest.mark.parametrize("index", [0, 11, 23])
def test_a_bad_target_is_named_by_its_place_in_the_whole_data(model, data, index, as_dataset):
    """With a split too, a bad target is named by its place in what the user passed."""
    images, targets = data
    targets[index] = 9
    trainer = tk.Trainer(model, device="cpu", precision="fp32")
    whole = TensorDataset(images, targets) if as_dataset else (images, targets)
    with pytest.raises(TargetError, match=rf"target 9 at index {index} is out of range"):
        trainer.fit(whole, validation_split=0.25, verbose=0)


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
    )
    assert counts == [5]  # 18 images in batches of 4
    held_out = split_validation(data, 0.25, seed=5)[1]
    measured = trainer.evaluate(held_out, batch_size=4)
    assert history.history["val_loss"] == [measured["loss"]]
