"""What a sweep over learning rates showed, and the rate it suggests."""

import math
from dataclasses import dataclass

import numpy as np

from transferkit.results.figures import Axes, Figure, open_axes

SMOOTHING = 0.9  # weight of the past in the smoothed loss, because single batches are noisy
DIVERGED = 4.0  # a smoothed loss this many times the lowest one ends the sweep
BELOW_LOWEST = 10.0  # the rate of the lowest smoothed loss, where training is about to fail, is divided by this
FELL = 0.8  # the smoothed loss must fall to this fraction of its first value, or it says nothing about rates
ROSE = 0.25  # and then rise by this fraction of what it fell, or nothing says where training begins to fail


def plot_lr_find(sweep: "LearningRateSweep", ax: Axes | None = None) -> Figure:
    """Draw the loss over the learning rate on `ax`, or on a new figure, and mark the suggestion.

    `LearningRateSweep.plot` is the same.

    Raises:
        MissingPackageError: When matplotlib is not installed.

    Example:
        >>> figure = plot_lr_find(LearningRateSweep([1e-4, 1e-3, 1e-2], [2.0, 1.0, 3.0]))
        >>> figure.axes[0].get_xlabel()
        'learning rate'
    """
    ax, figure = open_axes(ax, width=5.0, height=3.2)
    ax.plot(sweep.lrs, sweep.losses, color="0.75", linewidth=1, label="each step")
    ax.plot(sweep.lrs, sweep.smoothed, label="smoothed")
    if sweep.suggestion is not None:
        ax.axvline(sweep.suggestion, color="firebrick", linestyle=":", label=f"suggestion {sweep.suggestion:.1e}")
    low, high = np.nanmin(sweep.smoothed), max(sweep.smoothed[0], np.nanmin(sweep.smoothed))
    ax.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low) + 1e-6)
    ax.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    ax.legend(fontsize="small")
    return figure


@dataclass(frozen=True, slots=True)
class LearningRateSweep:
    """The loss of training steps at rising learning rates; from `Trainer.lr_find`.

    Attributes:
        lrs: Learning rate of each step, of the head's group.
        losses: Training loss of each step's batch, before the step.

    Example:
        >>> sweep = LearningRateSweep([1e-4, 1e-3, 1e-2, 1e-1], [2.0, 1.9, 0.5, 9.0])
        >>> sweep.suggestion
        0.001

    References:
        Smith, 2017, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186.
    """

    lrs: list[float]
    losses: list[float]

    @property
    def smoothed(self) -> list[float]:
        """The losses' exponential moving average, corrected for its start at 0."""
        averages, total, weight = [], 0.0, 0.0
        for loss in self.losses:
            total, weight = SMOOTHING * total + (1 - SMOOTHING) * loss, SMOOTHING * weight + 1 - SMOOTHING
            averages.append(total / weight)
        return averages

    @property
    def suggestion(self) -> float | None:
        """A tenth of the learning rate with the lowest smoothed loss.

        None if the loss never fell by a fifth of its mean over the first tenth of the steps, or never rose again by
        a quarter of what it fell; `why_none` says which.
        """
        return None if self.why_none else self.lrs[self._lowest[2]] / BELOW_LOWEST

    @property
    def why_none(self) -> str:
        """Why there is no suggestion; empty if there is one."""
        if not self.losses or not math.isfinite(self.losses[0]):
            return "the loss of the first step is not finite. Look at the images and at the weights."
        first, lowest, step = self._lowest
        if lowest > FELL * first:
            return "the loss never fell. Is the model trained already?"
        if all(loss <= lowest + ROSE * (first - lowest) for loss in self.smoothed[step:]):
            rate = f"{self.lrs[-1]:g}"
            return f"the loss fell and did not rise again up to the rate {rate}. Train at the default rates."
        return ""

    @property
    def _lowest(self) -> tuple[float, float, int]:
        """The mean loss of the first tenth of the steps, and the lowest smoothed loss after it with its step."""
        start = max(1, len(self.losses) // 10)
        later = [(loss, step) for step, loss in enumerate(self.smoothed) if step >= start and math.isfinite(loss)]
        return sum(self.losses[:start]) / start, *min(later, default=(math.inf, 0))

    @property
    def diverged(self) -> bool:
        """Whether the smoothed loss has risen so far that larger learning rates are pointless."""
        lowest = min(filter(math.isfinite, self.smoothed), default=math.inf)
        return bool(self.losses) and not self.smoothed[-1] <= DIVERGED * lowest

    plot = plot_lr_find

    def _repr_html_(self) -> str:
        lowest = min(filter(math.isfinite, self.smoothed), default=math.nan)
        rate = "none" if self.suggestion is None else f"{self.suggestion:.2g}"
        return (
            f"<p>{len(self.lrs)} steps from learning rate {self.lrs[0]:.1e} to {self.lrs[-1]:.1e}, lowest smoothed "
            f"loss {lowest:.3f}: suggestion <b>{rate}</b></p>"
        )
