"""What happened in each epoch."""

import html
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from transferkit.errors import ArgumentError
from transferkit.results.figures import open_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class EpochReport:
    """One epoch's figures.

    Attributes:
        epoch: Number of the epoch in the life of the trainer, from 0.
        loss: Mean training loss, label smoothing and class weights included, while the weights were changing.
        accuracy: Training accuracy, 0 to 1, likewise.
        lr: Learning rate of the head's group in the last step.
        epoch_s: Seconds, validation included.
        val_loss: Plain cross-entropy on the validation data; None without.
        val_accuracy: 0 to 1; None without.
        skipped: Steps that were left out because a number was not finite.
    """

    epoch: int
    loss: float
    accuracy: float
    lr: float
    epoch_s: float
    val_loss: float | None = None
    val_accuracy: float | None = None
    skipped: int = 0

    def __str__(self) -> str:
        validation = (
            "" if self.val_loss is None else f"  val_loss {self.val_loss:.4f}  val_accuracy {self.val_accuracy:.4f}"
        )
        skipped = f"  {self.skipped} steps not finite, left out" if self.skipped else ""
        return (
            f"epoch {self.epoch + 1}  loss {self.loss:.4f}  accuracy {self.accuracy:.4f}{validation}  "
            f"lr {self.lr:.2g}  {self.epoch_s:.1f} s{skipped}"
        )


@dataclass(slots=True)
class History:
    """The reports of one call of `fit`.

    Attributes:
        reports: One for each epoch that was finished, in order.

    Example:
        >>> first = EpochReport(0, loss=2.0, accuracy=0.3, lr=1e-3, epoch_s=5.0, val_loss=1.9, val_accuracy=0.4)
        >>> second = EpochReport(1, loss=1.0, accuracy=0.6, lr=1e-3, epoch_s=5.0, val_loss=1.8, val_accuracy=0.5)
        >>> history = History([first, second])
        >>> history.history["val_accuracy"], history.best_epoch
        ([0.4, 0.5], 1)
    """

    reports: list[EpochReport] = field(default_factory=list)

    @property
    def history(self) -> dict[str, list[float]]:
        """Each figure's values, one for each epoch; figures that were not taken are left out."""
        rows = [asdict(report) for report in self.reports]
        names = (
            [name for name in rows[0] if name not in ("epoch", "skipped") and rows[0][name] is not None] if rows else []
        )
        return {name: [row[name] for row in rows] for name in names}

    @property
    def epoch(self) -> list[int]:
        """The numbers of the epochs, from 0, in the life of the trainer."""
        return [report.epoch for report in self.reports]

    @property
    def best_epoch(self) -> int | None:
        """Place of the best epoch in this history, from 0.

        The best has the highest validation accuracy, then the lowest loss, then comes first. None without validation
        data, or if its loss was never a finite number.
        """
        ranked = [
            (report.val_accuracy, -report.val_loss, -place)
            for place, report in enumerate(self.reports)
            if report.val_loss is not None and report.val_accuracy is not None and math.isfinite(report.val_loss)
        ]
        return -max(ranked)[2] if ranked else None

    def plot(self, ax: "Axes | None" = None) -> "Figure":
        """Draw loss, accuracy and learning rate of each epoch, and mark the best one; see `plots.plot_history`."""
        return plot_history(self, ax=ax)

    def _repr_html_(self) -> str:
        columns = ["epoch", *self.history]
        best = self.best_epoch
        rows = ""
        for place, report in enumerate(self.reports):
            cells = [str(report.epoch + 1), *(f"{getattr(report, name):.4g}" for name in columns[1:])]
            tag = "b" if place == best else "span"
            rows += f"<tr>{''.join(f'<td><{tag}>{cell}</{tag}></td>' for cell in cells)}</tr>"
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def plot_history(history: History, *, ax: "Axes | None" = None) -> "Figure":
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
    ax, figure = open_axes(ax, width=9.0, height=3.0)
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
