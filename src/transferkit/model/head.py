"""A model of a backbone and a head, and how a new head is attached."""

import math
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from transferkit.base.arguments import fraction, one_of, whole_number
from transferkit.base.calls import explain_missing, explained
from transferkit.base.randomness import seeded
from transferkit.base.surroundings import own_surroundings
from transferkit.compute.out_of_memory import is_out_of_memory
from transferkit.data.classes import as_names
from transferkit.errors import ArgumentError, HeadMismatchError, UnknownLayerError, close_matches
from transferkit.model.backbone import Backbone
from transferkit.model.layers import POOLINGS, Layers, Pool
from transferkit.model.modes import modes_kept
from transferkit.model.novelty import Novelty

FLATTEN = "flatten"
POOLING = "halves"
NUM_POOLED = 3  # the last blocks, which a head pools if it is not told

_DEPENDS_ON_MODE = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


class Standardize(nn.Module):
    """Subtracts the mean of each feature of `num_images` images and divides by its standard deviation, float32 `(D,)`.

    `Trainer` measures both before its first step; training does not change them. A feature that varies less than
    the median of its kind, such as the means of one layer, is divided by that median, not to dominate where it varies.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(num_features))
        self.std = nn.Buffer(torch.ones(num_features))
        self.num_images = nn.Buffer(torch.zeros((), dtype=torch.int64))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


class TransferModel(nn.Module):
    """A backbone and a head. Made by `attach_head`.

    Attributes:
        backbone: The `Backbone`.
        head: Maps features to logits `(N, len(classes))`. Features are the pooled outputs of several layers,
            `(N, D, 1, 1)`, or the output of the last one, `(N, 512, h, w)`.
        classes: The class names; class index i is `classes[i]`.
        head_arguments: The arguments from which `attach_head` built the head; None for a user's own head.
        pools: How the outputs of layers are pooled for the head, by the index of the layer in `backbone.features`;
            empty if the head takes the output of the last one.
        threshold: Probability, 0 to 1, from which a label counts as predicted, if an image may have several labels;
            None if each has exactly one. `Trainer` sets it from its loss.
        temperature: Divides logits before they become probabilities, above 0. `Trainer.calibrate` sets it.
        novelty: How unlike the training images an image is; None until `Trainer.learn_known` has measured it.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        classes: Sequence[str],
        head_arguments: dict[str, Any] | None = None,
        pools: dict[int, Pool] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.classes = tuple(classes)
        self.head_arguments = head_arguments
        self.pools = dict(pools or {})
        self.threshold: float | None = None
        self.temperature = 1.0
        self.novelty: Novelty | None = None
        self.kept_in_eval: tuple[str, ...] = ()  # modules that stay in eval mode in training; see `begin_training`
        self.fits: tuple[nn.Module, int] | None = None  # the head and the image size that `check_head` has seen to fit
        self.training = backbone.training  # a run left the backbone in eval mode: it chose no layers of this model

    def __getattr__(self, name: str) -> Any:
        explain_missing(self, name)
        return super().__getattr__(name)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers whose pooled outputs the head takes; empty if it takes the output of the last one."""
        return tuple(self.backbone.layer_names[index] for index in self.pools)

    @property
    def columns(self) -> list[slice]:
        """Slices of the pooled features, one for each kind of number, such as a layer's means or its maxima."""
        kinds = [pool.channels for pool in self.pools.values() for _ in range(pool.size // pool.channels)]
        return [slice(end - size, end) for size, end in zip(kinds, accumulate(kinds), strict=True)]

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `(N, len(classes))` of preprocessed images, float `(N, 3, H, W)`."""
        features = self.backbone(images, self.pools) if self.pools else self.backbone(images)
        return cast("Tensor", self.head(features))

    def split(self) -> tuple[Layers, Layers]:
        """Return prefix and suffix, split where training begins: `suffix(prefix(x))` equals `model(x)`.

        The prefix is the longest sequence of first layers without trainable parameters whose batch norm and dropout
        layers are in eval mode: a pure function of the images that training does not change. Both parts share this
        model's modules. Pooled features of the prefix's layers are part of its output; see `Layers`. In VGG the prefix
        ends with a ReLU or a pooling layer: a ReLU at the start of the suffix, in place, would overwrite its output.

        Example:
            >>> from transferkit import attach_head, freeze_until, load_backbone
            >>> model = attach_head(load_backbone(weights=None, image_size=32), 10)
            >>> prefix, suffix = freeze_until(model, "block5").split()
            >>> len(prefix), len(suffix)  # 24 modules make blocks 1 to 4; 7 make block 5; one is the head
            (24, 8)
        """
        layers = Layers([*self.backbone.features, self.head], self.pools)
        frozen = 0
        for layer in layers:
            drawn = any(part.training for part in layer.modules() if isinstance(part, _DEPENDS_ON_MODE))
            if drawn or any(parameter.requires_grad for parameter in layer.parameters()):
                break
            frozen += 1
        return layers[:frozen], layers[frozen:]


@explained
@own_surroundings()
def attach_head(
    backbone: Backbone,
    classes: int | Sequence[str],
    *,
    layers: Sequence[str] | None = None,
    pooling: str = POOLING,
    hidden: Sequence[int] = (),
    dropout: float = 0.0,
    head: nn.Module | None = None,
) -> TransferModel:
    """Put a new, randomly initialized head on a backbone.

    Args:
        backbone: It becomes part of the model; it is not copied.
        classes: Two or more class names, or their number (the names are then "0", "1", ...). The names of a mapping,
            such as `class_to_idx`, are sorted by their indices.
        layers: The blocks or layers whose outputs the head takes, such as `["block4", "block5"]`; a block stands for
            the output of its last layer. The model leaves out all later layers. None takes the
            last three blocks, or with `pooling="flatten"` the last one.
        pooling: How each layer's output is pooled over its positions: `"avg"`, `"max"`, `"avgmax"` for both, or
            `"halves"` for the mean of the upper half, that of the lower half and the maximum. Pooled outputs are
            concatenated (3 * (256 + 512 + 512) numbers for blocks 3 to 5) and standardized by the training images.
            `"flatten"` keeps every position of the last block (512 * h * w numbers) as it is.
        hidden: Widths of fully connected layers before the last, each followed by ReLU and dropout.
        dropout: Probability of dropping a hidden activation in training, or without `hidden` a feature; at least 0 and
            less than 1.
        head: A module of your own, instead of `hidden` and `dropout`: it maps features to logits
            `(N, len(classes))`. The features are `(N, *backbone.feature_shape)`; with `layers`, pooled `(N, D, 1, 1)`.

    Raises:
        ArgumentError: A value is out of range, class names repeat, or `head` is combined with `hidden`, `dropout` or
            `pooling`.
        UnknownLayerError: The backbone has no such layer.
        HeadMismatchError: `head` does not accept the features or does not return one logit for each class; or
            `backbone` is not a `Backbone`.

    Example:
        >>> from transferkit import load_backbone
        >>> attach_head(load_backbone(weights=None), ["cat", "dog"]).head.logits.in_features  # 3 * (256 + 512 + 512)
        3840

    References:
        Lazebnik, Schmid and Ponce, 2006, "Beyond Bags of Features: Spatial Pyramid Matching": pooling parts of an
        image, for `"halves"`.
    """
    if not isinstance(backbone, Backbone):
        raise HeadMismatchError(
            f"cannot attach a head to a {type(backbone).__name__}: expected a Backbone from load_backbone."
            + (" This model already has a head: pass model.backbone." if isinstance(backbone, TransferModel) else "")
        )
    names = _class_names(classes)
    pooling = one_of("pooling", pooling, (*POOLINGS, FLATTEN))
    if head is not None and (hidden or dropout or pooling != POOLING):
        raise ArgumentError(
            f"hidden={hidden!r}, dropout={dropout!r} and pooling={pooling!r} describe the built-in head: pass these or "
            "head=, not both."
        )
    flat = pooling == FLATTEN if head is None else layers is None
    pools = find_pools(backbone, layers, FLATTEN if flat else pooling)
    if pools and max(pools) < len(backbone.features) - 1:
        backbone = Backbone(backbone.name, backbone.features[: max(pools) + 1], backbone.preprocess)
    arguments = None
    if head is None:
        head = build_head(backbone, pools, len(names), hidden, dropout)
        arguments = {"pooling": pooling, "hidden": list(hidden), "dropout": dropout}
    else:
        head = head.to(torch.float32)  # layers made under another default dtype would not take the features
    model = TransferModel(backbone, head.to(next(backbone.parameters()).device), names, arguments, pools)
    if arguments is not None:
        model.fits = (head, backbone.image_size)
    check_head(model)
    return model


def build_head(
    backbone: Backbone, pools: Mapping[int, Pool], num_classes: int, hidden: Sequence[int], dropout: float
) -> nn.Sequential:
    """Build the head that `attach_head` describes, or raise `ArgumentError` for a value out of range."""
    fraction("dropout", dropout)
    if not isinstance(hidden, Iterable):
        raise ArgumentError(f"hidden={hidden!r} cannot be used: expected a list of widths, such as ({hidden!r},).")
    for width in hidden:
        whole_number("each width of hidden", width)
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    inputs = math.prod(_feature_shape(backbone, pools))
    if pools:
        layers["standardize"] = Standardize(inputs)
    for number, outputs in enumerate(hidden, start=1):
        layers[f"fc{number}"] = nn.Linear(inputs, outputs)
        layers[f"relu{number}"] = nn.ReLU()
        if dropout:
            layers[f"dropout{number}"] = nn.Dropout(dropout)
        inputs = outputs
    if dropout and not hidden:
        layers["dropout"] = nn.Dropout(dropout)
    layers["logits"] = nn.Linear(inputs, num_classes)
    return nn.Sequential(layers)


def _feature_shape(backbone: Backbone, pools: Mapping[int, Pool]) -> tuple[int, int, int]:
    return (sum(pool.size for pool in pools.values()), 1, 1) if pools else backbone.feature_shape


def find_pools(backbone: Backbone, layers: Sequence[str] | None, pooling: str) -> dict[int, Pool]:
    """Return the layers whose outputs a head pools, by index, in forward order; see `attach_head`."""
    if pooling == FLATTEN:
        if layers is not None:
            advice = 'pooling="flatten" takes the last block alone. Leave layers out, or pool them: pooling="halves".'
            raise ArgumentError(f"layers={layers!r} cannot be flattened: {advice}")
        return {}
    layers = backbone.blocks[-NUM_POOLED:] if layers is None else layers
    if isinstance(layers, str) or not isinstance(layers, Collection) or len(layers) == 0:
        raise ArgumentError(f'layers={layers!r} cannot be used: expected a list of names, such as ["block4"].')
    pools: dict[int, Pool] = {}
    for layer in layers:
        matching = [i for i, name in enumerate(backbone.layer_names) if layer in (name, name.split("_")[0])]
        if not matching:
            known = close_matches(layer, [*backbone.blocks, *backbone.layer_names])
            raise UnknownLayerError(f"no output of layer {layer!r}: {backbone.name} has no such layer. {known}")
        if matching[-1] in pools:
            raise ArgumentError(f"layers={layers!r} name {backbone.layer_names[matching[-1]]} twice.")
        pools[matching[-1]] = Pool(pooling, backbone.num_channels(matching[-1]))
    return dict(sorted(pools.items()))


def _class_names(classes: object) -> tuple[str, ...]:
    names = as_names(classes)
    if len(names) < 2:
        got = f"got {len(names)} classes{f' ({names[0]})' if names else ''}: expected 2 or more, with images of each."
        raise ArgumentError(f'{got} For a yes-or-no question these are two, such as ["no", "yes"].')
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ArgumentError(f"class names repeat: {', '.join(repeated)}. Expected {len(names)} different names.")
    return tuple(names)


def check_float32(model: nn.Module, *, trains: bool) -> None:
    """Raise `ArgumentError` for a model of other numbers, weights that cannot train, and an attribute `trainable`."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype != torch.float32:
            advice = "model.float(). Its arithmetic may be shorter, Trainer(model, precision='bf16')."
            raise ArgumentError(f"{name} is {tensor.dtype}: expected a float32 model, {advice}")
        if trains and tensor.is_inference():
            raise ArgumentError(f"{name} was made under torch.inference_mode(), which torch cannot train.")
    for name, module in model.named_modules():
        if "trainable" in vars(module):
            raise ArgumentError(
                f"{name or 'the model'} has an attribute trainable, which freezes nothing in torch: delete it, and use "
                "freeze_until(model, 'head'), or requires_grad_(False) on the layer."
            )


def check_head(model: TransferModel) -> None:
    """Raise `HeadMismatchError` for a head that makes no logits of the backbone's features; remember a good one."""
    if model.fits == (model.head, model.backbone.image_size):
        return
    head, shape, num_classes = model.head, _feature_shape(model.backbone, model.pools), len(model.classes)
    features = torch.zeros(2, *shape, device=next(model.parameters()).device)
    buffers = {name: buffer.clone() for name, buffer in head.named_buffers() if not is_lazy(buffer)}
    try:  # everything that this changes is put back
        with modes_kept(head), seeded(0, features.device):
            outputs = [head.train(mode)(features) for mode in (True, False)]
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, MemoryError) as error:
        if is_out_of_memory(error):
            return  # the first step makes smaller parts, or says so
        reason, expected = str(error).splitlines()[0], f"inputs (N, {', '.join(map(str, shape))})"
        raise HeadMismatchError(
            f"head does not accept the backbone's features: {reason}. Expected a module for {expected}; start it with "
            'nn.Flatten() or a pooling layer. pooling="avg" takes images of any size.'
        ) from error
    finally:
        live = dict(head.named_buffers())
        for name, buffer in buffers.items():
            live[name].data.copy_(buffer)
    for logits in outputs:
        if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, num_classes):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise HeadMismatchError(
                f"head returns {got} for 2 images: expected logits of shape (2, {num_classes}), one for each class. "
                "Change its last layer, or classes."
            )
        if not logits.is_floating_point() or logits.requires_grad < any(p.requires_grad for p in head.parameters()):
            raise HeadMismatchError(
                f"head returns {logits.dtype} numbers through which no gradient goes back to its weights: leave out "
                "detach(), no_grad() and argmax()."
            )
    with torch.no_grad():
        certain = bool((logits >= 0).all() and ((logits.sum(dim=1) - 1).abs() < 1e-5).all())
    if certain or isinstance(list(head.modules())[-1], nn.Softmax | nn.Sigmoid):
        raise HeadMismatchError(
            "head returns probabilities: expected logits, which the loss turns into probabilities. Remove the softmax "
            "or sigmoid at its end."
        )
    model.fits = (head, model.backbone.image_size)
