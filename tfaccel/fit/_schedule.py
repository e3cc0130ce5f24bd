"""What every learning-rate callback shares: counting the run, attaching, logging, detaching.

A base class, against the house rule, because the four hooks belong together: an attach in one copy and
a forgotten detach in another is the bug that this file rules out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfaccel.errors import is_number, is_whole, refuse
from tfaccel.fit._optimizer import Curve, drive, inner_optimizer, momentum_name
from tfaccel.fit._run import check_updates, updates_done, updates_per_epoch
from tfaccel.fit._session import Attachment, detach_leftovers
from tfaccel.keras_fixes.callback_siblings import siblings
from tfaccel.keras_fixes.whole_executions import check_whole_executions

WRITERS = (keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau)


class ScheduleCallback(keras.callbacks.Callback):
    """Drives the learning rate along a curve of the run's progress.

    Args:
        max_learning_rate: The peak.
        steps_per_epoch: Batches an epoch, for data of unknown length; or None to ask `fit`.
    """

    def __init__(self, max_learning_rate: float, steps_per_epoch: int | None):
        super().__init__()
        if not (is_number(max_learning_rate, 0) and max_learning_rate > 0):
            raise refuse("max_learning_rate", max_learning_rate, "a finite number > 0", "Try 1e-2 with Adam.")
        if steps_per_epoch is not None and not is_whole(steps_per_epoch, 1):
            raise refuse("steps_per_epoch", steps_per_epoch, "an integer ≥ 1", "Leave it out to ask fit.")
        self.max_learning_rate = float(max_learning_rate)
        self.steps_per_epoch = steps_per_epoch
        self._attachment: Attachment | None = None
        self._updates_before: int | None = None  # the first epoch of this fit

    def learning_rate_at(self, progress: Any, epochs: float) -> Any:
        """The learning rate at `progress` (0..1) of a run of so many epochs."""
        raise NotImplementedError

    def momentum_at(self, progress: Any, epochs: float) -> Any:
        """The momentum at `progress`; None leaves the optimizer's own."""
        return None

    def set_model(self, model: keras.Model) -> None:
        """Notes the optimizer's own rate, before any callback can restore another from a backup."""
        super().set_model(model)
        detach_leftovers(model)
        check_optimizer(self)
        rate = inner_optimizer(model.optimizer).learning_rate
        self._resting_learning_rate = float(keras.ops.convert_to_numpy(rate))

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks, before the first step, that the schedule can be followed to the end."""
        self._attachment = None
        check_siblings(self)
        check_whole_executions(self)
        updates_per_epoch(self, self.steps_per_epoch)
        self.learning_rate_at(tf.constant(0.0), self.params["epochs"])  # says what doesn't fit the run

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Attaches in the first epoch, whose number is not 0 where a run is resumed."""
        if self._attachment is not None:
            return
        per_epoch = updates_per_epoch(self, self.steps_per_epoch)
        epochs = self.params["epochs"]
        last_step = max(int(per_epoch * epochs) - 1, 1)
        optimizer = inner_optimizer(self.model.optimizer)
        iterations = self._updates_before = updates_done(self.model.optimizer)

        def along(curve: Callable[[Any, float], Any]) -> Curve:
            return lambda step: curve(tf.clip_by_value(step / last_step, 0.0, 1.0), epochs)

        has_momentum = self.momentum_at(tf.constant(0.0), epochs) is not None
        undo = drive(
            optimizer,
            along(self.learning_rate_at),
            along(self.momentum_at) if has_momentum and momentum_name(optimizer) else None,
            start=iterations - int(per_epoch * epoch),
            resting_learning_rate=self._resting_learning_rate,
            strategy=self.model.distribute_strategy,
        )
        self._attachment = Attachment(self.model, undo)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes `learning_rate`, that of the last update, into the logs."""
        if self._updates_before is not None:
            check_updates(self, self._updates_before)
            self._updates_before = None
        if logs is not None:
            rate = inner_optimizer(self.model.optimizer).learning_rate
            logs["learning_rate"] = float(keras.ops.convert_to_numpy(rate))

    def on_train_end(self, logs: dict | None = None) -> None:
        """Gives the optimizer its own learning rate and momentum back."""
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None


def check_optimizer(callback: keras.callbacks.Callback) -> None:
    """Raises ValueError where the optimizer has no learning-rate variable to drive."""
    optimizer = inner_optimizer(callback.model.optimizer)
    if hasattr(optimizer, "optimizers"):
        raise ValueError(
            f"{type(callback).__name__} can't drive a {type(optimizer).__name__}: it has a learning rate for "
            "each of its optimizers. Allowed: one optimizer. Give each its own schedule instead."
        )
    # With a LearningRateSchedule, Keras gives back a tensor computed for this moment.
    if not isinstance(optimizer.learning_rate, keras.Variable):
        raise ValueError(
            f"{type(callback).__name__} can't set the learning rate: the optimizer was compiled with a "
            f"schedule of its own. Allowed: a number. Compile with "
            f"{type(optimizer).__name__}(learning_rate=1e-3), and let one of the two decide."
        )


def check_siblings(callback: keras.callbacks.Callback) -> None:
    """Raises ValueError where another callback of this fit also sets the learning rate."""
    for other in siblings(callback):
        if other is not callback and isinstance(other, (*WRITERS, ScheduleCallback)):
            raise ValueError(
                f"{type(callback).__name__} and {type(other).__name__} both set the learning rate. "
                "Allowed: one of them in a fit. Remove the other from callbacks."
            )
