"""The one place that drives an optimizer's learning rate and momentum inside the compiled step.

`optimizer.apply` runs inside the step, once per update, after loss scaling has decided that there is
one. Wrapping it on the user's own optimizer object lets a value be computed from
`optimizer.iterations` and assigned to the learning-rate *variable*, which stays what it was: a variable
that is saved, restored, logged by TensorBoard and serialised as a plain number. A compiled-in
`LearningRateSchedule` would replace that variable, and a file saved meanwhile would need tfaccel to load.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.fit._state import beside

Curve = Callable[[Any], Any]


def inner_optimizer(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The optimizer that updates weights: itself, or what loss scaling wraps."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.inner_optimizer
    return optimizer


def momentum_name(optimizer: keras.optimizers.Optimizer) -> str | None:
    """The attribute that plays momentum's part: `beta_1`, `momentum`, or None."""
    if isinstance(getattr(optimizer, "beta_1", None), float):
        return "beta_1"
    if isinstance(optimizer, keras.optimizers.SGD) and optimizer.momentum > 0:
        return "momentum"
    return None


def drive(
    optimizer: keras.optimizers.Optimizer,
    learning_rate: Curve,
    momentum: Curve | None,
    start: int,
    resting_learning_rate: float,
    strategy: tf.distribute.Strategy,
) -> Callable[[], None]:
    """Makes each update use `learning_rate(step)` and `momentum(step)`; gives back the undo.

    Args:
        optimizer: With a learning-rate variable; not a `LossScaleOptimizer`.
        learning_rate: From the step (scalar float32 tensor) to the learning rate.
        momentum: The same for momentum, or None to leave it alone.
        start: The value of `optimizer.iterations` that counts as step 0.
        resting_learning_rate: What the undo puts back, unless the user has set another meanwhile.
        strategy: Of the model.
    """
    original = optimizer.apply
    with strategy.scope():
        driven = beside(np.full([], math.nan, "float32"))  # what the last update took
    name = momentum_name(optimizer) if momentum is not None else None
    resting_momentum = getattr(optimizer, name) if name else 0.0

    def apply(grads: Any, trainable_variables: Any = None) -> Any:
        step = tf.cast(optimizer.iterations, tf.float32) - float(start)
        variable = optimizer.learning_rate
        rate = tf.cast(learning_rate(step), variable.dtype)
        variable.assign(rate)
        driven.assign(tf.cast(rate, tf.float32))
        if name is None or momentum is None:
            return original(grads, trainable_variables)
        value = momentum(step)
        if name == "momentum":
            value = _Momentum(value, resting_momentum)
        setattr(optimizer, name, value)
        try:
            return original(grads, trainable_variables)
        finally:
            setattr(optimizer, name, resting_momentum)

    def undo() -> None:
        del optimizer.apply
        now, last = (float(keras.ops.convert_to_numpy(each)) for each in (optimizer.learning_rate, driven))
        if now == last:
            optimizer.learning_rate = resting_learning_rate

    optimizer.apply = apply
    return undo


class _Momentum(float):
    """A tensor that Python's `momentum != 0` in `SGD.update_step` can still be asked.

    TensorFlow converts it by `__tf_tensor__`, so the arithmetic uses the tensor.
    """

    value: tf.Tensor

    def __new__(cls, value: tf.Tensor, resting: float) -> _Momentum:
        self = super().__new__(cls, resting)
        self.value = value
        return self

    def __tf_tensor__(self, dtype: tf.DType | None = None, name: str | None = None) -> tf.Tensor:
        return self.value if dtype is None else tf.cast(self.value, dtype)
