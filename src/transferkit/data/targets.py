"""The forms of targets that the library accepts, and the ones it uses.

Targets are class indices, int64 `(N,)`, or one row for each image, float32 `(N, K)`: probabilities that sum to one or,
where an image may have several labels, a number from 0 to 1 for each label.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from transferkit.base.arrays import tensor_from_array
from transferkit.errors import TargetError

_ROW_SUM_TOLERANCE = 1e-2  # accepts rows rounded to bfloat16 or read from a text file


def as_targets(
    targets: object, num_classes: int, *, multi_label: bool = False, indices: Sequence[int] | None = None
) -> Tensor:
    """Return targets as int64 `(N,)` or float32 `(N, num_classes)`; `TargetError` names the first that is neither.

    Args:
        targets: A tensor, an array or a sequence: class indices of any integer dtype, `(N,)` or `(N, 1)`; or one-hot
            or soft rows `(N, num_classes)` of any dtype.
        num_classes: Class indices run from 0 to `num_classes - 1`.
        multi_label: Whether an image may have several labels: only rows of numbers from 0 to 1 are accepted.
        indices: Index of each target in the data set, for the message; None if `targets` is the whole data set.
    """
    try:
        values = targets if isinstance(targets, Tensor) else tensor_from_array(np.asanyarray(targets))
    except (TypeError, ValueError) as error:
        expected = f"class indices 0 to {num_classes - 1}, such as [classes.index(name) for name in names]"
        raise TargetError(f"targets are not numbers ({error}): expected {expected}.") from error
    if multi_label:
        return _check_labels(values, num_classes, indices)
    if values.ndim == 2 and values.shape[1] == 1 and not values.is_floating_point():
        values = values[:, 0]  # (N, 1), as in keras.datasets.cifar10
    got = f"targets have shape {tuple(values.shape)} and dtype {values.dtype}"
    if values.ndim == 2 and values.shape[1] == num_classes:
        return _check_probabilities(values.float(), indices)
    advice = "If these are class indices, convert them: targets.astype('int64')."
    if values.ndim == 1 and values.is_floating_point() and bool((fractional := values != values.round()).any()):
        row = int(fractional.nonzero()[0])
        got += f", such as {values[row].item():g} at index {indices[row] if indices else row}"
        if values.isnan().any():
            advice = "NaN stands for an unlabelled image: leave such images out."
    if values.ndim != 1 or values.is_floating_point() or values.dtype == torch.bool:
        raise TargetError(
            f"{got}: expected class indices, integers (N,), or rows (N, {num_classes}) that sum to one. {advice}"
        )
    classes = values.long()
    wrong = (classes < 0) | (classes >= num_classes)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        advice = "If labels start at 1, subtract 1; for more classes, use attach_head."
        if classes[row] < 0:
            advice = (
                "A negative label often stands for an unlabelled image: leave such images out. For arrays and lists: "
                "keep = numpy.asarray(targets) >= 0, and (numpy.asarray(images)[keep], numpy.asarray(targets)[keep]). "
                "For a Dataset: Subset(data, [index for index in range(len(data)) if data[index][1] >= 0])."
            )
        raise TargetError(
            f"target {int(classes[row])} at index {indices[row] if indices else row} is out of range: expected 0 to "
            f"{num_classes - 1} for {num_classes} classes. {advice}"
        )
    return classes


def class_indices(targets: Tensor) -> Tensor:
    """Return int64 `(N,)`: class indices as they are, or the index of each row's largest entry."""
    return targets if targets.ndim == 1 else targets.argmax(dim=1)


def _check_probabilities(rows: Tensor, indices: Sequence[int] | None) -> Tensor:
    wrong = ((rows.sum(dim=1) - 1).abs() > _ROW_SUM_TOLERANCE) | (rows < 0).any(dim=1) | rows.isnan().any(dim=1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise TargetError(
            f"target row {indices[row] if indices else row} sums to {float(rows[row].sum()):.4g}, and its smallest "
            f"entry is {float(rows[row].min()):.4g}: expected numbers from 0 to 1 that sum to 1. For several labels "
            "per image, pass Trainer(loss=transferkit.BinaryCrossEntropy())."
        )
    return rows


def _check_labels(values: Tensor, num_classes: int, indices: Sequence[int] | None) -> Tensor:
    if values.ndim != 2 or values.shape[1] != num_classes:
        raise TargetError(
            f"targets have shape {tuple(values.shape)} and dtype {values.dtype}: for several labels per image, "
            f"expected rows (N, {num_classes}) of 0 and 1. If these are class indices, pass "
            f"torch.nn.functional.one_hot(torch.as_tensor(targets), {num_classes}), or for one label per image "
            "Trainer(loss=transferkit.CrossEntropy())."
        )
    rows = values.float()
    if bool((wrong := ~((rows >= 0) & (rows <= 1)).all(dim=1)).any()):
        row = int(wrong.nonzero()[0])
        raise TargetError(
            f"target row {indices[row] if indices else row} has entries from {float(rows[row].min()):.4g} to "
            f"{float(rows[row].max()):.4g}: expected 1 for each label of the image and 0 for the others."
        )
    return rows
