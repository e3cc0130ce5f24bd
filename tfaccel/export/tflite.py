"""`export_tflite`: converts, runs the result, compares it, and only then gives the path back.

Cost: one conversion (a second for a small model) and one run of the samples through model and file.

Reference: Jacob et al., 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", https://arxiv.org/abs/1712.05877.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

import keras
import numpy as np

from tfaccel.export.compare import Parity, compare_outputs
from tfaccel.export.conversion import convert_model
from tfaccel.export.errors import ExportError
from tfaccel.export.interpreter import TFLiteRunner
from tfaccel.export.recipes import Recipe, find_recipe
from tfaccel.export.samples import Samples, collect_samples, make_up_samples
from tfaccel.export.scoring import (
    Score,
    accuracy,
    is_function,
    labels_of,
    measure_scores,
    scoring_data,
)
from tfaccel.export.serving import ServingFunction
from tfaccel.keras_fixes.half_precision import computes_in_half_precision

CALIBRATION_SAMPLES = 500


@dataclasses.dataclass(frozen=True)
class TFLiteFile:
    """A file that was run and agreed with its model.

    Args:
        path: Where it lies.
        recipe: The name of its recipe.
        size_bytes: Its size.
        parity: How far its outputs are from the model's.
        score: Scores of model and file on the labelled data, or None where none was given.
        samples: How many samples the parity was measured on.
        on_real_data: False where no data was given and random numbers stood in.
        batch_size: 1 where the model's loops forced it, and the file takes one sample a call; None where the
            batch stayed open.
    """

    path: pathlib.Path
    recipe: str
    size_bytes: int
    parity: Parity
    score: Score | None
    samples: int
    on_real_data: bool
    batch_size: int | None = None

    def __str__(self) -> str:
        """A line or two for a person."""
        rows = "samples" if self.on_real_data else "random samples (pass calibration= for real ones)"
        text = f"{self.path}: {self.recipe}, {self.size_bytes:,} bytes; {self.parity}"
        text += f" on {self.samples} {rows}"
        text += "" if self.batch_size is None else f"; takes {self.batch_size} sample a call"
        return text if self.score is None else f"{text}; {self.score}"


def export_tflite(
    model: keras.Model,
    path: str | os.PathLike,
    recipe: str = "float32",
    *,
    calibration: Any = None,
    evaluate: Any = None,
    max_drop: float | None = None,
    input_signature: Any = None,
) -> TFLiteFile:
    """Writes a TFLite file of the model that has been run in LiteRT and compared with the model.

    The model itself is not changed. A mixed-precision model is traced in float32, with the same weights. The
    batch size stays open, but for recurrent layers: the converter takes their loops with a known batch only,
    so the file runs one sample a call, and the result says so. The file is written beside its place and
    renamed: a failure leaves an older file as it was.

    Args:
        model: A built `keras.Model`: Sequential, Functional or subclassed.
        path: Where the file goes; its folder must exist.
        recipe: `"float32"`, `"float16"`, `"dynamic_int8"` or `"int8"`; see `tfaccel.export.recipes`.
        calibration: Real samples: arrays, `(x, y)`, a `tf.data.Dataset` (of batches or samples, with
            or without labels) or a `keras.utils.PyDataset`. `"int8"` needs them (up to 500 are used);
            the other recipes are compared on them.
        evaluate: What `max_drop` is measured on: labelled data `(x, y)`, a dataset of `(x, y)`, or a
            function that is given `predict` (arrays to outputs) and returns a score, higher is
            better. Labelled data of a classifier is scored by accuracy, 0..1. Default: the labels of
            `calibration`, where it has some and `max_drop` is given.
        max_drop: How much lower than the model's the file's score may be, e.g. 0.005.
        input_signature: Nested `tf.TensorSpec` of the inputs, batch axis included; needed only for a
            subclassed model with several inputs, or with inputs that are not float.

    Returns:
        A `TFLiteFile`: path, size, parity and scores.

    Raises:
        ValueError: A bad argument; said before anything is converted.
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
    chosen = find_recipe(recipe)
    check_arguments(chosen, calibration, evaluate, max_drop)
    reference = ServingFunction(model, input_signature)
    samples = _samples(reference, calibration)
    content, batch_size = convert_model(model, input_signature, chosen, samples)
    runner = TFLiteRunner(content)
    figures = compare_outputs(reference, runner, samples)
    check_parity(figures, chosen, mixed_precision=computes_in_half_precision(model))
    score = None
    if evaluate is not None or max_drop is not None:
        score = measure_scores(reference, runner, evaluate, calibration)
        check_drop(score, max_drop)
    write_beside(target, content)
    real = not samples.made_up
    return TFLiteFile(target, chosen.name, len(content), figures, score, len(samples), real, batch_size)


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


def check_arguments(recipe: Recipe, calibration: Any, evaluate: Any, max_drop: float | None) -> None:
    """Raises ValueError for arguments that contradict one another."""
    if recipe.needs_calibration and calibration is None:
        raise ValueError(
            f"recipe={recipe.name!r} needs calibration data, which was not given. Allowed: arrays, a "
            "dataset. Pass calibration=x_train, or take 'dynamic_int8', which needs none."
        )
    if max_drop is None:
        return
    if not 0 <= max_drop <= 1:
        raise ValueError(
            f"max_drop={max_drop!r} is not usable. Allowed: a fraction, 0..1. Half a percentage point "
            "is 0.005."
        )
    if evaluate is None and calibration is None:
        raise ValueError(
            "max_drop was given without data to measure it on. Allowed: evaluate=(x, y), a dataset of "
            "(x, y), a function, or calibration= with labels."
        )


def check_data(
    model: keras.Model, calibration: Any, evaluate: Any, max_drop: float | None, input_signature: Any
) -> None:
    """Looks at one row of the data, so that what can't be used is known before a training.

    Raises:
        ValueError: Data of another shape, without labels, or outputs that have no accuracy.
    """
    serving = ServingFunction(model, input_signature)
    if calibration is not None:
        collect_samples(calibration, serving.specs, 1, argument="calibration")
    if (evaluate is not None or max_drop is not None) and not is_function(evaluate):
        data, argument = scoring_data(evaluate, calibration)
        samples = collect_samples(data, serving.specs, 1, argument=argument)
        accuracy(labels_of(samples, argument), list(serving.predict(samples).values()))


def _samples(serving: ServingFunction, calibration: Any) -> Samples:
    if calibration is None:
        return make_up_samples(serving.specs)
    return collect_samples(calibration, serving.specs, CALIBRATION_SAMPLES, argument="calibration")


def check_parity(figures: Parity, recipe: Recipe, mixed_precision: bool) -> None:
    """Raises ExportError where the file's outputs are not the model's.

    A mixed-precision model computes with 8 (bfloat16) or 11 bits itself, so its own outputs are only
    that exact: 8 bits are 48 dB, less what summing costs.
    """
    limit = recipe.min_sqnr_db
    if limit is not None and mixed_precision:
        limit = min(limit, 20.0)
    if not np.isfinite(figures.max_abs_error) or (limit is not None and figures.sqnr_db < limit):
        raise ExportError(
            f"The {recipe.name} file does not agree with the model: {figures}. Nothing was written. "
            "Check for layers that behave at random at inference, or for values that overflow."
        )


def check_drop(score: Score, max_drop: float | None) -> None:
    """Raises ExportError where the file scores lower than is allowed."""
    if max_drop is not None and score.drop > max_drop:
        raise ExportError(
            f"The file's score fell by {score.drop:.4f}, more than max_drop={max_drop} ({score}). "
            "Nothing was written. Try 'dynamic_int8' or 'float16', or more calibration data."
        )


def write_beside(target: pathlib.Path, content: bytes) -> None:
    """Writes the whole file under another name, then gives it its own."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
