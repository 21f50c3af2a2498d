"""Pictures of what the library returns. Each is a matplotlib `Figure`, also where no window or notebook is.

matplotlib is optional (`pip install 'transferkit[notebook]'`) and imported when a picture is made; pyplot, which keeps
figures of its own in the process, is not used.
"""

import io
import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from transferkit.arguments import whole_number
from transferkit.assessment import Assessment
from transferkit.data import Source, open_data
from transferkit.errors import ArgumentError, MissingPackageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from transferkit.history import History
    from transferkit.learning_rate_sweep import LearningRateSweep

_WRITTEN = 20
"""Classes up to which a confusion matrix has its counts written into it: more would be too small to read."""


def plot_history(history: "History", *, ax: "Axes | None" = None) -> "Figure":
    """Draw loss, accuracy and learning rate of each epoch, and mark the best epoch. `History.plot` is the same.

    Args:
        history: From `Trainer.fit`.
        ax: Where to draw; None makes a figure. It is divided into three parts.

    Raises:
        ArgumentError: No epoch was finished.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> from transferkit import EpochReport, History
        >>> figure = plot_history(History([EpochReport(0, 2.0, 0.3, 1e-3, 5.0), EpochReport(1, 1.0, 0.6, 1e-3, 5.0)]))
        >>> len(figure.axes[0].child_axes)
        3
    """
    if not history.reports:
        raise ArgumentError("history has no epochs: expected 1 or more, from Trainer.fit.")
    ax, figure = _open(ax, width=9.0, height=3.0)
    ax.axis("off")
    figures, epochs = history.history, [number + 1 for number in history.epoch]
    for place, name in enumerate(("loss", "accuracy", "lr")):
        part = ax.inset_axes((place * 0.36, 0.0, 0.28, 1.0))
        lines = [(name, "training" if name != "lr" else "of the head")]
        lines += [(f"val_{name}", "validation")] if f"val_{name}" in figures else []
        for key, label in lines:
            part.plot(epochs, figures[key], marker="o", markersize=3, label=label)
        if history.best_epoch is not None:
            best = "best epoch" if name == "loss" else None
            part.axvline(epochs[history.best_epoch], color="0.6", linestyle=":", label=best)
        part.set(title={"lr": "learning rate"}.get(name, name), xlabel="epoch")
        part.locator_params(axis="x", integer=True)
        if name == "lr" and max(figures[name]) > 10 * min(figures[name]):
            part.set_yscale("log")
        elif name == "lr":
            part.set_ylim(0.0, 1.2 * max(figures[name]))
            part.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        if name == "loss":
            part.legend(fontsize="small")
    return figure


def plot_confusion_matrix(assessment: Assessment, *, ax: "Axes | None" = None, normalize: bool = False) -> "Figure":
    """Draw how often which class was taken for which: rows are true classes, columns predicted ones.

    Args:
        assessment: From `Trainer.assess`.
        ax: Where to draw; None makes a figure.
        normalize: Write shares of each true class, 0 to 1, instead of counts. The colors are always these shares.

    Raises:
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> half = np.full((4, 2), 0.5, np.float32)
        >>> figure = plot_confusion_matrix(Assessment(half, half[:, 0], np.array([0, 1, 1, 0]), ("cat", "dog")))
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['2', '0', '2', '0']
    """
    counts = assessment.confusion_matrix()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.45 * min(len(counts), 30)
    ax, figure = _open(ax, width=side + 0.5, height=side)
    image = ax.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    places, names = range(len(counts)), assessment.classes
    ax.set_xticks(places, names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(places, names)
    ax.set(xlabel="predicted class", ylabel="true class", title=f"accuracy {assessment.accuracy:.3f}")
    if len(counts) <= _WRITTEN:
        for row, column in np.ndindex(*counts.shape):
            value = f"{shares[row, column]:.2f}" if normalize else f"{counts[row, column]}"
            color = "white" if shares[row, column] > 0.5 else "black"
            ax.text(column, row, value, ha="center", va="center", color=color, fontsize="small")
    figure.colorbar(image, ax=ax, label="share of the true class", shrink=0.8)
    return figure


def plot_predictions(
    assessment: Assessment, data: object, *, num_images: int = 12, ax: "Axes | None" = None
) -> "Figure":
    """Show images with their true and predicted class and the probability of the predicted one, the worst first.

    The worst are those with the highest loss: sure, and wrong. Wrong ones have a red title.

    Args:
        assessment: From `Trainer.assess(data)`.
        data: The same data: `(images, targets)` or a `Dataset`. Only the images that are shown are read.
        num_images: How many, 1 or more.
        ax: Where to draw; None makes a figure.

    Raises:
        ArgumentError: The data has another number of images than the assessment, or is a `DataLoader`.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> images, targets = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), np.array([0, 1, 1, 0])
        >>> half = np.full((4, 2), 0.5, np.float32)
        >>> figure = plot_predictions(Assessment(half, half[:, 0], targets, ("cat", "dog")), (images, targets))
        >>> [part.get_title() for part in figure.axes[0].child_axes]
        ['cat 0.50', 'dog, not cat 0.50', 'dog, not cat 0.50', 'cat 0.50']
    """
    source = open_data(data, assessment.classes)
    if source.num_images != len(assessment.targets):
        raise ArgumentError(
            f"data has {source.num_images or 'an unknown number of'} images, the assessment {len(assessment.targets)}: "
            "expected the same data, (images, targets) or a Dataset."
        )
    places = assessment.worst(whole_number("num_images", num_images))
    columns = min(len(places), 6)
    rows = math.ceil(len(places) / columns)
    ax, figure = _open(ax, width=1.6 * columns, height=1.85 * rows)
    ax.axis("off")
    predicted = assessment.predicted
    for index, (place, pixels) in enumerate(zip(places, _pixels(source, places), strict=True)):
        row, column = divmod(index, columns)
        part = ax.inset_axes((column / columns, 1 - (row + 1) / rows, 0.94 / columns, 0.8 / rows))
        part.imshow(pixels)
        part.set_axis_off()
        true, guessed = assessment.classes[assessment.targets[place]], assessment.classes[predicted[place]]
        confidence = assessment.probabilities[place, predicted[place]]
        right = true == guessed
        title = f"{true} {confidence:.2f}" if right else f"{true}, not {guessed} {confidence:.2f}"
        part.set_title(title, fontsize=7, color="black" if right else "firebrick")
    return figure


def plot_lr_find(sweep: "LearningRateSweep", *, ax: "Axes | None" = None) -> "Figure":
    """Draw the loss over the learning rate, and mark the suggestion. `LearningRateSweep.plot` is the same.

    Args:
        sweep: From `Trainer.lr_find`.
        ax: Where to draw; None makes a figure.

    Raises:
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> from transferkit import LearningRateSweep
        >>> figure = plot_lr_find(LearningRateSweep([1e-4, 1e-3, 1e-2], [2.0, 1.0, 3.0]))
        >>> figure.axes[0].get_xlabel()
        'learning rate'
    """
    ax, figure = _open(ax, width=5.0, height=3.2)
    ax.plot(sweep.lrs, sweep.losses, color="0.75", linewidth=1, label="each step")
    ax.plot(sweep.lrs, sweep.smoothed, label="smoothed")
    if sweep.suggestion is not None:
        ax.axvline(sweep.suggestion, color="firebrick", linestyle=":", label=f"suggestion {sweep.suggestion:.1e}")
    low, high = np.nanmin(sweep.smoothed), max(sweep.smoothed[0], np.nanmin(sweep.smoothed))
    ax.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low) + 1e-6)
    ax.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    ax.legend(fontsize="small")
    return figure


def _open(ax: "Axes | None", *, width: float, height: float) -> "tuple[Axes, Figure]":
    """Return the axes to draw on and their figure, a new one if there are none."""
    if ax is not None:
        return ax, cast("Figure", ax.get_figure(root=True))
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "plots need the package matplotlib, which is not installed: pip install 'transferkit[notebook]'."
        ) from error

    class ShownFigure(Figure):
        """A figure that a notebook shows although pyplot knows nothing of it."""

        def _repr_png_(self) -> bytes:
            picture = io.BytesIO()
            self.savefig(picture, format="png", bbox_inches="tight", dpi=80)
            return picture.getvalue()

    figure = ShownFigure(figsize=(width, height), layout="constrained")
    return figure.add_subplot(), figure


def _pixels(source: Source, places: Any) -> list[Any]:
    """Return the images at some places as matplotlib takes them; preprocessed ones are stretched to 0..1."""
    shown = []
    for batch, _, _ in source.batches(1, seed=0, order=torch.as_tensor(places)):
        image = batch[0]
        if image.is_floating_point():
            low, high = image.aminmax()
            image = (image - low) / (high - low).clamp_min(1e-6)
        shown.append(image.permute(1, 2, 0).cpu().numpy())
    return shown
