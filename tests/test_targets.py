"""The forms in which targets may come in."""

import re

import numpy as np
import pytest
import torch

from transferkit.data.targets import as_targets, class_indices
from transferkit.errors import TargetError


@pytest.mark.parametrize(
    "targets",
    [
        [2, 0, 1],
        (2, 0, 1),
        np.array([2, 0, 1], np.uint8),
        np.array([2, 0, 1], np.int16),
        np.array([[2], [0], [1]], np.int64),
        torch.tensor([2, 0, 1], dtype=torch.int32),
        torch.tensor([[2], [0], [1]], dtype=torch.uint8),
    ],
)
def test_class_indices_become_int64(targets):
    """Class indices of any integer type, flat or as a column, become int64 `(N,)`."""
    result = as_targets(targets, 3)
    assert result.dtype == torch.int64
    assert result.tolist() == [2, 0, 1]


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float64, bool])
def test_one_hot_rows_become_float32(dtype):
    """One-hot rows of any number type become float32 `(N, K)`."""
    result = as_targets(np.eye(3, dtype=dtype), 3)
    assert result.dtype == torch.float32
    assert torch.equal(result, torch.eye(3))


def test_soft_rows_keep_their_shares():
    """Rows of shares that sum to one pass as they are."""
    rows = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    assert torch.equal(as_targets(rows, 2), rows)


def test_rows_rounded_to_bfloat16_pass():
    """Rows whose sum misses one by rounding only are accepted."""
    rows = torch.tensor([[0.1, 0.2, 0.7], [1 / 3, 1 / 3, 1 / 3]]).bfloat16()
    assert as_targets(rows, 3).shape == (2, 3)


@pytest.mark.usefixtures("every_warning")
def test_read_only_array_of_targets_is_taken():
    """A read-only array is used and nobody is warned (warnings are errors here)."""
    targets = np.array([2, 0, 1])
    targets.flags.writeable = False
    assert as_targets(targets, 3).tolist() == [2, 0, 1]


def test_reversed_array_of_targets_is_taken():
    """`targets[::-1]`, which has a negative stride, is used."""
    assert as_targets(np.array([1, 0, 2])[::-1], 3).tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        ([0, 1, -1], r"target -1 at index 2 is out of range: expected 0 to 2 for 3 classes"),
        ([0, 3, 1], r"target 3 at index 1 is out of range: expected 0 to 2.*pass more as classes="),
        ([1, 2, 3], r"target 3 at index 2 .*expected 0 to 2.*start at 1, subtract 1"),
        ([[0], [7]], r"target 7 at index 1 is out of range: expected 0 to 2"),
        ([0.0, 1.0], r"shape \(2,\) and dtype torch.float64: expected class indices.*astype\('int64'\)"),
        ([[0.0], [1.0]], r"shape \(2,\) and dtype torch.float64: expected class indices.*astype\('int64'\)"),
        ([True, False], r"shape \(2,\) and dtype torch.bool: expected class indices"),
        ([[1, 0], [0, 1]], r"shape \(2, 2\).*expected class indices.*or rows \(N, 3\)"),
        (
            [[0.5, 0.5, 0.0], [1.0, 1.0, 0.0]],
            r"row 1 sums to 2, and its smallest entry is 0: expected numbers.*several labels",
        ),
        ([[1.0, 0.0, 0.0], [1.5, -0.5, 0.0]], r"row 1 sums to 1, and its smallest entry is -0.5: expected numbers"),
        ([[0.0, 0.0, 0.0]], r"row 0 sums to 0, .*expected numbers from 0 to 1 that sum to 1"),
        ([[float("nan"), 1.0, 0.0]], r"row 0 sums to nan, .*expected numbers"),
        (["cat", "dog"], r"targets are not numbers .*expected class indices, such as \[classes.index"),
        ([[0], [1, 2]], r"targets are not numbers .*expected class indices"),
        ([0, None, 1], r"target None at index 1 is no number: expected class indices.*Leave that image out"),
    ],
)
def test_other_targets_are_refused(targets, match):
    """Targets that cannot be used are refused with the first bad one, what is expected and what to do."""
    with pytest.raises(TargetError, match=match):
        as_targets(targets, 3)


@pytest.mark.parametrize("dtype", [float, bool])
@pytest.mark.parametrize(
    "form", [np.asarray, torch.tensor, list, tuple, lambda y: np.asarray(y)[:, None], lambda y: list(torch.tensor(y))]
)
def test_the_advice_to_convert_works_for_every_type(form, dtype):
    """Class indices in floats or bools, in whatever holds them, are converted by the line in the message."""
    targets = form([dtype(index) for index in (1, 0, 1)])
    with pytest.raises(TargetError, match="expected class indices") as caught:
        as_targets(targets, 3)
    line = re.search(r"convert them: (.*)\.$", str(caught.value))[1]
    assert as_targets(eval(line, {"numpy": np, "targets": targets}), 3).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "targets",
    [
        [2, 0, 1],
        torch.tensor([2, 0, 1]),
        torch.tensor([[2], [0], [1]], dtype=torch.uint8),
        np.array([2, 0, 1], np.int32),
    ],
)
def test_the_advice_to_make_rows_of_one_label_works(targets):
    """Where an image may have several labels, class indices and names become rows by the lines in the message."""
    with pytest.raises(TargetError, match="several labels per image") as caught:
        as_targets(targets, 3, multi_label=True)
    of_indices, of_names = re.search(
        r"indices are made by (.*), those of names by (.*), with classes", str(caught.value)
    ).groups()
    expected = torch.eye(3)[[2, 0, 1]]
    assert torch.equal(as_targets(eval(of_indices, {"numpy": np, "targets": targets}), 3, multi_label=True), expected)
    rows = eval(of_names, {"classes": ["cat", "dog", "owl"], "targets": ["owl", "cat", "dog"]})
    assert torch.equal(as_targets(rows, 3, multi_label=True), expected)


@pytest.mark.parametrize(
    "targets", [[["a"], ["b", "c"]], [["a", "c"], ["b", "a"]], [{"a"}, {"b", "c"}], [[5], [], [2, 8]]]
)
@pytest.mark.parametrize("multi_label", [False, True])
def test_the_advice_to_make_rows_of_lists_works(targets, multi_label):
    """Lists of names, or of numbers, become rows by the lines in the message, one column for each name."""
    with pytest.raises(TargetError, match="targets are not numbers") as caught:
        as_targets(targets, 3, multi_label=multi_label)
    scope = {"targets": targets}
    exec(
        re.search(r"(classes = .*), with classes=classes", str(caught.value))[1].replace(", targets =", "; targets ="),
        scope,
    )
    rows = as_targets(scope["targets"], 3, multi_label=True)
    assert [{scope["classes"][index] for index in row.nonzero().flatten()} for row in rows] == [*map(set, targets)]


@pytest.mark.parametrize(
    ("targets", "match"), [([0, 9], "target 9 at index 41"), ([[1.0, 0.0], [1.0, 1.0]], "target row 41 sums to 2")]
)
def test_the_place_in_the_data_set_is_named(targets, match):
    """A bad target is named by its place in the data set, not in the batch."""
    with pytest.raises(TargetError, match=match):
        as_targets(targets, 2, indices=[17, 41])


def test_class_of_a_row_is_its_largest_share():
    """`class_indices` leaves indices and takes a row's largest share."""
    assert class_indices(torch.tensor([2, 0])).tolist() == [2, 0]
    assert class_indices(torch.tensor([[0.2, 0.5, 0.3], [0.9, 0.1, 0.0]])).tolist() == [1, 0]
