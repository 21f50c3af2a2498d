"""A model of a backbone and a head, and how a new head is attached."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from transferkit.base.arguments import fraction, one_of, whole_number
from transferkit.errors import ArgumentError, HeadMismatchError
from transferkit.model.backbone import Backbone
from transferkit.model.modes import modes_kept

POOLINGS = ("flatten", "avg", "max")

_DEPENDS_ON_MODE = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


class TransferModel(nn.Module):
    """A backbone and a head. Made by `attach_head`.

    Attributes:
        backbone: The `Backbone`.
        head: Maps features `(N, 512, h, w)` to logits `(N, len(classes))`.
        classes: The class names; class index i is `classes[i]`.
        head_arguments: The arguments that `attach_head` built the head from; None for a user's own head.
        threshold: Probability, 0 to 1, from which a label counts as predicted, if an image may have several labels;
            None if each has exactly one. `Trainer` sets it from its loss.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        classes: Sequence[str],
        head_arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.classes = tuple(classes)
        self.head_arguments = head_arguments
        self.threshold: float | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `(N, len(classes))` of preprocessed images, float `(N, 3, H, W)`."""
        logits: Tensor = self.head(self.backbone(images))
        return logits

    def split(self) -> tuple[nn.Sequential, nn.Sequential]:
        """Return prefix and suffix, split where training begins: `suffix(prefix(x))` equals `model(x)`.

        The prefix is the longest sequence of first layers without trainable parameters whose batch norm and dropout
        layers are in eval mode: a pure function of the images that training does not change. Both parts share this
        model's modules. In VGG the prefix ends with a ReLU or a pooling layer, which have no parameters; a ReLU at the
        start of the suffix would overwrite the prefix's output, because it works in place.

        Example:
            >>> from transferkit import attach_head, freeze_until, load_backbone
            >>> model = attach_head(load_backbone(weights=None, image_size=32), 10)
            >>> prefix, suffix = freeze_until(model, "block5").split()
            >>> len(prefix), len(suffix)  # 24 modules make blocks 1 to 4; 7 make block 5; one is the head
            (24, 8)
        """
        layers = [*self.backbone.features, self.head]
        frozen = 0
        while frozen < len(layers) and _is_frozen(layers[frozen]):
            frozen += 1
        return nn.Sequential(*layers[:frozen]), nn.Sequential(*layers[frozen:])


def attach_head(
    backbone: Backbone,
    classes: int | Sequence[str],
    *,
    hidden: Sequence[int] = (),
    dropout: float = 0.0,
    pooling: str = "flatten",
    head: nn.Module | None = None,
) -> TransferModel:
    """Put a new, randomly initialized head on a backbone.

    Args:
        backbone: It becomes part of the model; it is not copied.
        classes: Two or more class names, or their number (the names are then "0", "1", ...).
        hidden: Widths of fully connected layers before the last, each followed by ReLU and dropout.
        dropout: Probability of dropping a hidden activation in training; at least 0 and less than 1.
        pooling: `"flatten"` keeps every position (512 * h * w inputs); `"avg"` and `"max"` pool over positions (512
            inputs).
        head: A module of your own, instead of `hidden`, `dropout` and `pooling`: it maps features
            `(N, *backbone.feature_shape)` to logits `(N, len(classes))`.

    Raises:
        ArgumentError: A value is out of range, class names repeat, or `head` is combined with `hidden`, `dropout` or
            `pooling`.
        HeadMismatchError: `head` does not accept the features or does not return one logit for each class; or
            `backbone` is not a `Backbone`.

    Example:
        >>> from transferkit import load_backbone
        >>> model = attach_head(load_backbone(weights=None), ["cat", "dog"], hidden=(4096, 4096))
        >>> model.head.fc1.in_features  # 512 * 7 * 7
        25088
    """
    if not isinstance(backbone, Backbone):
        raise HeadMismatchError(
            f"cannot attach a head to a {type(backbone).__name__}: expected a Backbone from load_backbone."
            + (" This model already has a head: pass model.backbone." if isinstance(backbone, TransferModel) else "")
        )
    names = _class_names(classes)
    arguments = None
    if head is None:
        head = build_head(backbone.feature_shape, len(names), hidden, dropout, pooling)
        arguments = {"hidden": list(hidden), "dropout": dropout, "pooling": pooling}
    elif hidden or dropout or pooling != "flatten":
        raise ArgumentError(
            f"hidden={hidden!r}, dropout={dropout!r} and pooling={pooling!r} describe the built-in head, but head= is "
            "also given. Pass one or the other."
        )
    else:
        _check_head(head, backbone.feature_shape, len(names))
    parameter = next(backbone.parameters())
    return TransferModel(backbone, head.to(parameter.device), names, arguments)


def build_head(
    feature_shape: tuple[int, int, int], num_classes: int, hidden: Sequence[int], dropout: float, pooling: str
) -> nn.Sequential:
    """Build the head that `attach_head` describes, for features of shape `(C, h, w)`.

    Raises:
        ArgumentError: A value is out of range.
    """
    one_of("pooling", pooling, POOLINGS)
    fraction("dropout", dropout)
    if not isinstance(hidden, Iterable):
        raise ArgumentError(f"hidden={hidden!r} cannot be used: expected a list of widths, such as ({hidden!r},).")
    for width in hidden:
        whole_number("each width of hidden", width)
    channels, height, width = feature_shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if pooling == "avg":
        layers["pool"] = nn.AdaptiveAvgPool2d(1)  # (N, 512, h, w) -> (N, 512, 1, 1)
    elif pooling == "max":
        layers["pool"] = nn.AdaptiveMaxPool2d(1)
    layers["flatten"] = nn.Flatten()
    inputs = channels * height * width if pooling == "flatten" else channels
    for number, outputs in enumerate(hidden, start=1):
        layers[f"fc{number}"] = nn.Linear(inputs, outputs)
        layers[f"relu{number}"] = nn.ReLU()
        if dropout:
            layers[f"dropout{number}"] = nn.Dropout(dropout)
        inputs = outputs
    layers["logits"] = nn.Linear(inputs, num_classes)
    return nn.Sequential(layers)


def _class_names(classes: int | Sequence[str]) -> tuple[str, ...]:
    if isinstance(classes, str):
        raise ArgumentError(f"classes={classes!r} is one string: expected a list of class names, or their number.")
    if isinstance(classes, Integral):  # numpy's integers too, such as targets.max() + 1
        classes = [str(index) for index in range(int(classes))]
    if not isinstance(classes, Iterable):
        raise ArgumentError(f"classes={classes!r} cannot be used: expected a list of class names, or their number.")
    names = tuple(str(name) for name in classes)
    if len(names) < 2:
        raise ArgumentError(
            f"classes={classes!r} gives {len(names)} classes: expected 2 or more. For a yes-or-no question pass two, "
            'such as ["no", "yes"].'
        )
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ArgumentError(f"class names repeat: {', '.join(repeated)}. Expected {len(names)} different names.")
    return names


def _check_head(head: nn.Module, feature_shape: tuple[int, int, int], num_classes: int) -> None:
    """Run the head once on zeros, in eval mode so that its state does not change, and check its output."""
    parameter = next(head.parameters(), torch.empty(0))
    features = torch.zeros(2, *feature_shape, device=parameter.device)
    try:
        with torch.no_grad(), modes_kept(head):
            logits = head.eval()(features)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise HeadMismatchError(
            f"head does not accept the backbone's features: {str(error).splitlines()[0]}. Expected a module for inputs "
            f"(N, {', '.join(map(str, feature_shape))}); start it with nn.Flatten() or a pooling layer."
        ) from error
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, num_classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise HeadMismatchError(
            f"head returns {got} for 2 images: expected logits of shape (2, {num_classes}), one for each class. Change "
            "its last layer, or classes."
        )


def _is_frozen(layer: nn.Module) -> bool:
    if any(p.requires_grad for p in layer.parameters()):
        return False
    return not any(m.training for m in layer.modules() if isinstance(m, _DEPENDS_ON_MODE))
