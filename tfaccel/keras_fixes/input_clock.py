"""`fit` gives a callback no view of its input: how long each step waited, how many examples it saw.

Batch hooks see the whole step only. With `steps_per_execution` the waiting happens inside one compiled
call, where Python can't look at all; so "is my run input bound?" can't be answered
(tensorflow/tensorflow#61084, #43905, #31616).

Smallest reproduction: no argument or attribute of `keras.callbacks.Callback` leads to the iterator of
the running `fit`.

The fix: tf.data's own stages for statistics behind the running `fit`'s pipeline (`pipeline_statistics`). They
count in C++, with no Python and no function per step. `fit` holds its pipeline in the local variable
`epoch_iterator`, which is found on the call stack from inside a hook.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import time
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import keras
import tensorflow as tf

from tfaccel.keras_fixes.pipeline_statistics import KnownRows, PipelineStatistics

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
        self._statistics = PipelineStatistics()
        self.reset()

    def watch(self, dataset: tf.data.Dataset, rows: KnownRows | None = None) -> tf.data.Dataset:
        """The same dataset with the counting stages behind it.

        Args:
            dataset: The whole pipeline.
            rows: That its batches have, where it is known.
        """
        return self._statistics.watch(dataset, rows)

    def note_executions(self, enumerate_iterator: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """What `enumerate_iterator` yields an execution for; notes when the second one begins."""
        executions = enumerate_iterator()
        yield from itertools.islice(executions, 1)
        for second in itertools.islice(executions, 1):
            self._steady_at = time.time()
            yield second
        yield from executions

    def reset(self) -> None:
        """Starts counting from zero."""
        self._before, self._steady_at = self._statistics.read(), 0.0

    def read(self) -> Reading:
        """What was counted since `reset()`."""
        now, before = self._statistics.read(), self._before
        return Reading(
            now.seconds - before.seconds,
            now.rows - before.rows,
            now.batches - before.batches,
            self._steady_at,
        )


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
    epoch_iterator._distributed_dataset = clock.watch(dataset, _rows_of_arrays(epoch_iterator))
    it: Any = weakref.proxy(epoch_iterator)  # not kept by what it keeps
    enumerate_iterator = type(epoch_iterator)._enumerate_iterator
    epoch_iterator._enumerate_iterator = lambda: clock.note_executions(lambda: enumerate_iterator(it))
    return clock


def _rows_of_arrays(epoch_iterator: Any) -> KnownRows | None:
    """Rows of the batches that Keras makes of arrays; None where they come from elsewhere."""
    if data_source(epoch_iterator) != "arrays":
        return None
    adapter = epoch_iterator.data_adapter
    missing = adapter.batch_size - adapter.partial_batch_size if adapter.has_partial_batch else 0
    rows = adapter.num_batches * adapter.batch_size - missing
    return KnownRows(adapter.batch_size, adapter.num_batches, rows)


def data_source(epoch_iterator: Any) -> str:
    """Where the batches of a running `fit` come from: `"resident"`, `"arrays"`, `"tf.data"` or `"python"`."""
    if hasattr(getattr(epoch_iterator, "resident_data", None), "leaves"):
        return "resident"
    adapter = type(getattr(epoch_iterator, "data_adapter", None)).__name__
    return {"ArrayDataAdapter": "arrays", "TFDatasetAdapter": "tf.data"}.get(adapter, "python")
