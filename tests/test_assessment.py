"""Figures by class, top k and the confusion matrix, against loops written out."""

import math
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import transferkit as tk
from transferkit.errors import ArgumentError

CLASSES = ("cat", "dog", "owl", "<b>eel</b>")
scores = arrays(np.float32, (9, 4), elements=st.floats(0, 1, width=32))
indices = arrays(np.int64, 9, elements=st.integers(0, 3))


def make(probabilities, targets) -> tk.Assessment:
    return tk.Assessment(probabilities, np.arange(len(targets), dtype=np.float32), targets, CLASSES)


@given(indices, indices)
def test_confusion_matrix_counts_pairs(targets, predicted):
    """Row i, column j has the number of images of class i that were taken for j."""
    matrix = tk.confusion_matrix(targets, predicted, 4)
    for i in range(4):
        for j in range(4):
            assert matrix[i, j] == sum(t == i and p == j for t, p in zip(targets, predicted, strict=True))


@given(scores, indices)
def test_figures_of_each_class(probabilities, targets):
    """Precision, recall and F1 are those of their definitions; NaN where there is nothing to divide by."""
    assessment = make(probabilities, targets)
    predicted = assessment.predicted
    for i, row in enumerate(assessment.per_class()):
        hits = sum((targets == i) & (predicted == i))
        guessed, support = sum(predicted == i), sum(targets == i)
        expected = (
            hits / guessed if guessed else math.nan,
            hits / support if support else math.nan,
            2 * hits / (guessed + support) if guessed + support else math.nan,
        )
        assert (row.precision, row.recall, row.f1) == pytest.approx(expected, nan_ok=True)
        assert (row.name, row.support) == (CLASSES[i], support)


@given(scores, indices)
def test_top_k_grows_from_the_accuracy_to_one(probabilities, targets):
    """Top 1 is the accuracy, more classes never lower it, all classes make 1."""
    assessment = make(probabilities, targets)
    values = [assessment.top_k_accuracy(k) for k in (1, 2, 3, 4)]
    assert values[0] == assessment.accuracy == pytest.approx((assessment.predicted == targets).mean())
    assert values == sorted(values)
    assert values[-1] == 1.0


def test_top_k_counts_the_true_class_among_the_most_probable():
    """The second most probable class counts for k = 2 and not for k = 1."""
    probabilities = np.array([[0.5, 0.3, 0.2, 0.0], [0.5, 0.3, 0.2, 0.0]], np.float32)
    assessment = make(probabilities, np.array([1, 2]))
    assert [assessment.top_k_accuracy(k) for k in (1, 2, 3)] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("k", [0, 5, True, 1.5])
def test_top_k_out_of_range_is_refused(k):
    """k is 1 to the number of classes."""
    with pytest.raises(ArgumentError, match=f"k={k}"):
        make(np.ones((2, 4), np.float32), np.array([0, 1])).top_k_accuracy(k)


def test_the_worst_come_first():
    """Places are ordered by loss, the highest first, and no more come than there are."""
    assert make(np.ones((3, 4), np.float32), np.array([0, 1, 2])).worst(2).tolist() == [2, 1]
    assert len(make(np.ones((3, 4), np.float32), np.array([0, 1, 2])).worst(9)) == 3


@pytest.mark.parametrize(
    ("targets", "predicted", "message"),
    [
        ([0, 4], [0, 1], "targets of shape .* from 0 to 3"),
        ([0, 1], [0, -1], "predicted of shape"),
        ([0.5, 1], [0, 1], "targets of shape .* type float64"),
        ([[0, 1]], [0, 1], r"targets of shape \(1, 2\)"),
        ([0, 1, 2], [0, 1], "3 targets but 2 predicted"),
    ],
)
def test_what_cannot_be_counted_is_refused(targets, predicted, message):
    """Indices out of range, fractions, other shapes and different numbers are refused by name."""
    with pytest.raises(ArgumentError, match=message):
        tk.confusion_matrix(targets, predicted, 4)


def test_it_prints_a_line_for_each_class_and_escapes_names_in_html():
    """The report has a line for each class; in HTML a class name is text, not markup."""
    assessment = make(np.eye(4, dtype=np.float32), np.arange(4))
    assert [line.split()[0] for line in str(assessment).splitlines()] == ["accuracy", "class", *CLASSES]
    assert repr(assessment) == str(assessment)
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, _: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(assessment._repr_html_())
    assert "b" not in tags
    assert tags.count("tr") == 5
