"""The forms of images that the library accepts, and the two it uses.

Raw images are uint8 `(N, 3, H, W)`; preprocessed images are float32 `(N, 3, S, S)`.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from transferkit.base.arrays import tensor_from_array
from transferkit.errors import ImageError

_EXPECTED = (
    "expected raw images, uint8 (N, 3, H, W) or (N, H, W, 3) of any size, or preprocessed ones, float (N, 3, H, W)"
)
_RGB_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits per channel


def as_images(images: object) -> Tensor:
    """Return images as a tensor with channels second.

    Args:
        images: A tensor or array: uint8 `(N, 3, H, W)` or `(N, H, W, 3)`, or float `(N, 3, H, W)`.

    Returns:
        uint8 or float32 `(N, 3, H, W)`, a view where possible.

    Raises:
        ImageError: The shape, dtype or channel count is not one of these.

    Example:
        >>> as_images(np.zeros((5, 32, 48, 3), np.uint8)).shape
        torch.Size([5, 3, 32, 48])
    """
    if isinstance(images, np.ndarray) and images.dtype.kind in "uifb":
        images = tensor_from_array(images)
    if not isinstance(images, Tensor):
        raise ImageError(
            f"images are a {type(images).__name__}: {_EXPECTED}, in one tensor or array. For images of different sizes "
            "pass a Dataset."
        )
    got = f"images have shape {tuple(images.shape)} and dtype {images.dtype}"
    if images.ndim != 4:
        one = " One image needs a batch dimension: image[None]." if images.ndim == 3 else ""
        raise ImageError(f"{got}: {_EXPECTED}.{one}")
    if images.dtype == torch.uint8:
        if images.shape[1] != 3 and images.shape[3] == 3:
            images = images.permute(0, 3, 1, 2)  # (N, H, W, 3) -> (N, 3, H, W)
    elif not images.is_floating_point():
        raise ImageError(f"{got}: {_EXPECTED}. If the values are 0 to 255, convert them: images.astype('uint8').")
    if images.is_floating_point() and images.shape[1] != 3 and images.shape[3] == 3:
        raise ImageError(f"{got}: expected preprocessed images with channels second. Use images.permute(0, 3, 1, 2).")
    if images.shape[1] != 3:
        sides = images.shape[1:]
        remedy = "Repeat a gray channel three times: images.repeat(1, 3, 1, 1)." if 1 in sides else ""
        remedy = "Drop an alpha channel: images[:, :3]." if 4 in sides else remedy
        raise ImageError(f"{got}, without 3 channels: {_EXPECTED}. {remedy}".rstrip())
    if 0 in images.shape[2:]:
        raise ImageError(f"{got}, without pixels: {_EXPECTED}.")
    return images if images.dtype == torch.uint8 else images.float()


def as_image(image: object, index: int) -> Tensor:
    """Return one sample's image, uint8 or float32 `(3, H, W)`.

    Args:
        image: A PIL image with 8 bits per channel (see `upright_rgb`), or a tensor or array as in `as_images`, without
            the batch dimension.
        index: Index in the data set, for the message.

    Raises:
        ImageError: The shape, dtype, channel count or PIL mode is not one of these.
    """
    if isinstance(image, Image.Image):
        from torchvision.transforms.v2 import functional as transforms  # takes 0.2 s: not at import

        pixels: Tensor = transforms.pil_to_tensor(upright_rgb(image, index))
        return pixels
    try:
        batch: Any = image
        return as_images(batch[None] if isinstance(image, Tensor | np.ndarray) else image)[0]
    except ImageError as error:
        raise ImageError(f"image {index}: {error} (for one image: without N, or a PIL image)") from None


def upright_rgb(image: Image.Image, index: int) -> Image.Image:
    """Return a PIL image in RGB, rotated according to its EXIF orientation.

    Args:
        image: An image with 8 bits per channel. Gray, palette, RGBA (alpha is dropped), CMYK and YCbCr are converted.
        index: Index in the data set, for the message.

    Raises:
        ImageError: The image has more bits per channel, or more than `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    if image.mode not in _RGB_MODES:
        raise ImageError(
            f"image {index} has mode {image.mode!r}: expected 8 bits per channel ({', '.join(_RGB_MODES)}). Scale it "
            "to 0..255 and convert it to RGB in the data set's transform."
        )
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ImageError(
            f"image {index} has {image.width}x{image.height} pixels: expected at most {Image.MAX_IMAGE_PIXELS:,}, "
            "since a larger file may be an attack on memory. If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS."
        )
    return ImageOps.exif_transpose(image).convert("RGB")


def check_image_size(images: Tensor, image_size: int) -> None:
    """Check that preprocessed images `(N, 3, H, W)` have the size that the backbone expects.

    Raises:
        ImageError: H or W is not `image_size`.
    """
    height, width = images.shape[2:]
    if (height, width) != (image_size, image_size):
        raise ImageError(
            f"preprocessed images have {height}x{width} pixels: expected {image_size}x{image_size}. Pass raw uint8 "
            f"images, which are resized, or load the backbone with load_backbone(image_size={max(height, 32)})."
        )


def check_normalized(images: Tensor, convention: str) -> None:
    """Check that float images went through a VGG preprocessing.

    All three conventions subtract the mean. Images without a negative value were only scaled to 0..1, or not at all:
    the most common cause of poor features without an error.

    Args:
        images: float32 `(N, 3, H, W)`. Infinite and NaN values are ignored.
        convention: Name of the expected preprocessing, for the message.

    Raises:
        ImageError: No value is negative.
    """
    values = images[images.isfinite()]
    if values.numel() == 0:
        return
    low, high = (value.item() for value in torch.aminmax(values))
    if low >= 0:
        raise ImageError(
            f"float images have values from {low:.3g} to {high:.3g}, so they are not preprocessed: {convention} "
            "subtracts the mean, which makes some values negative. Pass raw uint8 images (without ToTensor or a "
            "division by 255), or apply backbone.preprocess."
        )
