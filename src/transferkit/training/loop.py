"""The epochs of a run: begin or resume it, train, validate, report, call back, and end well whatever ends it."""

import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any

from torch import Tensor, nn

from transferkit.base.interrupts import Interruption
from transferkit.base.processes import broadcast, exchange, gather, world_size
from transferkit.base.randomness import derive_seed, seeded
from transferkit.compute.finite import SUM, check_scale, check_weights, find_nonfinite
from transferkit.data.augmentation import Augment
from transferkit.data.sources import count_batches, epoch_order
from transferkit.errors import NonFiniteError
from transferkit.model.freezing import describe_frozen
from transferkit.model.modes import begin_training, evaluating
from transferkit.results.history import EpochReport
from transferkit.training.callback_list import CallbackList
from transferkit.training.evaluation import evaluate
from transferkit.training.metrics import Sums, measure
from transferkit.training.optimizers import LearningRate, has_scheduler, scale_lr, set_lr
from transferkit.training.progress import BestWeights, Progress
from transferkit.training.run import (
    Run,
    check_same_data,
    check_same_weights,
    check_trains,
    follow_model,
    warn_of_high_lr,
)
from transferkit.training.schedules import check_schedule, lr_factor
from transferkit.training.standardizing import measure_features
from transferkit.training.state import assign_training_state, read_run, run_facts
from transferkit.training.step import Step, guarded_step
from transferkit.training.training import Part, Training

Callback = Callable[[Any, EpochReport], object]
"""A function of the trainer and the report of an epoch; see `CallbackList`."""

SCALE_CHECKED_EVERY = 50  # steps between two looks at the gradient scale of fp16, each of which waits for the device


def begin_run(
    training: Training,
    run: Run,
    callbacks: CallbackList,
    what: str,
    *,
    lr: LearningRate | None,
    augment: Augment | None,
    resume_from: str | os.PathLike[str] | None = None,
) -> Progress:
    """Refuse a run that cannot be made before anything changes; then let it begin, or continue from a checkpoint."""
    model, display, several = training.model, run.train.display, world_size() > 1
    check_schedule(run.schedule, run.num_steps, other=has_scheduler(training.optimizer))
    callbacks.each("before_run", callbacks.trainer, validated=run.validation is not None)
    facts = run_facts(training, run, lr, augment, callbacks) if callbacks or resume_from or several else {}
    if several:
        check_same_data(run.source, model, what, **{**facts, "micro_batch_size": None})
    saved = None if resume_from is None else read_run(training, resume_from, facts, callbacks, display)
    if saved is None:
        check_trains(model, run)
        callbacks.each("before_first_step", training.global_step, resumed_from=None)
        if lr is not None:
            set_lr(training.optimizer, lr)
    else:
        assign_training_state(training, saved)  # nothing was changed before
    warn_of_high_lr(training)
    frozen = describe_frozen(model).replace("; ", ";  ")  # a line may be broken there
    where = f"on {training.device.torch_device} in {training.device.precision}"
    display.say(f"{frozen};  {where}{f',  in {world_size()} processes' if several else ''}")
    for feed in run.feeds:
        feed.check()
    model.temperature, model.novelty = 1.0, None  # they belong to the weights of before
    sums = Sums(training.device.torch_device, keep_outputs=bool(training.metrics))
    progress = Progress(run, facts, training.global_step, training.epoch, BestWeights(model), callbacks, sums)
    if saved is not None:
        progress.load(saved["run"])
        training.epoch, training.micro_batch_size = progress.epoch, saved["progress"]["micro_batch_size"]
    return progress


def train_epoch(training: Training, progress: Progress) -> Iterator[Step]:
    """Make the steps that are left of one epoch.

    A `NonFiniteError` ends it where a number is not finite and no more steps may be skipped, or an update made it so.
    """
    run, first, before = progress.run, progress.batches, training.global_step
    follow_model(training, run.train.display)
    warn_of_high_lr(training)
    begin_training(training.model)
    num_batches = count_batches(run.source, run.batch_size)
    if first == 0 or num_batches is None or first < num_batches:
        order = epoch_order(run.source.num_images, training.seed, training.epoch)
        rest = None if order is None else order[first * run.batch_size :]
        network, batches = run.open_parts(order=rest, epoch=training.epoch)
        with closing(batches):  # or a traceback that is kept would keep worker processes
            for _ in range(0 if order is not None else first):
                next(batches, None)  # a DataLoader's own batches: read and ignored
            for index, batch in enumerate(batches, start=first):
                step = _train_batch(training, progress, network, batch, index)
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


def _train_batch(training: Training, progress: Progress, network: nn.Module, batch: Part, index: int) -> Step | None:
    """Make one step; return None if it was skipped."""
    run, size = progress.run, len(batch.targets)
    scale_lr(training.optimizer, lr_factor(run.schedule, training.global_step - progress.first_step, run.num_steps))
    seed = derive_seed(training.seed, "step", training.global_step)
    progress.between_steps = False
    training.let_optimizer("train")
    update = guarded_step(network, batch, training=training, loss=run.loss, seed=seed)
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


def one_by_one(training: Training, progress: Progress) -> Iterator[Step]:
    """Make a step whenever the next is asked for; modes of torch around the caller's code stay the caller's."""
    steps = _steps(training, progress)
    try:
        while True:
            with training.alone("steps"):
                step = next(steps, None)
            if step is None:
                return
            yield step
    finally:
        steps.close()
        if training.progress is None:  # or a later call of fit trains
            _end_steps(training)


def _steps(training: Training, progress: Progress) -> Generator[Step, None, None]:
    for _ in range(progress.run.num_epochs):
        yield from train_epoch(training, progress)


def _end_steps(training: Training) -> None:
    """Put the learning rates back to those from which the next run's schedule starts, and leave a model to predict."""
    scale_lr(training.optimizer, 1.0)
    training.optimizer.zero_grad(set_to_none=True)
    training.let_optimizer("eval")
    training.model.eval()


def finish_run(training: Training, progress: Progress) -> None:
    """Make what is left of a run's epochs, and leave the best weights or the last in the model, whatever ends them."""
    history, interrupts, display = progress.history, training.interrupts, progress.run.train.display
    if progress.is_over:
        display.say(
            f"nothing to train: this run ended after epoch {len(history.reports)} of {progress.run.num_epochs}. To "
            "continue from its weights, call fit again without resume_from"
        )
    training.progress = progress
    try:
        measure_features(training, progress.run)
        while not progress.is_over:
            report = _train_and_validate(training, progress)
            progress.ended = broadcast(progress.callbacks.after_epoch(report), "whether the run ends")
            if progress.ended:
                _save(training, progress)
            interrupts.check()
    except BaseException as error:
        if interrupts.twice:
            raise
        stop = _save(training, progress)
        if isinstance(error, Interruption) or interrupts.received is not None:
            display.say(stop)
            raise Interruption(stop) from error
        raise
    finally:
        training.progress = None
        _end_steps(training)
        if progress.run.restore_best:
            progress.best.restore()
            best = history.best_epoch
            if best is not None and best < len(history.reports) - 1:
                display.say(f"restored the weights of epoch {history.epoch[best] + 1}, the best")
        else:
            progress.callbacks.each("write_to", training.model)


def _train_and_validate(training: Training, progress: Progress) -> EpochReport:
    """Train for what is left of an epoch, validate, and report."""
    run, sums, callbacks = progress.run, progress.sums, progress.callbacks
    display = run.train.display
    started, fill_s, before = time.perf_counter(), run.fill_s, sums.count
    progress.best.before_training()
    with display.bar(f"epoch {progress.epoch + 1}", run.source.num_images) as bar:
        if before:
            bar.advance(before)  # a resumed epoch
        for step in train_epoch(training, progress):
            progress.add(step)
            callbacks.each("after_step", callbacks.trainer)
            bar.advance(step.count, lambda: "loss {:.4f} accuracy {:.4f}".format(*sums.means()))
            training.interrupts.check()
    training.let_optimizer("eval")
    loss, accuracy = sums.means()
    figures = measure(training.metrics, sums.outputs, training.model.threshold)
    with callbacks.validating():
        figures |= {f"val_{name}": value for name, value in _validate(training, run).items()}
        seconds = broadcast(time.perf_counter() - started, "the seconds of an epoch")
        lr, skipped = training.optimizer.param_groups[-1]["lr"], progress.skipped - progress.skipped_before
        report = EpochReport(progress.epoch, loss, accuracy, lr, seconds, skipped=skipped)
        vars(report).update(figures)
        count = sums.count
        progress.finish_epoch(report)
    speed = (count - before) / seconds
    usual_s = (seconds - run.fill_s + fill_s) * count / max(1, count - before)  # of a whole epoch, without features
    left = run.num_epochs - len(progress.history.reports)
    display.say(f"{report}  {speed:,.0f} images/s" + (f"  {usual_s * left:,.0f} s left" if left else ""))
    return report


def _validate(training: Training, run: Run) -> dict[str, float]:
    """Return loss, accuracy and metrics on the validation images, over cached features where there are some."""
    if run.validation is None:
        return {}
    network, batches = run.validation.open_part(run.batch_size)
    total = run.validation.inputs.source.num_images
    with evaluating(training.model), closing(batches), run.train.display.bar("validation", total) as bar:
        return evaluate(network, training.interrupts.watched(bar.over(batches)), training=training)


def _save(training: Training, progress: Progress) -> str:
    """Save a run that ends early, if a step is not half made, and say so."""
    stop = f"stopped after step {training.global_step}"
    if not progress.between_steps:
        return f"{stop}, in the middle of the next one, so nothing was saved now"
    answers = progress.callbacks.each("on_stop", progress.callbacks.trainer)
    if not answers:
        return f"{stop}; nothing was saved: there is no Checkpoint among the callbacks"
    paths = [str(path) for path in answers if path is not None]
    return f"{stop}; saved to {', '.join(paths)}" if paths else f"{stop}; it could not be saved"
