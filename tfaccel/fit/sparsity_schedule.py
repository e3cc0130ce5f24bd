"""When a network is pruned, and how far by then.

Reference: Zhu and Gupta, 2017, "To prune, or not to prune", https://arxiv.org/abs/1710.01878, equation 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfaccel.errors import is_number, refuse

KINDS = ("polynomial", "constant", "one_shot")
UNITS = ("run", "epochs")
DEFAULT_UPDATES = 100  # masks between begin and end


def polynomial_progress(step: Any, begin: float, end: float, power: float) -> Any:
    """How far the pruning is at a step: 0 until `begin`, 1 from `end` on, fast first and slow at last."""
    step = tf.cast(step, tf.float32)
    share = tf.clip_by_value((step - begin) / max(end - begin, 1), 0.0, 1.0)
    return 1 - (1 - tf.where(step >= end, 1.0, share)) ** power


def is_mask_step(step: Any, begin: int, end: int, frequency: int) -> Any:
    """Whether masks are made at a step: every `frequency` from `begin` to `end`, and at `end`."""
    within = (step >= begin) & (step <= end)
    return within & (((step - begin) % frequency == 0) | (step == end))


@dataclasses.dataclass(frozen=True)
class PruningSchedule:
    """When weights are pruned in a `fit`, and how far by then.

    Behind `end` the last masks hold, and the weights that are left recover. Steps are optimizer updates,
    counted from where `fit` begins.

    Args:
        kind: `"polynomial"` raises the sparsity from the initial one to its target between `begin` and
            `end`; `"constant"` has its target from `begin` on, with new masks until `end`; `"one_shot"`
            makes one mask at `begin`.
        begin: Where it begins, in `unit`. Default 0.
        end: Where the last mask is made, in `unit`. Default 0.7 of the run, also where `unit` is epochs.
        frequency: From one mask to the next, in `unit`. Default: a hundredth of the time, one step at least.
        unit: `"run"`: fractions of the run, 0..1; `"epochs"`: epochs, also parts of one.
        initial_sparsity: That a polynomial begins with, 0..1. Default: the share of zeros that each weight
            has when `fit` begins, so that what was pruned stays so.
        power: The polynomial's exponent. Default 3.

    Raises:
        ValueError: A bad argument.

    Example:
        >>> schedule = tfaccel.PruningSchedule(begin=0.1, end=0.6)
        >>> schedule.steps(updates_per_epoch=100, epochs=10)
        (100, 600, 5)

    Reference:
        Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878, equation 1.
    """

    kind: str = "polynomial"
    begin: float = 0.0
    end: float | None = None
    frequency: float | None = None
    unit: str = "run"
    initial_sparsity: float | None = None
    power: float = 3.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise refuse("kind", self.kind, ", ".join(map(repr, KINDS)), "Take 'polynomial'.")
        if self.unit not in UNITS:
            raise refuse("unit", self.unit, "'run' or 'epochs'", "Take 'run' for fractions of the run.")
        for name in ("begin", "end", "frequency", "initial_sparsity", "power"):
            value = getattr(self, name)
            if value is not None and not is_number(value, 0):
                raise refuse(name, value, "a number ≥ 0", "Leave it out for the default.")
        most = 1.0 if self.unit == "run" else float("inf")
        if self.begin > most or (self.end or 0) > most or (self.frequency or 0) > most:
            raise refuse(
                "schedule", self, "fractions of the run, 0..1", "Pass unit='epochs' if you mean epochs."
            )
        if self.end is not None and self.end < self.begin:
            raise refuse("end", self.end, f"a number ≥ begin={self.begin}", "Exchange the two.")
        if self.initial_sparsity is not None and self.initial_sparsity >= 1:
            raise refuse("initial_sparsity", self.initial_sparsity, "a fraction, 0 ≤ … < 1", "Try 0.5.")

    def steps(self, updates_per_epoch: float, epochs: int) -> tuple[int, int, int]:
        """Begin, end and frequency in optimizer updates, for a run.

        Args:
            updates_per_epoch: Of the run.
            epochs: Of the run.

        Raises:
            ValueError: The schedule ends behind the run.
        """
        total = int(updates_per_epoch * epochs)
        scale = total if self.unit == "run" else updates_per_epoch
        begin = int(self.begin * scale)
        end = max(int(0.7 * total), begin) if self.end is None else int(self.end * scale)
        if end > total or begin >= max(total, 1):
            raise refuse(
                "schedule",
                self,
                f"what ends within the run, {epochs} epochs",
                "Train longer, or end earlier.",
            )
        if self.kind == "one_shot":
            return begin, begin, 1
        every = (end - begin) / DEFAULT_UPDATES if self.frequency is None else self.frequency * scale
        return begin, end, max(int(every), 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A schedule, once the length of the run is known.

    Args:
        is_due: From a step (int64 tensor) to whether masks are made there.
        progress: From a step to how far the pruning is, 0..1; None where `target` says it.
        target: From a step to the sparsity, for schedules of the user's own; or None.
        last_due: From a step (int) to the last one at or before it with new masks, or -1.
        end: The step from which on the sparsity is what it will be.
    """

    is_due: Callable[[Any], Any]
    progress: Callable[[Any], Any] | None
    target: Callable[[Any], Any] | None
    last_due: Callable[[int], int]
    end: int


def plan(schedule: Any, updates_per_epoch: float, epochs: int) -> Plan:
    """Says at which steps of a run masks are made, and how sparse they are.

    Args:
        schedule: A `PruningSchedule`, or what is called with a step and gives whether to prune and how
            far, as `tensorflow_model_optimization`'s schedules do. Those call the first batch step 1.
        updates_per_epoch: Of the run.
        epochs: Of the run.
    """
    if isinstance(schedule, PruningSchedule):
        begin, end, frequency = schedule.steps(updates_per_epoch, epochs)

        def progress(step: Any) -> Any:
            if schedule.kind == "polynomial":
                return polynomial_progress(step, begin, end, schedule.power)
            return tf.cast(step >= begin, tf.float32)

        def last_due(step: int) -> int:
            if step >= end:
                return end
            return step - (step - begin) % frequency if step >= begin else -1

        return Plan(lambda step: is_mask_step(step, begin, end, frequency), progress, None, last_due, end)
    total = int(updates_per_epoch * epochs)
    last = getattr(schedule, "end_step", -1)
    if last > total:
        raise refuse(
            "schedule",
            schedule,
            f"what ends within the run, {total} steps; this one ends at {last}",
            "Train longer, or end earlier.",
        )

    def last_due_of(step: int) -> int:
        due = (s for s in range(step, -1, -1) if bool(schedule(tf.constant(s + 1, tf.int64))[0]))
        return next(due, -1)

    return Plan(
        is_due=lambda step: schedule(step + 1)[0],
        progress=None,
        target=lambda step: tf.cast(schedule(step + 1)[1], tf.float32),
        last_due=last_due_of,
        end=(last if last >= 0 else getattr(schedule, "begin_step", 1)) - 1,
    )
