"""Another recipe for some layers: by name, by type, or by whatever a function of the layer says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tfaccel.errors import refuse
from tfaccel.export.operations import Operation
from tfaccel.export.recipes import Recipe, find_recipe
from tfaccel.selection import Selector, check_selector, matches


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


def recipes_by_operation(
    layers: Mapping[Any, str] | None, operations: Iterable[Operation]
) -> dict[str, Recipe]:
    """The recipes of single operations, by the first tensor that they make; a later rule wins.

    Raises:
        ValueError: A rule matches no layer that computes anything in the file.
    """
    chosen: dict[str, Recipe] = {}
    mine = [(each.layer, each) for each in operations if each.layer is not None and each.outputs]
    for selector, name in (layers or {}).items():
        matching = [each for layer, each in mine if matches(selector, layer)]
        if not matching:
            names = sorted({layer.name for layer, _ in mine})
            raise refuse(
                "layers", selector, f"what matches one of {', '.join(names)}", "Look at model.summary()."
            )
        chosen.update((each.outputs[0], find_recipe(name)) for each in matching)
    return chosen
