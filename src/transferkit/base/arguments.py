"""Checks of single arguments, used by every other folder. What does not fit raises `ArgumentError`."""

import math
from collections.abc import Collection
from numbers import Integral, Real

from transferkit.errors import ArgumentError, close_matches


def whole_number(name: str, value: int, *, at_least: int = 1) -> int:
    """Return `value` as an int, if it is a whole number of `at_least` or more; numpy's integers will do."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < at_least:
        raise ArgumentError(f"{name}={value!r} cannot be used: expected a whole number of {at_least} or more.")
    return int(value)


def fraction(name: str, value: float) -> float:
    """Return `value` as a float, if it is a number from 0 up to but not including 1."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < 1:
        raise ArgumentError(f"{name}={value!r} is out of range: expected a fraction from 0 up to but not including 1.")
    return float(value)


def positive(name: str, value: float, *, or_zero: bool = False) -> float:
    """Return `value` as a float, if it is a finite number above 0, or 0 where `or_zero` allows it."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf or (value == 0 and not or_zero):
        expected = "of 0 or more" if or_zero else "above 0"
        raise ArgumentError(f"{name}={value!r} cannot be used: expected a finite number {expected}, such as 1e-3.")
    return float(value)


def one_of(name: str, value: object, known: Collection[str], *, hint: str = "") -> str:
    """Return the one of `known` that `value` is, in upper or lower case; `hint` ends the message."""
    found = [word for word in known if isinstance(value, str) and value.lower() == word.lower()]
    if not found:
        raise ArgumentError(f"{name}={value!r} is not known. {close_matches(value, known)} {hint}".rstrip())
    return found[0]
