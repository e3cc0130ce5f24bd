"""Some of Keras's operations are TensorFlow ones that LiteRT lacks, though it has all that they are made of.

`keras.ops.argmax` looks at the sign bit of zeros (BitwiseAnd), `MaxPooling3D` and `AveragePooling3D` are one
operation (MaxPool3D, AvgPool3D), `CategoryEncoding` counts with DenseBincount. TensorFlow's converter refuses
each of them. `UpSampling2D` repeats rows, for which TensorFlow asks the open batch size: behind some of them
the height and width are unknown, and the next convolution is refused (Conv2D). `Flatten` and `Reshape` ask
for the batch size (Shape), which a quantizer answers with a copy of the tensor in floats.

Smallest reproduction (TensorFlow 2.21, Keras 3.15.1):

    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.ops.argmax(inputs, -1))
    tf.lite.TFLiteConverter.from_keras_model(model).convert()   # 'tf.BitwiseAnd' op is neither ... nor a
    flex op

The fix acts while a model is traced for LiteRT: a sign is a comparison with zero (LiteRT does not tell -0.0
from 0.0), pooling over a volume is pooling over its planes and then over their depth, counting is the sum of
one-hot rows, repeating is resizing to the nearest, and the one open length of a reshape is -1.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow import numpy as keras_numpy

from tfaccel.keras_fixes.patch import Patch, all_active


def _signbit(original: Callable, setting: Callable[[], Any]) -> Callable:
    return lambda x: tf.less(x, tf.zeros((), x.dtype)) if setting() else original(x)


def _pool(original: Callable, setting: Callable[[], Any]) -> Callable:
    def pool(
        input: tf.Tensor, ksize: Any, strides: Any, padding: str, data_format: Any = None, **rest: Any
    ) -> tf.Tensor:
        if not setting() or len(input.shape) != 5:
            return original(input, ksize, strides, padding, data_format, **rest)
        size, stride = _of_volume(ksize), _of_volume(strides)
        shape = tf.shape(input)
        planes = tf.reshape(input, [-1, *input.shape[2:]])
        planes = original(planes, size[1:], stride[1:], padding)
        height, width, channels = planes.shape[1:]
        depth = shape[1] if input.shape[1] is None else input.shape[1]
        columns = tf.reshape(planes, [-1, depth, height * width, channels])
        pooled = original(columns, [size[0], 1], [stride[0], 1], padding)
        left = tf.shape(pooled)[1] if pooled.shape[1] is None else pooled.shape[1]
        return tf.reshape(pooled, [shape[0], left, height, width, channels])

    return pool


def _of_volume(value: Any) -> list[int]:
    """Three sizes out of one, or of three."""
    return [value] * 3 if isinstance(value, int) else list(value)


def _reshape(original: Callable, setting: Callable[[], Any]) -> Callable:
    def reshape(x: Any, newshape: Any) -> tf.Tensor:
        if setting() and isinstance(newshape, tuple | list):
            open_ones = [axis for axis, size in enumerate(newshape) if not isinstance(size, int)]
            if len(open_ones) == 1 and -1 not in [size for size in newshape if isinstance(size, int)]:
                newshape = [-1 if axis in open_ones else size for axis, size in enumerate(newshape)]
        return original(x, newshape)

    return reshape


def _repeat(original: Callable, setting: Callable[[], Any]) -> Callable:
    def repeat(x: Any, repeats: Any, axis: Any = None) -> tf.Tensor:
        sizes = list(x.shape) if isinstance(x, tf.Tensor) and x.shape.rank is not None else []
        place = axis + len(sizes) if isinstance(axis, int) and axis < 0 else axis
        known = isinstance(place, int) and 0 < place < len(sizes) and None not in sizes[1:]
        if not (setting() and known and isinstance(repeats, int) and x.dtype.is_floating):
            return original(x, repeats, axis)
        # Whatever lies before the axis is a batch of pictures, one column wide; what lies behind it, colours.
        size, behind = sizes[place], math.prod(sizes[place + 1 :])
        columns = tf.reshape(x, [-1, size, 1, behind])
        columns = tf.image.resize(columns, [size * repeats, 1], "nearest")
        return tf.reshape(columns, [-1, *sizes[1:place], size * repeats, *sizes[place + 1 :]])

    return repeat


def _bincount(original: Callable, setting: Callable[[], Any]) -> Callable:
    def bincount(arr: Any, weights: Any = None, minlength: Any = None, **rest: Any) -> tf.Tensor:
        known = isinstance(minlength, int) and rest.get("maxlength") == minlength and rest.get("axis") == -1
        if not setting() or not known:
            return original(arr, weights=weights, minlength=minlength, **rest)
        dtype = tf.as_dtype(rest.get("dtype") or tf.int32)
        rows = tf.one_hot(tf.cast(arr, tf.int32), minlength, dtype=dtype)
        if weights is not None:
            rows *= tf.cast(weights, dtype)[..., None]
        return tf.reduce_max(rows, -2) if rest.get("binary_output") else tf.reduce_sum(rows, -2)

    return bincount


_PATCHES = (
    Patch(keras_numpy, "signbit", _signbit),
    Patch(keras_numpy, "reshape", _reshape),
    Patch(keras_numpy, "repeat", _repeat),
    Patch(tf.nn, "max_pool", _pool),
    Patch(tf.nn, "avg_pool", _pool),
    Patch(tf.math, "bincount", _bincount),
)


def composed_for_lite() -> contextlib.AbstractContextManager[None]:
    """Lets this thread trace operations that LiteRT has while the block lasts."""
    return all_active(_PATCHES, True)
