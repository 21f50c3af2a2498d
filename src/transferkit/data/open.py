"""Images given one by one, to predict from: files, PIL images, arrays, and lists of these."""

import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset

from transferkit.base.arguments import whole_number
from transferkit.data.images import upright_rgb
from transferkit.data.sources import ArraySource, DatasetSource, LoaderSource, Source
from transferkit.errors import (
    ArgumentError,
    HeadMismatchError,
    ImageError,
    TargetError,
)


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


def open_data(
    data: object,
    classes: Sequence[str],
    *,
    num_workers: int = 0,
    with_targets: bool = True,
    multi_label: bool = False,
    on_bad_image: str = "raise",
) -> Source:
    """Look at what a user passed as data, refuse what cannot be used, and return it as a `Source`.

    Args:
        data: `(images, targets)` arrays or tensors, a `Dataset` of `(image, target)`, or a `DataLoader` of batches
            of them. Without targets, `images` alone, data sets of images alone, and what `as_data` takes serve as well.
        classes: The model's class names; what the data says of its own is compared with them.
        num_workers: Processes that read a `Dataset`.
        with_targets: Whether targets are needed.
        multi_label: Whether an image may have several labels.
        on_bad_image: `"raise"` reads the first sample of a data set now; `"skip"` leaves that for later.

    Raises:
        EmptyDataError: There are no images.
        ImageError: Images that cannot be used.
        TargetError: Targets that cannot be used.
        HeadMismatchError: The data has other classes than the model.
        ArgumentError: Data of another kind.
    """
    whole_number("num_workers", num_workers, at_least=0)
    if with_targets:
        _check_classes(data, classes)
    else:
        data = as_data(data)
    if isinstance(data, DataLoader):
        return LoaderSource(data, classes, with_targets=with_targets, multi_label=multi_label)
    if isinstance(data, IterableDataset):
        name = type(data).__name__
        raise ArgumentError(
            f"data is a {name}, which has no length or order: wrap it in a DataLoader that makes batches."
        )
    if isinstance(data, tuple) and len(data) == 2:
        return ArraySource(data[0], data[1] if with_targets else None, classes, multi_label=multi_label)
    if isinstance(data, Tensor | np.ndarray):
        if with_targets:
            raise TargetError("data is images without targets: expected a pair (images, targets).")
        return ArraySource(data, None, classes)
    if isinstance(data, str | PathLike):
        raise ArgumentError(
            f"data is a {type(data).__name__}: expected the images themselves. A folder with a folder of images for "
            "each class is opened with torchvision.datasets.ImageFolder(path), without a transform."
        )
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, Mapping):  # a Dataset, a list
        source = DatasetSource(
            data, classes, num_workers=num_workers, with_targets=with_targets, multi_label=multi_label
        )
        if on_bad_image == "raise":
            source.check_first()
        return source
    forms = (
        "a pair (images, targets)" if with_targets else "images in one tensor or array, or in a list ([image] for one)"
    )
    raise ArgumentError(f"data is of type {type(data).__name__}: expected {forms}, a torch Dataset or a DataLoader.")


def class_names(data: object) -> list[str] | None:
    """Return the class names of a data set, also in a `Subset`, `ConcatDataset` or `DataLoader`; None if it has none.

    Raises:
        HeadMismatchError: The parts of a `ConcatDataset` have different ones.
    """
    while not hasattr(data, "classes") and hasattr(data, "dataset"):
        data = data.dataset
    if isinstance(data, ConcatDataset):
        parts = [names for part in data.datasets if (names := class_names(part)) is not None]
        if different := [names for names in parts if names != parts[0]]:
            raise HeadMismatchError(
                f"the parts of a ConcatDataset have the classes {', '.join(parts[0][:8])} and "
                f"{', '.join(different[0][:8])}, at most 8 listed: class indices would not mean the same. Expected the "
                "same in all."
            )
        return parts[0] if parts else None
    found = getattr(data, "classes", None)
    return None if found is None else list(map(str, found))


def _check_classes(data: object, expected: Sequence[str]) -> None:
    found = class_names(data)
    if found is None:
        return
    numbered = list(expected) == [str(index) for index in range(len(expected))]
    if len(found) != len(expected) or (not numbered and found != list(expected)):
        raise HeadMismatchError(
            f"the data has {len(found)} classes ({', '.join(found[:8])}), the model {len(expected)} "
            f"({', '.join(expected[:8])}), at most 8 listed: expected the same in the same order. Build the head from "
            "the data: attach_head(backbone, data.classes)."
        )
