"""Which layers are meant: by name, by class, or by whatever a function of the layer says."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

import keras

from tfaccel.errors import refuse

MOST_NAMED = 12  # in a message, of the layers that there are

Selector = str | type | Callable[[keras.layers.Layer], bool]


def check_selector(argument: str, selector: object) -> None:
    """Raises ValueError for what can't select a layer at all."""
    if not isinstance(selector, str | type) and not callable(selector):
        raise refuse(
            argument,
            selector,
            "a layer's name, a layer class, or a function of a layer",
            "Print [layer.name for layer in model.layers].",
        )


def matches(selector: Selector, layer: keras.layers.Layer) -> bool:
    """Whether a layer is selected."""
    if isinstance(selector, str):
        return layer.name == selector
    if isinstance(selector, type):
        return isinstance(layer, selector)
    return bool(selector(layer))


def no_match(selector: object, names: Iterable[str]) -> ValueError:
    """Words a selector that matches nothing; `names` are those that it could have matched."""
    every = sorted(set(names))
    if len(every) > MOST_NAMED:
        near = difflib.get_close_matches(str(selector), every, MOST_NAMED, cutoff=0.0)
        allowed = f"what matches one of the {len(every)} layers, such as {', '.join(near)}"
    else:
        allowed = f"what matches one of {', '.join(every) or 'no layer'}"
    return refuse("layers", selector, allowed, "Look at model.summary().")
