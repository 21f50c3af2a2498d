"""The forms in which targets may come in, and the two in which the library uses them.

Targets are class indices, int64 `(N,)`, or one row for each image, float32 `(N, K)`: fractions that sum to one or,
where an image may have several labels, a number from 0 to 1 for each label.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from transferkit.base.arrays import tensor_from_array
from transferkit.errors import TargetError

_ROW_SUM_TOLERANCE = 1e-2  # rows that went through bfloat16 or a file of rounded numbers still pass


def as_targets(
    targets: object, num_classes: int, *, multi_label: bool = False, places: Sequence[int] | None = None
) -> Tensor:
    """Return targets as int64 `(N,)` or float32 `(N, num_classes)`.

    Args:
        targets: Class indices of any integer type, `(N,)` or `(N, 1)`; or one-hot or soft rows
            `(N, num_classes)` of any number type. A tensor, an array or a sequence.
        num_classes: Class indices run from 0 to `num_classes - 1`.
        multi_label: Whether an image may have several labels, or none. Then rows alone will do, of numbers from 0 to 1.
        places: Where in the data set each lies, for the message; None if they are all there is.

    Raises:
        TargetError: Another shape or type, an index out of range, a row that is negative or does not sum to one.

    Example:
        >>> as_targets([[2], [0]], num_classes=3)
        tensor([2, 0])
    """
    try:
        values = targets if isinstance(targets, Tensor) else tensor_from_array(np.asarray(targets))
    except (TypeError, ValueError) as error:
        raise TargetError(
            f"targets are not numbers ({error}): expected class indices 0 to {num_classes - 1}. Turn names into "
            "indices: [classes.index(name) for name in names]."
        ) from error
    if multi_label:
        return _checked_labels(values, num_classes, places)
    if values.ndim == 2 and values.shape[1] == 1 and not values.is_floating_point():
        values = values[:, 0]  # (N, 1), as keras.datasets.cifar10 has them
    got = f"targets have shape {tuple(values.shape)} and type {values.dtype}"
    if values.ndim == 2 and values.shape[1] == num_classes:
        return _checked_rows(values.float(), places)
    if values.ndim == 1 and values.is_floating_point() and bool((broken := values != values.round()).any()):
        row = int(broken.nonzero()[0])
        got += f", such as {values[row].item():g} at index {places[row] if places else row}"
    if values.ndim != 1 or values.is_floating_point() or values.dtype == torch.bool:
        raise TargetError(
            f"{got}: expected class indices, integers (N,), or rows (N, {num_classes}) that sum to one. If these are "
            "class indices, convert them: targets.astype('int64'). If there is another number of classes, say so in "
            "attach_head."
        )
    indices = values.long()
    wrong = (indices < 0) | (indices >= num_classes)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise TargetError(
            f"target {int(indices[row])} at index {places[row] if places else row} is out of range: expected 0 to "
            f"{num_classes - 1} for {num_classes} classes. Labels that begin with 1 need 1 subtracted; more classes "
            "are made with attach_head."
        )
    return indices


def class_indices(targets: Tensor) -> Tensor:
    """Return int64 `(N,)`: the targets themselves, or the place of each row's largest share."""
    return targets if targets.ndim == 1 else targets.argmax(dim=1)


def _checked_rows(rows: Tensor, places: Sequence[int] | None) -> Tensor:
    wrong = ((rows.sum(dim=1) - 1).abs() > _ROW_SUM_TOLERANCE) | (rows < 0).any(dim=1) | rows.isnan().any(dim=1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise TargetError(
            f"target row {places[row] if places else row} sums to {float(rows[row].sum()):.4g} with smallest entry "
            f"{float(rows[row].min()):.4g}: expected fractions from 0 to 1 that sum to 1 (one-hot or soft). If "
            "an image may have several labels, say so: Trainer(loss=transferkit.BinaryCrossEntropy())."
        )
    return rows


def _checked_labels(values: Tensor, num_classes: int, places: Sequence[int] | None) -> Tensor:
    if values.ndim != 2 or values.shape[1] != num_classes:
        raise TargetError(
            f"targets have shape {tuple(values.shape)} and type {values.dtype}: the loss is for images with several "
            f"labels, so expected rows (N, {num_classes}) of 0 and 1. Class indices become rows with "
            f"torch.nn.functional.one_hot(torch.as_tensor(targets), {num_classes}); for one label an image pass "
            "Trainer(loss=transferkit.CrossEntropy())."
        )
    rows = values.float()
    if bool((wrong := ~((rows >= 0) & (rows <= 1)).all(dim=1)).any()):
        row = int(wrong.nonzero()[0])
        raise TargetError(
            f"target row {places[row] if places else row} has entries from {float(rows[row].min()):.4g} to "
            f"{float(rows[row].max()):.4g}: expected 1 for each label of the image and 0 for the others."
        )
    return rows
