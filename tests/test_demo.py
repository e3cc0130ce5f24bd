"""The demo: its data checks, its result, its table, Ctrl-C, and the command line around it."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

import tfaccel
from tfaccel import cli, terminal
from tfaccel.demo import images as images_module
from tfaccel.demo.images import load_images, sample_path
from tfaccel.demo.run import KEYS, run_demo
from tfaccel.demo.training import TrainingClock, accuracy_of_both, build_from_seed, build_model


def few(images, train=400, test=100):
    """The first images of the sample, for a short run."""
    parts = {"train": train, "test": test}
    return {name: array[: parts[name.split("_")[1]]] for name, array in images.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run through all stages."""
    reports = []
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    result = run_demo(
        few(load_images()),
        folder,
        plain_epochs=3,
        epochs=2,
        report=lambda stage, text, done: reports.append((stage, text, done)),
    )
    return result, folder, reports


def test_sample_is_small_real_and_balanced(images):
    assert sample_path().stat().st_size < 3_000_000
    assert images["x_train"].shape == (5000, 28, 28, 1)
    assert images["x_test"].shape == (1000, 28, 28, 1)
    assert 0 == images["x_train"].min() < images["x_train"].max() == 1
    assert np.bincount(images["y_train"]).min() > 400


def test_sample_is_the_first_images_of_the_real_data(images):
    path = pathlib.Path(os.environ.get("TFACCEL_DATA", "~/.cache/tfaccel/data")).expanduser()
    if not (path / "fashion_mnist.npz").exists():
        pytest.skip("the full data set is not in the cache")
    with np.load(path / "fashion_mnist.npz") as real:
        np.testing.assert_allclose(images["x_train"][..., 0], real["x_train"][:5000] / np.float32(255))
        np.testing.assert_array_equal(images["y_test"], real["y_test"][:1000])


def test_every_figure_is_there(finished):
    result, _, _ = finished
    assert result.finished
    assert tuple(result.figures) == KEYS
    assert all(value is not None for value in result.figures.values())
    assert result.figures["tflite_bytes"] < result.figures["float_bytes"]
    assert 0 <= result.figures["top1_agreement"] <= 1
    assert set(result.examples_per_s) == {"plain", "accelerated"}


def test_files_are_there_and_whole(finished):
    result, folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.keras", "model_float32.tflite", "model_int8.tflite"}
    assert (folder / "model_int8.tflite").stat().st_size == result.figures["tflite_bytes"]


def test_accuracy_of_the_files_is_that_of_the_loaded_model(finished, images):
    import keras

    result, folder, _ = finished
    test = few(images)["x_test"], few(images)["y_test"]
    model = keras.models.load_model(folder / "model.keras")
    assert model.evaluate(*test, verbose=0)[1] == pytest.approx(result.figures["accelerated_accuracy"])
    file = tfaccel.compare(model, folder / "model_int8.tflite", test)
    assert file.top1_agreement == result.figures["top1_agreement"]


def test_progress_is_reported_for_each_stage(finished):
    stages = {}
    for stage, _, done in finished[2]:
        assert done >= stages.get(stage, 0)
        stages[stage] = done
    assert stages == {"plain Keras": 1.0, "accelerated": 1.0, "export": 1.0}


def test_both_runs_begin_with_the_same_weights():
    first, second = (build_from_seed(lambda: build_model((28, 28, 1), 10), 3) for _ in range(2))
    for a, b in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_clock_counts_training_and_not_validation(helpers, small):
    import keras

    class Slow(keras.callbacks.Callback):
        def on_test_end(self, logs=None):
            time.sleep(0.5)

    model = helpers.compile(helpers.build())
    clock = TrainingClock(time.perf_counter())
    started = time.perf_counter()
    model.fit(*small, epochs=4, validation_data=small, verbose=0, callbacks=[Slow(), clock])
    whole = time.perf_counter() - started
    assert len(clock.seconds) == len(clock.accuracies) == 4
    assert clock.seconds == sorted(clock.seconds)
    assert whole - clock.seconds[-1] >= 4 * 0.5
    assert clock.seconds_to(0.0) == clock.seconds[0]
    assert clock.seconds_to(1.1) is None


def clock_of(*epochs):
    """A clock that has seen these pairs of seconds and accuracy."""
    clock = TrainingClock(0.0)
    clock.seconds, clock.accuracies = map(list, zip(*epochs, strict=True))
    return clock


def test_times_are_compared_at_an_accuracy_that_both_reached():
    higher = clock_of((1.0, 0.5), (2.0, 0.8), (3.0, 0.9))
    lower = clock_of((0.5, 0.6), (0.8, 0.75), (1.0, 0.7))
    for one, other in ((higher, lower), (lower, higher)):
        assert accuracy_of_both(one, other) == 0.75
    assert (higher.seconds_to(0.75), lower.seconds_to(0.75)) == (2.0, 0.8)


def test_speedup_is_the_ratio_of_the_times_to_the_same_accuracy(finished):
    figures = finished[0].figures
    assert figures["speedup"] == figures["plain_seconds"] / figures["accelerated_seconds"]
    assert figures["target_accuracy"] <= figures["plain_accuracy"]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(terminal.training_table(finished[0]))
    assert "–" not in console.export_text()


def test_interrupt_keeps_what_is_known(images, tmp_path, capsys):
    def interrupt(stage, text, done):
        if stage == "accelerated":
            raise KeyboardInterrupt

    result = run_demo(few(images), tmp_path, plain_epochs=1, epochs=2, report=interrupt)
    assert not result.finished
    assert result.figures["plain_accuracy"] is not None
    assert result.figures["tflite_bytes"] is None
    assert list(tmp_path.iterdir()) == []
    terminal.print_demo(result, tmp_path)
    out = capsys.readouterr().out
    assert "Interrupted" in out
    assert "–" in out


@pytest.mark.slow
def test_a_real_ctrl_c_prints_partial_results_and_leaves_no_half_file(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "tfaccel", "demo", "--json", "--output", str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell that starts CI in the background has it ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert set(json.loads(out.strip().splitlines()[-1])) == set(KEYS)
    assert all(not path.name.startswith(".") for path in (tmp_path / "out").iterdir())


@pytest.mark.slow
def test_the_whole_demo_on_the_command_line(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-m", "tfaccel", "demo", "--json", "--output", str(tmp_path)],
        capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    figures = json.loads(answer.stdout)
    assert tuple(figures) == KEYS
    assert figures["plain_accuracy"] > 0.8
    assert figures["accelerated_accuracy"] > 0.8
    # int8 may cost a point; the file must still be the model.
    assert figures["tflite_accuracy"] > figures["accelerated_accuracy"] - 0.02
    assert figures["top1_agreement"] > 0.95
    assert figures["tflite_latency_ms"] < figures["keras_latency_ms"]


def save(path, **changes):
    data = {
        "x_train": np.zeros((20, 20, 20), "uint8"), "y_train": np.arange(20) % 4,
        "x_test": np.zeros((5, 20, 20), "uint8"), "y_test": np.arange(5) % 4, **changes,
    }  # fmt: skip
    np.savez(path, **{k: v for k, v in data.items() if v is not None})
    return path


def test_own_data_is_taken(tmp_path):
    data = load_images(save(tmp_path / "d.npz", y_train=(np.arange(20) % 4)[:, None]))
    assert data["x_train"].shape == (20, 20, 20, 1)
    assert data["y_train"].shape == (20,)


BAD_DATA = [
    ({"y_test": np.array([0, 1, 2, 3, 4])}, r"y_test has labels 0..4.*4 classes"),
    ({"y_train": np.arange(20) - 1}, r"y_train has labels -1"),
    ({"y_train": np.full(20, 1000)}, "no more classes than labels"),
    ({"y_train": np.zeros(20)}, "dtype float64"),
    ({"y_train": np.zeros(19, int)}, "19 labels for 20 images"),
    ({"x_train": None}, "has no x_train"),
    ({"x_train": np.zeros((20, 8, 8))}, "height and width"),
    ({"x_train": np.zeros((0, 20, 20))}, "at least one image"),
    ({"x_train": np.zeros(20)}, "shape"),
    ({"x_train": np.full((20, 20, 20), "a")}, "numbers"),
    ({"x_train": np.full((20, 20, 20), np.nan)}, "NaN"),
    ({"x_test": np.zeros((5, 24, 24))}, "one shape for both"),
]


@pytest.mark.parametrize(("changes", "text"), BAD_DATA)
def test_bad_data_is_refused(tmp_path, changes, text):
    with pytest.raises(ValueError, match=text):
        load_images(save(tmp_path / "d.npz", **changes))


def test_files_that_are_no_archive(tmp_path):
    (tmp_path / "d.npz").write_bytes(b"PK\x03\x04 broken")
    (tmp_path / "e.npy").write_bytes(b"")
    np.save(tmp_path / "f.npy", np.zeros(3))
    for name in ("none.npz", "d.npz", "e.npy", "f.npy"):
        with pytest.raises(ValueError, match="can't be read"):
            load_images(tmp_path / name)


def run_cli(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_cli_refuses_bad_data_before_training(tmp_path, capsys):
    path = save(tmp_path / "d.npz", y_test=np.array([0, 1, 2, 3, 9]))
    assert run_cli("demo", "--data", path, "--output", tmp_path / "out") == 2
    assert "y_test has labels" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_cli_refuses_an_unwritable_output(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    path = save(tmp_path / "d.npz")
    assert run_cli("demo", "--data", path, "--output", tmp_path / "file" / "out") == 2
    assert "can't be written" in capsys.readouterr().err


def test_cli_plan_and_devices(capsys):
    assert run_cli("devices", "--json") == 0
    assert json.loads(capsys.readouterr().out)["count"] >= 1
    assert run_cli("plan", "--precision", "mixed_bfloat16") == 0
    text = capsys.readouterr().out
    for name in tfaccel.Accelerator().choices():
        assert name in text
    assert "mixed_bfloat16" in text
    assert run_cli("plan", "--strategy", "tpu") == 2


def test_cli_export_compare_bench(finished, images, tmp_path, capsys):
    _, folder, _ = finished
    samples = tmp_path / "samples.npz"
    np.savez(samples, x=few(images)["x_test"], y=few(images)["y_test"])
    target = tmp_path / "m.tflite"
    model = folder / "model.keras"
    arguments = ["--recipe", "int8", "--calibration", samples, "--max-drop", "0.5"]
    assert run_cli("export", model, target, *arguments) == 0
    assert "accuracy 0." in capsys.readouterr().out
    assert run_cli("compare", model, target, samples) == 0
    assert "top-1 agreement" in capsys.readouterr().out
    assert run_cli("bench", target, "--runs", 5) == 0
    assert "5 runs" in capsys.readouterr().out


def test_cli_failures_have_their_exit_codes(finished, tmp_path, capsys):
    _, folder, _ = finished
    assert run_cli("bench", tmp_path / "none.tflite") == 1
    (tmp_path / "broken.tflite").write_bytes(b"x" * 100)
    assert run_cli("bench", tmp_path / "broken.tflite") == 1
    assert run_cli("export", folder / "model.keras", tmp_path / "m.tflite", "--recipe", "int8") == 2
    assert run_cli("compare", folder / "model.keras", "m.tflite", tmp_path / "none.npz") == 2
    np.savez(tmp_path / "other.npz", z=np.zeros(3))
    assert run_cli("compare", folder / "model.keras", "m.tflite", tmp_path / "other.npz") == 2
    with pytest.raises(SystemExit):
        run_cli("unknown")
    capsys.readouterr()


def test_module_and_sample_lie_in_the_package():
    assert pathlib.Path(images_module.__file__).parent.parent == pathlib.Path(tfaccel.__file__).parent
