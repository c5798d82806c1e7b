"""Whole numbers that callers pass: of any kind that has an index, and plain ints from there on."""

from __future__ import annotations

import operator
from typing import SupportsIndex


def as_int(name: str, value: SupportsIndex, *, least: int | None = None) -> int:
    """A number argument as a plain int.

    Args:
        name: Name of the argument, for the message.
        value: An int, or what stands for one: a NumPy integer, an integer tensor of one element.
        least: Smallest value that is allowed; None allows all.

    Returns:
        The same number; never a bool, nor a number of another library.

    Raises:
        TypeError: Not a whole number by its type, such as 2.0.
        ValueError: Less than `least`.
    """
    if type(value) is not int:
        try:
            value = int(operator.index(value))
        except TypeError:
            raise TypeError(
                f"{name} is {value!r}, a {type(value).__name__}, but must be an int"
            ) from None
    if least is not None and value < least:
        wanted = f"be at least {least}" if least else "not be negative"
        raise ValueError(f"{name} is {value}, but must {wanted}")
    return value
