"""`export_tflite`: converts, quantizes, runs the result, compares it, and only then gives the path back.

Cost: one conversion (a second for a small model), one run of the samples through model and file, and for
integer recipes with samples one or two more through the float file, and seconds of rounding.

Reference: Jacob et al., 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", https://arxiv.org/abs/1712.05877.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from tfaccel.export.arguments import CALIBRATION_SAMPLES, check_arguments, check_path, check_ranges_known
from tfaccel.export.calibration import check_for_ranges, check_values
from tfaccel.export.errors import ExportError
from tfaccel.export.file import TFLiteFile, write_candidate, write_unproven
from tfaccel.export.recipes import RECIPES, Recipe, find_recipe
from tfaccel.export.report import report_layers
from tfaccel.export.samples import Samples, collect_samples, make_up_samples
from tfaccel.export.scoring import Scorer, is_within
from tfaccel.export.search import AutoRecipe, Search
from tfaccel.export.selection import Selector, check_layers, recipes_by_operation
from tfaccel.export.serving import ServingFunction
from tfaccel.export.workbench import Candidate, Workbench
from tfaccel.keras_fixes.half_precision import computes_in_half_precision
from tfaccel.learned_ranges import LearnedRanges, recall


def export_tflite(
    model: keras.Model,
    path: str | os.PathLike,
    recipe: str | AutoRecipe = "float32",
    *,
    calibration: Any = None,
    evaluate: Any = None,
    max_drop: float | None = None,
    layers: Mapping[Selector, str] | None = None,
    strict: bool = False,
    allow_select_ops: bool = False,
    metadata: dict[str, Any] | None = None,
    input_signature: Any = None,
) -> TFLiteFile:
    """Writes a TFLite file of the model that has been run in LiteRT and compared with the model.

    The model itself is not changed. A mixed-precision model is traced in float32, with the same weights. The
    batch size stays open, but for recurrent layers: the converter takes their loops with a known batch only,
    so the file runs one sample a call, and the result says so. Fixed ranges can't be measured in a loop, so
    `"int8"` unrolls it, and the batch stays open. A stateful layer's state is kept in the file from call to
    call, zero at the start. The file is written beside its place and renamed: a failure leaves an older file
    as it was.

    Args:
        model: A built `keras.Model`: Sequential, Functional or subclassed.
        path: Where the file goes; its folder must exist.
        recipe: `"float32"`, `"float16"`, `"weight_only_int8"`, `"dynamic_int8"`, `"int4_weights"`, `"int8"`,
            `"int8_integer_io"` or `"int16x8"`; see `tfaccel.export.recipes`. `"auto"` measures them,
            and mixes of them by layer, and takes the smallest or fastest whose score falls by no more than
            `max_drop`; what it tried is in the result's `search`. An `AutoRecipe` says what to look for.
        calibration: Real samples: arrays, `(x, y)`, a `tf.data.Dataset` (of batches or samples, with
            or without labels) or a `keras.utils.PyDataset`. Fixed ranges (`"int8"` and the like) need
            them; of the other integer recipes they decide how weights are rounded, and all are compared on
            them. Up to 500 are used: of arrays and a `PyDataset` from all over, of a dataset the first. A
            model that was trained with `QuantizeAware`, and not changed since, needs none: the ranges that it
            learnt are taken, and what lies inside of layers is measured on rows of its training data.
        evaluate: What `max_drop` is measured on: labelled data `(x, y)`, a dataset of `(x, y)`, or a
            function that is given `predict` (arrays to outputs, nested as the model's) and returns a score,
            higher is better. Labelled data of a classifier is scored by accuracy, 0..1. Default: the labels
            of `calibration`, where it has some and `max_drop` is given.
        max_drop: How much lower than the model's the file's score may be, e.g. 0.005. Default: the file is
            judged by its SQNR, at least the recipe's `min_sqnr_db`.
        layers: Another recipe for some layers, by name, class, or a function of the layer:
            `{"scores": "float32", keras.layers.DepthwiseConv2D: "dynamic_int8"}`. A rule for a layer of
            layers, such as attention, is one for all inside. A later rule wins.
        strict: Refuses a file of a recipe with fixed ranges in which anything computes in floats. Default:
            the result's `float_operations` name it.
        allow_select_ops: Takes TensorFlow's own operations where LiteRT has none. Such a file runs only in an
            interpreter with the Flex delegate, which no Python package has: it is written unproven, and its
            `parity` is None. `"float32"` only. Default False.
        metadata: What the file is to say about itself, such as `{"labels": [...], "input": "0..1"}`; JSON.
        input_signature: Nested `tf.TensorSpec` of the inputs, batch axis included; needed only for a
            subclassed model with several inputs, or with inputs that are not float.

    Returns:
        A `TFLiteFile`: path, size, parity and scores.

    Raises:
        ValueError: A bad argument, or calibration data that the model was not trained on; said before
            anything is written.
        ExportError: The model can't be converted, the file can't be run on the standard interpreter,
            does not agree with the model, or its score fell by more than `max_drop`.

    Example:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
        >>> x = np.random.default_rng(0).random((100, 8), dtype="float32")
        >>> file = tfaccel.export_tflite(model, "small.tflite", "int8", calibration=x)
        >>> file.parity.sqnr_db > 20
        True

    Reference:
        Jacob et al., 2018, https://arxiv.org/abs/1712.05877, section 2.
    """
    target = check_path(path)
    check_arguments(
        recipe,
        calibration,
        evaluate,
        max_drop,
        layers=layers,
        metadata=metadata,
        strict=strict,
        allow_select_ops=allow_select_ops,
    )
    check_ranges_known(model, recipe, calibration)
    if recipe == "auto" or isinstance(recipe, AutoRecipe):
        options = recipe if isinstance(recipe, AutoRecipe) else AutoRecipe()
        ranged = RECIPES["int8" if calibration is not None else "dynamic_int8"]
        bench = make_bench(model, ranged, calibration, evaluate, max_drop, input_signature, False)
        candidate, searched = Search(bench, max_drop or 0.0, options).run()
        return write_candidate(target, candidate, bench, metadata, searched)
    chosen = find_recipe(recipe)
    bench = make_bench(model, chosen, calibration, evaluate, max_drop, input_signature, allow_select_ops)
    check_layers(layers, model)
    operations = bench.converted(chosen.needs_calibration).operations
    if any(each.kind.startswith("Flex") for each in operations):
        return write_unproven(target, bench, chosen, metadata, judged=max_drop is not None or bool(layers))
    by_operation = recipes_by_operation(layers, operations, model)
    candidate = bench.measure(chosen, bench.build(chosen, by_operation))
    own = {
        each.layer.name: by_operation[each.outputs[0]].name
        for each in operations
        if each.layer is not None and each.outputs and each.outputs[0] in by_operation
    }
    candidate = dataclasses.replace(candidate, layers=own)
    check_candidate(candidate, bench, max_drop, strict)
    return write_candidate(target, candidate, bench, metadata)


def make_bench(
    model: keras.Model,
    recipe: Recipe,
    calibration: Any,
    evaluate: Any,
    max_drop: float | None,
    input_signature: Any,
    allow_select_ops: bool,
) -> Workbench:
    """The model with its data, once all of it is known to be usable."""
    serving = ServingFunction(model, input_signature)
    serving.trace()
    if recipe.weight_bits < 32:
        serving.check_outputs_are_several()
    learned = recall(model, recipe.activation_bits) if recipe.needs_calibration else None
    samples = _samples(serving, calibration, learned).whole_batches(serving.batch_size)
    scorer = None
    if evaluate is not None or max_drop is not None:
        scorer = Scorer(serving, evaluate, calibration)
    if not samples.made_up:
        check_values(samples, "calibration")
        if recipe.needs_calibration and learned is None:
            check_for_ranges(serving, samples, scorer.samples if scorer and evaluate is not None else None)
    return Workbench(model, serving, samples, scorer, input_signature, allow_select_ops, learned)


def _samples(serving: ServingFunction, calibration: Any, learned: LearnedRanges | None) -> Samples:
    if calibration is not None:
        return collect_samples(calibration, serving.specs, CALIBRATION_SAMPLES, argument="calibration")
    return Samples(learned.samples) if learned is not None else make_up_samples(serving.specs)


def check_candidate(candidate: Candidate, bench: Workbench, max_drop: float | None, strict: bool) -> None:
    """Raises ExportError for a file that must not be given away, and says which layer is at fault.

    A mixed-precision model computes with 8 (bfloat16) or 11 bits itself, so its own outputs are only
    that exact: 8 bits are 48 dB, less what summing costs.
    """
    recipe = candidate.recipe
    if strict and candidate.float_operations:
        raise ExportError(
            f"The {recipe.name} file still computes in floats: {', '.join(candidate.float_operations)}. "
            "Nothing was written. Leave strict=True out, or replace those layers."
        )
    problem = find_problem(candidate, max_drop, computes_in_half_precision(bench.model))
    if problem:
        raise ExportError(f"{problem} Nothing was written. {_culprits(candidate, bench)}")


def find_problem(candidate: Candidate, max_drop: float | None, mixed_precision: bool = False) -> str:
    """Why a file is not good enough, or an empty text."""
    figures, name = candidate.parity, candidate.recipe.name
    recipes = [candidate.recipe, *map(find_recipe, candidate.layers.values())]
    if not np.isfinite(figures.max_abs_error):
        return f"The {name} file does not agree with the model: {figures}."
    if max_drop is not None and candidate.score is not None:
        if not is_within(candidate.score.drop, max_drop):
            return (
                f"The file's score fell by {candidate.score.drop:.4f}, more than max_drop={max_drop} "
                f"({candidate.score})."
            )
        if min(recipe.weight_bits for recipe in recipes) < 16:
            return ""
    limit = min(recipe.min_sqnr_db for recipe in recipes)
    limit = min(limit, 20.0) if mixed_precision else limit
    if figures.sqnr_db < limit:
        return (
            f"The {name} file does not agree with the model: {figures}, and at least {limit:g} dB are asked."
        )
    return ""


def _culprits(candidate: Candidate, bench: Workbench) -> str:
    """Which layers hurt most, and what to try."""
    if candidate.recipe.weight_bits > 16:
        return "Check for layers that behave at random at inference, or for values that overflow."
    fixed = candidate.recipe.needs_calibration
    worst = [row for row in report_layers(bench, candidate.content, fixed).rows[:3] if row.added_noise > 0]
    if not worst:
        return "Try 'dynamic_int8' or 'float16', or more calibration data."
    named = ", ".join(f"{row.layer} ({row.sqnr_db:.0f} dB behind it)" for row in worst)
    first = worst[0].layer
    return (
        f"Most is lost at {named}. Give such layers another recipe, as layers={{{first!r}: 'float32'}}, or "
        "take 'dynamic_int8' or 'float16', or more calibration data."
    )
