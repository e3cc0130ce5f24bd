"""Rows of the training data that a compiled step keeps, to measure later what lies inside of layers."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.fit._state import beside

KEPT_ROWS = 256  # of the training data at most, to measure what lies inside of layers
KEPT_BYTES = 2**25  # of them at most
KEPT_AT_ONCE = 8  # parts that the rows are kept in, each of another batch
KEPT_EVERY = 16  # steps, once all are there


class KeptRows:
    """Some rows of the training data, of several batches; none where a length is open."""

    def __init__(self, inputs: list[tf.TensorSpec]):
        shapes = [spec.shape.as_list()[1:] for spec in inputs]
        self._rows: list[Any] = []
        self._steps = beside(np.zeros((), "int32"))
        if any(None in shape for shape in shapes):
            return
        dtypes = [spec.dtype.as_numpy_dtype for spec in inputs]
        row = sum(np.dtype(d).itemsize * int(np.prod(s)) for d, s in zip(dtypes, shapes, strict=True))
        self._amount = int(np.clip(KEPT_BYTES // max(row, 1), KEPT_AT_ONCE, KEPT_ROWS))
        self._part = -(-self._amount // KEPT_AT_ONCE)
        kept = (np.zeros((self._amount, *s), d) for d, s in zip(dtypes, shapes, strict=True))
        self._rows = [beside(each) for each in kept]

    def keep(self, batch: list[Any]) -> Any:
        """Part of a training step; says how many there were before it."""
        steps = tf.convert_to_tensor(self._steps.value)
        self._steps.assign(steps + 1)
        if not self._rows:
            return steps
        turn = tf.where(steps < KEPT_AT_ONCE, steps, steps // KEPT_EVERY)
        places = (turn * self._part + tf.range(self._part)) % self._amount

        def write() -> Any:
            for kept, values in zip(self._rows, batch, strict=True):
                some = tf.gather(values, tf.range(self._part) % tf.shape(values)[0])
                some = tf.cast(tf.reshape(some, [self._part, *kept.shape[1:]]), kept.dtype)
                kept.assign(tf.tensor_scatter_nd_update(kept.value, places[:, None], some))
            return tf.constant(True)

        due = (steps < KEPT_AT_ONCE) | tf.equal(steps % KEPT_EVERY, 0)
        filled = tf.shape(batch[0])[0] > 0
        tf.cond(filled & due, write, lambda: tf.constant(False))
        return steps

    def rows(self) -> tuple[np.ndarray, ...]:
        """An array an input."""
        steps = int(keras.ops.convert_to_numpy(self._steps))
        if not self._rows or not steps:
            return ()
        return tuple(keras.ops.convert_to_numpy(kept)[: steps * self._part] for kept in self._rows)
