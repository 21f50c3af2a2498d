"""Training on cached features is the training on images, bit for bit."""

import copy
from functools import partial

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.datasets import ImageFolder

import transferkit as tk
from cached import (
    CLASSES,
    EPOCHS,
    RandomlyFlipped,
    assert_same_run,
    changed,
    figures,
    fit,
    lines_of,
    make_model,
    make_trainer,
    preprocess,
    refusals,
    through_the_whole_model,
    total,
    weights_of,
)

BOUNDARIES = ["block2", "block3", "block4_conv1", "block5", "head"]


@pytest.fixture
def validation():
    """Seven images: one batch, so that their mean loss does not depend on how they are divided."""
    generator = torch.Generator().manual_seed(9)
    return torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(7) % 3


@pytest.fixture
def pair(make_backbone):
    """A maker of two trainers of equal models, one with the cache and one without."""

    def make(boundary="block5", *, head=None, trainer=None, **model):
        return [
            make_trainer(make_model(make_backbone, boundary, **model, **(head or {})), cache=mode, **(trainer or {}))
            for mode in ("auto", False)
        ]

    return make


# ---- the same run with and without


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_cached_uncached_and_whole_model_train_alike(make_backbone, data, validation, boundary, batch_norm, precision):
    """At every boundary, runs on cached features, on the prefix and through the whole model are the same run."""
    cached, uncached, whole = (
        make_trainer(make_model(make_backbone, boundary, batch_norm=batch_norm), precision=precision, cache=mode)
        for mode in (True, False, False)
    )
    assert_same_run([cached, uncached, through_the_whole_model(whole)], data, validation_data=validation)


@pytest.mark.parametrize(("seed", "batch_size"), [(0, 1), (1, 5), (2, 23), (12345, 24), (3, 100)])
def test_same_run_at_every_seed_and_batch_size(pair, data, seed, batch_size):
    """Ragged last batches, batches of one image and one batch for all change nothing, at any seed."""
    assert_same_run(pair(trainer={"seed": seed}), data, batch_size=batch_size)


@pytest.mark.parametrize(
    "head",
    [{"pooling": "avg"}, {"pooling": "max", "hidden": (8,)}, {"hidden": (8, 8), "dropout": 0.3}],
    ids=["avg", "max", "two hidden layers"],
)
def test_same_run_with_every_head(pair, data, head):
    """Every built-in head trains the same, also on features of more than one position."""
    assert_same_run(pair("head", image_size=64, head=head), data)


LAYERS = {
    "default": {},
    "average": {"pooling": "avg", "hidden": (16,), "dropout": 0.5},
    "one layer within a block": {"layers": ["block3_relu1"], "hidden": (16,)},
    "first and last block": {"layers": ["block5", "block1"], "pooling": "max"},
    "layers in a row": {"layers": ["block2_conv1", "block2_relu1", "block4_conv1"], "dropout": 0.5},
}


@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize("head", LAYERS)
def test_same_run_at_every_layer(make_backbone, data, validation, head, batch_norm):
    """Whatever layers a head takes, and before whatever layer training begins, the three runs are the same run."""
    model = make_model(make_backbone, None, batch_norm=batch_norm, **LAYERS[head])
    boundaries = {len(tk.freeze_until(model, name).split()[0]): name for name in [*model.backbone.layer_names, "head"]}
    data = data[0][:10], data[1][:10]
    for depth, boundary in [*boundaries.items()][:: 1 if batch_norm else 3]:  # plain layers are among the others
        cached, uncached, whole = (
            make_trainer(make_model(make_backbone, boundary, batch_norm=batch_norm, **LAYERS[head]), cache=mode)
            for mode in (depth > 0, False, False)
        )
        trainers = [cached, uncached, through_the_whole_model(whole)]
        assert_same_run(trainers, data, validation_data=validation, epochs=1)
        assert len(cached.model.split()[0]) == depth
        assert cached.model.head.standardize.num_images == 10


def test_same_run_with_every_option(pair, data, validation):
    """Optimizer, weight decay, schedule and clipping mean the same on cached features."""
    options = {"optimizer": "sgd", "weight_decay": 0.1, "schedule": "cosine", "clip_grad_norm": 0.01}
    assert_same_run(pair("block4", batch_norm=True, trainer=options), data, validation_data=validation)


def test_same_run_with_micro_batches(pair, data):
    """Batches divided into micro-batches train the same on cached features."""
    trainers = pair("block4", batch_norm=True)
    for trainer in trainers:
        trainer.micro_batch_size = 3
    assert_same_run(trainers, data)


def test_same_run_with_soft_targets_and_a_validation_split(pair, data):
    """Rows of targets and a held-back part of the data train the same on cached features."""
    soft = nn.functional.one_hot(data[1], 3).float() * 0.9 + 0.1 / 3
    assert_same_run(pair(), (data[0], soft), validation_split=0.25)


@pytest.mark.parametrize("boundary", ["block3", "block5", "head"])
def test_same_run_with_validation_in_several_batches(pair, data, boundary):
    """Validation in several batches gives the same `val_loss` and best epoch in bf16, bit for bit."""
    assert_same_run(pair(boundary), data, validation_data=data)


@pytest.mark.parametrize("boundary", ["block3", "block5", "head"])
def test_same_run_in_fp32_with_validation_in_several_batches(pair, data, boundary):
    """In fp32 products round with the batch size: `val_loss` agrees to one part in 100,000, all else exactly."""
    trainers = pair(boundary, trainer={"precision": "fp32"})
    one, other = (figures(fit(trainer, data, validation_data=data)) for trainer in trainers)
    assert one.pop("val_loss") == pytest.approx(other.pop("val_loss"), rel=1e-5)
    assert one == other
    assert changed(weights_of(trainers[0].model), trainers[1].model) == set()


def test_same_steps(pair, data):
    """`steps` yields the same losses and hits, and leaves the same weights."""
    trainers = pair()
    one, other = (
        [(step.epoch, step.index, step.loss.item(), step.correct.item()) for step in trainer.steps(data, epochs=2)]
        for trainer in trainers
    )
    assert one == other
    assert changed(weights_of(trainers[0].model), trainers[1].model) == set()


def test_the_comparison_can_fail(make_backbone, data):
    """Another seed gives another run: the tests above would see a difference."""
    trainers = [make_trainer(make_model(make_backbone, "block5"), seed=seed) for seed in (0, 1)]
    with pytest.raises(AssertionError):
        assert_same_run(trainers, data)


# ---- views


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("source", ["augment", "Dataset"])
def test_views_are_cached_and_used_in_turn(pair, data, images_seen, source, precision):
    """`n_views=2` computes two views of each image once, and epochs train on them in turn, as without the cache."""
    trainers = pair(trainer={"precision": precision})
    given, augment = (data, ["color", "flip"]) if source == "augment" else (RandomlyFlipped(data), None)
    arguments = {"n_views": 2, "epochs": 5, "augment": augment}
    history = figures(fit(trainers[0], given, **arguments))
    computed = total(images_seen)
    assert computed == 2 * 24 if source == "augment" else 24 < computed < 2 * 24  # some are flipped twice, or never
    assert figures(fit(trainers[1], given, **arguments)) == history
    assert changed(weights_of(trainers[0].model), trainers[1].model) == set()


def test_a_second_fit_goes_on_with_the_next_view(pair, data):
    """Views follow the trainer's epochs through several calls of `fit`."""
    trainers = pair("head")
    for epochs in (1, 2, 1):
        for trainer in trainers:
            fit(trainer, data, augment="crop", n_views=3, epochs=epochs)
        assert changed(weights_of(trainers[0].model), trainers[1].model) == set()


# ---- nothing that is frozen or cached changes


@pytest.mark.parametrize(("boundary", "first"), [("block3", 8), ("head", 20)])
def test_what_is_frozen_keeps_every_bit(make_backbone, data, validation, boundary, first):
    """After training on cached features every frozen weight and statistic has the bits it had; others have not."""
    model = make_model(make_backbone, boundary, batch_norm=True)
    before = weights_of(model)
    fit(make_trainer(model, optimizer="adamw", weight_decay=0.1), data, validation_data=validation)
    different = changed(before, model)
    assert not any(name.startswith("backbone.") and int(name.split(".")[2]) < first for name in different)
    assert any(name.startswith("head.") for name in different)


class HalvesInPlace(nn.Module):
    def forward(self, features):
        return features.mul_(0.5).add_(-0.1)


@pytest.mark.parametrize(
    "first",
    [nn.ReLU(inplace=True), HalvesInPlace(), nn.Threshold(0.05, 3.0, inplace=True)],
    ids=lambda module: type(module).__name__,
)
@pytest.mark.parametrize("batch_size", [7, 24])
def test_what_is_cached_keeps_every_bit(make_backbone, data, first, batch_size):
    """A head that works in place changes no cached features, of training or validation images, and trains the same."""
    trainers = []
    for mode in ("auto", False):
        torch.manual_seed(2)
        head = nn.Sequential(copy.deepcopy(first), nn.Flatten(), nn.Linear(8, 3))
        trainers.append(make_trainer(make_model(make_backbone, head=head), cache=mode))
    validation = (255 - data[0][:7], data[1][:7])
    assert_same_run(trainers, data, validation_data=validation, batch_size=batch_size)
    prefix = trainers[0].training.features.split(trainers[0].model)[0]
    expected = [prefix(preprocess(images)).permute(0, 2, 3, 1) for images in (data[0], validation[0])]
    found = [chunk.features for chunk in trainers[0].training.features.chunks]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_users_array_is_left_as_it_is(make_backbone, data):
    """The images and targets that were passed keep every bit."""
    images, targets = data[0].clone(), data[1].clone()
    fit(make_trainer(make_model(make_backbone)), data, validation_data=data)
    assert torch.equal(data[0], images)
    assert torch.equal(data[1], targets)


# ---- raw images, end to end


@pytest.mark.parametrize("method", ["predict", "predict_proba", "evaluate"])
def test_every_raw_image_goes_through_the_first_convolution(make_backbone, data, method):
    """After training on cached features, prediction and evaluation run every image through the whole model."""
    trainer = make_trainer(make_model(make_backbone))
    fit(trainer, data, validation_data=data)
    seen = []
    trainer.model.backbone.features[0].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    getattr(trainer, method)(data if method == "evaluate" else data[0])
    assert sum(seen) == 24


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("boundary", ["block3", "head"])
def test_validation_in_fit_is_evaluation_afterwards(make_backbone, data, validation, boundary, precision):
    """The best epoch's validation figures are those that `evaluate` returns for the raw images afterwards."""
    trainer = make_trainer(make_model(make_backbone, boundary, batch_norm=True), precision=precision)
    history = fit(trainer, data, validation_data=validation)
    best = history.reports[history.best_epoch]
    after = trainer.evaluate(validation, batch_size=7)
    assert (best.val_loss, best.val_accuracy) == (after["loss"], after["accuracy"])


def test_validation_in_several_batches_is_evaluation_afterwards(make_backbone, data):
    """Validation data of several batches gives the figures that `evaluate` returns, bit for bit."""
    trainer = make_trainer(make_model(make_backbone))
    history = fit(trainer, data, validation_data=data)
    best = history.reports[history.best_epoch]
    after = trainer.evaluate(data, batch_size=7)
    assert (best.val_loss, best.val_accuracy) == (after["loss"], after["accuracy"])


# ---- kinds of data


@pytest.fixture
def pictures(data):
    """The images as PIL images of differing sizes, with their targets."""
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in data[0]]
    resized = [image.resize((32 + 3 * (index % 5), 40 - index % 7)) for index, image in enumerate(images)]
    return list(zip(resized, data[1].tolist(), strict=True))


@pytest.fixture
def folder(pictures, tmp_path):
    """A folder of images for each class."""
    for index, (image, target) in enumerate(pictures):
        place = tmp_path / "images" / CLASSES[target]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{index:02}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("kind", ["PIL", "Subset", "ImageFolder", "TensorDataset", "float", "numpy"])
def test_every_kind_of_data_is_cached(make_backbone, data, pictures, folder, images_seen, kind):
    """Images of differing sizes, subsets, folders and preprocessed images are each computed once."""
    given = {
        "PIL": lambda: pictures,
        "Subset": lambda: Subset(TensorDataset(*data), list(range(23, -1, -1))),
        "ImageFolder": lambda: ImageFolder(folder),
        "TensorDataset": lambda: TensorDataset(*data),
        "float": lambda: (preprocess(data[0]), data[1]),
        "numpy": lambda: (data[0].permute(0, 2, 3, 1).numpy(), data[1].numpy()),
    }[kind]()
    cached, whole = (make_trainer(make_model(make_backbone, "block5")) for _ in range(2))
    assert_same_run([cached, through_the_whole_model(whole)], given, validation_split=0.25)
    assert total(images_seen) == 24


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(make_backbone, pictures, num_workers):
    """The run is the same with processes that read the data."""
    trainers = [make_trainer(make_model(make_backbone)) for _ in range(2)]
    one, other = (
        figures(fit(trainer, pictures, num_workers=workers, validation_split=0.25))
        for trainer, workers in zip(trainers, (num_workers, 0), strict=True)
    )
    assert one == other
    assert changed(weights_of(trainers[0].model), trainers[1].model) == set()


def test_validation_images_of_a_loader_that_reads_in_order_are_cached(make_backbone, data, validation, images_seen):
    """A `DataLoader` without shuffling is computed once, and gives the figures of its data set."""
    trainers = [make_trainer(make_model(make_backbone)) for _ in range(2)]
    loader = DataLoader(TensorDataset(*validation), batch_size=3)
    history = figures(fit(trainers[0], data, validation_data=loader))
    assert total(images_seen) == 24 + 7
    assert figures(fit(trainers[1], data, validation_data=validation)) == history


@pytest.mark.parametrize(
    "options",
    [{"shuffle": True}, {"drop_last": True}, {"collate_fn": partial(torch.utils.data.default_collate)}],
    ids=lambda options: next(iter(options)),
)
def test_a_loader_with_batches_of_its_own_is_read_each_epoch(make_backbone, data, images_seen, options, capsys):
    """One that shuffles, drops images or collates in its own way is read in every epoch, and a line says so."""
    loader = DataLoader(TensorDataset(*data), batch_size=7, **options)
    fit(make_trainer(make_model(make_backbone)), data, validation_data=loader, verbose=2)
    assert total(images_seen) == 24 + EPOCHS * (21 if "drop_last" in options else 24)
    assert len(refusals(lines_of(capsys))) == 1


def test_a_training_loader_is_read_each_epoch(make_backbone, data, images_seen, capsys):
    """A `DataLoader` of training images is read in every epoch and before; a line says so; the run is the plain one."""
    cached, whole = (make_trainer(make_model(make_backbone)) for _ in range(2))
    through_the_whole_model(whole)
    loader = DataLoader(TensorDataset(*data), batch_size=7)
    for trainer in (cached, whole):
        trainer.fit(loader, epochs=3, verbose=2)
    assert total(images_seen) == 24 + 3 * 24
    assert len(refusals(lines_of(capsys))) == 1
    assert changed(weights_of(cached.model), whole.model) == set()
