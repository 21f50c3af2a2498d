"""Callbacks that steer a run: each is called after every epoch with `(trainer, report)`, and True ends the run.

They keep nothing of their own and read what they need from `trainer.history`, so a resumed run needs nothing else.
"""

import math
from collections.abc import Mapping
from typing import Protocol

from transferkit.base.arguments import not_negative, whole_number
from transferkit.errors import ArgumentError, close_matches
from transferkit.model.freezing import find_boundary, freeze_until
from transferkit.model.head import TransferModel
from transferkit.results.history import EpochReport, History

MONITORED = ("val_accuracy", "val_loss", "accuracy", "loss")


class Running(Protocol):
    """What callbacks see of a `Trainer`."""

    @property
    def model(self) -> TransferModel:
        """The model."""

    @property
    def history(self) -> History | None:
        """The epochs of the run under way."""


class EarlyStopping:
    """A callback that ends a run once a figure has not improved for some epochs.

    `fit` then leaves the model as it was after the best epoch (`restore_best=True`).

    Args:
        monitor: `"val_accuracy"`, `"val_loss"`, `"accuracy"` or `"loss"`.
        patience: Epochs without improvement after which it ends, 1 or more.
        min_delta: How much better than the best so far counts as an improvement, 0 or more.

    Raises:
        ArgumentError: A value out of range; at the start of a run, a figure of validation data that there is none of.

    Example:
        >>> stopping = EarlyStopping("val_loss", patience=2)
        >>> stopping.is_over([1.0, 0.8, 0.9, 0.8])  # twice not better than 0.8
        True
    """

    def __init__(self, monitor: str = "val_accuracy", *, patience: int = 3, min_delta: float = 0.0) -> None:
        if monitor not in MONITORED:
            raise ArgumentError(f"monitor={monitor!r} is not known. {close_matches(monitor, MONITORED)}")
        self.monitor = monitor
        self.patience = whole_number("patience", patience)
        self.min_delta = not_negative("min_delta", min_delta)

    def before_run(self, trainer: Running, *, validated: bool) -> None:
        """Refuse to watch what is not measured, before the first step."""
        if self.monitor.startswith("val_") and not validated:
            raise ArgumentError(
                f"EarlyStopping watches {self.monitor}, but there is nothing to validate on: pass validation_data or "
                'validation_split to fit, or watch the training loss, EarlyStopping("loss").'
            )

    def __call__(self, trainer: Running, report: EpochReport) -> bool:
        history = trainer.history or History()
        return self.is_over(history.history[self.monitor])

    def is_over(self, values: list[float]) -> bool:
        """Say whether a run whose epochs gave these values ends after the last of them."""
        sign = 1.0 if self.monitor.endswith("accuracy") else -1.0
        best, best_place = -math.inf, -1
        for place, value in enumerate(values):
            if sign * value > best + self.min_delta:  # NaN is no improvement
                best, best_place = sign * value, place
        return len(values) - 1 - max(best_place, 0) >= self.patience


class GradualUnfreezing:
    """A callback that lets more of the backbone train as a run goes on.

    The learning rates of the blocks are those of the trainer from the start: `lr={"head": 1e-3, "backbone": 1e-4}`. A
    block that begins to train has its full rate at once, so keep that small: a warm-up is long over by then.

    Args:
        layers: From which layer on to train, by the epoch of the run, from 1, before which that begins:
            `{2: "block5", 4: "block4"}` trains what is trainable at the start for two epochs (0 and 1), then block 5
            too, and from epoch 4 on block 4 as well. As in `freeze_until`; None is everything.

    Raises:
        ArgumentError: No mapping from epochs.
        UnknownLayerError: At the start of a run, a name that is no layer of the model.

    Example:
        >>> from transferkit import Trainer, attach_head, freeze_until, load_backbone
        >>> model = attach_head(load_backbone(weights=None, image_size=32), ["cat", "dog"])
        >>> trainer = Trainer(freeze_until(model, "head"), lr={"head": 1e-3, "backbone": 1e-4})
        >>> callbacks = [GradualUnfreezing({1: "block5", 3: "block4"})]
        >>> history = trainer.fit(train, epochs=5, callbacks=callbacks)  # doctest: +SKIP

    References:
        Howard and Ruder, 2018, "Universal Language Model Fine-tuning for Text Classification", arXiv:1801.06146.
    """

    def __init__(self, layers: Mapping[int, str | None]) -> None:
        if not isinstance(layers, Mapping) or not layers:
            raise ArgumentError(
                f'layers={layers!r} cannot be used: expected a mapping from epochs to layers, such as {{2: "block5"}}.'
            )
        self.layers = {whole_number("each epoch of layers", epoch): layer for epoch, layer in layers.items()}

    def before_run(self, trainer: Running, *, validated: bool) -> None:
        """Refuse a name that is no layer, before the first step."""
        for layer in self.layers.values():
            find_boundary(trainer.model, layer)

    def __call__(self, trainer: Running, report: EpochReport) -> None:
        following = len((trainer.history or History()).reports)
        if following in self.layers:
            freeze_until(trainer.model, self.layers[following])
