"""VGG's convolutions with their names, their preprocessing and their weights."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_builder, get_model_weights

from transferkit.base.arguments import one_of
from transferkit.base.arrays import digest_tensors
from transferkit.data.preprocessing import CONVENTIONS, Preprocessing, find_convention
from transferkit.errors import ArgumentError, ImageError, PreprocessingError, close_matches
from transferkit.model.weights import (
    check_is_file,
    checked_state_dict,
    download,
    is_published,
    load_exactly,
    read_state_dict,
)

MODELS = ("vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn")
MIN_IMAGE_SIZE = 32  # five poolings by two leave one pixel


class Backbone(nn.Module):
    """The convolution part of a VGG network. Made by `load_backbone`.

    State-dict keys are torchvision's (`features.N.weight`).

    Attributes:
        name: `"vgg16"`, ...
        features: torchvision's `Sequential`; module N is called `layer_names[N]` too.
        layer_names: One name for each module of `features`, in forward order: `block1_conv1`, `block1_relu1`, ...,
            `block5_pool`, and `block1_bn1`, ... in the `_bn` variants.
        preprocess: Raw uint8 images of any size to model input; see `Preprocessing`.
        image_size: Height and width of the input, in pixels.
        feature_shape: Shape of one image's output, `(512, image_size // 32, image_size // 32)`.
    """

    def __init__(self, name: str, features: nn.Sequential, preprocess: Preprocessing) -> None:
        super().__init__()
        self.name = name
        self.features = features
        self.layer_names = _layer_names(features)
        self.preprocess = preprocess

    @property
    def image_size(self) -> int:
        return self.preprocess.image_size

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        channels = [module.out_channels for module in self.features if isinstance(module, nn.Conv2d)][-1]  # 512
        return (channels, self.image_size // 32, self.image_size // 32)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features `(N, 512, H // 32, W // 32)` of preprocessed images `(N, 3, H, W)`.

        Raises:
            ImageError: The images are raw (uint8), not four-dimensional, not of 3 channels or under 32 pixels.
        """
        if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
            raise ImageError(
                f"cannot compute features of images of shape {tuple(images.shape)} and type {images.dtype}: expected "
                "preprocessed images, float (N, 3, H, W). Raw uint8 images go through backbone.preprocess first."
            )
        if min(images.shape[2:]) < MIN_IMAGE_SIZE:
            raise ImageError(
                f"cannot compute features of images of {images.shape[2]}x{images.shape[3]} pixels: expected "
                f"{MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE} or more, since five poolings halve them. Resize them first; "
                "backbone.preprocess does that for raw uint8 images."
            )
        features: Tensor = self.features(images)
        return features

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal digits, of name, preprocessing and weights, whatever device the weights are on.

        Two backbones with the same fingerprint give the same features. Every use reads every weight: 0.1 s for VGG16.
        """
        digest = hashlib.sha256(f"{self.name} {self.preprocess}".encode())
        digest_tensors(digest, self.state_dict())
        return digest.hexdigest()


def load_backbone(
    name: str = "vgg16",
    *,
    weights: WeightsEnum | str | os.PathLike[str] | Mapping[str, Tensor] | None = "DEFAULT",
    image_size: int = 224,
    preprocessing: str | Preprocessing = "auto",
) -> Backbone:
    """Load the convolutions of a VGG network; its classifier is left behind.

    Args:
        name: `"vgg11"`, `"vgg13"`, `"vgg16"`, `"vgg19"`, or one of these with `"_bn"` (batch norm).
        weights: A torchvision weights enum or its name (`"DEFAULT"`, `"IMAGENET1K_V1"`, for VGG16 also
            `"IMAGENET1K_FEATURES"`), downloaded once and verified at every use; the path of a state dict, which
            never touches the network; a state dict; or None for random weights. Keys of the classifier are ignored.
        image_size: Height and width, in pixels, that images are resized to; 32 or more.
        preprocessing: `"auto"` takes what belongs to named weights. For a path or a state dict say which of the
            three conventions its weights were trained with: `"IMAGENET1K_V1"`, `"IMAGENET1K_FEATURES"` (the original
            VGG weights), `"KERAS"`, or a `Preprocessing`.

    Raises:
        ArgumentError: No such network, weights or convention; image size under 32.
        PreprocessingError: `preprocessing="auto"` with a path or state dict that does not tell.
        WeightsError: The weights are damaged or belong to another network.
        WeightsDownloadError: Named weights are not here and cannot be downloaded.

    Example:
        >>> backbone = load_backbone("vgg16", weights=None, image_size=64)
        >>> backbone.feature_shape
        (512, 2, 2)
        >>> images = torch.zeros(1, 3, 480, 640, dtype=torch.uint8)
        >>> backbone(backbone.preprocess(images)).shape
        torch.Size([1, 512, 2, 2])

    References:
        Simonyan and Zisserman, 2014, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
        arXiv:1409.1556.
    """
    one_of("name", name, MODELS)
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < MIN_IMAGE_SIZE:
        raise ArgumentError(
            f"image_size={image_size!r} cannot be used: expected a whole number of {MIN_IMAGE_SIZE} pixels or more, "
            f"since five poolings halve the image. Small images can be enlarged: image_size={MIN_IMAGE_SIZE}."
        )
    weights = _find_weights(weights, name)
    convention = _find_preprocessing(preprocessing, weights, name)
    state = _read_weights(weights)

    with torch.device("meta"):  # no memory for the 124 million parameters of the classifier
        features: nn.Sequential = get_model_builder(name)(weights=None, init_weights=False).features
    features.to_empty(device="cpu")
    backbone = Backbone(name, features, convention.with_image_size(image_size))
    _initialize(features)
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
        f"which preprocessing belongs to the weights from {_origin(weights)} is not known: images prepared in another "
        f"way give poor features and no error. Pass preprocessing= one of {', '.join(map(repr, CONVENTIONS))}, or a "
        "transferkit.Preprocessing."
    )


def _find_weights(weights: object, name: str) -> object:
    """Return a torchvision enum for a name of weights, all else as it is, having checked that it can be weights."""
    known = get_model_weights(name)
    if isinstance(weights, str) and weights in known.__members__:
        return known[weights]
    if isinstance(weights, WeightsEnum) and not isinstance(weights, known):
        raise ArgumentError(
            f"weights={weights} belong to another network: expected one of {', '.join(map(str, known))} for "
            f"name={name!r}."
        )
    if isinstance(weights, str) and not Path(weights).exists() and not Path(weights).suffix:
        raise ArgumentError(
            f"weights={weights!r} is neither a file nor a name of weights for {name}. "
            f"{close_matches(weights, known.__members__)} A path to a state dict, a state dict, or None (random) serve "
            "as well."
        )
    if isinstance(weights, str | os.PathLike):
        check_is_file(Path(weights))
    return weights


def _read_weights(weights: object) -> Mapping[str, Tensor] | None:
    if weights is None:
        return None
    if isinstance(weights, WeightsEnum):
        return read_state_dict(download(weights.url))
    if isinstance(weights, str | os.PathLike):
        return read_state_dict(weights)
    return checked_state_dict(weights, _origin(weights))


def _origin(weights: object) -> str:
    if isinstance(weights, str | os.PathLike | WeightsEnum):
        return str(weights)
    return "the mapping given" if isinstance(weights, Mapping) else f"the {type(weights).__name__} given"


def _layer_names(features: nn.Sequential) -> tuple[str, ...]:
    """Name each module by its block and its place there: Keras's names for convolutions and pools, and like ones."""
    kinds = {nn.Conv2d: "conv", nn.BatchNorm2d: "bn", nn.ReLU: "relu"}
    names, block, convolution = [], 1, 0
    for module in features:
        if isinstance(module, nn.MaxPool2d):
            names.append(f"block{block}_pool")
            block, convolution = block + 1, 0
            continue
        convolution += isinstance(module, nn.Conv2d)
        names.append(f"block{block}_{kinds[type(module)]}{convolution}")
    return tuple(names)


def _initialize(features: nn.Sequential) -> None:
    """Initialize as torchvision does: He et al., 2015, arXiv:1502.01852, for the convolutions."""
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type] # VGG's convolutions all have a bias
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
