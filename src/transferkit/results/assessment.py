"""A model's predictions for labeled images, image by image, and the metrics that follow from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch

from transferkit.base.arguments import fraction, whole_number
from transferkit.data.open import open_data
from transferkit.data.targets import class_indices
from transferkit.errors import ArgumentError, printable
from transferkit.results.figures import Axes, Figure, open_axes
from transferkit.results.gallery import draw_images, read_pixels
from transferkit.results.tabular import html_table, text_table

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


def confusion_matrix(targets: npt.ArrayLike, predicted: npt.ArrayLike, num_classes: int) -> Integers:
    """Return how often each class was predicted for each true class, int64 `(K, K)`: rows are true classes.

    `targets` and `predicted` are class indices `(N,)`, from 0 to `num_classes - 1`.

    Raises:
        ArgumentError: When indices are out of range, or there are not as many of one as of the other.

    Example:
        >>> confusion_matrix([0, 0, 1], [0, 1, 1], num_classes=2)
        array([[1, 1],
               [0, 1]])
    """
    whole_number("num_classes", num_classes)
    true, guessed = np.asarray(targets), np.asarray(predicted)
    for name, indices in (("targets", true), ("predicted", guessed)):
        whole = indices.ndim == 1 and (indices.dtype.kind in "iu" or indices.size == 0)
        if not whole or not ((indices >= 0) & (indices < num_classes)).all():
            raise ArgumentError(
                f"{name} of shape {indices.shape} and type {indices.dtype} cannot be counted: expected class indices, "
                f"integers (N,) from 0 to {num_classes - 1}."
            )
    if len(true) != len(guessed):
        raise ArgumentError(f"{len(true)} targets but {len(guessed)} predicted: expected one for each image.")
    pairs = true.astype(np.int64) * num_classes + guessed.astype(np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)


def expected_calibration_error(probabilities: npt.NDArray[np.float64], targets: Integers, *, bins: int = 15) -> float:
    """Return the mean distance between confidence and accuracy, 0 to 1, over bins of equal width (Guo et al., 2017).

    Targets are class indices `(N,)`, and the confidence of an image is the largest of its probabilities `(N, K)`. Or
    they are labels `(N, K)`, 0 and 1: each label is a case of its own, and right where the image has it.
    """
    if targets.ndim == 2:
        confidence, right = probabilities.ravel(), (targets >= 0.5).ravel()
    else:
        confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # (0, 1/bins], (1/bins, 2/bins], ...
    distances = np.abs(np.bincount(bin_of, right - confidence, minlength=bins))  # in each bin, times its size
    return float(distances.sum() / len(confidence))


class ClassFigures(NamedTuple):
    """How well one class is distinguished from the others.

    Attributes:
        name: Of the class.
        precision: Fraction of the images predicted as this class that have it; NaN if none was predicted so.
        recall: Fraction of this class's images that were predicted as it; NaN if it has none.
        f1: Harmonic mean of both, 0 where nothing was right; NaN if the class occurs nowhere.
        support: Number of its images.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Assessment:
    """A model's predictions for each image of labeled data; from `Trainer.assess`.

    Attributes:
        probabilities: Of each class, float32 `(N, K)`, in the order of the data.
        losses: Loss of each image without smoothing and weights, float32 `(N,)`: higher means less probability on the
            true class.
        targets: True class indices, int64 `(N,)`; of soft targets, the largest. Or true labels, bool `(N, K)`, if an
            image may have several.
        classes: The class names.
        threshold: Probability from which a label counts as predicted; None if each image has exactly one label.
        metrics: The trainer's metrics over these images, by name.
        temperature: What the model divides its logits by; see `Trainer.calibrate`.
        novelty: How unlike the training images each image is, float32 `(N,)`, above 0 where it counts as unknown; None
            unless `Trainer.learn_known` was called.

    Example:
        >>> probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]], np.float32)
        >>> losses = -np.log(np.array([0.9, 0.6, 0.3], np.float32))
        >>> assessment = Assessment(probabilities, losses, np.array([0, 1, 1]), ("cat", "dog"))
        >>> print(assessment)
        accuracy 0.6667, loss 0.6067, 3 images
        class  precision  recall      f1  images
        cat       0.5000  1.0000  0.6667       1
        dog       1.0000  0.5000  0.6667       2
        >>> assessment.confusion_matrix()
        array([[1, 0],
               [1, 1]])
        >>> assessment.most_confused(3)
        [('dog', 'cat', 1)]
    """

    probabilities: Floats
    losses: Floats
    targets: Integers
    classes: tuple[str, ...]
    threshold: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    novelty: Floats | None = None

    @property
    def predicted(self) -> Integers:
        """The most probable class index of each image, int64 `(N,)`; with a threshold, its labels, bool `(N, K)`."""
        if self.threshold is not None:
            return cast("Integers", self.probabilities >= self.threshold)
        return cast("Integers", self.probabilities.argmax(axis=1))

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return float(self.losses.mean(dtype=np.float64))

    @property
    def accuracy(self) -> float:
        """Fraction of the images whose most probable class is the true one, 0 to 1.

        With a threshold, the mean Jaccard index of true and predicted labels; an image without either counts 1.
        """
        if self.threshold is None:
            return float((self.predicted == self.targets).mean())
        both = (self.predicted & self.targets).sum(axis=1)
        either = (self.predicted | self.targets).sum(axis=1)
        return float(np.where(either > 0, both / np.maximum(either, 1), 1.0).mean())

    def accuracy_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return a confidence interval of the accuracy on all images of this kind (Wilson, 1927).

        Raises:
            ArgumentError: When `confidence` is not from 0 to below 1, or an image may have several labels.
        """
        self._one_label("accuracy_interval")
        z, count = NormalDist().inv_cdf(0.5 + fraction("confidence", confidence) / 2), len(self.targets)
        centre = self.accuracy + z**2 / (2 * count)
        half = z * math.sqrt(self.accuracy * (1 - self.accuracy) / count + z**2 / (4 * count**2))
        shrunk = 1 + z**2 / count
        return (centre - half) / shrunk, (centre + half) / shrunk

    def calibration_error(self, *, calibrated: bool = True) -> float:
        """Return the expected calibration error: how far confidence is from accuracy, 0 to 1, over 15 bins.

        `calibrated=False` leaves out the temperature.
        """
        probabilities = self.probabilities.astype(np.float64)
        if not calibrated:  # without a temperature, probabilities are in proportion to these powers
            powers = probabilities**self.temperature
            others = (1 - probabilities) ** self.temperature
            probabilities = powers / (powers.sum(axis=1, keepdims=True) if self.threshold is None else powers + others)
        return expected_calibration_error(probabilities, self.targets)

    def top_k_accuracy(self, k: int) -> float:
        """Return the fraction of the images whose true class is among the `k` most probable ones, 0 to 1.

        Raises:
            ArgumentError: When `k` is not 1 to the number of classes, or an image may have several labels.
        """
        self._one_label("top_k_accuracy")
        if whole_number("k", k) > len(self.classes):
            raise ArgumentError(f"k={k} cannot be used: expected 1 to {len(self.classes)}, the number of classes.")
        likeliest = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :k]  # of equal ones the first, as argmax
        return float((likeliest == self.targets[:, None]).any(axis=1).mean())

    def confusion_matrix(self) -> Integers:
        """Return how often each class was taken for each other, int64 `(K, K)`: rows are true, columns predicted.

        Raises:
            ArgumentError: When an image may have several labels; `per_class` counts them.
        """
        self._one_label("confusion_matrix")
        return confusion_matrix(self.targets, self.predicted, len(self.classes))

    def most_confused(self, count: int) -> list[tuple[str, str, int]]:
        """Return the most frequent confusions: true class, predicted class, number of images.

        Raises:
            ArgumentError: When `count` is below 1, or an image may have several labels.
        """
        counts = self.confusion_matrix()
        np.fill_diagonal(counts, 0)
        order = np.argsort(-counts, axis=None, kind="stable")[: whole_number("count", count)]
        pairs = [divmod(place, len(counts)) for place in order.tolist()]
        return [(self.classes[i], self.classes[j], int(counts[i, j])) for i, j in pairs if counts[i, j]]

    def per_class(self) -> list[ClassFigures]:
        """Return precision, recall, F1 and number of images of each class."""
        true, predicted = self._labels(self.targets), self._labels(self.predicted)
        both, support, found = (true & predicted).sum(axis=0), true.sum(axis=0), predicted.sum(axis=0)
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
            columns = both / found, both / support, 2 * both / (found + support), support
        return [ClassFigures(*row) for row in zip(self.classes, *(each.tolist() for each in columns), strict=True)]

    def worst(self, num_images: int) -> Integers:
        """Return the indices of the images with the highest loss, the worst first, int64."""
        return np.argsort(-self.losses, kind="stable")[: whole_number("num_images", num_images)]

    def __str__(self) -> str:
        return f"{self._first_line()}\n{text_table(self._table())}"

    __repr__ = __str__  # what an interpreter shows

    def _repr_html_(self) -> str:
        return f"<p>{self._first_line()}</p>{html_table(self._table())}"

    def _first_line(self) -> str:
        parts = [f"accuracy {self.accuracy:.4f}", f"loss {self.loss:.4f}"]
        parts += [f"{name} {value:.4f}" for name, value in self.metrics.items()]
        if self.temperature != 1:
            now, before = self.calibration_error(), self.calibration_error(calibrated=False)
            parts.append(f"calibration error {now:.4f} ({before:.4f} without temperature)")
        if self.novelty is not None:
            parts.append(f"{(self.novelty > 0).mean():.1%} unknown")
        return ", ".join([*parts, f"{len(self.targets):,} images"])

    def _table(self) -> list[list[str]]:
        table = [["class", "precision", "recall", "f1", "images"]]
        for name, *row, count in self.per_class():
            table.append([printable(name), *(f"{each:.4f}" for each in row), str(count)])
        return table

    def _labels(self, values: Integers) -> npt.NDArray[np.bool_]:
        """Return class indices as one row of labels for each image, bool `(N, K)`; labels as they are."""
        labels = values.astype(bool) if values.ndim == 2 else np.eye(len(self.classes), dtype=bool)[values]
        return cast("npt.NDArray[np.bool_]", labels)

    def _one_label(self, what: str) -> None:
        if self.threshold is not None:
            raise ArgumentError(
                f"{what} needs images with exactly one label, but here they may have several: per_class() counts the "
                "labels of each class."
            )


def plot_confusion_matrix(assessment: Assessment, *, ax: Axes | None = None, normalize: bool = False) -> Figure:
    """Draw how often each class was taken for each other: rows are true classes, columns predicted ones.

    If an image may have several labels, the columns are labels found, labels missed, and labels predicted wrongly.
    Colors show fractions of each true class; `normalize` writes these instead of counts. It is drawn on `ax`, or on a
    new figure.

    Raises:
        MissingPackageError: When matplotlib is not installed.

    Example:
        >>> half = np.full((4, 2), 0.5, np.float32)
        >>> figure = plot_confusion_matrix(Assessment(half, half[:, 0], np.array([0, 1, 1, 0]), ("cat", "dog")))
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['2', '0', '2', '0']
    """
    names, columns, label = assessment.classes, assessment.classes, "predicted class"
    if assessment.threshold is None:
        counts = assessment.confusion_matrix()
        totals = counts.sum(axis=1, keepdims=True)
    else:
        true, predicted = assessment.targets.astype(bool), assessment.predicted.astype(bool)
        counts = np.stack([(true & predicted).sum(0), (true & ~predicted).sum(0), (~true & predicted).sum(0)], axis=1)
        columns, label, totals = ("found", "missed", "false"), "labels", true.sum(axis=0)[:, None]
    fractions = counts / np.maximum(totals, 1)
    side = 2.5 + 0.45 * min(len(counts), 30)
    ax, figure = open_axes(ax, width=side + 0.5, height=side)
    image = ax.imshow(fractions, cmap="Blues", vmin=0.0, vmax=1.0, aspect="equal")
    if assessment.threshold is not None:
        ax.set_aspect("auto")
    ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel=label, ylabel="true class", title=f"accuracy {assessment.accuracy:.3f}")
    if len(counts) <= 20:  # numbers of more classes would be too small
        for row, column in np.ndindex(*counts.shape):
            value = f"{fractions[row, column]:.2f}" if normalize else f"{counts[row, column]}"
            color = "white" if fractions[row, column] > 0.5 else "black"
            ax.text(column, row, value, ha="center", va="center", color=color, fontsize="small")
    figure.colorbar(image, ax=ax, label="fraction of the true class", shrink=0.8)
    return figure


def plot_predictions(assessment: Assessment, data: object, *, num_images: int = 12, ax: Axes | None = None) -> Figure:
    """Show images with their predicted class and its probability, the worst first.

    The worst have the highest loss: the model was sure and wrong. Wrong predictions have a red title, with the true
    class in parentheses. Of the data that was assessed, `(images, targets)` or a `Dataset`, only the images shown are
    read. They are drawn on `ax`, or on a new figure.

    Raises:
        ArgumentError: When the data is not what was assessed, or a `DataLoader`, or `num_images` is below 1.
        MissingPackageError: When matplotlib is not installed.

    Example:
        >>> images, targets = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), np.array([0, 1, 1, 0])
        >>> half = np.full((4, 2), 0.5, np.float32)
        >>> figure = plot_predictions(Assessment(half, half[:, 0], targets, ("cat", "dog")), (images, targets))
        >>> [part.get_title() for part in figure.axes[0].child_axes]
        ['cat 0.50', 'cat 0.50 (dog)', 'cat 0.50 (dog)', 'cat 0.50']
    """
    source = open_data(data, assessment.classes, multi_label=assessment.threshold is not None)
    if source.num_images != len(assessment.targets):
        raise ArgumentError(
            f"data has {source.num_images or 'an unknown number of'} images, the assessment {len(assessment.targets)}: "
            "expected the same data, (images, targets) or a Dataset."
        )
    places = assessment.worst(num_images)
    given = source.all_targets(torch.as_tensor(places))
    given = class_indices(given) if assessment.threshold is None else given >= 0.5
    differs = (given.numpy() != assessment.targets[places]).reshape(len(places), -1).any(axis=1)
    if differs.any():
        raise ArgumentError(
            f"image {places[differs][0]} of the data is not the one that was assessed: its target differs. Expected "
            "the same data in the same order, and no DataLoader that shuffles in assess."
        )
    true, found = (assessment._labels(labels)[places] for labels in (assessment.targets, assessment.predicted))
    names = np.array(assessment.classes)
    told, expected = ([" + ".join(names[row]) or "none" for row in labels] for labels in (found, true))
    if assessment.threshold is None:
        told = [f"{name} {assessment.probabilities[place].max():.2f}" for name, place in zip(told, places, strict=True)]
    wrong = (true != found).any(axis=1).tolist()
    titles = [f"{what} ({name})" if bad else what for what, name, bad in zip(told, expected, wrong, strict=True)]
    return draw_images(read_pixels(source, places.tolist()), titles, wrong=wrong, ax=ax)
