"""Where features cannot be cached, "auto" says why and trains without, True raises, and `summary` agrees."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import transferkit as tk
from cached import (
    EPOCHS,
    IMPURE,
    RandomlyFlipped,
    assert_same_run,
    changed,
    figures,
    fit,
    lines_of,
    make_model,
    make_trainer,
    refusals,
    through_the_whole_model,
    total,
    weights_of,
)
from transferkit.errors import CacheError
from transferkit.features import cache as cache_module

# ---- what is said


def test_augmentation_is_told_in_one_line(make_backbone, data, capsys, images_seen):
    """With augmentation one line says why training features are not cached; those of validation images are."""
    fit(
        make_trainer(make_model(make_backbone)),
        data,
        validation_data=(255 - data[0], data[1]),
        augment="flip",
        verbose=2,
    )
    (line,) = refusals(lines_of(capsys))
    assert "training" in line
    assert "augment" in line
    assert "n_views" in line
    assert total(images_seen) == 24 + EPOCHS * 24 + 24  # the head is measured before


def test_an_impure_prefix_is_told_once(make_backbone, data, capsys):
    """A hook among the frozen layers takes a line for training and one for validation, not one each epoch."""
    model = make_model(make_backbone)
    model.backbone.features[3].register_forward_hook(lambda *_: None)
    fit(make_trainer(model), data, validation_data=data, verbose=2)
    assert len(refusals(lines_of(capsys))) == 2


def test_nothing_frozen_is_no_news(make_backbone, data, capsys):
    """Where nothing is frozen nothing is said: the first line of the run says it."""
    fit(make_trainer(make_model(make_backbone, None)), data, verbose=2)
    assert len(lines_of(capsys)) == 1 + EPOCHS


def test_what_is_cached_is_told_once(make_backbone, data, capsys):
    """Training and validation images take a line each, in the first epoch."""
    fit(make_trainer(make_model(make_backbone)), data, validation_data=(255 - data[0], data[1]), verbose=2)
    lines = lines_of(capsys)
    assert sum("features of 24 images: computed, cached in memory of cpu" in line for line in lines) == 2
    assert len(lines) == 1 + 2 + EPOCHS


@pytest.mark.parametrize("arguments", [{}, {"augment": "flip"}, {"augment": "flip", "n_views": 2}], ids=str)
def test_quiet_is_quiet(make_backbone, data, capsys, tmp_path, arguments):
    """`verbose=0` prints nothing, and neither does `steps`, whatever is or is not cached."""
    for folder in (None, tmp_path):
        trainer = make_trainer(make_model(make_backbone), folder=folder)
        fit(trainer, data, validation_data=data, epochs=1, **arguments)
        list(trainer.steps(data, **arguments))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


# ---- random data


def test_augmentation_trains_as_through_the_whole_model(make_backbone, data):
    """Augmented images are new in every epoch, also to frozen layers."""
    cached, whole = (make_trainer(make_model(make_backbone, "block5")) for _ in range(2))
    assert_same_run([cached, through_the_whole_model(whole)], data, augment=["flip", "crop", "color"])


class SometimesNoisy(RandomlyFlipped):
    """One image, which is not among those that are looked at, gets noise."""

    def __getitem__(self, index):
        image = self.data[0][index]
        return image + torch.randint(0, 9, image.shape, dtype=torch.uint8) * (index == 1), int(self.data[1][index])


@pytest.mark.parametrize("kind", [RandomlyFlipped, SometimesNoisy])
def test_a_random_data_set_is_read_anew(make_backbone, data, capsys, kind):
    """A data set that draws random numbers is read in each epoch, and one line says so."""
    cached, uncached = (make_trainer(make_model(make_backbone, "block5"), cache=mode) for mode in ("auto", False))
    history = figures(fit(cached, kind(data), epochs=3, verbose=2))
    assert len(refusals(lines_of(capsys))) == 1
    assert figures(fit(uncached, kind(data), epochs=3)) == history
    assert changed(weights_of(cached.model), uncached.model) == set()


# ---- cache=True


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


def impure(kind):
    def change(model, data):
        IMPURE[kind][0](model)
        return data, {}

    change.__name__ = kind
    return change


DECLINED = [
    nothing_frozen,
    augmented,
    random_data_set,
    data_loader,
    shuffled_validation,
    *(impure(kind) for kind in ("hook", "unknown", "dropout at rest", "hook on the backbone")),
]


@pytest.mark.parametrize("make", DECLINED, ids=lambda make: make.__name__)
def test_true_raises_where_auto_trains_without(make_backbone, data, make):
    """`cache=True` raises before the first step and names "auto", which trains as without the cache."""
    weights = []
    for mode in (True, "auto", False):
        model = make_model(make_backbone)
        given, arguments = make(model, data)
        trainer = make_trainer(model, cache=mode)
        if mode is True:
            with pytest.raises(CacheError, match=r'not cached: .*cache="auto"'):
                fit(trainer, given, **arguments)
            assert trainer.global_step == 0
        else:
            fit(trainer, given, **arguments)
            weights.append(weights_of(model))
    if make is not shuffled_validation:  # which decides by chance on the best epoch
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("kind", [*IMPURE, "pure"])
def test_summary_says_what_fit_does(make_backbone, data, capsys, kind):
    """`summary` marks layers as cached just where `fit` caches their output."""
    model = make_model(make_backbone)
    if kind != "pure":
        IMPURE[kind][0](model)
    trainer = make_trainer(model)
    shown = [layer.name for layer in tk.summary(model).layers if layer.cached]
    fit(trainer, data, verbose=2)
    declined = bool(refusals(lines_of(capsys)))
    assert (trainer.training.features.chunks == []) == declined == (kind != "pure")
    assert shown == ([] if declined else list(model.backbone.layer_names))


# ---- memory


def test_too_little_memory(make_backbone, data, monkeypatch, capsys):
    """Without memory for features "auto" says so in a line and trains without, True raises; both name a remedy."""
    trainers = [make_trainer(make_model(make_backbone), cache=mode) for mode in ("auto", False)]
    monkeypatch.setattr(cache_module, "MEMORY_SHARE", 0)
    assert_same_run(trainers, data, verbose=2)
    (line,) = refusals(lines_of(capsys))
    assert "Trainer(cache=folder)" in line
    with pytest.raises(CacheError, match=r"Trainer\(cache=folder\)"):
        fit(make_trainer(make_model(make_backbone), cache=True), data)
