"""`fine_tune`: from a backbone and data to the best model that the time allows, in one call."""

import copy
import json
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from transferkit.base.arguments import positive, whole_number
from transferkit.base.arrays import sha256_of
from transferkit.base.calls import explained
from transferkit.base.display import Display
from transferkit.base.files import atomic_write
from transferkit.base.processes import broadcast, clock, rank, together
from transferkit.base.randomness import derive_seed, seeded
from transferkit.base.surroundings import own_surroundings
from transferkit.compute.device import Device
from transferkit.data.augmentation import Augment, describe_augmentation
from transferkit.data.classes import find_classes
from transferkit.data.selection import split_validation
from transferkit.data.sources import Source, SubsetSource, count_batches
from transferkit.errors import ArgumentError, CheckpointError, CheckpointWriteError
from transferkit.model.backbone import Backbone
from transferkit.model.freezing import find_boundary
from transferkit.model.freezing import freeze_until as freeze
from transferkit.model.head import attach_head
from transferkit.results.summary import summary
from transferkit.saving.archive import shown
from transferkit.trainer import Trainer
from transferkit.training.averaging import WeightAverage
from transferkit.training.checkpoint import Checkpoint
from transferkit.training.evaluation import validate
from transferkit.training.loss import CrossEntropy, Loss, LossFunction
from transferkit.training.optimizers import LearningRate
from transferkit.training.progress import BestWeights
from transferkit.training.run import features_of, open_feed, open_source, without_loader
from transferkit.training.schedules import warmup
from transferkit.training.training import Training

HELD_OUT = 0.1  # fraction of the training images that is held out where there is no validation data
FEWEST_PER_CLASS = 20  # images of a class, on average, below which nothing but the head is fitted

EPOCHS = 12  # of deeper training, at most
IMAGES_SEEN = 48_000  # in them: without a budget there are fewer epochs where they would see more
FEWEST_EPOCHS = 3  # below which deeper training is not begun
VIEWS = 4  # of each image, on which the head is solved if nothing else trains
MOST_VIEWS = 6  # of each image in deeper training
BATCH_SIZE = 32
RATES = {"head": 3e-4, "backbone": 3e-4}  # of deeper training with Adam, which begins from the solved head
DROPOUT = 0.5  # of the features in deeper training
LABEL_SMOOTHING = 0.1
DECAY = 0.99  # of the average of weights: about the last 100 steps

PLAN = "plan.json"
ALL_IMAGES = "all"  # folder of the second run's checkpoints, in that of the first

_DIGITS = 16  # of a digest
_TIMED_STEPS = 4
_STEP_PASSES = 4  # forward passes that a training step takes the time of
_SPARE = 0.93  # fraction of the time left that is planned for


@dataclass(frozen=True)
class _Plan:
    """How layers before the head are trained: from `boundary` on, for some epochs, on fixed views of each image."""

    boundary: str | None
    epochs: int
    n_views: int | None


@explained
@together("fine_tune")
@own_surroundings()
def fine_tune(
    backbone: Backbone,
    data: object,
    validation_data: object = None,
    *,
    budget: float | None = None,
    classes: Sequence[str] | int | None = None,
    layers: Sequence[str] | None = None,
    freeze_until: str | None = "auto",
    epochs: int | None = None,
    lr: LearningRate | None = None,
    batch_size: int = BATCH_SIZE,
    augment: Augment | None = ("flip", "crop"),
    loss: Loss | LossFunction | None = None,
    metrics: object = None,
    folder: str | PathLike[str] | None = None,
    device: str | torch.device | Device = "auto",
    precision: str = "auto",
    cache: bool | str | PathLike[str] = "auto",
    seed: int = 0,
    on_bad_image: str | float = "raise",
    num_workers: int = 0,
    verbose: int = 1,
) -> Trainer:
    """Train the best model that the time allows, from a backbone and labeled images.

    1. With everything frozen, the head is solved to its optimum on cached features; cross-validation chooses its
       penalty.
    2. With 20 or more images per class on average and enough time, the last two blocks, or the last one, train with
       the head from there: Adam, a warm-up, a cosine, cached random views. The trained model is the moving average of
       the last steps' weights. Held-out images, the validation data or a tenth of the images, compare it with the
       solved head. If training was better and time is left, a second run trains on all images, and the model is the
       mean of both runs' weights. If it was not better, the solved head stays, fitted to all images.
    3. A temperature makes the probabilities honest.

    Each choice is an argument. Ctrl-C ends the second part, and the best model so far is returned.

    Args:
        backbone: From `load_backbone`; the model has a copy, and it stays as it is.
        data: As in `Trainer.fit`, but no `DataLoader` that shuffles.
        validation_data: Images that compare the trained model with the solved head; None holds out a tenth of `data`.
            If nothing but the head is fitted, cross-validation chooses, and they are not used.
        budget: Seconds for everything; training ends between two epochs. None decides by the number of images, so a run
            depends only on the seed: 12 epochs for up to 4,000 images, fewer for more.
        classes: The class names or their number; None takes them from the data.
        layers: As in `attach_head`.
        freeze_until: The first layer that trains: `"head"` solves the head and ends; None trains everything. `"auto"`
            chooses among the last two blocks by the time.
        epochs: Of the second part; None decides by the time or the number of images.
        lr: Learning rates of the second part, as in `Trainer`; None is 3e-4.
        batch_size: Of the second part.
        augment: As in `Trainer.fit`; None uses the images as they are.
        loss: As in `Trainer`, convex in the logits: cross-entropy or binary cross-entropy. None is cross-entropy with
            a label smoothing of 0.1.
        metrics: As in `Trainer`.
        folder: Where the second part saves checkpoints. A call with the same arguments continues from the last one;
            one with others is refused.
        device: As in `Trainer`.
        precision: As in `Trainer`.
        cache: As in `Trainer`.
        seed: Determines everything random.
        on_bad_image: As in `Trainer.fit`.
        num_workers: Processes that read a `Dataset`.
        verbose: As in `Trainer.fit`.

    Returns:
        A trainer with the model, to evaluate, predict and save with, or to train further. Its history is that of the
        run with held-out images.

    Raises:
        ArgumentError: When a value is out of range, the classes are not known, or `folder` holds the run of a call with
            other arguments.
        TransferKitError: As in `Trainer.fit` and `Trainer.solve`.

    Example:
        >>> from transferkit import load_backbone
        >>> images, targets = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8), torch.arange(16) % 2
        >>> backbone = load_backbone("vgg11", weights=None, image_size=32)
        >>> trainer = fine_tune(backbone, (images, targets), device="cpu", verbose=0)
        >>> trainer.predict(images).shape
        (16,)

    References:
        Kumar et al., 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution",
        arXiv:2202.10054: the head first, then the layers before it.
    """
    started = clock()
    end = math.inf if budget is None else started + positive("budget", budget)
    size = whole_number("batch_size", batch_size)
    epochs = None if epochs is None else whole_number("epochs", epochs)
    display = Display(verbose)
    with seeded(derive_seed(whole_number("seed", seed, at_least=0), "head")):
        model = attach_head(backbone, find_classes(data, classes), layers=layers, dropout=DROPOUT)
        model = freeze(copy.deepcopy(model), "head")  # or a later `probe` of the backbone would have seen these images
    trainer = Trainer(
        model,
        lr=RATES if lr is None else lr,
        schedule=warmup("cosine"),
        clip_grad_norm=1.0,
        loss=CrossEntropy(label_smoothing=LABEL_SMOOTHING) if loss is None else loss,
        metrics=metrics,
        device=device,
        precision=precision,
        cache=cache,
        seed=seed,
    )
    reading: dict[str, Any] = {"num_workers": num_workers, "on_bad_image": on_bad_image, "display": display}
    every = _open("data", data, trainer.training, **reading)
    given = None if validation_data is None else _open("validation_data", validation_data, trainer.training, **reading)
    facts = (
        {} if folder is None else _facts(trainer, every, given, lr=lr, batch_size=size, augment=augment, layers=layers)
    )
    started_plan = _read_plan(folder, freeze_until, epochs, facts)
    if freeze_until not in ("auto", "head"):
        find_boundary(model, freeze_until)  # a layer that is not there is an error now
    with closing(open_feed(trainer.training, every, augment=augment).inputs.batches(1)) as first:
        next(first)  # so is what cannot be augmented
    wanted = freeze_until != "head" and (
        freeze_until != "auto" or (every.num_images or 0) >= FEWEST_PER_CLASS * len(model.classes)
    )
    train, held_out = every, given
    if wanted and given is None:
        train, held_out = split_validation(every, HELD_OUT, seed, multi_label=model.threshold is not None)
    computing = clock()
    features_of(trainer.training, train, display)
    solving = clock()
    solved = trainer.solve(train, verbose=verbose)
    features_s, solver_s = solving - computing, clock() - solving
    final = False
    if wanted and held_out is not None:
        image_s = features_s / (train.num_images or 1)
        job = _Job(trainer, every, train, held_out, size, augment, end, image_s, folder, display)
        plan = broadcast(started_plan, "the plan") or job.plan(freeze_until, epochs)
        if plan is None:
            display.say(f"no time for deeper training within {budget:.0f} s")
        else:
            _write_plan(folder, plan, facts)
            final = job.train(plan)
    if not final:
        left = end - clock()
        views = int(min(VIEWS, _SPARE * left / (features_s + solver_s)))
        if augment is not None and views > 1:
            trainer.solve(every, augment=augment, n_views=views, verbose=verbose)
        elif train is not every:
            trainer.solve(every, l2=None if left > solver_s else solved.l2, verbose=verbose)
    display.say(f"{clock() - started:.0f} s in total; temperature {model.temperature:.2f}")
    return trainer


@dataclass(frozen=True)
class _Job:
    """Training of deeper layers from the solved head."""

    trainer: Trainer  # whose head is solved on `train_source`; nothing else trains yet
    every: Source  # all training images
    train_source: Source  # those that are not held out
    held_out: Source  # the images that tell what is better
    batch_size: int  # of the training steps
    augment: Augment | None  # as in `Trainer.fit`
    end: float  # when it must be over, by `clock`
    image_s: float  # seconds that all frozen layers took for an image
    folder: str | PathLike[str] | None  # for the checkpoints
    display: Display

    def plan(self, boundary: str | None, epochs: int | None) -> _Plan | None:
        """Decide from which layer on to train, and how long; None if there is too little time for anything."""
        count = self.train_source.num_images or 0
        most = epochs or max(FEWEST_EPOCHS, min(EPOCHS, IMAGES_SEEN // count))
        layers = self.trainer.model.backbone.blocks[-2:] if boundary == "auto" else [boundary]
        if self.end == math.inf:
            return _Plan(layers[0], most, self._views(most))
        for layer in layers:
            step_s, image_s = self._time(layer)
            steps = count_batches(self.train_source, self.batch_size) or 0
            epoch_s = step_s * steps + image_s * (self.held_out.num_images or 0)
            for number in range(most, (epochs or FEWEST_EPOCHS) - 1, -1):
                needed = (self._views(number) or 1) * count * image_s + number * epoch_s
                if needed < _SPARE * (self.end - clock()):
                    return _Plan(layer, number, self._views(number))
        return None

    def train(self, plan: _Plan) -> bool:
        """Train deeper layers; return whether the model is final: better on the held-out images, or interrupted.

        If it was not better, the solved head is back. Ctrl-C ends the training, and the best model so far counts.
        """
        trainer, model = self.trainer, self.trainer.model
        temperature = model.temperature
        before, interrupted = self._score()
        if interrupted:
            model.temperature = temperature
            return True
        self.display.say(
            f"solved head: accuracy {before['accuracy']:.4f} on {self.held_out.num_images:,} held-out images. Next: "
            f"{plan.epochs} epochs of training from {plan.boundary or 'the first layer'} on"
        )
        freeze(model, plan.boundary)
        if self.end == math.inf and (minutes := self._seconds(plan) / 60) > 2:
            self.display.say(f"this may take {minutes:.0f} minutes; budget= or Ctrl-C ends it sooner")
        solved = BestWeights(model)
        solved.take()
        started = clock()
        ended, interrupted = self._fit(plan, self.train_source, self.held_out, self.folder)
        seconds = clock() - started
        if trainer.history is not None and trainer.history.reports:
            after, again = self._score()
            interrupted = interrupted or again
            if after["loss"] < before["loss"]:
                if ended and not interrupted:
                    self._train_again(plan, solved, seconds)
                return True
        self.display.say("training deeper layers was no better on the held-out images: the solved head stays")
        solved.restore()
        model.temperature = temperature
        freeze(model, "head")
        return interrupted

    def _score(self) -> tuple[dict[str, float], bool]:
        """Return loss and accuracy on the held-out images, calibrated to them, and whether Ctrl-C came meanwhile."""
        scores: dict[str, float] = {}
        try:
            with self.trainer.training.interrupts:  # a first Ctrl-C is raised at the end
                self.trainer.calibrate(self.held_out)
                scores = validate(self.trainer.training, self.held_out)
        except KeyboardInterrupt:
            if not scores:
                raise
            self.display.say("interrupted: kept the best model so far")
            return scores, True
        return scores, False

    def _train_again(self, plan: _Plan, solved: BestWeights, seconds: float) -> None:
        """Train on all images from the solved head, and let the model be the mean of both runs' weights."""
        trainer, model = self.trainer, self.trainer.model
        more = (self.every.num_images or 0) / (self.train_source.num_images or 1)
        if more * seconds > _SPARE * (self.end - clock()):
            return
        self.display.say(f"training again on all {self.every.num_images:,} images, then averaging both runs' weights")
        first = BestWeights(model)
        first.take()
        history, temperature = trainer.history, model.temperature
        solved.restore()
        trainer.optimizer.state.clear()
        folder = None if self.folder is None else Path(self.folder) / ALL_IMAGES
        if self._fit(plan, self.every, None, folder)[0]:
            first.average()
        else:
            first.restore()
        trainer._history, model.temperature = history, temperature

    def _fit(
        self, plan: _Plan, data: Source, held_out: Source | None, folder: str | PathLike[str] | None
    ) -> tuple[bool, bool]:
        """Train from where the model is; return whether all epochs of the plan were made, and whether Ctrl-C came."""
        ends: list[float] = []

        def late(_trainer: Any, _report: Any) -> bool:
            ends.append(clock())
            return len(ends) > 1 and 2 * ends[-1] - ends[-2] > self.end  # another epoch would be over too late

        callbacks: list[Any] = [WeightAverage(DECAY, restore_best=False), late]
        if folder is not None:
            callbacks.append(Checkpoint(folder))
        first, interrupted = self.trainer.epoch, False
        try:
            self.trainer.fit(
                data,
                validation_data=held_out,
                epochs=plan.epochs,
                batch_size=self.batch_size,
                augment=self.augment,
                n_views=plan.n_views,
                callbacks=callbacks,
                resume_from=folder,
                verbose=self.display.verbose,
            )
        except KeyboardInterrupt:
            interrupted = True
            self.display.say("interrupted: kept the best model so far")
        return self.trainer.epoch == first + plan.epochs, interrupted

    def _seconds(self, plan: _Plan) -> float:
        """Estimate how long both runs take from the time of the frozen layers; nothing if they were cached already."""
        table = summary(self.trainer.model)
        once = sum(table.share(layer) for layer in table.layers if layer.cached)
        passes = 2 * plan.epochs * _STEP_PASSES * (1 - once) + (plan.n_views or plan.epochs) * once
        return passes * self.image_s * (self.every.num_images or 0)

    def _views(self, epochs: int) -> int | None:
        return None if self.augment is None else min(MOST_VIEWS, (epochs + 1) // 2)  # each is seen twice

    def _time(self, layer: str | None) -> tuple[float, float]:
        """Return the seconds of a training step from a layer on, and of the frozen layers for an image."""
        few = SubsetSource(
            self.train_source, torch.arange(min(self.train_source.num_images or 0, _TIMED_STEPS * self.batch_size))
        )
        freeze(self.trainer.model, layer)
        seconds = []
        for _ in range(3):  # the first computes features, and the second may still warm up; nothing changes
            started = clock()
            self.trainer.lr_find(
                few,
                batch_size=self.batch_size,
                num_steps=_TIMED_STEPS,
                augment=self.augment,
                n_views=self._views(1),
                verbose=0,
            )
            seconds.append(clock() - started)
        table = summary(self.trainer.model)
        share = sum(table.share(part) for part in table.layers if part.cached)
        freeze(self.trainer.model, "head")
        image_s = max(share * self.image_s, (seconds[0] - seconds[1]) / few.num_images)  # the first is small if known
        return seconds[2] / _TIMED_STEPS, image_s


def _open(
    name: str, data: object, training: Training, *, num_workers: int, on_bad_image: str | float, display: Display
) -> Source:
    source = open_source(training, *without_loader(data, num_workers), on_bad_image, display)
    if source.num_images is None:
        raise ArgumentError(
            f"{name} is a {type(data).__name__} that shuffles, or makes batches of its own: pass its data set, "
            "loader.dataset, or other images that keep their order."
        )
    return source


def _facts(
    trainer: Trainer, every: Source, held_out: Source | None, *, augment: Augment | None, **choices: object
) -> dict[str, str]:
    """Return as text what a call must have in common with the one it continues."""
    model = trainer.model
    backbone = model.backbone.state_dict()
    return {name: str(choice) for name, choice in choices.items()} | {
        "data": every.digest()[:_DIGITS],
        "validation_data": "None" if held_out is None else held_out.digest()[:_DIGITS],
        "backbone": sha256_of(backbone, begin=str(model.backbone.preprocess))[:_DIGITS],
        "classes": str(model.classes),
        "augment": "None" if augment is None else str(describe_augmentation(augment)),
        "loss": trainer.training.loss.describe(),
        "metrics": str(sorted(trainer.metrics)),
        "seed": str(trainer.seed),
    }


def _write_plan(folder: str | PathLike[str] | None, plan: _Plan, facts: dict[str, str]) -> None:
    if folder is None or rank():
        return
    path = Path(folder) / PLAN
    try:
        with atomic_write(path) as file:
            file.write(json.dumps({"plan": asdict(plan), "facts": facts}).encode())
    except OSError as error:
        raise CheckpointWriteError(f"{path} cannot be written: {error}. Name another folder.") from error


def _read_plan(
    folder: str | PathLike[str] | None, boundary: str | None, epochs: int | None, facts: dict[str, str]
) -> _Plan | None:
    """Return the plan of the call that this one continues; make the folder where there is none.

    Raises:
        ArgumentError: When that call was another one.
        CheckpointError: When its plan cannot be read.
        CheckpointWriteError: When there can be no such folder.
    """
    if folder is None:
        return None
    path = Checkpoint(folder).folder / PLAN
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        plan, saved = _Plan(**found["plan"]), dict(found["facts"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}), so the run in this folder cannot be continued: "
            "remove the folder, or name another one."
        ) from error
    here = facts | {
        "freeze_until": str(plan.boundary if boundary == "auto" else boundary),
        "epochs": str(plan.epochs if epochs is None else epochs),
    }
    saved |= {"freeze_until": str(plan.boundary), "epochs": str(plan.epochs)}
    for name, value in here.items():
        if saved.get(name) != value:
            raise ArgumentError(
                f"folder={str(folder)!r} holds a run with {name}={shown(saved.get(name))}, this call has "
                f"{name}={shown(value)}: expected the same. Name another folder."
            )
    return plan
