"""`steps_per_execution` fails under `tf.distribute`: a collective's key is lost inside of control flow.

TensorFlow gives every run of a collective a new key, which a traced function takes in when it is called. A
function that is called by another hands that duty on to the graph that it is called in. Where this is a
branch inside of a loop, the placeholder is made in the branch, which nobody feeds: "You must feed a value
for placeholder tensor 'while/cond/Placeholder'" (keras-team/keras#19246). `MirroredStrategy` on CPUs and
`MultiWorkerMirroredStrategy` everywhere use collectives.

Smallest reproduction (TensorFlow 2.21):

    inner = tf.function(lambda: tf.compat.v1.get_default_graph().capture_call_time_value(
        lambda: tf.constant(1), tf.TensorSpec([], tf.int32)))
    branch = lambda: tf.cond(tf.constant(True), inner, lambda: 0)

    @tf.function
    def outer(n):
        return tf.while_loop(lambda i, _: i < n, lambda i, _: (i + 1, branch()), [0, 0])

    outer(tf.constant(1))    # InvalidArgumentError: You must feed a value for placeholder tensor

The fix: the placeholder is made in the function around the control flow; loop and branch capture it from
there as they capture any other tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from tensorflow.python.framework import func_graph

from tfaccel.keras_fixes.patch import Patch


def _capture(original: Callable, setting: Callable[[], Any]) -> Callable:
    def capture_call_time_value(self: Any, *args: Any, **kwargs: Any) -> Any:
        graph = self
        while setting() and getattr(graph, "is_control_flow_graph", False):
            graph = graph.outer_graph
        if graph is self:
            return original(self, *args, **kwargs)
        with graph.as_default():
            return original(graph, *args, **kwargs)

    return capture_call_time_value


_PATCH = Patch(func_graph.FuncGraph, "capture_call_time_value", _capture)


def captured_outside() -> contextlib.AbstractContextManager[None]:
    """Lets this thread trace collectives in loops and branches while the block lasts."""
    return _PATCH.active(True)
