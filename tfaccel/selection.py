"""Which layers are meant: by name, by class, or by whatever a function of the layer says."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import keras

from tfaccel.errors import refuse

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
    allowed = f"what matches one of {', '.join(sorted(set(names))) or 'no layer'}"
    return refuse("layers", selector, allowed, "Look at model.summary().")
