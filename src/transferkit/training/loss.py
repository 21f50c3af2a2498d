"""The loss: cross-entropy, and how much the images of each class count in it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from transferkit.data.sources import Source
from transferkit.errors import ArgumentError

BALANCED = "balanced"
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """Cross-entropy of a batch, which may be computed part by part.

    Attributes:
        label_smoothing: Share of each target spread evenly over all classes, 0 to 1.
        class_weights: float32 `(K,)` on the device: how much an image of each class counts; None counts all alike.
    """

    label_smoothing: float = 0.0
    class_weights: Tensor | None = None

    def total_weight(self, targets: Tensor) -> Tensor | int:
        """Return what the sum over a batch is divided by."""
        if self.class_weights is None or targets.ndim == 2:
            return len(targets)
        return self.class_weights[targets].sum().clamp_min(_TINY)  # a batch of classes that count nothing

    def sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the sum over a part of a batch, in float32."""
        return functional.cross_entropy(
            logits.float(), targets, self.class_weights, label_smoothing=self.label_smoothing, reduction="sum"
        )


def check_class_weights(values: Sequence[float] | Tensor | str | None, num_classes: int) -> Tensor | str | None:
    """Return class weights as float32 `(num_classes,)`, None and `"balanced"` as they are.

    Raises:
        ArgumentError: Another number of them, or one that is negative or not finite.

    Example:
        >>> check_class_weights([1, 2], num_classes=2)
        tensor([1., 2.])
    """
    if values is None or (isinstance(values, str) and values == BALANCED):
        return values
    try:
        weights = torch.as_tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        weights = torch.empty(0)
    usable = weights.shape == (num_classes,) and bool(((weights >= 0) & weights.isfinite()).all())
    if not usable or not bool(weights.any()):
        raise ArgumentError(
            f"class_weights={values!r} cannot be used: expected {num_classes} finite numbers of 0 or more, one for "
            f"each class, and not 0 for all of them, or {BALANCED!r}."
        )
    return weights


def find_class_weights(weights: Tensor | str | None, source: Source, num_classes: int) -> Tensor | None:
    """Return checked class weights as they are, and `"balanced"` as what it comes to for some training data.

    Balanced weights are (number of images) / (classes that occur * images of the class), as in scikit-learn: the sum
    over all images stays their number. A class without images has weight 0.

    Args:
        weights: From `check_class_weights`.
        source: The training data; where a `Dataset` does not list its targets, all of it is read.
        num_classes: Number of classes.

    Raises:
        ArgumentError: `"balanced"` with a `DataLoader`.
    """
    if not isinstance(weights, str):
        return weights
    targets = source.all_targets()
    counts = targets.sum(dim=0) if targets.ndim == 2 else functional.one_hot(targets, num_classes).sum(dim=0)
    occurring = counts > 0
    return torch.where(occurring, len(targets) / (occurring.sum() * counts.clamp_min(1e-12)), 0.0).float()
