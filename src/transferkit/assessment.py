"""What a model makes of labelled images, image by image, and the figures that follow from it."""

import html
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from transferkit.arguments import whole_number
from transferkit.errors import ArgumentError

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


def confusion_matrix(targets: npt.ArrayLike, predicted: npt.ArrayLike, num_classes: int) -> Integers:
    """Count how often which class was taken for which.

    Args:
        targets: True class indices, `(N,)`.
        predicted: Predicted ones, `(N,)`.
        num_classes: They run from 0 to `num_classes - 1`.

    Returns:
        int64 `(num_classes, num_classes)`: rows are true classes, columns predicted ones.

    Raises:
        ArgumentError: Indices out of range, or different numbers of them.

    Example:
        >>> confusion_matrix([0, 0, 1], [0, 1, 1], num_classes=2)
        array([[1, 1],
               [0, 1]])
    """
    whole_number("num_classes", num_classes)
    true, guessed = np.asarray(targets), np.asarray(predicted)
    for name, indices in (("targets", true), ("predicted", guessed)):
        whole = indices.ndim == 1 and (indices.dtype.kind in "iu" or indices.size == 0)
        if not whole or (indices.size and not (indices.min() >= 0 and indices.max() < num_classes)):
            raise ArgumentError(
                f"{name} of shape {indices.shape} and type {indices.dtype} cannot be counted: expected class indices, "
                f"integers (N,) from 0 to {num_classes - 1}."
            )
    if len(true) != len(guessed):
        raise ArgumentError(f"{len(true)} targets but {len(guessed)} predicted: expected one for each image.")
    pairs = true.astype(np.int64) * num_classes + guessed.astype(np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)


class ClassFigures(NamedTuple):
    """How well one class is told from the others.

    Attributes:
        name: Of the class.
        precision: Share of the images predicted as this class that are of it; NaN if none was.
        recall: Share of this class's images that were predicted as it; NaN if there is none.
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
    """What a model made of each image of labelled data; from `Trainer.assess`.

    Attributes:
        probabilities: Of each class, float32 `(N, K)`, in the order of the data.
        losses: Cross-entropy of each image, float32 `(N,)`: how little was thought of its true class.
        targets: True class indices, int64 `(N,)`; of soft targets, the largest.
        classes: The class names.

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
    """

    probabilities: Floats
    losses: Floats
    targets: Integers
    classes: tuple[str, ...]

    @property
    def predicted(self) -> Integers:
        """The most probable class index of each image, int64 `(N,)`."""
        predicted: Integers = self.probabilities.argmax(axis=1)
        return predicted

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return float(self.losses.mean(dtype=np.float64))

    @property
    def accuracy(self) -> float:
        """Share of the images whose most probable class is the true one, 0 to 1."""
        return float((self.predicted == self.targets).mean())

    def top_k_accuracy(self, k: int) -> float:
        """Return the share of the images whose true class is among the `k` most probable ones, 0 to 1.

        Raises:
            ArgumentError: `k` is not 1 to the number of classes.
        """
        if whole_number("k", k) > len(self.classes):
            raise ArgumentError(f"k={k} cannot be used: expected 1 to {len(self.classes)}, the number of classes.")
        true = self.probabilities[np.arange(len(self.targets)), self.targets]
        ahead = (self.probabilities > true[:, None]).sum(axis=1)
        first = self.predicted == self.targets  # of equal ones argmax takes the first: top 1 is the accuracy
        return float(((ahead < k) if k > 1 else first).mean())

    def confusion_matrix(self) -> Integers:
        """Return how often which class was taken for which, int64 `(K, K)`: rows are true, columns predicted."""
        return confusion_matrix(self.targets, self.predicted, len(self.classes))

    def per_class(self) -> list[ClassFigures]:
        """Return precision, recall, F1 and number of images of each class."""
        matrix = self.confusion_matrix()
        return [
            ClassFigures(
                name,
                _ratio(matrix[i, i], matrix[:, i].sum()),
                _ratio(matrix[i, i], matrix[i].sum()),
                _ratio(2 * matrix[i, i], matrix[:, i].sum() + matrix[i].sum()),
                int(matrix[i].sum()),
            )
            for i, name in enumerate(self.classes)
        ]

    def worst(self, num_images: int) -> Integers:
        """Return the places in the data of the images with the highest loss, the worst first, int64."""
        order = np.argsort(-self.losses, kind="stable")
        worst: Integers = order[: whole_number("num_images", num_images)].astype(np.int64)
        return worst

    def __str__(self) -> str:
        width = max(5, *map(len, self.classes))
        lines = [self._first_line(), f"{'class':{width}}  precision  recall      f1  images"]
        lines += [
            f"{row.name:{width}}  {row.precision:9.4f}  {row.recall:6.4f}  {row.f1:6.4f}  {row.support:6}"
            for row in self.per_class()
        ]
        return "\n".join(lines)

    __repr__ = __str__  # what an interpreter shows

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("class", "precision", "recall", "F1", "images"))
        rows = "".join(
            f"<tr><td>{html.escape(row.name)}</td><td>{row.precision:.4f}</td><td>{row.recall:.4f}</td>"
            f"<td>{row.f1:.4f}</td><td>{row.support}</td></tr>"
            for row in self.per_class()
        )
        return f"<p>{self._first_line()}</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    def _first_line(self) -> str:
        return f"accuracy {self.accuracy:.4f}, loss {self.loss:.4f}, {len(self.targets):,} images"


def _ratio(part: int, whole: int) -> float:
    return float(part / whole) if whole else float("nan")
