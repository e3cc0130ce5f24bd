"""Training-mode batch normalization in one op and one gradient op, where Keras 3 runs about thirty.

Keras 3 takes the moments, scales and shifts as separate operations, each a pass over the activations, and
the gradient is twice as many. `FusedBatchNormV3` does it in two passes. It also takes float16 and bfloat16
activations with float32 statistics, so nothing is cast to float32 and back.

Used for the last axis of inputs with 2 to 5 dimensions, under one device. Keras's own code runs for masks,
renormalization, synchronized statistics, another axis, frozen layers and inference. Keras keeps the biased
variance in `moving_variance`; the op gives the unbiased one, which is scaled back.

Reference: Ioffe & Szegedy (2015), https://arxiv.org/abs/1502.03167, algorithm 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.fast_kernels.agreement import EPSILON, tolerance, worst_disagreement
from tfaccel.fast_kernels.placement import step_device
from tfaccel.keras_fixes.patch import Patch

MIN_EPSILON = 1e-5  # of cuDNN, which adds no less


def normalize(
    inputs: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Normalizes over all axes but the last: `(x - mean) / sqrt(variance + epsilon) · gamma + beta`.

    Args:
        inputs: Shape `(samples, ..., channels)`, 2 to 5 dimensions; float32, float16 or bfloat16.
        gamma: Shape `(channels,)`, float32.
        beta: Shape `(channels,)`, float32.
        epsilon: At least `MIN_EPSILON`.

    Returns:
        The outputs (shape and dtype of `inputs`), the mean and the biased variance of the batch (float32).
    """
    shape, channels = tf.shape(inputs), inputs.shape[-1]
    images = inputs if inputs.shape.rank == 4 else tf.reshape(inputs, [-1, 1, 1, channels])
    none = tf.zeros([0], tf.float32)
    result = tf.raw_ops.FusedBatchNormV3(
        x=images, scale=gamma, offset=beta, mean=none, variance=none, epsilon=epsilon, is_training=True
    )
    outputs = result.y if inputs.shape.rank == 4 else tf.reshape(result.y, shape)
    outputs.set_shape(inputs.shape)
    count = tf.cast(tf.size(inputs) // channels, tf.float32)
    # The op divides by count - 1, or by 1 where the count is 1.
    biased = result.batch_variance * (tf.maximum(count - 1, 1) / count)
    return outputs, result.batch_mean, biased


def can_fuse(layer: keras.layers.BatchNormalization, inputs: Any, training: Any, mask: Any) -> bool:
    """Whether the op computes what this call of the layer would."""
    if not (training is True and layer.trainable) or mask is not None or not isinstance(inputs, tf.Tensor):
        return False
    if layer.renorm or layer.synchronized or layer.epsilon < MIN_EPSILON:
        return False
    rank = inputs.shape.rank
    last = isinstance(layer.axis, int) and rank is not None and layer.axis in (-1, rank - 1)
    if not last or not 2 <= rank <= 5 or inputs.shape[-1] is None:
        return False
    return inputs.dtype.name == layer.compute_dtype and layer.compute_dtype in EPSILON


def fused_call(layer: keras.layers.BatchNormalization, inputs: tf.Tensor) -> tf.Tensor:
    """`layer.call(inputs, training=True)`: outputs, and new moving statistics."""
    channels = [inputs.shape[-1]]
    gamma = tf.cast(layer.gamma, tf.float32) if layer.scale else tf.ones(channels)
    beta = tf.cast(layer.beta, tf.float32) if layer.center else tf.zeros(channels)
    outputs, mean, variance = normalize(inputs, gamma, beta, layer.epsilon)
    for moving, value in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
        kept = tf.cast(moving, tf.float32) * layer.momentum
        moving.assign(tf.cast(kept + value * (1.0 - layer.momentum), moving.dtype))
    return outputs


def _wrap(original: Callable, allowed_dtypes: Callable[[], Any]) -> Callable:
    def call(self: Any, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        if self.compute_dtype in (allowed_dtypes() or ()) and can_fuse(self, inputs, training, mask):
            return fused_call(self, inputs)
        return original(self, inputs, training=training, mask=mask)

    return call


_PATCH = Patch(keras.layers.BatchNormalization, "call", _wrap)


def fused(dtypes: Container[str]) -> contextlib.AbstractContextManager[None]:
    """Lets `BatchNormalization.call` fuse in this thread while the block lasts: wrap the tracing of a step.

    Args:
        dtypes: The compute dtypes in which it may.
    """
    return _PATCH.active(dtypes)


def probe(dtype: str) -> float:
    """Runs a layer of Keras's and the fused call on one batch: outputs, gradients, moving statistics.

    Args:
        dtype: "float32", "float16" or "bfloat16".

    Returns:
        As `disagreement`: up to 1 they agree.
    """
    with tf.device(step_device()):
        results = [_one_step(dtype, fuse) for fuse in (False, True)]
    before = [np.zeros_like(a) for a in results[0]]
    before[-1] += 1  # the moving variance
    # Outputs of half precision are rounded to it once by both ways.
    plain, fused_results = results
    return worst_disagreement(plain, fused_results, before, tolerance(dtype))


def _one_step(dtype: str, fuse: bool) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    shape = (8, 3, 5, 7)
    inputs = tf.cast(random.normal(0.3, 2, shape), dtype)
    upstream = tf.cast(random.normal(size=shape), dtype)
    policy = keras.DTypePolicy("float32" if dtype == "float32" else f"mixed_{dtype}")
    layer = keras.layers.BatchNormalization(dtype=policy, name="probe")
    layer.build(shape)
    layer.gamma.assign(np.linspace(0.5, 2, shape[-1]))
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = fused_call(layer, inputs) if fuse else layer(inputs, training=True)
    gradients = tape.gradient(outputs, [inputs, layer.gamma.value, layer.beta.value], upstream)
    tensors = [outputs, *gradients, layer.moving_mean, layer.moving_variance]
    return [tf.cast(tensor, tf.float32).numpy() for tensor in tensors]
