"""`fit` gives a callback no view of its input: how long each step waited, how many examples it saw.

Batch hooks see the whole step only. With `steps_per_execution` the waiting happens inside one compiled
call, where Python can't look at all; so "is my run input bound?" can't be answered
(tensorflow/tensorflow#61084, #43905, #31616).

Smallest reproduction: no argument or attribute of `keras.callbacks.Callback` leads to the iterator of
the running `fit`.

The fix: a last stage in the input pipeline of the running `fit`. A pair of datasets is pulled in order:
first a clock, then the batch; the stage then knows when the step asked and when it was answered. It
counts inside TensorFlow, with no Python per step. `fit` holds its pipeline in the local variable
`epoch_iterator`, which is found on the call stack from inside a hook.

`Dataset.map` hands each call of its function to TensorFlow's threads, and the step waits for them; for a few
numbers that takes longer than to compute them. The stage's functions run in the thread that asks, which
`map` has no argument for.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import keras
import tensorflow as tf
from tensorflow.python.data.ops import map_op

CLOCK_ATTRIBUTE = "tfaccel_clock"  # on an epoch iterator: a loop that counts by itself


class Reading(NamedTuple):
    """What the clock counted since `reset()`.

    Args:
        waited_s: Seconds the step waited for its input.
        examples: Examples handed over.
        batches: Batches handed over.
        steady_at: Time (seconds since 1970) at which batch `skip` was asked for; 0 before that.
    """

    waited_s: float
    examples: float
    batches: float
    steady_at: float


class Clock(Protocol):
    """What counts a `fit`; `skip` is the number of batches of the first execution."""

    skip: int

    def reset(self) -> None:
        """Starts counting from zero."""

    def read(self) -> Reading:
        """What was counted since `reset()`."""


class InputClock:
    """Counts waiting time and examples in the input pipeline of one `fit`.

    Args:
        skip: Batches of the first execution, in which the step is traced and compiled.
    """

    def __init__(self, skip: int):
        self.skip = skip
        with tf.device("CPU:0"):
            self._totals = tf.Variable(tf.zeros([4], tf.float64), trainable=False)

    def watch(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """The same dataset with the counting stage behind it."""
        # `Dataset.counter` would run a function for each number.
        numbers = tf.data.Dataset.range(tf.int64.max).repeat()
        asked = _mapped_here(numbers, lambda number: (number, tf.timestamp()))

        def hand_over(asked_for: Any, batch: Any) -> Any:
            number, asked_at = asked_for
            examples = tf.cast(count_examples(batch), tf.float64)
            one, zero = tf.ones([], tf.float64), tf.zeros([], tf.float64)
            steady_at = tf.where(number == self.skip, asked_at, zero)
            self._totals.assign_add(tf.stack([tf.timestamp() - asked_at, examples, one, steady_at]))
            return batch

        return _mapped_here(tf.data.Dataset.zip(asked, dataset), hand_over)

    def reset(self) -> None:
        """Starts counting from zero."""
        self._totals.assign(tf.zeros_like(self._totals))

    def read(self) -> Reading:
        """What was counted since `reset()`."""
        return Reading(*map(float, self._totals.numpy()))


def _mapped_here(dataset: tf.data.Dataset, function: Callable[..., Any]) -> tf.data.Dataset:
    """`dataset.map(function)`, which runs in the thread that asks for an element."""
    return map_op._MapDataset(dataset, function, use_inter_op_parallelism=False)


def count_examples(batch: Any) -> tf.Tensor:
    """Rows of a batch, from its first leaf that has a sample axis; 1 where none has. A scalar int32."""
    for leaf in tf.nest.flatten(batch):
        if isinstance(leaf, tf.RaggedTensor):
            return tf.cast(leaf.nrows(), tf.int32)
        if isinstance(leaf, tf.SparseTensor):
            return tf.cast(leaf.dense_shape[0], tf.int32)
        if isinstance(leaf, tf.Tensor) and leaf.shape.rank != 0:
            return tf.shape(leaf)[0]
    return tf.constant(1)


def running_epoch_iterator() -> Any:
    """What `fit` draws its batches from, found from inside a hook; None outside of a `fit`."""
    return _local_of_fit("epoch_iterator")


def is_running(drawn_from: Any) -> bool:
    """Whether the `fit` that has this epoch iterator is on the call stack of any thread.

    One that was interrupted may be alive all the same: a traceback keeps it.
    """
    for frame in sys._current_frames().values():
        walked: types.FrameType | None = frame
        while walked is not None:
            code = walked.f_code
            has_one = "epoch_iterator" in (*code.co_varnames, *code.co_cellvars)
            if has_one and walked.f_locals.get("epoch_iterator") is drawn_from:
                return True
            walked = walked.f_back
    return False


def validation_comes() -> bool:
    """Whether the running `fit` validates, if not behind each epoch, found from inside a hook."""
    return _local_of_fit("validation_data") is not None


def _local_of_fit(name: str) -> Any:
    """A local variable of the running `fit`, which alone has an epoch iterator; None outside of one."""
    frame = inspect.currentframe()
    try:
        while frame is not None and "epoch_iterator" not in frame.f_locals:
            frame = frame.f_back
        return frame.f_locals.get(name) if frame is not None else None
    finally:
        del frame


def watch_running_fit(callback: keras.callbacks.Callback) -> Clock | None:
    """Puts a clock into the pipeline of the `fit` that called `callback`'s hook.

    Call it from `on_train_begin`: the iterator is made after that. A loop of `fast_kernels` counts by
    itself, and its own clock is given. None where the pipeline can't be watched (it is distributed over
    replicas), or where no `fit` is on the call stack.
    """
    epoch_iterator = running_epoch_iterator()
    own = getattr(epoch_iterator, CLOCK_ATTRIBUTE, None)
    if own is not None:
        return own
    dataset = getattr(epoch_iterator, "_distributed_dataset", None)
    if epoch_iterator is None or not isinstance(dataset, tf.data.Dataset):
        return None
    clock = InputClock(skip=callback.model.steps_per_execution)
    epoch_iterator._distributed_dataset = clock.watch(dataset)
    return clock


def data_source(epoch_iterator: Any) -> str:
    """Where the batches of a running `fit` come from: `"resident"`, `"arrays"`, `"tf.data"` or `"python"`."""
    if hasattr(getattr(epoch_iterator, "resident_data", None), "leaves"):
        return "resident"
    adapter = type(getattr(epoch_iterator, "data_adapter", None)).__name__
    return {"ArrayDataAdapter": "arrays", "TFDatasetAdapter": "tf.data"}.get(adapter, "python")
