"""VGG's convolutional layers with their names, preprocessing and weights."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_builder, get_model_weights

from transferkit.base.arguments import one_of
from transferkit.base.arrays import sha256_of
from transferkit.base.calls import explain_missing, explained
from transferkit.base.files import kind_of
from transferkit.base.surroundings import own_surroundings
from transferkit.data.preprocessing import CONVENTIONS, Preprocessing, find_convention
from transferkit.errors import ArgumentError, ImageError, PreprocessingError, close_matches
from transferkit.model.layers import Pool, run_layers
from transferkit.model.weights import (
    check_is_file,
    checked_state_dict,
    download,
    is_published,
    load_exactly,
    read_state_dict,
)

MIN_IMAGE_SIZE = 32  # five pooling layers halve it to one pixel
MODELS = ("vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn")


class Backbone(nn.Module):
    """The convolutional part of a VGG network. Made by `load_backbone`.

    State-dict keys are torchvision's (`features.N.weight`).

    Attributes:
        name: Name of the network, such as `"vgg16"`.
        features: torchvision's convolutions, batch norms, ReLUs and max-pooling layers; another layer is an
            `ArgumentError`. Module N is also called `layer_names[N]`.
        layer_names: One name for each module of `features`, in forward order: `block1_conv1`, `block1_relu1`, ...,
            `block5_pool`, and `block1_bn1`, ... in the `_bn` variants.
        blocks: Names of the blocks, in forward order: `block1`, ..., `block5`.
        preprocess: Maps raw uint8 images of any size to model input; see `Preprocessing`.
        image_size: Height and width of the input, in pixels.
        feature_shape: Shape of one image's output, `(512, image_size // 32, image_size // 32)` behind all five blocks.
    """

    def __init__(self, name: str, features: nn.Sequential, preprocess: Preprocessing) -> None:
        super().__init__()
        self.name = name
        self.features = features
        self.layer_names = _layer_names(features)
        self.preprocess = preprocess

    def __getattr__(self, name: str) -> Any:
        explain_missing(self, name)
        return super().__getattr__(name)

    def __repr__(self) -> str:
        """Say in one line what it is, with the names that `freeze_until` takes."""
        layers = zip(self.layer_names, self.features, strict=True)
        trains = {name.split("_")[0] for name, layer in layers if any(p.requires_grad for p in layer.parameters())}
        frozen = ", ".join(block for block in self.blocks if block not in trains) or "none"
        return f"Backbone({self.name}, {self.image_size} px, {', '.join(self.blocks)}; frozen: {frozen})"

    @property
    def blocks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.split("_")[0] for name in self.layer_names))

    @property
    def image_size(self) -> int:
        return self.preprocess.image_size

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        halvings = sum(isinstance(module, nn.MaxPool2d) for module in self.features)
        side = self.image_size // 2**halvings
        return (self.num_channels(len(self.features) - 1), side, side)

    def is_trained(self) -> bool:
        """Return whether weights of a network of `load_backbone` have been trained: it begins with biases of 0."""
        biases = [parameter for name, parameter in self.named_parameters() if name.endswith("bias")]
        return self.name in MODELS and any(bool(bias.any()) for bias in biases)  # host sync

    def num_channels(self, index: int) -> int:
        """Return the number of output channels of `features[index]`."""
        convolutions = [module for module in self.features[: index + 1] if isinstance(module, nn.Conv2d)]
        return convolutions[-1].out_channels

    def forward(self, images: Tensor, pools: Mapping[int, Pool] | None = None) -> Tensor:
        """Return the features `(N, 512, H // 32, W // 32)` of preprocessed images `(N, 3, H, W)`.

        With `pools`, return the pooled outputs of these layers instead, `(N, D, 1, 1)`, the last layer among them; see
        `Layers`. Images that are raw (uint8), not of that shape, or smaller than 32 pixels are an `ImageError`.
        """
        if isinstance(images, torch.fx.Proxy):  # symbolic tracing: there is no shape to look at
            return run_layers(list(self.features), images, pools if isinstance(pools, Mapping) else {})
        if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
            raise ImageError(
                f"cannot compute features of images of shape {tuple(images.shape)} and dtype {images.dtype}: expected "
                "float (N, 3, H, W). Apply backbone.preprocess to raw uint8 images first."
            )
        if min(images.shape[2:]) < MIN_IMAGE_SIZE:
            raise ImageError(
                f"cannot compute features of images of {images.shape[2]}x{images.shape[3]} pixels: expected "
                f"{MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE} or more. backbone.preprocess resizes raw uint8 images."
            )
        return run_layers(list(self.features), images, pools) if pools else cast("Tensor", self.features(images))

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal digits, of name, preprocessing and weights, on any device.

        Backbones of one fingerprint compute the same features. Each access reads all weights: 0.1 s for VGG16.
        """
        return sha256_of(self.state_dict(), begin=f"{self.name} {self.preprocess}")


@explained
@own_surroundings()
def load_backbone(
    name: str = "vgg16",
    *,
    weights: WeightsEnum | str | os.PathLike[str] | Mapping[str, Tensor] | None = "DEFAULT",
    image_size: int = 224,
    preprocessing: str | Preprocessing = "auto",
    geometry: str | None = None,
) -> Backbone:
    """Load the convolutional part of a VGG network (Simonyan and Zisserman, 2014, arXiv:1409.1556), not its classifier.

    Args:
        name: `"vgg11"`, `"vgg13"`, `"vgg16"`, `"vgg19"`, or one of these with `"_bn"` (batch norm).
        weights: A torchvision weights enum or its name (`"DEFAULT"`, `"IMAGENET1K_V1"`, for VGG16 also
            `"IMAGENET1K_FEATURES"`), downloaded once and verified at every use; the path of a state dict, read without
            network access; a state dict; or None for random weights. Keys of the classifier are ignored.
        image_size: Height and width, in pixels, that images are resized to; 32 or more. A pair of equal numbers also
            works.
        preprocessing: `"auto"` selects the convention that belongs to named weights. For a path or a state dict, name
            the convention its weights were trained with: `"IMAGENET1K_V1"`, `"IMAGENET1K_FEATURES"` (the original VGG
            weights), `"KERAS"`, or a `Preprocessing`.
        geometry: How an image of another shape becomes a square: `"crop"`, `"torchvision"`, `"letterbox"` or
            `"squash"`; see `Preprocessing`. None takes that of `preprocessing`, which is `"crop"` for a name.

    Raises:
        ArgumentError: `name`, `weights`, `preprocessing` or `geometry` is not known, or `image_size` is under 32.
        PreprocessingError: `preprocessing="auto"` and the weights come from a path or state dict that does not
            identify its convention.
        WeightsError: The weights are damaged or belong to another network.
        WeightsDownloadError: Named weights are not in the local cache and cannot be downloaded.

    Example:
        >>> backbone = load_backbone("vgg16", weights=None, image_size=64)
        >>> backbone.feature_shape
        (512, 2, 2)
        >>> images = torch.zeros(1, 3, 480, 640, dtype=torch.uint8)
        >>> backbone(backbone.preprocess(images)).shape
        torch.Size([1, 512, 2, 2])
    """
    name = one_of("name", name, MODELS)
    pair: Any = image_size  # of equal numbers, as others write sizes
    if isinstance(pair, tuple | list) and len(pair) > 1 and pair[0] == pair[1] and list(pair[2:]) in ([], [3]):
        image_size = pair[0]
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < MIN_IMAGE_SIZE:
        raise ArgumentError(
            f"image_size={image_size!r} cannot be used: expected a whole number of {MIN_IMAGE_SIZE} pixels or more, "
            f"since five pooling layers halve the image. Smaller images are enlarged: image_size={MIN_IMAGE_SIZE}."
        )
    weights = _find_weights(weights, name)
    convention = _find_preprocessing(preprocessing, weights, name)
    geometry = convention.geometry if geometry is None else geometry
    convention = replace(convention, image_size=image_size, geometry=geometry)
    state: Mapping[str, Tensor] | None = None
    if isinstance(weights, str | os.PathLike | WeightsEnum):
        state = read_state_dict(download(weights.url) if isinstance(weights, WeightsEnum) else weights)
    elif weights is not None:
        state = checked_state_dict(weights, _origin(weights))
    with torch.device("meta"):  # takes no memory for the classifier's 124 million parameters
        features: nn.Sequential = get_model_builder(name)(weights=None, init_weights=False).features
    features.to_empty(device="cpu")
    for module in features:  # as torchvision does: He et al., 2015, arXiv:1502.01852
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type] # VGG's convolutions all have a bias
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    backbone = Backbone(name, features, convention)
    if state is not None:
        convolutions = {key: value for key, value in state.items() if not key.startswith("classifier.")}
        load_exactly(backbone, convolutions, origin=_origin(weights))
    return backbone


def _find_preprocessing(preprocessing: object, weights: object, name: str) -> Preprocessing:
    if isinstance(preprocessing, Preprocessing):
        return preprocessing
    if preprocessing != "auto":
        return find_convention(str(preprocessing))
    if weights is None:
        return CONVENTIONS["IMAGENET1K_V1"]
    if isinstance(weights, WeightsEnum):
        return CONVENTIONS[weights.name]
    if isinstance(weights, str | os.PathLike):
        for member in get_model_weights(name):
            if Path(weights).name == member.url.rsplit("/", 1)[-1] and is_published(Path(weights)):
                return CONVENTIONS[member.name]
    raise PreprocessingError(
        f"the preprocessing for the weights from {_origin(weights)} is unknown, and a wrong one gives poor features. "
        f"Pass preprocessing= one of {', '.join(map(repr, CONVENTIONS))}, or a transferkit.Preprocessing."
    )


def _find_weights(weights: object, name: str) -> object:
    """Return the torchvision enum for a name of weights; check other values and return them unchanged."""
    known = get_model_weights(name)
    if isinstance(weights, str) and weights.upper() in (*known.__members__, "IMAGENET"):  # Keras's name of the default
        return known["DEFAULT" if weights.upper() == "IMAGENET" else weights.upper()]
    if isinstance(weights, WeightsEnum) and not isinstance(weights, known):
        raise ArgumentError(
            f"weights={weights} are for another network: expected {', '.join(map(str, known))} for name={name!r}."
        )
    if isinstance(weights, str) and kind_of(weights) == "nothing" and not Path(weights).suffix:
        raise ArgumentError(
            f"weights={weights!r} is neither a file nor a name of weights for {name}. "
            f"{close_matches(weights, known.__members__)} Or pass a state dict, its path, or None (random weights)."
        )
    if isinstance(weights, str | os.PathLike):
        check_is_file(Path(weights))
    return weights


def _origin(weights: object) -> str:
    if isinstance(weights, str | os.PathLike | WeightsEnum):
        return str(weights)
    return "the mapping given" if isinstance(weights, Mapping) else f"the {type(weights).__name__} given"


def _layer_names(features: nn.Sequential) -> tuple[str, ...]:
    """Name each module by its block and its position there, as Keras names VGG's convolutions and pooling layers."""
    kinds = {nn.Conv2d: "conv", nn.BatchNorm2d: "bn", nn.ReLU: "relu", nn.MaxPool2d: "pool"}
    names, block, convolution = [], 1, 0
    for index, module in enumerate(features):
        kind = next((kinds[known] for known in kinds if isinstance(module, known)), None)
        if kind is None:
            raise ArgumentError(
                f"features[{index}] is a {type(module).__name__}: expected VGG's layers: Conv2d, BatchNorm2d, "
                "ReLU and MaxPool2d."
            )
        convolution += kind == "conv"
        names.append(f"block{block}_{kind}{'' if kind == 'pool' else convolution}")
        if kind == "pool":
            block, convolution = block + 1, 0
    return tuple(names)
