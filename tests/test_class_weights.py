"""`"balanced"` class weights are scikit-learn's, whatever form the data has."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

import transferkit as tk
from tiny import CLASSES, differences
from transferkit.data.open import open_data
from transferkit.data.selection import split_validation
from transferkit.errors import ArgumentError, CheckpointError
from transferkit.training.loss import CrossEntropy

TARGETS = [0] * 12 + [1] * 5 + [2] * 3


def balanced(rows):
    """Return N / (classes that occur * count of the class), by loops: scikit-learn's formula."""
    counts = [0.0] * len(CLASSES)
    for row in rows:
        shares = row if isinstance(row, list) else [float(row == index) for index in range(len(CLASSES))]
        for index, share in enumerate(shares):
            counts[index] += share
    occurring = sum(count > 0 for count in counts)
    return [len(rows) / (occurring * count) if count > 0 else 0.0 for count in counts]


def weights_of_run(class_weights, source):
    loss = CrossEntropy(class_weights=class_weights)
    return loss.for_run(source, len(CLASSES), torch.device("cpu")).class_weights


def weights_for(data, **arguments):
    found = weights_of_run("balanced", open_data(data, CLASSES, **arguments))
    assert found.dtype == torch.float32
    assert found.shape == (len(CLASSES),)
    return found.tolist()


def images_for(targets):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (len(targets), 3, 32, 32), dtype=torch.uint8, generator=generator)


class Unlisted(Dataset):
    """A data set that does not list its targets; it notes what is read, and the last image is broken."""

    def __init__(self, targets, *, broken=()):
        self.images, self.hidden, self.broken, self.read = images_for(targets), targets, broken, []

    def __len__(self):
        return len(self.hidden)

    def __getitem__(self, index):
        self.read.append(index)
        if index in self.broken:
            raise OSError("broken file")
        return self.images[index], self.hidden[index]


@pytest.fixture
def folder(tmp_path):
    """Folders of 4, 2 and 1 images, of different sizes."""
    for name, count in zip(CLASSES, (4, 2, 1), strict=True):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((33 + 5 * number, 40, 3), 40 * number, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def scikit_learn():
    """scikit-learn's own weights; importing it sets an environment variable, so that is done outside of a test."""
    return pytest.importorskip("sklearn.utils.class_weight")


@pytest.mark.slow
def test_the_formula_is_scikit_learns(scikit_learn):
    """The formula written out here is that of compute_class_weight, where scikit-learn is installed."""
    expected = scikit_learn.compute_class_weight("balanced", classes=np.arange(3), y=np.array(TARGETS))
    assert balanced(TARGETS) == pytest.approx(expected.tolist(), rel=1e-12)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("form", ["tensor", "array", "list", "column", "int32", "one-hot"])
def test_arrays(seed, form):
    """Weights of arrays of any form, with random counts, are those of the formula, and their sum over images is N."""
    targets = np.random.default_rng(seed).choice(3, p=[0.7, 0.2, 0.1], size=57)
    forms = {
        "tensor": torch.from_numpy(targets),
        "array": targets,
        "list": targets.tolist(),
        "column": targets[:, None],
        "int32": targets.astype(np.int32),
        "one-hot": np.eye(3, dtype=np.float32)[targets],
    }
    found = weights_for((images_for(targets), forms[form]))
    assert found == pytest.approx(balanced(targets.tolist()), rel=1e-6)
    assert sum(found[target] for target in targets) == pytest.approx(57, rel=1e-5)


def test_soft_targets():
    """Each image counts for each class with its share."""
    rows = [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.25, 0.25, 0.5], [0.9, 0.1, 0.0]]
    assert weights_for((images_for(rows), rows)) == pytest.approx(balanced(rows), rel=1e-6)


@pytest.mark.parametrize("soft", [False, True])
def test_a_class_without_images_counts_nothing(soft, model):
    """It has weight 0, the others balance among themselves, and a training step is finite."""
    targets = torch.tensor([0, 0, 0, 2])
    given = torch.nn.functional.one_hot(targets, 3).float() if soft else targets
    data = (images_for(targets), given)
    assert weights_for(data) == pytest.approx([4 / (2 * 3), 0.0, 4 / (2 * 1)], rel=1e-6)
    trainer = tk.Trainer(model, device="cpu", precision="fp32", loss=CrossEntropy(class_weights="balanced"))
    assert np.isfinite(trainer.fit(data, batch_size=2, verbose=0, epochs=1).history["loss"]).all()


def test_one_class_alone():
    """Where one class occurs, its images count 1."""
    assert weights_for((images_for([1, 1]), [1, 1])) == [0.0, 1.0, 0.0]


def test_many_images_lose_no_precision():
    """Counts of soft targets are exact to a millionth for 200,000 images."""
    source = open_data((torch.zeros(1, 3, 1, 1, dtype=torch.uint8), [0]), CLASSES)
    targets = torch.tensor([[0.7, 0.2, 0.1]]).repeat(200_000, 1)
    source.targets = targets
    found = weights_of_run("balanced", source)
    assert found.tolist() == pytest.approx([1 / 2.1, 1 / 0.6, 1 / 0.3], rel=1e-6)


def test_folders(folder):
    """Of an ImageFolder the folders' counts matter, and no file is read."""
    for path in folder.glob("*/*.png"):
        if path.name != "0.png":  # the first of all is looked at when the data is opened
            path.write_bytes(b"")
    assert weights_for(ImageFolder(folder)) == pytest.approx(balanced([0, 0, 0, 0, 1, 1, 2]), rel=1e-6)


def test_a_target_transform_counts(folder):
    """Weights are those of the targets that are trained on, not of those that are listed."""
    dataset = ImageFolder(folder, target_transform=lambda target: min(target, 1))
    assert weights_for(dataset) == pytest.approx(balanced([0, 0, 0, 0, 1, 1, 1]), rel=1e-6)


@pytest.mark.parametrize("soft", [False, True])
def test_a_data_set_that_lists_no_targets(soft):
    """It is read, whole; so are torch's own containers of data sets."""
    targets = np.eye(3, dtype=np.float32)[TARGETS] if soft else TARGETS
    dataset = Unlisted(targets)
    assert weights_for(dataset) == pytest.approx(balanced(TARGETS), rel=1e-6)
    assert set(dataset.read) == set(range(20))
    parts = ConcatDataset([Subset(dataset, range(10)), TensorDataset(images_for(TARGETS), torch.tensor(TARGETS))])
    expected = balanced(TARGETS[:10] + TARGETS)
    if not soft:
        assert weights_for(parts) == pytest.approx(expected, rel=1e-6)


def test_a_subset(folder):
    """Of a Subset its own images count alone."""
    assert weights_for(Subset(ImageFolder(folder), [0, 4, 5, 6])) == pytest.approx(balanced([0, 1, 1, 2]), rel=1e-6)


def trained(model_for, data, weights, **arguments):
    trainer = tk.Trainer(model_for(), device="cpu", precision="fp32", lr=1e-2, loss=CrossEntropy(class_weights=weights))
    trainer.fit(data, batch_size=5, epochs=2, verbose=0, **arguments)
    return trainer


@pytest.fixture
def model_for(make_backbone):
    """A maker of equal models."""

    def make():
        torch.manual_seed(3)
        return tk.freeze_until(tk.attach_head(make_backbone(), CLASSES), "head")

    return make


@pytest.mark.parametrize("form", ["arrays", "listed", "not listed"])
def test_a_part_to_train_on_is_weighed_by_itself(model_for, form):
    """With validation_split the images held back do not count: training is that with the part's weights as numbers."""
    data = (images_for(TARGETS), torch.tensor(TARGETS)) if form == "arrays" else Unlisted(TARGETS)
    if form == "listed":
        data.targets = TARGETS
    one = trained(model_for, data, "balanced", validation_split=0.4)
    source = open_data(data, CLASSES)
    found = weights_of_run("balanced", split_validation(source, 0.4, seed=0)[0]).tolist()
    assert found != pytest.approx(balanced(TARGETS), rel=1e-3)
    assert sum(1 / weight for weight in found) == pytest.approx(3.0, rel=1e-5)  # sum of counts is N of the part
    other = trained(model_for, data, found, validation_split=0.4)
    assert differences(one.model.state_dict(), other.model.state_dict()) == []


def test_images_left_out_are_not_read_for_their_targets(model_for):
    """A broken image that on_bad_image="skip" left out is not read again, and its target does not count."""
    with_broken = Unlisted([*TARGETS, 2], broken=[20])
    skipping = trained(model_for, with_broken, "balanced", on_bad_image="skip")
    assert with_broken.read.count(20) == 1
    whole = trained(model_for, Unlisted(TARGETS), "balanced")
    assert differences(skipping.model.state_dict(), whole.model.state_dict()) == []


def test_each_call_weighs_its_own_data(model_for):
    """Other data of a later call gives other weights."""
    second = [0, 1, 2, 2]
    data = (images_for(second), second)
    trainer = trained(model_for, (images_for(TARGETS), TARGETS), "balanced")
    given = trained(model_for, (images_for(TARGETS), TARGETS), "balanced")
    given.training.loss = CrossEntropy(class_weights=balanced(second))
    losses = [next(one.steps(data, batch_size=4)).loss.item() for one in (trainer, given)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    given.training.loss = CrossEntropy(class_weights=balanced(TARGETS))
    assert next(given.steps(data, batch_size=4)).loss.item() != pytest.approx(losses[0], rel=1e-3)


def test_a_loader_is_refused(model_for):
    """A DataLoader does not tell its targets before the first step: it is refused with what to do, in each call."""
    trainer = tk.Trainer(model_for(), device="cpu", precision="fp32", loss=CrossEntropy(class_weights="balanced"))
    loader = DataLoader(TensorDataset(images_for(TARGETS), torch.tensor(TARGETS)), batch_size=4)
    for call in (trainer.fit, trainer.steps, trainer.lr_find):
        with pytest.raises(ArgumentError, match=r'"balanced" needs all targets.*pass its Dataset, or the weights'):
            call(loader)


def test_a_run_is_resumed(model_for, tmp_path):
    """A run with balanced weights goes on to the bits of one that never stopped; with other weights it is refused."""
    data = (images_for(TARGETS), TARGETS)
    arguments = {"epochs": 3, "batch_size": 5, "verbose": 0}
    plain = {"device": "cpu", "precision": "fp32", "schedule": "constant"}
    whole = tk.Trainer(model_for(), **plain, loss=CrossEntropy(class_weights="balanced"))
    whole.fit(data, **arguments)
    stopped = tk.Trainer(model_for(), **plain, loss=CrossEntropy(class_weights="balanced"))
    stopped.fit(data, callbacks=[tk.Checkpoint(tmp_path / "run")], **{**arguments, "epochs": 1})
    resumed = tk.Trainer(model_for(), **plain, loss=CrossEntropy(class_weights="balanced"))
    resumed.fit(data, resume_from=tmp_path / "run", **arguments)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    other = tk.Trainer(model_for(), **plain, loss=CrossEntropy(class_weights=[1.0, 2.0, 3.0]))
    with pytest.raises(CheckpointError, match="class_weights"):
        other.fit(data, resume_from=tmp_path / "run", **arguments)


@pytest.mark.parametrize(
    "values",
    ["Balanced", "balance", [1, 2], [1, 2, 3, 4], [0, 0, 0], [1, -1, 1], [1, float("nan"), 1], 5, ["a", "b", "c"]],
)
def test_other_values_are_refused(values, model):
    """What is neither three numbers nor "balanced" is refused with what is expected."""
    with pytest.raises(ArgumentError, match=r"expected 3 finite numbers of 0 or more.*or 'balanced'"):
        tk.Trainer(model, device="cpu", loss=CrossEntropy(class_weights=values))


def test_numbers_and_none_pass():
    """Numbers become a float32 tensor; neither they nor None need data."""
    assert weights_of_run(None, None) is None
    for values in ((1, 2.5, 0), torch.tensor([1, 2.5, 0]).double(), np.array([1, 2.5, 0])):
        found = weights_of_run(values, None)
        assert (found.dtype, found.tolist()) == (torch.float32, [1.0, 2.5, 0.0])
