"""How a bad argument is worded."""

from __future__ import annotations


def refuse(argument: str, given: object, allowed: str, remedy: str) -> ValueError:
    """Words a bad argument in the three parts of the house style: given, allowed, what to do."""
    return ValueError(f"{argument}={given!r} is not usable. Allowed: {allowed}. {remedy}")
