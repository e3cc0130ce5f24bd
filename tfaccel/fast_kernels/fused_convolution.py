"""The gradient of a convolution's kernel as matrix products, on CPUs, where those are faster.

oneDNN's gradient of a 1×1 kernel takes 1.2 to 3 times as long as the product that it is: the inputs,
transposed, times the gradient of the outputs. In half precision this holds for maps of 7×7 and less, and
there for larger kernels too: one product for each place of the kernel is 1.3 to 1.8 times as fast. The value
stays Keras's own convolution, which TensorFlow fuses with a bias and a ReLU; so does the gradient of the
inputs, but for 1×1 kernels and so little work that a product is done before a convolution has begun.

Used for `Conv2D` with the channels last, no stride, dilation or groups. The products are recorded on the tape
as the gradient of the convolution; what differentiates without one (a loop of TensorFlow's, `tf.gradients`)
sees the convolution.

Measured by `benchmarks/kernel_gradients.py`; in a whole step of a depthwise net 1.04 × as fast.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Container
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.layers.convolutional.base_conv import BaseConv
from tensorflow.python.eager import record

from tfaccel.fast_kernels.agreement import ways_apart
from tfaccel.fast_kernels.placement import on_gpu
from tfaccel.keras_fixes.patch import Patch

SMALL_WORK = 17e6  # operations, below which a product's gradient of the inputs is faster, too
SMALL_MAP = 49  # places of the outputs
ENOUGH_CHANNELS = 32


def serves(layer: keras.layers.Layer) -> bool:
    """Whether products may be faster than the gradient of a layer's kernel, by its settings."""
    if not isinstance(layer, keras.layers.Conv2D) or on_gpu() or not layer.built:
        return False
    if layer.data_format != "channels_last" or layer.groups != 1:
        return False
    if {*layer.strides, *layer.dilation_rate} != {1} or layer.padding not in ("valid", "same"):
        return False
    places, channels = layer.kernel_size[0] * layer.kernel_size[1], layer.input_spec.axes[-1]
    half = layer.compute_dtype in ("float16", "bfloat16")
    return places == 1 or (half and places <= 9 and channels >= ENOUGH_CHANNELS)


def fits(layer: keras.layers.Conv2D, inputs: tf.Tensor, kernel: tf.Tensor) -> bool:
    """Whether they are for inputs and a kernel of these shapes; a subclass may convolve with another one."""
    if tuple(kernel.shape[:2]) != layer.kernel_size:
        return False
    if layer.compute_dtype == "float32":
        return True
    sides = inputs.shape[1:3]
    if layer.padding == "valid" and sides.is_fully_defined():
        sides = [side - n + 1 for side, n in zip(sides, layer.kernel_size, strict=True)]
    return None not in sides and sides[0] * sides[1] <= SMALL_MAP


def kernel_gradient(inputs: tf.Tensor, upstream: tf.Tensor, size: tuple[int, int], padding: str) -> tf.Tensor:
    """The gradient of a convolution without strides, by its kernel.

    Args:
        inputs: Shape `(samples, height, width, channels)`.
        upstream: The gradient of the outputs, shape `(samples, new_height, new_width, filters)`.
        size: Of the kernel, height and width.
        padding: "valid" or "same".

    Returns:
        Shape `(*size, channels, filters)`.
    """
    if padding == "same":
        # As TensorFlow pads: where the number is odd, one more at the end.
        around = [[(n - 1) // 2, n // 2] for n in size]
        inputs = tf.pad(inputs, [[0, 0], *around, [0, 0]]) if size != (1, 1) else inputs
    height, width = tf.unstack(tf.shape(upstream)[1:3])
    rows = _rows(upstream)
    gradients = [
        tf.matmul(_rows(inputs[:, i : i + height, j : j + width]), rows, transpose_a=True)
        for i in range(size[0])
        for j in range(size[1])
    ]
    return tf.reshape(tf.stack(gradients), [*size, inputs.shape[-1], upstream.shape[-1]])


def _rows(images: tf.Tensor) -> tf.Tensor:
    return tf.reshape(images, [-1, images.shape[-1]])


def _input_gradient(inputs: tf.Tensor, kernel: tf.Tensor, upstream: tf.Tensor, padding: str) -> tf.Tensor:
    work = 2 * (inputs.shape.num_elements() or np.inf) * kernel.shape[-1]
    if kernel.shape[:2] == (1, 1) and work <= SMALL_WORK:
        return tf.reshape(tf.matmul(_rows(upstream), kernel[0, 0], transpose_b=True), inputs.shape)
    return tf.raw_ops.Conv2DBackpropInput(
        input_sizes=tf.shape(inputs),
        filter=kernel,
        out_backprop=upstream,
        strides=[1] * 4,
        padding=padding.upper(),
    )


def fused_call(convolve: Callable[..., Any], layer: keras.layers.Conv2D, inputs: Any, kernel: Any) -> Any:
    """`layer.convolution_op(inputs, kernel)`, which `convolve` is, with its gradients recorded."""
    inputs, kernel = (tf.convert_to_tensor(operand) for operand in (inputs, kernel))
    if not fits(layer, inputs, kernel):
        return convolve(inputs, kernel)
    with record.stop_recording():
        outputs = convolve(inputs, kernel)

    def gradients(upstream: tf.Tensor) -> list[tf.Tensor]:
        return [
            _input_gradient(inputs, kernel, upstream, layer.padding),
            kernel_gradient(inputs, upstream, layer.kernel_size, layer.padding),
        ]

    record.record_operation("ConvolutionByProducts", [outputs], [inputs, kernel], gradients)
    return outputs


def _wrap(original: Callable, allowed_dtypes: Callable[[], Any]) -> Callable:
    def convolution_op(self: Any, inputs: Any, kernel: Any) -> Any:
        if self.compute_dtype in (allowed_dtypes() or ()) and serves(self):
            return fused_call(functools.partial(original, self), self, inputs, kernel)
        return original(self, inputs, kernel)

    return convolution_op


_PATCH = Patch(BaseConv, "convolution_op", _wrap)


def fused(dtypes: Container[str]) -> contextlib.AbstractContextManager[None]:
    """Lets `Conv2D` record products in this thread while the block lasts: wrap the tracing of a step.

    Args:
        dtypes: The compute dtypes in which it may.
    """
    return _PATCH.active(dtypes)


def probe(dtype: str) -> float:
    """Runs small convolutions of Keras's and these, with their gradients.

    Args:
        dtype: "float32", "float16" or "bfloat16".

    Returns:
        As `disagreement`: up to 1 they agree.
    """
    worst = 0.0
    for size, padding in (((1, 1), "valid"), ((3, 3), "same"), ((2, 3), "valid")):
        layer = keras.layers.Conv2D(6, size, padding=padding, dtype=dtype, name="probe")
        random = np.random.default_rng(0)
        operands = [
            random.normal(size=shape) for shape in ((2, 5, 4, ENOUGH_CHANNELS), (*size, ENOUGH_CHANNELS, 6))
        ]
        ways = layer.convolution_op, functools.partial(fused_call, layer.convolution_op, layer)
        worst = max(worst, ways_apart(*ways, operands, dtype, roundings=4))
    return worst
