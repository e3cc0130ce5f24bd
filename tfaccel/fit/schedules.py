"""Shapes of a learning rate over a run, for `LearningRate`, in fractions of the run or in epochs.

    from tfaccel import schedules

    schedules.cosine()                                              # from the peak to 0
    schedules.warmup(schedules.step((30, 60), unit="epochs"), 5, unit="epochs")
    schedules.join((schedules.linear(0.1), 0.5), schedules.cosine_restarts(3))

Why not `keras.optimizers.schedules`: those count absolute steps, which change with the batch size, the data
set and the number of epochs. The shapes are the same, and agree with them (`tests/fit/test_schedules.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfaccel.errors import is_number, is_whole, refuse
from tfaccel.fit import _curves as curves
from tfaccel.fit._joined_schedules import (
    Schedule,
    check_fraction,
    check_unit,
    join,
    line_up,
    share_of_run,
    warmup,
)

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "cosine_restarts",
    "exponential",
    "flat_cosine",
    "inverse_time",
    "join",
    "linear",
    "one_cycle",
    "polynomial",
    "step",
    "warmup",
    "warmup_stable_decay",
]


def constant() -> Schedule:
    """The peak all the time; of use in `join` and `warmup`.

    Example:
        >>> print(tfaccel.schedules.constant())
        schedules.constant()
    """
    return Schedule("constant()", lambda progress, _: tf.ones_like(progress))


def step(at: Sequence[float] = (0.5, 0.75), factor: float = 0.1, *, unit: str = "run") -> Schedule:
    """Falls by a factor at each of some moments.

    Args:
        at: The moments, rising, in `unit`. Default: half of the run, and three quarters.
        factor: What it is multiplied with at each, 0..1. Default 0.1.
        unit: `"run"`: fractions of the run; `"epochs"`.

    Raises:
        ValueError: A bad argument.

    Reference:
        He et al., 2016, https://arxiv.org/abs/1512.03385, section 3.4.
    """
    check_unit(unit)
    moments = tuple(at) if isinstance(at, Sequence) else ()
    most = 1.0 if unit == "run" else float("inf")
    if not moments or any(not is_number(each, 0) or each > most for each in moments):
        allowed = "fractions of the run, 0..1" if unit == "run" else "epochs ≥ 0"
        raise refuse("at", at, f"a sequence of {allowed}", "Pass unit='epochs' if you mean epochs.")
    if list(moments) != sorted(moments):
        raise refuse("at", at, "moments in rising order", "Sort them.")
    check_fraction("factor", factor)

    def curve(progress: Any, epochs: float) -> Any:
        value = tf.ones_like(progress)
        for moment in moments:
            value *= tf.where(progress >= share_of_run(moment, unit, epochs), factor, 1.0)
        return value

    return Schedule(f"step({moments}, {factor}, unit={unit!r})", curve)


def exponential(final_fraction: float = 0.01) -> Schedule:
    """Falls by the same factor in each part of the run.

    Args:
        final_fraction: Of the peak, at the end, 0 < … ≤ 1. Default 0.01.

    Raises:
        ValueError: A bad argument.
    """
    check_fraction("final_fraction", final_fraction)
    if final_fraction == 0:
        raise refuse("final_fraction", final_fraction, "a fraction > 0", "Take cosine() to end at 0.")
    return Schedule(f"exponential({final_fraction})", lambda progress, epochs: final_fraction**progress)


def polynomial(final_fraction: float = 0.0, power: float = 2.0) -> Schedule:
    """Falls along a power of what is left of the run.

    Args:
        final_fraction: Of the peak, at the end, 0..1. Default 0.
        power: The exponent, > 0. Default 2.

    Raises:
        ValueError: A bad argument.
    """
    check_fraction("final_fraction", final_fraction)
    if not is_number(power, 0) or power == 0:
        raise refuse("power", power, "a number > 0", "1 is a straight line.")

    def curve(progress: Any, _: float) -> Any:
        return final_fraction + (1 - final_fraction) * (1 - progress) ** power

    return Schedule(f"polynomial({final_fraction}, {power})", curve)


def linear(final_fraction: float = 0.0) -> Schedule:
    """Falls in a straight line.

    Args:
        final_fraction: Of the peak, at the end, 0..1. Default 0.

    Raises:
        ValueError: A bad argument.
    """
    return Schedule(f"linear({final_fraction})", polynomial(final_fraction, 1.0).curve)


def inverse_time(decay: float = 9.0) -> Schedule:
    """1 / (1 + decay · progress).

    Args:
        decay: How far it falls, ≥ 0: to 1 / (1 + decay) of the peak. Default 9.

    Raises:
        ValueError: A bad argument.
    """
    if not is_number(decay, 0):
        raise refuse("decay", decay, "a number ≥ 0", "9 ends at a tenth.")
    return Schedule(f"inverse_time({decay})", lambda progress, epochs: 1 / (1 + decay * progress))


def cosine(final_fraction: float = 0.0) -> Schedule:
    """Falls along half a cosine.

    Args:
        final_fraction: Of the peak, at the end, 0..1. Default 0.

    Raises:
        ValueError: A bad argument.

    Reference:
        Loshchilov & Hutter, 2017, https://arxiv.org/abs/1608.03983, equation 5.
    """
    check_fraction("final_fraction", final_fraction)
    return Schedule(
        f"cosine({final_fraction})",
        lambda progress, epochs: curves.cosine_between(1.0, final_fraction, progress),
    )


def cosine_restarts(
    periods: int = 3, growth: float = 1.0, peak_decay: float = 1.0, final_fraction: float = 0.0
) -> Schedule:
    """Falls along half a cosine several times.

    Args:
        periods: How many times, ≥ 1. Default 3.
        growth: How many times as long each is as the one before, > 0. Default 1.
        peak_decay: What the peak is multiplied with at each restart, 0..1. Default 1.
        final_fraction: Of each period's peak, at its end, 0..1. Default 0.

    Raises:
        ValueError: A bad argument.

    Reference:
        Loshchilov & Hutter, 2017, https://arxiv.org/abs/1608.03983, section 3.
    """
    if not is_whole(periods, 1):
        raise refuse("periods", periods, "an integer ≥ 1", "3 is a common choice.")
    if not is_number(growth, 0) or growth == 0:
        raise refuse("growth", growth, "a number > 0", "1 for periods of one length.")
    check_fraction("peak_decay", peak_decay)
    fall = cosine(final_fraction).curve
    lengths = [growth**index for index in range(periods)]

    def lower(index: int) -> Schedule:
        return Schedule("", lambda progress, epochs: peak_decay**index * fall(progress, epochs))

    parts = [(lower(index), length / sum(lengths)) for index, length in enumerate(lengths)]
    text = f"cosine_restarts({periods}, {growth}, {peak_decay}, {final_fraction})"
    return Schedule(text, join(*parts[:-1], parts[-1][0]).curve)


def one_cycle(warmup: float = 0.3, initial_fraction: float = 0.04, final_fraction: float = 1e-4) -> Schedule:
    """Rises once and falls once, along cosines; `OneCycle` also moves the momentum.

    Args:
        warmup: Where the peak lies, as a fraction of the run, 0..1. Default 0.3.
        initial_fraction: Of the peak, at the beginning, 0..1. Default 0.04.
        final_fraction: Of the peak, at the end, 0..1. Default 1e-4.

    Raises:
        ValueError: A bad argument.

    Reference:
        Smith & Topin, 2018, https://arxiv.org/abs/1708.07120, figure 1a.
    """
    fractions = {"warmup": warmup, "initial_fraction": initial_fraction, "final_fraction": final_fraction}
    for name, value in fractions.items():
        check_fraction(name, value)
    return Schedule(
        f"one_cycle({warmup}, {initial_fraction}, {final_fraction})",
        lambda progress, epochs: curves.one_cycle(progress, warmup, initial_fraction, final_fraction),
    )


def flat_cosine(flat: float = 0.72, final_fraction: float = 0.0) -> Schedule:
    """The peak for most of the run, then half a cosine.

    Args:
        flat: How long the peak lasts, as a fraction of the run, 0..1. Default 0.72, as fastai's.
        final_fraction: Of the peak, at the end, 0..1. Default 0.

    Raises:
        ValueError: A bad argument.
    """
    check_fraction("flat", flat)
    return Schedule(
        f"flat_cosine({flat}, {final_fraction})", join((constant(), flat), cosine(final_fraction)).curve
    )


def warmup_stable_decay(rise: float = 0.1, fall: float = 0.2, final_fraction: float = 0.0) -> Schedule:
    """A straight line up, the peak, a straight line down: a run can be prolonged before it falls.

    Args:
        rise: How long the first takes, as a fraction of the run, 0..1. Default 0.1.
        fall: How long the last takes, as a fraction of the run, 0..1. Default 0.2.
        final_fraction: Of the peak, at the end, 0..1. Default 0.

    Raises:
        ValueError: A bad argument.

    Reference:
        Hu et al., 2024, "MiniCPM", https://arxiv.org/abs/2404.06395, section 4.
    """
    for name, value in {"rise": rise, "fall": fall}.items():
        check_fraction(name, value)
    if rise + fall > 1:
        raise refuse("fall", fall, f"a fraction ≤ {1 - rise:g}, what rise={rise} leaves", "Shorten one.")
    middle = join((constant(), 1 - fall / max(1 - rise, 1e-9)), linear(final_fraction))
    text = f"warmup_stable_decay({rise}, {fall}, {final_fraction})"
    return Schedule(text, warmup(middle, rise).curve if rise < 1 else line_up(0.0))
