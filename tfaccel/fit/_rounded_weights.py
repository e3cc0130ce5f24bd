"""Weights that their layer reads rounded, while the optimizer, a file and a checkpoint see the exact ones."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfaccel.fit._calls import wrap_call
from tfaccel.fit._choice import Choice
from tfaccel.fit._layout import channel_axes
from tfaccel.keras_fixes.straight_through import straight_through


def on_grid(values: Any, bits: int, axes: list[int]) -> Any:
    """Values rounded to a symmetric grid that reaches to the largest of each channel.

    Args:
        values: A float tensor.
        bits: Of the integers, 2 to 16; the grid has `2 ** bits - 1` values.
        axes: The channels' axes: along the others the scale is the same.
    """
    whole = tf.cast(values, tf.float32)
    others = [axis for axis in range(len(values.shape)) if axis not in axes]
    largest = tf.reduce_max(tf.abs(whole), axis=others, keepdims=True)
    scale = tf.maximum(largest, 1e-12) / (2 ** (bits - 1) - 1)
    return tf.cast(tf.round(whole / scale) * scale, values.dtype)


class _Reading(threading.local):
    """Whether this thread is inside of a layer that reads rounded weights."""

    depth = 0


_reading = _Reading()


class RoundedWeight:
    """A variable that is read rounded inside of its layer's call, until `restore()`.

    Args:
        choice: The weight.
        bits: It is read with.
        shared: Whether its channels share values: then they share a scale, or one value would become several.
    """

    def __init__(self, choice: Choice, bits: int, shared: bool = False):
        self.variable, self.bits = choice.variable, bits
        self.axes = [] if shared else channel_axes(choice.layer, choice.variable)
        self._plain = plain = type(choice.variable)
        axes = self.axes

        class RoundedVariable(plain):  # type: ignore[misc, valid-type]
            """The optimizer, a saved file and a checkpoint see the exact values; the layer sees these."""

            @property
            def value(self) -> Any:
                exact = plain.value.fget(self)
                if not _reading.depth:
                    return exact
                exact = tf.convert_to_tensor(exact)
                return straight_through(on_grid(exact, bits, axes), exact)

        RoundedVariable.__name__ = plain.__name__
        choice.variable.__class__ = RoundedVariable

    def restore(self) -> None:
        """Makes it the plain variable that it was."""
        self.variable.__class__ = self._plain

    def settle(self) -> None:
        """Leaves the variable with rounded values."""
        self.variable.assign(on_grid(tf.convert_to_tensor(self.variable.value), self.bits, self.axes))


def read_rounded(layer: keras.layers.Layer) -> Callable[[], None]:
    """Lets a layer read rounded weights in its `call`; gives back the undo."""

    def call_rounded(call: Any, *args: Any, **kwargs: Any) -> Any:
        _reading.depth += 1
        try:
            return call(*args, **kwargs)
        finally:
            _reading.depth -= 1

    return wrap_call(layer, call_rounded)
