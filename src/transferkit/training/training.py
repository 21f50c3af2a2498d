"""What training changes and needs: the one object that a step, an epoch and a run share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from transferkit.compute.device import Device
from transferkit.model.head import TransferModel
from transferkit.training.loss import Loss
from transferkit.training.schedules import Schedule


@dataclass(frozen=True, slots=True)
class Part:
    """What a process has of a batch: in one process all of it.

    Attributes:
        inputs: Preprocessed images, float `(N, 3, H, W)`, or features; `(0,)` if others have all images.
        targets: int64 `(N,)` or float32 `(N, K)`.
        count: Images in the whole batch.
        weight: What the loss of the whole batch is divided by.
    """

    inputs: Tensor
    targets: Tensor
    count: int
    weight: Tensor | float

    def split(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """Return inputs and targets in micro-batches."""
        if not len(self.targets):
            return []
        return list(zip(torch.split(self.inputs, size), torch.split(self.targets, size), strict=True))


@dataclass(slots=True)
class Training:
    """A model in training, and how far it has come.

    Attributes:
        model: On the device.
        device: Where and in which precision it is computed.
        optimizer: One group of parameters for each block and one for the head.
        loss: The loss as the user described it; a run computes what depends on its data (`Loss.for_run`).
        metrics: From `check_metrics`.
        schedule: Progress through a run, 0 to 1, to a factor of the learning rate.
        clip_grad_norm: Largest Euclidean norm of all gradients together, or None.
        max_skipped: Steps of one run that may be skipped because a number is not finite.
        seed: Order of images, augmentation and dropout depend on it.
        pretrained: Whether the backbone had been trained before, and no warning of a high learning rate was given.
        micro_batch_size: Images that pass through the network at once; None is the whole batch.
        epoch: Epochs finished so far.
        global_step: Steps made so far.
        optimizer_mode: What `let_optimizer` was told last.
    """

    model: TransferModel
    device: Device
    optimizer: Optimizer
    loss: Loss
    metrics: Mapping[str, Any]
    schedule: Schedule
    clip_grad_norm: float | None
    max_skipped: int
    seed: int
    pretrained: bool = False
    micro_batch_size: int | None = None
    epoch: int = 0
    global_step: int = 0
    optimizer_mode: str = "eval"

    def let_optimizer(self, mode: str) -> None:
        """Tell an optimizer that keeps other weights for its steps (schedule-free) what follows, if that is new.

        Args:
            mode: `"train"` before a step, `"eval"` before anything else that reads weights.
        """
        if mode != self.optimizer_mode:
            self.optimizer_mode = mode
            getattr(self.optimizer, mode, _do_nothing)()


def _do_nothing() -> None:
    """Stand in for a method that most optimizers lack."""
