"""The one place that puts something round a method of one object, for the length of a `fit`.

What a layer computes, a model's loss or its step: the method is replaced on the object, so that Keras's own
`__call__` (masks, casts, names) stays as it is, and so that it holds wherever the method is called from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras


def wrap_method(owner: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Lets `around(method, *args, **kwargs)` stand for a method of an object; gives back the undo.

    What was put on last comes off first.
    """
    shadowed = vars(owner).get(name)
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args, **kwargs)

    def undo() -> None:
        if shadowed is None:
            delattr(owner, name)
        else:
            setattr(owner, name, shadowed)

    setattr(owner, name, wrapped)
    return undo


def wrap_call(layer: keras.layers.Layer, around: Callable[..., Any]) -> Callable[[], None]:
    """The same for a layer's `call`."""
    return wrap_method(layer, "call", around)
