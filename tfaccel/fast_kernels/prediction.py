"""`model.predict` on arrays without a pipeline: batches are slices, and one program runs each of them.

Keras builds a `tf.data` pipeline for every call, which costs more than the model where the samples are few;
under `steps_per_execution=16` it traces the model sixteen times into one function, and again for every
shorter list of batches. Here Keras's own `predict` (callbacks, progress bar, `steps`) reads slices of the
arrays and runs one traced step a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.tensorflow.trainer import concat
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from tfaccel.fast_kernels.resident import ATTRIBUTE, in_floatx, is_plain_array
from tfaccel.fast_kernels.step_loop import retraced_silently


class SlicedArrays(DataAdapter):
    """What Keras's loop reads: arrays, a slice at a time, in their order.

    Args:
        arrays: Nested arrays of `samples` rows each.
        samples: Rows, at least 1.
        batch_size: Rows a batch; the last one holds what is left.
    """

    def __init__(self, arrays: Any, samples: int, batch_size: int):
        self._arrays = arrays
        self._samples = samples
        self._batch_size = batch_size

    def get_tf_dataset(self) -> SlicedArrays:
        """Itself: all that Keras's loop does with it is to iterate."""
        return self

    def __iter__(self) -> Iterator[Any]:
        """The batches, as `fit`'s pipeline would hand them over."""
        for start in range(0, self._samples, self._batch_size):
            rows = slice(start, start + self._batch_size)
            arrays = keras.tree.flatten(self._arrays)
            leaves = [in_floatx(tf.convert_to_tensor(array[rows])) for array in arrays]
            yield keras.utils.pack_x_y_sample_weight(keras.tree.pack_sequence_as(self._arrays, leaves))

    @property
    def num_batches(self) -> int:
        """How many batches there are."""
        return math.ceil(self._samples / self._batch_size)

    @property
    def batch_size(self) -> int:
        """Rows a batch."""
        return self._batch_size

    @property
    def has_partial_batch(self) -> bool:
        """Whether the last batch is smaller."""
        return self._samples % self._batch_size > 0

    @property
    def partial_batch_size(self) -> int | None:
        """Rows of the last batch where it is smaller."""
        return self._samples % self._batch_size or None


def in_order(x: Any, batch_size: int | None, steps: int | None) -> tuple[Any, int | None, int | None]:
    """What `predict` was given, or the rows in memory where it was a data set that was cut out of them.

    Such a data set draws a new order on every pass, and predictions in that order are of no use. Its batches
    have their size, whatever `batch_size` says, as those of any data set.
    """
    batches = getattr(x, ATTRIBUTE, None)
    if batches is None:
        return x, batch_size, steps
    x, _, _ = keras.utils.unpack_x_y_sample_weight(batches.first_batches(steps))
    return x, batches.batch_size, None


def sliced(x: Any, batch_size: int | None, steps: int | None) -> Any:
    """`x` as `SlicedArrays` where that is possible; else `x`, for Keras to deal with.

    Args:
        x: What `predict` was given.
        batch_size: Rows a batch; None for 32.
        steps: Batches to read; without a batch size Keras then derives one from it.
    """
    if steps is not None:
        return x
    leaves = keras.tree.flatten(x)
    if not leaves or not all(is_plain_array(leaf) and len(leaf.shape) > 0 for leaf in leaves):
        return x
    lengths = {int(leaf.shape[0]) for leaf in leaves}
    size = 32 if batch_size is None else batch_size
    if len(lengths) > 1 or lengths == {0} or not isinstance(size, int | np.integer) or size < 1:
        return x
    return SlicedArrays(keras.tree.lists_to_tuples(x), lengths.pop(), int(size))


class PredictFunction:
    """What stands in for `model.predict_function`: one traced step, called for each batch.

    Args:
        model: The compiled model.
    """

    def __init__(self, model: keras.Model):
        self._step = retraced_silently(
            tf.function(
                model._autoconvert_optionals(model.predict_step),
                autograph=False,
                reduce_retracing=True,
                jit_compile=model.jit_compile,
            )
        )

    def __call__(self, batches: list) -> Any:
        """The outputs of some batches, one behind the other."""
        outputs = [self._step(batch) for batch in batches]
        if len(outputs) == 1:
            return outputs[0]
        return keras.tree.map_structure(lambda *parts: concat(list(parts)), *outputs)
