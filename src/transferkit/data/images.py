"""The forms of images that the library accepts, and the two it uses.

Raw images are uint8 `(N, 3, H, W)`; preprocessed images are float32 `(N, 3, S, S)`.
"""

import io
import struct
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile
from torch import Tensor

from transferkit.base.arrays import tensor_from_array
from transferkit.data.conversions import conversion
from transferkit.errors import ImageError

_EXPECTED = "raw {0}, uint8 ({1}3, H, W) or ({1}H, W, 3) of any size, or preprocessed ones, float ({1}3, H, W)"
_DEEP_MODES = ("I", "F", "BGR")  # I;16 and its variants too: convert("RGB") would clip these
_TRANSPARENT_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_UNREADABLE_EXIF = (SyntaxError, struct.error, TypeError, ValueError, OSError, EOFError, LookupError, ArithmeticError)


def as_images(images: object) -> Tensor:
    """Return images as a tensor with channels second, uint8 or float32 `(N, 3, H, W)`, a view where possible.

    They are a tensor, an array or what numpy makes an array of, such as a column of a table whose entries are arrays:
    uint8 `(N, 3, H, W)` or `(N, H, W, 3)`, or float `(N, 3, H, W)`. Others are an `ImageError`, whose message has the
    line that converts them.
    """
    return _channels_second(images, "images", 4)


def as_image(image: object, index: int) -> Tensor:
    """Return one sample's image, uint8 or float32 `(3, H, W)`; the message of an `ImageError` has its index.

    It is a PIL image (see `upright_rgb`), the content of an image file as bytes, an open file, or a tensor or array as
    in `as_images`, without the batch dimension.
    """
    if is_encoded(image):
        image = open_image(image, index)
    elif isinstance(image, Image.Image):
        image = upright_rgb(image, index)
    if isinstance(image, Image.Image):
        return tensor_from_array(np.asarray(image)).permute(2, 0, 1)
    try:
        return _channels_second(image, "image", 3)
    except ImageError as error:
        raise ImageError(f"image {index}: {error}") from None


def check_one_image(image: "np.ndarray[Any, Any] | Tensor") -> None:
    """Refuse three dimensions, meant as one image, that may be several gray images: an array `(3, H, W)`, `(N, H, W)`.

    A tensor `(3, H, W)` is one image, as torchvision reads it.
    """
    shape = tuple(image.shape)
    if shape[2] in (1, 3, 4) or shape[0] == 1:
        return
    if shape[0] != 3 or not isinstance(image, Tensor):
        as_images(image)  # raises


def is_encoded(image: object) -> bool:
    """Return whether this is the content of an image file: bytes, or an open file."""
    return is_file(image) or isinstance(image, bytes | bytearray | memoryview)


def is_file(value: object) -> bool:
    """Return whether a value is an open file."""
    return callable(getattr(value, "read", None)) and not hasattr(value, "__getitem__")


def open_image(source: Any, index: int, *, prepare: Callable[[Image.Image], object] | None = None) -> Image.Image:
    """Return an image file, by its path, its content or as an open binary file, as an upright PIL image in RGB.

    `prepare` is called with the image before its pixels are decoded. Errors are those of `upright_rgb`, and `OSError`
    where the file cannot be read or Pillow does not know its format.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes | bytearray | memoryview) else source) as file:
        _check_decodable(file, index)
        if prepare is not None:
            prepare(file)
        return upright_rgb(file, index)


def upright_rgb(image: Image.Image, index: int) -> Image.Image:
    """Return a PIL image in RGB, with transparent pixels on white.

    An image straight from a file is rotated according to its EXIF orientation. What Pillow made from one, by `convert`
    or `transpose` for example, is used as it is: its pixels may be turned already. More than 8 bits per channel, or
    than `PIL.Image.MAX_IMAGE_PIXELS` pixels, are an `ImageError`, whose message has the index.
    """
    _check_decodable(image, index)
    rgb = _rgb(_upright(image))
    if rgb is not image:
        rgb.info = {}  # its orientation and transparency have been dealt with
    return rgb


def _check_decodable(image: Image.Image, index: int) -> None:
    if image.mode.startswith(_DEEP_MODES):
        lines = conversion(np.asarray(image), "image", ndim=3)
        raise ImageError(
            f"image {index} has mode {image.mode!r}: expected 8 bits per channel. Convert it in the data set's "
            f"transform: image = np.asarray(image); {lines}"
        )
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ImageError(
            f"image {index} has {image.width}x{image.height} pixels: expected at most {Image.MAX_IMAGE_PIXELS:,}, "
            "since a larger file may be an attack on memory. If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS."
        )


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # not in getexif below: an error of the pixels is none of the EXIF
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except _UNREADABLE_EXIF:
        return image
    if turn is None:
        return image
    if isinstance(image, ImageFile.ImageFile):
        return image.transpose(turn)
    warnings.warn(
        "images of the data set carry the EXIF orientation of their files and are used as they are. If they are not "
        "upright, let the data set turn them: PIL.ImageOps.exif_transpose(image).",
        stacklevel=2,
    )
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":  # convert("RGB") would copy the numbers
        spaces = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted: Any = ImageCms.profileToProfile(image, *spaces, outputMode="RGB")
        return converted  # type: ignore[no-any-return]
    if image.mode not in _TRANSPARENT_MODES and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if rgba.getchannel("A").getextrema() != (255, 255):
        warnings.warn("transparent pixels of images are laid on white", stacklevel=2)
        rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return rgba.convert("RGB")


def check_image_size(images: Tensor, image_size: int) -> None:
    """Raise `ImageError` unless preprocessed images `(N, 3, H, W)` have the size that the backbone expects."""
    height, width = images.shape[2:]
    if (height, width) != (image_size, image_size):
        raise ImageError(
            f"preprocessed images have {height}x{width} pixels: expected {image_size}x{image_size}. Pass raw uint8 "
            f"images, which are resized, or load the backbone with load_backbone(image_size={max(height, 32)})."
        )


def _channels_second(given: Any, name: str, ndim: int) -> Tensor:
    """Return a batch or one image, `name` says which, as uint8 or float32 `(..., 3, H, W)`."""
    expected = _EXPECTED.format("images" if ndim == 4 else "image", "N, " if ndim == 4 else "")
    got = f"{name} {'are' if ndim == 4 else 'is'} a {type(given).__name__}"
    why = f"expected {expected}, in one tensor or array. For images of different sizes pass a Dataset."
    if not isinstance(given, Tensor) and not hasattr(given, "__array__"):
        raise ImageError(f"{got}: {why}")
    try:
        images = given if isinstance(given, Tensor) else tensor_from_array(np.asanyarray(given))
    except (TypeError, ValueError) as error:  # names, or arrays of different shapes
        raise ImageError(f"{got}: {why} ({error})") from error
    raw = images.dtype == torch.uint8
    channels_last = images.ndim == ndim and images.shape[-3] != 3 and images.shape[-1] == 3
    if raw and channels_last:
        images = images.movedim(-1, -3)
    usable = (raw or images.is_floating_point()) and images.ndim == ndim and images.shape[-3] == 3
    if usable and 0 not in images.shape[-2:]:
        return images if raw else images.float()
    lines = conversion(given, name, ndim=ndim)
    write = f"Write: {lines}" if lines else f"Pass raw uint8 {name}"
    if images.ndim == 3 < ndim and images.shape[0] == 3 != images.shape[2]:
        write = f"One image with its channels first is {name}[None]. For three gray images: {write}"
    if images.is_floating_point() and channels_last and not lines:
        moved = f"{name}.movedim(-1, -3)" if isinstance(given, Tensor) else f"np.moveaxis({name}, -1, -3)"
        write += " without preprocess_input or Normalize. If backbone.preprocess gave these values, "
        write += f"write: {name} = {moved}"
    got = f"{name} {'have' if ndim == 4 else 'has'} shape {tuple(images.shape)} and dtype {images.dtype}"
    raise ImageError(f"{got}: expected {expected}. {write}")
