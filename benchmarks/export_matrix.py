"""Models × precision policies × recipes: does it convert, does it run, how exact, how large, how fast?

Claim: no cell fails that LiteRT supports. Beside each model stands whether the converter alone takes it.

    python benchmarks/export_matrix.py           # a quarter of an hour
    python benchmarks/export_matrix.py --models lstm mobilenet_v2

Weights are random (Keras's initializers, seed 0) and so are the samples: figures are of the conversion, not
of a trained model. Latency is of one sample on one thread; `model.predict` is of one sample too. The models
of keras.applications get fewer recipes and policies, since each conversion takes them 5 to 20 seconds.
"""

import argparse
import contextlib
import io
import math
import tempfile
import time
import warnings

import keras
import numpy as np
import tensorflow as tf
from _report import print_row
from keras import layers

import tfaccel

POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")
RECIPES = ("float32", "float16", "weight_only_int8", "dynamic_int8", "int4_weights", "int8", "int16x8")
# What the large models get.
FEW_RECIPES, FEW_POLICIES = ("float32", "dynamic_int8", "int8"), ("mixed_bfloat16",)
APPLICATIONS = {
    "mobilenet_v2": keras.applications.MobileNetV2,
    "mobilenet_v3": keras.applications.MobileNetV3Small,
    "efficientnet_v2_b0": keras.applications.EfficientNetV2B0,
    "resnet_50": keras.applications.ResNet50,
    "densenet_121": keras.applications.DenseNet121,
    "convnext_tiny": keras.applications.ConvNeXtTiny,
}


def _stack(shape, *parts, dtype="float32"):
    return keras.Sequential([keras.Input(shape, dtype=dtype), *parts])


def _attention():
    inputs = keras.Input((32, 32))
    x = layers.LayerNormalization()(inputs + layers.MultiHeadAttention(4, 8)(inputs, inputs))
    x = x + layers.Dense(32)(layers.Dense(64, activation="gelu")(x))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))


def _causal():
    inputs = keras.Input((16,), dtype="int32")
    x = layers.Embedding(100, 32)(inputs)
    x = layers.LayerNormalization()(x + layers.GroupQueryAttention(8, 4, 2)(x, x, use_causal_mask=True))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))


SMALL = {
    "mlp": lambda: _stack((64,), layers.Dense(64, activation="relu"), layers.Dense(10)),
    "cnn": lambda: _stack(
        (28, 28, 1),
        layers.Conv2D(16, 3, activation="relu"),
        layers.BatchNormalization(),
        layers.Conv2D(32, 3, strides=2, activation="relu"),
        layers.Flatten(),
        layers.Dense(10),
    ),
    "transformer block": _attention,
    "causal decoder": _causal,
    "lstm": lambda: _stack((32, 16), layers.LSTM(32), layers.Dense(10)),
    "gru, bidirectional": lambda: _stack((32, 16), layers.Bidirectional(layers.GRU(32)), layers.Dense(10)),
    "convlstm": lambda: _stack((8, 16, 16, 3), layers.ConvLSTM2D(8, 3), layers.Flatten(), layers.Dense(10)),
    "group norm, transposed": lambda: _stack(
        (16, 16, 8), layers.GroupNormalization(4), layers.Conv2DTranspose(8, 3, strides=2)
    ),
    "preprocessing": lambda: _stack(
        (32, 32, 3), layers.Rescaling(1 / 255), layers.Resizing(24, 24), layers.SeparableConv2D(16, 3)
    ),
}
MODELS = (*SMALL, *APPLICATIONS)


def build(name: str, policy: str) -> keras.Model:
    """The model, its layers under a policy."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    try:
        if name in SMALL:
            return SMALL[name]()
        return APPLICATIONS[name](weights=None, input_shape=(32, 32, 3), classes=10)
    finally:
        keras.config.set_dtype_policy("float32")


def samples(model: keras.Model, rows: int = 64) -> np.ndarray:
    """Random ones, of the first input's type."""
    generator = np.random.default_rng(0)
    spec = model.inputs[0]
    shape = (rows, *spec.shape[1:])
    whole = spec.dtype.startswith("int")
    return generator.integers(0, 100, shape) if whole else generator.random(shape, dtype="float32")


def converter_alone(model: keras.Model) -> str:
    """ "yes", or the first words of what TensorFlow's converter says."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Keras tells where it saved
            content = tf.lite.TFLiteConverter.from_keras_model(model).convert()
        tfaccel.export.interpreter.TFLiteRunner(content)
    except Exception as error:  # the converter's own class is private
        return f"no: {str(error).strip().splitlines()[0][:60]}"
    return "yes"


def predict_ms(model: keras.Model, x: np.ndarray) -> float:
    """`model.predict` on one sample, the median of five."""
    model.predict(x[:1], verbose=0)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        model.predict(x[:1], verbose=0)
        times.append(1000 * (time.perf_counter() - begun))
    return float(np.median(times))


def main() -> None:
    """Prints a line of JSON for each cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--policies", nargs="+", default=POLICIES, choices=POLICIES)
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # that random samples look like noise
    for name in options.models:
        small = name in SMALL
        for policy in options.policies if small else set(options.policies) & set(FEW_POLICIES):
            model = build(name, policy)
            x = samples(model)
            alone, plain_ms = converter_alone(model), predict_ms(model, x)
            for recipe in RECIPES if small else FEW_RECIPES:
                row = cell(model, x, recipe)
                print_row(
                    benchmark="export_matrix",
                    model=name,
                    policy=policy,
                    recipe=recipe,
                    converter_alone=alone,
                    predict_ms=round(plain_ms, 1),
                    **row,
                )


def cell(model: keras.Model, x: np.ndarray, recipe: str) -> dict[str, object]:
    """What is measured of one file."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        try:
            file = tfaccel.export_tflite(model, f"{folder}/m.tflite", recipe, calibration=x)
        except (tfaccel.ExportError, ValueError) as error:
            return {"works": False, "why": str(error)[:300]}
        latency = tfaccel.benchmark_tflite(file.path, runs=50)
        sqnr_db = file.parity.sqnr_db
        return {
            "works": True,
            "sqnr_db": round(sqnr_db, 1) if math.isfinite(sqnr_db) else "exact",
            "size_bytes": file.size_bytes,
            "latency_ms": round(latency.median_ms, 3),
            "in_floats": len(file.float_operations),
            "batch_size": file.batch_size,
            "export_s": round(time.perf_counter() - begun, 1),
        }


if __name__ == "__main__":
    main()
