"""A search gives what training by hand gives, over one feature cache, and tells the best from the rest."""

import copy
import math
import os
import random
import re
import shutil
import signal
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets import ImageFolder

import transferkit as tk
from tiny import CLASSES, differences, figures, lines_of
from transferkit.base.randomness import derive_seed, seeded
from transferkit.errors import (
    ArgumentError,
    CacheError,
    CheckpointError,
    HeadMismatchError,
    NonFiniteError,
    TransferKitError,
    UnknownLayerError,
)
from transferkit.model.freezing import first_trainable
from transferkit.results.history import EpochReport, History
from transferkit.searching import SearchResult, Trial


@pytest.fixture
def search(make_backbone):
    """`tk.search` on the tiny backbone, on the CPU, without a word."""
    backbone = make_backbone()

    def build(**options):
        return tk.attach_head(backbone, CLASSES, **options)

    def run(space, train, *, build=build, **arguments):
        return tk.search(build, space, train, **{"device": "cpu", "precision": "fp32", "verbose": 0, **arguments})

    run.backbone, run.build = backbone, build
    return run


def by_hand(build, train, *, frozen="head", seed=0, fit=None, head=None, **trainer_arguments):
    """Train as a user would, with the seed of a search, and return model and history."""
    with seeded(derive_seed(seed, "head")):
        model = copy.deepcopy(build(**(head or {})))  # the backbone is shared
    arguments = {"device": "cpu", "precision": "fp32", "seed": seed, **trainer_arguments}
    trainer = tk.Trainer(tk.freeze_until(model, frozen), **arguments)
    history = trainer.fit(train, verbose=0, **(fit or {}))
    return model, history


@pytest.fixture
def folder(tmp_path):
    """An ImageFolder of 15 photographs, of which no two have one size."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (tmp_path / "images" / name).mkdir(parents=True)
        for place in range(5):
            pixels = generator.integers(0, 120, (30 + 7 * place, 61 - 5 * place, 3), dtype=np.uint8)
            pixels[..., number] += 120
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{place}.png")
    return tmp_path / "images"


# ---- which sets are tried


def test_a_grid_is_every_combination_in_its_order(search, data):
    """Trials are in the order of the grid, the last name running fastest, though they run from shallow to deep."""
    space = {"freeze_until": ["head", "block4", "block5"], "lr": [1e-3, 1e-2], "hidden": [(), (4,)], "epochs": [1]}
    built = []

    def build(**options):
        built.append(options["hidden"])
        return search.build(**options)

    result = search(space, data, build=build, validation_data=data)
    expected = [
        {"freeze_until": frozen, "lr": lr, "hidden": hidden, "epochs": 1}
        for frozen in ("head", "block4", "block5")
        for lr in (1e-3, 1e-2)
        for hidden in ((), (4,))
    ]
    assert [trial.params for trial in result.trials] == expected
    assert {*built} == {(), (4,)}


def test_trials_run_from_shallow_to_deep(search, data, capsys):
    """The lines come in the order of depth, with None first."""
    search({"freeze_until": ["head", None, "block5", "block2"], "epochs": [1]}, data, validation_data=data, verbose=2)
    lines = lines_of(capsys.readouterr().out)
    assert [re.search(r"freeze_until=(\w+)", line)[1] for line in lines] == ["None", "block2", "block5", "head"]
    assert [line[:12] for line in lines] == [f"trial {number} of 4" for number in (1, 2, 3, 4)]
    left = [re.search(r"val_accuracy \d\.\d{4} [\d.]+ s( \d+ s left)?$", line) for line in lines]
    assert [found[1] is None for found in left] == [True, False, False, False]  # the first computed features for all


def test_draws_are_functions_of_a_generator(search, data):
    """Random draws come from one random.Random of the seed, name by name; another seed draws others."""
    space = {"lr": lambda generator: 10 ** generator.uniform(-4, -2), "batch_size": [4, 8, 16], "epochs": [1, 2]}
    found = search(space, data, validation_data=data, num_trials=3, seed=3)
    generator = random.Random(derive_seed(3, "search"))
    expected = [
        {
            "lr": 10 ** generator.uniform(-4, -2),
            "batch_size": generator.choice([4, 8, 16]),
            "epochs": generator.choice([1, 2]),
        }
        for _ in range(3)
    ]
    assert [trial.params for trial in found.trials] == expected
    again = search(space, data, validation_data=data, num_trials=3, seed=np.int64(3))
    assert [trial.params for trial in again.trials] == expected
    assert [trial.score for trial in again.trials] == [trial.score for trial in found.trials]
    other = search(space, data, validation_data=data, num_trials=3, seed=4)
    assert [trial.params for trial in other.trials] != expected


def test_names_go_where_they_belong(search, data, monkeypatch):
    """Arguments of Trainer go there, those of fit there, all others to build."""
    seen = {}
    for name, call in (("__init__", tk.Trainer.__init__), ("fit", tk.Trainer.fit)):

        def noted(self, *given, name=name, call=call, **arguments):
            seen[name] = arguments
            return call(self, *given, **arguments)

        monkeypatch.setattr(tk.Trainer, name, noted)
    built = []

    def build(**options):
        built.append(options)
        return search.build(**options)

    space = {
        "optimizer": ["sgd"], "lr": [1e-2], "schedule": ["cosine"],
        "loss": [tk.CrossEntropy(class_weights="balanced")],
        "epochs": [2], "batch_size": [5], "augment": ["flip"], "n_views": [2], "hidden": [(6,)], "dropout": [0.1],
        "freeze_until": ["block5"],
    }  # fmt: skip
    search(space, data, build=build, validation_data=data, seed=2)
    assert {name: value for name, value in seen["__init__"].items() if name in space} == {
        "optimizer": "sgd", "lr": 1e-2, "schedule": "cosine",
        "loss": tk.CrossEntropy(class_weights="balanced"),
    }  # fmt: skip
    assert {name: value for name, value in seen["fit"].items() if name in space} == {
        "epochs": 2, "batch_size": 5, "augment": "flip", "n_views": 2
    }  # fmt: skip
    assert all(options == {"hidden": (6,), "dropout": 0.1} for options in built)
    assert seen["__init__"]["seed"] == 2


@pytest.mark.parametrize("frozen", ["block4", "head", None])
def test_without_a_boundary_in_space_that_of_build_stays(search, data, frozen):
    """What build froze is what is frozen, where the space does not say it."""
    result = search({"lr": [1e-2]}, data, build=lambda: tk.freeze_until(search.build(), frozen), validation_data=data)
    expected = first_trainable(tk.freeze_until(search.build(), frozen))
    assert first_trainable(result.best_model_) == expected


# ---- what a trial is

CASES = {
    "head": {},
    "a head of its own": {"head": {"hidden": (8,), "dropout": 0.5}},
    "block 4": {"frozen": "block4"},
    "everything": {"frozen": None},
    "split": {"fit": {"validation_split": 0.25}},
    "augmented": {"frozen": "block5", "fit": {"augment": ["flip", "color"]}},
    "views": {"fit": {"augment": "crop", "n_views": 2, "epochs": 3}},
    "weighed": {"optimizer": "sgd", "loss": tk.CrossEntropy(class_weights="balanced"), "schedule": "one_cycle"},
}


@pytest.mark.parametrize(
    ("case", "form"),
    [
        *((case, "arrays") for case in CASES),
        *((case, "folder") for case in ("block 4", "augmented", "views")),
        ("split", "folder in workers"),
    ],
)
def test_a_trial_is_a_fit_by_hand(search, data, folder, case, form):
    """Weights and figures of a trial are those of Trainer.fit with the same seed, bit for bit; files are read once."""
    options = CASES[case]
    train = data if form == "arrays" else ImageFolder(folder)
    fit = {"epochs": 2, "batch_size": 7, **options.get("fit", {})}
    if "validation_split" not in fit:
        fit["validation_data"] = train
    arguments = {name: value for name, value in options.items() if name not in ("fit", "head", "frozen")}
    frozen, head = options.get("frozen", "head"), options.get("head", {})
    given = {"lr": 1e-2, **arguments}
    model, history = by_hand(search.build, train, frozen=frozen, seed=5, fit=fit, head=head, **given)
    own = {name: fit.pop(name) for name in ("validation_data", "validation_split") if name in fit}
    if form == "folder in workers":
        own["num_workers"] = 1
    # a grid of three, of which the others must not rub off on it
    space = {name: [value] for name, value in {**given, **fit, **head}.items()} | {"freeze_until": ["block3", frozen]}
    result = search(space, train, seed=5, **own)
    trial = result.trials[1]
    assert figures(trial.history) == figures(history)
    assert trial.score == max(history.history["val_accuracy"])
    alone = search({**space, "freeze_until": [frozen]}, train, seed=5, **own)
    assert differences(alone.best_model_.state_dict(), model.state_dict()) == []


def test_images_resized_in_memory_train_as_files_do(search, folder, monkeypatch):
    """With and without room in memory a search over files of different sizes gives the same bits."""
    space = {"lr": [1e-2], "freeze_until": ["block5"], "epochs": [2], "batch_size": [4], "augment": [["flip", "crop"]]}
    dataset = ImageFolder(folder)
    in_memory = search(space, dataset, validation_split=0.4)
    monkeypatch.setattr(sys.modules["transferkit.searching"], "resized", lambda *_, **__: None)
    from_files = search(space, dataset, validation_split=0.4)
    assert figures(in_memory.trials[0].history) == figures(from_files.trials[0].history)
    assert differences(in_memory.best_model_.state_dict(), from_files.best_model_.state_dict()) == []


def test_image_sizes_may_be_tried(make_backbone, folder):
    """Each image size has images of its own: trials are those by hand."""

    def build(size):
        return tk.attach_head(make_backbone(image_size=size), CLASSES)

    dataset = ImageFolder(folder)
    space = {"size": [32, 64], "lr": [1e-2], "epochs": [1], "freeze_until": ["head"]}
    result = tk.search(build, space, dataset, validation_data=dataset, device="cpu", precision="fp32", verbose=0)
    for trial, size in zip(result.trials, (32, 64), strict=True):
        _, history = by_hand(partial(build, size), dataset, lr=1e-2, fit={"validation_data": dataset, "epochs": 1})
        assert figures(trial.history) == figures(history)


def test_the_model_is_that_after_its_best_epoch(search, data):
    """The best model validates with the best score, though later epochs were worse."""
    validation = (data[0], (data[1] + 1) % 3)  # the more is learnt, the worse
    result = search({"lr": [3e-2], "freeze_until": ["block5"], "epochs": [12]}, data, validation_data=validation)
    accuracies = result.trials[0].history.history["val_accuracy"]
    assert accuracies[-1] < max(accuracies)
    trainer = tk.Trainer(result.best_model_, device="cpu", precision="fp32")
    assert trainer.evaluate(validation)["accuracy"] == result.best_score_ == max(accuracies)


# ---- features


def test_features_are_computed_once_for_all_trials(search, data, images_seen):
    """Nine trials at three depths: each image goes through the shallow layers once, and on from there."""
    space = {"freeze_until": ["head", "block4", "block5"], "lr": [1e-3, 1e-2, 1e-1], "epochs": [1]}
    search(space, data, validation_data=(255 - data[0][:6], data[1][:6]))
    computed = [(count, first) for count, first in images_seen]
    assert sum(count for count, first in computed if first == 0) == 30
    deeper = {first for _, first in computed if first}
    assert len(deeper) == 2
    assert [sum(count for count, first in computed if first == depth) for depth in sorted(deeper)] == [30, 30]


def test_files_are_read_once(search, folder, monkeypatch):
    """However many trials, each file is decoded a fixed number of times."""
    reads = []
    opened = Image.open
    monkeypatch.setattr("transferkit.data.samples.Image.open", lambda path: reads.append(path) or opened(path))
    counts = []
    for rates in ([1e-3], [1e-4, 1e-3, 1e-2, 1e-1]):
        reads.clear()
        search(
            {"lr": rates, "freeze_until": ["block5", "head"], "epochs": [1]}, ImageFolder(folder), validation_split=0.4
        )
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0


def test_the_backbone_is_never_changed(search, data, make_backbone):
    """The user's backbone keeps weights, what is frozen, modes and gradients, whatever is trained."""
    search.backbone.train()
    before = {name: value.clone() for name, value in search.backbone.state_dict().items()}
    search({"lr": [0.1], "freeze_until": [None, "block3", "head"], "epochs": [2]}, data, validation_data=data)
    assert differences(before, search.backbone.state_dict()) == []
    assert all(parameter.requires_grad for parameter in search.backbone.parameters())
    assert all(parameter.grad is None for parameter in search.backbone.parameters())
    assert all(module.training and "train" not in vars(module) for module in search.backbone.modules())


def test_one_model_for_all_trials_is_no_trap(search, data):
    """A build that returns one and the same model each time gives every trial a fresh copy of it."""
    model = search.build()
    space = {"lr": [1e-2, 1e-2], "freeze_until": ["block5"], "epochs": [2]}
    result = search(space, data, build=lambda: model, validation_data=data)
    assert figures(result.trials[0].history) == figures(result.trials[1].history)
    assert result.best_model_ is not model


def test_random_generators_are_left_alone(search, folder):
    """No generator is drawn from, though heads are drawn and images augmented."""

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002

    before = states()
    space = {
        "lr": lambda generator: generator.choice([1e-3, 1e-2]),
        "hidden": [(4,)],
        "augment": ["flip"],
        "epochs": [1],
    }
    search(space, ImageFolder(folder), validation_split=0.4, num_trials=2)
    assert states() == before


def test_a_cache_folder_is_used(search, data, tmp_path, images_seen):
    """With a cache folder a second search computes nothing."""
    space = {"lr": [1e-2], "freeze_until": ["block5", "head"], "epochs": [1]}
    search(space, data, validation_data=data, cache=tmp_path / "cache")
    images_seen.clear()
    search(space, data, validation_data=data, cache=tmp_path / "cache")
    assert images_seen == []


# ---- trials that share their work


def rounded(history):
    """The figures of a history, as far as rounding leaves them."""
    return {name: pytest.approx(values, rel=1e-4, abs=1e-5) for name, values in figures(history).items()}


@pytest.fixture
def alone(monkeypatch):
    """The runs that `Trainer.fit` made."""
    runs = []
    fit = tk.Trainer.fit

    def noted(self, *given, **arguments):
        runs.append(arguments)
        return fit(self, *given, **arguments)

    monkeypatch.setattr(tk.Trainer, "fit", noted)
    return runs


TOGETHER = {
    "linear": {},
    "hidden": {"head": {"hidden": (8, 6), "dropout": 0.5}},
    "dropped features": {"head": {"dropout": 0.5}, "trainer": {"optimizer": "adamw"}},
    "flat": {"head": {"hidden": (8,), "pooling": "flatten"}, "trainer": {"optimizer": "sgd"}},
    "without momentum": {"trainer": {"optimizer": torch.optim.SGD}},
    "augmented": {"fit": {"augment": ["flip"]}, "trainer": {"optimizer": "rmsprop"}},
    "views": {"fit": {"augment": ["flip"], "n_views": 2}, "trainer": {"loss": tk.CrossEntropy(label_smoothing=0.1)}},
    "weighed": {"trainer": {"loss": tk.CrossEntropy(class_weights="balanced")}},
}


@pytest.mark.parametrize("case", TOGETHER)
def test_heads_trained_together_are_those_trained_alone(search, data, alone, case):
    """Heads of many rates, decays, schedules, limits and lengths, in one pass: each is a fit by hand, to rounding."""
    head, trainer, fit = (TOGETHER[case].get(part, {}) for part in ("head", "trainer", "fit"))
    own = [
        {"lr": 1e-2, "weight_decay": 0.0, "schedule": "auto", "clip_grad_norm": 1.0, "epochs": 3},
        {"lr": 3e-3, "weight_decay": 0.1, "schedule": "constant", "clip_grad_norm": 0.01, "epochs": 2},
        {"lr": 1e-3, "weight_decay": 0.0, "schedule": "one_cycle", "clip_grad_norm": None, "epochs": 4},
    ]
    draws = {name: iter([params[name] for params in own]) for name in own[0]}
    space = {name: (lambda _, name=name: next(draws[name])) for name in own[0]}
    shared = {name: [value] for name, value in {**head, **trainer, **fit, "batch_size": 7}.items()}
    validation = (255 - data[0][:9], data[1][:9])
    result = search({**space, **shared, "freeze_until": ["head"]}, data, validation_data=validation, num_trials=3)
    assert alone == []
    for params, trial in zip(own, result.trials, strict=True):
        epochs = params.pop("epochs")
        given = {"validation_data": validation, "batch_size": 7, "epochs": epochs, **fit}
        model, history = by_hand(search.build, data, head=head, fit=given, **trainer, **params)
        assert figures(trial.history) == rounded(history)
        if trial is result.trials[result.best_index_]:
            for name, value in model.state_dict().items():
                assert torch.allclose(result.best_model_.state_dict()[name], value, rtol=1e-3, atol=1e-5), name
            assert not any(module.training for module in result.best_model_.modules())


@pytest.mark.parametrize(
    "params",
    [{"freeze_until": ["block5"]}, {"metrics": [{"f1": lambda *_: 0.5}]}, {"max_skipped": [1]}, {"batch_size": [4, 8]},
     {"dropout": [0.1, 0.2]}, {"optimizer": [torch.optim.Adagrad]}],
)  # fmt: skip
def test_what_cannot_be_trained_together_is_trained_alone(search, data, alone, params):
    """Deeper layers, metrics, skipped steps, other batches or layers, and an optimizer that nobody looked at."""
    rates = [1e-3] if len(next(iter(params.values()))) > 1 else [1e-3, 1e-2]
    search({"freeze_until": ["head"], "lr": rates, "epochs": [1], **params}, data, validation_data=data)
    assert len(alone) == 2


def test_a_head_of_ones_own_is_trained_alone(search, data, alone):
    """What attach_head did not build, or somebody changed since, and what has hooks or is behind a layer with hooks."""

    class Own(torch.nn.Sequential):
        pass

    def hooked(name):
        model = copy.deepcopy(search.build())
        model.get_submodule(name).register_forward_hook(lambda *_: None)
        return model

    def changed(change):
        model = search.build(hidden=(4,))
        change(model.head)
        return model

    def replaced():
        model = search.build()
        model.head = Own(*model.head)
        return model

    builds = [
        partial(search.build, head=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(3))),
        replaced,
        partial(changed, lambda head: setattr(head, "relu1", torch.nn.GELU())),
        partial(changed, lambda head: head.fc1.requires_grad_(requires_grad=False)),
        partial(hooked, "head.logits"),
        partial(hooked, "backbone.features.0"),
    ]
    search.backbone.requires_grad_(requires_grad=False)  # not by the space, which would thaw the whole head
    for number, build in enumerate(builds, start=1):
        search({"lr": [1e-3, 1e-2], "epochs": [1]}, data, build=build, validation_data=data)
        assert len(alone) == 2 * number


def test_heads_whose_gradients_are_scaled_train_alone(search, data, alone, half_device):
    """In fp16 each has a scale of its own."""
    space = {"lr": [1e-3, 1e-2], "epochs": [1], "freeze_until": ["head"]}
    search(space, data, validation_data=data, device=half_device, precision="auto")
    assert len(alone) == 2


def jumps(logits, targets):
    """A loss that is infinite where its gradient is not."""
    far = logits.detach().abs().max() > 5
    return torch.nn.functional.cross_entropy(logits, targets) + torch.where(far, torch.inf, 0.0)


@pytest.mark.parametrize(("rates", "loss"), [([1e-2, 1e38, 1e-3], None), ([1e-3, 1.0, 1e-4], jumps)])
def test_a_head_that_diverges_does_not_touch_the_others(search, data, alone, rates, loss):
    """It is trained alone, which finds the reason; those trained with it are as they would be without it."""
    space = {"lr": rates, "freeze_until": ["head"], "optimizer": ["sgd"], "loss": [loss], "epochs": [3]}
    result = search({**space, "batch_size": [8]}, data, validation_data=data)
    assert len(alone) == 1
    assert "is infinite, NaN or too large, first in" in result.trials[1].error
    for trial in (result.trials[0], result.trials[2]):
        fit = {"epochs": 3, "batch_size": 8, "validation_data": data}
        _, history = by_hand(search.build, data, lr=trial.params["lr"], optimizer="sgd", loss=loss, fit=fit)
        assert figures(trial.history) == rounded(history)


def test_without_memory_for_many_heads_each_is_trained_alone(search, data, alone, monkeypatch):
    """The result is the same."""
    space = {"lr": [1e-3, 1e-2], "freeze_until": ["head"], "epochs": [2]}
    together = search(space, data, validation_data=data)
    assert alone == []

    def refuses(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("transferkit.training.heads._Stack.step", refuses)
    result = search(space, data, validation_data=data)
    assert len(alone) == 2
    for one, other in zip(together.trials, result.trials, strict=True):
        assert figures(one.history) == rounded(other.history)


@pytest.mark.parametrize("frozen", ["head", "block5"])
def test_the_longest_run_answers_the_shorter_ones(search, data, images_seen, alone, frozen):
    """At a constant rate a run of three epochs is the first half of one of six: weights, history and score."""
    validation = (data[0], (data[1] + 1) % 3)  # the more is learnt, the worse
    space = {"lr": [3e-2], "freeze_until": [frozen], "epochs": [2, 6, 1], "schedule": ["constant"]}
    result = search(space, data, validation_data=validation)
    assert len(alone) == 1
    for trial in result.trials:
        fit = {"epochs": trial.params["epochs"], "validation_data": validation}
        model, history = by_hand(search.build, data, frozen=frozen, lr=3e-2, schedule="constant", fit=fit)
        assert figures(trial.history) == figures(history)
        if trial is result.trials[result.best_index_]:
            assert differences(result.best_model_.state_dict(), model.state_dict()) == []
    alone.clear()
    search({**space, "schedule": ["cosine"]}, data, validation_data=validation)
    assert len(alone) == (0 if frozen == "head" else 3)  # other epochs are another schedule


# ---- successive halving, time, a folder


def test_halving_gives_the_best_more_epochs(search, data):
    """Nine sets with one epoch, the best three with three, the best of them with nine."""
    rates = [10**-power for power in (4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 6.0, 5.0, 7.0)]
    space = {"lr": rates, "epochs": [10], "freeze_until": ["head"], "hidden": [(4,)]}
    result = search(space, data, validation_data=data, reduction_factor=3)
    epochs = [trial.params["epochs"] for trial in result.trials]
    assert epochs == [1] * 9 + [3] * 3 + [10]
    scores = [trial.score for trial in result.trials]
    best = sorted(range(9), key=lambda number: (-scores[number], number))[:3]
    assert [trial.params["lr"] for trial in result.trials[9:12]] == [rates[number] for number in sorted(best)]
    assert scores[12] >= 0
    assert result.trials[12].params["lr"] == result.trials[9 + scores[9:12].index(max(scores[9:12]))].params["lr"]


@pytest.mark.parametrize(("factor", "message"), [(1, "reduction_factor=1"), (2.5, r"reduction_factor=2\.5")])
def test_impossible_halving_is_refused(search, data, factor, message):
    """A factor below 2, and sets that differ in epochs themselves."""
    with pytest.raises(ArgumentError, match=message):
        search({"lr": [1e-3]}, data, validation_data=data, reduction_factor=factor)
    with pytest.raises(ArgumentError, match=r"space\['epochs'\] has the values \[2, 4\]: .* expected one"):
        search({"lr": [1e-3], "epochs": [2, 4]}, data, validation_data=data, reduction_factor=2)


def test_no_trial_begins_when_the_time_is_over(search, data, alone):
    """The result has those that began; a budget that is no number of seconds is refused."""
    space = {"lr": [1e-3, 1e-2, 1e-1], "freeze_until": ["block5"], "epochs": [1]}
    result = search(space, data, validation_data=data, budget=1e-9)
    assert (result.trials, result.best_model_, alone) == ([], None, [])
    assert result.cv_results_["params"] == []
    with pytest.raises(NonFiniteError, match="every one of 0 trials failed"):
        result.best_params_  # noqa: B018
    assert len(search(space, data, validation_data=data, budget=1000).trials) == 3
    with pytest.raises(ArgumentError, match="budget=-1"):
        search(space, data, validation_data=data, budget=-1)


def test_any_error_of_a_trial_is_recorded(search, data):
    """A head that raises is a failed trial; if none succeeds, the search raises what it raised."""

    class Failing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits, self.calls = torch.nn.LazyLinear(3), 0

        def forward(self, features):
            if self.training and self.calls > 2:
                raise KeyError("broken layer")
            self.calls += 1
            return self.logits(features.flatten(1))

    def build(own):
        return search.build(head=Failing()) if own else search.build()

    space = {"own": [True, False], "freeze_until": ["head"], "batch_size": [4]}
    result = search(space, data, build=build, validation_data=data)
    assert [trial.error for trial in result.trials] == ["KeyError: 'broken layer'", ""]
    with pytest.raises(KeyError, match="broken layer"):
        search({**space, "own": [True]}, data, build=build, validation_data=data)


@pytest.mark.parametrize("ended", [1, 5])
def test_a_search_goes_on_where_it_was_killed(search, data, tmp_path, monkeypatch, ended):
    """Whatever run it was in, a second call makes what is missing, and table and model are those of one call."""
    space = {
        "freeze_until": ["block5", "head"], "lr": [1e-3, 1e-2], "epochs": [2, 3], "schedule": ["constant"],
        "batch_size": [8, 12],
    }  # fmt: skip
    whole = search(space, data, validation_data=data)
    begun = []
    for name in ("_train", "_train_together"):
        made = getattr(sys.modules["transferkit.searching"]._Trials, name)

        def noted(self, *given, made=made):
            begun.append(given)
            if len(begun) == ended:
                raise KeyboardInterrupt
            made(self, *given)

        monkeypatch.setattr(sys.modules["transferkit.searching"]._Trials, name, noted)
    with pytest.raises(KeyboardInterrupt):
        search(space, data, validation_data=data, folder=tmp_path / "runs")
    result = search(space, data, validation_data=data, folder=tmp_path / "runs")
    assert len(begun) == 6 + 1  # four runs of block 5 and two passes over heads; the one that was ended twice
    assert [trial.params for trial in result.trials] == [trial.params for trial in whole.trials]
    assert [figures(trial.history) for trial in result.trials] == [figures(trial.history) for trial in whole.trials]
    assert result.best_index_ == whole.best_index_
    assert differences(result.best_model_.state_dict(), whole.best_model_.state_dict()) == []
    again = search(space, data, validation_data=data, folder=tmp_path / "runs")
    assert len(begun) == 7
    assert again.cv_results_ == result.cv_results_
    assert differences(again.best_model_.state_dict(), whole.best_model_.state_dict()) == []


def test_a_folder_of_another_search_is_refused(search, data, tmp_path, make_backbone):
    """Other values, images, labels, seed, backbone or head, and a damaged table."""
    space = {"lr": [1e-3], "freeze_until": ["head"], "epochs": [1]}
    given = {"validation_data": data, "folder": tmp_path}
    search(space, data, **given)
    message = "holds another search: expected the same models, space, data, seed and device"
    for train, other, changes in [
        (data, {"lr": [1e-2]}, {}),
        (data, {}, {"seed": 1}),
        ((data[0], (data[1] + 1) % 3), {}, {}),
        (data, {}, {"validation_data": (255 - data[0], data[1])}),
        (data, {}, {"build": lambda: tk.attach_head(make_backbone(seed=1), CLASSES)}),
        (data, {}, {"build": lambda: search.build(hidden=(4,))}),
    ]:
        with pytest.raises(ArgumentError, match=message):
            search({**space, **other}, train, **{**given, **changes})
    (tmp_path / "search.pt").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*search\.pt"):
        search(space, data, **given)


# ---- which is best


def made(scores):
    reports = [EpochReport(0, 1.0, 0.5, 1e-3, 1.0, 1.0, 0.5)]
    return [
        Trial({"lr": lr}, History([] if math.isnan(score) else reports), score, 1.5, "bad" if math.isnan(score) else "")
        for lr, score in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("scores", "best"), [([0.5, 0.9, 0.9], 1), ([math.nan, 0.1, math.nan], 1), ([0.0, 0.0], 0), ([0.2, math.nan], 0)]
)
def test_the_best_is_the_first_of_the_highest(scores, best):
    """Ties go to the first; failed trials never win, not even against 0."""
    result = SearchResult(made(scores), None)
    assert result.best_index_ == best
    assert result.best_params_ == {"lr": best}
    assert result.best_score_ == scores[best]


def test_with_ties_the_model_is_that_of_the_best_parameters(search, data):
    """Where a deeper trial stands first in the grid and a shallower one, run before it, is as good."""
    space = {"freeze_until": ["head", "block5"], "lr": [1e-30]}
    result = search(space, data, validation_data=data)
    assert result.trials[0].score == result.trials[1].score
    assert result.best_index_ == 0
    assert first_trainable(result.best_model_) == first_trainable(tk.freeze_until(search.build(), "head"))


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("batch_size", [8, 24])
def test_a_trial_that_diverges_has_failed(search, data, epochs, batch_size):
    """Its score is NaN and its error says why, also where only validation shows it; the others go on."""
    space = {"lr": [1e30, 1e-2], "freeze_until": ["block5"], "epochs": [epochs], "batch_size": [batch_size],
             "optimizer": ["sgd"]}  # fmt: skip
    result = search(space, data, validation_data=data)
    assert math.isnan(result.trials[0].score)
    assert "finite" in result.trials[0].error
    assert result.trials[1].error == ""
    assert result.best_index_ == 1
    assert "failed" in result._repr_html_()
    assert str(result).splitlines()[-1].count("failed: ") == 1
    assert str(result).splitlines()[-1].split("failed: ")[1].count("finite")
    assert result.best_model_ is not None


def test_all_trials_may_fail(search, data):
    """Then there is no best, the error says why, and the table shows itself."""
    space = {"lr": [1e30, 1e35], "freeze_until": ["block5"], "optimizer": ["sgd"], "batch_size": [8]}
    result = search(space, data, validation_data=data)
    for name in ("best_index_", "best_params_", "best_score_"):
        with pytest.raises(NonFiniteError, match=r"every one of 2 trials failed; the first: .*finite|infinite"):
            getattr(result, name)
    assert result.best_model_ is None
    assert len(result.cv_results_["score"]) == 2
    assert result._repr_html_().count("failed") == 2
    assert len(repr(result).splitlines()) == 2


def test_memory_that_does_not_suffice_is_a_failed_trial(search, data, monkeypatch):
    """A trial that does not fit has failed with that error."""
    fit = tk.Trainer.fit

    def failing(self, *given, **arguments):
        if arguments["batch_size"] == 16:
            raise tk.errors.OutOfMemoryError("memory does not suffice")
        return fit(self, *given, **arguments)

    monkeypatch.setattr(tk.Trainer, "fit", failing)
    result = search({"batch_size": [16, 8], "lr": [1e-2]}, data, validation_data=data)
    assert result.trials[0].error == "memory does not suffice"
    assert result.best_index_ == 1


def test_the_table_has_columns_of_equal_length(search, data):
    """One entry for each trial in every column, in their order."""
    result = search({"lr": [1e-3, 1e-2], "batch_size": [8, 24], "epochs": [1]}, data, validation_data=data)
    table = result.cv_results_
    assert set(table) == {"params", "param_lr", "param_batch_size", "param_epochs", "score", "seconds", "error"}
    assert {len(column) for column in table.values()} == {4}
    assert table["param_lr"] == [1e-3, 1e-3, 1e-2, 1e-2]
    assert table["param_batch_size"] == [8, 24, 8, 24]
    assert table["params"] == [trial.params for trial in result.trials]
    assert all(seconds > 0 for seconds in table["seconds"])


def test_html_is_escaped():
    """Names and values of the user's show as they are; the best comes first."""
    trials = [
        Trial({"<b>": "a & b"}, History(), 0.25, 1.0),
        Trial({"<b>": "<script>"}, History(), math.nan, 1.0, "<i>"),
        Trial({"<b>": "x"}, History(), 0.75, 1.0),
    ]
    table = SearchResult(trials, None)._repr_html_()
    assert "<th>&lt;b&gt;</th>" in table
    assert "<td>&lt;script&gt;</td><td>failed</td>" in table
    assert "<td>a &amp; b</td><td>0.2500</td>" in table
    assert "<b>" not in table
    assert "<script>" not in table
    assert table.index("0.7500") < table.index("0.2500") < table.index("failed")


# ---- what ends it


def test_an_interruption_ends_the_search(search, data, monkeypatch):
    """Ctrl-C in the second of three trials comes out as KeyboardInterrupt; no third is begun."""
    begun = []
    fit = tk.Trainer.fit

    def noted(self, *given, **arguments):
        begun.append(self)
        if len(begun) == 2:
            layer = self.model.head[-1] if hasattr(self.model.head, "__getitem__") else self.model.head
            layer.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT) if not sent else None)
            layer.register_forward_pre_hook(lambda *_: sent.append(1))
        return fit(self, *given, **arguments)

    sent = []
    monkeypatch.setattr(tk.Trainer, "fit", noted)
    with pytest.raises(KeyboardInterrupt):
        search({"lr": [1e-3, 1e-2, 1e-1], "epochs": [5]}, data, validation_data=data)
    assert len(begun) == 2


class Broken(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 2:
            raise OSError("broken file")
        return torch.zeros(3, 32, 32, dtype=torch.uint8), index


def test_other_errors_end_the_search(search, data):
    """Data that cannot be read and arguments that cannot be used are no failed trials."""
    with pytest.raises(TransferKitError, match="cannot read image 2"):
        search({"lr": [1e-3]}, Broken(), validation_data=data)
    with pytest.raises(ArgumentError, match="lr=-1"):
        search({"lr": [1e-3, -1]}, data, validation_data=data)
    with pytest.raises(CacheError, match="augment"):
        search({"augment": ["flip"], "freeze_until": ["head"]}, data, validation_data=data, cache=True)


# ---- what is refused


@pytest.mark.parametrize(
    ("space", "arguments", "message"),
    [
        ({}, {}, r"space=\{\} cannot be used: expected a mapping from names to lists"),
        ([("lr", [1])], {}, r"space=\[\('lr', \[1\]\)\] cannot be used: expected a mapping"),
        (None, {}, "space=None cannot be used"),
        ({"lr": []}, {}, r"space\['lr'\]=\[\] cannot be used: expected a list of 1 value or more"),
        ({"lr": 1e-3}, {}, r"space\['lr'\]=0\.001 cannot be used: expected a list"),
        ({"freeze_until": "head"}, {}, r"space\['freeze_until'\]='head' cannot be used: expected a list"),
        ({"lr": {1e-3}}, {}, r"space\['lr'\]=\{0\.001\} cannot be used: expected a list"),
        ({"lr": {"head": 1e-3}}, {}, r"space\['lr'\]=\{'head': 0\.001\} cannot be used: expected a list"),
        ({"lr": np.array([1e-3])}, {}, r"space\['lr'\]=array\(\[0\.001\]\).*list\(\.\.\.\) for an array"),
        ({"lr": iter([1e-3])}, {}, r"space\['lr'\]=<.*expected a list"),
        ({"lr": lambda _: 1e-3}, {}, r"space\['lr'\] is a function that draws values: pass num_trials=, how many"),
        ({"lr": [1e-3]}, {"num_trials": 0}, "num_trials=0"),
        ({"lr": [1e-3]}, {"num_trials": 1.5}, r"num_trials=1\.5"),
        ({"seed": [1, 2]}, {}, "seed is an argument of search and the same in all trials: leave it out of space"),
        ({"device": ["cpu"]}, {}, "device is an argument of search"),
        ({"lr": [1e-3]}, {"seed": -1}, "seed=-1"),
        ({"lr": [1e-3]}, {"verbose": 7}, "verbose=7 is not known"),
        ({"lr": [1e-3]}, {"validation_data": None}, "compared on validation data: pass validation_data or valid"),
        ({"lr": [1e-3]}, {"validation_split": 0.5}, "validation_data and validation_split are both given"),
    ],
)
def test_impossible_spaces_are_refused(search, data, images_seen, space, arguments, message):
    """What makes no space, and other arguments out of range, are refused before anything is computed."""
    with pytest.raises(ArgumentError, match=message):
        search(space, data, **{"validation_data": data, **arguments})
    assert images_seen == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("batchsize", "batchsize: Did you mean 'batch_size'"),
        ("learning_rate", "build cannot be called with"),
        ("freeze", "freeze: Did you mean 'freeze_until'"),
        ("optimiser", "optimiser: Did you mean 'optimizer'"),
        ("epoch", "epoch: Did you mean 'epochs'"),
        ("num_workers", "build cannot be called with"),
    ],
)
def test_unknown_names_are_refused_before_any_trial(search, data, images_seen, name, hint):
    """A name that neither Trainer nor fit nor build takes is refused with what was perhaps meant."""

    def build(hidden=()):
        return search.build(hidden=hidden)

    with pytest.raises(ArgumentError, match="got an unexpected keyword argument") as caught:
        search({"lr": [1e-3], name: [1]}, data, build=build, validation_data=data)
    assert hint in str(caught.value)
    assert images_seen == []


def test_builds_that_cannot_be_used_are_refused(search, data):
    """A build that needs more names, none at all, and one that returns something else."""
    with pytest.raises(ArgumentError, match="missing a required argument: 'hidden'"):
        search({"lr": [1e-3]}, data, build=lambda hidden: search.build(hidden=hidden), validation_data=data)
    with pytest.raises(ArgumentError, match="build is a int: expected a function"):
        search({"lr": [1e-3]}, data, build=5, validation_data=data)
    with pytest.raises(ArgumentError, match="build returned a Backbone: expected a TransferModel from attach_head"):
        search({"lr": [1e-3]}, data, build=lambda: search.backbone, validation_data=data)


def test_a_type_error_inside_build_is_its_own(search, data):
    """What is wrong inside of build is not taken for a wrong call."""

    def build():
        raise TypeError("inside")

    with pytest.raises(TypeError, match="inside"):
        search({"lr": [1e-3]}, data, build=build, validation_data=data)


def test_unknown_layers_are_refused_before_any_trial(search, data, images_seen):
    """One misspelt layer among others is seen before the first trial runs."""
    with pytest.raises(UnknownLayerError, match="blok5"):
        search({"freeze_until": ["block4", "blok5"]}, data, validation_data=data)
    assert images_seen == []


def test_other_classes_to_validate_on_are_refused(search, make_backbone, folder, tmp_path):
    """As fit refuses folders that are called differently, though images are read into memory before."""
    for name, other in zip(CLASSES, ("ant", "bee", "cow"), strict=True):
        shutil.copytree(folder / name, tmp_path / "other" / other)
    with pytest.raises(HeadMismatchError, match=r"ant, bee, cow.*cat, dog, owl"):
        search(
            {"lr": [1e-3]},
            ImageFolder(folder),
            build=lambda: tk.attach_head(make_backbone(), 3),
            validation_data=ImageFolder(tmp_path / "other"),
        )


def test_a_loader_serves(search, data):
    """A DataLoader is used as it is: a trial is a fit by hand."""
    loader = DataLoader(TensorDataset(*data), batch_size=8)
    result = search({"lr": [1e-2], "freeze_until": ["head"]}, loader, validation_data=loader)
    _, history = by_hand(search.build, loader, lr=1e-2, fit={"validation_data": loader})
    assert figures(result.trials[0].history) == figures(history)


# ---- sharing features


@pytest.fixture
def trainers(make_backbone):
    """A maker of trainers over equal models."""

    def make(*, frozen="head", weights=0, **arguments):
        model = tk.freeze_until(tk.attach_head(make_backbone(seed=weights), CLASSES), frozen)
        return tk.Trainer(model, **{"device": "cpu", "precision": "fp32", **arguments})

    return make


def test_shared_features_are_not_computed_again(trainers, data, images_seen):
    """What one computed serves the other, both ways, and what the other adds serves the first."""
    one, other = trainers(), trainers()
    other.share_features(one)
    one.fit(data, verbose=0, epochs=1)
    other.fit(data, verbose=0, epochs=1)
    more = (255 - data[0], data[1])
    other.fit(more, verbose=0, epochs=1)
    assert sum(count for count, _ in images_seen) == 48
    one.fit(more, verbose=0, epochs=1)
    assert sum(count for count, _ in images_seen) == 48


@pytest.mark.parametrize(
    "arguments", [{"precision": "bf16"}, {"weights": 1}, {"frozen": "block5"}, {"frozen": "block3"}]
)
def test_shared_features_never_mix(trainers, data, arguments):
    """Trainers in another number format, with other weights, at another depth share nothing but what is right."""
    targets = (data[1] * 2) % 3
    alone = trainers(**arguments).fit((data[0], targets), epochs=2, verbose=0)
    one, other = trainers(), trainers(**arguments)
    one.fit(data, verbose=0, epochs=1)
    other.share_features(one)
    assert figures(other.fit((data[0], targets), epochs=2, verbose=0)) == figures(alone)
    one.fit(data, verbose=0, epochs=1)


def test_shared_features_take_the_targets_of_the_data(trainers, data):
    """The same images with other targets train on those targets."""
    other = (data[0], (data[1] + 1) % 3)
    alone = trainers().fit(other, epochs=2, verbose=0)
    one, two = trainers(), trainers()
    one.fit(data, verbose=0, epochs=1)
    two.share_features(one)
    assert figures(two.fit(other, epochs=2, verbose=0)) == figures(alone)


# ---- names of classes


def test_predicted_classes_are_names(trainers, data):
    """predict_classes gives for each image the name at the index that predict gives."""
    trainer = trainers(frozen=None, lr=1e-2)
    trainer.fit(data, epochs=20, batch_size=8, verbose=0)
    names = trainer.predict_classes(data[0])
    assert names == [CLASSES[index] for index in trainer.predict(data[0])]
    assert {type(name) for name in names} == {str}
    assert len(set(names)) > 1
    assert trainer.predict_classes(data[0][0]) == names[:1]
