"""Under `tf.distribute` Keras's optimizers work on the gradients of one replica, before they are summed.

Clipping clips each replica's part (weights 8e-3 off after a few steps of `clipvalue=0.1`).
`LossScaleOptimizer` asks the first replica only whether gradients are finite: an overflow in another one
turns all weights to NaN, and under `MultiWorkerMirroredStrategy` the workers wait for one another for ever.
Gradient accumulation and `ema_overwrite_frequency` update inside a branch, where the strategy can't be
asked: both raise (keras-team/keras#17429, keras-team/tf-keras#301).

Smallest reproduction (Keras 3.15.1, two CPUs):

    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(gradient_accumulation_steps=2), "mse")
    model.fit(x, y)      # RuntimeError: `merge_call` called while defining a new graph or a tf.function

The fix: gradients are summed first. After that every replica has the same ones, and does by itself what one
device does: its copies of the variables change alike, and nothing has to be asked of the others.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.optimizers.loss_scale_optimizer import LossScaleOptimizer
from tensorflow.python.distribute import values as distributed_values
from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended
from tensorflow.python.distribute.mirrored_strategy import MirroredExtended

from tfaccel.keras_fixes.patch import Patch, all_active

Apply = Callable[[list[Any], Any], None]
Instead = Callable[[keras.optimizers.Optimizer, Apply, list[Any], Any], None]


def _apply(original: Callable, setting: Callable[[], Instead | None]) -> Callable:
    def apply(self: Any, grads: Any, trainable_variables: Any = None) -> None:
        instead = setting()
        if instead is None:
            original(self, grads, trainable_variables)
            return
        with applying(None):  # LossScaleOptimizer applies the optimizer inside
            instead(self, functools.partial(original, self), list(grads), trainable_variables)

    return apply


def _no_merge_call(original: Callable, setting: Callable[[], Any]) -> Callable:
    return lambda self: False if setting() else original(self)


def _is_summed(original: Callable, setting: Callable[[], Any]) -> Callable:
    def all_reduce_sum_gradients(self: Any, grads_and_vars: Any) -> Any:
        return list(grads_and_vars) if setting() else original(self, grads_and_vars)

    return all_reduce_sum_gradients


def _assign_here(original: Callable, setting: Callable[[], Any]) -> Callable:
    def on_write_update_replica(var: Any, update_fn: Callable, value: Any, **kwargs: Any) -> Any:
        if setting():
            return update_fn(var._get_on_device_or_primary(), value, **kwargs)
        return original(var, update_fn, value, **kwargs)

    return on_write_update_replica


_SUMMED = Patch(TFOptimizer, "_all_reduce_sum_gradients", _is_summed)
_APPLY = (Patch(BaseOptimizer, "apply", _apply), Patch(LossScaleOptimizer, "apply", _apply))
_OWN = (
    Patch(MirroredExtended, "_use_merge_call", _no_merge_call),
    Patch(CollectiveAllReduceExtended, "_use_merge_call", _no_merge_call),
    _SUMMED,
    # The counter of the steps is kept "for the first replica", which asks the others.
    Patch(distributed_values, "_on_write_update_replica", _assign_here),
)


@contextlib.contextmanager
def applying(instead: Instead | None) -> Iterator[None]:
    """What optimizers that this thread traces do in place of `apply`, while the block lasts.

    Args:
        instead: Is called with the optimizer, its own `apply`, the gradients and the variables; None lets the
            optimizer alone.
    """
    with all_active(_APPLY, instead):
        yield


def on_one_replica() -> contextlib.AbstractContextManager[None]:
    """Lets optimizers that this thread traces leave out the sum over replicas, as there is one only.

    Keras takes it all the same, and TensorFlow registers a gradient for it by a name of its own, which holds
    the traced graph for as long as the process lives (60 fits that each trace anew: 200 MB).
    """
    return _SUMMED.active(True)


def apply_sums(apply: Apply, gradients: list[Any], variables: Any) -> None:
    """Sums the gradients over the replicas, then updates this replica's variables without asking the others.

    Args:
        apply: The optimizer's own.
        gradients: Of this replica, dense or `tf.IndexedSlices`; None where there is none.
        variables: That they belong to, or None for all.
    """
    context = tf.distribute.get_replica_context()
    present = [i for i, gradient in enumerate(gradients) if gradient is not None]
    if context.num_replicas_in_sync > 1 and present:
        sums = context.all_reduce(tf.distribute.ReduceOp.SUM, [gradients[i] for i in present])
        for i, gradient in zip(present, sums, strict=True):
            gradients[i] = gradient
    with all_active(_OWN, True):
        apply(gradients, variables)
