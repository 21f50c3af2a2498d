"""Images and labels by the names that people give them: rows, tables, dicts, and lists that belong together."""

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from transferkit.data.images import is_encoded
from transferkit.errors import ArgumentError, TargetError

_NAMES = {
    "image": ("image", "images", "img", "pixel_values", "picture", "photo", "x"),
    "path": ("path", "image_path", "file_path", "filepath", "file", "filename", "file_name", "image_file"),
    "label": ("label", "labels", "target", "targets", "class", "class_id", "category", "y"),
}
"""Names of columns, in small letters. An image may also be found by its path."""

_PAIRS = """
class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return len(data)
    def __getitem__(self, index):
        sample = data[index]
        return {}, {}
"""


def find_column(names: Sequence[Any], kind: str) -> Any:
    """Return the one name that a column of `"image"` or `"label"` has; None where none or several do."""
    for group in ("image", "path") if kind == "image" else (kind,):
        found = [name for name in names if str(name).lower() in _NAMES[group]]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def image_and_target(sample: Any, what: str) -> tuple[Any, Any]:
    """Return image and label of a sample or batch; a `TargetError` about `what` says how to make a pair of it."""
    parts = _named(sample)
    names = list(parts)
    image, label = find_column(names, "image"), find_column(names, "label")
    if image is not None and label is not None:
        return parts[image], parts[label]
    if isinstance(sample, tuple | list) and len(sample) == 2:
        return sample[0], sample[1]
    if isinstance(sample, tuple | list) and not names:
        got, form, parted = f"has {len(sample)} parts", "sample[{}]", (0, 1)
        asked = "expected a pair (image, target), without a third part" if len(sample) > 2 else "expected a pair"
    elif names:
        got, parted = f"is a {type(sample).__name__} of {', '.join(map(str, names))}", _fill(names, image, label)
        form = 'sample["{}"]' if isinstance(sample, Mapping) else "sample.{}"
        asked = "which is the image and which the label is not clear"
    else:
        raise TargetError(f"{what} is a {type(sample).__name__}: expected a pair (image, target).")
    lines = _PAIRS.format(*map(form.format, parted))
    raise TargetError(
        f"{what} {got}: {asked}. Say which parts these are, with data for the data set, and pass Pairs():",
        *lines.strip().splitlines(),
    )


def image_of(sample: Any) -> Any:
    """Return the image of a sample, or the images of a batch, that may have a label and more."""
    parts = {} if is_image(sample) else _named(sample)
    if (image := find_column(list(parts), "image")) is not None:
        return parts[image]
    return sample[0] if isinstance(sample, tuple | list) and len(sample) else sample


def as_columns(data: Any) -> Any:
    """Return a table, a dict of columns or a list of rows as a pair (images, labels); anything else unchanged."""
    if (names := column_names(data)) is not None:
        image, label = find_column(names, "image"), find_column(names, "label")
        if image is not None and label is not None:
            return data[image], data[label]
        held = list(data.values()) if isinstance(data, Mapping) else []
        advice = "Pass a pair, such as (data[{!r}], data[{!r}]).".format(*_fill(names, image, label))
        if any(isinstance(value, Mapping | Dataset) or hasattr(value, "column_names") for value in held):
            advice = f"Pass one of these data sets, data[{names[0]!r}], and another one as validation_data."
        elif held and all(isinstance(value, int | str) for value in held):
            advice = "If these are labels by image, pass (list(data), list(data.values()))."
        raise ArgumentError(
            f"data is a {type(data).__name__} of {', '.join(map(repr, names[:8]))}: which is the image and which the "
            f"label is not clear. {advice}"
        )
    if isinstance(data, tuple) and len(data) == 2 and any(isinstance(part, Iterator) for part in data):
        raise ArgumentError("the images or targets are an iterator, which can be read once: pass list(...) of it.")
    data = listed(data) if isinstance(data, np.ndarray) and data.dtype.kind in "OUST" else data
    if type(data) not in (list, tuple) or len(data) == 0 or (type(data) is tuple and len(data) == 2):
        return data
    if len(data) < 4 and _are_images(data[0]):
        third = ", without a third part" if len(data) == 3 else ""
        raise ArgumentError(
            f"data is a {type(data).__name__} of {len(data)}: expected one tuple of two{third}. Write "
            "fit((images, targets))."
        )
    if isinstance(data[0], tuple | list | Mapping) and not is_image(data[0]):
        rows = [image_and_target(row, f"sample {index}") for index, row in enumerate(data)]
        return [image for image, _ in rows], [label for _, label in rows]
    return data


def column_names(data: Any) -> list[Any] | None:
    """Return the names of the columns of a dict, or of a table as those of pandas and polars."""
    if isinstance(data, Mapping):
        return list(data)
    table = hasattr(data, "columns") and hasattr(data, "__getitem__") and not isinstance(data, Dataset)
    return list(data.columns) if table else None


def listed(values: Any) -> list[Any] | None:
    """Return a sequence, or an array or column of text and objects, as a list; None for an array of numbers."""
    if isinstance(values, Sequence) and not isinstance(values, str | bytes | bytearray | memoryview):
        return list(values)
    array = values.to_numpy() if hasattr(values, "to_numpy") else values
    return array.tolist() if isinstance(array, np.ndarray) and array.dtype.kind in "OUST" else None


def names_in(labels: Any) -> list[str] | None:
    """Return labels as a list if they are names, None if they are numbers; a mixture is a `TargetError`."""
    values = listed(labels)
    if values is None or not any(isinstance(value, str) for value in values):
        return None
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise TargetError(
                f"label {value!r} at index {index} is missing, or not a name like the others: leave that image out, or "
                "name it."
            )
    return values


def class_indices_of(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Return the place of each name in a list of class names; one that is not there is a `TargetError`."""
    places = {name: index for index, name in enumerate(classes)}
    for index, name in enumerate(names):
        if name not in places:
            all_names = [*classes, *sorted(set(names) - places.keys())]
            own = all_names if len(all_names) <= 12 else "[*classes, *sorted(set(labels) - set(classes))]"
            raise TargetError(
                f"label {name!r} at index {index} is not one of the model's classes ({', '.join(classes[:8])}): "
                f"expected names of these. Correct the label, or make the model with classes={own}."
            )
    return [places[name] for name in names]


def is_image(value: Any) -> bool:
    """Return whether a value is one image: a path, a PIL image, encoded bytes, a file, or an array of three axes."""
    if isinstance(value, np.ndarray | Tensor):
        return value.ndim == 3
    encoded = isinstance(value, Mapping) and set(value) == {"bytes", "path"}  # as Hugging Face stores one
    return encoded or isinstance(value, Image.Image | str | PathLike) or is_encoded(value)


def _are_images(values: Any) -> bool:
    """Return whether a value holds the images of several samples, and is no sample itself."""
    if isinstance(values, np.ndarray | Tensor) and values.ndim != 1:
        return values.ndim == 4
    held = listed(values) or []
    return len(held) > 2 and all(map(is_image, held[:3]))


def _named(sample: Any) -> Mapping[Any, Any]:
    if isinstance(sample, tuple) and hasattr(sample, "_fields"):
        return dict(zip(sample._fields, sample, strict=True))
    return sample if isinstance(sample, Mapping) else {}


def _fill(names: list[Any], image: Any, label: Any) -> tuple[Any, Any]:
    """Return the names of image and label for an example in a message, guessed where they are None."""
    left = [name for name in names if name not in (image, label)]
    image = image if image is not None else left.pop(0) if left else "image"
    return image, label if label is not None else left[0] if left else "label"
