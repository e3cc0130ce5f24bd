"""TensorFlow's converter has no kernels for graphs that compute in float16 or bfloat16.

Every `mixed_float16` and `mixed_bfloat16` model raises `ConverterError` (tensorflow/tensorflow#46380).
Users rebuild the model in float32 and copy the weights, which fails for models with `Lambda` layers, plain
functions as activations, or without a `get_config`.

Smallest reproduction (TensorFlow 2.21, Keras 3.15.1):

    keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    tf.lite.TFLiteConverter.from_keras_model(model).convert()        # ConverterError

The fix: the weights of such a model are float32 already, and each layer asks its policy for the dtype to
compute in when it is called. So the graph is traced while every layer's policy is float32, and the policies
are put back. Where weights are half precision too ("bfloat16"), the policy says so, and Keras casts them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras

from tfaccel.keras_fixes.inner_layers import inner_layers


def computes_in_half_precision(model: keras.Model) -> bool:
    """Whether any layer computes in float16 or bfloat16."""
    return any(layer.compute_dtype in ("float16", "bfloat16") for layer in inner_layers(model))


@contextlib.contextmanager
def computing_in_float32(model: keras.Model) -> Iterator[None]:
    """Every layer computes in float32 in the block, whatever its policy; not for use by two threads."""
    layers = [layer for layer in inner_layers(model) if layer.compute_dtype in ("float16", "bfloat16")]
    policies = [layer.dtype_policy for layer in layers]
    try:
        for layer in layers:
            layer.dtype_policy = _in_float32(layer.variable_dtype)
        yield
    finally:
        for layer, policy in zip(layers, policies, strict=True):
            layer.dtype_policy = policy


def _in_float32(variable_dtype: str) -> keras.DTypePolicy:
    """The policy of a layer that computes in float32 with weights of that dtype; Keras has no name for it."""
    policy = keras.DTypePolicy("float32")
    policy._variable_dtype = variable_dtype
    return policy
