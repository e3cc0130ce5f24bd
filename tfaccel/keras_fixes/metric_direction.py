"""Keras knows whether a metric is better when it rises, and tells only its own callbacks.

`EarlyStopping` and `ModelCheckpoint` take the direction of `monitor` from the compiled metric, a private
attribute of it. A callback of one's own that guesses from the name ("acc" rises) gets recall, precision, F1
and IoU wrong, and keeps the worst epoch.

Smallest reproduction (Keras 3.15.1): nothing public of `keras.metrics.Recall()` says that it is better when
it rises; `keras.metrics.Recall()._direction` is "up".

The fix: ask one of Keras's own callbacks.
"""

from __future__ import annotations

import keras

from tfaccel.errors import refuse


def rises(model: keras.Model, monitor: str) -> bool:
    """Whether a higher value of a logged figure is better.

    Args:
        model: Compiled, and trained for a step at least: its metrics are known only then.
        monitor: The figure's name in the logs.

    Raises:
        ValueError: Keras can't tell.
    """
    asked = keras.callbacks.EarlyStopping(monitor=monitor, mode="auto")
    asked.set_model(model)
    try:
        asked._set_monitor_op()
    except ValueError as error:
        allowed = f"'min' or 'max' for {monitor!r}, which is no compiled metric"
        raise refuse("mode", "auto", allowed, "Say which of the two is better.") from error
    return asked.monitor_op == keras.ops.greater
