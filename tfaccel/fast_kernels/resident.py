"""Data that stay on the device: batches are cut out of them by index, inside the compiled loop.

Keras feeds arrays through `tf.data`: each batch is gathered by a pipeline thread, handed over, and fetched by
the step. Where the arrays fit in memory, the step can gather its own rows. Reshuffling is then one
permutation an epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfaccel.fast_kernels.placement import can_keep, on_gpu, put, step_device, stored_dtype
from tfaccel.free_memory import free_gpu_memory_bytes, free_memory_bytes

MEMORY_FRACTION = 0.25  # of the memory that is free: what a copy of the user's arrays may take
ATTRIBUTE = "tfaccel_batches"


class BatchForm:
    """How batches look, without the data: all that a traced loop may hold on to.

    Args:
        structure: Nested arrays or tensors; None stays None.
        transform: Maps a batch to another one inside the loop, such as class weights to sample weights.
        transform_key: Equal for transforms that do the same.
    """

    def __init__(self, structure: Any, transform: Callable | None = None, transform_key: object = None):
        leaves = [leaf for leaf in keras.tree.flatten(structure) if leaf is not None]
        self.specs = [tf.TensorSpec([None, *leaf.shape[1:]], leaf.dtype) for leaf in leaves]
        self.order_spec = tf.TensorSpec([None], tf.int32)
        self._dtypes = [leaf.dtype for leaf in leaves]
        self._structure = keras.tree.map_structure(lambda leaf: 0, structure, none_is_leaf=False)
        self._transform = transform
        self._floatx = keras.config.floatx()
        # What a compiled loop depends on, beside the tensors' dtypes.
        self._looks = (repr(self._structure), transform_key, self._floatx)
        self.signature = self._signature()

    def _signature(self) -> tuple:
        """Data of equal signature share a compiled loop."""
        return *self._looks, *self.specs, self.order_spec

    def stored_as(self, leaves: list[tf.Tensor], order: tf.Tensor) -> BatchForm:
        """The same batches, cut out of tensors of other dtypes."""
        other = copy.copy(self)
        other.specs = [tf.TensorSpec([None, *leaf.shape[1:]], leaf.dtype) for leaf in leaves]
        other.order_spec = tf.TensorSpec([None], order.dtype)
        other.signature = other._signature()
        return other

    def cut(self, leaves: list[tf.Tensor], rows: tf.Tensor) -> Any:
        """The batch of the given rows, as Keras's own pipeline hands it over: floats in `floatx`."""
        stored = [tf.cast(tf.gather(leaf, rows), d) for leaf, d in zip(leaves, self._dtypes, strict=True)]
        batch = iter([in_floatx(leaf, self._floatx) for leaf in stored])
        data = keras.tree.map_structure(lambda leaf: next(batch), self._structure, none_is_leaf=False)
        return data if self._transform is None else self._transform(*data)


class ResidentBatches:
    """Arrays in memory and how they are cut into batches.

    Args:
        tensors: A nested structure of tensors with `samples` rows each; None stays None.
        samples: Rows, at least 1.
        batch_size: Rows a batch; the last one holds what is left.
        shuffle: Whether every pass has a new order.
    """

    def __init__(self, tensors: Any, samples: int, batch_size: int, shuffle: bool):
        self.form = BatchForm(tensors)
        self.samples = samples
        self.batch_size = batch_size
        self.full_batches = samples // batch_size
        self._tensors = tensors
        self._shuffle = shuffle
        self.leaves = [leaf for leaf in keras.tree.flatten(tensors) if leaf is not None]
        # The leaves in a GPU's memory, or None where they don't go: decided once, also for copies of this.
        self._placed: list[list[tf.Tensor] | None] = []

    def with_transform(self, transform: Callable, key: object) -> ResidentBatches:
        """The same data, each batch changed inside the loop: `transform(*batch)`.

        Args:
            transform: Traceable; such as class weights to sample weights.
            key: Equal for transforms that do the same.
        """
        other = copy.copy(self)
        other.form = BatchForm(self._tensors, transform, key)
        return other

    def on_device(self, order: tf.Tensor) -> Pass:
        """A pass over them where the step runs: in a GPU's memory, unless they take too much of it.

        Args:
            order: From `new_order`.
        """
        if not on_gpu():
            return Pass(self, order)
        if not self._placed:
            self._placed.append(self._place() if self._fits_gpu() else None)
        leaves = self._placed[0]
        if leaves is None:
            return Pass(self, order)
        other = copy.copy(self)
        other.leaves = leaves
        order = put(order, step_device())
        other.form = self.form.stored_as(other.leaves, order)
        return Pass(other, order)

    def _place(self) -> list[tf.Tensor] | None:
        try:
            return [put(leaf, step_device()) for leaf in self.leaves]
        except tf.errors.ResourceExhaustedError:  # another process has taken what looked free
            return None

    def _fits_gpu(self) -> bool:
        if not all(can_keep(leaf.dtype) for leaf in self.leaves):
            return False
        size = sum(
            leaf.shape.num_elements() * stored_dtype(leaf.dtype, step_device()).size for leaf in self.leaves
        )
        free = free_gpu_memory_bytes()
        return free is not None and size <= MEMORY_FRACTION * free

    def first_batches(self, count: int | None) -> Any:
        """The rows of so many batches in the order in which they were given; None for all."""
        rows = None if count is None else count * self.batch_size
        return keras.tree.map_structure(lambda tensor: tensor[:rows], self._tensors, none_is_leaf=False)

    def new_order(self) -> tf.Tensor:
        """The rows in the order of one pass, shape `(samples,)`, int32; drawn from TensorFlow's seed."""
        with tf.device("CPU:0"):
            order = tf.range(self.samples, dtype=tf.int32)
            return tf.random.shuffle(order) if self._shuffle else order


class Pass(NamedTuple):
    """One run through the data.

    Args:
        batches: The data.
        order: Shape `(samples,)`: the rows in their order.
    """

    batches: ResidentBatches
    order: tf.Tensor


def attach_to(dataset: tf.data.Dataset, tensors: Any, samples: int, batch_size: int, shuffle: bool) -> None:
    """Lets a dataset that was cut out of arrays remember them; one derived from it does not."""
    setattr(dataset, ATTRIBUTE, ResidentBatches(tensors, samples, batch_size, shuffle))


def why_not_arrays(inputs: Any, shuffle: object, limited: bool = True) -> str:
    """Why arrays that were given to `fit` or `evaluate` themselves stay where they are; empty if they don't.

    Args:
        inputs: Nested arrays.
        shuffle: As in `fit`.
        limited: Whether a copy may take no more than `MEMORY_FRACTION`.
    """
    leaves = [leaf for leaf in keras.tree.flatten(inputs) if leaf is not None]
    if shuffle not in (True, False):
        return f"shuffle={shuffle!r} is left to Keras"
    if not all(is_plain_array(leaf) for leaf in leaves):
        return "the data are not all dense numeric arrays"
    size = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, np.ndarray))
    if not limited or size <= MEMORY_FRACTION * free_memory_bytes():
        return ""
    return (
        f"a copy of the arrays takes {size / 2**30:.1f} GiB, more than {MEMORY_FRACTION:.0%} of the free "
        "memory; accelerator.dataset(x, y) keeps one copy only"
    )


def of_arrays(inputs: Any, samples: int, batch_size: int, shuffle: bool) -> ResidentBatches:
    """Arrays that were given to `fit` or `evaluate` themselves, copied to where the loop can gather them.

    Args:
        inputs: Nested arrays of `samples` rows each, for which `why_not_arrays` has no reason.
        samples: Rows.
        batch_size: Rows a batch.
        shuffle: Whether every pass has a new order.
    """
    with tf.device("CPU:0"):
        tensors = keras.tree.map_structure(tf.convert_to_tensor, inputs, none_is_leaf=False)
    return ResidentBatches(tensors, samples, batch_size, bool(shuffle))


def in_floatx(tensor: tf.Tensor, floatx: str | None = None) -> tf.Tensor:
    """Floats in the precision that `fit` and `predict` feed, other dtypes as they are.

    Args:
        tensor: Any shape.
        floatx: As `keras.config.floatx()` was when the data were made; None asks it now.
    """
    return tf.cast(tensor, floatx or keras.config.floatx()) if tensor.dtype.is_floating else tensor


def is_plain_array(leaf: Any) -> bool:
    """Whether it is a dense numpy array of numbers, or a tensor."""
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind in "biuf"
    return isinstance(leaf, tf.Tensor)
