"""The feature cache inside `fit` and `steps`: the same result as without it, and less work."""

import copy
import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import transferkit as tk
from transferkit.data.preprocessing import CONVENTIONS
from transferkit.errors import CacheError
from transferkit.features import cache as features_module
from transferkit.features.file import FeatureFile

CLASSES = ["cat", "dog", "owl"]
EPOCHS = 2
BOUNDARIES = ["block2", "block3", "block4_conv1", "block5", "head"]
Usage = namedtuple("Usage", "total used free")


def make_model(make_backbone, boundary="head", *, batch_norm=False, image_size=32, **head):
    torch.manual_seed(1)
    backbone = make_backbone(batch_norm=batch_norm, image_size=image_size)
    return tk.freeze_until(tk.attach_head(backbone, CLASSES, **(head or {"hidden": (16,), "dropout": 0.5})), boundary)


def make_trainer(model, **arguments):
    return tk.Trainer(model, **{"device": "cpu", "precision": "bf16", "lr": 1e-2, **arguments})


def through_the_whole_model(trainer):
    """Let a trainer do without prefix and cache: a hook on the first layer makes every step run the whole model."""
    trainer.model.backbone.features[0].register_forward_hook(lambda *_: None)
    trainer.cache = False
    return trainer


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def figures(history):
    return {name: values for name, values in history.history.items() if name != "epoch_s"}


def fit(trainer, data, **arguments):
    return trainer.fit(data, **{"epochs": EPOCHS, "batch_size": 7, "verbose": 0, **arguments})


def assert_same_run(cached, uncached, data, **arguments):
    """Both trainers end with the same history, weights and probabilities, bit for bit."""
    figures_of = [figures(fit(trainer, data, **arguments)) for trainer in (cached, uncached)]
    assert figures_of[0] == figures_of[1]
    assert changed(weights_of(cached.model), uncached.model) == set()
    images = data[0] if isinstance(data, tuple) else data
    assert (cached.predict_proba(images) == uncached.predict_proba(images)).all()


def total(images_seen):
    return sum(count for count, _ in images_seen)


@pytest.fixture
def validation():
    """Seven images: one batch, so that their mean loss does not depend on how they are divided."""
    generator = torch.Generator().manual_seed(9)
    return torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(7) % 3


# ---- the same run with and without


@pytest.mark.parametrize(("cache", "precision"), [("auto", "bf16"), (True, "fp32")])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_same_run_as_without_the_cache(make_backbone, data, validation, boundary, batch_norm, precision, cache):
    """At every boundary training on kept features gives the weights, history and predictions of training on images."""
    cached, uncached = (
        make_trainer(make_model(make_backbone, boundary, batch_norm=batch_norm), precision=precision, cache=mode)
        for mode in (cache, False)
    )
    assert_same_run(cached, uncached, data, validation_data=validation)


@pytest.mark.parametrize(("batch_norm", "precision"), [(False, "fp32"), (True, "bf16")])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_same_run_as_through_the_whole_model(make_backbone, data, validation, boundary, batch_norm, precision):
    """So it is against a run that puts every batch through the whole model."""
    cached, uncached = (
        make_trainer(make_model(make_backbone, boundary, batch_norm=batch_norm), precision=precision) for _ in range(2)
    )
    assert_same_run(cached, through_the_whole_model(uncached), data, validation_data=validation)


@pytest.mark.parametrize(("seed", "batch_size"), [(0, 1), (1, 5), (2, 23), (12345, 24), (3, 100)])
def test_same_run_at_every_seed_and_batch_size(make_backbone, data, seed, batch_size):
    """Ragged last batches, batches of one image and one batch for all change nothing, at any seed."""
    cached, uncached = (
        make_trainer(make_model(make_backbone, "block5"), seed=seed, cache=mode) for mode in ("auto", False)
    )
    assert_same_run(cached, uncached, data, batch_size=batch_size, epochs=2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"micro_batch_size": 3},
        {"class_weights": [1.0, 2.0, 5.0]},
        {"loss": tk.CrossEntropy(label_smoothing=0.1), "clip_grad_norm": 0.01},
        {"optimizer": "sgd", "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 2},
    ],
    ids="+".join,
)
def test_same_run_with_every_option(make_backbone, data, validation, arguments):
    """The trainer's options mean the same on kept features."""
    cached, uncached = (
        make_trainer(make_model(make_backbone, "block4", batch_norm=True), cache=mode, **arguments)
        for mode in ("auto", False)
    )
    assert_same_run(cached, uncached, data, validation_data=validation)


@pytest.mark.parametrize(
    "head", [{"pooling": "avg"}, {"pooling": "max", "hidden": (8,)}, {"hidden": (8, 8), "dropout": 0.3}]
)
def test_same_run_with_every_head(make_backbone, data, head):
    """So do the built-in heads, on features of more than one position too."""
    cached, uncached = (
        make_trainer(make_model(make_backbone, image_size=64, **head), cache=mode) for mode in ("auto", False)
    )
    assert_same_run(cached, uncached, data)


def test_same_run_with_one_hot_targets(make_backbone, data):
    """Rows of targets are kept like class indices."""
    soft = nn.functional.one_hot(data[1], 3).float() * 0.9 + 0.1 / 3
    cached, uncached = (make_trainer(make_model(make_backbone, "block5"), cache=mode) for mode in ("auto", False))
    assert_same_run(cached, uncached, (data[0], soft))


def test_same_run_with_a_validation_split(make_backbone, data):
    """A share held back is kept like data of its own."""
    cached, uncached = (make_trainer(make_model(make_backbone, "block5"), cache=mode) for mode in ("auto", False))
    assert_same_run(cached, uncached, data, validation_split=0.25)


@pytest.mark.parametrize("boundary", ["block3", "block5", "head"])
def test_same_history_with_validation_in_several_batches(make_backbone, data, boundary):
    """Validation data of several batches gives the same `val_loss` and best epoch in bf16, bit for bit."""
    cached, uncached = (make_trainer(make_model(make_backbone, boundary), cache=mode) for mode in ("auto", False))
    assert_same_run(cached, uncached, data, validation_data=data)


@pytest.mark.parametrize("boundary", ["block3", "block5", "head"])
def test_same_history_in_fp32_with_validation_in_several_batches(make_backbone, data, boundary):
    """In fp32 products round with their batch's size: `val_loss` agrees to one part in 100,000, all else exactly."""
    trainers = [
        make_trainer(make_model(make_backbone, boundary), precision="fp32", cache=mode) for mode in ("auto", False)
    ]
    one, other = (figures(fit(trainer, data, validation_data=data)) for trainer in trainers)
    assert one.pop("val_loss") == pytest.approx(other.pop("val_loss"), rel=1e-5)
    assert one == other
    assert changed(weights_of(trainers[0].model), trainers[1].model) == set()


def test_same_steps(make_backbone, data):
    """`steps` yields the same losses and hits, and leaves the same weights."""
    runs = []
    for mode in ("auto", False):
        trainer = make_trainer(make_model(make_backbone, "block5"), cache=mode)
        steps = [
            (s.epoch, s.index, s.loss.item(), s.correct.item()) for s in trainer.steps(data, epochs=2, batch_size=7)
        ]
        runs.append((steps, weights_of(trainer.model)))
    assert runs[0][0] == runs[1][0]
    assert [name for name in runs[0][1] if not torch.equal(runs[0][1][name], runs[1][1][name])] == []


def test_the_comparison_can_fail(make_backbone, data):
    """Another seed gives another history: the tests above would see a difference."""
    one, other = (make_trainer(make_model(make_backbone, "block5"), seed=seed) for seed in (0, 1))
    assert figures(fit(one, data)) != figures(fit(other, data))


# ---- nothing that is frozen or kept changes


@pytest.mark.parametrize("boundary", ["block3", "head"])
def test_what_is_frozen_keeps_every_bit(make_backbone, data, validation, boundary):
    """After training on kept features every frozen weight and statistic has the bits it had, and others have not."""
    model = make_model(make_backbone, boundary, batch_norm=True)
    before = weights_of(model)
    fit(make_trainer(model, optimizer="adamw", weight_decay=0.1), data, validation_data=validation)
    first = {"block3": 8, "head": 20}[boundary]
    different = changed(before, model)
    assert not any(name.startswith("backbone.") and int(name.split(".")[2]) < first for name in different)
    assert any(name.startswith("head.") for name in different)


class HalvesInPlace(nn.Module):
    def forward(self, features):
        return features.mul_(0.5).add_(-0.1)


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), HalvesInPlace(), nn.Threshold(0.05, 3.0, inplace=True)])
@pytest.mark.parametrize("batch_size", [7, 24])
def test_what_is_kept_keeps_every_bit(make_backbone, data, first, batch_size):
    """A head that works in place changes nothing kept, of training or of validation images, and trains the same."""
    trainers = []
    for mode in ("auto", False):
        torch.manual_seed(2)
        head = nn.Sequential(copy.deepcopy(first), nn.Flatten(), nn.Linear(8, 3))
        trainers.append(make_trainer(make_model(make_backbone, head=head), cache=mode))
    validation = (255 - data[0][:7], data[1][:7])
    assert_same_run(*trainers, data, validation_data=validation, batch_size=batch_size)
    prefix = trainers[0]._frozen.split()[0]
    expected = [prefix(prefix_input).permute(0, 2, 3, 1) for prefix_input in map(preprocess, (data[0], validation[0]))]
    kept = [kept.features[0] for kept in trainers[0]._features._kept]
    assert all(torch.equal(one, other) for one, other in zip(kept, expected, strict=True))


def preprocess(images):
    return CONVENTIONS["IMAGENET1K_V1"].with_image_size(32)(images)


def test_a_users_array_is_left_as_it_is(make_backbone, data):
    """The images and targets that were passed keep every bit."""
    images, targets = data[0].clone(), data[1].clone()
    fit(make_trainer(make_model(make_backbone)), data, validation_data=data)
    assert torch.equal(data[0], images)
    assert torch.equal(data[1], targets)


# ---- what changed is noticed: weights


def in_place(model):
    with torch.no_grad():
        model.backbone.features[3].weight.mul_(2)


def through_data(model):
    model.backbone.features[3].weight.data.mul_(2)


def permuted(model):
    weight = model.backbone.features[0].weight
    weight.data.copy_(weight.data.flip(0).clone())


def loaded(model):
    state = model.state_dict()
    model.load_state_dict({name: value * 2 if ".features.3." in name else value for name, value in state.items()})


def replaced(model):
    torch.manual_seed(8)
    layer = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    model.backbone.features[3] = layer.to(memory_format=torch.channels_last)


def average_pool(model):
    model.backbone.features[2] = nn.AvgPool2d(2)


def other_preprocessing(model):
    model.backbone.preprocess = CONVENTIONS["KERAS"].with_image_size(32)


def kernel_size(model):
    model.backbone.features[2].kernel_size = 1
    model.backbone.features[2].padding = 0


CHANGES = [in_place, through_data, permuted, loaded, replaced, average_pool, other_preprocessing, kernel_size]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_prefix_between_fits(make_backbone, data, validation, change):
    """A second fit after a change of what is frozen trains as a run through the whole changed model does."""
    cached, uncached = (make_trainer(make_model(make_backbone)) for _ in range(2))
    through_the_whole_model(uncached)
    assert_same_run(cached, uncached, data, validation_data=validation)
    before = cached.predict_proba(data[0])
    for trainer in (cached, uncached):
        change(trainer.model)
    assert (cached.predict_proba(data[0]) != before).any()
    assert_same_run(cached, uncached, data, validation_data=validation)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_prefix_in_a_callback(make_backbone, data, validation, change):
    """So it is where a callback changes it between two epochs."""
    cached, uncached = (make_trainer(make_model(make_backbone)) for _ in range(2))

    def between(trainer, report):
        if report.epoch == 0:
            change(trainer.model)

    arguments = {"validation_data": validation, "callbacks": [between], "restore_best": False}
    assert_same_run(cached, through_the_whole_model(uncached), data, **arguments)


def test_a_change_of_batch_norms_epsilon_between_fits(make_backbone, data):
    """A setting that is no weight, like batch norm's epsilon, counts as well."""
    cached, uncached = (make_trainer(make_model(make_backbone, "block5", batch_norm=True)) for _ in range(2))
    through_the_whole_model(uncached)
    for _ in range(2):
        assert_same_run(cached, uncached, data)
        for trainer in (cached, uncached):
            trainer.model.backbone.features[1].eps = 0.5


def test_two_pools_that_print_alike(make_backbone, data):
    """Two layers that differ in a setting which their `repr` leaves out are different layers."""
    cached, uncached = (make_trainer(make_model(make_backbone)) for _ in range(2))
    through_the_whole_model(uncached)
    for divisor in (None, 1):
        for trainer in (cached, uncached):
            trainer.model.backbone.features[2] = nn.AvgPool2d(2, divisor_override=divisor)
        assert_same_run(cached, uncached, data)


@pytest.mark.parametrize("boundaries", [("head", "block5"), ("block3", "head"), ("block5", "block2"), ("head", None)])
def test_a_boundary_moved_in_a_callback(make_backbone, data, validation, boundaries):
    """A boundary that a callback moves between two epochs gives the run that images give."""
    cached, uncached = (make_trainer(make_model(make_backbone, boundaries[0], batch_norm=True)) for _ in range(2))

    def move(trainer, report):
        if report.epoch == 0:
            tk.freeze_until(trainer.model, boundaries[1])

    arguments = {"validation_data": validation, "callbacks": [move]}
    assert_same_run(cached, through_the_whole_model(uncached), data, **arguments)


def test_batch_norm_frozen_by_hand_alone(make_backbone, data, validation):
    """Where only `requires_grad` is off, statistics change with every step, and nothing behind them is kept."""
    cached, uncached = (make_trainer(make_model(make_backbone, None, batch_norm=True)) for _ in range(2))
    for trainer in (cached, uncached):
        trainer.model.backbone.requires_grad_(False)
    assert_same_run(cached, through_the_whole_model(uncached), data, validation_data=validation)


def test_batch_norm_frozen_by_hand_takes_no_memory_with_each_epoch(make_backbone, data, validation):
    """There, what is kept does not grow from epoch to epoch."""
    trainer = make_trainer(make_model(make_backbone, None, batch_norm=True))
    trainer.model.backbone.requires_grad_(False)
    sizes = []
    count = lambda trainer, report: sizes.append(len(trainer._features._kept))  # noqa: E731
    fit(trainer, data, validation_data=validation, epochs=5, callbacks=[count])
    assert len(set(sizes[1:])) == 1


# ---- what changed is noticed: data


@pytest.fixture
def two_trainers(make_backbone):
    return [make_trainer(make_model(make_backbone, "block5"), cache=mode) for mode in ("auto", False)]


def test_pixels_changed_in_place_between_fits(two_trainers, data, images_seen):
    """A second fit on the same array, one image of which was overwritten, trains on the new pixels."""
    assert_same_run(*two_trainers, data)
    data[0][11] = 255 - data[0][11]
    images_seen.clear()
    assert_same_run(*two_trainers, data)


def test_another_order_between_fits(two_trainers, data):
    """So does one on the same images in another order."""
    assert_same_run(*two_trainers, data)
    order = torch.randperm(24)
    assert_same_run(*two_trainers, (data[0][order], data[1][order]))


def test_other_targets_between_fits(two_trainers, data):
    """New targets count although the features are known."""
    assert_same_run(*two_trainers, data)
    assert_same_run(*two_trainers, (data[0], (data[1] + 1) % 3))


def test_one_image_less_between_fits(two_trainers, data):
    """So does one image less."""
    assert_same_run(*two_trainers, data)
    assert_same_run(*two_trainers, (data[0][:-1], data[1][:-1]))


def test_raw_and_preprocessed_between_fits(two_trainers, data):
    """Preprocessed images are not taken for raw ones."""
    assert_same_run(*two_trainers, data)
    assert_same_run(*two_trainers, (preprocess(data[0]), data[1]))


def test_two_views_and_twice_the_images(make_backbone, data, tmp_path):
    """Files of two equal views are not taken for twice as many images."""
    fit(make_trainer(make_model(make_backbone), cache=tmp_path), data, n_views=2)
    twice = torch.cat([data[0], data[0]]), torch.cat([data[1], data[1]])
    cached, uncached = (
        make_trainer(make_model(make_backbone), cache=tmp_path),
        make_trainer(make_model(make_backbone)),
    )
    assert_same_run(cached, through_the_whole_model(uncached), twice)


# ---- how much is computed


@pytest.mark.parametrize("boundary", ["block3", "head"])
def test_every_image_is_computed_once(make_backbone, data, validation, images_seen, boundary):
    """Over many epochs each image, of training and of validation, goes through the prefix once."""
    fit(make_trainer(make_model(make_backbone, boundary)), data, validation_data=validation, epochs=6)
    assert total(images_seen) == 24 + 7


def test_without_the_cache_every_epoch_computes(make_backbone, data, validation, images_seen):
    """With `cache=False` it does so in each epoch, and nothing is kept."""
    trainer = make_trainer(make_model(make_backbone), cache=False)
    fit(trainer, data, validation_data=validation, epochs=3)
    assert total(images_seen) == 3 * (24 + 7)
    assert trainer._features._kept == []


def test_a_second_fit_computes_nothing(make_backbone, data, validation, images_seen):
    """A second fit on the same data finds its features, whatever changed behind the boundary."""
    trainer = make_trainer(make_model(make_backbone))
    fit(trainer, data, validation_data=validation)
    images_seen.clear()
    fit(trainer, data, validation_data=validation, batch_size=5, lr=1e-3)
    list(trainer.steps(data))
    assert images_seen == []


def test_a_deeper_boundary_runs_the_layers_between(make_backbone, data, validation, images_seen):
    """After `freeze_until` moved deeper only the layers in between run, and the run is that of a new trainer."""
    cached, uncached = (make_trainer(make_model(make_backbone, "block3"), cache=mode) for mode in ("auto", False))
    assert_same_run(cached, uncached, data, validation_data=validation)
    for trainer in (cached, uncached):
        tk.freeze_until(trainer.model, "head")
    images_seen.clear()
    fit(cached, data, validation_data=validation)
    assert {first for _, first in images_seen} == {6}
    assert total(images_seen) == 24 + 7
    fit(uncached, data, validation_data=validation)
    assert changed(weights_of(cached.model), uncached.model) == set()


def test_a_shallower_boundary_starts_from_the_images(make_backbone, data, images_seen):
    """After it moved back every image is computed again, from its pixels."""
    cached, uncached = (make_trainer(make_model(make_backbone, "head"), cache=mode) for mode in ("auto", False))
    assert_same_run(cached, uncached, data)
    for trainer in (cached, uncached):
        tk.freeze_until(trainer.model, "block3")
    images_seen.clear()
    fit(cached, data)
    assert images_seen == [(24, 0)]
    fit(uncached, data)
    assert changed(weights_of(cached.model), uncached.model) == set()


# ---- random changes


def lines_of(capsys):
    return capsys.readouterr().out.splitlines()


def refusals(lines):
    return [line for line in lines if "not kept" in line]


def test_augmentation_turns_it_off_with_one_line(make_backbone, data, validation, capsys, images_seen):
    """With augmentation one line says why training features are not kept; those of validation are."""
    fit(make_trainer(make_model(make_backbone)), data, validation_data=validation, augment="flip", verbose=1)
    lines = refusals(lines_of(capsys))
    assert len(lines) == 1
    assert "training" in lines[0]
    assert "augment" in lines[0]
    assert "n_views" in lines[0]
    assert total(images_seen) == EPOCHS * 24 + 7


def test_augmentation_without_views_trains_as_through_the_whole_model(make_backbone, data):
    """The run is then that of training on images, new views in every epoch."""
    cached, uncached = (make_trainer(make_model(make_backbone, "block5")) for _ in range(2))
    arguments = {"augment": ["flip", "crop", "color"]}
    assert_same_run(cached, through_the_whole_model(uncached), data, **arguments)


def test_an_impure_prefix_is_told_in_one_line(make_backbone, data, validation, capsys):
    """With a hook among the frozen layers one line for training and one for validation say so, not one each epoch."""
    model = make_model(make_backbone)
    model.backbone.features[3].register_forward_hook(lambda *_: None)
    fit(make_trainer(model), data, validation_data=validation, verbose=1)
    assert len(refusals(lines_of(capsys))) <= 2


def test_nothing_frozen_is_no_news(make_backbone, data, capsys):
    """Where nothing is frozen there is nothing to say: the first line says it already."""
    fit(make_trainer(make_model(make_backbone, None)), data, verbose=1)
    assert len(lines_of(capsys)) == 1 + EPOCHS


def test_what_is_kept_is_told_once(make_backbone, data, validation, capsys):
    """Training and validation images take a line each, in the first epoch."""
    fit(make_trainer(make_model(make_backbone)), data, validation_data=validation, verbose=1)
    lines = lines_of(capsys)
    assert sum("features of" in line for line in lines) == 2
    assert len(lines) == 1 + 2 + EPOCHS


@pytest.mark.parametrize("arguments", [{}, {"augment": "flip"}, {"augment": "flip", "n_views": 2}], ids=str)
def test_quiet_is_quiet(make_backbone, data, capsys, tmp_path, arguments):
    """`verbose=0` prints nothing, and neither does `steps`, whatever is or is not kept."""
    for folder in (None, tmp_path):
        trainer = make_trainer(make_model(make_backbone), cache=folder)
        fit(trainer, data, validation_data=data, epochs=1, **arguments)
        list(trainer.steps(data, **arguments))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


class RandomlyFlipped(Dataset):
    """Images with a random transform of their own."""

    def __init__(self, data):
        self.data, self.transform = data, v2.RandomHorizontalFlip()

    def __len__(self):
        return len(self.data[0])

    def __getitem__(self, index):
        return self.transform(self.data[0][index]), int(self.data[1][index])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("source", ["augment", "Dataset"])
def test_views_are_kept_and_gone_through_in_turn(make_backbone, data, images_seen, source, precision):
    """`n_views=2` computes two views of each image and trains on them in turn, as it does without the cache."""
    cached, uncached = (
        make_trainer(make_model(make_backbone, "block5"), precision=precision, cache=mode) for mode in ("auto", False)
    )
    given = data if source == "augment" else RandomlyFlipped(data)
    arguments = {"n_views": 2, "epochs": 5, "augment": ["flip", "crop"] if source == "augment" else None}
    histories = [figures(fit(cached, given, **arguments))]
    assert total(images_seen) == 2 * 24
    histories.append(figures(fit(uncached, given, **arguments)))
    assert histories[0] == histories[1]
    assert changed(weights_of(cached.model), uncached.model) == set()
    views = cached._features._kept[-1].features
    assert len(views) == 2
    assert not torch.equal(views[0], views[1])


def test_a_second_fit_goes_on_with_the_next_view(make_backbone, data):
    """Views follow the trainer's epochs through several calls of `fit`."""
    trainers = [make_trainer(make_model(make_backbone), cache=mode) for mode in ("auto", False)]
    for epochs in (1, 2, 1):
        for trainer in trainers:
            fit(trainer, data, augment="crop", n_views=3, epochs=epochs)
        assert changed(weights_of(trainers[0].model), trainers[1].model) == set()


def test_a_random_data_set_turns_it_off_with_one_line(make_backbone, data, validation, capsys):
    """A data set whose own transform is random is read anew in each epoch, and one line says so."""
    cached, uncached = (make_trainer(make_model(make_backbone, "block5"), cache=mode) for mode in ("auto", False))
    given = RandomlyFlipped(data)
    histories = [figures(fit(cached, given, validation_data=validation, verbose=1))]
    assert len(refusals(lines_of(capsys))) == 1
    histories.append(figures(fit(uncached, given, validation_data=validation)))
    assert histories[0] == histories[1]
    assert changed(weights_of(cached.model), uncached.model) == set()


class SometimesNoisy(RandomlyFlipped):
    """One image in twelve, and not one of those that lie at even distances, gets noise."""

    def __getitem__(self, index):
        image = self.data[0][index]
        return image + torch.randint(0, 9, image.shape, dtype=torch.uint8) * (index == 1), int(self.data[1][index])


def test_a_data_set_that_is_random_for_few_images(make_backbone, data):
    """A data set that draws random numbers for every image is noticed although few images differ."""
    cached, uncached = (make_trainer(make_model(make_backbone, "block5"), cache=mode) for mode in ("auto", False))
    given = SometimesNoisy(data)
    assert figures(fit(cached, given)) == figures(fit(uncached, given))


# ---- cache=True


class Unknown(nn.Module):
    def forward(self, images):
        return images


def nothing_frozen(model, data):
    tk.freeze_until(model, None)
    return data, {}


def augmented(model, data):
    return data, {"augment": "flip"}


def random_data_set(model, data):
    return RandomlyFlipped(data), {}


def data_loader(model, data):
    return DataLoader(TensorDataset(*data), batch_size=7), {"batch_size": None}


def shuffled_validation(model, data):
    return data, {"validation_data": DataLoader(TensorDataset(*data), shuffle=True, batch_size=7)}


def hooked(model, data):
    model.backbone.features[3].register_forward_hook(lambda *_: None)
    return data, {}


def unknown_layer(model, data):
    model.backbone.features[4] = Unknown()
    return data, {}


def dropout_at_rest(model, data):
    model.backbone.features[4] = nn.Dropout().eval()
    tk.freeze_until(model, "head")
    return data, {}


DECLINED = [
    nothing_frozen,
    augmented,
    random_data_set,
    data_loader,
    shuffled_validation,
    hooked,
    unknown_layer,
    dropout_at_rest,
]


@pytest.mark.parametrize("make", DECLINED)
def test_where_auto_declines_true_raises(make_backbone, data, make):
    """`cache=True` raises where "auto" goes on without, and says that it would."""
    model = make_model(make_backbone)
    given, arguments = make(model, data)
    with pytest.raises(CacheError, match=r'not kept: .*cache="auto"'):
        fit(make_trainer(model, cache=True), given, **arguments)


@pytest.mark.parametrize("make", DECLINED)
def test_where_true_raises_auto_goes_on(make_backbone, data, make):
    """There "auto" trains as it does without the cache."""
    outcomes = []
    for mode in ("auto", False):
        model = make_model(make_backbone)
        given, arguments = make(model, data)
        arguments["restore_best"] = False
        outcomes.append((figures(fit(make_trainer(model, cache=mode), given, **arguments)), weights_of(model)))
    if make is not shuffled_validation:  # which comes in another order, and so rounds differently
        assert outcomes[0][0] == outcomes[1][0]
    assert [name for name in outcomes[0][1] if not torch.equal(outcomes[0][1][name], outcomes[1][1][name])] == []


@pytest.mark.parametrize("make", DECLINED)
def test_true_raises_before_any_work_is_lost(make_backbone, data, make):
    """`cache=True` raises before the first step, for validation data too."""
    model = make_model(make_backbone)
    given, arguments = make(model, data)
    trainer = make_trainer(model, cache=True)
    with pytest.raises(CacheError):
        fit(trainer, given, **arguments)
    assert trainer.global_step == 0


def test_training_dropout_among_frozen_layers(make_backbone, data):
    """Dropout that stays in training mode ends the prefix: what lies behind it is never kept."""
    trainers = []
    for _ in range(2):
        model = make_model(make_backbone)
        model.backbone.features[4] = nn.Dropout(0.5)
        trainers.append(make_trainer(model))
    assert_same_run(trainers[0], through_the_whole_model(trainers[1]), data)
    trainers[0].model.train()
    assert len(trainers[0].model.split()[0]) == 4


def test_too_little_memory(make_backbone, data, monkeypatch, capsys):
    """Without memory for them features are not kept: "auto" says so in a line and goes on, True raises."""
    cached, uncached = (make_trainer(make_model(make_backbone), cache=mode) for mode in ("auto", False))
    monkeypatch.setattr(features_module, "MEMORY_SHARE", 0)
    assert_same_run(cached, uncached, data, verbose=1)
    lines = refusals(lines_of(capsys))
    assert len(lines) == 1
    assert "cache" in lines[0]
    with pytest.raises(CacheError, match="cache"):
        fit(make_trainer(make_model(make_backbone), cache=True), data)


# ---- prefixes that are no pure functions


def doubling_hook(model):
    model.backbone.features[3].register_forward_hook(lambda module, inputs, output: output * 2)


def pre_hook(model):
    model.backbone.features[3].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def replaced_forward(model):
    forward = model.backbone.features[3].forward
    model.backbone.features[3].forward = lambda images: forward(images) * 2


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.backbone.features[3])
    tk.freeze_until(model, "head")
    with torch.no_grad():
        model.backbone.features[3].parametrizations.weight.original0.mul_(2)


def subclass(model):
    class Doubled(nn.ReLU):
        def forward(self, images):
            return super().forward(images) * 2

    model.backbone.features[4] = Doubled()


def hook_on_the_backbone(model):
    model.backbone.register_forward_hook(lambda module, inputs, output: output * 2)


def hook_on_the_features(model):
    model.backbone.features.register_forward_hook(lambda module, inputs, output: output * 2)


def pre_hook_on_the_features(model):
    model.backbone.features.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def replaced_forward_of_the_backbone(model):
    forward = model.backbone.forward
    model.backbone.forward = lambda images: forward(images) * 2


def hook_on_the_model(model):
    model.register_forward_hook(lambda module, inputs, output: output * 2)


IMPURE = [
    doubling_hook,
    pre_hook,
    replaced_forward,
    parametrized,
    subclass,
    hook_on_the_backbone,
    hook_on_the_features,
    pre_hook_on_the_features,
    replaced_forward_of_the_backbone,
    hook_on_the_model,
]


@pytest.mark.parametrize(
    ("change", "mode"),
    [*((change, "auto") for change in IMPURE), (doubling_hook, False), (hook_on_the_backbone, False)],
)
def test_an_impure_prefix_trains_as_through_the_whole_model(make_backbone, data, validation, change, mode):
    """Where hooks, a forward of their own or another kind change what frozen layers do, training sees it."""
    cached, uncached = (make_trainer(make_model(make_backbone, hidden=(16,)), cache=mode) for _ in range(2))
    for trainer in (cached, uncached):
        change(trainer.model)
    assert_same_run(cached, through_the_whole_model(uncached), data, validation_data=validation)


def test_a_hook_that_watches_sees_every_epoch(make_backbone, data):
    """A forward hook on a frozen layer is called for every image in every epoch."""
    model, seen = make_model(make_backbone), []
    model.backbone.features[0].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    fit(make_trainer(model), data)
    assert sum(seen) == EPOCHS * 24


@pytest.mark.parametrize("place", ["head", "last convolution"])
def test_a_hook_behind_the_boundary_is_called(make_backbone, data, images_seen, place):
    """Hooks on what trains are called as ever, while the features before are kept."""
    model, seen = make_model(make_backbone, "block5"), []
    module = model.head if place == "head" else model.backbone.features[12]
    module.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    fit(make_trainer(model), data)
    assert sum(seen) == EPOCHS * 24
    assert total(images_seen) == 24


# ---- raw images, end to end


@pytest.mark.parametrize("method", ["predict", "predict_proba", "evaluate"])
def test_every_raw_image_goes_through_the_first_convolution(make_backbone, data, method):
    """After training on kept features, prediction and evaluation put every image through the whole model."""
    trainer = make_trainer(make_model(make_backbone))
    fit(trainer, data, validation_data=data)
    seen = []
    trainer.model.backbone.features[0].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    getattr(trainer, method)(data if method == "evaluate" else data[0])
    assert sum(seen) == 24


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("boundary", ["block3", "head"])
def test_validation_in_fit_is_evaluation_afterwards(make_backbone, data, validation, boundary, precision):
    """The last epoch's validation figures are those that `evaluate` gives for the raw images afterwards."""
    trainer = make_trainer(make_model(make_backbone, boundary, batch_norm=True), precision=precision)
    history = fit(trainer, data, validation_data=validation, restore_best=False).history
    after = trainer.evaluate(validation, batch_size=7)
    assert (history["val_loss"][-1], history["val_accuracy"][-1]) == (after["loss"], after["accuracy"])


def test_validation_in_several_batches_is_evaluation_afterwards(make_backbone, data):
    """So it is, bit for bit, where the validation data takes several batches."""
    trainer = make_trainer(make_model(make_backbone))
    history = fit(trainer, data, validation_data=data, restore_best=False).history
    after = trainer.evaluate(data, batch_size=7)
    assert (history["val_loss"][-1], history["val_accuracy"][-1]) == (after["loss"], after["accuracy"])


# ---- files


def test_a_second_trainer_computes_nothing(make_backbone, data, validation, tmp_path, images_seen):
    """Another trainer with the same folder computes nothing and trains the same."""
    cached, uncached = (make_trainer(make_model(make_backbone), cache=tmp_path) for _ in range(2))
    through_the_whole_model(uncached)
    fit(make_trainer(make_model(make_backbone), cache=str(tmp_path)), data, validation_data=validation)
    assert len(list(tmp_path.glob("*.features"))) == len(list(tmp_path.iterdir())) == 2
    images_seen.clear()
    assert_same_run(cached, uncached, data, validation_data=validation)
    assert images_seen == []


SECOND_PROCESS = """
import sys
import torch
from torchvision.models.vgg import make_layers
import transferkit as tk
from transferkit.features.prefix import Prefix
from transferkit.data.preprocessing import CONVENTIONS

torch.set_num_threads(1)
folder = sys.argv[1]
state = torch.load(f"{folder}/start.pt")
call, seen = Prefix.__call__, []

def counted(self, inputs, *, first=0):
    seen.extend([first] * (len(inputs) if bool(inputs.any()) else 0))
    return call(self, inputs, first=first)

Prefix.__call__ = counted
features = make_layers([4, "M", 4, "M", 8, "M", 8, "M", 8, "M"])
backbone = tk.Backbone("tiny", features, CONVENTIONS["IMAGENET1K_V1"].with_image_size(32))
model = tk.attach_head(backbone, ["cat", "dog", "owl"], hidden=(16,), dropout=0.5)
model.load_state_dict(state["model"])
trainer = tk.Trainer(
    tk.freeze_until(model, "head"), device="cpu", precision="bf16", lr=1e-2, cache=f"{folder}/features"
)
trainer.fit(state["data"], epochs=2, batch_size=7, verbose=0)
torch.save(model.state_dict(), f"{folder}/end.pt")
print(len(seen))
"""


@pytest.mark.slow
def test_a_second_process_computes_nothing(make_backbone, data, tmp_path):
    """Another process with the same folder computes nothing and ends with the same weights."""
    model = make_model(make_backbone)
    torch.save({"model": model.state_dict(), "data": data}, tmp_path / "start.pt")
    fit(make_trainer(model, cache=tmp_path / "features"), data, epochs=2)
    process = subprocess.run(
        [sys.executable, "-c", SECOND_PROCESS, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert process.stdout == "0\n"
    assert changed(torch.load(tmp_path / "end.pt"), model) == set()


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path):
    path.write_bytes(b"")


def flipped_in_the_features(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def flipped_in_the_first_page(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def of_another_key(path):
    other = FeatureFile(path.parent, path.stem + "0" * 32)
    features = torch.zeros(1, 24, 1, 1, 8, dtype=torch.bfloat16)
    other.write([features[0]], tuple(features.shape), features.dtype)


@pytest.mark.parametrize(
    "damage", [cut_short, emptied, flipped_in_the_features, flipped_in_the_first_page, of_another_key]
)
def test_a_damaged_file_is_told_and_computed_anew(make_backbone, data, tmp_path, capsys, damage):
    """A file that cannot be used is passed over with a line that has its path, and a good one takes its place."""
    fit(make_trainer(make_model(make_backbone), cache=tmp_path), data)
    path = next(tmp_path.iterdir())
    good = path.read_bytes()
    damage(path)
    capsys.readouterr()
    cached, uncached = (
        make_trainer(make_model(make_backbone), cache=tmp_path),
        make_trainer(make_model(make_backbone)),
    )
    through_the_whole_model(uncached)
    assert_same_run(cached, uncached, data, verbose=1)
    told = [line for line in lines_of(capsys) if "passed over" in line]
    assert len(told) == 1
    assert str(path) in told[0]
    assert path.read_bytes() == good


def test_a_directory_in_a_files_place(make_backbone, data, tmp_path, capsys):
    """A directory under the file's name is told, and the run goes on in memory."""
    fit(make_trainer(make_model(make_backbone), cache=tmp_path), data)
    path = next(tmp_path.iterdir())
    path.unlink()
    path.mkdir()
    cached, uncached = (
        make_trainer(make_model(make_backbone), cache=tmp_path),
        make_trainer(make_model(make_backbone)),
    )
    capsys.readouterr()
    assert_same_run(cached, through_the_whole_model(uncached), data, verbose=1)
    assert any(str(path) in line for line in lines_of(capsys))


@contextmanager
def ordinary_user():
    """The superuser may write anywhere: be somebody else."""
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)


def test_a_read_only_folder(make_backbone, data, capsys):
    """With a folder that cannot be written the run goes on in memory, and one line says so."""
    cached, uncached = (make_trainer(make_model(make_backbone)) for _ in range(2))
    through_the_whole_model(uncached)
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        with ordinary_user():
            cached = make_trainer(make_model(make_backbone), cache=name)
            assert_same_run(cached, uncached, data, verbose=1)
        told = [line for line in lines_of(capsys) if "not kept in a file" in line]
        assert len(told) == 1
        assert name in told[0]
        assert list(Path(name).iterdir()) == []


def test_a_full_disk(make_backbone, data, tmp_path, capsys, monkeypatch, images_seen):
    """Without room on the disk the run goes on in memory, one line says so, and no image is computed twice."""
    cached = make_trainer(make_model(make_backbone), cache=tmp_path)
    uncached = through_the_whole_model(make_trainer(make_model(make_backbone)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - 10, 10))
    assert_same_run(cached, uncached, data, verbose=1)
    told = [line for line in lines_of(capsys) if "not kept in a file" in line]
    assert len(told) == 1
    assert str(tmp_path) in told[0]
    assert list(tmp_path.iterdir()) == []
    assert total(images_seen) == 24


def test_a_file_of_a_shallower_boundary_serves_another_trainer(make_backbone, data, tmp_path, images_seen):
    """A trainer with a deeper boundary derives its features from another one's file."""
    fit(make_trainer(make_model(make_backbone, "block3"), cache=tmp_path), data)
    cached, uncached = (
        make_trainer(make_model(make_backbone), cache=tmp_path),
        make_trainer(make_model(make_backbone)),
    )
    through_the_whole_model(uncached)
    images_seen.clear()
    assert_same_run(cached, uncached, data)
    assert {first for _, first in images_seen} == {6}


def test_a_folder_that_cannot_be_used_is_refused(make_backbone, tmp_path):
    """A `cache_dir` that is a file is refused when the trainer is made."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cache"):
        make_trainer(make_model(make_backbone), cache=tmp_path / "file")


# ---- kinds of data


@pytest.fixture
def pictures(data):
    """The images as PIL images of differing sizes."""
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in data[0]]
    return [image.resize((32 + 3 * (index % 5), 40 - index % 7)) for index, image in enumerate(images)]


def samples_of(pictures, data):
    return list(zip(pictures, data[1].tolist(), strict=True))


@pytest.fixture
def folder(pictures, data, tmp_path):
    """A folder of images for each class."""
    for index, (image, target) in enumerate(samples_of(pictures, data)):
        place = tmp_path / "images" / CLASSES[target]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{index:02}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("kind", ["PIL", "Subset", "ImageFolder", "TensorDataset", "float", "numpy"])
def test_every_kind_of_data_is_kept(make_backbone, data, pictures, folder, images_seen, kind):
    """Pictures of differing sizes, parts of data sets, folders, preprocessed images: each is computed once."""
    given = {
        "PIL": lambda: samples_of(pictures, data),
        "Subset": lambda: Subset(TensorDataset(*data), list(range(23, -1, -1))),
        "ImageFolder": lambda: ImageFolder(folder),
        "TensorDataset": lambda: TensorDataset(*data),
        "float": lambda: (preprocess(data[0]), data[1]),
        "numpy": lambda: (data[0].permute(0, 2, 3, 1).numpy(), data[1].numpy()),
    }[kind]()
    cached, uncached = (make_trainer(make_model(make_backbone, "block5")) for _ in range(2))
    assert_same_run(cached, through_the_whole_model(uncached), given, validation_split=0.25)
    assert total(images_seen) == 24


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(make_backbone, data, pictures, num_workers):
    """With processes that read the data the run is the same."""
    trainers = [make_trainer(make_model(make_backbone)) for _ in range(2)]
    histories = [
        figures(fit(trainer, samples_of(pictures, data), num_workers=workers, validation_split=0.25))
        for trainer, workers in zip(trainers, (num_workers, 0), strict=True)
    ]
    assert histories[0] == histories[1]
    assert changed(weights_of(trainers[0].model), trainers[1].model) == set()


def test_a_loader_that_reads_in_order_is_kept_for_validation(make_backbone, data, validation, images_seen):
    """The images of a `DataLoader` without shuffling are computed once, and give the figures of the data itself."""
    loader = DataLoader(TensorDataset(*validation), batch_size=3)
    trainers = [make_trainer(make_model(make_backbone)) for _ in range(2)]
    histories = [figures(fit(trainers[0], data, validation_data=loader))]
    assert total(images_seen) == 24 + 7
    histories.append(figures(fit(trainers[1], data, validation_data=validation)))
    assert histories[0] == histories[1]


@pytest.mark.parametrize(
    "options",
    [{"shuffle": True}, {"drop_last": True}, {"collate_fn": partial(torch.utils.data.default_collate)}],
    ids=["shuffle", "drop_last", "collate_fn"],
)
def test_a_loader_with_a_will_of_its_own_is_read_each_epoch(make_backbone, data, images_seen, options, capsys):
    """One that shuffles, drops images or collates in its own way is read in every epoch, as it wants."""
    loader = DataLoader(TensorDataset(*data), batch_size=7, **options)
    trainer = make_trainer(make_model(make_backbone))
    fit(trainer, data, validation_data=loader, verbose=1)
    each = 21 if "drop_last" in options else 24
    assert total(images_seen) == 24 + EPOCHS * each
    assert len(refusals(lines_of(capsys))) == 1


def test_a_loader_to_train_on_is_read_each_epoch(make_backbone, data, images_seen, capsys):
    """A `DataLoader` of training data is read in every epoch, with one line, and gives the plain run."""
    cached, uncached = (make_trainer(make_model(make_backbone)) for _ in range(2))
    through_the_whole_model(uncached)
    loader = DataLoader(TensorDataset(*data), batch_size=7)
    for trainer in (cached, uncached):
        trainer.fit(loader, epochs=3, verbose=1)
    assert total(images_seen) == 3 * 24
    assert len(refusals(lines_of(capsys))) == 1
    assert changed(weights_of(cached.model), uncached.model) == set()


# ---- the argument


@pytest.mark.parametrize("value", ["yes", None, 2])
def test_another_value_is_refused(make_backbone, value):
    """`cache` is "auto", True or False."""
    with pytest.raises(ValueError, match="cache="):
        make_trainer(make_model(make_backbone), cache=value)


@pytest.mark.parametrize("value", [0, torch.tensor(1).numpy().astype(bool) & False], ids=["0", "numpy's False"])
def test_what_equals_false_is_false_or_refused(make_backbone, data, images_seen, value):
    """0 and numpy's False keep nothing, or are refused; they never mean "auto"."""
    try:
        trainer = make_trainer(make_model(make_backbone), cache=value)
    except ValueError:
        return
    fit(trainer, data)
    assert trainer._features._kept == []
