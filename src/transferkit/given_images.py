"""Images given one by one, to predict from: files, PIL images, arrays, and lists of these."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from transferkit.errors import ImageError
from transferkit.images import upright_rgb


class GivenImages:
    """A list of images as a data set: a path is opened when it is its turn.

    Attributes:
        samples: The images as they were given, among which errors look for a path.
    """

    def __init__(self, images: Sequence[Any]) -> None:
        self.samples = list(images)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        image = self.samples[index]
        if not isinstance(image, str | os.PathLike):
            return image
        with Image.open(image) as file:
            return upright_rgb(file, index)


def as_data(images: object) -> object:
    """Return images to predict from as data: what is one image becomes a list of one, and paths are opened.

    Args:
        images: The path of an image file, a PIL image, an array or tensor `(H, W, 3)` or `(3, H, W)`, or a list of
            these. All else is returned as it is.

    Raises:
        ImageError: There is no such file, or it is a folder.

    Example:
        >>> len(as_data(np.zeros((8, 8, 3), np.uint8)))
        1
    """
    if isinstance(images, Image.Image | str | os.PathLike) or (
        isinstance(images, np.ndarray | Tensor) and images.ndim == 3
    ):
        images = [images]
    if not isinstance(images, list):
        return images
    for index, image in enumerate(images):
        if isinstance(image, str | os.PathLike):
            _check_file(Path(image), index)
    return GivenImages(images)


def _check_file(path: Path, index: int) -> None:
    if path.is_dir():
        raise ImageError(
            f"image {index} is the folder {path}: expected an image file. For all in it: "
            f"predict(sorted(pathlib.Path({str(path)!r}).glob('*.jpg')))."
        )
    if not path.is_file():
        raise ImageError(f"image {index}: there is no file {path}. Expected the path of an image file.")
