"""The one place that puts something round a method of one object, for the length of a `fit`.

What a layer computes, a model's loss or its step: the method is replaced on the object, so that Keras's own
`__call__` (masks, casts, names) stays as it is, and so that it holds wherever the method is called from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras


def wrap_method(owner: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Lets `around(method, *args, **kwargs)` stand for a method of an object; gives back the undo.

    What was put on last is called first. Callbacks end in the order in which they were listed, so it may all
    come off in any order.
    """
    wrapped = vars(owner).get(name)
    if not hasattr(wrapped, "arounds"):
        wrapped = _wrapped(owner, name)
        setattr(owner, name, wrapped)
    wrapped.arounds.append(around)

    def undo() -> None:
        wrapped.arounds.remove(around)
        if not wrapped.arounds and vars(owner).get(name) is wrapped:
            wrapped.restore()

    return undo


def undo_all(undo: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """One undo for several things that were put on one after the other; the last comes off first."""

    def take_off() -> None:
        for step in reversed(undo):
            step()

    return take_off


def _wrapped(owner: Any, name: str) -> Any:
    """A method that calls whatever is in its list `arounds`; the last one first."""
    shadowed = vars(owner).get(name)
    method = getattr(owner, name)
    arounds: list[Callable[..., Any]] = []

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call = method
        for around in arounds:
            call = functools.partial(around, call)
        return call(*args, **kwargs)

    def restore() -> None:
        if shadowed is None:
            delattr(owner, name)
        else:
            setattr(owner, name, shadowed)

    wrapped.arounds, wrapped.restore = arounds, restore  # type: ignore[attr-defined]
    return wrapped


def wrap_call(layer: keras.layers.Layer, around: Callable[..., Any]) -> Callable[[], None]:
    """The same for a layer's `call`."""
    return wrap_method(layer, "call", around)
