"""What features depend on is noticed when it changes: weights, layers, the boundary, pixels, targets."""

import pytest
import torch
from torch import nn

import transferkit as tk
from cached import (
    EPOCHS,
    IMPURE,
    assert_same_run,
    fit,
    make_model,
    make_trainer,
    preprocess,
    through_the_whole_model,
    total,
)
from transferkit.data.preprocessing import CONVENTIONS
from transferkit.errors import ArgumentError


@pytest.fixture
def contestants(make_backbone):
    """A maker of three trainers of equal models: with the cache, without it, and through the whole model."""

    def make(boundary="head", **model):
        modes = ("auto", False, False)
        trainers = [make_trainer(make_model(make_backbone, boundary, **model), cache=mode) for mode in modes]
        through_the_whole_model(trainers[2])
        return trainers

    return make


# ---- layers and weights


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


def pool_that_prints_alike(model):
    model.backbone.features[2] = nn.AvgPool2d(2, divisor_override=1)  # its repr leaves that out


def other_preprocessing(model):
    model.backbone.preprocess = CONVENTIONS["KERAS"].with_image_size(32)


def larger_images(model):
    model.backbone.preprocess = model.backbone.preprocess.with_image_size(64)


def kernel_size(model):
    model.backbone.features[2].kernel_size = 1
    model.backbone.features[2].padding = 0


CHANGES = [in_place, through_data, permuted, loaded, replaced, average_pool, pool_that_prints_alike, kernel_size]


@pytest.mark.parametrize("change", [*CHANGES, other_preprocessing], ids=lambda change: change.__name__)
def test_a_change_between_fits(contestants, data, change):
    """A second fit after a change of what is frozen trains as a run through the whole changed model does."""
    trainers = contestants()
    assert_same_run(trainers, data, epochs=1)
    before = trainers[0].predict_proba(data[0])
    for trainer in trainers:
        change(trainer.model)
    assert (trainers[0].predict_proba(data[0]) != before).any()
    assert_same_run(trainers, data, epochs=1)


@pytest.mark.parametrize("change", [*CHANGES, other_preprocessing, larger_images], ids=lambda change: change.__name__)
def test_a_change_in_a_callback(contestants, data, change):
    """A change that a callback makes between two epochs counts from the next epoch on, with and without the cache."""

    def between(trainer, report):
        if report.epoch == 0:
            change(trainer.model)

    assert_same_run(contestants(), data, epochs=2, callbacks=[between])


def test_features_of_a_run_whose_preprocessing_changed_are_right_for_the_next(make_backbone, data, tmp_path):
    """What a run cached before and after a callback changed the preprocessing belongs to the one it was made with."""

    def weights(folder, *callbacks, epochs=1):
        trainer = make_trainer(make_model(make_backbone), folder=folder, cache=False)
        if not callbacks:
            other_preprocessing(trainer.model)
        fit(trainer, data, epochs=epochs, callbacks=callbacks)
        return trainer.model.state_dict()

    weights(tmp_path, lambda trainer, report: other_preprocessing(trainer.model), epochs=2)
    cached, uncached = weights(tmp_path), weights(None)
    assert all(torch.equal(value, uncached[name]) for name, value in cached.items())


def test_another_image_size_in_a_callback_needs_no_augmentation(make_backbone, data):
    """Augmentation is made for one image size: a callback that changes it is refused with what to do."""
    trainer = make_trainer(make_model(make_backbone))
    with pytest.raises(ArgumentError, match="image size changed from 32 to 64 during a run with augment"):
        fit(trainer, data, augment="crop", callbacks=[lambda trainer, report: larger_images(trainer.model)])


def test_a_setting_that_is_no_weight(contestants, data):
    """A change of batch norm's epsilon counts."""
    trainers = contestants("block5", batch_norm=True)
    for _ in range(2):
        assert_same_run(trainers, data)
        for trainer in trainers:
            trainer.model.backbone.features[1].eps = 0.5


@pytest.mark.parametrize("boundaries", [("head", "block5"), ("block3", "head"), ("block5", "block2"), ("head", None)])
def test_a_boundary_moved_in_a_callback(contestants, data, boundaries):
    """A boundary that a callback moves between two epochs gives the run that images give."""

    def move(trainer, report):
        if report.epoch == 0:
            tk.freeze_until(trainer.model, boundaries[1])

    trainers = contestants(boundaries[0], batch_norm=True)
    assert_same_run(trainers, data, validation_data=(data[0][:7], data[1][:7]), callbacks=[move])


def test_batch_norm_frozen_by_hand(contestants, data):
    """Where only `requires_grad` is off, statistics change with every step: nothing behind them is cached, or grows."""
    trainers = contestants(None, batch_norm=True)
    for trainer in trainers:
        trainer.model.backbone.requires_grad_(False)
    sizes, features = [], trainers[0].training.features
    assert_same_run(trainers, data, callbacks=[lambda trainer, _: sizes.append(len(features.chunks))])
    assert set(sizes) == {1}


def test_dropout_in_training_mode_ends_the_prefix(contestants, data):
    """Nothing behind frozen dropout that stays in training mode is cached."""
    trainers = contestants()
    for trainer in trainers:
        trainer.model.backbone.features[4] = nn.Dropout(0.5)
    assert_same_run(trainers, data)
    assert len(trainers[0].model.train().split()[0]) == 4


# ---- layers that are no pure functions


@pytest.mark.parametrize("kind", IMPURE)
def test_an_impure_prefix_trains_as_through_the_whole_model(contestants, data, kind):
    """Where hooks, a forward of their own or another kind change what frozen layers do, training sees it."""
    trainers = contestants()
    for trainer in trainers:
        IMPURE[kind][0](trainer.model)
    assert_same_run(trainers, data, epochs=1)


def test_a_hook_among_the_frozen_layers_sees_every_epoch(make_backbone, data):
    """A forward hook on a frozen layer is called for every image in every epoch, and where the head is measured."""
    model, seen = make_model(make_backbone), []
    model.backbone.features[0].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    fit(make_trainer(model), data)
    assert sum(seen) == 24 + EPOCHS * 24


@pytest.mark.parametrize("place", ["head", "last convolution"])
def test_a_hook_behind_the_boundary_is_called(make_backbone, data, images_seen, place):
    """Hooks on what trains are called for every image in every epoch and in measuring, over cached features."""
    model, seen = make_model(make_backbone, "block5"), []
    module = model.head if place == "head" else model.backbone.features[12]
    module.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    fit(make_trainer(model), data)
    assert sum(seen) == 24 + EPOCHS * 24
    assert total(images_seen) == 24


# ---- data


def one_image_overwritten(images, targets):
    images[11] = 255 - images[11]  # in place, in the same array
    return images, targets


def another_order(images, targets):
    order = torch.arange(24).roll(5)
    return images[order], targets[order]


def other_targets(images, targets):
    return images, (targets + 1) % 3


def one_image_less(images, targets):
    return images[:-1], targets[:-1]


def twice_the_images(images, targets):
    return torch.cat([images, images]), torch.cat([targets, (targets + 1) % 3])


def preprocessed(images, targets):
    return preprocess(images), targets


@pytest.mark.parametrize(
    "change",
    [one_image_overwritten, another_order, other_targets, one_image_less, twice_the_images, preprocessed],
    ids=lambda change: change.__name__,
)
def test_other_data_between_fits(contestants, data, tmp_path, change):
    """A second fit on changed data trains on that, from memory and from files."""
    in_folder = contestants("block5")[0]
    in_folder.training.features.folder = tmp_path
    trainers = [*contestants("block5"), in_folder]
    assert_same_run(trainers, data, epochs=1)
    assert_same_run(trainers, change(*data), epochs=1)
