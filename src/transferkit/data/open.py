"""Turn whatever a user passes as data into a `Source`, or say why that cannot be done."""

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
from transferkit.data.images import check_one_image, is_encoded, open_image
from transferkit.data.sources import ArraySource, DatasetSource, LoaderSource, Source, SubsetSource
from transferkit.errors import (
    ArgumentError,
    HeadMismatchError,
    ImageError,
    TargetError,
)


class GivenImages:
    """A list of images as a data set; a file is opened when its image is read.

    Attributes:
        samples: The images as given. Error messages look up paths here.
    """

    def __init__(self, images: Sequence[Any]) -> None:
        self.samples = list(images)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        image = self.samples[index]
        return open_image(image, index) if isinstance(image, str | os.PathLike) else image


def as_data(images: object) -> object:
    """Return one image or a list of images as a data set.

    Args:
        images: The path of an image file, its content as bytes, an open file, a PIL image, an array `(H, W, 3)`, a
            tensor `(H, W, 3)` or `(3, H, W)`, or a list of these. Anything else is returned unchanged.

    Raises:
        ImageError: A path does not exist or is a folder, or an array of three dimensions may be several gray images.

    Example:
        >>> len(as_data(np.zeros((8, 8, 3), np.uint8)))
        1
    """
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 3:
        check_one_image(images)
        images = [images]
    elif isinstance(images, Image.Image | str | os.PathLike) or is_encoded(images):
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
            f"image {index} is the folder {path}: expected an image file. For all images in it, pass "
            f"sorted(pathlib.Path({str(path)!r}).glob('*.jpg'))."
        )
    if not path.is_file():
        raise ImageError(f"image {index}: file {path} does not exist. Expected the path of an image file.")


def open_data(
    data: object,
    classes: Sequence[str],
    *,
    num_workers: int = 0,
    with_targets: bool = True,
    multi_label: bool = False,
    on_bad_image: str = "raise",
) -> Source:
    """Return a user's data as a `Source`.

    Args:
        data: `(images, targets)` arrays or tensors, a `Dataset` of `(image, target)`, or a `DataLoader` of batches of
            them. If `with_targets` is false, also images without targets in any of these forms, and what `as_data`
            accepts.
        classes: The model's class names. If the data has class names, they must match.
        num_workers: Number of processes that read a `Dataset`.
        with_targets: Whether targets are needed.
        multi_label: Whether an image may have several labels.
        on_bad_image: `"raise"` reads the first sample of a data set now; `"skip"` does not.

    Raises:
        EmptyDataError: The data has no images.
        ImageError: The images, or the first one of a data set, have an unsupported shape or dtype.
        TargetError: Targets are missing, out of range, or have an unsupported shape or dtype.
        HeadMismatchError: The data has other classes than the model.
        ArgumentError: `data` is of an unsupported type, or `num_workers` is negative.
    """
    whole_number("num_workers", num_workers, at_least=0)
    if isinstance(data, ArraySource | DatasetSource | LoaderSource | SubsetSource):  # opened before
        return data
    if with_targets:
        _check_classes(data, classes)
    else:
        data = as_data(data)
    if isinstance(data, DataLoader):
        return LoaderSource(data, classes, with_targets=with_targets, multi_label=multi_label)
    if isinstance(data, IterableDataset):
        name = type(data).__name__
        raise ArgumentError(f"data is a {name}, which has no length or order: wrap it in a DataLoader.")
    if isinstance(data, tuple) and len(data) == 2:
        return ArraySource(data[0], data[1] if with_targets else None, classes, multi_label=multi_label)
    if isinstance(data, Tensor | np.ndarray):
        if with_targets:
            raise TargetError("data has images but no targets: expected a pair (images, targets).")
        return ArraySource(data, None, classes)
    if isinstance(data, str | PathLike):
        raise ArgumentError(
            f"data is a {type(data).__name__}: expected images, not a path. If it has a folder of images for each "
            "class, pass torchvision.datasets.ImageFolder(path), without a transform."
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
    """Return the class names of a data set, also inside a `Subset`, `ConcatDataset` or `DataLoader`; None without any.

    Raises:
        HeadMismatchError: The parts of a `ConcatDataset` have different class names.
    """
    while not hasattr(data, "classes") and hasattr(data, "dataset"):
        data = data.dataset
    if isinstance(data, ConcatDataset):
        parts = [names for part in data.datasets if (names := class_names(part)) is not None]
        if different := [names for names in parts if names != parts[0]]:
            raise HeadMismatchError(
                f"the parts of a ConcatDataset have the classes {', '.join(parts[0][:8])} and "
                f"{', '.join(different[0][:8])} (the first 8 of each): class indices would not match. Expected the "
                "same classes in all parts."
            )
        return parts[0] if parts else None
    found = getattr(data, "classes", None)
    return None if found is None else list(map(str, found))


def find_classes(data: object, classes: Sequence[str] | int | None) -> Sequence[str] | int:
    """Return the classes given or, if there are none, those that data names, or their number by its targets.

    Raises:
        ArgumentError: When the data does not tell.

    Example:
        >>> find_classes((np.zeros((3, 8, 8, 3), np.uint8), [0, 2, 1]), None)
        3
    """
    if classes is not None:
        return classes
    names = class_names(data)
    if names is not None:
        return names
    targets = data[1] if isinstance(data, tuple) and len(data) == 2 else getattr(data, "targets", None)
    if isinstance(targets, list | Tensor | np.ndarray) and len(targets):
        found = np.asarray(targets)
        return found.shape[1] if found.ndim == 2 else int(found.max()) + 1
    raise ArgumentError(
        f"the classes of a {type(data).__name__} are not known, because it has no list of them: pass classes=, their "
        "names or number."
    )


def _check_classes(data: object, expected: Sequence[str]) -> None:
    found = class_names(data)
    if found is None:
        return
    numbered = list(expected) == [str(index) for index in range(len(expected))]
    if len(found) != len(expected) or (not numbered and found != list(expected)):
        raise HeadMismatchError(
            f"the data has {len(found)} classes ({', '.join(found[:8])}), the model {len(expected)} "
            f"({', '.join(expected[:8])}), the first 8 of each: expected the same classes in the same order. Build the "
            "head from the data: attach_head(backbone, data.classes)."
        )
