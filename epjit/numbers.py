"""Numbers that callers pass: of any kind that stands for one, and plain ones from there on."""

from __future__ import annotations

import operator
from typing import SupportsFloat, SupportsIndex

MOST_SECONDS = 1e9
"""Of a wait: 31 years; ten times as many nanoseconds do not fit into 64 bits with a sign."""


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


def as_seconds(name: str, value: SupportsFloat) -> float:
    """A time to wait as a plain float, at most `MOST_SECONDS`: infinity is 31 years.

    Args:
        name: Name of the argument, for the message.
        value: An int, a float, or what stands for one.

    Raises:
        TypeError: Not a number by its type.
        ValueError: Not greater than 0.
    """
    try:
        seconds = float(value) if hasattr(value, "__float__") else None
    except (TypeError, ValueError):
        seconds = None
    if seconds is None:
        raise TypeError(
            f"{name} is {value!r}, a {type(value).__name__}, but must be a number of seconds"
        )
    if not seconds > 0:
        raise ValueError(f"{name} is {value!r}, but must be greater than 0")
    return min(seconds, MOST_SECONDS)
