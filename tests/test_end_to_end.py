"""The user's script of the README, on the real sample, from arrays to a file that was proven."""

import subprocess
import sys

import keras
import numpy as np
import pytest

import tfaccel


def build_model():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 3, strides=2, activation="relu"),
            layers.Conv2D(32, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """The script as a user has it after the diff."""
    path = tmp_path_factory.mktemp("run") / "model.tflite"
    x_train, y_train, x_test, y_test = (images[k] for k in ("x_train", "y_train", "x_test", "y_test"))
    keras.utils.set_random_seed(0)
    accelerator = tfaccel.Accelerator()
    with accelerator.scope():
        model = build_model()
        model.compile(
            "adam",
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            **accelerator.compile_options(),
        )
    export = tfaccel.ExportTFLite(path, "int8", calibration=x_train, evaluate=(x_test, y_test), max_drop=0.03)
    history = model.fit(
        accelerator.dataset(x_train, y_train, batch_size=64),
        epochs=4,
        validation_data=(x_test, y_test),
        verbose=0,
        callbacks=[tfaccel.OneCycle(max_learning_rate=1e-2), tfaccel.Throughput(), export],
    )
    return model, history.history, export.file


def test_it_learns(run):
    assert run[1]["val_accuracy"][-1] > 0.78  # chance is 0.1; this small network ends near 0.83


def test_the_logs_tell_rate_and_speed(run):
    assert {"learning_rate", "examples_per_s", "step_ms", "input_wait"} <= set(run[1])


def test_the_file_was_proven(run, images):
    model, _, file = run
    assert file.score.drop <= 0.03
    assert file.score.samples == 1000
    again = tfaccel.compare(model, file.path, images["x_test"])
    assert again.top1_agreement > 0.95


def test_the_model_is_plain_again(run):
    model, _, _ = run
    # What stays is what `compile` in the scope put there: the kernels, not the schedule's watch on the fit.
    assert model.make_train_function.__func__.__qualname__ == "Kernels.make_train_function"
    assert "update_step" not in vars(model.optimizer)
    assert "apply" not in vars(model.optimizer)
    assert all(variable.constraint is None for variable in model.trainable_variables)
    assert keras.config.dtype_policy().name == "float32"


def test_it_loads_where_tfaccel_is_not(run, tmp_path, images):
    model = run[0]
    path = tmp_path / "m.keras"
    model.save(path)
    np.save(tmp_path / "x.npy", images["x_test"][:5])
    script = (
        "import sys, keras, numpy as np; sys.modules['tfaccel'] = None; "
        f"m = keras.models.load_model({str(path)!r}); x = np.load({str(tmp_path / 'x.npy')!r}); "
        f"np.save({str(tmp_path / 'y.npy')!r}, m.predict(x, verbose=0))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    # Another process, the same operations: equal to float32 rounding of sums of a thousand terms.
    np.testing.assert_allclose(
        np.load(tmp_path / "y.npy"), model.predict(images["x_test"][:5], verbose=0), atol=1e-4
    )
