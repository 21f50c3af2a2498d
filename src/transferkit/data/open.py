"""Turn whatever a user passes as data into a `Source`, or say why that cannot be done."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from transferkit.base.arguments import whole_number
from transferkit.base.files import kind_of
from transferkit.data.classes import check_classes
from transferkit.data.columns import as_columns, class_indices_of, column_names, find_column, is_image, listed, names_in
from transferkit.data.images import check_one_image, is_file
from transferkit.data.samples import GivenImages
from transferkit.data.sources import ArraySource, DatasetSource, LoaderSource, Source, SubsetSource, check_order
from transferkit.data.targets import as_targets
from transferkit.errors import ArgumentError, ImageError, TargetError


def as_data(images: object) -> object:
    """Return one image or many as a data set.

    An image is the path of a file, its content as bytes, an open file, a PIL image, an array `(H, W, 3)`, or a tensor
    `(H, W, 3)` or `(3, H, W)`; many are a list, tuple, array, column or iterator of these. Targets beside them are left
    out. Anything else is returned unchanged. A path that does not exist or is a folder, or an array of three dimensions
    that may be several gray images, is an `ImageError`.

    Example:
        >>> len(as_data(np.zeros((8, 8, 3), np.uint8)))
        1
    """
    if column_names(images) is not None and not is_image(images):
        column = find_column(column_names(images) or [], "image")
        images = images if column is None else images[column]  # type: ignore[index]
    if isinstance(images, tuple) and len(images) == 2 and not is_image(images[1]):  # with its target, or with theirs
        images = images[0] if is_image(images[0]) or listed(images[0]) is not None else images
    if is_image(images):
        if isinstance(images, np.ndarray | Tensor):
            check_one_image(images)
        images = [images]
    elif isinstance(images, Iterator):
        images = list(images)
    files = None if isinstance(images, tuple) and len(images) == 2 and not is_image(images[1]) else listed(images)
    return images if files is None else _given(files)


def _given(images: list[Any], targets: Any = None, *, check: bool = True) -> GivenImages:
    """Return images, and targets, as a data set; with `check`, no file at a path is an `ImageError`."""
    images = [_read_file(image, index) if is_file(image) else image for index, image in enumerate(images)]
    paths = {index: Path(image) for index, image in enumerate(images) if isinstance(image, str | PathLike)}
    missing = [index for index, path in paths.items() if kind_of(path) != "a file"] if check else []
    if missing:
        raise ImageError(_describe_missing(paths, missing))
    return GivenImages(images, targets)


def _read_file(file: Any, index: int) -> bytes:
    """Return the content of an open file from its beginning: workers cannot share its position."""
    try:
        if file.seekable():
            file.seek(0)
        content = file.read()
    except (OSError, ValueError, AttributeError) as error:  # ValueError: it is closed
        raise ImageError(f"image {index}: the file cannot be read: {error}.") from error
    if not isinstance(content, bytes):
        raise ImageError(f"image {index} is a file opened as text: expected one opened with open(path, 'rb').")
    return content


def _describe_missing(paths: dict[int, Path], missing: list[int]) -> str:
    index, path = missing[0], paths[missing[0]]
    if kind_of(path) == "a folder":
        found = sorted({file.suffix for file in path.iterdir() if file.suffix.lower() in IMG_EXTENSIONS})
        suffixes = f"({', '.join(map(repr, found or ['.jpg']))},)"
        return (
            f"image {index} is the folder {path}: expected an image file. For all images in it, pass "
            f"[file for file in sorted(pathlib.Path({str(path)!r}).iterdir()) if file.suffix in {suffixes}]."
        )
    others = "".join(f"; image {other}: {paths[other]}" for other in missing[1:20])
    more = f"{others}{'; ...' if len(missing) > 20 else ''}. {len(missing)} files do not exist" if others else ""
    advice = "Expected the path of an image file."
    if (there := kind_of(path)) != "nothing":
        return f"image {index}: at {path} is {there}{more}. {advice}"
    if any(letter in str(path) for letter in "*?["):
        advice = f"It looks like a pattern: pass sorted(glob.glob({str(path)!r}))."
    elif str(path).startswith(("http:", "https:", "s3:", "gs:")):
        advice = "Download it first, or pass its bytes."
    elif not path.is_absolute():
        advice += f" A relative path begins at {Path.cwd()}; put the images' folder before it."
    return f"image {index}: file {path} does not exist{more}. {advice}"


def open_data(
    data: object,
    classes: Sequence[str],
    *,
    num_workers: int = 0,
    with_targets: bool = True,
    multi_label: bool = False,
    skip: bool = False,
) -> Source:
    """Return a user's data as a `Source`, or raise what is wrong with its type, images, targets or classes.

    It is `(images, targets)`: an array or tensor of images or a list of images or paths; targets may be class names. Or
    the same as a table, a dict of columns or a list of pairs; a `Dataset` of `(image, target)`; or a `DataLoader` of
    batches of them. Without `with_targets` it may also be images without targets in any of these forms, and what
    `as_data` accepts. With `multi_label` an image may have several labels. Unless bad images will be left out, `skip`,
    files are looked for and the first sample is read now.
    """
    whole_number("num_workers", num_workers, at_least=0)
    if isinstance(data, ArraySource | DatasetSource | LoaderSource | SubsetSource):  # opened before
        return data
    if with_targets:
        check_classes(data, classes)
        data = _labeled(as_columns(data), classes, check=not skip)
    else:
        data = as_data(data)
        if isinstance(data, DataLoader):
            check_order(data)
    read_targets = partial(as_targets, num_classes=len(classes), multi_label=multi_label) if with_targets else None
    if isinstance(data, DataLoader):
        return LoaderSource(data, read_targets)
    if isinstance(data, IterableDataset):
        name = type(data).__name__
        raise ArgumentError(f"data is a {name}, which has no length or order: wrap it in a DataLoader.")
    if isinstance(data, tuple) and len(data) == 2:
        return ArraySource(*data, read_targets)
    if isinstance(data, Tensor | np.ndarray):
        if with_targets:
            raise TargetError("data has images but no targets: expected a pair (images, targets).")
        return ArraySource(data, None, None)
    if isinstance(data, str | PathLike):
        raise ArgumentError(
            f"data is a {type(data).__name__}: expected images, not a path. If it has a folder of images for each "
            "class, pass torchvision.datasets.ImageFolder(path), without a transform."
        )
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, Mapping):  # a Dataset, a list
        source = DatasetSource(data, read_targets, num_workers=num_workers)
        if not skip:
            source.check_first(len(classes))
        return source
    forms = (
        "a pair (images, targets)" if with_targets else "images in one tensor or array, or in a list ([image] for one)"
    )
    raise ArgumentError(f"data is of type {type(data).__name__}: expected {forms}, a torch Dataset or a DataLoader.")


def _labeled(data: Any, classes: Sequence[str], *, check: bool) -> Any:
    """Return columns with their labels as class indices, and a list of images as a data set; else data unchanged."""
    if not isinstance(data, tuple) or len(data) != 2:
        return data
    images, labels = data
    names = names_in(labels)
    targets = labels.to_numpy() if hasattr(labels, "to_numpy") else labels  # a column finds rows by its index
    targets = (listed(targets) or targets) if names is None else class_indices_of(names, classes)
    files = listed(images)
    if files is None:
        return images, targets
    if len(files) != len(targets):
        raise TargetError(f"{len(files)} images but {len(targets)} targets: expected one target for each image.")
    return _given(files, targets, check=check)
