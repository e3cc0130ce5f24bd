"""`class_weight` for data in memory: each sample of a class that is not named weighs 1, as in `fit(x, y)`.

For a `tf.data.Dataset` Keras looks the weights up in a table that ends with the highest class that is named:
a label above it fails on a CPU, and under XLA takes the last weight, in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf


def weigh_classes(class_weight: Mapping[Any, Any]) -> Callable[..., tuple]:
    """What gives a batch `(x, y)` its sample weights.

    Args:
        class_weight: As in `fit`. Targets are classes, or one-hot in their last axis.
    """
    low, high = int(min(class_weight)), int(max(class_weight))
    weights = [float(class_weight.get(number, 1.0)) for number in range(low, high + 1)]
    table = tf.constant([*weights, 1.0], keras.config.floatx())

    def weigh(x: Any, y: Any) -> tuple:  # Keras has refused several outputs, and weights of samples
        classes = y
        if y.shape.rank > 1:
            one_hot = y.shape[-1] != 1
            classes = tf.argmax(y, -1, tf.int32) if one_hot else tf.squeeze(y, -1)
        place = tf.cast(tf.round(classes) if classes.dtype.is_floating else classes, tf.int32) - low
        named = (place >= 0) & (place < len(weights))
        return x, y, tf.gather(table, tf.where(named, place, len(weights)))

    return weigh
