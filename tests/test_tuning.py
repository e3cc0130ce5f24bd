"""`tune`: what it tries, rejects and chooses; that nothing is left of it; its file; bad input."""

import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from distribution_cells import Batches, mirrored

import tfaccel
from tfaccel import cli, tuned_options, tuning_search
from tfaccel.prepare.candidates import Candidate, TrialRow, ways_to_step
from tfaccel.prepare.devices import Devices
from tfaccel.tuned_options import TunedOptions

PLAIN = Candidate(batch_size=24)


@pytest.fixture(autouse=True)
def _short_trials(monkeypatch, tmp_path):
    """Few steps a trial, no precision that not every machine has, and a home of its own."""
    monkeypatch.setattr(tuning_search, "TRIAL_S", 0.01)
    monkeypatch.setattr(tuning_search, "TRIAL_EPOCHS", 3)
    monkeypatch.setattr(tuning_search, "precisions", lambda devices: [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def one_way(monkeypatch):
    """Beside plain Keras only the fused step is tried."""
    monkeypatch.setattr(tuning_search, "ways_to_step", lambda *args: ways_to_step(*args)[:1])


def builder(*layers, counted=None, optimizer=keras.optimizers.Adam):
    def build_model(**compile_options):
        if counted is not None:
            counted.append(compile_options)
        stack = [make() for make in layers]
        model = keras.Sequential([keras.Input((7, 7, 1)), keras.layers.Flatten(), *stack])
        model.add(keras.layers.Dense(10, dtype="float32"))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer(1e-3), loss, metrics=["accuracy"], **compile_options)
        return model

    return build_model


def tune(build_model, data, batch_size=24, **options):
    return tfaccel.tune(build_model, data, batch_size, **{"budget_s": 60, "verbose": 0, **options})


def test_the_whole_search(small, capsys):
    """Every way is measured or said to be hopeless, and the one chosen leads the table."""
    made = []
    dropout = builder(lambda: keras.layers.Dropout(0.2), counted=made)
    tuned = tune(dropout, small, [24, 48], epochs=100, verbose=1)
    assert tuned.rows[0].candidate == PLAIN
    assert {(row.candidate.kernels, row.candidate.jit) for row in tuned.rows} == {
        ("plain", False),
        ("plain", True),
        ("fused", False),
        ("fused", True),
    }
    assert {row.candidate.batch_size for row in tuned.rows} == {24, 48}
    usable = [row for row in tuned.rows if not row.note]
    assert tuned.best in usable
    assert tuned.best.run_s == min(row.run_s for row in usable)
    for row in usable:
        steps = 100 * (10 if row.candidate.batch_size == 24 else 5)
        assert row.run_s == pytest.approx(row.compile_s + steps * row.step_ms / 1e3)
    assert {"jit_compile": False, "steps_per_execution": 32} in made
    assert tuned.speedup > 1
    printed = capsys.readouterr().out
    assert printed.count("ms a step") + printed.count("slow") >= len(tuned.rows)


def test_nothing_is_left_of_it(small, one_way):
    """Random states, seeds of layers to come, their names, the policy, and a model of the user's."""
    found = []
    for look in (False, True):
        keras.utils.set_random_seed(5)
        keras.utils.clear_session(free_memory=False)
        model = builder(lambda: keras.layers.Dropout(0.2))()
        model.fit(*small, batch_size=24, verbose=0)
        if look:
            tune(builder(lambda: keras.layers.Dropout(0.2)), small, cache=False)
        model.fit(*small, batch_size=24, verbose=0)
        drawn = [random.random(), np.random.random(), float(keras.random.normal([]))]
        layer = keras.layers.Dense(3)
        layer.build((None, 4))
        variables = [np.asarray(each) for each in (*model.variables, *model.optimizer.variables)]
        found.append([*drawn, layer.name, layer.kernel.numpy(), *variables, float(tf.random.normal([]))])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


class OnlyInFloat32(keras.layers.Layer):
    """In half precision it gives NaN, or another function."""

    def __init__(self, otherwise):
        super().__init__()
        self.otherwise = otherwise

    def call(self, inputs):
        return inputs if self.compute_dtype == "float32" else inputs * self.otherwise


class NotForXLA(keras.layers.Layer):
    supports_jit = True  # as most layers of users claim

    def call(self, inputs):
        return tf.ensure_shape(tf.py_function(lambda x: x, [inputs], inputs.dtype), inputs.shape)


@pytest.mark.parametrize(
    ("otherwise", "note"), [(np.nan, "its loss is nan"), (30.0, "departs from float32's by")]
)
def test_a_precision_that_changes_the_losses_is_rejected(small, one_way, monkeypatch, otherwise, note):
    monkeypatch.setattr(tuning_search, "precisions", lambda devices: ["mixed_bfloat16"])
    monkeypatch.setattr(Devices, "find", staticmethod(_with_bfloat16))
    tuned = tune(builder(lambda: keras.layers.Dense(8), lambda: OnlyInFloat32(otherwise)), small)
    (row,) = [row for row in tuned.rows if row.candidate.precision == "mixed_bfloat16"]
    assert note in row.note
    assert tuned.chosen.precision == "float32"


def test_a_precision_that_does_not_is_measured(small, one_way, monkeypatch):
    monkeypatch.setattr(tuning_search, "precisions", lambda devices: ["mixed_bfloat16"])
    monkeypatch.setattr(Devices, "find", staticmethod(_with_bfloat16))
    tuned = tune(builder(lambda: keras.layers.Dense(8)), small)
    (row,) = [row for row in tuned.rows if row.candidate.precision == "mixed_bfloat16"]
    assert row.note == ""
    assert row.step_ms > 0


def _with_bfloat16(find=Devices.find):
    return dataclasses.replace(find(), bfloat16=True)


def test_what_fails_is_said_and_the_search_goes_on(small, monkeypatch):
    monkeypatch.setattr(tuning_search, "ways_to_step", lambda *args: ways_to_step(*args)[2:4])
    tuned = tune(builder(NotForXLA), small)
    compiled = [row for row in tuned.rows if row.candidate.jit is True]
    assert compiled
    assert all("failed" in row.note for row in compiled)
    assert not tuned.best.note


def test_what_is_slow_is_stopped(small, monkeypatch):
    """A way whose steps take long ends after a few, and others of its kind are not tried."""

    class Slow(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            time.sleep(0.2)

    train = tuning_search.CandidateRun.train

    def slowly(self, batches, sample, epochs, baseline, *callbacks):
        slow = [Slow()] if self.candidate.jit is True else []
        train(self, batches, sample, epochs, baseline, *slow, *callbacks)

    monkeypatch.setattr(tuning_search.CandidateRun, "train", slowly)
    tuned = tune(builder(), small)
    notes = [row.note for row in tuned.rows if row.candidate.jit is True]
    assert len(notes) == 3
    assert notes[0].startswith("slow")
    assert all(note.startswith("jit=True alone: slow") for note in notes[1:])


def test_a_spent_budget_leaves_what_is_known(small):
    tuned = tune(builder(), small, budget_s=1e-3)
    assert tuned.chosen == PLAIN
    assert tuned.speedup == 1.0
    assert all("not tried" in row.note for row in tuned.rows[1:])


@pytest.mark.parametrize("kind", ["dataset", "py_dataset", "unbuilt"])
def test_other_data_and_models(small, one_way, kind):
    def unbuilt(**options):
        model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(10)])
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
        return model

    given = {
        "dataset": lambda: tf.data.Dataset.from_tensor_slices(small).batch(24),
        "py_dataset": lambda: Batches(*small, 24),
        "unbuilt": lambda: small,
    }[kind]()
    tuned = tune(unbuilt if kind == "unbuilt" else builder(), given, 24 if kind == "unbuilt" else None)
    assert tuned.steps_per_epoch == 10
    assert len([row for row in tuned.rows if not row.note]) == 2


def test_two_replicas(small, one_way):
    strategy = mirrored(2)
    tuned = tune(builder(), small, strategy=strategy)
    assert not any("failed" in row.note for row in tuned.rows)


def test_an_accelerator_takes_it_but_your_word_comes_first(small):
    chosen = Candidate("float32", False, "plain", 4, 48)
    tuned = TunedOptions(chosen, (TrialRow(PLAIN, 2.0, 0, 1), TrialRow(chosen, 1.0, 0, 1)), 1, 1, 1, "")
    accelerator = tfaccel.Accelerator("one_device", tuned=tuned)
    assert accelerator.compile_options() == {"jit_compile": False, "steps_per_execution": 4}
    assert "4.00 ×" in str(accelerator)
    with accelerator.scope():
        model = builder()(**accelerator.compile_options())
    data = accelerator.dataset(*small)
    assert int(data.cardinality()) == 5
    assert int(accelerator.dataset(*small, batch_size=24).cardinality()) == 10
    assert int(accelerator.dataset(tf.data.Dataset.from_tensor_slices(small).batch(24)).cardinality()) == 10
    model.fit(data, verbose=0)
    mine = tfaccel.Accelerator("one_device", jit=True, steps_per_execution=2, tuned=tuned)
    assert mine.compile_options() == {"jit_compile": True, "steps_per_execution": 2}
    assert mine.choices()["jit"].reason == "you asked for it"
    with pytest.raises(ValueError, match="what tfaccel"):
        tfaccel.Accelerator(tuned={"jit": True})


def test_an_earlier_outcome_is_taken(small, one_way, tmp_path):
    made = []
    build_model = builder(counted=made)
    first = tune(build_model, small)
    (path,) = tmp_path.rglob("*.json")
    made.clear()
    assert tune(build_model, small) == first
    assert len(made) == 1
    tune(build_model, small, cache=False)
    assert len(made) > 2
    path.write_text("{")
    made.clear()
    tune(build_model, small)
    assert len(made) > 2
    assert tuned_options.read(path.stem) is not None


def test_what_decides_a_search(small):
    devices, asked = Devices.find(), {"epochs": 1}
    model, wider = builder()(), builder(lambda: keras.layers.Dense(8))()
    sgd = builder(optimizer=keras.optimizers.SGD)()
    dataset = tf.data.Dataset.from_tensor_slices(small).batch(24)
    keys = {
        tuned_options.signature(*arguments)
        for arguments in (
            (model, small, devices, asked),
            (wider, small, devices, asked),
            (sgd, small, devices, asked),
            (model, (small[0], small[1].astype("float32")), devices, asked),
            (model, dataset, devices, asked),
            (model, small, dataclasses.replace(devices, count=7), asked),
            (model, small, devices, {"epochs": 2}),
        )
    }
    assert len(keys) == 7
    again = tuned_options.signature(builder()(), small, devices, asked)
    assert again in keys


def test_settings_of_layers_decide_too_and_addresses_of_losses_do_not():
    def key(strides=1, loss="mse"):
        sequence = [keras.layers.Conv2D(2, 3, strides), keras.layers.GlobalAveragePooling2D()]
        model = keras.Sequential([keras.Input((8, 8, 1)), *sequence])
        model.compile("sgd", loss)
        data = np.zeros((4, 8, 8, 1)), np.zeros((4, 2))
        return tuned_options.signature(model, data, Devices.find(), {})

    assert key() == key()
    assert key(2) != key(1)
    made = keras.losses.MeanSquaredError
    assert key(loss=made()) == key(loss=made())
    assert key(loss=made(reduction="sum")) != key(loss=made())


def test_a_search_that_had_less_time_is_not_taken(small, one_way):
    hurried = tune(builder(), small, budget_s=1e-3)
    assert len(tune(builder(), small).rows) >= len(hurried.rows)
    assert any("not tried" in row.note for row in hurried.rows)
    assert not any("not tried" in row.note for row in tune(builder(), small).rows)


def test_a_home_that_can_not_be_written_to(small, one_way, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert tune(builder(), small).rows


def test_the_table_and_the_file():
    fused = Candidate("float32", True, "fused", "auto", 64)
    bad = Candidate("mixed_float16", True, "fused", "auto", 64)
    rows = (
        TrialRow(PLAIN, 1.5, 0.5, 20),
        TrialRow(fused, 1.0, 2.0, 5),
        TrialRow(bad, note="failed: OpError"),
    )
    tuned = TunedOptions(fused, rows, 10, 100, 12.3, "a machine")
    assert TunedOptions.from_json(tuned.to_json()) == tuned
    assert tuned.speedup == pytest.approx(1.5 * 64 / 24)
    assert tuned.batch_size == 64
    lines = str(tuned).splitlines()
    assert "a machine, batch_size 24, for 10 epochs of 100 steps, in 12 s" in lines[0]
    assert lines[2].startswith(">")
    assert "4.00" in lines[2]
    assert lines[3].endswith("plain Keras")
    assert lines[4].endswith("failed: OpError")
    with pytest.raises(ValueError, match="not written by this version"):
        TunedOptions.from_json('{"format": 0}')


@pytest.mark.parametrize(
    ("given", "options", "text"),
    [
        ("arrays", {"batch_size": 0}, "batch_size=0"),
        ("arrays", {"batch_size": []}, r"batch_size=\[\]"),
        ("arrays", {"budget_s": 0}, "budget_s=0"),
        ("arrays", {"epochs": 0}, "epochs=0"),
        ("arrays", {"steps_per_epoch": 0}, "steps_per_epoch=0"),
        ("dataset", {}, "Leave it out"),
        ("unknown length", {"batch_size": None}, "Pass steps_per_epoch"),
        ("generator", {"batch_size": None}, "would be used up"),
        ("nan", {}, "Look for NaN"),
    ],
)
def test_bad_arguments(small, given, options, text):
    dataset = tf.data.Dataset.from_tensor_slices(small).batch(24)
    data = {
        "arrays": small,
        "dataset": dataset,
        "unknown length": dataset.filter(lambda x, y: True),
        "generator": (each for each in ()),
        "nan": (small[0] * np.nan, small[1]),
    }[given]
    with pytest.raises(ValueError, match=text):
        tune(builder(), data, **options)


def test_bad_functions(small):
    model = builder()()
    for build_model, text in (
        (model, "Pass the function"),
        (lambda **options: model, "a new one at each call"),
        (lambda **options: keras.Sequential([keras.Input((7, 7, 1))]), "a compiled keras.Model"),
        (lambda **options: None, "a compiled keras.Model"),
    ):
        if build_model is model:
            build_model = "model"
        with pytest.raises(ValueError, match=text):
            tune(build_model, small)


def test_several_workers_are_refused():
    """In a process of its own: such a strategy has to be made first of all."""
    script = """
import numpy as np, keras, tfaccel
def build_model(**options):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", **options)
    return model
try:
    tfaccel.tune(build_model, (np.ones((8, 2)), np.ones((8, 1))), strategy="multi_worker", cache=False)
except ValueError as error:
    print("refused:", error)
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    task = {"cluster": {"worker": [address]}, "task": {"type": "worker", "index": 0}}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TF_CONFIG": json.dumps(task)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "tune on one" in done.stdout, done.stderr[-1000:]


SCRIPT = """
import keras

def build_model(**options):
    model = keras.Sequential([keras.Input((7, 7, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
    return model

number = 3
if __name__ == "__main__":
    raise SystemExit("the script was run")
"""


def test_on_the_command_line(small, tmp_path, capsys):
    script, data = tmp_path / "net.py", tmp_path / "data.npz"
    script.write_text(SCRIPT)
    np.savez(data, x_train=small[0], y_train=small[1])
    given = ["tune", str(script), str(data), "--budget-s", "1", "--batch-size", "24,48"]
    assert cli.main(given) == 0
    printed = capsys.readouterr().out
    assert "plain Keras" in printed
    assert "accelerator = tfaccel.Accelerator(precision='float32', jit=" in printed
    np.savez(data, images=small[0])
    for bad, text in (
        (["tune", str(tmp_path / "none.py"), str(data)], "There is no script"),
        (["tune", str(script), str(data)], "has images. Allowed: x and y"),
        ([*given, "--epochs", "0"], "has images"),
    ):
        assert cli.main(bad) == 2
        assert text in capsys.readouterr().err
    np.savez(data, x=small[0], y=small[1])
    assert cli.main(["tune", str(script), str(data), "--function", "number"]) == 2
    assert "Allowed: build_model" in capsys.readouterr().err


def test_a_builder_that_takes_no_compile_options_is_refused(helpers, small):
    def build():
        return helpers.compile(helpers.build())

    with pytest.raises(ValueError, match=r"build does not take the compile options .*def build\(\*\*compile"):
        tfaccel.tune(build, small)
