"""What the workers of a job tell one another: Keras shuffles and restores on each as if it were alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import tensorflow as tf


def is_multi_worker(strategy: tf.distribute.Strategy) -> bool:
    """Whether other processes train the same model."""
    several = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    return several and strategy.extended._in_multi_worker_mode()


def same_order(strategy: tf.distribute.Strategy, order: tf.Tensor) -> tf.Tensor:
    """The first worker's order of the samples: with orders of their own, workers would train some twice.

    Args:
        strategy: Of all workers, who must all call this.
        order: This worker's, int32, rank 1.
    """
    return from_first_worker(strategy, [order])[0] if is_multi_worker(strategy) else order


def from_first_worker(strategy: tf.distribute.Strategy, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """What the first of several workers has.

    Args:
        strategy: Of all workers, who must all call this.
        tensors: This worker's, of numeric dtypes; those of the others have the same shapes.
    """
    return _sender(strategy)(list(tensors))


@functools.lru_cache(maxsize=1)
def _sender(strategy: tf.distribute.Strategy) -> Callable[[list[tf.Tensor]], list[tf.Tensor]]:
    """One function for all orders of a process, which has one strategy of several workers."""

    def on_replica(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        context = tf.distribute.get_replica_context()
        is_first = tf.equal(context.replica_id_in_sync_group, 0)
        # The others add zeros, each dtype in a sum of its own.
        own = [tf.where(is_first, each, tf.zeros_like(each)) for each in tensors]
        return [context.all_reduce(tf.distribute.ReduceOp.SUM, each) for each in own]

    @tf.function(autograph=False)
    def send(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        sums = strategy.run(on_replica, (tensors,))
        return [strategy.experimental_local_results(each)[0] for each in sums]

    return send
