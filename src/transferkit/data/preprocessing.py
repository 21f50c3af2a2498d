"""Raw uint8 images to VGG's input: the geometry that makes them square, and the conventions of weights."""

from dataclasses import dataclass, replace
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from transferkit.base.arguments import one_of
from transferkit.data.conversions import conversion
from transferkit.data.images import as_images
from transferkit.data.resizing import PILLOW_BITS, resize_as_pillow, resize_to_middle
from transferkit.errors import ImageError

Triple = tuple[float, float, float]

GEOMETRIES = ("crop", "torchvision", "letterbox", "squash")

MOST_PIXELS = 8  # times those of the result may a resized image have before its middle is cut out


@dataclass(frozen=True)
class Preprocessing:
    """Makes a batch of images square, of one size, and normalizes it.

    Attributes:
        name: The convention's name, which checkpoints store.
        mean: Mean of each channel, on the scale 0 to 255, in the network's channel order.
        std: Standard deviation of each channel, in the same scale and order.
        channels: Which of the R, G, B channels comes first, second, third: (0, 1, 2) is RGB, (2, 1, 0) BGR.
        image_size: Height and width of the result, in pixels.
        geometry: How an image of another shape becomes square. `"crop"` resizes its shorter side to `image_size` and
            keeps the middle. `"torchvision"` is the geometry of torchvision's own transforms
            (`VGG16_Weights.IMAGENET1K_V1.transforms()`): the shorter side becomes 256/224 of `image_size`, the middle
            is kept, and sizes are truncated. `"letterbox"` resizes the longer side to `image_size` and adds bars of
            the mean color. `"squash"` resizes both sides, so that only the proportions are lost. Any other is an
            `ArgumentError`.
        scaled_decoding: Whether a JPEG file is decoded at an eighth, a quarter or half of its size if that divides both
            sides and is at least twice the size it is resized to. Never for `"torchvision"`.

    Example:
        >>> images = torch.zeros(2, 3, 40, 50, dtype=torch.uint8)
        >>> CONVENTIONS["KERAS"].with_image_size(32)(images).shape
        torch.Size([2, 3, 32, 32])
    """

    name: str
    mean: Triple
    std: Triple
    channels: tuple[int, int, int] = (0, 1, 2)
    image_size: int = 224
    geometry: str = "crop"
    scaled_decoding: bool = True

    def __post_init__(self) -> None:
        known = one_of("geometry", self.geometry, GEOMETRIES)  # in lower case
        object.__setattr__(self, "geometry", known)  # as dataclasses set the fields of frozen ones

    def __call__(self, images: Tensor | list[Tensor]) -> Tensor:
        """Return raw images as model input, float32 `(N, 3, image_size, image_size)`, on the device that they are on.

        They are uint8 `(N, 3, H, W)`, RGB, 0 to 255, of any size; or a list of images `(3, H, W)` of different sizes.
        Another shape or dtype, or an empty list, is an `ImageError`.
        """
        return self.normalize(self.resize(images))

    def resize(self, images: Tensor | list[Tensor]) -> Tensor:
        """Return images made square by the geometry: uint8 `(N, 3, image_size, image_size)`; errors as in `__call__`.

        Interpolation is bilinear with antialiasing, rounded to uint8, so an image gives the same pixels in any batch.
        Of an image much longer than wide only the middle is computed, which bounds memory.
        """
        if isinstance(images, list):
            if not images:
                raise ImageError("cannot preprocess an empty list: expected one or more images, uint8 (3, H, W).")
            return torch.cat([self.resize(image[None]) for image in images])
        images = as_images(images)
        if images.dtype != torch.uint8:
            lines = conversion(images, "images", ndim=4)
            raise ImageError(
                f"cannot preprocess images of shape {tuple(images.shape)} and dtype {images.dtype}: expected raw "
                f"images, uint8 (N, 3, H, W). {f'Write: {lines}' if lines else 'Are they preprocessed already?'}"
            )
        size = self.image_size
        high, wide = self._sides_of(*images.shape[2:])
        if high * wide > MOST_PIXELS * size**2:
            return resize_to_middle(images, (high, wide), size, bits=self.weight_bits)
        return self._cut(self._scale(images, high, wide))

    def shrink(self, image: Tensor) -> Tensor:
        """Return a raw image `(3, H, W)` on the CPU in no more pixels than `resize` needs to give the same."""
        high, wide = self._sides_of(*image.shape[1:])
        if image.dtype != torch.uint8 or high * wide >= image[0].numel():  # preprocessed, or small enough
            return image
        if self.geometry != "torchvision":
            return self.resize(image[None])[0]
        return self._scale(image[None], high, wide)[0]  # what is cut already would be resized once more

    def request_size(self, file: Image.Image) -> None:
        """Let a file that has not been decoded yet be decoded at the size that `scaled_decoding` allows."""
        if self.scaled_decoding and self.geometry != "torchvision":
            (width, height), (high, wide) = file.size, self._sides_of(file.height, file.width)
            most = min(width // (2 * wide), height // (2 * high))
            # rounded sides would change the proportions, and so what is cut out
            scale = next((each for each in (8, 4, 2) if each <= most and width % each == height % each == 0), 1)
            file.draft(None, (width // scale, height // scale))

    def _scale(self, images: Tensor, high: int, wide: int) -> Tensor:
        if self.weight_bits and images.device.type == "cpu":
            return resize_as_pillow(images, high, wide)
        from torchvision.transforms.v2 import functional as transforms  # takes 0.2 s: not at import

        return cast("Tensor", transforms.resize(images, [high, wide], antialias=True))

    def _cut(self, images: Tensor) -> Tensor:
        size, (high, wide) = self.image_size, images.shape[2:]
        if (high, wide) == (size, size):
            return images
        from torchvision.transforms.v2 import functional as transforms

        if self.geometry == "letterbox":
            top, left = round((size - high) / 2), round((size - wide) / 2)
            bars = [left, top, size - wide - left, size - high - top]
            images = transforms.pad(images, bars, fill=self.bar_color)
        return cast("Tensor", transforms.center_crop(images, [size, size]))

    def _sides_of(self, height: int, width: int) -> tuple[int, int]:
        high, wide = self.resized_sides(torch.tensor([height, width], dtype=torch.float64)).tolist()
        return int(high), int(wide)

    def resized_sides(self, sides: Tensor) -> Tensor:
        """Return height and width to which images are resized, before the middle is cut out or bars are added.

        Like theirs, `sides`, they are float64 `(2,)`: a tensor, so that `torch.export` can trace this.
        """
        size = self.image_size
        if self.geometry == "squash":
            return torch.full_like(sides, size)
        if self.geometry == "letterbox":
            return (sides * size / sides.max()).round().clamp(min=1)
        if self.geometry == "torchvision":
            return (sides * (size * 256 // 224) / sides.min()).floor()
        return (sides * size / sides.min()).round()

    @property
    def weight_bits(self) -> int | None:
        """Bits of resizing's weights, Pillow's as in torchvision's transforms of PIL images, or None for torch's."""
        return PILLOW_BITS if self.geometry == "torchvision" else None

    @property
    def bar_color(self) -> list[int]:
        """R, G and B of a letterbox's bars, the mean, which normalizing makes 0, as convolutions pad an image."""
        color = dict(zip(self.channels, self.mean, strict=True))
        return [min(max(round(color[channel]), 0), 255) for channel in range(3)]

    def normalize(self, images: Tensor) -> Tensor:
        """Return RGB images, uint8 `(N, 3, H, W)`, as float32 in the network's channel order and scale."""
        # mean and std are Python numbers: no device to match, and no dtype to promote
        planes = zip(self.channels, self.mean, self.std, strict=True)
        return torch.stack([(images[:, c].float() - mean) / std for c, mean, std in planes], dim=1)

    def with_image_size(self, image_size: int) -> Self:
        """Return the same convention for another image size, in pixels."""
        return replace(self, image_size=image_size)


# the second and third belong to the same network, whose first convolution has its channels in the other order there;
# their means differ by up to 0.7 in the red channel: use each with the weights of that name
CONVENTIONS: dict[str, Preprocessing] = {
    convention.name: convention
    for convention in (
        Preprocessing("IMAGENET1K_V1", (123.675, 116.28, 103.53), (255 * 0.229, 255 * 0.224, 255 * 0.225)),
        Preprocessing("IMAGENET1K_FEATURES", (122.99925, 116.9991, 103.9992), (1.0, 1.0, 1.0)),  # divided by 255: 0..1
        Preprocessing("KERAS", (103.939, 116.779, 123.68), (1.0, 1.0, 1.0), channels=(2, 1, 0)),
    )
}


def find_convention(name: str) -> Preprocessing:
    """Return the convention called `name`, or raise `ArgumentError`."""
    return CONVENTIONS[one_of("preprocessing", name, CONVENTIONS, hint="Or pass your own transferkit.Preprocessing.")]
