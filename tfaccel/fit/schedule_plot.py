"""`plot_schedule`: what a learning rate will do, before it does it."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import tensorflow as tf

from tfaccel.errors import is_number, refuse
from tfaccel.fit._schedule import ScheduleCallback
from tfaccel.fit.learning_rate import LearningRate
from tfaccel.fit.schedules import Schedule
from tfaccel.plots import new_figure

POINTS = 1000

Drawable = ScheduleCallback | Schedule


def plot_schedule(
    schedule: Drawable | Sequence[Drawable], path: str | os.PathLike, *, epochs: float = 10
) -> pathlib.Path:
    """Draws the learning rate of a run over its epochs, and gives the path back.

    Args:
        schedule: `OneCycle`, `WarmupCosine`, `LearningRate`, a shape of `tfaccel.schedules` (drawn with a
            peak of 1), or several of them, for one picture.
        path: Of the picture, `.png` or what else matplotlib writes.
        epochs: Of the run, > 0. Default 10.

    Raises:
        ValueError: A bad argument, a schedule longer than the run, or matplotlib is not installed.

    Example:
        >>> path = tfaccel.plot_schedule(tfaccel.OneCycle(1e-2, warmup_epochs=3), "rates.png", epochs=20)

    Reference:
        `tfaccel.schedules`.
    """
    several = list(schedule) if isinstance(schedule, Sequence) else [schedule]
    if not several or not all(isinstance(each, ScheduleCallback | Schedule) for each in several):
        allowed = "OneCycle, WarmupCosine, LearningRate, shapes of tfaccel.schedules"
        raise refuse("schedule", schedule, allowed, "Try tfaccel.OneCycle(1e-2).")
    if not is_number(epochs, 0) or epochs == 0:
        raise refuse("epochs", epochs, "a number > 0", "Those of your fit.")
    callbacks = [each if isinstance(each, ScheduleCallback) else LearningRate(1.0, each) for each in several]
    progress = tf.linspace(0.0, 1.0, POINTS)
    drawn = [each.learning_rate_at(progress, epochs).numpy() for each in callbacks]
    figure, (axes,) = new_figure(7, 3.2)
    for each, rates in zip(several, drawn, strict=True):
        label = repr(each)
        axes.plot(progress.numpy() * epochs, rates, label=label if len(label) < 80 else f"{label[:77]}...")
    axes.set(xlabel="epoch", ylabel="learning rate", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.28))
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return pathlib.Path(path)
