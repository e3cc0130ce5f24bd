"""Short real trainings: a part of the user's data, and the clock of a `fit` that doesn't slow it down."""

from __future__ import annotations

import math
import time
from typing import Any

import keras
import tensorflow as tf

from tfaccel.errors import refuse
from tfaccel.prepare.inputs import DEFAULT_BATCH_SIZE


class EpochClock(keras.callbacks.Callback):
    """Notes when each epoch ended and its loss. It has no batch hooks, which would keep calls short."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, logs: dict | None = None) -> None:
        """The first epoch includes tracing and compiling."""
        self.ended.append(time.perf_counter())

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Notes both."""
        self.ended.append(time.perf_counter())
        self.losses.append(float((logs or {}).get("loss", math.nan)))

    def seconds(self) -> list[float]:
        """Of each epoch."""
        return [b - a for a, b in zip(self.ended, self.ended[1:], strict=False)]


class StopSlow(keras.callbacks.Callback):
    """Ends a trial whose steps are so slow that it can't win; only where a call is one step.

    Args:
        limit_s: Three steps in a row take longer; a single one may be compiling.
    """

    def __init__(self, limit_s: float):
        super().__init__()
        self._limit_s = limit_s
        self._last = math.inf
        self._slow: list[float] = []
        self.stopped_at_s: float | None = None

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Counts the slow ones in a row."""
        now = time.perf_counter()
        took, self._last = now - self._last, now
        self._slow = [*self._slow, took] if took > self._limit_s else []
        if len(self._slow) == 3:
            self.stopped_at_s = min(self._slow)
            self.model.stop_training = True


class Sample:
    """The first batches of the data that `fit` would get.

    Args:
        data: Arrays as `(x, y)` or `(x, y, sample_weight)`, a batched `tf.data.Dataset` or a `PyDataset`.
        steps_per_epoch: Batches an epoch where the data don't say.

    Raises:
        ValueError: Data that can be read once only, or whose length isn't known.
    """

    def __init__(self, data: Any, steps_per_epoch: int | None = None):
        self.arrays = isinstance(data, tuple)
        self._data = data
        if not self.arrays and not isinstance(data, tf.data.Dataset | keras.utils.PyDataset):
            allowed = "arrays as (x, y), a tf.data.Dataset or a keras.utils.PyDataset"
            raise refuse(
                "dataset", type(data).__name__, allowed, "A generator would be used up: wrap it in one."
            )
        self._steps = steps_per_epoch
        self.steps(None)  # says what is wrong

    def steps(self, batch_size: int | None) -> int:
        """Batches of an epoch of the whole data."""
        if self.arrays:
            samples = len(keras.tree.flatten(self._data[0])[0])
            return math.ceil(samples / (batch_size or DEFAULT_BATCH_SIZE))
        if self._steps is not None:
            return self._steps
        known = len(self._data) if not isinstance(self._data, tf.data.Dataset) else self._cardinality()
        if known is None or known < 1:
            raise ValueError(
                "The data's length is not known, so neither is what compiling may cost. Allowed: arrays, a "
                "PyDataset, a dataset of known cardinality. Pass steps_per_epoch."
            )
        return known

    def _cardinality(self) -> int | None:
        found = int(self._data.cardinality())
        return found if found > 0 else None

    def first(self, batches: int, batch_size: int | None) -> Any:
        """So many batches, as a view of the arrays, a part of the dataset, or its first items."""
        if self.arrays:
            rows = batches * (batch_size or DEFAULT_BATCH_SIZE)
            return keras.tree.map_structure(lambda each: each[:rows], self._data, none_is_leaf=False)
        if isinstance(self._data, tf.data.Dataset):
            return self._data.take(batches)
        return _FirstItems(self._data, batches)

    def inputs(self, batch_size: int | None) -> Any:
        """The inputs of one batch, to build a model with."""
        if self.arrays:
            return keras.tree.map_structure(lambda each: each[:1], self._data[0])
        batch = next(iter(self._data)) if isinstance(self._data, tf.data.Dataset) else self._data[0]
        return keras.utils.unpack_x_y_sample_weight(batch)[0]


class _FirstItems(keras.utils.PyDataset):
    """The first batches of another `PyDataset`, with its workers."""

    def __init__(self, inner: keras.utils.PyDataset, items: int):
        super().__init__(
            workers=inner.workers,
            use_multiprocessing=inner.use_multiprocessing,
            max_queue_size=inner.max_queue_size,
        )
        self._inner, self._items = inner, items

    def __len__(self) -> int:
        return min(self._items, len(self._inner))

    def __getitem__(self, index: int) -> Any:
        return self._inner[index]
