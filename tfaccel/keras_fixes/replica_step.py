"""A step over several replicas that computes what one device would: the fixes of this folder put together.

Keras runs its step on every replica as if it were alone, and `MultiWorkerMirroredStrategy` fails when the
logs are put together: "Invalid reduction dimension 0" (keras-team/keras#20585).

Smallest reproduction (Keras 3.15.1): `fit` in two processes with `TF_CONFIG`.

The fix: each replica gets a share of the global batch and knows which (`sample_share`); the gradients are
summed before anything else is done with them (`replica_update`). The logs are those of this process's
replicas; what `fit` reports at the end of an epoch comes from the metrics' variables, which TensorFlow sums
over all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.keras_fixes.control_flow_captures import captured_outside
from tfaccel.keras_fixes.iterator_stall import untuned
from tfaccel.keras_fixes.pipeline_statistics import count_examples
from tfaccel.keras_fixes.python_batches import copied
from tfaccel.keras_fixes.replica_batch_norm import synchronized
from tfaccel.keras_fixes.replica_random import drawing_rows
from tfaccel.keras_fixes.replica_update import Apply, apply_sums, applying
from tfaccel.keras_fixes.sample_share import Share, check_weighed, weighing_samples

Step = Callable[[Any], Any]


class ReplicatedStep:
    """A step of `fit` or `evaluate` on every replica.

    Args:
        strategy: A `MirroredStrategy` or `MultiWorkerMirroredStrategy`.
        step: From a replica's batch to its logs.
        around: Makes a context for the thread that traces, around all replicas.
        synchronize: Whether BatchNormalization takes its statistics over all replicas.
        can_reduce: Whether replicas can exchange values inside of the step.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        step: Step,
        around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        synchronize: bool = True,
        can_reduce: bool = True,
    ):
        self._strategy = strategy
        self._step = step
        self._around = around
        self._synchronize = synchronize
        self._can_reduce = can_reduce

    def on_batch(self, data: Any) -> Any:
        """The logs of a step.

        Args:
            data: Split among the replicas, as a distributed data set hands it over; or a whole batch.
        """
        data = tf.nest.map_structure(
            lambda leaf: tf.convert_to_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf, data
        )
        if self._strategy.num_replicas_in_sync == 1:
            rows = count_examples(_part(data, 0))
            return self._run(lambda data: (data, self._share(tf.constant(0), rows, rows)), (data,))
        local = [_part(data, i) for i in range(self._local_replicas())]
        if not any(isinstance(leaf, tf.distribute.DistributedValues) for leaf in tf.nest.flatten(data)):
            rows = tf.range(count_examples(data))
            return self.on_rows(lambda some: _rows_of(data, some), rows)
        counts = tf.stack([count_examples(part) for part in local])

        def part(data: Any, counts: tf.Tensor) -> tuple[Any, Share]:
            every = self._of_all(counts)
            here = tf.distribute.get_replica_context().replica_id_in_sync_group
            return data, self._share(tf.reduce_sum(every[:here]), every[here], tf.reduce_sum(every))

        return self._run(part, (data, counts))

    def on_rows(self, cut: Callable[[tf.Tensor], Any], rows: tf.Tensor) -> Any:
        """The logs of a step.

        Args:
            cut: From some rows of the data to a batch.
            rows: Of the whole batch; int32, rank 1. Every replica takes its share.
        """

        def part(rows: tf.Tensor) -> tuple[Any, Share]:
            replicas, total = self._strategy.num_replicas_in_sync, tf.shape(rows)[0]
            here = tf.distribute.get_replica_context().replica_id_in_sync_group
            begin, end = total * here // replicas, total * (here + 1) // replicas
            with tf.device("CPU:0"):  # where the data are: other devices get their rows only
                data = cut(rows[begin:end])
            return data, self._share(begin, end - begin, total)

        return self._run(part, (rows,))

    def examples(self, data: Any) -> tf.Tensor:
        """How many there are in a batch, if every process has as many; a scalar int32."""
        local = self._local_replicas()
        processes = self._strategy.num_replicas_in_sync // local
        return processes * tf.add_n([count_examples(_part(data, i)) for i in range(local)])

    def _run(self, part: Callable[..., tuple[Any, Share]], arguments: tuple) -> Any:
        replicas = self._strategy.num_replicas_in_sync

        @tf.autograph.experimental.do_not_convert
        def on_replica(*arguments: Any) -> Any:
            data, share = part(*arguments)

            def instead(optimizer: Any, apply: Apply, gradients: list[Any], variables: Any) -> None:
                check_weighed(share, replicas)
                share.weighed = False  # the next optimizer of this step has a loss of its own
                check_built(optimizer)
                apply_sums(apply, gradients, variables)

            with (
                weighing_samples(share),
                drawing_rows(share),
                synchronized(share if self._synchronize and replicas > 1 else None),
                applying(instead),
            ):
                logs = self._step(data)
            # A train_step that gives back its own loss gives this replica's part of it.
            return tf.nest.map_structure(lambda log: log * replicas if share.is_part(log) else log, logs)

        with self._around(), captured_outside():
            logs = self._strategy.run(on_replica, arguments)
        return tf.nest.map_structure(self._mean, logs)

    def _share(self, begin: tf.Tensor, rows: tf.Tensor, total: tf.Tensor) -> Share:
        return Share(begin, rows, total, self._can_reduce or self._strategy.num_replicas_in_sync == 1)

    def _mean(self, log: Any) -> Any:
        values = self._strategy.experimental_local_results(log)
        return values[0] if len(values) == 1 else tf.reduce_mean(tf.stack(values), axis=0)

    def _local_replicas(self) -> int:
        return len(self._strategy.extended.worker_devices)

    def _of_all(self, counts: tf.Tensor) -> tf.Tensor:
        """The rows of every replica, from those of this process's."""
        replicas = self._strategy.num_replicas_in_sync
        if counts.shape[0] == replicas:
            return counts
        context = tf.distribute.get_replica_context()
        here = context.replica_id_in_sync_group
        own = counts[here % counts.shape[0]]
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.one_hot(here, replicas, own, 0))


def _part(data: Any, replica: int) -> Any:
    def local(leaf: Any) -> Any:
        return leaf.values[replica] if isinstance(leaf, tf.distribute.DistributedValues) else leaf

    return tf.nest.map_structure(local, data)


def _rows_of(data: Any, rows: tf.Tensor) -> Any:
    return tf.nest.map_structure(lambda leaf: None if leaf is None else tf.gather(leaf, rows), data)


def is_replicated(strategy: tf.distribute.Strategy) -> bool:
    """Whether each replica has variables that it can update by itself: what `ReplicatedStep` heals."""
    return isinstance(
        strategy,
        tf.distribute.OneDeviceStrategy
        | tf.distribute.MirroredStrategy
        | tf.distribute.MultiWorkerMirroredStrategy,
    )


def batches_function(model: keras.Model, step: Step) -> Callable[[Any], Any]:
    """What `train_on_batch` and its like call, in place of Keras's function.

    Args:
        model: Whose metrics the logs are taken from: they count the samples of all replicas.
        step: From a whole batch to its logs.
    """
    function = tf.function(step, reduce_retracing=True, autograph=False)

    def run(batches: Any) -> Any:
        with captured_outside():
            logs = function(next(iter(batches)))
        return dict(model._get_metrics_result_or_logs(logs))

    return run


def check_built(optimizer: keras.optimizers.Optimizer) -> None:
    """Raises where an optimizer would have to make its variables while replicas are traced one by one.

    Raises:
        ValueError: It is not built; Keras builds `model.optimizer`, not those that a model keeps beside it.
    """
    if not optimizer.built:
        raise ValueError(
            f"{optimizer.name!r} has no variables yet, and train_step applies it under a strategy. Allowed: "
            "optimizers that are built. Call optimizer.build(network.trainable_variables) in the model's "
            "compile, inside of the scope."
        )


def eager_function(model: keras.Model, step: Step, steps: int) -> Callable[[Any], Any]:
    """What Keras's loop calls where the model runs eagerly.

    Args:
        model: Whose metrics the logs are taken from.
        step: From a batch to its logs.
        steps: As `steps_per_execution`.
    """

    def run(batches: Any) -> Any:
        logs = None
        for _, data in zip(range(steps), batches, strict=False):
            logs = step(data)
        if logs is None:
            raise StopIteration
        return dict(model._get_metrics_result_or_logs(logs))

    return run


def distribute_anew(epoch_iterator: Any) -> None:
    """Heals the pipeline of a `fit` or `evaluate` under a strategy, before it is split among the replicas."""
    iterator = epoch_iterator
    dataset = iterator.data_adapter.get_tf_dataset()
    if isinstance(dataset, tf.data.Dataset):
        policy = dataset.options().experimental_distribute.auto_shard_policy
        if policy == tf.data.experimental.AutoShardPolicy.OFF:
            # Each worker cuts whole batches of its own into those of its replicas: Keras, who counts
            # the batches before they are cut, would end the epoch half way.
            iterator._num_batches = None
        iterator._distributed_dataset = iterator._distribute_strategy.experimental_distribute_dataset(
            untuned(copied(dataset))
        )
