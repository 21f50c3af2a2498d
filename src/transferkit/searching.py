"""`search` trains a model for each set of hyperparameters over one feature cache, and returns the best."""

import copy
import inspect
import itertools
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transferkit.base.arguments import positive, whole_number
from transferkit.base.calls import explained
from transferkit.base.display import Display
from transferkit.base.processes import alone, broadcast, clock, exchange, together, world_size
from transferkit.base.processes import rank as rank_of_process
from transferkit.base.randomness import derive_seed, seeded
from transferkit.base.surroundings import own_surroundings
from transferkit.compute.device import Device, find_device
from transferkit.compute.out_of_memory import is_out_of_memory
from transferkit.data.classes import learn_names
from transferkit.data.resized import resized
from transferkit.data.selection import split_validation
from transferkit.data.sources import Source
from transferkit.errors import ArgumentError, NonFiniteError, OutOfMemoryError, TransferKitError, close_matches
from transferkit.model.freezing import find_boundary, freeze_until, trainable_state
from transferkit.model.head import TransferModel
from transferkit.results.history import History
from transferkit.results.tabular import html_table
from transferkit.saving.archive import read_checkpoint, write_checkpoint
from transferkit.trainer import Trainer
from transferkit.training.heads import HeadRun, how_many_together, train_heads
from transferkit.training.progress import report_of
from transferkit.training.run import open_feed, open_run, open_source, without_loader
from transferkit.training.schedules import check_schedule

FREEZE = "freeze_until"
FIT = ("epochs", "batch_size", "augment", "n_views")
FIXED = ("device", "precision", "cache", "seed")
PER_HEAD = ("lr", "weight_decay", "schedule", "clip_grad_norm", "epochs")  # may differ in heads trained together

EPOCHS: int = inspect.signature(Trainer.fit).parameters["epochs"].default
FILE = "search.pt"
TRAINER = tuple(name for name in inspect.signature(Trainer).parameters if name not in ("model", *FIXED))

_FAILURES = (TransferKitError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError)

Space = Mapping[str, Sequence[Any] | Callable[[random.Random], Any]]


@dataclass(frozen=True, slots=True)
class Trial:
    """One set of hyperparameters and its result.

    Attributes:
        params: The hyperparameters.
        history: The history of its run; without epochs if it failed.
        score: Validation accuracy of its best epoch, 0 to 1; NaN if it failed.
        seconds: How long it took; the time of heads trained together is divided among them.
        error: Why it failed, or an empty string.
    """

    params: dict[str, Any]
    history: History
    score: float
    seconds: float
    error: str = ""


@dataclass(eq=False, repr=False)
class SearchResult:
    """The trials of a search, and the best of them. Attribute names are scikit-learn's.

    Attributes:
        trials: A `Trial` for each set of hyperparameters.
        best_model_: The model of the trial at `best_index_` after its best epoch; None if every trial failed.
    """

    trials: list[Trial]
    best_model_: TransferModel | None

    @property
    def best_index_(self) -> int:
        """Index of the trial with the highest score, the first of equal ones.

        Raises:
            NonFiniteError: When every trial failed.
        """
        scores = [-math.inf if math.isnan(trial.score) else trial.score for trial in self.trials]
        if not scores or max(scores) == -math.inf:
            reason = f"; the first: {self.trials[0].error}" if self.trials else ""
            raise NonFiniteError(f"every one of {len(self.trials)} trials failed{reason}")
        return scores.index(max(scores))

    @property
    def best_params_(self) -> dict[str, Any]:
        """The hyperparameters of the best trial."""
        return self.trials[self.best_index_].params

    @property
    def best_score_(self) -> float:
        """Validation accuracy of the best trial, 0 to 1."""
        return self.trials[self.best_index_].score

    @property
    def cv_results_(self) -> dict[str, list[Any]]:
        """A table as lists of equal length.

        They are `params`, a `param_...` for each name, `score`, `seconds` and `error`.
        """
        return {
            "params": [trial.params for trial in self.trials],
            **{f"param_{name}": [trial.params[name] for trial in self.trials] for name in self._names},
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
        return html_table([[*self._names, "validation accuracy", "seconds"], *rows])

    @property
    def _names(self) -> list[str]:
        return list(self.trials[0].params) if self.trials else []

    def _ranked(self) -> list[Trial]:
        return sorted(self.trials, key=lambda trial: (math.isnan(trial.score), -trial.score))


@explained
@together("search")
@own_surroundings()
def search(
    build: Callable[..., TransferModel],
    space: Space,
    train: object,
    *,
    validation_data: object = None,
    validation_split: float | None = None,
    num_trials: int | None = None,
    reduction_factor: int | None = None,
    budget: float | None = None,
    folder: str | PathLike[str] | None = None,
    device: str | torch.device | Device = "auto",
    precision: str = "auto",
    cache: bool | str | PathLike[str] = "auto",
    num_workers: int = 0,
    seed: int = 0,
    verbose: int = 1,
) -> SearchResult:
    """Train a model for each set of hyperparameters and compare them by validation accuracy.

    All trials share one feature cache: the frozen layers run once for each image. Every trial begins with the same
    random numbers. Some trials share their work, too:

    - Heads on a frozen backbone, as `attach_head` builds them, that differ in `lr`, `weight_decay`, `schedule`,
      `clip_grad_norm` and `epochs` alone are trained together, with the same result as alone, up to rounding.
    - With `schedule="constant"`, the longest of the trials that differ in `epochs` alone answers the others.

    If a trial fails, the reason is recorded and the search continues: its loss became infinite, memory ran out, or it
    raised another error.

    Args:
        build: Returns a model from `attach_head`. It is called with those names of `space` that neither `Trainer` nor
            `fit` takes, and must return the same for the same values. Its result is copied, so it may use the same
            backbone each time.
        space: A list of values for each hyperparameter: `lr`, `epochs`, `batch_size`, `freeze_until` (without it,
            layers stay frozen as `build` returns them), any other argument of `Trainer`, `augment` and `n_views` of
            `fit`, and whatever `build` takes. With `num_trials`, also functions of a `random.Random` that draw a value.
        train: As in `Trainer.fit`. A `Dataset` without randomness is read once: its resized images stay in memory if
            they take at most a quarter of the free memory.
        validation_data: As in `Trainer.fit`.
        validation_split: As in `Trainer.fit`; the same images in every trial.
        num_trials: Number of sets to draw at random; None tries every combination.
        reduction_factor: Successive halving: every set is tried with few epochs, the best of them (one in
            `reduction_factor`) with that many times more, and so on up to `epochs`. Each trial trains from the start.
            2 or more; None tries every set with all epochs.
        budget: Seconds after which no trial starts. The result lacks the rest.
        folder: Where finished trials and the best weights are saved. A call with the same arguments and data continues.
        device: As in `Trainer`.
        precision: As in `Trainer`.
        cache: As in `Trainer`.
        num_workers: As in `Trainer.fit`.
        seed: Determines everything random: draws, the head's initial weights, the order of images.
        verbose: 1 shows a line for each trial, and a bar where it can be seen; 2 the lines alone; 0 nothing.

    Raises:
        ArgumentError: When the space is empty or cannot be used, `Trainer` refuses one of its values, there is no
            validation data, `build` takes other names, or `folder` holds another search.
        CheckpointError: When the file in `folder` is damaged.
        TransferKitError: When no trial succeeds: what the first raised, if that was neither a number nor memory.

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
        Bergstra and Bengio, 2012, "Random Search for Hyper-Parameter Optimization", JMLR 13. Jamieson and Talwalkar,
        2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS.
    """
    if validation_data is None and validation_split is None:
        raise ArgumentError("trials are compared on validation data: pass validation_data or validation_split.")
    if validation_data is not None and validation_split is not None:
        raise ArgumentError("validation_data and validation_split are both given: expected one of them.")
    if isinstance(build, nn.Module) or not callable(build):
        raise ArgumentError(
            f"build is a {type(build).__name__}: expected a function that makes a new model for each trial, such as "
            "lambda: attach_head(backbone, classes)."
        )
    display, seed = Display(verbose), whole_number("seed", seed, at_least=0)
    end = math.inf if budget is None else clock() + positive("budget", budget)
    sets = _choose(space, num_trials, seed)
    rounds = [(len(sets), {})] if reduction_factor is None else _rounds(sets, reduction_factor)
    place = find_device(device, precision)
    settings = {"device": place, "cache": cache, "seed": seed}
    given = (train, validation_data, validation_split, num_workers)
    trials = _Trials(build, given, settings, display, end, None if folder is None else Path(folder))
    trials.begin(sets, [rounds, seed, validation_split, str(place)])
    for count, epochs in rounds:
        sets = [{**params, **epochs} for params in trials.best_of(sets, count)]
        trials.make(sets)
    return trials.result()


@dataclass(eq=False)
class _Run:
    """A run of training, and the numbers of the trials that it answers after so many epochs."""

    params: dict[str, Any]
    numbers: dict[int, list[int]]

    def trials(self) -> list[int]:
        return [number for numbers in self.numbers.values() for number in numbers]


@dataclass(eq=False)
class _Trials:
    """The trials made so far, and how others are made."""

    build: Callable[..., TransferModel]
    data: tuple[object, object, float | None, int]  # training, validation, split, workers
    settings: Mapping[str, Any]
    display: Display
    end: float
    folder: Path | None
    facts: list[Any] = field(default_factory=list)
    sources: dict[Any, list[Source]] = field(default_factory=dict)
    sets: list[dict[str, Any]] = field(default_factory=list)
    made: dict[int, Trial] = field(default_factory=dict)
    held: dict[str, Any] = field(default_factory=dict)  # what the folder held at the start
    best: tuple[float, int] = (-1.0, 0)
    best_model: TransferModel | None = None
    features: Trainer | None = None
    refused: Exception | None = None

    def begin(self, sets: list[dict[str, Any]], facts: list[Any]) -> None:
        """Let `Trainer` refuse what it cannot use, and take over the trials that the folder holds."""
        for group in _plan(dict(enumerate(sets))):
            trainer = self._trainer(group[0].params)
            for run in group[1:]:
                self._trainer(run.params, trainer.model)
            self.facts += [trainer.model.backbone.fingerprint, repr(trainer.model.head)]
        if self.folder is None:
            return
        self.facts += [*facts, derive_seed(re.sub(" at 0x[0-9a-f]+", "", repr(sets)))]
        self.facts += [[source.num_images, source.digest()] for source in self._open(trainer)]
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / FILE
        held = broadcast(read_checkpoint(file) if file.exists() else {}, "trials")
        if held.get("search", self.facts) != self.facts:
            raise ArgumentError(
                f"folder={str(self.folder)!r} holds another search: expected the same models, space, data, seed and "
                "device. Name another folder."
            )
        self.held = held

    def best_of(self, sets: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        """Return the best of the sets that were tried last, in their order; before the first trial all of them."""
        first = len(self.sets) - len(sets)
        found = [(self.made[first + place].score, -place) for place in range(len(sets)) if first + place in self.made]
        usable = sorted((pair for pair in found if not math.isnan(pair[0])), reverse=True)[:count]
        return [sets[place] for place in sorted(-place for _, place in usable)] if self.sets else sets

    def make(self, sets: list[dict[str, Any]]) -> None:
        """Make a trial of each set, unless the folder has it or the time is over."""
        new = dict(enumerate(sets, start=len(self.sets)))
        self.sets += sets
        self._recall()
        groups = _plan({number: params for number, params in new.items() if number not in self.made})
        first = _build(self.build, self.sets[0], self.settings["seed"])
        layers = [name for name, _ in first.named_modules()]

        def depth(group: list[_Run]) -> int:
            boundary = find_boundary(first, group[0].params.get(FREEZE))
            return -1 if boundary is None else layers.index(boundary)

        groups.sort(key=depth)  # deeper features are derived from shallow ones
        with self.display.bar("search", len(sets), unit="trials") as bar:
            for group in groups:
                trainer = self._trainer(group[0].params) if len(group) > 1 else None
                size = 1 if trainer is None else how_many_together(trainer.training)
                for part in (group[start : start + size] for start in range(0, len(group), size)):
                    if clock() > self.end:
                        return
                    if trainer is not None and len(part) > 1:
                        self._train_together(part, trainer)
                    for run in part:
                        if not self.made.keys() >= {*run.trials()}:
                            self._train(run)
                    self._save()
                    bar.advance(sum(len(run.trials()) for run in part))

    def result(self) -> SearchResult:
        if self.best_model is None and self.refused is not None:
            raise self.refused
        trials = broadcast([trial for _, trial in sorted(self.made.items())], "trials")
        return SearchResult(trials, self.best_model)

    def _trainer(self, params: Mapping[str, Any], model: TransferModel | None = None) -> Trainer:
        """Return a trainer of a model, by default of a new one."""
        if model is None:
            model = _build(self.build, params, self.settings["seed"])
            model.classes = learn_names(self.data[0], model.classes)  # the images in memory have no names
            if FREEZE in params:
                freeze_until(model, params[FREEZE])
        given = {name: value for name, value in params.items() if name in TRAINER}
        trainer = Trainer(model, **self.settings, **given)
        if self.features is not None:
            trainer.share_features(self.features)
        return trainer

    def _open(self, trainer: Trainer) -> list[Source]:
        """Return training and validation images, read once if they fit into memory."""
        model, (train, validation, split, num_workers) = trainer.model, self.data
        key = (model.backbone.preprocess, model.threshold)
        if key not in self.sources:
            read = partial(resized, classes=model.classes, preprocess=key[0], device=trainer.device)
            self.sources[key] = [
                open_source(trainer.training, read(data, num_workers=workers) or data, workers)
                for data, workers in ((train, num_workers), without_loader(validation, num_workers))
                if data is not None
            ]
            if split is not None:
                several, [source] = model.threshold is not None, self.sources[key]
                self.sources[key] = [*split_validation(source, split, trainer.seed, multi_label=several)]
        return self.sources[key]

    def _train(self, run: _Run) -> None:
        """Make a run with `Trainer.fit`."""
        trainer, last, started = self._trainer(run.params), max(run.numbers), clock()
        record = partial(self._record, run, started)
        source, held_out = self._open(trainer)

        def after_epoch(_: Trainer, __: object) -> None:
            history, progress = trainer.history or History(), trainer.training.progress
            if progress is not None and len(history.reports) < last:
                record(history, partial(_with_weights, trainer.model, progress.best.copies))

        own = {name: value for name, value in run.params.items() if name in FIT} | {"epochs": last}
        own["callbacks"] = [after_epoch] if len(run.numbers) > 1 else []
        try:
            history = trainer.fit(source, validation_data=held_out, verbose=0, **own)
        except _FAILURES as failure:
            self._fail([run], failure, started)
        else:
            record(history, lambda: trainer.model)
        self.features = trainer

    def _train_together(self, runs: Sequence[_Run], trainer: Trainer) -> None:
        """Make the runs of heads in one pass; one that fails there is left for `_train`, which finds the reason."""
        params, before, best = runs[0].params, {*self.made}, self.best
        runs = runs[rank_of_process() :: world_size()]  # of several processes each trains heads of its own
        with alone():
            started = clock()
        self.features = trainer
        try:
            train, held_out = self._open(trainer)
            feeds = [
                open_feed(trainer.training, train, augment=params.get("augment"), n_views=params.get("n_views")),
                open_feed(trainer.training, held_out, "validation"),
            ]
            for each in feeds if world_size() > 1 else ():
                each.open(1)  # which computes the features together
            with alone(), trainer.training.alone("fit"), trainer.training.interrupts:
                heads: dict[HeadRun, _Run] = {}
                for run in runs:
                    training, size = self._trainer(run.params, trainer.model).training, params.get("batch_size")
                    opened = open_run(training, *feeds, epochs=max(run.numbers), batch_size=size)
                    check_schedule(opened.schedule, opened.num_steps)
                    for each in feeds:
                        each.check()
                    training.interrupts = trainer.training.interrupts
                    heads[HeadRun(training, opened)] = run
                for head in train_heads([*heads]) if heads else ():
                    weights = {f"head.{name}": weight for name, weight in head.best.items()}
                    model = partial(_with_weights, trainer.model, weights)
                    self._record(heads[head], started, head.history, model, share=len(runs))
        except _FAILURES as failure:
            if not (is_out_of_memory(failure) or isinstance(failure, OutOfMemoryError)):
                with alone():
                    self._fail(runs, failure, started)
        self._share(before, best, trainer.model)

    def _share(self, before: set[int], best: tuple[float, int], model: TransferModel) -> None:
        """Exchange the trials that each process made since, and the weights of the best."""
        own = {number: trial for number, trial in self.made.items() if number not in before}
        found = self.best_model if self.best > best else None
        weights = {} if found is None else {name: value.cpu() for name, value in trainable_state(found).items()}
        for trials, other, state in exchange((own, self.best, weights), "trials"):
            for number, trial in trials.items():
                if number not in self.made:
                    self._add(number, trial)
            if other > self.best:
                self.best, self.best_model = other, _with_weights(model, state)

    def _record(
        self, run: _Run, started: float, history: History, model: Callable[[], TransferModel], *, share: int = 1
    ) -> None:
        """Record the trials that have as many epochs as a history."""
        best = None if history.best_epoch is None else history.reports[history.best_epoch].val_accuracy
        score = math.nan if best is None else best
        error = "validation loss was never finite: try a lower learning rate." if math.isnan(score) else ""
        seconds = (clock() - started) / share
        for number in run.numbers.get(len(history.reports), []):
            if number not in self.made:
                self._add(number, Trial(self.sets[number], History([*history.reports]), score, seconds, error))
                if (rank := (score, -number)) > self.best:  # of equal ones the first, as in best_index_; never NaN
                    self.best, self.best_model = rank, model()

    def _fail(self, runs: Sequence[_Run], failure: Exception, started: float) -> None:
        """Record the reason why the rest of the trials of some runs failed."""
        reason = str(failure) if isinstance(failure, TransferKitError) else f"{type(failure).__name__}: {failure}"
        if not isinstance(failure, NonFiniteError | OutOfMemoryError):
            self.refused = self.refused or failure
        for number in (number for run in runs for number in run.trials() if number not in self.made):
            self._add(number, Trial(self.sets[number], History(), math.nan, clock() - started, reason))

    def _add(self, number: int, trial: Trial) -> None:
        self.made[number] = trial
        later = [other.seconds for other in self.made.values()][1:]  # the first trial computed features for all
        left = f"  {(len(self.sets) - len(self.made)) * sum(later) / len(later):.0f} s left" if later else ""
        self.display.say(f"trial {len(self.made)} of {len(self.sets)}  {_line(trial)}{left}")

    def _recall(self) -> None:
        """Take over the trials that the folder holds, and the best model."""
        for number, (reports, *rest) in enumerate(self.held.get("trials", [])[: len(self.sets)]):
            if reports is not None:
                history = History([report_of(figures) for figures in reports])
                self.made[number] = Trial(self.sets[number], history, *rest)
        number = self.held.get("best", math.inf)
        if number in self.made and (rank := (self.made[number].score, -number)) > self.best:
            model = self._trainer(self.sets[number]).model
            self.best, self.best_model = rank, _with_weights(model, self.held["weights"])

    def _save(self) -> None:
        if self.folder is None or rank_of_process():
            return
        trials: list[list[Any]] = [[None] for _ in self.sets]
        for number, trial in self.made.items():
            reports = [vars(report) for report in trial.history.reports]
            trials[number] = [reports, trial.score, trial.seconds, trial.error]
        state: dict[str, Any] = {"search": self.facts, "trials": trials}
        if self.best_model is not None:
            state |= {"best": -self.best[1], "weights": trainable_state(self.best_model)}
        write_checkpoint(self.folder / FILE, state)


def _with_weights(model: TransferModel, weights: Mapping[str, torch.Tensor] | None) -> TransferModel:
    model = copy.deepcopy(model)
    model.load_state_dict(dict(weights or {}), strict=False)
    return model.eval()


def _rounds(sets: list[dict[str, Any]], factor: int) -> list[tuple[int, dict[str, int]]]:
    """Return how many sets each round of successive halving tries, and with how many epochs."""
    factor = whole_number("reduction_factor", factor, at_least=2)
    given = {whole_number("epochs", params.get("epochs", EPOCHS)) for params in sets}
    if len(given) > 1:
        raise ArgumentError(
            f"space['epochs'] has the values {sorted(given)}: with reduction_factor, which sets the epochs of each "
            "round, expected one value, the largest number of epochs."
        )
    [epochs] = given
    last = max(number for number in range(64) if factor**number <= min(len(sets), epochs))
    return [(len(sets) // factor**n, {"epochs": epochs // factor ** (last - n)}) for n in range(last + 1)]


def _plan(sets: Mapping[int, dict[str, Any]]) -> list[list[_Run]]:
    """Return the runs that answer trials, those in one list whose heads may be trained together."""
    runs: dict[Any, _Run] = {}
    groups: dict[Any, list[_Run]] = {}
    for number, params in sets.items():
        epochs = whole_number("epochs", params.get("epochs", EPOCHS))
        run = _Run(params, {})
        key = _key(params, ("epochs",) if params.get("schedule") == "constant" else ())
        if key not in runs:
            groups.setdefault(_key(params, PER_HEAD), []).append(run)
        runs.setdefault(key, run).numbers.setdefault(epochs, []).append(number)
    return list(groups.values())


def _key(params: Mapping[str, Any], but: Sequence[str]) -> Any:
    return frozenset((name, _same(value)) for name, value in params.items() if name not in but)


def _same(value: object) -> object:
    """Return what tells values apart: themselves, or objects where they cannot be hashed."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def _choose(space: Space, num_trials: int | None, seed: int) -> list[dict[str, Any]]:
    """Return the sets of hyperparameters to try."""
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
                raise ArgumentError(f"space[{name!r}] is a function that draws values: pass num_trials=, how many.")
        elif isinstance(values, str) or not isinstance(values, Sequence) or len(values) == 0:
            raise ArgumentError(
                f"space[{name!r}]={values!r} cannot be used: expected a list of 1 value or more (use list(...) for "
                "an array), or with num_trials a function of a random.Random."
            )
    if num_trials is None:
        lists = [values for values in space.values() if not callable(values)]
        return [dict(zip(space, combination, strict=True)) for combination in itertools.product(*lists)]
    generator = random.Random(derive_seed(seed, "search"))  # noqa: S311 - nothing secret
    return [
        {name: values(generator) if callable(values) else generator.choice(values) for name, values in space.items()}
        for _ in range(whole_number("num_trials", num_trials))
    ]


def _build(build: Callable[..., TransferModel], params: Mapping[str, Any], seed: int) -> TransferModel:
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


def _line(trial: Trial) -> str:
    params = "  ".join(f"{name}={value}" for name, value in trial.params.items())
    score = "failed: " + trial.error if math.isnan(trial.score) else f"val_accuracy {trial.score:.4f}"
    return f"{params}  {score}  {trial.seconds:.1f} s"
