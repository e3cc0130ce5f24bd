"""`fit(steps_per_epoch=20)` with `steps_per_execution=16` trains 32 steps an epoch, and says nothing.

Keras rounds `steps_per_epoch` up to whole executions where the data goes on (it repeats, or is read over
several epochs). Schedules then run out early, and an epoch is not what the user asked for.

Smallest reproduction (Keras 3.15.1):

    model.compile("sgd", "mse", steps_per_execution=16)
    model.fit(tf.data.Dataset.from_tensors((x, y)).repeat(), steps_per_epoch=20)
    model.optimizer.iterations                                         # 32

The fix: the loops of `tfaccel.fast_kernels` count exactly. Where Keras's own runs (`kernels="plain"`, several
replicas), tfaccel's callbacks refuse the combination when `fit` begins; without one of them in the fit there
is no place to look from, so README names it.
"""

from __future__ import annotations

import keras

from tfaccel.keras_fixes.input_clock import CLOCK_ATTRIBUTE, running_epoch_iterator


def check_whole_executions(callback: keras.callbacks.Callback) -> None:
    """Raises where the running `fit` was given steps that are no multiple of `steps_per_execution`.

    Raises:
        ValueError: Keras would train more steps than were asked for.
    """
    iterator = running_epoch_iterator()
    if hasattr(iterator, CLOCK_ATTRIBUTE):
        return
    steps = getattr(iterator, "steps_per_epoch", None)
    per_execution = callback.model.steps_per_execution
    if steps and steps % per_execution:
        below = steps // per_execution * per_execution
        raise ValueError(
            f"steps_per_epoch={steps} is no multiple of steps_per_execution={per_execution}: Keras would "
            f"train {below + per_execution} steps an epoch. Allowed: multiples of {per_execution}. Pass "
            f"steps_per_epoch={below or per_execution}, or steps_per_execution=1 to Accelerator."
        )
