"""What happened in each epoch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from transferkit.errors import ArgumentError, close_matches
from transferkit.results.figures import Axes, Figure, open_axes
from transferkit.results.tabular import html_table


@dataclass(eq=False)
class EpochReport:
    """One epoch's metrics.

    Metrics of the trainer are attributes too: `report.f1` on the training images and `report.val_f1` on the validation
    images. So is every number that a callback assigns: after `report.pets = 0.5` the history, the plots, early stopping
    and the loggers have `pets`.

    Attributes:
        epoch: Number of the epoch in the life of the trainer, from 0.
        loss: Mean training loss while the weights were changing, label smoothing and class weights included.
        accuracy: Training accuracy, 0 to 1, while the weights were changing.
        lr: Learning rate of the head's group in the last step.
        epoch_s: Seconds, validation included.
        val_loss: Mean loss on the validation data, without smoothing and weights; None without validation data.
        val_accuracy: 0 to 1; None without validation data.
        skipped: Steps that were skipped because a number was not finite.

    Example:
        >>> report = EpochReport(0, loss=2.0, accuracy=0.3, lr=1e-3, epoch_s=5.0)
        >>> report.pets = 0.5
        >>> print(report)
        epoch 1  loss 2.0000  accuracy 0.3000  pets 0.5000  lr 0.001  5.0 s
    """

    epoch: int
    loss: float
    accuracy: float
    lr: float
    epoch_s: float
    val_loss: float | None = None
    val_accuracy: float | None = None
    skipped: int = 0

    if TYPE_CHECKING:  # figures of metrics and callbacks

        def __getattr__(self, name: str) -> float: ...

        @override
        def __setattr__(self, name: str, value: Any) -> None: ...

    @property
    def figures(self) -> dict[str, float]:
        """Every metric that was measured, by name, in the order training, validation, others."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EpochReport) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment] # it can be changed

    def __str__(self) -> str:
        last = ("epoch", "lr", "epoch_s", "skipped")
        parts = [f"{name} {value:.4f}" for name, value in self.figures.items() if name not in last]
        skipped = [f"{self.skipped} steps skipped: not finite"] if self.skipped else []
        return "  ".join([f"epoch {self.epoch + 1}", *parts, f"lr {self.lr:.2g}", f"{self.epoch_s:.1f} s", *skipped])


@dataclass(slots=True)
class History:
    """The reports of one call of `fit`.

    Attributes:
        reports: One for each finished epoch, in order.

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
        """The values of each metric, one for each epoch; NaN if the epoch lacks it."""
        rows = [report.figures for report in self.reports]
        names = list(dict.fromkeys(name for row in rows for name in row if name not in ("epoch", "skipped")))
        return {name: [row.get(name, math.nan) for row in rows] for name in names}

    def __getitem__(self, name: str) -> list[float]:
        """The values of one figure: `history["loss"]` is `history.history["loss"]`."""
        figures = self.history
        if name not in figures:
            raise ArgumentError(f"history[{name!r}] is not a metric. {close_matches(name, figures)}")
        return figures[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.history)

    @property
    def epoch(self) -> list[int]:
        """The numbers of the epochs, from 0, in the life of the trainer."""
        return [report.epoch for report in self.reports]

    @property
    def best_epoch(self) -> int | None:
        """Position of the best epoch in this history, from 0.

        The best has the highest validation accuracy, then the lowest loss, then comes first. None without validation
        data, or if its loss was never a finite number.
        """
        ranked = [
            (report.val_accuracy, -report.val_loss, -position)
            for position, report in enumerate(self.reports)
            if report.val_loss is not None and report.val_accuracy is not None and math.isfinite(report.val_loss)
        ]
        return -max(ranked)[2] if ranked else None

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw loss, accuracy, metrics and learning rate of each epoch, and mark the best epoch.

        `ax`, or a new figure, is divided into one part for each of them.

        Raises:
            ArgumentError: When no epoch was finished.
            MissingPackageError: When matplotlib is not installed.

        Example:
            >>> history = History([EpochReport(0, 2.0, 0.3, 1e-3, 5.0), EpochReport(1, 1.0, 0.6, 1e-3, 5.0)])
            >>> [part.get_title() for part in history.plot().axes[0].child_axes]
            ['loss', 'accuracy', 'learning rate']
        """
        if not self.reports:
            raise ArgumentError("history has no epochs: expected 1 or more, from Trainer.fit.")
        names = [name.removeprefix("val_") for name in self.history if name not in ("lr", "epoch_s")]
        names = list(dict.fromkeys(["loss", "accuracy", *names, "lr"]))
        ax, figure = open_axes(ax, width=3.0 * len(names), height=3.0)
        ax.axis("off")
        figures, epochs = self.history, [number + 1 for number in self.epoch]
        for position, name in enumerate(names):
            part = ax.inset_axes((position * 1.08 / len(names), 0.0, 0.84 / len(names), 1.0))
            for key, color, label in ((name, "C0", "training"), (f"val_{name}", "C1", "validation")):
                if key in figures:
                    part.plot(epochs, figures[key], marker="o", markersize=3, color=color, label=label)
            if self.best_epoch is not None:
                part.axvline(epochs[self.best_epoch], color="0.6", linestyle=":", label="best epoch")
            part.set(title="learning rate" if name == "lr" else name, xlabel="epoch")
            part.locator_params(axis="x", integer=True)
            if name == "loss":
                part.legend(fontsize="small")
        if max(figures["lr"]) > 10 * min(figures["lr"]):
            part.set_yscale("log")
        else:
            part.set_ylim(0.0, 1.2 * max(figures["lr"]))
            part.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        return figure

    def _repr_html_(self) -> str:
        figures = self.history
        rows = [
            [str(epoch + 1), *(f"{value:.4g}" for value in values)]
            for epoch, values in zip(self.epoch, zip(*figures.values(), strict=True), strict=True)
        ]
        return html_table([["epoch", *figures], *rows], bold=self.best_epoch)
