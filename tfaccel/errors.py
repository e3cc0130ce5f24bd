"""How a bad argument is worded."""

from __future__ import annotations

import numbers
from typing import Any


def refuse(argument: str, given: object, allowed: str, remedy: str) -> ValueError:
    """Words a bad argument in the three parts of the house style: given, allowed, what to do."""
    return ValueError(f"{argument}={given!r} is not usable. Allowed: {allowed}. {remedy}")


def is_number(value: Any, low: float, high: float = float("inf")) -> bool:
    """Whether it is a number, numpy's too, with low ≤ value < high; NaN is not."""
    return isinstance(value, numbers.Real) and low <= float(value) < high


def is_whole(value: Any, low: int, high: int | None = None) -> bool:
    """Whether it is an integer, numpy's too, with low ≤ value ≤ high."""
    return isinstance(value, numbers.Integral) and low <= int(value) and (high is None or int(value) <= high)
