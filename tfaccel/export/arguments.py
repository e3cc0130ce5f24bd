"""What is refused before an export begins, and before a training that is to end with one."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import keras

from tfaccel.errors import refuse
from tfaccel.export.calibration import check_values
from tfaccel.export.measures import measure_for
from tfaccel.export.metadata import check_metadata
from tfaccel.export.recipes import RECIPES, Recipe, find_recipe
from tfaccel.export.samples import collect_samples
from tfaccel.export.scoring import is_function, labels_of, scoring_data
from tfaccel.export.search import AutoRecipe
from tfaccel.export.selection import Selector, check_selection
from tfaccel.export.serving import ServingFunction
from tfaccel.learned_ranges import has_learned, recall

CALIBRATION_SAMPLES = 500


def check_path(path: str | os.PathLike) -> pathlib.Path:
    """The path, once it is clear that a file can be written there.

    Raises:
        ValueError: No such folder, no permission, or the path is a folder.
    """
    target = pathlib.Path(path)
    folder = target.parent
    problem = None
    if not folder.is_dir():
        problem = f"the folder {str(folder)!r} does not exist"
    elif target.is_dir():
        problem = "it is a folder"
    elif not os.access(folder, os.W_OK):
        problem = f"the folder {str(folder)!r} is not writable"
    if problem:
        raise ValueError(
            f"path={str(target)!r} can't be written: {problem}. Allowed: a file in a folder that "
            "exists and is writable. Make the folder first."
        )
    return target


def check_arguments(
    name: str | AutoRecipe,
    calibration: Any,
    evaluate: Any,
    max_drop: float | None,
    *,
    layers: Mapping[Selector, str] | None = None,
    metadata: dict[str, Any] | None = None,
    strict: bool = False,
    allow_select_ops: bool = False,
) -> None:
    """Raises ValueError for arguments that contradict one another."""
    check_metadata(metadata)
    if isinstance(name, AutoRecipe) or name == "auto":
        recipe = RECIPES["dynamic_int8"]
        for argument, given in (
            ("layers", layers),
            ("strict", strict),
            ("allow_select_ops", allow_select_ops),
        ):
            if given:
                raise refuse(argument, given, "a recipe by name with it; 'auto' tries many", "Leave it out.")
        if max_drop is None:
            raise ValueError(
                "recipe='auto' needs max_drop, which was not given. Allowed: a fraction, 0..1. Pass "
                "evaluate=(x_test, y_test), max_drop=0.005 for half a percentage point."
            )
    else:
        recipe = find_recipe(name)
        check_selection(layers, recipe)
    if strict and not recipe.needs_calibration:
        fixed = ", ".join(repr(each.name) for each in RECIPES.values() if each.needs_calibration)
        raise refuse(
            "strict", strict, f"it with {fixed}", f"{recipe.name!r} computes in floats by its nature."
        )
    if max_drop is not None:
        _check_max_drop(max_drop, evaluate, calibration)


def _check_max_drop(max_drop: float, evaluate: Any, calibration: Any) -> None:
    # A function of the user's may score on any scale; accuracy is a fraction.
    if not 0 <= max_drop <= (math.inf if is_function(evaluate) else 1):
        raise ValueError(
            f"max_drop={max_drop!r} is not usable. Allowed: a fraction, 0..1. Half a percentage point "
            "is 0.005."
        )
    if evaluate is None and calibration is None:
        raise ValueError(
            "max_drop was given without data to measure it on. Allowed: evaluate=(x, y), a dataset of "
            "(x, y), a function, or calibration= with labels."
        )


def check_ranges_known(model: keras.Model, name: str | AutoRecipe, calibration: Any) -> None:
    """Raises ValueError where fixed ranges are to be written, and neither samples nor training tell them."""
    recipe = None if isinstance(name, AutoRecipe) or name == "auto" else find_recipe(name)
    if recipe is None or not recipe.needs_calibration or calibration is not None:
        return
    learned = recall(model, recipe.activation_bits)
    if learned is None or not learned.samples:
        raise no_ranges(recipe, was_trained=has_learned(model))


def no_ranges(recipe: Recipe, was_trained: bool = False) -> ValueError:
    """Words the error; `was_trained`: with ranges that don't fit."""
    why = " What QuantizeAware learnt was for other weights or bits, or inputs of open length."
    return ValueError(
        f"recipe={recipe.name!r} needs calibration data, which was not given.{why * was_trained} Allowed: "
        f"arrays, a dataset, or none behind QuantizeAware(activation_bits={recipe.activation_bits}). Pass "
        "calibration=x_train, or take 'dynamic_int8', which needs none."
    )


def check_data(
    model: keras.Model, calibration: Any, evaluate: Any, max_drop: float | None, input_signature: Any
) -> None:
    """Looks at the data, so that what can't be used is known before a training.

    Raises:
        ValueError: Data of another shape, without labels, or labels that don't go with the outputs.
    """
    serving = ServingFunction(model, input_signature)
    if calibration is not None:
        samples = collect_samples(calibration, serving.specs, CALIBRATION_SAMPLES, argument="calibration")
        check_values(samples, "calibration")
    if (evaluate is not None or max_drop is not None) and not is_function(evaluate):
        data, argument = scoring_data(evaluate, calibration)
        samples = collect_samples(data, serving.specs, serving.batch_size or 64, argument=argument)
        rows = samples.whole_batches(serving.batch_size)
        measure_for(labels_of(rows, argument), list(serving.predict(rows).values()))
