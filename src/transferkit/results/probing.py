"""What a probe found: how well a solved linear head does on the features of each block."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from transferkit.results.figures import open_axes
from transferkit.results.tabular import html_table, text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = ("layers", "image size", "accuracy", "loss", "seconds")


class ProbeScore(NamedTuple):
    """A linear head on the pooled features of some blocks, by cross-validation.

    Attributes:
        layers: The blocks, as `attach_head(layers=...)` takes them.
        image_size: Height and width of the images, in pixels.
        accuracy: Of the held-out images, 0 to 1.
        error: Standard error of the accuracy over the folds.
        loss: Mean loss of the held-out images.
        l2: The penalty with the lowest loss.
        seconds: To solve it; the features are the same for all blocks of an image size.
    """

    layers: tuple[str, ...]
    image_size: int
    accuracy: float
    error: float
    loss: float
    l2: float
    seconds: float


@dataclass(frozen=True, repr=False)
class Probe:
    """The scores of a probe, in the order in which they were made. It prints as a table, in a notebook it is one.

    Attributes:
        scores: Each block alone, then the last ones together, for each image size.
        feature_seconds: Seconds to compute the features, by image size.

    Example:
        >>> scores = [ProbeScore(("block4",), 64, 0.71, 0.01, 0.9, 0.1, 0.5)]
        >>> scores += [ProbeScore(("block4", "block5"), 64, 0.74, 0.01, 0.8, 0.1, 0.9)]
        >>> probe = Probe(scores, {64: 12.0})
        >>> probe.best.layers
        ('block4', 'block5')
        >>> print(probe)
        layers         image size         accuracy    loss  seconds
        block4                 64  0.7100 ± 0.0100  0.9000      0.5
        block4,block5          64  0.7400 ± 0.0100  0.8000      0.9
        features: 12 s at 64 px
    """

    scores: list[ProbeScore]
    feature_seconds: dict[int, float]

    @property
    def best(self) -> ProbeScore:
        """The score with the lowest loss on held-out images, which is less noisy than accuracy."""
        return min(self.scores, key=lambda score: (math.isnan(score.loss), score.loss))

    def __str__(self) -> str:
        return f"{text_table(_COLUMNS, self._rows())}\n{self._last_line()}"

    __repr__ = __str__  # what an interpreter shows

    def _repr_html_(self) -> str:
        return f"{html_table(_COLUMNS, self._rows())}<p>{self._last_line()}</p>"

    def _rows(self) -> list[list[str]]:
        return [
            [
                ",".join(score.layers),
                str(score.image_size),
                f"{score.accuracy:.4f} ± {score.error:.4f}",
                f"{score.loss:.4f}",
                f"{score.seconds:.1f}",
            ]
            for score in self.scores
        ]

    def _last_line(self) -> str:
        return "features: " + ", ".join(f"{spent:.0f} s at {size} px" for size, spent in self.feature_seconds.items())

    def plot(self, ax: "Axes | None" = None) -> "Figure":
        """Draw it; see `plot_probe`."""
        return plot_probe(self, ax=ax)


def plot_probe(probe: Probe, *, ax: "Axes | None" = None) -> "Figure":
    """Draw the accuracy of each set of blocks, with its standard error, on `ax`, or on a new figure.

    `Probe.plot` is the same.

    Raises:
        MissingPackageError: When matplotlib is not installed.

    Example:
        >>> probe = Probe([ProbeScore(("block5",), 64, 0.72, 0.01, 0.9, 0.1, 0.5)], {64: 12.0})
        >>> plot_probe(probe).axes[0].get_xlabel()
        'accuracy by cross-validation, with standard error'
    """
    sets = list(dict.fromkeys(score.layers for score in probe.scores))
    ax, figure = open_axes(ax, width=7.5, height=0.6 + 0.36 * len(sets))
    sizes = list(probe.feature_seconds)
    for number, size in enumerate(sizes):
        own = [score for score in probe.scores if score.image_size == size]
        places = [sets.index(score.layers) + (number - (len(sizes) - 1) / 2) * 0.2 for score in own]
        accuracies = [score.accuracy for score in own]
        ax.errorbar(accuracies, places, xerr=[score.error for score in own], fmt="o", capsize=3, label=f"{size} px")
    ax.set_yticks(range(len(sets)), [", ".join(layers) for layers in sets])
    ax.set_xlabel("accuracy by cross-validation, with standard error")
    ax.invert_yaxis()
    ax.grid(axis="x", color="0.9")
    if len(sizes) > 1:
        ax.legend(fontsize="small")
    return figure
