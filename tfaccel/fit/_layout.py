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

WITHOUT_INPUTS = (
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.Embedding,
)


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
        if isinstance(layer, WITHOUT_INPUTS) or variable.name == "depthwise_kernel":
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


def channel_axes(layer: keras.layers.Layer, variable: keras.Variable) -> list[int]:
    """The axes of a weight's output channels, which quantized files give a scale of their own."""
    rank = len(variable.shape)
    if "depthwise" in variable.name or isinstance(layer, WITHOUT_INPUTS[:2]):
        return [rank - 2, rank - 1]
    if isinstance(layer, WITHOUT_INPUTS):
        return []
    return _axes(layer, rank)[1]


def _axes(layer: keras.layers.Layer, rank: int) -> tuple[list[int], list[int]]:
    """The axes of a layer's kernel that are inputs, and those that are outputs."""
    if isinstance(layer, keras.layers.EinsumDense):
        _, kernel, output = layer.equation.replace("->", ",").replace(" ", "").split(",")
        inputs = [axis for axis, letter in enumerate(kernel) if letter not in output]
        return inputs, [axis for axis in range(rank) if axis not in inputs]
    if "Transpose" in type(layer).__name__:  # transposed convolutions have their outputs first
        return [rank - 1], [rank - 2]
    return [rank - 2], [rank - 1]
