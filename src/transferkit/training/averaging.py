"""`WeightAverage`: the average of the weights over the last steps, validated and kept instead of the last ones."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transferkit.base.arguments import fraction
from transferkit.base.calls import explained
from transferkit.errors import ArgumentError, CheckpointError
from transferkit.model.freezing import trainable_state, write_values
from transferkit.model.weights import differences


@explained
class WeightAverage:
    """A callback that keeps an exponential moving average of all trainable weights, as one more copy.

    Validation and the best weights that `fit` restores use the average; training steps do not. Where `fit` restores
    none, the model has the average when the run ends. In the first steps the average forgets faster: after n steps it
    covers about the last tenth, until `decay` covers more.

    Args:
        decay: Fraction of the average that each step keeps, at least 0 and less than 1; 0.99 averages about 100 steps.
            0 averages nothing.
        restore_best: False leaves the last average in the model instead of that of the best epoch. A few hundred
            validation images cannot tell epochs apart, and the last one is a good one if the learning rate ends at 0.

    Raises:
        ArgumentError: When `decay` is out of range, or `restore_best` neither True nor False.

    Example:
        >>> trainer.fit(train, epochs=6, callbacks=[WeightAverage(0.99)])  # doctest: +SKIP

    References:
        Polyak and Juditsky, 1992, "Acceleration of Stochastic Approximation by Averaging".
    """

    def __init__(self, decay: float = 0.99, *, restore_best: bool = True) -> None:
        if not isinstance(restore_best, bool):
            raise ArgumentError(f"restore_best={restore_best!r} cannot be used: expected True or False.")
        self.decay, self.restore_best = fraction("decay", decay), restore_best
        self._average: dict[str, Tensor] = {}
        self._steps = 0

    def __repr__(self) -> str:
        return f"WeightAverage({self.decay}{'' if self.restore_best else ', restore_best=False'})"

    def before_run(self, trainer: Any, *, validated: bool) -> None:
        """Begin a new average."""
        self._average, self._steps = {}, 0

    def after_step(self, trainer: Any) -> None:
        """Move the average towards the weights."""
        self._steps += 1
        live = trainable_state(trainer.model)
        before = self._average
        self._average = {  # what was frozen since leaves it; what began to train enters it
            name: before[name] if name in before else value.detach().clone() for name, value in live.items()
        }
        decay = min(self.decay, self._steps / (10 + self._steps))
        moving = [name for name, value in live.items() if value.is_floating_point()]
        with torch.no_grad():
            torch._foreach_lerp_([self._average[n] for n in moving], [live[n].detach() for n in moving], 1 - decay)
            for name in live.keys() - set(moving):
                self._average[name].copy_(live[name])

    @contextmanager
    def validating(self, trainer: Any) -> Iterator[None]:
        """Put the average into the model, and the weights of the last step back afterwards."""
        live = trainer.model.state_dict()
        before = {name: live[name].clone() for name in self._average}
        self.write_to(trainer.model)
        try:
            yield
        finally:
            write_values(before, live)

    def __call__(self, trainer: Any, report: object) -> None:
        """Do nothing after an epoch."""

    def write_to(self, model: nn.Module) -> None:
        """Put the average of what still trains into the model: at the end of a run that restores no epoch's weights."""
        live = trainable_state(model)
        write_values({name: value for name, value in self._average.items() if name in live}, live)

    def state(self) -> dict[str, Tensor]:
        """Return the average and the number of steps in it, not copied."""
        return {**self._average, "steps": torch.tensor(self._steps)}

    def load(self, state: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned in another process; a `CheckpointError` if it does not fit `live` weights."""
        average = {name: value for name, value in state.items() if name != "steps"}
        faults = differences({name: live[name] for name in average if name in live}, average, same_width=True)
        if faults or "steps" not in state:
            raise CheckpointError(f"the checkpoint's average of the weights does not fit the model: {faults}.")
        self._steps = int(state["steps"])
        self._average = {name: value.to(live[name].device) for name, value in average.items()}
