"""GELU with the gradient written out: fewer passes over the activations.

TensorFlow differentiates `x · erfc(−x / √2) / 2` operation by operation, and its `erfc` costs twice its
`erf`. Here the value is `x · (1 + erf(x / √2)) / 2`, as in PyTorch, whose gradient is `Φ(x) + x φ(x)`.
Far below zero, where GELU is smaller than the rounding of `x`, the two round differently. (One XLA program
for the value and one for the gradient are faster alone, but not in a model, where other operations run
beside them: 1.02 and 1.37 × the time for batches of 32 and 256.)

Used for float32 and the exact form (`approximate=False`, the default).
Reference: Hendrycks & Gimpel (2016), https://arxiv.org/abs/1606.08415. Measured by
`benchmarks/step_time.py --models transformer`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from keras.src.backend.tensorflow import nn as keras_nn

from tfaccel.fast_kernels.agreement import tolerance, worst_disagreement
from tfaccel.fast_kernels.placement import step_device
from tfaccel.keras_fixes.patch import Patch


@tf.custom_gradient
def gelu(x: tf.Tensor) -> Any:
    """`x Φ(x)`, Φ the distribution function of the standard normal.

    Args:
        x: float32, any shape.
    """
    below = 0.5 + 0.5 * tf.math.erf(x * math.sqrt(0.5))

    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        density = tf.exp(-0.5 * tf.square(x)) * (1 / math.sqrt(2 * math.pi))
        return upstream * (below + x * density)

    return x * below, gradient


def _wrap(original: Callable, allowed: Callable[[], Any]) -> Callable:
    def keras_gelu(x: Any, approximate: bool = True) -> Any:
        if allowed() and not approximate and isinstance(x, tf.Tensor) and x.dtype == tf.float32:
            return gelu(x)
        return original(x, approximate)

    return keras_gelu


_PATCH = Patch(keras_nn, "gelu", _wrap)


def fused() -> contextlib.AbstractContextManager[None]:
    """Lets `keras.ops.gelu` fuse in this thread while the block lasts: wrap the tracing of a step."""
    return _PATCH.active(True)


def probe() -> float:
    """Runs Keras's GELU and this one, with gradients, on numbers of all sizes.

    Returns:
        As `disagreement`: up to 1 they agree.
    """
    x = tf.constant(np.concatenate([np.linspace(-8, 8, 401), [-1e4, -30, 30, 1e4]]), tf.float32)
    results = []
    with tf.device(step_device()):
        for way in (lambda x: keras_nn.gelu(x, approximate=False), gelu):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = way(x)
            results.append([y.numpy(), tape.gradient(y, x).numpy()])
    zeros = [np.zeros_like(a) for a in results[0]]
    plain, fused_results = results
    return worst_disagreement(plain, fused_results, zeros, tolerance())
