"""The one place that puts something round what a layer computes, for the length of a `fit`.

A layer's `call` is replaced on the object, so that Keras's own `__call__` (masks, casts, names) stays as it
is, and so that it holds wherever the layer is called from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras


def wrap_call(layer: keras.layers.Layer, around: Callable[..., Any]) -> Callable[[], None]:
    """Lets `around(call, *args, **kwargs)` stand for the layer's `call`; gives back the undo.

    What was put on last comes off first.
    """
    shadowed = vars(layer).get("call")
    call = layer.call

    @functools.wraps(call)
    def call_wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(call, *args, **kwargs)

    def undo() -> None:
        if shadowed is None:
            del layer.call
        else:
            layer.call = shadowed

    layer.call = call_wrapped
    return undo
