"""Callbacks that steer a run: each is called after every epoch with `(trainer, report)`, and True ends the run.

They have no state of their own and read what they need from `trainer.history`, which a resumed run has back.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from transferkit.base.arguments import positive, whole_number
from transferkit.base.calls import explained
from transferkit.errors import ArgumentError, close_matches
from transferkit.model.freezing import freeze_until, parameters_from
from transferkit.results.history import EpochReport, History
from transferkit.training.optimizers import check_held


@explained
class EarlyStopping:
    """A callback that ends a run once a metric has not improved for some epochs.

    With validation data, `fit` then restores the weights of the best epoch.

    Args:
        monitor: `"val_accuracy"`, `"val_loss"`, `"accuracy"`, `"loss"`, a metric of the trainer (`"val_f1"`, `"f1"`),
            or a value that another callback adds to the report. Lower is better for names that end in `loss` or
            `error`, higher for all others.
        patience: Epochs without improvement after which the run ends, 1 or more.
        min_delta: The smallest change that counts as an improvement, 0 or more.

    Raises:
        ArgumentError: When a value is out of range. When a run starts, if `monitor` needs validation data and there is
            none, or if it looks like a misspelled metric. After an epoch whose report lacks it.

    Example:
        >>> stopping = EarlyStopping("val_loss", patience=2)
        >>> stopping.is_over([1.0, 0.8, 0.9, 0.8])  # twice not better than 0.8
        True
    """

    order = 1

    def __init__(self, monitor: str = "val_accuracy", *, patience: int = 3, min_delta: float = 0.0) -> None:
        if not isinstance(monitor, str) or not monitor:
            raise ArgumentError(
                f"monitor={monitor!r} cannot be used: expected the name of a metric, such as 'val_loss'."
            )
        self.monitor = monitor
        self.patience = whole_number("patience", patience)
        self.min_delta = positive("min_delta", min_delta, or_zero=True)

    def before_run(self, trainer: Any, *, validated: bool) -> None:
        """Refuse to watch what is not measured, before the first step."""
        measured = ["loss", "accuracy", *trainer.metrics]
        known = [f"val_{name}" for name in measured] + measured
        if self.monitor in known and self.monitor.startswith("val_") and not validated:
            raise ArgumentError(
                f"EarlyStopping monitors {self.monitor}, but there is no validation data: pass validation_data or "
                'validation_split to fit, or monitor the training loss, EarlyStopping("loss").'
            )
        if self.monitor not in known and difflib.get_close_matches(self.monitor, known, cutoff=0.7):
            raise ArgumentError(f"monitor={self.monitor!r} is not a metric. {close_matches(self.monitor, known)}")

    def __call__(self, trainer: Any, report: EpochReport) -> bool:
        figures = (trainer.history or History()).history
        if self.monitor not in figures:
            raise ArgumentError(
                f"EarlyStopping monitors {self.monitor!r}, which the report lacks: it has {', '.join(figures)}. A "
                f"callback that sets report.{self.monitor} must not have a higher `order` than {self.order}."
            )
        return self.is_over(figures[self.monitor])

    def is_over(self, values: list[float]) -> bool:
        """Say whether a run whose epochs gave these values ends after the last of them."""
        sign = -1.0 if self.monitor.endswith(("loss", "error")) else 1.0
        best, best_epoch = -math.inf, -1
        for epoch, value in enumerate(values):
            if sign * value > best + self.min_delta:  # NaN is no improvement
                best, best_epoch = sign * value, epoch
        return len(values) - 1 - max(best_epoch, 0) >= self.patience


@explained
class GradualUnfreezing:
    """A callback that trains more of the backbone as a run advances.

    Blocks have the trainer's learning rates from the start: `lr={"head": 1e-3, "backbone": 1e-4}`. A block that starts
    to train has its full rate at once, so keep it small: the warm-up is over by then.

    Args:
        layers: The first layer to train, by the number of finished epochs, 1 or more. `{2: "block5", 4: "block4"}` also
            trains block 5 after two epochs, and block 4 after four. Layers as in `freeze_until`; None trains
            everything.

    Raises:
        ArgumentError: When `layers` is not a mapping from numbers of epochs.
        UnknownLayerError: When a run starts, if the model has no such layer.

    Example:
        >>> callbacks = [GradualUnfreezing({1: "block5", 3: "block4"})]
        >>> trainer.fit(train, epochs=5, callbacks=callbacks)  # doctest: +SKIP

    References:
        Howard and Ruder, 2018, "Universal Language Model Fine-tuning for Text Classification", arXiv:1801.06146.
    """

    order = -1  # a Checkpoint saves what this one did

    def __init__(self, layers: Mapping[int, str | None]) -> None:
        if not isinstance(layers, Mapping) or not layers:
            raise ArgumentError(
                f'layers={layers!r} cannot be used: expected a mapping from epochs to layers, such as {{2: "block5"}}.'
            )
        self.layers = {whole_number("each epoch of layers", epoch): layer for epoch, layer in layers.items()}

    def before_run(self, trainer: Any, *, validated: bool) -> None:
        """Refuse a name that is no layer, and an optimizer that does not hold what is to train."""
        for layer in self.layers.values():
            check_held(trainer.optimizer, trainer.model, parameters_from(trainer.model, layer))

    def __call__(self, trainer: Any, report: EpochReport) -> None:
        following = len((trainer.history or History()).reports)
        if following in self.layers:
            freeze_until(trainer.model, self.layers[following])
