"""The epochs of a run: train, validate, report, call back, and end well whatever ends it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from transferkit.base.display import Bar, Display
from transferkit.base.interrupts import Interruption, Interrupts
from transferkit.base.randomness import derive_seed, seeded
from transferkit.compute.finite import check_scale, find_nonfinite
from transferkit.data.sources import epoch_order
from transferkit.errors import NonFiniteError
from transferkit.features.feed import Batches, Feed
from transferkit.model.recompute import Recomputed
from transferkit.results.history import EpochReport
from transferkit.training.callbacks import GradualUnfreezing
from transferkit.training.checkpoint import Checkpoint
from transferkit.training.evaluation import evaluate, in_eval_mode
from transferkit.training.optimizers import scale_lr
from transferkit.training.progress import Progress
from transferkit.training.run import Run
from transferkit.training.schedules import lr_factor
from transferkit.training.step import Step, training_step

if TYPE_CHECKING:
    from transferkit.trainer import Trainer

Callback = Callable[["Trainer", EpochReport], object]

CACHED_BATCH_SIZE = 256
"""Images validated at once where their features are cached: there are no convolutions to take memory."""

SCALE_CHECKED_EVERY = 50
"""Steps between two looks at the gradient scale of fp16, each of which waits for the device."""


def run_epochs(
    trainer: "Trainer",
    run: Run,
    progress: Progress,
    *,
    train: Feed,
    validation: Feed | None,
    epochs: int,
    callbacks: Sequence[Callback],
    restore_best: bool,
    interrupts: Interrupts,
    display: Display,
) -> None:
    """Make what is left of the epochs of a run, and leave the best weights in the model, whatever ends it.

    Args:
        trainer: Whose model, optimizer and settings are used, and whose counters go on.
        run: The data.
        progress: How far the run has come.
        train: What epochs train on.
        validation: What they are validated on, or None.
        epochs: Epochs in all, those done included.
        callbacks: Called after each in turn, but `GradualUnfreezing` first: a `Checkpoint` must save what it did.
        restore_best: Whether the best epoch's weights come back at the end.
        interrupts: Tells of signals, between two steps or batches.
        display: Shows bars, and a line for each epoch.
    """
    checkpoints = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
    in_turn = sorted(callbacks, key=lambda callback: not isinstance(callback, GradualUnfreezing))  # these first
    try:
        while (done := len(progress.history.reports)) < epochs and not progress.ended:
            count = progress.sums.count
            with display.bar(f"epoch {progress.epoch + 1}", run.source.num_images) as bar:
                report = _train_and_validate(
                    trainer,
                    run,
                    progress,
                    train=train,
                    validation=validation,
                    checkpoints=checkpoints,
                    interrupts=interrupts,
                    display=display,
                    bar=bar,
                )
            speed = (progress.sums.count - count) / report.epoch_s
            progress.finish_epoch(report)
            if restore_best and progress.history.best_epoch == len(progress.history.reports) - 1:
                progress.best.take()
            left = f"  {report.epoch_s * (epochs - done - 1):,.0f} s left" if done + 1 < epochs else ""
            display.say(f"{report}  {speed:,.0f} images/s{left}")
            progress.ended = any([callback(trainer, report) is True for callback in in_turn])  # noqa: C419
            if progress.ended:
                _save_where_it_stands(trainer, progress, checkpoints)
            interrupts.check()
    except BaseException as error:
        if interrupts.twice:
            raise
        stop = _save_where_it_stands(trainer, progress, checkpoints)
        if isinstance(error, Interruption) or interrupts.received is not None:
            display.say(stop)
            raise Interruption(stop) from error
        raise
    finally:
        progress.best.restore()


def _train_and_validate(
    trainer: "Trainer",
    run: Run,
    progress: Progress,
    *,
    train: Feed,
    validation: Feed | None,
    checkpoints: Sequence[Checkpoint],
    interrupts: Interrupts,
    display: Display,
    bar: Bar,
) -> EpochReport:
    """Train for what is left of an epoch, validate, and return its report."""
    started = time.perf_counter()
    progress.best.before_training()
    if progress.sums.count:
        bar.advance(progress.sums.count)  # a resumed epoch
    for step in train_epoch(trainer, run, train, progress, first=progress.batches):
        progress.add(step)
        for checkpoint in checkpoints:
            checkpoint.after_step(trainer)
        bar.advance(step.count, lambda: _figures(progress))
        interrupts.check()
    loss, accuracy = progress.sums.means()
    val_loss, val_accuracy = (None, None)
    if validation is not None:
        bar.close()
        val_loss, val_accuracy = _validate(trainer, validation, run.batch_size, interrupts, display)
    epoch_s = time.perf_counter() - started
    skipped = progress.skipped - progress.skipped_before
    lr = trainer.optimizer.param_groups[-1]["lr"]
    return EpochReport(progress.epoch, loss, accuracy, lr, epoch_s, val_loss, val_accuracy, skipped)


def train_epoch(trainer: "Trainer", run: Run, feed: Feed, progress: Progress, *, first: int) -> Iterator[Step]:
    """Make the steps of one epoch, from batch `first` on."""
    trainer.model.train()
    num_batches = run.source.num_batches(run.batch_size)
    if first == 0 or num_batches is None or first < num_batches:
        order = epoch_order(run.source.num_images, trainer.seed, trainer.epoch)
        rest = None if order is None else order[first * run.batch_size :]
        network, batches = feed.open(run.batch_size, order=rest, epoch=trainer.epoch)
        with closing(batches):  # or a kept traceback would keep worker processes
            for _ in range(0 if order is not None else first):
                next(batches, None)  # a DataLoader's own batches: read, and passed over
            yield from _train_batches(trainer, network, batches, feed, progress, first=first)
    trainer.epoch += 1


def _train_batches(
    trainer: "Trainer", network: nn.Module, batches: Batches, feed: Feed, progress: Progress, *, first: int
) -> Iterator[Step]:
    if trainer.recompute_activations:
        network = Recomputed(network)
    for index, (inputs, targets) in enumerate(batches, start=first):
        made = trainer.global_step - progress.first_step
        scale_lr(trainer.optimizer, lr_factor(trainer.schedule, made, progress.num_steps, trainer.warmup_steps))
        seed = derive_seed(trainer.seed, "step", trainer.global_step)  # for dropout
        progress.between_steps = False
        loss, correct, finite, size = training_step(
            network,
            inputs,
            targets,
            device=trainer.device,
            optimizer=trainer.optimizer,
            cross_entropy=trainer.cross_entropy,
            seed=seed,
            micro_batch_size=trainer.micro_batch_size or len(targets),
            clip_grad_norm=trainer.clip_grad_norm,
        )
        if size < min(trainer.micro_batch_size or len(targets), len(targets)):
            feed.display.say(
                f"memory did not suffice: batches go through in parts of {size} from here on, the same update"
            )
            trainer.micro_batch_size = size
        if not bool(finite):  # host sync on an accelerator
            if trainer.on_nonfinite == "raise" or progress.skipped == trainer.max_skipped:
                progress.between_steps = True
                step = trainer.global_step
                raise _explain_nonfinite(trainer, network, inputs, targets, size, step=step, index=index)
            progress.skip(index)
            continue
        trainer.global_step += 1
        if trainer.global_step % SCALE_CHECKED_EVERY == 0:
            check_scale(trainer.device)
        yield Step(trainer.epoch, index, loss, correct, len(targets), trainer.optimizer.param_groups[-1]["lr"])
    check_scale(trainer.device)


def _explain_nonfinite(
    trainer: "Trainer", network: nn.Module, inputs: Tensor, targets: Tensor, size: int, *, step: int, index: int
) -> NonFiniteError:
    def loss_of(logits: Tensor, part_targets: Tensor) -> Tensor:
        return trainer.cross_entropy.sum(logits, part_targets) / trainer.cross_entropy.total_weight(targets)

    parts = list(zip(torch.split(inputs, size), torch.split(targets, size), strict=True))
    with seeded(derive_seed(trainer.seed, "step", step), trainer.device.torch_device):
        first = find_nonfinite(network, parts, loss_of, model=trainer.model, device=trainer.device)
    return NonFiniteError(
        f"in step {step} (epoch {trainer.epoch}, batch {index}, all from 0) a number is infinite or NaN, "
        f"first in {first}. No weight was changed by it. Look at that image, lower the learning rate, or clip "
        f'gradients; on_nonfinite="skip" leaves out up to max_skipped={trainer.max_skipped} such steps.'
    )


def _validate(
    trainer: "Trainer", feed: Feed, batch_size: int, interrupts: Interrupts, display: Display
) -> tuple[float, float]:
    """Return loss and accuracy on the images to validate on."""
    network, batches = feed.open(batch_size, cached_batch_size=max(batch_size, CACHED_BATCH_SIZE))
    total = feed.inputs.source.num_images
    with in_eval_mode(trainer.model), closing(batches), display.bar("validation", total) as bar:
        return evaluate(network, interrupts.watched(bar.over(batches)), device=trainer.device)


def _save_where_it_stands(trainer: "Trainer", progress: Progress, checkpoints: Sequence[Checkpoint]) -> str:
    """Save a run that ends early, if a step is not half made, and say so."""
    stop = f"stopped after step {trainer.global_step}"
    if not checkpoints:
        return f"{stop}; nothing was saved: there is no Checkpoint among the callbacks"
    if not progress.between_steps:
        return f"{stop}; a step was under way, so the last checkpoint is the one before"
    paths = [str(path) for checkpoint in checkpoints if (path := checkpoint.try_to_save(trainer))]
    return f"{stop}; saved to {', '.join(paths)}" if paths else f"{stop}; it could not be saved"


def _figures(progress: Progress) -> str:
    loss, accuracy = progress.sums.means()
    return f"loss {loss:.4f} accuracy {accuracy:.4f}"
