"""Accuracy, size and latency of every recipe on trained CIFAR-10 nets, against the engines alone.

Claim: on the whole test set (10,000 images) tfaccel's files are as accurate as the float nets to a few tenths
of a point, four bits included, and `recipe="auto"` with max_drop=0.002 holds that.

    python benchmarks/ptq_accuracy.py            # the first run trains both nets: half an hour

TensorFlow's converter and ai-edge-quantizer run as their own documentation shows, on the same 500 calibration
images. Latency is the median of 200 runs of one image on one thread.
"""

import argparse
import contextlib
import io
import pathlib
import tempfile

import _image_models
import numpy as np
import tensorflow as tf
from _report import print_row

import tfaccel
from tfaccel.export.interpreter import TFLiteRunner

CALIBRATION = 500
RECIPES = ("float32", "float16", "weight_only_int8", "dynamic_int8", "int4_weights", "int8", "int16x8")


def main() -> None:
    """Prints a line of JSON for each file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=_image_models.NAMES, choices=_image_models.NAMES)
    options = parser.parse_args()
    for name in options.models:
        model, data = _image_models.trained(name)
        calibration = data["x_train"][:CALIBRATION]
        test = data["x_test"], data["y_test"]
        with tempfile.TemporaryDirectory() as folder:
            for source, recipe, path in files(model, calibration, test, pathlib.Path(folder)):
                report(name, source, recipe, path, model, data)


def files(model, calibration, test, folder):
    """Yields the files, each by its maker and recipe."""
    path = folder / "m.tflite"
    for recipe in RECIPES:
        tfaccel.export_tflite(model, path, recipe, calibration=calibration)
        yield "tfaccel", recipe, path
    for minimize in ("size", "latency"):
        auto = tfaccel.AutoRecipe(minimize)
        tfaccel.export_tflite(model, path, auto, calibration=calibration, evaluate=test, max_drop=0.002)
        file = tfaccel.TFLiteFile.load(path)
        yield "tfaccel", f"auto ({minimize}): {file.recipe}, {len(file.layers)} layers otherwise", path
    for recipe in ("dynamic_int8", "int8", "int16x8"):
        path.write_bytes(converter_alone(model, calibration, recipe))
        yield "TFLiteConverter", recipe, path
    for recipe in ("weight_only_int8", "dynamic_int8", "int4_weights", "int8", "int16x8"):
        path.write_bytes(quantizer_alone(model, calibration, recipe))
        yield "ai-edge-quantizer", recipe, path


def converter_alone(model, calibration, recipe):
    """As https://ai.google.dev/edge/litert/conversion/tensorflow/quantization/post_training_quantization."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if recipe != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if recipe in ("int8", "int16x8"):
        kinds = tf.lite.OpsSet
        converter.representative_dataset = lambda: ([row[None]] for row in calibration)
        converter.target_spec.supported_ops = [
            kinds.TFLITE_BUILTINS_INT8
            if recipe == "int8"
            else kinds.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
        ]
    with contextlib.redirect_stdout(io.StringIO()):  # Keras tells where it saved
        return converter.convert()


def quantizer_alone(model, calibration, recipe):
    """As https://github.com/google-ai-edge/ai-edge-quantizer."""
    from ai_edge_quantizer import quantizer
    from ai_edge_quantizer import recipe as recipes

    found = {
        "weight_only_int8": recipes.weight_only_wi8_afp32,
        "dynamic_int8": recipes.dynamic_wi8_afp32,
        "int4_weights": recipes.dynamic_wi4_afp32,
        "int8": recipes.static_wi8_ai8,
        "int16x8": recipes.static_wi8_ai16,
    }[recipe]()
    content = converter_alone(model, calibration, "float32")
    work = quantizer.Quantizer(content, found)
    (name,) = TFLiteRunner(content).input_names
    ranges = None
    if work.need_calibration:
        ranges = work.calibrate({"serving_default": [{name: row[None]} for row in calibration]})
    return bytes(work.quantize(ranges).quantized_model)


def report(name, source, recipe, path, model, data):
    """Prints what is measured of a file."""
    runner = TFLiteRunner(path, num_threads=2)
    batches = np.split(data["x_test"], 20)
    scores = [next(iter(runner.run((batch,)).values())) for batch in batches]
    latency = tfaccel.benchmark_tflite(path)
    print_row(
        benchmark="ptq_accuracy",
        model=name,
        source=source,
        recipe=recipe,
        accuracy=round(float(np.mean(np.concatenate(scores).argmax(-1) == data["y_test"])), 4),
        sqnr_db=round(tfaccel.compare(model, path, data["x_test"][:1000]).sqnr_db, 1),
        size_bytes=latency.size_bytes,
        latency_us=round(1000 * latency.median_ms),
    )


if __name__ == "__main__":
    main()
