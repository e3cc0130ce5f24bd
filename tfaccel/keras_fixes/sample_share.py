"""Under `tf.distribute` Keras weighs replicas, not samples: an uneven batch gives another gradient.

Each replica's loss is its own mean over the number of replicas. Where the last batch of an epoch does not
divide evenly, samples of the smaller share count more (weights 2e-3 off after one epoch of 61 samples in
batches of 16); where a loss is masked, or divided by the sum of the sample weights, each replica divides by
its own sum.

Smallest reproduction (Keras 3.15.1, two CPUs): fit 3 samples in one batch, against one device:

    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    model.fit(x[:4], y[:4], batch_size=3, shuffle=False)     # the last batch: 1 sample and none

The fix: a replica's share of the loss is its rows over the rows of the whole batch, and what a loss is
divided by is summed over the replicas. With even shares the factor is the same float as Keras's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.losses import loss as keras_loss
from keras.src.trainers.trainer import Trainer

from tfaccel.keras_fixes.patch import Patch, all_active

MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


class Share:
    """The rows of a global batch that one replica works on, while its step is traced.

    Args:
        begin: The first row, in the global batch; int32, as the others.
        rows: How many.
        total: Rows of the global batch.
        can_reduce: Whether replicas can exchange values inside of the step; not so in a program of XLA.
    """

    def __init__(self, begin: tf.Tensor, rows: tf.Tensor, total: tf.Tensor, can_reduce: bool = True):
        self.begin = begin
        self.rows = rows
        self.total = total
        self.can_reduce = can_reduce
        self.weighed = False  # whether a loss was divided among the replicas
        self.parts: list[Any] = []  # what the model's compute_loss gave

    def fraction(self, dtype: Any = tf.float32) -> tf.Tensor:
        """Rows over total; as Keras's 1 / replicas where shares are even."""
        return tf.math.divide_no_nan(tf.cast(self.rows, dtype), tf.cast(self.total, dtype))

    def is_part(self, value: Any) -> bool:
        """Whether it is a loss that the model computed, and so this replica's part of one."""
        return any(value is part for part in self.parts)

    def sum(self, value: tf.Tensor, what: str) -> tf.Tensor:
        """The sum over all replicas.

        Args:
            value: This replica's.
            what: What needs it, for the message.

        Raises:
            ValueError: In a program of XLA.
        """
        if not self.can_reduce:
            raise ValueError(
                f"{what} needs values of all replicas inside of the step, which XLA can't exchange between "
                "devices. Allowed: jit=False. Pass jit=False to Accelerator, or leave it out."
            )
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)

    def over_all(self, divisor: tf.Tensor, what: str) -> tf.Tensor:
        """What turns a loss divided by the local `divisor` into its part of one divided by the sum of all."""
        divisor = tf.cast(divisor, tf.float32)
        return tf.math.divide_no_nan(divisor, self.fraction() * self.sum(divisor, what))


def _scale(original: Callable, setting: Callable[[], Share | None]) -> Callable:
    def scale_loss_for_distribution(value: Any) -> Any:
        share = setting()
        if share is None:
            return original(value)
        share.weighed = True
        return value * share.fraction(value.dtype)

    return scale_loss_for_distribution


def _unscale(original: Callable, setting: Callable[[], Share | None]) -> Callable:
    def unscale_loss_for_distribution(value: Any) -> Any:
        share = setting()
        if share is None:
            return original(value)
        return tf.math.divide_no_nan(value, share.fraction(value.dtype))

    return unscale_loss_for_distribution


def _weigh_own_loss(original: Callable, setting: Callable[[], Share | None]) -> Callable:
    def update_state(self: Any, values: Any, sample_weight: Any = None) -> None:
        share = setting()
        if share is None or sample_weight is not None:
            original(self, values, sample_weight)
        elif share.is_part(values):  # a train_step that tracks what compute_loss gave
            original(self, tf.math.divide_no_nan(values, share.fraction(values.dtype)), share.fraction())
        elif len(getattr(values, "shape", (0,))) == 0:
            # One value for a batch, such as the loss of an output: Keras counts it once for each batch.
            values = tf.convert_to_tensor(values)
            original(self, tf.where(share.rows > 0, values, tf.zeros_like(values)), share.fraction())
        else:
            original(self, values, sample_weight)

    return update_state


def _apply_mask(original: Callable, setting: Callable[[], Share | None]) -> Callable:
    def apply_mask(sample_weight: Any, mask: Any, dtype: Any, reduction: Any) -> Any:
        weights, share = original(sample_weight, mask, dtype, reduction), setting()
        if share is None or mask is None or reduction not in ("mean", "sum_over_batch_size"):
            return weights
        valid = tf.reduce_sum(tf.cast(mask, tf.float32))
        return weights * tf.cast(share.over_all(valid, "a masked loss"), weights.dtype)

    return apply_mask


def _reduce(original: Callable, setting: Callable[[], Share | None]) -> Callable:
    def reduce_values(values: Any, sample_weight: Any = None, reduction: Any = "sum_over_batch_size") -> Any:
        loss, share = original(values, sample_weight, reduction), setting()
        if share is None:
            return loss
        # A sum over the samples is the sum of the replicas' sums as it is.
        share.weighed = share.weighed or reduction == "sum"
        if tuple(loss.shape) == (0,):  # Keras gives back no mean of no rows
            share.weighed = True
            return tf.reduce_sum(loss)
        if tuple(values.shape) == () and reduction in MEANS:  # a loss function that takes the mean itself
            share.weighed = True
            return tf.where(share.rows > 0, loss, tf.zeros_like(loss)) * share.fraction(loss.dtype)
        if reduction != "mean_with_sample_weight" or sample_weight is None:
            return loss
        total = tf.reduce_sum(tf.cast(sample_weight, tf.float32))
        return loss * tf.cast(share.over_all(total, "reduction='mean_with_sample_weight'"), loss.dtype)

    return reduce_values


def _note_loss(original: Callable, setting: Callable[[], Share | None]) -> Callable:
    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss, share = original(self, *args, **kwargs), setting()
        if share is not None:
            share.parts.append(loss)
        return loss

    return compute_loss


def _replicas(original: Any, setting: Callable[[], Share | None]) -> property:
    def num_replicas_in_sync(self: Any) -> int:
        share = setting()
        if share is not None:
            share.weighed = True  # who asks in a step divides by it
        return original.fget(self)

    return property(num_replicas_in_sync, doc=original.__doc__)


_PATCHES = (
    Patch(keras_loss, "scale_loss_for_distribution", _scale),
    Patch(keras_loss, "unscale_loss_for_distribution", _unscale),
    Patch(keras_loss, "apply_mask", _apply_mask),
    Patch(keras_loss, "reduce_values", _reduce),
    Patch(keras.metrics.Mean, "update_state", _weigh_own_loss),
    Patch(Trainer, "compute_loss", _note_loss),
    Patch(tf.distribute.Strategy.__mro__[1], "num_replicas_in_sync", _replicas),
)


@contextlib.contextmanager
def weighing_samples(share: Share) -> Iterator[None]:
    """Lets losses that this thread traces count `share`'s part of the batch while the block lasts."""
    with all_active(_PATCHES, share):
        yield


def check_weighed(share: Share, replicas: int) -> None:
    """Raises where a `train_step` of the user's own made gradients that are too large.

    It is called when the gradients are applied: by then a loss of Keras's, or the user, has divided by the
    number of replicas; or neither has, and the sum over the replicas is that many times the mean.

    Raises:
        ValueError: Nothing in the step divided the loss among the replicas.
    """
    if replicas > 1 and not share.weighed:
        raise ValueError(
            f"train_step computes its loss by hand: summed over {replicas} replicas its gradient is "
            f"{replicas} times too large. Allowed: a loss that is divided among the replicas. Take "
            "self.compute_loss(...) or a keras.losses object; or divide a mean by "
            "self.distribute_strategy.num_replicas_in_sync (reading it tells tfaccel that you did)."
        )
