"""Learning-rate schedules: pure functions of how far the run has come, with nothing to save or to break."""

import math
from collections.abc import Callable
from numbers import Real

from transferkit.errors import ArgumentError, close_matches

Schedule = Callable[[float], float]

_RISES, _FIRST, _LAST = 0.3, 1 / 25, 1 / 250_000


def _one_cycle(progress: float) -> float:
    """Rise along a cosine from 1/25 to 1 over the first 30 %, then fall likewise to 1/250,000.

    Smith and Topin, 2017, "Super-Convergence", arXiv:1708.07120, in the shape of torch's `OneCycleLR`. The momentum,
    which some lower meanwhile, stays.
    """
    low, part = (_FIRST, 1.0 - progress / _RISES) if progress < _RISES else (_LAST, (progress - _RISES) / (1 - _RISES))
    return low + (1.0 - low) * (1.0 + math.cos(math.pi * part)) / 2.0


SCHEDULES: dict[str, Schedule] = {
    "constant": lambda _progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2.0,
    "one_cycle": _one_cycle,
}


def find_schedule(schedule: str | Schedule) -> Schedule:
    """Return a schedule by its name, or the user's own function as it is.

    Raises:
        ArgumentError: There is none of that name.
    """
    if callable(schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise ArgumentError(
            f"schedule={schedule!r} is not known. {close_matches(schedule, SCHEDULES)} A function of progress (0 to 1) "
            "that returns a factor serves as well."
        )
    return SCHEDULES[schedule]


def lr_factor(schedule: Schedule, step: int, num_steps: int | None, warmup_steps: int) -> float:
    """Return what the learning rate is multiplied by in one step.

    It rises linearly over the warm-up, reaching 1 with its last step; the schedule then runs from progress 0 to the
    last step's, just under 1.

    Args:
        schedule: Progress, 0 to 1, to a factor.
        step: Steps made before this one.
        num_steps: Steps in the whole run; None if that is not known, which the constant schedule alone can do without.
        warmup_steps: How many of these are warm-up.

    Raises:
        ArgumentError: The schedule gives no number, a negative one, infinity or NaN.

    Example:
        >>> [lr_factor(SCHEDULES["linear"], step, num_steps=6, warmup_steps=2) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if num_steps is None:
        return 1.0
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    factor = schedule(progress)
    if not (isinstance(factor, Real) and 0 <= factor < math.inf):
        raise ArgumentError(
            f"schedule gave {factor!r} at progress {progress:.4g}: expected a factor of 0 or more: 1 - progress, say."
        )
    return float(factor)


def check_schedule(schedule: Schedule, num_steps: int | None) -> None:
    """Refuse a schedule that needs to know the number of steps where it is not known.

    Raises:
        ArgumentError: So it is.
    """
    if num_steps is None and schedule is not SCHEDULES["constant"]:
        raise ArgumentError(
            "this schedule needs the number of steps, which a DataLoader without length does not tell: use "
            'schedule="constant", or give its data set a __len__.'
        )
