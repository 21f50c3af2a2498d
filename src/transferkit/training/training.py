"""What training changes and needs: the one object that a step, an epoch and a run share."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from transferkit.base.interrupts import Interrupts
from transferkit.base.processes import together
from transferkit.base.surroundings import own_surroundings
from transferkit.compute.device import Device
from transferkit.errors import ModelInUseError
from transferkit.features.cache import FeatureCache
from transferkit.model.head import TransferModel, check_float32, check_head
from transferkit.model.modes import changing
from transferkit.training.loss import Loss
from transferkit.training.schedules import Schedule


@dataclass(frozen=True, slots=True)
class Part:
    """What a process has of a batch: in one process all of it."""

    inputs: Tensor  # preprocessed images, float (N, 3, H, W), or features; (0,) if others have all images
    targets: Tensor  # int64 (N,) or float32 (N, K)
    count: int  # images in the whole batch
    weight: Tensor | float  # what the loss of the whole batch is divided by

    def split(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """Return inputs and targets in micro-batches."""
        if not len(self.targets):
            return []
        return list(zip(torch.split(self.inputs, size), torch.split(self.targets, size), strict=True))


@dataclass(slots=True)
class Training:
    """A model in training, how far it has come, and what its data is read with."""

    model: TransferModel  # on the device
    device: Device
    optimizer: Optimizer  # one group of parameters for each block and one for the head
    loss: Loss  # as the user described it; `Loss.for_run` computes what depends on the data of a run
    metrics: Mapping[str, Any]  # from `check_metrics`
    schedule: Schedule  # progress through a run, 0 to 1, to a factor of the learning rate
    clip_grad_norm: float | None  # largest Euclidean norm of all gradients together
    max_skipped: int  # steps of one run that may be skipped because a number is not finite
    seed: int  # order of images, augmentation and dropout depend on it
    pretrained: bool = False  # whether the backbone came trained, and no warning of a high learning rate was given
    cache_mode: bool | str = "auto"  # when features are cached; see `Feed`
    cache_folder: Path | None = None  # for files of features
    micro_batch_size: int | None = None  # images that pass through the network at once; None is the whole batch
    epoch: int = 0  # epochs finished so far
    global_step: int = 0  # steps made so far
    optimizer_mode: str = "eval"  # what `let_optimizer` was told last
    progress: Any = None  # the `Progress` of the call of `fit` that goes on now
    interrupts: Interrupts = field(default_factory=Interrupts)
    features: FeatureCache = field(init=False)

    def __post_init__(self) -> None:
        self.features = FeatureCache(self.device, self.cache_folder, check=self.interrupts.check)

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Let this thread alone change the model, as if no mode of torch had been set outside."""
        with together(what), changing(self.model), own_surroundings():
            if self.progress is not None and what in ("fit", "solve", "steps"):
                raise ModelInUseError(
                    f"{what} was called while fit runs, by one of its callbacks: expected one run at a time. Call "
                    f"{what} when fit has returned; a callback may evaluate, predict and save."
                )
            check_float32(self.model, trains=True)
            check_head(self.model)
            yield

    def let_optimizer(self, mode: str) -> None:
        """Tell a schedule-free optimizer, which keeps other weights for its steps, what follows, if that is new.

        `mode` is `"train"` before a step, `"eval"` before anything else that reads weights.
        """
        if mode != self.optimizer_mode:
            self.optimizer_mode = mode
            getattr(self.optimizer, mode, lambda: None)()
