"""A weight as (positions, inputs, outputs): the axes that hardware's sparsity patterns are told by.

A dense kernel has one position, a convolution's has height × width of them. `EinsumDense` says in its
equation which axes are inputs: those that its output doesn't have.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)


class Layout:
    """Takes a weight apart into (positions, inputs, outputs), and a mask together again.

    Args:
        layer: Whose weight it is.
        variable: Its kernel, of rank 2 or more.

    Raises:
        ValueError: It has no inputs that it sums over.
    """

    def __init__(self, layer: keras.layers.Layer, variable: keras.Variable):
        self.shape = tuple(variable.shape)
        if isinstance(layer, keras.layers.Embedding) or is_depthwise(layer, variable):
            raise ValueError("has no inputs to sum over")
        inputs, outputs = _axes(layer, len(self.shape))
        before = [axis for axis in range(len(self.shape)) if axis not in (*inputs, *outputs)]
        self.order = [*before, *inputs, *outputs]
        self.sizes = [math.prod(self.shape[axis] for axis in part) for part in (before, inputs, outputs)]

    def apart(self, values: Any) -> Any:
        """A tensor of the weight's shape, as (positions, inputs, outputs)."""
        return tf.reshape(tf.transpose(values, self.order), self.sizes)

    def together(self, values: Any) -> Any:
        """The way back."""
        permuted = tf.reshape(values, [self.shape[axis] for axis in self.order])
        return tf.transpose(permuted, np.argsort(self.order))


def is_depthwise(layer: keras.layers.Layer, variable: keras.Variable) -> bool:
    """Whether a weight is a depthwise kernel; a separable convolution has one beside its pointwise kernel."""
    return isinstance(layer, DEPTHWISE) or "depthwise" in variable.name


def channel_axes(layer: keras.layers.Layer, variable: keras.Variable) -> list[int]:
    """The axes of a weight's output channels, which quantized files give a scale of their own."""
    rank = len(variable.shape)
    if is_depthwise(layer, variable):
        return [rank - 2, rank - 1]
    if isinstance(layer, keras.layers.Embedding):
        return []
    return _axes(layer, rank)[1]


def _axes(layer: keras.layers.Layer, rank: int) -> tuple[list[int], list[int]]:
    """The axes of a layer's kernel that are inputs, and those that are outputs."""
    if isinstance(layer, keras.layers.EinsumDense):
        _, kernel, output = layer.equation.replace("->", ",").replace(" ", "").split(",")
        inputs = [axis for axis, letter in enumerate(kernel) if letter not in output]
        return inputs, [axis for axis in range(rank) if axis not in inputs]
    if isinstance(layer, TRANSPOSED):  # these have their outputs first
        return [rank - 1], [rank - 2]
    return [rank - 2], [rank - 1]
