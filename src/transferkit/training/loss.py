"""Losses: what a training step makes small, computed over a whole batch or over parts of it."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import Self

from transferkit.base.arguments import fraction, positive
from transferkit.base.calls import explained
from transferkit.data.sources import Source
from transferkit.errors import ArgumentError
from transferkit.model.head import TransferModel

BALANCED = "balanced"

Weights = Sequence[float] | Tensor | str | None
LossFunction = Callable[[Tensor, Tensor], Tensor]

_MULTI_LABEL = (nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)


@explained
@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy: each image has exactly one label, or soft targets that sum to one.

    Args:
        label_smoothing: Fraction of each target that is spread evenly over all classes, 0 up to but not including 1.
        class_weights: Weight of each class's images: one number of 0 or more for each class, or `"balanced"`, which
            gives every class the same total weight. None weights all images the same.

    Raises:
        ArgumentError: `label_smoothing` is out of range. When a run starts, if there is not one weight for each
            class, a weight is negative or not finite, or `"balanced"` meets a `DataLoader`.

    Example:
        >>> loss = CrossEntropy(label_smoothing=0.1)
        >>> loss.sum(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(2.7726)
    """

    label_smoothing: float = 0.0
    class_weights: Weights = None

    threshold = None  # each image has exactly one label

    def __post_init__(self) -> None:
        fraction("label_smoothing", self.label_smoothing)

    def for_run(self, source: Source, num_classes: int, device: torch.device) -> Self:
        """Return the loss with its weights computed from the training data, on the device."""
        weights = _check_weights("class_weights", self.class_weights, num_classes)
        if isinstance(weights, str):  # as scikit-learn does: the weights of all images add up to their number
            targets = source.all_targets()
            counts = targets.sum(dim=0) if targets.ndim == 2 else functional.one_hot(targets, num_classes).sum(dim=0)
            balanced = len(targets) / ((counts > 0).sum() * counts.clamp_min(1e-12))
            weights = torch.where(counts > 0, balanced, 0.0).float()
        return dataclasses.replace(self, class_weights=None if weights is None else weights.to(device))

    def total_weight(self, targets: Tensor) -> Tensor | int:
        """Return what the sum over a batch is divided by."""
        if self.class_weights is None or targets.ndim == 2:
            return len(targets)
        weights: Any = self.class_weights
        total: Tensor = weights[targets].sum()
        return torch.where(total > 0, total, torch.inf)  # a batch of classes that count nothing: its loss is 0

    def sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the sum over part of a batch, float32 `()`, from logits `(N, K)` and targets."""
        weights: Any = self.class_weights
        return functional.cross_entropy(
            logits.float(), targets, weights, label_smoothing=self.label_smoothing, reduction="sum"
        )

    def each(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each image without smoothing and weights, float32 `(N,)`."""
        return functional.cross_entropy(logits, targets, reduction="none")

    def describe(self) -> str:
        """Return the settings as text: a resumed run must have the same."""
        return f"CrossEntropy(label_smoothing={self.label_smoothing}, class_weights={_text(self.class_weights)})"


@explained
@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Binary cross-entropy: an image may have several labels, or none.

    Each class is independent; its probability is the sigmoid of its logit. Targets are multi-hot rows `(N, K)` of 0
    and 1, of any number type, or probabilities in between. The loss of an image is the mean over its classes.

    Args:
        threshold: Probability from which a label counts as predicted, above 0 and below 1. It is saved and exported
            with the model.
        label_smoothing: Fraction by which targets are moved towards 1/2, 0 up to but not including 1.
        positive_weights: Weight of a present label relative to an absent one: one number above 0 for each class, or
            `"balanced"`, which is (images without the label) / (images with it). None weights both the same.

    Raises:
        ArgumentError: When `threshold` or `label_smoothing` is out of range. When a run starts, if there is not one
            weight for each class, a weight is not above 0 and finite, or `"balanced"` meets a `DataLoader`.

    Example:
        >>> loss = BinaryCrossEntropy()
        >>> loss.each(torch.zeros(2, 4), torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0]]))
        tensor([0.6931, 0.6931])
    """

    threshold: float = 0.5
    label_smoothing: float = 0.0
    positive_weights: Weights = None

    def __post_init__(self) -> None:
        fraction("label_smoothing", self.label_smoothing)
        if positive("threshold", self.threshold) >= 1:
            raise ArgumentError(
                f"threshold={self.threshold!r} is out of range: expected a probability above 0 and below 1."
            )

    def for_run(self, source: Source, num_classes: int, device: torch.device) -> Self:
        """Return the loss with its weights computed from the training data, on the device."""
        weights = _check_weights("positive_weights", self.positive_weights, num_classes)
        if isinstance(weights, str):
            targets = source.all_targets()
            positives = targets.sum(dim=0)
            weights = torch.where(positives > 0, (len(targets) - positives) / positives.clamp_min(1), 1.0)
            weights = weights.clamp_min(1 / len(targets))  # a label on every image still counts
        if weights is not None and not bool((weights > 0).all()):
            raise ArgumentError(f"positive_weights={weights.tolist()} cannot be used: expected numbers above 0.")
        return dataclasses.replace(self, positive_weights=None if weights is None else weights.to(device))

    def total_weight(self, targets: Tensor) -> Tensor | int:
        """Return what the sum over a batch is divided by."""
        return len(targets)

    def sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the sum over part of a batch, float32 `()`, from logits `(N, K)` and targets."""
        smoothed = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
        weights: Any = self.positive_weights
        losses = functional.binary_cross_entropy_with_logits(
            logits.float(), smoothed, pos_weight=weights, reduction="none"
        )
        return losses.mean(dim=1).sum()

    def each(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each image without smoothing and weights, float32 `(N,)`."""
        return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)

    def describe(self) -> str:
        """Return the settings as text."""
        weights = _text(self.positive_weights)
        return f"BinaryCrossEntropy(label_smoothing={self.label_smoothing}, positive_weights={weights})"


@dataclass(frozen=True)
class FunctionLoss:
    """A user's function or module of (logits, targets) that returns the mean over a batch.

    It takes float32 logits `(N, K)` and targets, int64 `(N,)` or float32 `(N, K)`; `threshold` is the model's.
    """

    function: LossFunction
    threshold: float | None = None

    def for_run(self, source: Source, num_classes: int, device: torch.device) -> Self:
        if source.num_images is None:  # a DataLoader shows its targets with the first batch
            return self
        targets = source.all_targets(torch.arange(min(2, source.num_images))).to(device)
        logits = torch.zeros(len(targets), num_classes, device=device, requires_grad=True)
        try:
            value = self.function(logits, targets)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ArgumentError(
                f"loss={self.describe()} cannot be called with logits {tuple(logits.shape)} and targets "
                f"{tuple(targets.shape)} {targets.dtype}: {error}. Expected a function of (logits, targets)."
            ) from error
        if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
            got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            got += ", detached from the logits" if isinstance(value, Tensor) and not value.requires_grad else ""
            expected = 'the mean over the batch, one number that depends on the logits (reduction="mean" in torch)'
            raise ArgumentError(f"loss={self.describe()} returned {got}: expected {expected}.")
        return self

    def total_weight(self, targets: Tensor) -> Tensor | int:
        return len(targets)

    def sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.function(logits.float(), targets) * len(targets)

    def each(self, logits: Tensor, targets: Tensor) -> Tensor:
        rows = zip(torch.split(logits, 1), torch.split(targets, 1), strict=True)
        return torch.stack([self.function(*row).float().reshape(()) for row in rows])

    def describe(self) -> str:
        own = getattr(self.function, "__qualname__", None)
        return own if own is not None else repr(self.function)


Loss = CrossEntropy | BinaryCrossEntropy | FunctionLoss  # each has the methods of `CrossEntropy`


def find_loss(loss: Loss | LossFunction | None, model: TransferModel, device: torch.device) -> Loss:
    """Return the loss a trainer was given, or the one that suits its model; see `Trainer`."""
    threshold = model.threshold
    if loss is None:
        return CrossEntropy() if threshold is None else BinaryCrossEntropy(threshold)
    if isinstance(loss, CrossEntropy | BinaryCrossEntropy):
        name = "class_weights" if isinstance(loss, CrossEntropy) else "positive_weights"
        _check_weights(name, getattr(loss, name), len(model.classes))
        return loss
    if isinstance(loss, type) or not callable(loss):
        raise ArgumentError(
            f"loss={loss!r} cannot be used: expected transferkit.CrossEntropy(), transferkit.BinaryCrossEntropy(), or "
            "a function or module of (logits, targets)."
        )
    if isinstance(loss, nn.NLLLoss) or loss is functional.nll_loss:
        advice = "the model returns logits. Pass CrossEntropyLoss or cross_entropy of torch, with the same arguments."
        raise ArgumentError(f"loss={loss!r} takes log-probabilities, and {advice}")
    if isinstance(loss, nn.CrossEntropyLoss):
        weights = [1.0] * len(model.classes) if loss.weight is None else loss.weight.tolist()
        weights = [0.0 if index == loss.ignore_index else weight for index, weight in enumerate(weights)]
        if 0 in weights:
            advice = f"pass transferkit.CrossEntropy({loss.label_smoothing}, class_weights={weights})."
            raise ArgumentError(f"loss={loss!r} has no mean for images of class {weights.index(0)} alone: {advice}")
    if isinstance(loss, nn.Module):
        if any(parameter.requires_grad for parameter in loss.parameters()):
            raise ArgumentError(
                f"loss={loss!r} has parameters of its own, which no optimizer here would train: put them into the head."
            )
        loss.to(device)
    if threshold is None and isinstance(loss, _MULTI_LABEL):
        threshold = 0.5
    return FunctionLoss(loss, threshold)


def _check_weights(name: str, values: Weights, num_classes: int) -> Tensor | str | None:
    """Return weights as float32 `(num_classes,)`; None and `"balanced"` stay."""
    if values is None or (isinstance(values, str) and values == BALANCED):
        return values
    try:
        weights = torch.as_tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        weights = torch.empty(0)
    usable = weights.shape == (num_classes,) and bool(((weights >= 0) & weights.isfinite()).all())
    if not usable or not bool(weights.any()):
        raise ArgumentError(
            f"{name}={values!r} cannot be used: expected {num_classes} finite numbers of 0 or more, one for each class "
            f"and not all 0, or {BALANCED!r}."
        )
    return weights


def _text(weights: Weights) -> str:
    return str(weights.tolist() if isinstance(weights, Tensor) else weights)
