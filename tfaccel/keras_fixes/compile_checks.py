"""Keras compiles what it can't train: a model of another scope, or options that fail in step one.

Under another dtype policy that is silent: the plan says mixed_bfloat16, the model trains in float32.
Under another strategy it fails late, with a text that names internal classes
(keras-team/keras#19246 and many like it).

Smallest reproduction (Keras 3.15.1):

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model.compile("adam", "mse")
    model.fit(x, y)      # RuntimeError: Need to be inside "with strategy.scope()" for ...

The fix: while a scope is open, `keras.Model.compile` looks at the model first and refuses one that was
built elsewhere, saying what to move.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import keras
import tensorflow as tf

from tfaccel.keras_fixes.keras_distribution import check_no_keras_distribution
from tfaccel.keras_fixes.patch import Patch
from tfaccel.keras_fixes.replica_step import is_replicated

Wrap = Callable[[Callable], Callable]


def _compile(original: Callable, wraps: Callable[[], tuple[Wrap, ...] | None]) -> Callable:
    @functools.wraps(original)
    def compile(self: keras.Model, *args: object, **kwargs: object) -> None:
        call = original
        for wrap in wraps() or ():
            call = wrap(call)
        call(self, *args, **kwargs)

    return compile


# On the class that defines it: where `Model.compile` differs from that, Keras takes it for a user's own and
# `load_model` does not compile.
_COMPILE = Patch(next(kind for kind in keras.Model.__mro__ if "compile" in vars(kind)), "compile", _compile)


def around_compile(wrap: Wrap, alone: bool = False) -> contextlib.AbstractContextManager[None]:
    """Wraps the `compile` of every model, in this thread, for as long as the block lasts.

    Args:
        wrap: From `compile` to what is called instead, both with the model as first argument.
        alone: Whether what blocks around this one have put on is left out meanwhile.
    """
    return _COMPILE.active((wrap,) if alone else (*(_COMPILE.setting() or ()), wrap))


def refuse_at_compile(
    strategy: tf.distribute.Strategy, policy: keras.DTypePolicy
) -> contextlib.AbstractContextManager[None]:
    """Makes `compile` refuse models of another scope for as long as the block lasts.

    A scope inside of another one counts alone, and one of another thread not at all.
    """

    def wrap(original: Callable) -> Callable:
        def compile(self: keras.Model, *args: object, **kwargs: object) -> None:
            check_no_keras_distribution()
            check_built_inside(self, strategy, policy)
            original(self, *args, **kwargs)
            check_optimizer(self.optimizer, strategy)

        return compile

    return around_compile(wrap, alone=True)


def check_built_inside(
    model: keras.Model, strategy: tf.distribute.Strategy, policy: keras.DTypePolicy
) -> None:
    """Raises where `model` was built under another strategy, or no layer of it has the policy.

    Raises:
        ValueError: The model was built outside of the scope.
    """
    remedy = "Build (or load) the model inside `with accelerator.scope():`."
    # `model.distribute_strategy` answers with the present scope where the model has none.
    own = model._distribute_strategy
    if (own or strategy) is not strategy or (own is None and is_distributed(strategy)):
        raise ValueError(
            f"{model.name!r} was built outside of this scope: it belongs to "
            f"{type(own).__name__ if own else 'no strategy'}, the scope to {type(strategy).__name__}. "
            f"Allowed: one scope for building and compiling. {remedy} A model that exists already comes in "
            "by `model = accelerator.adopt(model)`."
        )
    policies = {
        layer.dtype_policy.name for layer in model._flatten_layers(include_self=False) if layer.weights
    }
    if policies and policy.name not in policies:
        raise ValueError(
            f"{model.name!r} was built outside of this scope, or loaded with a policy of its own: "
            f"its layers compute under {', '.join(sorted(policies))}, the scope under {policy.name}. "
            f"Allowed: one policy for both. {remedy} To keep the model as it is, pass "
            f"precision={sorted(policies)[0]!r} to Accelerator."
        )


def is_distributed(strategy: tf.distribute.Strategy) -> bool:
    """False for TensorFlow's default strategy, which stands for "none"."""
    return type(strategy).__name__ != "_DefaultDistributionStrategy"


def check_optimizer(optimizer: keras.optimizers.Optimizer | None, strategy: tf.distribute.Strategy) -> None:
    """Raises where Keras can't run the optimizer under the strategy, which it finds out in step one.

    Both options branch inside the update, and TensorFlow allows no `merge_call` in a branch
    (keras-team/keras#20582).

    Raises:
        ValueError: An optimizer of another scope; or gradient accumulation or a regular EMA overwrite, where
            `replica_update` does not act.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    own = getattr(inner, "_distribution_strategy", strategy)
    if is_distributed(strategy) and own is not strategy:
        raise ValueError(
            f"{type(inner).__name__} was made outside of this scope: it belongs to "
            f"{type(own).__name__ if is_distributed(own) else 'no strategy'}, the scope to "
            f"{type(strategy).__name__}. Allowed: one scope for both. Make the optimizer inside "
            "`with accelerator.scope():`."
        )
    if inner is None or not is_distributed(strategy) or is_replicated(strategy):
        return
    for option in ("gradient_accumulation_steps", "ema_overwrite_frequency"):
        value = getattr(inner, option, None)
        if value:
            raise ValueError(
                f"{option}={value} can't be combined with {type(strategy).__name__}: Keras 3 fails at "
                f"the first step (merge_call in a branch, keras-team/keras#20582). Allowed: None with "
                f"{strategy.num_replicas_in_sync} replicas. Leave it out, or use "
                'Accelerator("one_device").'
            )
