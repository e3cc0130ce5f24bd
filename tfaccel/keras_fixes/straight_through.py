"""A `tf.custom_gradient` in a traced step keeps the step's graph for as long as the process lives.

TensorFlow registers its gradient anew, under a name of its own, each time that a graph with it is built; the
registry keeps the function, which keeps the graph, which keeps what it captures: the model's weights.

Smallest reproduction (TensorFlow 2.21):

    @tf.custom_gradient
    def same(x):
        return tf.identity(x), lambda upstream: upstream

    before = len(ops.gradient_registry.list())            # tensorflow.python.framework.ops
    for _ in range(10): tf.function(same)(tf.constant(1.0))
    len(ops.gradient_registry.list()) - before            # 10

The fix, for the one gradient that rounding needs: it depends on nothing, so it is registered once.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record

NAME = "tfaccel_straight_through"


def straight_through(value: Any, exact: Any) -> Any:
    """`value`, with the gradient of `exact`, of the same shape and dtype.

    `exact + stop_gradient(value - exact)` says the same, an ulp off, in two passes over both.
    """
    with record.stop_recording():
        if tf.executing_eagerly():
            result = tf.identity(value)
        else:  # the gradient of a loop's body is looked up by its operations
            with tf.compat.v1.get_default_graph().gradient_override_map({"IdentityN": NAME}):
                result, _ = tf.identity_n([value, exact])
    record.record_operation(NAME, [result], [exact], lambda upstream: [upstream])
    return result


@tf.RegisterGradient(NAME)
def _gradient(_: tf.Operation, of_value: Any, __: Any) -> tuple[None, Any]:
    return None, of_value
