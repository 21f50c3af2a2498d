"""The epochs of a run: train, validate, report, call back, and end well whatever ends them."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any

from torch import Tensor, nn

from transferkit.base.display import Bar, Display
from transferkit.base.interrupts import Interruption, Interrupts
from transferkit.base.processes import broadcast, exchange, gather, world_size
from transferkit.base.randomness import derive_seed, seeded
from transferkit.compute.finite import SUM, check_scale, check_weights, find_nonfinite
from transferkit.data.sources import count_batches, epoch_order
from transferkit.errors import NonFiniteError
from transferkit.model.modes import begin_training, evaluating
from transferkit.results.history import EpochReport
from transferkit.training.callback_list import CallbackList
from transferkit.training.evaluation import evaluate
from transferkit.training.metrics import measure
from transferkit.training.optimizers import scale_lr
from transferkit.training.progress import Progress
from transferkit.training.run import Run, check_same_weights, follow_model, warn_of_high_lr
from transferkit.training.schedules import lr_factor
from transferkit.training.standardizing import measure_features
from transferkit.training.step import Step, guarded_step
from transferkit.training.training import Part, Training

Callback = Callable[[Any, EpochReport], object]
"""A function of the trainer and the report of an epoch; see `CallbackList`."""

CACHED_BATCH_SIZE = 256
"""Images validated at once where their features are cached: there are no convolutions to take memory."""

SCALE_CHECKED_EVERY = 50
"""Steps between two looks at the gradient scale of fp16, each of which waits for the device."""


def train_epoch(training: Training, run: Run, progress: Progress, *, first: int = 0) -> Iterator[Step]:
    """Make the steps of one epoch, from batch `first` on.

    A `NonFiniteError` ends it where a number is not finite and no more steps may be skipped, or an update made it so.
    """
    follow_model(training, run.train.display)
    warn_of_high_lr(training)
    begin_training(training.model)
    before = training.global_step
    num_batches = count_batches(run.source, run.batch_size)
    if first == 0 or num_batches is None or first < num_batches:
        order = epoch_order(run.source.num_images, training.seed, training.epoch)
        rest = None if order is None else order[first * run.batch_size :]
        network, batches = run.open_parts(order=rest, epoch=training.epoch)
        with closing(batches):  # or a traceback that is kept would keep worker processes
            for _ in range(0 if order is not None else first):
                next(batches, None)  # a DataLoader's own batches: read and ignored
            for index, batch in enumerate(batches, start=first):
                step = _train_batch(training, run, progress, network=network, batch=batch, index=index)
                if step is not None:
                    yield step
        check_scale(training.device)
        if training.global_step > before:
            progress.between_steps = False  # weights that are not finite are not saved
            check_weights(training.model)
            check_same_weights(training.model, f"epoch {training.epoch + 1}")
            progress.between_steps = True
    training.optimizer.zero_grad(set_to_none=True)  # validation may need the memory
    training.epoch += 1


def train_epochs(training: Training, run: Run, progress: Progress) -> Generator[Step, None, None]:
    """Make the steps of all epochs of a new run, with nothing between them."""
    try:
        for _ in range(run.num_epochs):
            yield from train_epoch(training, run, progress)
    finally:
        end_steps(training)


def end_steps(training: Training) -> None:
    """Put the learning rates back to those from which the next run's schedule starts, and free the gradients."""
    scale_lr(training.optimizer, 1.0)
    training.optimizer.zero_grad(set_to_none=True)


def _train_batch(
    training: Training, run: Run, progress: Progress, *, network: nn.Module, batch: Part, index: int
) -> Step | None:
    """Make one step; return None if it was skipped."""
    scale_lr(training.optimizer, lr_factor(run.schedule, training.global_step - progress.first_step, run.num_steps))
    seed = derive_seed(training.seed, "step", training.global_step)
    progress.between_steps = False
    training.let_optimizer("train")
    update = guarded_step(network, batch, training=training, loss=run.loss, seed=seed)
    size = len(batch.targets)
    if update.micro_batch_size < min(training.micro_batch_size or size, size):
        training.micro_batch_size = update.micro_batch_size
        run.train.display.say(
            f"out of memory: from here on micro-batches of {update.micro_batch_size}; the updates stay the same"
        )
    if not bool(update.finite):  # host sync on an accelerator
        progress.between_steps = True
        if progress.skipped == training.max_skipped:
            raise _explain_nonfinite(training, run, network, batch, size=update.micro_batch_size, index=index)
        progress.skip(index)
        return None
    training.global_step += 1
    if training.global_step % SCALE_CHECKED_EVERY == 0:
        check_scale(training.device)
    logits, targets = update.logits, batch.targets
    if training.metrics and world_size() > 1:  # they see all images
        logits, targets = gather(logits.float(), "logits"), gather(targets, "targets")
    lr = training.optimizer.param_groups[-1]["lr"]
    return Step(training.epoch, index, update.loss, update.correct, batch.count, lr, logits, targets)


class Epochs:
    """Runs the epochs of a call of `fit`; `interrupts` tells of signals, between two steps or batches."""

    def __init__(
        self,
        training: Training,
        run: Run,
        progress: Progress,
        *,
        callbacks: CallbackList,
        interrupts: Interrupts,
        display: Display,
    ) -> None:
        self.training = training
        self.run = run
        self.progress = progress
        self.callbacks = callbacks
        self.interrupts = interrupts
        self.display = display

    def finish(self) -> None:
        """Make what is left of the epochs, and leave the best weights in the model, whatever ends them."""
        progress = self.progress
        if done := len(progress.history.reports) if self._is_over() else 0:
            self.display.say(
                f"nothing to train: this run ended after epoch {done} of {self.run.num_epochs}. To continue from its "
                "weights, call fit again without resume_from"
            )
        try:
            measure_features(self.training, self.run, self.interrupts)
            while not self._is_over():
                report = self._epoch()
                progress.ended = broadcast(self.callbacks.after_epoch(report), "whether the run ends")
                if progress.ended:
                    self._save()
                self.interrupts.check()
        except BaseException as error:
            if self.interrupts.twice:
                raise
            stop = self._save()
            if isinstance(error, Interruption) or self.interrupts.received is not None:
                self.display.say(stop)
                raise Interruption(stop) from error
            raise
        finally:
            end_steps(self.training)
            self.training.let_optimizer("eval")
            progress.best.restore()
            self.training.model.eval()
            best = progress.history.best_epoch
            if best is not None and best < len(progress.history.reports) - 1:
                self.display.say(f"restored the weights of epoch {progress.history.epoch[best] + 1}, the best")

    def _is_over(self) -> bool:
        return self.progress.ended or len(self.progress.history.reports) >= self.run.num_epochs

    def _epoch(self) -> EpochReport:
        """Train for what is left of an epoch, validate, and report."""
        progress, started, before = self.progress, time.perf_counter(), self.progress.sums.count
        fill_s = self.run.fill_s
        with self.display.bar(f"epoch {progress.epoch + 1}", self.run.source.num_images) as bar:
            self._train(bar)
        self.training.let_optimizer("eval")
        loss, accuracy = progress.sums.means()
        figures = measure(self.training.metrics, progress.sums.outputs, self.training.model.threshold)
        with self.callbacks.validating():
            validation = self.validate()
            seconds = broadcast(time.perf_counter() - started, "the seconds of an epoch")
            skipped = progress.skipped - progress.skipped_before
            lr = self.training.optimizer.param_groups[-1]["lr"]
            report = EpochReport(progress.epoch, loss, accuracy, lr, seconds, skipped=skipped)
            vars(report).update(figures | {f"val_{name}": value for name, value in validation.items()})
            count = progress.sums.count
            speed = (count - before) / seconds
            usual_s = (seconds - self.run.fill_s + fill_s) * count / max(1, count - before)  # of a whole epoch, no fill
            progress.finish_epoch(report)
        left = self.run.num_epochs - len(progress.history.reports)
        self.display.say(f"{report}  {speed:,.0f} images/s" + (f"  {usual_s * left:,.0f} s left" if left else ""))
        return report

    def _train(self, bar: Bar) -> None:
        progress = self.progress
        progress.best.before_training()
        if progress.sums.count:
            bar.advance(progress.sums.count)  # a resumed epoch
        for step in train_epoch(self.training, self.run, progress, first=progress.batches):
            progress.add(step)
            self.callbacks.after_step()
            bar.advance(step.count, self._figures)
            self.interrupts.check()

    def validate(self) -> dict[str, float]:
        """Return loss, accuracy and metrics on the validation images, over cached features where there are some."""
        if self.run.validation is None:
            return {}
        size = self.run.batch_size
        network, batches = self.run.validation.open_part(size, cached_batch_size=max(size, CACHED_BATCH_SIZE))
        total = self.run.validation.inputs.source.num_images
        with evaluating(self.training.model), closing(batches), self.display.bar("validation", total) as bar:
            return evaluate(
                network, self.interrupts.watched(bar.over(batches)), training=self.training, loss=self.run.loss
            )

    def _save(self) -> str:
        """Save a run that ends early, if a step is not half made, and say so."""
        stop = f"stopped after step {self.training.global_step}"
        if not self.progress.between_steps:
            return f"{stop}, in the middle of the next one, so nothing was saved now"
        paths = self.callbacks.on_stop()
        if paths is None:
            return f"{stop}; nothing was saved: there is no Checkpoint among the callbacks"
        return f"{stop}; saved to {', '.join(map(str, paths))}" if paths else f"{stop}; it could not be saved"

    def _figures(self) -> str:
        loss, accuracy = self.progress.sums.means()
        return f"loss {loss:.4f} accuracy {accuracy:.4f}"


def _explain_nonfinite(
    training: Training, run: Run, network: nn.Module, batch: Part, *, size: int, index: int
) -> NonFiniteError:
    """Repeat the step's passes, and name the first number that is not finite."""

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        return run.loss.sum(logits, targets) / batch.weight

    with seeded(derive_seed(training.seed, "step", training.global_step), training.device.torch_device):
        first = find_nonfinite(network, batch.split(size), loss_of, model=training.model, device=training.device)
    found = enumerate(exchange(first, "what is not finite"))
    of = [one if world_size() == 1 else f"{one}, in the part of process {r}" for r, one in found if one != SUM]
    first = of[0] if of else SUM
    return NonFiniteError(
        f"in step {training.global_step} (epoch {training.epoch}, batch {index}, all from 0) a number is infinite, "
        f"NaN or too large, first in {first}. No weight was changed by it. Look at that image, lower the learning "
        "rate, or clip gradients. Trainer(max_skipped=...) skips so many steps of a run; here it is "
        f"{training.max_skipped}."
    )
