"""Another recipe for some layers: by name, by type, or by whatever a function of the layer says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras

from tfaccel.errors import refuse
from tfaccel.export.operations import Operation
from tfaccel.export.recipes import Recipe, find_recipe
from tfaccel.keras_fixes.inner_layers import inner_layers
from tfaccel.selection import Selector, check_selector, matches, no_match


def check_selection(layers: Mapping[Selector, str] | None, base: Recipe) -> None:
    """Looks at the recipes by layer before anything is converted.

    Raises:
        ValueError: A key that selects nothing by its kind, an unknown recipe, or one that can't stand beside
            the file's own.
    """
    for selector, name in (layers or {}).items():
        recipe = find_recipe(name)
        check_selector("layers", selector)
        if recipe.integer_io:
            raise refuse(
                f"layers[{selector!r}]",
                name,
                "recipes for a single layer",
                "Take 'int8': only a file has inputs.",
            )
        if recipe.needs_calibration and not base.needs_calibration:
            raise refuse(
                f"layers[{selector!r}]",
                name,
                f"recipes without fixed ranges beside {base.name!r}",
                "Give the fixed ranges to the file (recipe='int8'), and 'dynamic_int8' to the other layers.",
            )


def check_layers(layers: Mapping[Selector, Any] | None, model: keras.Model) -> None:
    """Raises ValueError for a rule that no layer of the model matches."""
    for selector in layers or {}:
        _matching(selector, model)


def recipes_by_operation(
    layers: Mapping[Any, str] | None, operations: Iterable[Operation], model: keras.Model
) -> dict[str, Recipe]:
    """The recipes of single operations, by the first tensor that they make; a later rule wins.

    A rule for a layer of layers (attention, a bidirectional layer, a model in the model) is one for all that
    is inside.

    Raises:
        ValueError: A rule matches no layer that computes anything in the file.
    """
    chosen: dict[str, Recipe] = {}
    mine = [(each.layer, each) for each in operations if each.layer is not None and each.outputs]
    for selector, name in (layers or {}).items():
        inside = _matching(selector, model)
        matching = [each for layer, each in mine if id(layer) in inside]
        if not matching:
            raise no_match(selector, (layer.name for layer, _ in mine))
        chosen.update((each.outputs[0], find_recipe(name)) for each in matching)
    return chosen


def _matching(selector: Selector, model: keras.Model) -> set[int]:
    """The layers that match, and those inside of them, by identity."""
    outer = [each for each in inner_layers(model) if each is not model]
    found = [each for each in outer if matches(selector, each)]
    if not found:
        named = [each for each in outer if not isinstance(each, keras.layers.InputLayer)]
        raise no_match(selector, (each.name for each in named))
    return {id(inner) for each in found for inner in inner_layers(each)}
