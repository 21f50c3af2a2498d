"""Checks of single arguments, used by every other folder. What does not fit raises `ArgumentError`."""

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

from transferkit.errors import ArgumentError, close_matches


def whole_number(name: str, value: int, *, at_least: int = 1) -> int:
    """Return `value` as an int, if it is a whole number of `at_least` or more; numpy's integers will do."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < at_least:
        raise ArgumentError(f"{name}={value!r} cannot be used: expected a whole number of {at_least} or more.")
    return int(value)


def fraction(name: str, value: float) -> float:
    """Return `value` as a float, if it is a number from 0 up to but not including 1."""
    if not _is_number(value) or not 0 <= value < 1:
        raise ArgumentError(f"{name}={value!r} is out of range: expected a fraction from 0 up to but not including 1.")
    return float(value)


def positive(name: str, value: float) -> float:
    """Return `value` as a float, if it is a finite number above 0."""
    if not _is_number(value) or value <= 0:
        raise ArgumentError(f"{name}={value!r} cannot be used: expected a finite number above 0, such as 1e-3.")
    return float(value)


def not_negative(name: str, value: float) -> float:
    """Return `value` as a float, if it is a finite number of 0 or more."""
    if not _is_number(value) or value < 0:
        raise ArgumentError(f"{name}={value!r} cannot be used: expected a finite number of 0 or more, such as 1e-3.")
    return float(value)


def one_of(name: str, value: object, known: Collection[str], *, hint: str = "") -> str:
    """Return the one of `known` that `value` is, in upper or lower case; `hint` ends the message.

    Example:
        >>> one_of("optimizer", "Adam", ["adam", "sgd"])
        'adam'
    """
    found = [word for word in known if isinstance(value, str) and value.lower() == word.lower()]
    if not found:
        raise ArgumentError(f"{name}={value!r} is not known. {close_matches(value, known)} {hint}".rstrip())
    return found[0]


def square(size: Any) -> Any:
    """Return the number of pixels of a pair of equal ones, as others write image sizes; anything else unchanged.

    Example:
        >>> square((224, 224)), square(64), square((480, 640))
        (224, 64, (480, 640))
    """
    pair = isinstance(size, tuple | list) and len(size) in (2, 3) and size[0] == size[1] and list(size[2:]) in ([], [3])
    return size[0] if pair else size


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
