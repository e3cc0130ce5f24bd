"""A schedule, how schedules are joined, and what their arguments have in common."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfaccel.errors import is_number, refuse
from tfaccel.fit import _curves as curves

UNITS = ("run", "epochs")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A shape of the learning rate; made by the functions of this module.

    Args:
        text: The call that makes it.
        curve: From progress, 0..1, and the run's epochs to the multiple of the peak.

    Example:
        >>> half = Schedule("half", lambda progress, epochs: 1 - 0.5 * progress)
        >>> half(1.0, epochs=10)
        0.5
    """

    text: str
    curve: Callable[[Any, float], Any]

    def __call__(self, progress: Any, epochs: float) -> Any:
        """The multiple of the peak.

        Args:
            progress: Position in the run, 0..1: a number, or a float32 tensor.
            epochs: Of the run.
        """
        return self.curve(progress, epochs)

    def __repr__(self) -> str:
        """The call that makes it."""
        return f"schedules.{self.text}"


def warmup(
    schedule: Schedule, length: float = 0.1, *, initial_fraction: float = 0.0, unit: str = "run"
) -> Schedule:
    """A straight line up to the peak, then another schedule over what is left of the run.

    Args:
        schedule: What follows.
        length: Of the line, in `unit`. Default: a tenth of the run.
        initial_fraction: Of the peak, at the beginning, 0..1. Default 0.
        unit: `"run"`: a fraction of the run; `"epochs"`.

    Raises:
        ValueError: A bad argument.

    Reference:
        Goyal et al., 2017, https://arxiv.org/abs/1706.02677, section 2.2.
    """
    check_fraction("initial_fraction", initial_fraction)
    joined = join((Schedule("", line_up(initial_fraction)), length), schedule, unit=unit)
    text = f"warmup({schedule}, {length}, initial_fraction={initial_fraction}, unit={unit!r})"
    return Schedule(text, joined.curve)


def join(*parts: Schedule | tuple[Schedule, float], unit: str = "run") -> Schedule:
    """One schedule after another, each from its beginning to its end.

    Args:
        *parts: Pairs of a schedule and its length in `unit`, and one schedule for what is left.
        unit: `"run"`: lengths are fractions of the run; `"epochs"`.

    Raises:
        ValueError: A bad argument.

    Example:
        >>> from tfaccel import schedules
        >>> both = schedules.join((schedules.constant(), 2), schedules.linear(), unit="epochs")
        >>> [float(both(progress, epochs=10)) for progress in (0.1, 0.6, 1.0)]
        [1.0, 0.5, 0.0]
    """
    check_unit(unit)
    last = parts[-1] if parts else None
    if not isinstance(last, Schedule):
        raise refuse(
            "parts", parts, "pairs (schedule, length), then a schedule", "Leave off the last length."
        )
    timed = [each for each in parts[:-1] if isinstance(each, tuple) and len(each) == 2]
    if len(timed) < len(parts) - 1 or not all(
        isinstance(schedule, Schedule) and is_number(length, 0) for schedule, length in timed
    ):
        allowed = "pairs of a schedule and a length ≥ 0 before the last"
        raise refuse("parts", parts, allowed, "Give each a length.")
    if unit == "run" and sum(length for _, length in timed) > 1.0 + 1e-9:
        raise refuse("parts", parts, "fractions whose sum is at most 1", "Pass unit='epochs' for epochs.")

    def curve(progress: Any, epochs: float) -> Any:
        lengths = [share_of_run(length, unit, epochs) for _, length in timed]
        ends = [min(end, 1.0) for end in itertools.accumulate(lengths)] + [1.0]
        if sum(lengths) > 1 + 1e-6:
            raise refuse("schedule", parts, f"what ends within the run, {epochs:g} epochs", "Train longer.")
        schedules = [schedule for schedule, _ in timed] + [last]
        value = None
        for schedule, begin, end in reversed(list(zip(schedules, [0.0, *ends], ends, strict=False))):
            if end > begin:
                own = schedule(curves.position(progress, begin, end), epochs * (end - begin))
                value = own if value is None else tf.where(progress < end, own, value)
        return value

    texts = [repr(each) for each in parts]
    return Schedule(f"join({', '.join(texts)}, unit={unit!r})", curve)


def line_up(initial_fraction: float) -> Callable[[Any, float], Any]:
    """From a fraction of the peak to the peak."""
    return lambda progress, epochs: initial_fraction + (1 - initial_fraction) * progress


def share_of_run(moment: float, unit: str, epochs: float) -> float:
    """A moment as a fraction of the run."""
    return moment if unit == "run" else moment / max(epochs, 1e-9)


def check_unit(unit: str) -> None:
    """Raises ValueError for a unit that isn't one."""
    if unit not in UNITS:
        raise refuse("unit", unit, "'run' or 'epochs'", "Take 'run' for fractions of the run.")


def check_fraction(name: str, value: float) -> None:
    """Raises ValueError for what is not 0 to 1."""
    if not is_number(value, 0) or value > 1:
        raise refuse(name, value, "a fraction, 0..1", "Leave it out for the default.")
