"""Which class an index stands for: names that data has, compared with those of a model."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision.datasets import DatasetFolder

from transferkit.data.columns import as_columns, find_column, listed, names_in
from transferkit.data.samples import Samples, evenly_spaced, listed_targets, same_targets
from transferkit.data.targets import as_numbers, as_targets
from transferkit.errors import ArgumentError, HeadMismatchError, TargetError, TransferKitError

# folders that hold the parts of a data set, and folders that programs make, beside those that begin with a dot
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}
NO_CLASS = {"__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN"}

_KNOWN = """To evaluate a folder that lacks classes or sorts them otherwise, number its folders as the model does:
class Known(torchvision.datasets.ImageFolder):
    def find_classes(self, folder):
        return list(model.classes), {name: index for index, name in enumerate(model.classes)}
and pass Known(path, allow_empty=True)."""


def class_names(data: object) -> dict[int, str] | None:
    """Return the class name of each index that the targets of a data set may have; None if it has no names.

    Names are found inside other data sets. Parts of a `ConcatDataset` with different ones are a `HeadMismatchError`.
    """
    columns = as_columns(data)
    labels = names_in(columns[1]) if isinstance(columns, tuple) and len(columns) == 2 else None
    return _names(data) if labels is None else dict(enumerate(sorted(set(labels))))


def _names(data: object) -> dict[int, str] | None:
    found = _names_of(data)
    if found is not None:
        transform = getattr(data, "target_transform", None)
        return found if transform is None else _renumbered(found, transform)
    if isinstance(data, ConcatDataset):
        parts = [names for part in data.datasets if (names := _names(part)) is not None]
        if different := [names for names in parts if names != parts[0]]:
            raise HeadMismatchError(
                f"the parts of a ConcatDataset have {_listed(parts[0])} and {_listed(different[0])}: expected the same."
            )
        return parts[0] if parts else None
    inner = _wrapped(data)
    if len(inner) != 1:
        return None
    if not isinstance(data, Subset | DataLoader):  # a wrapper of the user's own, which may give other targets
        if _length(data) is None or _length(data) != _length(inner[0]):
            return None
        one, other = _some_targets(data), _some_targets(inner[0])
        both = one.keys() & other.keys()
        if not both or any(not same_targets(one[index], other[index]) for index in both):
            return None
    return _names(inner[0])


def as_names(classes: object) -> list[str]:
    """Return classes given as names, as their number, or as a mapping of names to indices; else an `ArgumentError`."""
    found: Any = classes.tolist() if isinstance(classes, Tensor | np.ndarray) else classes
    if isinstance(found, Integral):
        found = range(int(found))
    elif isinstance(found, Mapping) and sorted(map(str, found.values())) == sorted(map(str, range(len(found)))):
        found = sorted(found, key=lambda name: int(classes[name]))  # type: ignore[index]
    if isinstance(found, Iterable) and not isinstance(found, str | bytes | set | frozenset | Mapping):
        names = [name.tolist() if isinstance(name, Tensor) else name for name in found]
        if all(isinstance(name, str | Integral) for name in names):
            return [str(name) for name in names]
    raise ArgumentError(
        f"classes={classes!r} cannot be used: expected a list of class names, or their number. Names are text or whole "
        "numbers; of a set, which has no order, pass sorted(classes); a mapping has the indices 0, 1, ..., each once."
    )


def find_classes(data: object, classes: Sequence[str] | int | None) -> list[str]:
    """Return the classes given, else those that data names or their number by its targets, else an `ArgumentError`."""
    given = None if classes is None else as_names(classes)
    names = class_names(data) if given is None or numbered(given) else None
    if names is not None and list(names) == list(range(len(names if given is None else given))):
        return list(names.values())
    if given is not None:
        return given
    data = as_columns(data)
    targets = data[1] if isinstance(data, tuple) and len(data) == 2 else listed_targets(data)
    kept: Any = getattr(data, "targets", None)
    if targets is None and isinstance(kept, list | Tensor | np.ndarray) and len(kept) == _length(data):
        agrees = all(same_targets(kept[index], one) for index, one in _some_targets(data).items())
        targets = kept if agrees else None
    targets = [] if targets is None else listed(targets) or targets
    if (values := as_numbers(targets)).numel() == 0:
        name = type(data).__name__
        raise ArgumentError(f"the classes of a {name} are not known: pass classes=, their names or number.")
    if values.ndim == 2:
        return as_names(values.shape[1])
    count = int(values.double().nan_to_num(0, 0, 0).max()) + 1
    labels = sorted(set(as_targets(targets, max(count, 2)).tolist()))
    if len(labels) < count:
        absent = next(index for index, label in enumerate(labels) if index != label)
        raise TargetError(
            f"the labels are of {_listed({label: str(label) for label in labels})}, and none is {absent}: expected "
            f"each of 0 to {count - 1}. Pass classes=, the names or number ({count}) of all, or number the labels "
            "anew: targets = numpy.unique(targets, return_inverse=True)[1]."
        )
    return as_names(count)


def numbered(classes: Sequence[str]) -> bool:
    """Return whether class names are the numbers that a head has that was given no names."""
    return list(classes) == [str(index) for index in range(len(classes))]


def learn_names(data: object, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the class names of training data for a head that has only numbers, else the head's own."""
    names = class_names(data) if numbered(classes) else None
    if names is None or sorted(names) != list(range(len(classes))) or len(set(names.values())) < len(names):
        return classes
    return tuple(names[index] for index in range(len(classes)))


def check_classes(data: object, classes: Sequence[str]) -> None:
    """Raise `HeadMismatchError` if a class index of labeled data stands for another class than that of a model."""
    left, seen = [data], set[int]()
    while left:
        part = left.pop()
        if isinstance(part, DatasetFolder):
            _check_folders(part)
        left += [inner for inner in _wrapped(part) if id(inner) not in seen]
        seen.update(map(id, left))
    names = _names(data)  # none of labels that are names: they are looked up
    if names is None:
        return
    whole = sorted(names) == list(range(len(names)))
    differ = whole and len(names) != len(classes)
    digits = [int(name) for name in names.values() if name.isdecimal()]
    if numbered(classes):
        differ |= len(digits) == len(names) and digits != sorted(digits)  # "10" before "2"
    else:
        differ |= any(index < len(classes) and name != classes[index] for index, name in names.items())
    if differ:
        own = repr([names[index] for index in range(len(names))]) if whole and len(names) <= 12 else "data.classes"
        raise HeadMismatchError(
            f"the data has {_listed(names)}, the model {len(classes)} ({', '.join(classes[:8])}): expected the same "
            f"classes in the same order. To train on this data, make the model with classes={own}.",
            *(_KNOWN.splitlines() if {*names.values()} <= {*classes} else ()),
        )


def _check_folders(data: DatasetFolder) -> None:
    hidden = [name for name in data.classes if name.startswith(".") or name in NO_CLASS]
    if hidden:
        raise HeadMismatchError(
            f"the data has {hidden[0]!r} as a class, a folder that a program made beside the class folders. Delete "
            f"{Path(data.root) / hidden[0]}, and create the ImageFolder and the head again."
        )
    parts = [name for name in data.classes if name.lower() in SPLITS]
    holds = any((Path(data.root) / part / name).is_dir() for part in parts for name in data.classes)
    if len(parts) > 1 or holds:
        raise HeadMismatchError(
            f"the data has the classes {', '.join(data.classes[:8])}: {' and '.join(parts)} look like parts of a data "
            f"set. Pass the folder that holds the class folders: ImageFolder({str(Path(data.root) / parts[0])!r})."
        )


def _listed(names: Mapping[int, str]) -> str:
    first = ", ".join(list(names.values())[:8])
    return f"{len(names)} classes ({first}{', ...' if len(names) > 8 else ''})"


def _names_of(data: Any) -> dict[int, str] | None:
    features = getattr(data, "features", None) if hasattr(data, "column_names") else None  # of Hugging Face
    if isinstance(features, Mapping):
        label = find_column(list(features), "label")
        names = None if label is None else getattr(features[label], "names", None)
        return None if names is None else dict(enumerate(map(str, names)))
    names, indices = getattr(data, "classes", None), getattr(data, "class_to_idx", None)
    names = [str(name) for name in names] if isinstance(names, list | tuple | np.ndarray) and len(names) else None
    if isinstance(indices, Mapping) and indices and all(isinstance(index, Integral) for index in indices.values()):
        by_index = {int(index): str(name) for name, index in sorted(indices.items(), key=lambda item: item[1])}
        if len(by_index) == len(indices) and (names is None or {*by_index.values()} == {*names}):
            return by_index  # else the list was written later
    return None if names is None else dict(enumerate(names))


def _renumbered(names: dict[int, str], transform: Any) -> dict[int, str] | None:
    """Return the names by the indices that a `target_transform` makes; None if it merges classes or makes rows."""
    try:
        found = {int(transform(index)): name for index, name in names.items()}
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError):  # it takes or makes no class indices
        return None
    return {index: found[index] for index in sorted(found) if index >= 0} if len(found) == len(names) else None


def _wrapped(data: object) -> list[Any]:
    """Return the data sets directly inside another."""
    if isinstance(data, ConcatDataset):
        return list(data.datasets)
    if isinstance(data, Subset | DataLoader):
        return [data.dataset]
    held = vars(data).values() if isinstance(data, Dataset) and hasattr(data, "__dict__") else ()
    return [value for value in held if isinstance(value, Dataset) or hasattr(value, "column_names")]


def _some_targets(data: Any) -> dict[int, Any]:
    samples, indices = Samples(data, with_targets=True), evenly_spaced(len(data))
    read = [samples.try_read(index, 0) for index in indices]
    return {sample[2]: sample[1] for sample in read if not isinstance(sample, TransferKitError)}


def _length(data: Any) -> int | None:
    return len(data) if hasattr(data, "__len__") else None
