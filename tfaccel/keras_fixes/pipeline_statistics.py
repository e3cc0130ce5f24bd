"""tf.data can count what goes through a pipeline and how long that takes, but shows it to nobody.

Its stage `LatencyStats` adds to a histogram how long each element took to come; in C++, so it costs a small
part of what a `map` function costs that reads a clock. It has no public name any more.

Behind a synchronous last stage tf.data puts a prefetch of its own (the option `inject_prefetch`). Behind a
stage that counts, it would hide from that stage that the step does not wait.

Smallest reproduction: `for _ in Dataset.range(9).map(slow).map(read_clock): time.sleep(1)` reads the clock in
the background, while the loop sleeps.

The fix: the stage by its raw operation, and before it the prefetch that tf.data would have put behind. Where
the form of the batches does not tell their rows, a `map` function counts them, in the thread that asks:
`Dataset.map` hands each call to TensorFlow's threads, and has no argument for it. (`BytesProducedStats` would
tell them too, but loses the options of what stands before it, and says so in red.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.python.data.ops import dataset_ops, map_op
from tensorflow.python.ops.resource_variable_ops import EagerResourceDeleter

# Behind which tf.data puts no prefetch.
ASYNCHRONOUS = (
    "_PrefetchDataset",
    "_ParallelMapDataset",
    "_ParallelBatchDataset",
    "_ParallelInterleaveDataset",
    "_MapAndBatchDataset",
)
TAG = "tfaccel_us"  # of the histogram


class Counted(NamedTuple):
    """What went through a pipeline so far.

    Args:
        seconds: That its last stage was waited for.
        rows: Of all batches.
        batches: That were handed over.
    """

    seconds: float
    rows: float
    batches: float


class PipelineStatistics:
    """Counts what goes through one pipeline."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        with tf.device("CPU:0"):
            name = f"tfaccel_statistics_{next(self._numbers)}"
            self._handle = tf.raw_ops.StatsAggregatorHandle(container="", shared_name=name)
        # TensorFlow would keep it for ever. A pipeline that runs has a reference of its own.
        self._deleter = EagerResourceDeleter(self._handle, self._handle.device)
        self._rows: KnownRows | _CountedRows = KnownRows(0)

    def watch(self, dataset: tf.data.Dataset, rows: KnownRows | None = None) -> tf.data.Dataset:
        """The same dataset with stages behind it.

        Args:
            dataset: The whole pipeline.
            rows: That its batches have; None looks at their form.
        """
        if _gets_prefetch(dataset):
            dataset = dataset.prefetch(tf.data.AUTOTUNE)
        rows = rows or _rows_of_form(dataset.element_spec)
        if rows is None:
            self._rows = _CountedRows()
            dataset = self._rows.watch(dataset)
        else:
            self._rows = rows
        dataset = _Stage(dataset, tf.raw_ops.LatencyStatsDataset, tag=TAG)
        collector = {"stats_aggregator": self._handle, "tag": "", "counter_prefix": ""}
        dataset = _Stage(dataset, tf.raw_ops.SetStatsAggregatorDataset, **collector)
        options = tf.data.Options()
        options.experimental_optimization.inject_prefetch = False
        return dataset.with_options(options)

    def read(self) -> Counted:
        """What was counted so far."""
        summary = tf.raw_ops.StatsAggregatorSummary(iterator=self._handle)
        values = tf.compat.v1.Summary.FromString(summary.numpy()).value
        ours = next((value.histo for value in values if value.tag == TAG), None)
        if ours is None:  # before the first element
            return Counted(0.0, 0.0, 0.0)
        return Counted(ours.sum / 1e6, self._rows.read(int(ours.num)), ours.num)


class _Stage(dataset_ops.UnaryUnchangedStructureDataset):
    """A stage of tf.data that has no public name and leaves the elements as they are."""

    def __init__(self, dataset: Any, op: Callable[..., tf.Tensor], **arguments: Any):
        self._arguments = arguments  # a handle lives as long as this
        variant = op(input_dataset=dataset._variant_tensor, **arguments, **dataset._flat_structure)
        super().__init__(dataset, variant)


class KnownRows(NamedTuple):
    """Batches of one size, but for the last one of a pass.

    Args:
        size: Rows of a batch.
        batches: Of a pass; None where all are alike.
        rows: Of a pass.
    """

    size: int
    batches: int | None = None
    rows: int = 0

    def read(self, batches: int) -> float:
        """Rows of the first batches, of as many passes as they take."""
        if not self.batches:
            return batches * self.size
        passes, more = divmod(batches, self.batches)
        return passes * self.rows + more * self.size


class _CountedRows:
    """What a function in the pipeline counts."""

    def __init__(self) -> None:
        with tf.device("CPU:0"):
            self._total = tf.Variable(0, dtype=tf.int64, trainable=False)

    def watch(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """The same dataset with the function behind it."""
        is_tuple = isinstance(dataset.element_spec, tuple)

        def count(*batch: Any) -> Any:
            whole = batch if is_tuple else batch[0]
            self._total.assign_add(tf.cast(count_examples(whole), tf.int64))
            return whole

        return map_op._MapDataset(dataset, count, use_inter_op_parallelism=False)

    def read(self, batches: int) -> float:
        """Rows so far."""
        return float(self._total.numpy())


def _rows_of_form(element_spec: Any) -> KnownRows | None:
    """What `count_examples` would count in each batch; None where that is open."""
    for leaf in tf.nest.flatten(element_spec):
        if not isinstance(leaf, tf.TensorSpec) or leaf.shape.rank is None:
            return None
        if leaf.shape.rank:
            return None if leaf.shape[0] is None else KnownRows(leaf.shape[0])
    return KnownRows(1)


def _gets_prefetch(dataset: Any) -> bool:
    """Whether tf.data, left alone, would put a prefetch behind the last stage."""
    options = dataset.options()
    if options.experimental_optimization.inject_prefetch is False or options.autotune.enabled is False:
        return False
    while isinstance(dataset, dataset_ops._OptionsDataset):
        dataset = dataset._input_dataset
    return type(dataset).__name__ not in ASYNCHRONOUS


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
