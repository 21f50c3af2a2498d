"""Learning-rate schedules: pure functions of how far the run has come, with nothing to save or to break."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from transferkit.base.arguments import fraction as checked_fraction
from transferkit.base.arguments import one_of
from transferkit.errors import ArgumentError

Schedule = Callable[[float], float]

_RISES, _FIRST, _LAST = 0.3, 1 / 25, 1 / 250_000


def _one_cycle(progress: float) -> float:
    """Rise along a cosine from 1/25 to 1 over the first 30 %, then fall along one to 1/250,000.

    Smith and Topin, 2017, "Super-Convergence", arXiv:1708.07120, in the shape of torch's `OneCycleLR`. The momentum,
    which some lower meanwhile, stays.
    """
    low, part = (_FIRST, 1.0 - progress / _RISES) if progress < _RISES else (_LAST, (progress - _RISES) / (1 - _RISES))
    return low + (1.0 - low) * (1.0 + math.cos(math.pi * part)) / 2.0


def _constant(_progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return (1.0 + math.cos(math.pi * progress)) / 2.0


def _auto(progress: float) -> float:  # not `warmup` itself: only "auto" gives way to what sets the rate already
    return _Warmup(_cosine, 0.1)(progress)


SCHEDULES: dict[str, Schedule] = {
    "auto": _auto,
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "one_cycle": _one_cycle,
}


@dataclass(frozen=True)
class _Warmup:
    """A schedule that rises before it begins; an object and not a closure, so that it can be pickled and compared."""

    schedule: Schedule
    fraction: float

    def __repr__(self) -> str:
        return f"warmup({describe_schedule(self.schedule)}, {self.fraction})"

    def __call__(self, progress: float) -> float:
        if progress < self.fraction:
            return _FIRST + (1.0 - _FIRST) * progress / self.fraction
        return self.schedule((progress - self.fraction) / (1.0 - self.fraction))


def warmup(schedule: str | Schedule = "cosine", fraction: float = 0.1) -> Schedule:
    """Return a schedule whose learning rate first rises linearly from 1/25, and then follows another schedule.

    Args:
        schedule: A name or a function, as in `Trainer(schedule=...)`.
        fraction: Fraction of the run that the rise takes, above 0 and below 1.

    Raises:
        ArgumentError: When the schedule is unknown or the fraction out of range.

    Example:
        >>> schedule = warmup("linear", 0.2)
        >>> [round(schedule(progress), 2) for progress in (0.0, 0.1, 0.2, 0.6)]
        [0.04, 0.52, 1.0, 0.5]

    References:
        Goyal et al., 2017, "Accurate, Large Minibatch SGD", arXiv:1706.02677.
    """
    if checked_fraction("fraction", fraction) == 0:
        raise ArgumentError("fraction=0 is no warm-up: pass the schedule itself.")
    return _Warmup(find_schedule(schedule), fraction)


def find_schedule(schedule: str | Schedule) -> Schedule:
    """Return a schedule by its name, or the user's own function unchanged."""
    if callable(schedule):
        return schedule
    hint = "Or pass a function of progress (0 to 1) that returns a factor."
    return SCHEDULES[one_of("schedule", schedule, SCHEDULES, hint=hint)]


def describe_schedule(schedule: Schedule) -> str:
    """Return a schedule as text: its name, or what can be said of a function."""
    if isinstance(schedule, _Warmup):
        return repr(schedule)
    return next((name for name, known in SCHEDULES.items() if known is schedule), "a function")


def lr_factor(schedule: Schedule, step: int, num_steps: int | None) -> float:
    """Return what the learning rate is multiplied by after some steps, of so many in the run; 1 if that is unknown."""
    if num_steps is None:
        return 1.0
    progress = step / max(1, num_steps)
    factor = schedule(progress)
    if not (isinstance(factor, Real) and 0 <= factor < math.inf):
        raise ArgumentError(
            f"schedule returned {factor!r} at progress {progress:.4g}: expected a factor of 0 or more, such as "
            "1 - progress."
        )
    return float(factor)


def check_schedule(schedule: Schedule, num_steps: int | None, *, other: bool = False) -> None:
    """Refuse a schedule that needs the number of steps where that is unknown, or beside an `other` one of torch's."""
    if schedule is SCHEDULES["constant"]:
        return
    if other:
        raise ArgumentError(
            f"schedule={describe_schedule(schedule)} and a scheduler of torch.optim.lr_scheduler would both set the "
            'learning rate: expected one of them. Trainer(schedule="constant") leaves it to the scheduler.'
        )
    if num_steps is None:
        raise ArgumentError(
            "this schedule needs the number of steps, but the DataLoader has no length: use "
            'schedule="constant", or give its data set a __len__.'
        )
