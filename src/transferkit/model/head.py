"""A new head on a backbone."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from transferkit.base.arguments import fraction, one_of, whole_number
from transferkit.errors import ArgumentError, HeadMismatchError
from transferkit.model.backbone import Backbone

POOLINGS = ("flatten", "avg", "max")

_DEPENDS_ON_MODE = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


class TransferModel(nn.Module):
    """A backbone and a head. Made by `attach_head`.

    Attributes:
        backbone: The `Backbone`.
        head: Features `(N, 512, h, w)` to logits `(N, len(classes))`.
        classes: The class names; class index i is `classes[i]`.
        head_arguments: What `attach_head` built the head from; None if the head is the user's own.
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

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `(N, len(classes))` of preprocessed images, float `(N, 3, H, W)`."""
        logits: Tensor = self.head(self.backbone(images))
        return logits

    def split(self) -> tuple[nn.Sequential, nn.Sequential]:
        """Return prefix and suffix, cut where training begins: `suffix(prefix(x))` is `model(x)`.

        The prefix is the longest run of first layers that have no trainable parameter and are in eval mode wherever
        that matters: a pure function of the images that training does not change. Both parts share this model's
        modules. VGG's cut falls behind a ReLU or a pool, since those in between have no parameters; its ReLUs
        work in place and would overwrite what lies before them.

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
        classes: The class names, or their number (then they are named "0", "1", ...). Two or more.
        hidden: Widths of fully connected layers before the last, each followed by ReLU and dropout.
        dropout: Share of hidden activations dropped while training, 0 up to but not including 1.
        pooling: `"flatten"` keeps every position (512 * h * w inputs), `"avg"` and `"max"` pool them (512 inputs).
        head: A module of your own instead: features `(N, *backbone.feature_shape)` to logits `(N, len(classes))`.
            `hidden`, `dropout` and `pooling` then have no place.

    Raises:
        ArgumentError: A value out of range, or class names that repeat.
        HeadMismatchError: `head` does not take the features or does not give one logit for each class; or `backbone`
            has a head already.

    Example:
        >>> from transferkit import load_backbone
        >>> model = attach_head(load_backbone(weights=None), ["cat", "dog"], hidden=(4096, 4096))
        >>> model.head.fc1.in_features  # 512 * 7 * 7
        25088
    """
    if not isinstance(backbone, Backbone):
        raise HeadMismatchError(
            f"cannot attach a head to a {type(backbone).__name__}: expected a Backbone from load_backbone."
            + (" This model has a head already; use model.backbone." if isinstance(backbone, TransferModel) else "")
        )
    names = _class_names(classes)
    arguments = None
    if head is None:
        head = build_head(backbone.feature_shape, len(names), hidden, dropout, pooling)
        arguments = {"hidden": list(hidden), "dropout": dropout, "pooling": pooling}
    elif hidden or dropout or pooling != "flatten":
        raise ArgumentError(
            f"hidden={hidden!r}, dropout={dropout!r} and pooling={pooling!r} describe the built-in head, but head= "
            "gives one already. Pass one or the other."
        )
    else:
        _check_head(head, backbone.feature_shape, len(names))
    parameter = next(backbone.parameters())
    return TransferModel(backbone, head.to(parameter.device), names, arguments)


def build_head(
    feature_shape: tuple[int, int, int], num_classes: int, hidden: Sequence[int], dropout: float, pooling: str
) -> nn.Sequential:
    """Build the head that `attach_head` describes, for features of a shape `(C, h, w)`.

    Raises:
        ArgumentError: A value out of range.
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
    if isinstance(classes, Integral):  # numpy's too: targets.max() + 1
        classes = [str(index) for index in range(int(classes))]
    if not isinstance(classes, Iterable):
        raise ArgumentError(f"classes={classes!r} cannot be used: expected a list of class names, or their number.")
    names = tuple(str(name) for name in classes)
    if len(names) < 2:
        raise ArgumentError(
            f"classes={classes!r} makes {len(names)} classes: expected 2 or more. For a yes-or-no question pass two, "
            'such as ["no", "yes"].'
        )
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ArgumentError(f"class names repeat: {', '.join(repeated)}. Expected each of the {len(names)} once.")
    return names


def _check_head(head: nn.Module, feature_shape: tuple[int, int, int], num_classes: int) -> None:
    """Run the head once on zeros, in eval mode, so that it keeps its state."""
    modes = {module: module.training for module in head.modules()}
    parameter = next(head.parameters(), torch.empty(0))
    features = torch.zeros(2, *feature_shape, device=parameter.device)
    try:
        with torch.no_grad():
            logits = head.eval()(features)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise HeadMismatchError(
            f"head does not take the backbone's features: {str(error).splitlines()[0]}. Expected a module that takes "
            f"(N, {', '.join(map(str, feature_shape))}); begin it with nn.Flatten() or a pooling."
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, num_classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise HeadMismatchError(
            f"head gives {got} for 2 images: expected logits of shape (2, {num_classes}), one for each class. Change "
            "its last layer, or classes."
        )


def _is_frozen(layer: nn.Module) -> bool:
    if any(p.requires_grad for p in layer.parameters()):
        return False
    return not any(m.training for m in layer.modules() if isinstance(m, _DEPENDS_ON_MODE))
