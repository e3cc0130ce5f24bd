"""Dot-product attention as two batched matrix products, heads before positions.

Keras calls `tf.einsum` on `(batch, positions, heads, size)`; each of the two, and of the four in the
gradient, copies its operands into the order that a product needs. Here queries, keys and values are copied
once. The scale is applied to the queries, which are fewer than the scores.

Used for float32. Reference: Vaswani et al. (2017), https://arxiv.org/abs/1706.03762, section 3.2.1. Measured
by `benchmarks/step_time.py --models transformer`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from keras.src.backend.tensorflow import nn as keras_nn

from tfaccel.fast_kernels.agreement import ways_apart
from tfaccel.keras_fixes.patch import Patch


def attend(
    query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, bias: Any, mask: Any, is_causal: bool, scale: Any
) -> tf.Tensor:
    """`softmax(scale · query keyᵀ + bias) value`, where the mask allows.

    Args:
        query: Shape `(batch, queries, heads, size)`, float32.
        key: Shape `(batch, keys, heads, size)`; or one head for all.
        value: Shape `(batch, keys, heads, size of a value)`; or one head for all.
        bias: Added to the scores, or None.
        mask: True where a query may see a key; broadcast to `(batch, heads, queries, keys)`, or None.
        is_causal: Whether a query may see only the keys up to its own position.
        scale: Of the scores.
    """
    query, key, value = (tf.transpose(x, [0, 2, 1, 3]) for x in (query, key, value))
    scores = tf.matmul(query * tf.cast(scale, query.dtype), key, transpose_b=True)
    if bias is not None:
        scores += tf.cast(bias, scores.dtype)
    weights = tf.nn.softmax(keras_nn._apply_masks(scores, mask, is_causal))
    return tf.transpose(tf.matmul(weights, value), [0, 2, 1, 3])


def _wrap(original: Callable, allowed: Callable[[], Any]) -> Callable:
    def attention(query: Any, key: Any, value: Any, *rest: Any) -> Any:
        if allowed() and query.dtype == key.dtype == value.dtype == tf.float32:
            return attend(query, key, value, *rest)
        return original(query, key, value, *rest)

    return attention


_PATCH = Patch(keras_nn, "_dot_product_attention_xla", _wrap)


def fused() -> contextlib.AbstractContextManager[None]:
    """Lets attention fuse in this thread while the block lasts: wrap the tracing of a step."""
    return _PATCH.active(True)


def probe() -> float:
    """Runs Keras's attention and this one, masked and causal, with the gradients.

    Returns:
        As `disagreement`: up to 1 they agree.
    """
    random = np.random.default_rng(0)
    operands = [tf.constant(random.normal(size=(2, 5, 3, 4)), tf.float32) for _ in range(3)]
    mask = tf.constant(random.random((2, 1, 5, 5)) < 0.7)

    def masked(way: Callable) -> Callable:
        return lambda q, k, v: way(q, k, v, None, mask, True, 0.4)

    return ways_apart(masked(keras_nn._dot_product_attention_xla), masked(attend), operands)
