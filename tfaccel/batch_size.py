"""`find_batch_size`: the batch that fits, and the one that trains the most samples a second.

When to use: before a long run. Larger batches use a device better up to a point, and then only take memory;
and each needs its own learning rate (`scale_learning_rate`).

How it searches: real `fit`s with 8, 16, 32… samples a batch. Before each, `estimate_memory` says what it
would need: on a CPU a batch that is too large does not raise an error, it gets the process killed.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from tfaccel.errors import is_number, is_whole, refuse
from tfaccel.fit._training_state import training_state_kept
from tfaccel.keras_fixes.random_state import random_state_kept
from tfaccel.prepare.memory import estimate_memory, free_memory, shown_bytes
from tfaccel.prepare.trial_run import EpochClock, Sample

TRIAL_S = 0.3  # of an epoch of a trial
TRIAL_EPOCHS = 4  # the first compiles, and is not counted
MOST_STEPS = 256
SAFE = 0.6  # of the free memory: estimates were 0.78 to 1.15 of what was used (benchmarks/memory_estimate.py)
NEAR = 0.95  # of the most samples a second: what a smaller batch may be chosen for


@dataclasses.dataclass(frozen=True)
class BatchSizeRow:
    """One batch size that was tried.

    Args:
        batch_size: Samples a step, over all replicas.
        step_ms: Milliseconds a step.
        memory_bytes: What one device was estimated to need for it.
    """

    batch_size: int
    step_ms: float
    memory_bytes: int

    @property
    def examples_per_s(self) -> float:
        """Samples a second."""
        return 1e3 * self.batch_size / self.step_ms


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """How fast a model trains with batches of several sizes.

    Args:
        rows: One for each size that ran, the smallest first.
        stopped: Why no larger one was tried.

    Example:
        >>> from tfaccel.batch_size import BatchSizeRow
        >>> rows = (BatchSizeRow(32, 1.0, 10**6), BatchSizeRow(64, 1.2, 10**6), BatchSizeRow(128, 2.4, 10**7))
        >>> sizes = tfaccel.BatchSizes(rows, "the budget was spent")
        >>> sizes.fastest, sizes.largest
        (64, 128)
    """

    rows: tuple[BatchSizeRow, ...]
    stopped: str

    @property
    def largest(self) -> int:
        """The largest that ran."""
        return self.rows[-1].batch_size

    @property
    def fastest(self) -> int:
        """The smallest one with at least 95 % of the most samples a second: more steps learn more."""
        best = max(row.examples_per_s for row in self.rows)
        return next(row.batch_size for row in self.rows if row.examples_per_s >= NEAR * best)

    def __str__(self) -> str:
        """A table."""
        lines = [f"  {'batch size':>10}  {'step':>9}  {'examples/s':>11}  {'memory':>8}"]
        for row in self.rows:
            mark = ">" if row.batch_size == self.fastest else " "
            lines.append(
                f"{mark} {row.batch_size:>10}  {f'{row.step_ms:.3g} ms':>9}  {row.examples_per_s:>11,.0f}  "
                f"{shown_bytes(row.memory_bytes):>8}"
            )
        return "\n".join([*lines, f"No larger one: {self.stopped}."])


def find_batch_size(
    model: keras.Model,
    dataset: Any,
    *,
    smallest: int = 8,
    largest: int | None = None,
    memory_bytes: float | None = None,
    budget_s: float = 60.0,
) -> BatchSizes:
    """Trains with batches of 8, 16, 32… samples for a moment each, and undoes it.

    It runs in the model's own `fit`, so under its strategy, precision and `steps_per_execution`. Weights, the
    optimizer's state, metrics and the random state are afterwards exactly what they were.

    Args:
        model: Compiled and built.
        dataset: Arrays as `(x, y)` or `(x, y, sample_weight)`, or a batched `tf.data.Dataset`, which is
            batched anew. It is read again where it has too few samples for a trial.
        smallest: The first size, over all replicas. Default 8.
        largest: The last one. Default: as many as there are samples.
        memory_bytes: What one device may use for training. Default: 60 % of what is free now.
        budget_s: About how long the search may take, s. Default 60.

    Returns:
        What was tried; `.fastest` and `.largest`.

    Raises:
        ValueError: A bad argument; not even `smallest` fits.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> x = np.random.rand(256, 4)
        >>> sizes = tfaccel.find_batch_size(model, (x, x.sum(1)), smallest=32, largest=128, budget_s=5)
        >>> sizes.largest <= 128
        True

    Reference:
        McCandlish et al., 2018, "An Empirical Model of Large-Batch Training",
        https://arxiv.org/abs/1812.06162, on what larger batches bring and what not.
    """
    _check(model, dataset, smallest, largest, memory_bytes, budget_s)
    data = _Data(dataset)
    if smallest > data.samples:
        raise refuse("smallest", smallest, f"at most the {data.samples} samples that there are", "Lower it.")
    limit = memory_bytes if memory_bytes is not None else SAFE * free_memory()
    search = _Search(model, data, limit, largest, time.perf_counter() + budget_s)
    with random_state_kept(), training_state_kept(model):
        rows, stopped = search.run(smallest)
    if not rows:
        raise refuse(
            "smallest", smallest, "a batch that fits and runs", f"Not tried, or given up: {stopped}."
        )
    return BatchSizes(tuple(rows), stopped)


def scale_learning_rate(
    learning_rate: float, batch_size: int, base_batch_size: int, rule: str = "linear"
) -> float:
    """The learning rate for another batch size than the one it was chosen with.

    Args:
        learning_rate: Chosen with `base_batch_size`.
        batch_size: Samples a step: those of all replicas, times the steps of gradient accumulation.
        base_batch_size: The same, where `learning_rate` was chosen.
        rule: `"linear"`, for SGD with or without momentum, with a warmup; `"sqrt"`, for Adam and its kin.
            Default `"linear"`.

    Returns:
        The learning rate for `batch_size`.

    Raises:
        ValueError: A number out of range, or another rule.

    Example:
        >>> tfaccel.scale_learning_rate(0.1, 1024, 256)
        0.4
        >>> tfaccel.scale_learning_rate(1e-3, 512, 128, "sqrt")
        0.002

    Reference:
        Goyal et al., 2017, https://arxiv.org/abs/1706.02677 (linear); Malladi et al., 2022,
        https://arxiv.org/abs/2205.10287 (square root, for adaptive optimizers).
    """
    if not is_number(learning_rate, 0):
        raise refuse("learning_rate", learning_rate, "a number ≥ 0", "Give the one that you trained with.")
    for name, size in (("batch_size", batch_size), ("base_batch_size", base_batch_size)):
        if not is_whole(size, 1):
            raise refuse(name, size, "an integer ≥ 1", "Count the samples of all replicas.")
    if rule not in ("linear", "sqrt"):
        raise refuse("rule", rule, '"linear" or "sqrt"', '"sqrt" is for Adam and its kin.')
    ratio = batch_size / base_batch_size
    return learning_rate * (ratio if rule == "linear" else math.sqrt(ratio))


class _Data:
    """The samples, handed out in batches of any size."""

    def __init__(self, dataset: Any):
        self._dataset = dataset
        self._arrays = Sample(dataset) if isinstance(dataset, tuple) else None
        self.samples = _count(dataset) if self._arrays is None else len(keras.tree.flatten(dataset[0])[0])

    def form(self) -> Any:
        """What `estimate_memory` reads shapes from."""
        return self._dataset

    def batches(self, size: int, count: int) -> dict[str, Any]:
        """Arguments of `fit` for at most `count` batches of `size`."""
        if self._arrays is not None:
            names = ("x", "y", "sample_weight")
            some = self._arrays.first(min(count, int(self.samples // size)), size)
            return {**dict(zip(names, some, strict=False)), "batch_size": size}
        again = self._dataset.unbatch().repeat().batch(size, drop_remainder=True)
        return {"x": again.take(count).cache()}


def _count(dataset: tf.data.Dataset) -> float:
    """How many samples a dataset has, the last batch counted as a full one; infinity where it can't tell."""
    batches = int(dataset.cardinality())
    if batches <= 0:  # TensorFlow's negative numbers: without end, or not known
        return math.inf
    return batches * int(tf.shape(tf.nest.flatten(next(iter(dataset)))[0])[0])


class _Search:
    """The trials of one `find_batch_size`."""

    def __init__(self, model: keras.Model, data: _Data, limit: float, largest: int | None, until: float):
        self._model, self._data, self._limit, self._until = model, data, limit, until
        self._largest = min(largest or math.inf, data.samples)
        self._replicas = model.distribute_strategy.num_replicas_in_sync

    def run(self, smallest: int) -> tuple[list[BatchSizeRow], str]:
        """Tries size after size; says why it ended."""
        rows: list[BatchSizeRow] = []
        for size in self._sizes(smallest):
            needed = estimate_memory(self._model, math.ceil(size / self._replicas), self._data.form()).total
            if needed > self._limit:
                allowed = shown_bytes(self._limit)
                return (
                    rows,
                    f"{size} samples need about {shown_bytes(needed)} of the {allowed} that may be used",
                )
            expected_s = 1e-3 * rows[-1].step_ms * 2 * (TRIAL_EPOCHS + 1) if rows else 0.0
            if rows and time.perf_counter() + expected_s > self._until:
                return rows, "the budget was spent"
            try:
                rows.append(
                    BatchSizeRow(size, self._step_ms(size, rows[-1].step_ms if rows else None), needed)
                )
            except tf.errors.ResourceExhaustedError:
                gc.collect()
                return rows, f"the device has no memory for {size} samples"
        return rows, f"{size} samples a batch were the most that there are, or that were asked for"

    def _sizes(self, smallest: int) -> Iterator[int]:
        size = smallest
        while size <= self._largest:
            yield size
            size *= 2

    def _step_ms(self, size: int, before_ms: float | None) -> float:
        """The least time of a step in several epochs: other work on the machine can only add to it."""
        steps = 8 if before_ms is None else int(TRIAL_S / (2e-3 * before_ms))
        given = self._data.batches(size, max(min(steps, MOST_STEPS), 1))
        clock = _StepClock()
        self._model.fit(**given, epochs=TRIAL_EPOCHS, shuffle=False, verbose=0, callbacks=[clock])
        return 1e3 * min(clock.seconds()[1:]) / clock.steps


class _StepClock(EpochClock):
    """Also says how many steps an epoch had."""

    steps = 1

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Keras knows the number once the first epoch is over."""
        self.steps = self.params.get("steps") or self.steps


def _check(model: Any, dataset: Any, smallest: Any, largest: Any, memory_bytes: Any, budget_s: Any) -> None:
    if not (isinstance(model, keras.Model) and model.compiled and model.built):
        name = getattr(model, "name", model)
        raise refuse(
            "model", name, "a compiled and built keras.Model", "Compile it, and give it a keras.Input."
        )
    if not isinstance(dataset, tuple | tf.data.Dataset):
        allowed = "arrays as (x, y), or a batched tf.data.Dataset"
        raise refuse(
            "dataset", type(dataset).__name__, allowed, "What makes its own batches can't be cut anew."
        )
    if not is_whole(smallest, 1):
        raise refuse("smallest", smallest, "an integer ≥ 1", "Leave it out for 8.")
    if largest is not None and not is_whole(largest, smallest):
        raise refuse("largest", largest, f"an integer ≥ smallest={smallest}", "Leave it out for all samples.")
    if memory_bytes is not None and not (is_number(memory_bytes, 0) and memory_bytes > 0):
        raise refuse("memory_bytes", memory_bytes, "a number > 0", "Leave it out for 60 % of what is free.")
    if not (is_number(budget_s, 0) and budget_s > 0):
        raise refuse("budget_s", budget_s, "seconds > 0", "60 are enough for most models.")
