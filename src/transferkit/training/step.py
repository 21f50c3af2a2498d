"""The hot path: one training step, one evaluation step. No I/O, no logging, no host sync."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from transferkit.base.processes import part_of, sum_gradients, world_size
from transferkit.base.randomness import seeded
from transferkit.compute.device import Device, parameters_of
from transferkit.compute.finite import BufferCopies, gradients_are_finite
from transferkit.compute.out_of_memory import is_out_of_memory, reserve_state, within_memory
from transferkit.errors import OutOfMemoryError
from transferkit.training.loss import Loss
from transferkit.training.metrics import count_correct
from transferkit.training.training import Part, Training


@dataclass(frozen=True, slots=True)
class Step:
    """One training step that was made.

    Attributes:
        epoch: Number of the epoch in the life of the trainer, from 0.
        index: Number of the step in its epoch, from 0.
        loss: The batch's mean loss, float32 `()`, on the device; `.item()` waits for it.
        correct: Number of images that were right, `()`, on the device; see `count_correct`.
        count: Number of images.
        lr: Learning rate of the last parameter group, the head's.
        logits: `(N, K)`, on the device, before the update. Of several processes, each has those of its own part.
        targets: int64 `(N,)` or float32 `(N, K)`, on the device, of the same images.
    """

    epoch: int
    index: int
    loss: Tensor
    correct: Tensor
    count: int
    lr: float
    logits: Tensor
    targets: Tensor


class Update(NamedTuple):
    """What one training step came to; tensors are on the device."""

    loss: Tensor  # the mean, float32 ()
    correct: Tensor  # number of images that were right, (); see `count_correct`
    logits: Tensor  # (N, K), before the update
    finite: Tensor  # whether loss and gradients were finite, bool (); if not, nothing was changed
    micro_batch_size: int  # images that passed through at once


def training_step(network: nn.Module, batch: Part, *, training: Training, loss: Loss, micro_batch_size: int) -> Update:
    """Make one update of the weights from one batch, unless a number in it is not finite.

    Gradients of the micro-batches, and of the parts that several processes have, add up to those of the whole batch
    (batch norm's statistics aside); the memory needed is that of one micro-batch. They stay until the next step.

    The network is in training mode: a model, or what follows its frozen layers. `loss` is from `Loss.for_run`.
    """
    device, optimizer = training.device, training.optimizer
    optimizer.zero_grad(set_to_none=True)
    batch_loss = torch.zeros((), device=batch.inputs.device)
    outputs = [torch.empty(0, len(training.model.classes), device=batch.inputs.device)]
    for part, part_targets in batch.split(micro_batch_size):
        with device.autocast():
            logits = network(part)
        part_loss = loss.sum(logits, part_targets) / batch.weight
        device.backward(part_loss)
        batch_loss += part_loss.detach()
        outputs.append(logits.detach())
    logits = torch.cat(outputs)
    correct = count_correct(logits, batch.targets, training.model.threshold)
    trainable = [parameter for parameter in parameters_of(optimizer) if parameter.requires_grad]
    batch_loss, correct = sum_gradients(trainable, batch_loss, correct)
    finite = batch_loss.isfinite() if device.scaler.is_enabled() else gradients_are_finite(batch_loss, optimizer)
    device.apply(optimizer, clip_grad_norm=training.clip_grad_norm, finite=finite)
    return Update(batch_loss, correct, logits, finite, micro_batch_size)


def guarded_step(network: nn.Module, batch: Part, *, training: Training, loss: Loss, seed: int) -> Update:
    """Make a training step that leaves nothing half done; the arguments are those of `training_step`.

    Where memory runs out, the forward and backward passes start again from the same random numbers, which `seed`
    determines, with micro-batches of half the size. A step that fails, or whose numbers are not finite, leaves
    gradients and batch norm's statistics as they were. Where one image is too much, or the optimizer has no room,
    `OutOfMemoryError`.
    """
    buffers = BufferCopies(network)

    def attempt(size: int) -> Update:
        random = seeded(seed, training.device.torch_device)
        once = update_not_repeated(training.optimizer, training.device)
        with dropout_of_part(network, batch.count), random, once:
            return training_step(network, batch, training=training, loss=loss, micro_batch_size=size)

    def undo() -> None:
        training.optimizer.zero_grad(set_to_none=True)
        buffers.restore()

    size = max(1, min(training.micro_batch_size or batch.count, len(batch.targets)))
    try:
        update, _ = within_memory(attempt, size, device=training.device, what="a training step", undo=undo)
    except BaseException:
        undo()  # nothing of a step that failed reaches the next
        raise
    buffers.restore(unless=update.finite)
    return update


@contextmanager
def dropout_of_part(network: nn.Module, count: int) -> Iterator[None]:
    """Make dropout zero the entries of this process's part that it would zero in the whole batch of `count` images."""
    layers = [layer for layer in network.modules() if type(layer) is nn.Dropout and layer.training]
    rows = part_of(count)

    def forward(inputs: Tensor, *, p: float) -> Tensor:
        factors = functional.dropout(inputs.new_ones(count, *inputs.shape[1:]), p)
        return inputs * factors[rows.start : rows.start + len(inputs)]

    for layer in layers if world_size() > 1 else ():
        vars(layer)["forward"] = partial(forward, p=layer.p)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


@contextmanager
def update_not_repeated(optimizer: Optimizer, device: Device) -> Iterator[None]:
    """Ask for the memory of the optimizer's state before its step, and let nobody repeat a step that has begun."""
    begun = False

    def begin(*_: Any) -> None:
        nonlocal begun
        reserve_state(optimizer, device)
        begun = True

    hook = optimizer.register_step_pre_hook(begin)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if begun and is_out_of_memory(error):
            raise OutOfMemoryError(
                f"the optimizer ran out of memory in the middle of its update; weights may be partly updated: {error}. "
                "Load a checkpoint, then freeze more layers or use a smaller head."
            ) from error
        raise
    finally:
        hook.remove()


def evaluation_step(model: Callable[[Tensor], Tensor], images: Tensor, *, device: Device) -> Tensor:
    """Return the logits, float32 `(N, K)`, of preprocessed images; the model is in eval mode."""
    with torch.inference_mode(), device.autocast():
        logits: Tensor = model(images)
    return logits.float()
