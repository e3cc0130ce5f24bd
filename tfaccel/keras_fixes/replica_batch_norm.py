"""Under `tf.distribute` each replica normalizes by its own samples, and keeps moving statistics of its own.

`BatchNormalization` under a strategy gives other weights than on one device (5e-2 off), its moving
statistics differ from replica to replica, and `get_weights` and `save` keep those of the first.
`synchronized=True` heals that for a layer that the user built with it; but it computes the variance as
E(x²) − E(x)², which loses digits where the mean is large, and where a mask is given it is ignored.

Smallest reproduction (Keras 3.15.1, two CPUs):

    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        model.compile("sgd", "mse")
    model.fit(x, y)
    model.layers[0].moving_mean.value.values                 # two different arrays

The fix: mean and then variance over the samples of all replicas, by two small sums over the replicas in each
layer and step. `Accelerator(batch_norm="local")` leaves the layers as they were built.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfaccel.keras_fixes.patch import Patch
from tfaccel.keras_fixes.sample_share import Share


def _moments(original: Callable, setting: Callable[[], Share | None]) -> Callable:
    def moments(self: Any, inputs: Any, mask: Any) -> tuple[tf.Tensor, tf.Tensor]:
        share = setting()
        if share is None:
            return original(self, inputs, mask)
        return synchronized_moments(self, tf.convert_to_tensor(inputs), mask, share)

    return moments


def synchronized_moments(
    layer: keras.layers.BatchNormalization, inputs: tf.Tensor, mask: tf.Tensor | None, share: Share
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance over the samples of all replicas.

    Args:
        layer: Says over which axes.
        inputs: This replica's share, float32 or float64.
        mask: Of the rank of `inputs` less one, or None.
        share: Of the batch.
    """
    axes, what = layer._reduction_axes, "synchronized BatchNormalization"
    weights = tf.ones_like(inputs) if mask is None else tf.cast(mask, inputs.dtype)[..., None]
    weights = tf.broadcast_to(weights, tf.shape(inputs))
    sums = [tf.reduce_sum(values, axes, keepdims=True) for values in (weights, weights * inputs)]
    count, total = tf.unstack(share.sum(tf.stack(sums), what))
    # Keras adds it where there is a mask, which may be empty.
    count += 0.0 if mask is None else keras.config.epsilon()
    mean = tf.math.divide_no_nan(total, count)
    squares = tf.reduce_sum(weights * tf.square(inputs - mean), axes, keepdims=True)
    variance = tf.math.divide_no_nan(share.sum(squares, what), count)
    return tf.squeeze(mean, axes), tf.squeeze(variance, axes)


_PATCH = Patch(keras.layers.BatchNormalization, "_moments", _moments)


def synchronized(share: Share | None) -> contextlib.AbstractContextManager[None]:
    """Lets layers that this thread traces normalize over all replicas; None leaves them as they are."""
    return _PATCH.active(share)
