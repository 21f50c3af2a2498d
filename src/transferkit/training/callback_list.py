"""The callbacks of one run, and when each is called."""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from transferkit.errors import ArgumentError
from transferkit.results.history import EpochReport


class CallbackList:
    """The callbacks of a run, in the order in which they are called.

    A callback is a function of `(trainer, report)`, called after each epoch; True ends the run (a `bool` of
    Python, numpy or torch). An object may also have any of these:

    - `order`, a number: those with a lower one are called first, those with none count 0. `GradualUnfreezing` has -1,
      early stopping and the loggers 1, so that they see what others add to the report, and `Checkpoint` 2.
    - `restore_best`, False if the last weights are to stay, with validation data, too.
    - `before_run(trainer, validated=...)`, called before anything changes, to refuse a run it cannot serve; `validated`
      says whether there is validation data.
    - `before_first_step(global_step, resumed_from=...)`, called once it is known where the run begins, before anything
      is assigned.
    - `after_step(trainer)`.
    - `validating(trainer)`, a context manager around validation and the choice of the best weights.
    - `on_stop(trainer)`, called when something ends the run early between two steps; returns the path it saved to.
    - `write_to(model)`, called when a run ends, however it ends, unless the weights of the best epoch are restored: it
      may put other weights into the model.
    - `after_run()`, called at the very end of a run that nothing interrupted.
    - `release()`, called when `fit` ends, whatever ended it.
    - `state()`, tensors by name that a checkpoint holds for it, and `load(state, live)`, which gets them and the
      model's weights when the run is resumed.
    """

    def __init__(self, trainer: Any, callbacks: object) -> None:
        callbacks = () if callbacks is None else callbacks
        if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
            raise ArgumentError(
                f"callbacks={callbacks!r} cannot be used: expected a list of functions of (trainer, report), or of "
                'objects such as Checkpoint("runs/a").'
            )
        for callback in callbacks:
            if isinstance(callback, type):
                raise ArgumentError(
                    f"callbacks has the class {callback.__name__}: expected an object, {callback.__name__}(...), such "
                    'as Checkpoint("runs/a").'
                )
            _check_arguments(callback)
        self.trainer = trainer
        self._callbacks: list[Any] = sorted(callbacks, key=lambda callback: getattr(callback, "order", 0))

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    @property
    def restore_best(self) -> bool:
        """Whether all of them let `fit` restore the weights of the best epoch."""
        return all(getattr(callback, "restore_best", True) for callback in self._callbacks)

    def each(self, method: str, *arguments: Any, **named: Any) -> list[Any]:
        """Call a method of every callback that has it; return the answers."""
        return [getattr(callback, method)(*arguments, **named) for callback in self._having(method)]

    def after_epoch(self, report: EpochReport) -> bool:
        """Call all with the report; return whether one returned True, and warn of what else could be meant so."""
        ends = False
        for callback in self._callbacks:
            answer = callback(self.trainer, report)
            if isinstance(answer, Tensor | np.generic) and answer.ndim == 0:
                answer = answer.item()  # a bool of theirs counts
            if isinstance(answer, str | int | float) and not isinstance(answer, bool):
                name = getattr(callback, "__qualname__", type(callback).__name__)
                warnings.warn(f"callback {name} returned {answer!r}, which ends no run: True does.", stacklevel=3)
            ends = ends or answer is True
        return ends

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Enter the contexts of those that want another model validated."""
        with ExitStack() as stack:
            for callback in self._having("validating"):
                stack.enter_context(callback.validating(self.trainer))
            yield

    def close(self) -> None:
        """Let each release what it holds."""
        self.each("release")

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return what a checkpoint holds for each callback that has a state, by its settings."""
        return {repr(callback): callback.state() for callback in self._having("state")}

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Give each its state back; `state` has the same keys as that of the present callbacks."""
        live = self.trainer.model.state_dict()
        for callback in self._having("state"):
            callback.load(state[repr(callback)], live)

    def _having(self, method: str) -> list[Any]:
        return [callback for callback in self._callbacks if hasattr(callback, method)]


def _check_arguments(callback: Any) -> None:
    """Refuse a callback of other arguments before the first epoch instead of after it."""
    try:
        signature = inspect.signature(callback)
    except ValueError:  # a builtin that does not tell
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ArgumentError(
            f"callback {callback!r} takes {signature}: expected a function of (trainer, report)."
        ) from error
