"""`jit_compile=True` fails under `tf.distribute`: XLA gets a program that spans devices.

Keras compiles the step of all replicas as one: "Trying to access resource ... located in device CPU:1 from
device CPU:0" (keras-team/keras#17187, #21366). Under `MultiWorkerMirroredStrategy` on CPUs XLA has no
collectives.

Smallest reproduction (Keras 3.15.1, two CPUs):

    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse", jit_compile=True)
    model.fit(x, y)      # InvalidArgumentError

The fix: XLA gets what one replica does by itself, from the batch to the gradients and the metrics. The
optimizer is called outside of it, where gradients can be summed. So the step must not look at the weights
after its update: `train_step` has to be Keras's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfaccel.keras_fixes.replica_update import Apply, applying


def compiled_on_replica(
    step: Callable[[Any], Any], within: Callable[[], contextlib.AbstractContextManager[Any]]
) -> Callable[[Any], Any]:
    """The same step, compiled by XLA on each replica up to where the optimizer applies the gradients.

    Args:
        step: From a replica's batch to its logs; applies gradients once, or never.
        within: Makes a context in which XLA's part is traced.
    """

    def run(data: Any) -> Any:
        applied: list[tuple[keras.optimizers.Optimizer, Any]] = []

        def to_gradients(data: Any) -> tuple[Any, list[Any]]:
            gradients_of_each: list[list[Any]] = []

            def note(optimizer: Any, _: Apply, gradients: list[Any], variables: Any) -> None:
                applied.append((optimizer, variables))
                gradients_of_each.append(gradients)

            with applying(note), within():
                return step(data), gradients_of_each

        # A function for each replica: a trace holds on to the variables of one.
        compiled = tf.function(to_gradients, jit_compile=True, autograph=False)
        logs, gradients_of_each = compiled(data)
        for (optimizer, variables), gradients in zip(applied, gradients_of_each, strict=True):
            optimizer.apply(gradients, variables)
        return logs

    return run


def check_train_step(model: keras.Model) -> None:
    """Raises where XLA can't be given a part of the model's step.

    Raises:
        ValueError: `train_step` is the user's own.
    """
    if type(model).train_step is not keras.Model.train_step:
        raise ValueError(
            f"jit_compile=True with a strategy needs Keras's own train_step; {type(model).__name__} has "
            "one of its own, which XLA would have to compile across devices. Allowed: jit=False. Pass "
            "jit=False to Accelerator and jit_compile=False to compile, or override compute_loss instead."
        )
