"""The forms of targets that the library accepts, and the ones it uses: class indices, int64 `(N,)`, or rows, float32.

A row has probabilities `(K,)` that sum to one or, where an image may have several labels, numbers from 0 to 1.
"""

from collections.abc import Iterable, Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from transferkit.base.arrays import tensor_from_array
from transferkit.errors import TargetError

_ROUNDING = 1e-2  # of the sum of a row, in bfloat16 or in a text file

_UNLABELED = (
    "unlabeled image: leave such images out. Of arrays and lists: keep = numpy.asarray(targets, float).ravel() >= 0; "
    "([image for image, kept in zip(images, keep) if kept], numpy.asarray(targets, float)[keep].astype(int)). Of a "
    "Dataset: Subset(data, [index for index in range(len(data)) if data[index][1] >= 0]), with its name for 1 where "
    "samples have names."
)


def as_numbers(targets: object, indices: Sequence[int] | None = None) -> Tensor:
    """Return targets in any form as a tensor, a column `(N, 1)` as `(N,)`, or raise `TargetError`."""
    try:
        if isinstance(targets, list) and any(isinstance(target, Tensor) for target in targets):
            targets = torch.stack([torch.as_tensor(target) for target in targets])
        values = targets if isinstance(targets, Tensor) else tensor_from_array(np.asanyarray(targets))
    except (TypeError, ValueError, RuntimeError) as error:  # class names, gaps, or rows of different lengths
        found = list(targets) if isinstance(targets, Iterable) else [targets]
        for place, target in zip(indices or range(len(found)), found, strict=False):
            if not isinstance(target, Real | Iterable):
                expected = "expected class indices or rows of numbers. Leave that image out, or label it."
                raise TargetError(f"target {target!r} at index {place} is no number: {expected}") from error
        raise TargetError(
            f"targets are not numbers of one shape ({error}){f', in images {indices}' if indices else ''}: expected "
            "class indices, such as [classes.index(name) for name in names], or rows with a number for each class; "
            f"got {found[:1]!r} first. If an image has several labels: classes = sorted({{name for names in targets "
            "for name in names}), targets = [[name in names for name in classes] for names in targets], with "
            "classes=classes and loss=transferkit.BinaryCrossEntropy()."
        ) from error
    return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values  # (N, 1), as in keras.datasets.cifar10


def as_targets(
    targets: object, num_classes: int, *, multi_label: bool = False, indices: Sequence[int] | None = None
) -> Tensor:
    """Return targets as int64 `(N,)` or float32 `(N, num_classes)`; `TargetError` names the first that is neither.

    They are a tensor, an array or a sequence: class indices of any integer dtype, `(N,)` or `(N, 1)`, or one-hot or
    soft rows `(N, num_classes)` of any dtype; with `multi_label`, rows of numbers from 0 to 1 alone. `indices` are
    those of the targets in the data set, for the message; None if they are the whole data set.
    """
    values = as_numbers(targets, indices)
    got = f"targets have shape {tuple(values.shape)} and dtype {values.dtype}"
    if values.ndim == 2 and values.shape[1] == num_classes:
        return _check_rows(values.float(), indices, multi_label=multi_label)
    if multi_label:
        raise TargetError(
            f"{got}: for several labels per image, expected rows (N, {num_classes}) of 0 and 1. Rows of class indices "
            f"are made by numpy.eye({num_classes})[numpy.asarray(targets).ravel()], those of names by [[name == one "
            "for name in classes] for one in targets], with classes for the list of all names. For one label per "
            "image, pass loss=transferkit.CrossEntropy()."
        )
    whole = "targets.long()" if isinstance(targets, Tensor) else "numpy.asarray(targets).astype('int64')"
    advice = f"If these are class indices, convert them: {'int(target), in the data set' if indices else whole}."
    if values.ndim == 1 and values.is_floating_point() and bool((fractional := values.frac() != 0).any()):
        row = int(fractional.nonzero()[0])
        got += f", such as {values[row].item():g} at index {indices[row] if indices else row}"
        if values.isnan().any():
            advice = f"NaN stands for an {_UNLABELED}"
    if values.ndim != 1 or values.is_floating_point() or values.dtype == torch.bool:
        raise TargetError(
            f"{got}: expected class indices, integers (N,), or rows (N, {num_classes}) that sum to one. {advice}"
        )
    classes = values.long()
    wrong = (classes < 0) | (classes >= num_classes)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        advice = "If labels start at 1, subtract 1; for more classes, pass more as classes=."
        if classes[row] < 0:
            advice = f"A negative label often stands for an {_UNLABELED}"
        raise TargetError(
            f"target {int(classes[row])} at index {indices[row] if indices else row} is out of range: expected 0 to "
            f"{num_classes - 1} for {num_classes} classes. {advice}"
        )
    return classes


def class_indices(targets: Tensor) -> Tensor:
    """Return int64 `(N,)`: class indices as they are, or the index of each row's largest entry."""
    return targets if targets.ndim == 1 else targets.argmax(dim=1)


def _check_rows(rows: Tensor, indices: Sequence[int] | None, *, multi_label: bool) -> Tensor:
    in_range = (rows <= 1).all(dim=1) if multi_label else (rows.sum(dim=1) - 1).abs() <= _ROUNDING
    right = in_range & (rows >= 0).all(dim=1)  # false where there is NaN
    if bool(right.all()):
        return rows
    row = int((~right).nonzero()[0])
    least, most = float(rows[row].min()), float(rows[row].max())
    where = f"target row {indices[row] if indices else row}"
    if multi_label:
        expected = "expected 1 for each label of the image and 0 for the others."
        raise TargetError(f"{where} has entries from {least:.4g} to {most:.4g}: {expected}")
    raise TargetError(
        f"{where} sums to {float(rows[row].sum()):.4g}, and its smallest entry is {least:.4g}: expected numbers from 0 "
        "to 1 that sum to 1. For several labels per image, pass Trainer(loss=transferkit.BinaryCrossEntropy())."
    )
