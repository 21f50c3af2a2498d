"""Checks of plain arguments that several parts share."""

import math
from numbers import Integral, Real

from transferkit.errors import ArgumentError


def whole_number(name: str, value: int, *, at_least: int = 1) -> int:
    """Return `value` if it is a whole number in range.

    Raises:
        ArgumentError: It is not.

    Example:
        >>> whole_number("epochs", 10)
        10
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < at_least:  # numpy's integers are Integral
        raise ArgumentError(f"{name}={value!r} cannot be used: expected a whole number of {at_least} or more.")
    return int(value)


def share(name: str, value: float) -> float:
    """Return `value` if it is a number from 0 up to but not including 1.

    Raises:
        ArgumentError: It is not.

    Example:
        >>> share("dropout", 0.5)
        0.5
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < 1:
        raise ArgumentError(f"{name}={value!r} is out of range: expected a share from 0 up to but not including 1.")
    return float(value)


def positive(name: str, value: float, *, or_zero: bool = False) -> float:
    """Return `value` if it is a finite number above 0, or 0 where that is allowed.

    Raises:
        ArgumentError: It is not.

    Example:
        >>> positive("lr", 1e-3)
        0.001
    """
    number = not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not or_zero):
        range_ = "of 0 or more" if or_zero else "above 0"
        raise ArgumentError(f"{name}={value!r} cannot be used: expected a finite number {range_}, such as 1e-3.")
    return float(value)
