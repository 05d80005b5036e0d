"""What values that users pass are: numbers, whole numbers, and numpy's numbers as Python's."""

from __future__ import annotations

import math
from typing import Any


def plain(value: Any) -> Any:
    """A number as Python has it where numpy's was given, so that checkpoints hold no other; anything else as it is.

    Args:
        value: of a key or an argument; in tuples and lists, each of them.

    Returns:
        The value.

    Example:
        >>> plain((0.9, 0.999)), plain("4")
        ((0.9, 0.999), '4')
    """
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    is_of_numpy = getattr(value, "ndim", None) == 0 and type(value).__module__ == "numpy"
    return value.item() if is_of_numpy else value


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; True and False are none.

    Args:
        value: of any type.
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether a value is a whole number of at least some size.

    Args:
        value: of any type; 4.0 and True are no whole numbers.
        least: the smallest.
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a whole number that is no larger than some other.

    Args:
        number: at least 1.
        most: at least 1.

    Example:
        >>> largest_divisor(12, 8)
        6
    """
    return next(size for size in range(most, 0, -1) if number % size == 0)
