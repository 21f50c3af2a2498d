"""`search` trains a model for each set of hyper-parameters over one feature cache, and returns the best."""

import copy
import inspect
import itertools
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn

from transferkit.base.arguments import whole_number
from transferkit.base.calls import explained
from transferkit.base.display import Display
from transferkit.base.randomness import derive_seed, seeded
from transferkit.base.surroundings import own_surroundings
from transferkit.compute.device import Device, find_device
from transferkit.data.classes import learn_names
from transferkit.data.preprocessing import Preprocessing
from transferkit.data.resized import resized
from transferkit.errors import ArgumentError, NonFiniteError, OutOfMemoryError, close_matches
from transferkit.model.freezing import find_boundary, freeze_until
from transferkit.model.head import TransferModel
from transferkit.results.history import History
from transferkit.results.tabular import html_table
from transferkit.trainer import Trainer

FREEZE = "freeze_until"
FIT = ("epochs", "batch_size", "augment", "n_views")
FIXED = ("device", "precision", "cache", "seed")
TRAINER = tuple(name for name in inspect.signature(Trainer).parameters if name not in ("model", *FIXED))

Space = Mapping[str, Sequence[Any] | Callable[[random.Random], Any]]


@dataclass(frozen=True, slots=True)
class Trial:
    """One set of hyper-parameters and its result.

    Attributes:
        params: The hyper-parameters.
        history: The history of its run; without epochs if it failed.
        score: Validation accuracy of its best epoch, 0 to 1; NaN if it failed.
        seconds: How long it took.
        error: Why it failed, or an empty string.
    """

    params: dict[str, Any]
    history: History
    score: float
    seconds: float
    error: str = ""


class SearchResult:
    """The trials of a search, and the best of them. Attribute names are scikit-learn's.

    Attributes:
        trials: A `Trial` for each set of hyper-parameters.
        best_model_: The model of the trial at `best_index_`, as after its best epoch; None if every trial failed.
    """

    def __init__(self, trials: list[Trial], best_model: TransferModel | None) -> None:
        self.trials = trials
        self.best_model_ = best_model

    @property
    def best_index_(self) -> int:
        """Index of the trial with the highest score, the first of equal ones.

        Raises:
            NonFiniteError: When every trial failed.
        """
        best = max((trial.score for trial in self.trials if not math.isnan(trial.score)), default=None)
        if best is None:
            raise NonFiniteError(f"every one of {len(self.trials)} trials failed; the first: {self.trials[0].error}")
        return [trial.score for trial in self.trials].index(best)

    @property
    def best_params_(self) -> dict[str, Any]:
        """The hyper-parameters of the best trial."""
        return self.trials[self.best_index_].params

    @property
    def best_score_(self) -> float:
        """Validation accuracy of the best trial, 0 to 1."""
        return self.trials[self.best_index_].score

    @property
    def cv_results_(self) -> dict[str, list[Any]]:
        """A table as lists of equal length.

        They are `params`, `param_...` of each name, `score`, `seconds` and `error`.
        """
        return {
            "params": [trial.params for trial in self.trials],
            **{f"param_{name}": [trial.params[name] for trial in self.trials] for name in self.trials[0].params},
            "score": [trial.score for trial in self.trials],
            "seconds": [trial.seconds for trial in self.trials],
            "error": [trial.error for trial in self.trials],
        }

    def __str__(self) -> str:
        return "\n".join(_line(trial) for trial in self._ranked())

    __repr__ = __str__  # what an interpreter shows

    def _repr_html_(self) -> str:
        rows = [
            [
                *map(str, trial.params.values()),
                "failed" if math.isnan(trial.score) else f"{trial.score:.4f}",
                f"{trial.seconds:.1f}",
            ]
            for trial in self._ranked()
        ]
        return html_table([*self.trials[0].params, "validation accuracy", "seconds"], rows)

    def _ranked(self) -> list[Trial]:
        return sorted(
            self.trials, key=lambda trial: -math.inf if math.isnan(trial.score) else trial.score, reverse=True
        )


@explained
@own_surroundings()
def search(
    build: Callable[..., TransferModel],
    space: Space,
    train: object,
    *,
    validation_data: object = None,
    validation_split: float | None = None,
    num_trials: int | None = None,
    device: str | torch.device | Device = "auto",
    precision: str = "auto",
    cache: bool | str | PathLike[str] = "auto",
    num_workers: int = 0,
    seed: int = 0,
    verbose: int = 1,
) -> SearchResult:
    """Train a model for each set of hyper-parameters and compare them by validation accuracy.

    All trials share one feature cache: the frozen layers run once for each image. Every trial begins with the same
    random numbers. A trial whose loss becomes infinite, or that does not fit into memory, is recorded as failed and the
    search continues.

    Args:
        build: Returns a model from `attach_head`. It is called with those names of `space` that neither `Trainer` nor
            `fit` takes. Its result is copied, so it may use the same backbone each time.
        space: A list of values for each hyper-parameter: `lr`, `epochs`, `batch_size`, `freeze_until` (without it,
            layers stay frozen as `build` returns them), any other argument of `Trainer`, `augment` and `n_views` of
            `fit`, and whatever `build` takes. With `num_trials`, also functions of a `random.Random` that draw a value.
        train: As in `Trainer.fit`. A `Dataset` without randomness is read once: its resized images stay in memory if
            they take at most a quarter of what is free.
        validation_data: As in `Trainer.fit`.
        validation_split: As in `Trainer.fit`; the same images in every trial.
        num_trials: Number of sets to draw at random; None tries every combination.
        device: As in `Trainer`.
        precision: As in `Trainer`.
        cache: As in `Trainer`.
        num_workers: Processes that read a `Dataset`.
        seed: Everything random depends on it: draws, the head's initial weights, the order of images.
        verbose: 1 shows a line for each trial, and a bar where it can be seen; 2 the lines alone; 0 nothing.

    Raises:
        ArgumentError: When the space is empty or cannot be used, there is no validation data, or `build` takes other
            names.
        TransferKitError: As in `Trainer` and `Trainer.fit`, at the first trial they refuse.

    Example:
        >>> from transferkit import attach_head, load_backbone
        >>> images, targets = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 2
        >>> backbone = load_backbone("vgg11", weights=None, image_size=32)
        >>> result = search(
        ...     lambda hidden: attach_head(backbone, ["cat", "dog"], hidden=hidden),
        ...     {"lr": [1e-3, 1e-2], "freeze_until": ["head"], "hidden": [(), (8,)]},
        ...     (images, targets),
        ...     validation_data=(images, targets),
        ...     verbose=0,
        ... )
        >>> len(result.trials), sorted(result.best_params_)
        (4, ['freeze_until', 'hidden', 'lr'])

    References:
        Bergstra and Bengio, 2012, "Random Search for Hyper-Parameter Optimization", JMLR 13.
    """
    if validation_data is None and validation_split is None:
        raise ArgumentError("trials are compared on validation data: pass validation_data or validation_split.")
    if isinstance(build, nn.Module) or not callable(build):
        raise ArgumentError(
            f"build is a {type(build).__name__}: expected a function that makes a new model for each trial, such as "
            "lambda: attach_head(backbone, classes)."
        )
    display, seed = Display(verbose), whole_number("seed", seed, at_least=0)
    sets = _choose(space, num_trials, seed)
    place = find_device(device, precision)
    first = _build(build, sets[0], seed)
    order = sorted(range(len(sets)), key=lambda number: _depth(first, sets[number]))
    data: dict[Preprocessing, tuple[object, object]] = {}  # training and validation data
    trials: dict[int, Trial] = {}
    best, best_model, features = (-1.0, 0), None, None
    with display.bar("search", len(sets), unit="trials") as bar:
        for number in order:  # from shallow to deep: features of deeper boundaries are derived from those before
            params = sets[number]
            model = _build(build, params, seed)
            model.classes = learn_names(train, model.classes)  # the images in memory have no names
            if (preprocess := model.backbone.preprocess) not in data:
                data[preprocess] = (
                    _read(train, model, place, num_workers),
                    _read(validation_data, model, place, num_workers),
                )
            trainer = _trainer(model, params, features, device=place, cache=cache, seed=seed)
            features = trainer
            trials[number] = trial = _try(
                trainer, params, *data[preprocess], validation_split=validation_split, num_workers=num_workers
            )
            if (rank := (trial.score, -number)) > best:  # of equal ones the first, as in best_index_; never NaN
                best, best_model = rank, model
            later = [other.seconds for other in trials.values()][1:]  # the first trial computed features for all
            left = f"  {(len(sets) - len(trials)) * sum(later) / len(later):.0f} s left" if later else ""
            display.say(f"trial {len(trials)} of {len(sets)}  {_line(trial)}{left}")
            bar.advance(1)
    return SearchResult([trials[number] for number in range(len(sets))], best_model)


def _read(data: object, model: TransferModel, device: Device, num_workers: int) -> object:
    if data is None:
        return None
    return resized(data, model.classes, model.backbone.preprocess, device=device, num_workers=num_workers) or data


def _trainer(model: TransferModel, params: Mapping[str, Any], features: Trainer | None, **fixed: Any) -> Trainer:
    if FREEZE in params:
        freeze_until(model, params[FREEZE])
    trainer = Trainer(model, **fixed, **{name: value for name, value in params.items() if name in TRAINER})
    if features is not None:
        trainer.share_features(features)
    return trainer


def _try(trainer: Trainer, params: dict[str, Any], train: object, validation_data: object, **fixed: Any) -> Trial:
    started = time.perf_counter()
    history, error = History(), ""
    own = {name: value for name, value in params.items() if name in FIT}
    try:
        history = trainer.fit(train, validation_data=validation_data, verbose=0, **fixed, **own)
    except (NonFiniteError, OutOfMemoryError) as failure:
        error = str(failure)
    score = _score(history)
    if math.isnan(score) and not error:
        error = "validation loss was never finite: try a lower learning rate."
    return Trial(params, history, score, time.perf_counter() - started, error)


def _choose(space: Space, num_trials: int | None, seed: int) -> list[dict[str, Any]]:
    """Return the sets of hyper-parameters to try."""
    if not isinstance(space, Mapping) or not space:
        raise ArgumentError(
            f"space={space!r} cannot be used: expected a mapping from names to lists of values, such as "
            '{"lr": [1e-4, 1e-3], "freeze_until": ["block5", "head"]}.'
        )
    for name, values in space.items():
        if name in FIXED:
            raise ArgumentError(f"{name} is an argument of search and the same in all trials: leave it out of space.")
        if callable(values):
            if num_trials is None:
                raise ArgumentError(f"space[{name!r}] is a function, which draws values: say how many, num_trials=.")
        elif isinstance(values, str) or not isinstance(values, Sequence) or len(values) == 0:
            raise ArgumentError(
                f"space[{name!r}]={values!r} cannot be used: expected a list of 1 value or more (list(...) makes "
                "one of an array), or with num_trials a function of a random.Random."
            )
    if num_trials is None:
        lists = [values for values in space.values() if not callable(values)]
        return [dict(zip(space, combination, strict=True)) for combination in itertools.product(*lists)]
    generator = random.Random(derive_seed(seed, "search"))  # noqa: S311 - nothing secret
    return [
        {name: values(generator) if callable(values) else generator.choice(values) for name, values in space.items()}
        for _ in range(whole_number("num_trials", num_trials))
    ]


def _build(build: Callable[..., TransferModel], params: dict[str, Any], seed: int) -> TransferModel:
    own = {name: value for name, value in params.items() if name not in (FREEZE, *FIT, *TRAINER)}
    try:
        inspect.signature(build).bind(**own)
    except TypeError as error:
        refused = [name for name in own if repr(name) in str(error)]
        hints = "".join(f" {name}: {close_matches(name, (FREEZE, *FIT, *TRAINER))}" for name in refused)
        raise ArgumentError(
            f"build cannot be called with {sorted(own)}: {error}. It is given those names of space that are neither "
            f"arguments of Trainer nor {', '.join((FREEZE, *FIT))}.{hints}"
        ) from None
    with seeded(derive_seed(seed, "head")):
        model = build(**own)
    if not isinstance(model, TransferModel):
        raise ArgumentError(f"build returned a {type(model).__name__}: expected a TransferModel from attach_head.")
    return copy.deepcopy(model)


def _depth(model: TransferModel, params: Mapping[str, Any]) -> int:
    boundary = find_boundary(model, params.get(FREEZE))
    return -1 if boundary is None else [name for name, _ in model.named_modules()].index(boundary)


def _score(history: History) -> float:
    best = history.best_epoch
    accuracy = None if best is None else history.reports[best].val_accuracy
    return math.nan if accuracy is None else accuracy


def _line(trial: Trial) -> str:
    params = "  ".join(f"{name}={value}" for name, value in trial.params.items())
    score = "failed: " + trial.error if math.isnan(trial.score) else f"val_accuracy {trial.score:.4f}"
    return f"{params}  {score}  {trial.seconds:.1f} s"
