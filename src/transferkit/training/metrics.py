"""Figures over many batches: loss and accuracy added up on the device, metrics over all outputs at the end."""

import keyword
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from transferkit.data.targets import class_indices
from transferkit.errors import ArgumentError

RESERVED = ("loss", "accuracy", "epoch", "epoch_s", "lr", "skipped")  # figures that every report has


class Sums:
    """Loss and accuracy of many batches, added up on the device and read once; with `keep_outputs`, for metrics, more.

    They are the sum of all images' losses, the sum of `count_correct`, the number of images, and logits and targets.
    """

    def __init__(self, device: torch.device, *, keep_outputs: bool = False) -> None:
        self.loss = torch.zeros((), device=device)
        self.correct = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self.count = 0
        self.keep_outputs = keep_outputs
        self.outputs: list[tuple[Tensor, Tensor]] = []

    def add(self, loss: Tensor, correct: Tensor, count: int, *, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: its mean loss, its `count_correct`, its number of images, its logits and targets."""
        self.loss += loss * count
        self.correct += correct
        self.count += count
        if self.keep_outputs:
            self.outputs.append((logits.float(), targets))

    def clear(self) -> None:
        """Start again from zero."""
        self.loss.zero_()
        self.correct.zero_()
        self.count = 0
        self.outputs = []

    def means(self) -> tuple[float, float]:
        """Return mean loss and accuracy (0 to 1); NaN if nothing was added."""
        if self.count == 0:  # every step was skipped
            return math.nan, math.nan
        return self.loss.item() / self.count, self.correct.item() / self.count  # host sync: once an epoch


def count_correct(logits: Tensor, targets: Tensor, threshold: float | None = None) -> Tensor:
    """Return how many images have their largest logit at their target, `()`, on the device.

    With a threshold, the probability from which a label counts as predicted, each image adds its labels that are both
    true and predicted over those that are either: 0 to 1, or 1 if it has and gets none (Godbole and Sarawagi, 2004).
    Logits are `(N, K)`, targets int64 `(N,)` or float32 `(N, K)`.
    """
    if threshold is None:
        return (logits.detach().argmax(dim=1) == class_indices(targets)).sum()
    predicted, true = logits.detach().float().sigmoid() >= threshold, targets >= 0.5
    union = (predicted | true).sum(dim=1)
    return torch.where(union > 0, (predicted & true).sum(dim=1) / union.clamp_min(1), 1.0).sum()


def probabilities_of(logits: Tensor, threshold: float | None) -> Tensor:
    """Return the probability of each class, `(N, K)`: softmax, or with a threshold the sigmoid of each logit."""
    return logits.softmax(dim=1) if threshold is None else logits.sigmoid()


def check_metrics(metrics: object) -> dict[str, Any]:
    """Return metrics by name: functions of (probabilities, targets), or objects such as torchmetrics has.

    In a sequence instead of a mapping, functions go by their own names, and `"loss"` and `"accuracy"`, which are always
    measured, may be among them. None is no metric.
    """
    if metrics is None:
        return {}
    if isinstance(metrics, Mapping):
        named = dict(metrics)
    elif isinstance(metrics, Iterable) and not isinstance(metrics, str):
        measured = [metric for metric in metrics if metric not in ("loss", "accuracy")]
        named = {getattr(metric, "__name__", type(metric).__name__.lower()): metric for metric in measured}
    else:
        raise ArgumentError(f"metrics={metrics!r} cannot be used: expected a mapping from names to functions.")
    for name, metric in named.items():
        usable = isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
        if not usable or name in RESERVED or name.startswith("val_"):
            raise ArgumentError(
                f"metrics has the name {name!r}: expected a Python name other than {', '.join(RESERVED)}, and without "
                '"val_" in front (validation metrics get that prefix by themselves).'
            )
        if not callable(getattr(metric, "compute", metric)) or isinstance(metric, type):
            raise ArgumentError(
                f"metrics[{name!r}] is {metric!r}: expected a function of (probabilities, targets), or an object with "
                "reset, update and compute, such as torchmetrics has."
            )
    return named


def measure(
    metrics: Mapping[str, Any], outputs: list[tuple[Tensor, Tensor]], threshold: float | None
) -> dict[str, float]:
    """Return each metric by name, over all outputs: the logits and targets of each batch.

    Metrics get probabilities, float32 `(N, K)`, and targets, on the CPU.
    """
    if not metrics or not outputs:
        return dict.fromkeys(metrics, math.nan)
    logits, targets = (torch.cat(parts).cpu() for parts in zip(*outputs, strict=True))  # host sync: once an epoch
    probabilities = probabilities_of(logits, threshold)
    if threshold is not None:
        targets = targets.round().long()  # multi-hot, as torchmetrics and scikit-learn want them
    return {name: _measure(name, metric, probabilities, targets) for name, metric in metrics.items()}


def _measure(name: str, metric: Any, probabilities: Tensor, targets: Tensor) -> float:
    if hasattr(metric, "compute"):
        metric.reset()
        metric.update(probabilities, targets)
        value = metric.compute()
        metric.reset()
    else:
        value = metric(probabilities, targets)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"metrics[{name!r}] returned {value!r}: expected one number. Average a metric of each class "
            "(average='macro' in torchmetrics)."
        ) from error
