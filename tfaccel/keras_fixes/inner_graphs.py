"""No public road leads from an operation to the body of the function that it calls.

Whoever wants to know what a traced step does has to look into loops, branches and calls; `tf.Graph` keeps
their bodies by name and hands them out to nobody.

Smallest reproduction: `tf.function(lambda x: tf.while_loop(...)).get_concrete_function(...)` has one `While`
operation, and nothing public gives the graph that its attribute `body` names.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

# operation: its attributes that name a function, in the order that they run
CALLS = {
    "PartitionedCall": ("f",),
    "StatefulPartitionedCall": ("f",),
    "While": ("cond", "body"),
    "StatelessWhile": ("cond", "body"),
    "If": ("then_branch", "else_branch"),
    "StatelessIf": ("then_branch", "else_branch"),
}


def inner_graphs(operation: tf.Operation) -> tuple[Any, ...]:
    """The bodies of what an operation calls, as traced graphs; none for one that calls nothing."""
    names = [operation.get_attr(name).name for name in CALLS.get(operation.type, ())]
    return tuple(operation.graph._get_function(name).graph for name in names)
