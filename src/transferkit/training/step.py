"""The hot path: one training step, one evaluation step. No I/O, no logging, no host sync."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transferkit.base.randomness import seeded
from transferkit.compute.device import Device
from transferkit.compute.finite import BufferCopies, gradients_are_finite
from transferkit.compute.out_of_memory import reserve_state, within_memory
from transferkit.training.loss import CrossEntropy
from transferkit.training.metrics import count_correct


@dataclass(frozen=True, slots=True)
class Step:
    """One training step that was made.

    Attributes:
        epoch: Number of the epoch in the life of the trainer, from 0.
        index: Number of the step in its epoch, from 0.
        loss: The batch's mean loss, float32 `()`, on the device; `.item()` waits for it.
        correct: Number of images whose largest logit was at their target, int64 `()`, on the device.
        count: Number of images.
        lr: Learning rate of the last parameter group, the head's.
    """

    epoch: int
    index: int
    loss: Tensor
    correct: Tensor
    count: int
    lr: float


class Update(NamedTuple):
    """What one training step came to.

    Attributes:
        loss: Mean loss, float32 `()`, on the device.
        correct: Number of hits, int64 `()`, on the device.
        finite: Whether loss and gradients were finite, bool `()`, on the device; where not, nothing was changed.
        micro_batch_size: Images that went through at once, fewer than asked for where memory did not suffice.
    """

    loss: Tensor
    correct: Tensor
    finite: Tensor
    micro_batch_size: int


def training_step(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    device: Device,
    optimizer: Optimizer,
    cross_entropy: CrossEntropy,
    seed: int,
    micro_batch_size: int,
    clip_grad_norm: float | None,
) -> Update:
    """Make one update of the weights from one batch, unless a number in it is not finite.

    The batch goes through in parts of `micro_batch_size`, whose gradients add up: the result is that of the whole
    batch (but for batch norm's statistics), the memory that of a part. Where memory does not suffice the parts are
    halved, and the pass begins again from the same random numbers.

    Args:
        model: In training mode, on the device.
        images: Preprocessed, float `(N, 3, H, W)`, or features, on the device.
        targets: int64 `(N,)` or float `(N, K)`, on the device.
        device: Number format and gradient scaling.
        optimizer: Its gradients are clear before and after.
        cross_entropy: The loss.
        seed: Of dropout.
        micro_batch_size: 1 or more.
        clip_grad_norm: Largest Euclidean norm of all gradients together, or None.

    Raises:
        OutOfMemoryError: One image is too much, or there is no room for the optimizer's state; nothing was changed.
    """
    buffers = BufferCopies(model)

    def accumulate(size: int) -> tuple[Tensor, Tensor]:
        with seeded(seed, device.torch_device):
            return _accumulate_gradients(model, images, targets, size, device=device, cross_entropy=cross_entropy)

    def undo() -> None:
        optimizer.zero_grad(set_to_none=True)
        buffers.restore()

    try:
        (loss, correct), size = within_memory(
            accumulate, min(micro_batch_size, len(targets)), device=device, what="a training step", undo=undo
        )
        reserve_state(optimizer, device)
    except BaseException:
        undo()  # nothing of a step that failed reaches the next
        raise
    finite = loss.isfinite() if device.scaler.is_enabled() else gradients_are_finite(loss, optimizer)
    buffers.restore_unless(finite)
    device.update(optimizer, clip_grad_norm=clip_grad_norm, finite=finite)
    return Update(loss, correct, finite, size)


def _accumulate_gradients(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    size: int,
    *,
    device: Device,
    cross_entropy: CrossEntropy,
) -> tuple[Tensor, Tensor]:
    total_weight = cross_entropy.total_weight(targets)
    batch_loss = torch.zeros((), device=images.device)
    batch_correct = torch.zeros((), dtype=torch.int64, device=images.device)
    for part, part_targets in zip(torch.split(images, size), torch.split(targets, size), strict=True):
        with device.autocast():
            logits = model(part)
        loss = cross_entropy.sum(logits, part_targets) / total_weight
        device.backward(loss)
        batch_loss += loss.detach()
        batch_correct += count_correct(logits, part_targets)
    return batch_loss, batch_correct


def evaluation_step(model: nn.Module, images: Tensor, *, device: Device) -> Tensor:
    """Return the logits, float32 `(N, K)`, of preprocessed images; the model is in eval mode."""
    with torch.inference_mode(), device.autocast():
        logits: Tensor = model(images)
    return logits.float()
