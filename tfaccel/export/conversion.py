"""From a Keras model to the bytes of a TFLite file: TensorFlow's converter, and what it wants to be asked."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.export.errors import ExportError
from tfaccel.export.recipes import Recipe
from tfaccel.export.samples import Samples
from tfaccel.export.serving import ServingFunction
from tfaccel.keras_fixes.half_precision import computing_in_float32

LOOP_OPERATION = "TensorListReserve"  # what a loop stacks its steps in: its size must be known


def convert_model(
    model: keras.Model, input_signature: Any, recipe: Recipe, samples: Samples
) -> tuple[bytes, int | None]:
    """Converts in float32, whatever the model computes in; with an open batch size where that can be.

    Args:
        model: Built.
        input_signature: As for `export_tflite`.
        recipe: How to store it.
        samples: To calibrate with.

    Returns:
        The file's bytes, and the batch size where it could not stay open.

    Raises:
        ExportError: TensorFlow's converter refuses, or a loop can't have the recipe.
    """
    loops = _looping_layers(model)
    with computing_in_float32(model):
        if not loops:
            try:
                return convert(ServingFunction(model, input_signature), recipe, samples), None
            except ExportError as error:
                if LOOP_OPERATION not in str(error):
                    raise
                loops = [f"a loop in {model.name!r}"]  # of a layer that Keras has not made
        if recipe.needs_calibration:
            raise ExportError(
                f"{', '.join(loops)} can't be converted to {recipe.name}: TensorFlow's calibration ends the "
                "process on loops. Nothing was written. Take 'dynamic_int8', which stores weights as int8, "
                "or a recurrent layer with unroll=True."
            )
        return convert(ServingFunction(model, input_signature, batch_size=1), recipe, samples), 1


def _looping_layers(layer: keras.layers.Layer) -> list[str]:
    """The names of the recurrent layers in it that step in a loop."""
    if isinstance(layer, keras.layers.Bidirectional):
        layer = layer.forward_layer
    if isinstance(layer, keras.layers.RNN):
        return [] if layer.unroll else [layer.name]
    inner = [*getattr(layer, "layers", ()), *filter(None, [getattr(layer, "layer", None)])]
    return [name for each in inner for name in _looping_layers(each)]


def convert(serving: ServingFunction, recipe: Recipe, samples: Samples) -> bytes:
    """Runs TensorFlow's converter.

    Raises:
        ExportError: It refused; the text names the layers that its message speaks of.
    """
    with tempfile.TemporaryDirectory() as folder:
        serving.save(folder)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        if recipe.name != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if recipe.name == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if recipe.name == "int8":
            names = [spec.name for spec in serving.specs]
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]

            def rows() -> Iterator[dict[str, np.ndarray]]:
                for row in samples.batches(1):
                    yield dict(zip(names, row, strict=True))

            converter.representative_dataset = rows
        return _run_converter(converter, serving.model)


def _run_converter(converter: Any, model: keras.Model) -> bytes:
    try:
        with warnings.catch_warnings():
            # The converter warns of its own use of tf.lite.Interpreter while it calibrates.
            warnings.filterwarnings("ignore", message=r"\s*Warning: tf.lite.Interpreter is deprecated")
            return converter.convert()
    # The converter's own error class is private, and derives from Exception alone.
    except Exception as error:
        message = str(error)
        # TensorFlow numbers a scope that is entered twice: lstm, lstm_1.
        layers = [
            layer.name for layer in model.layers if re.search(rf"/{re.escape(layer.name)}(_\d+)?/", message)
        ]
        where = f"Layers in its message: {', '.join(layers)}. " if layers else ""
        raise ExportError(
            f"TensorFlow's converter refused {model.name!r}. {where}Its message: {message[:500]}"
        ) from error
