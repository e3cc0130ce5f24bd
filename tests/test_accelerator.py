"""The accelerator: its scope, its options, its refusals, and that it changes no result."""

import itertools
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel
from tfaccel.prepare.devices import Devices


def test_plain_kernels_compile_as_keras_does():
    options = tfaccel.Accelerator(kernels="plain", jit=False).compile_options()
    assert options == {"jit_compile": False, "steps_per_execution": 1}


CELLS = [
    # Every pair of two axes occurs.
    ("one_device", "float32", False, 1, "sequential", "arrays"),
    ("one_device", "float32", True, 5, "functional", "dataset"),
    ("one_device", "mixed_bfloat16", False, 5, "subclassed", "arrays"),
    ("one_device", "mixed_bfloat16", True, 1, "sequential", "dataset"),
    ("one_device", "mixed_float16", False, 5, "sequential", "dataset"),
    ("one_device", "mixed_float16", True, 1, "subclassed", "arrays"),
    ("one_device", "mixed_float16", False, 1, "functional", "dataset"),
    ("mirrored", "float32", False, 1, "subclassed", "dataset"),
    ("mirrored", "mixed_bfloat16", False, 1, "functional", "arrays"),
    ("mirrored", "mixed_float16", True, 5, "sequential", "dataset"),
]
SCHEDULED = (1, 2, 4, 5, 8)  # each value of each axis occurs with a schedule and without
TOLERANCE = {"float32": 2e-6, "mixed_bfloat16": 2e-2, "mixed_float16": 5e-3}


@pytest.mark.parametrize(
    ("strategy", "precision", "jit", "steps", "kind", "data", "schedule"),
    [(*cell, number in SCHEDULED) for number, cell in enumerate(CELLS)],
)
def test_axes_multiply(helpers, small, strategy, precision, jit, steps, kind, data, schedule):
    x, y = small

    def callbacks():
        return [tfaccel.OneCycle(2e-3), tfaccel.Throughput()] if schedule else []

    plain = helpers.compile(helpers.build(kind))
    plain.fit(x, y, batch_size=24, epochs=2, shuffle=False, verbose=0, callbacks=callbacks())
    accelerator = tfaccel.Accelerator(strategy, _allowed(precision), jit, steps_per_execution=steps)
    with accelerator.scope():
        model = helpers.compile(helpers.build(kind), **accelerator.compile_options())
    arguments = {"epochs": 2, "verbose": 0, "callbacks": callbacks()}
    if data == "arrays":
        model.fit(x, y, batch_size=24, shuffle=False, **arguments)
    else:
        model.fit(accelerator.dataset(x, y, batch_size=24, shuffle=False), **arguments)
    # Adam moves a weight by at most about the rate: 20 steps of 2e-3. The tolerance is the part of it
    # that rounding decides: 24, 8 or 11 bits of the gradient.
    for a, b in zip(plain.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE[precision])


def _allowed(precision):
    """A policy object is taken as it is: the CPU of a test machine may lack float16."""
    return keras.DTypePolicy(precision)


def test_cells_cover_every_pair():
    values = [sorted({cell[i] for cell in CELLS}, key=str) for i in range(6)]
    for i, j in itertools.combinations(range(6), 2):
        for pair in itertools.product(values[i], values[j]):
            assert any((cell[i], cell[j]) == pair for cell in CELLS) or {i, j} & {4, 5}, pair


@pytest.mark.parametrize(
    "arguments",
    [{"jit": True}, {"steps_per_execution": 4}],
    ids=["jit", "steps"],
)
def test_cells_that_keras_cannot_run_are_refused_at_construction(arguments):
    with pytest.raises(ValueError, match="CentralStorageStrategy"):
        tfaccel.Accelerator(central_storage(), "float32", **arguments)


def central_storage():
    """A strategy whose replicas share their variables: none of the fixes acts there."""
    return tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"])


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.Adam(gradient_accumulation_steps=2),
        lambda: keras.optimizers.Adam(use_ema=True, ema_overwrite_frequency=2),
    ],
    ids=["accumulation", "ema"],
)
def test_optimizers_that_keras_cannot_mirror_are_refused_at_compile(helpers, optimizer):
    accelerator = tfaccel.Accelerator(central_storage(), "float32")
    with accelerator.scope(), pytest.raises(ValueError, match=r"merge_call|replicas"):
        helpers.compile(helpers.build(), optimizer(), **accelerator.compile_options())


def test_scope_restores_the_policy_and_compile():
    before = keras.Model.compile
    accelerator = tfaccel.Accelerator("one_device", "mixed_bfloat16")
    with accelerator.scope() as entered:
        assert entered is accelerator
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
        assert keras.Model.compile is not before
    assert keras.config.dtype_policy().name == "float32"
    assert keras.Model.compile is before


def test_scope_restores_after_an_exception():
    before = keras.Model.compile
    accelerator = tfaccel.Accelerator("mirrored", "mixed_bfloat16")
    with pytest.raises(ZeroDivisionError), accelerator.scope():
        raise ZeroDivisionError
    assert keras.config.dtype_policy().name == "float32"
    assert keras.Model.compile is before
    assert not tf.distribute.has_strategy()


def test_scopes_nest_and_can_be_entered_again():
    outer = tfaccel.Accelerator("one_device", "mixed_bfloat16")
    inner = tfaccel.Accelerator("one_device", "float32")
    for _ in range(2):
        with outer.scope():
            with inner.scope():
                assert keras.config.dtype_policy().name == "float32"
            assert keras.config.dtype_policy().name == "mixed_bfloat16"


def test_a_model_built_outside_is_refused_under_another_policy(helpers):
    model = helpers.build()
    with (
        tfaccel.Accelerator("one_device", "mixed_bfloat16").scope(),
        pytest.raises(ValueError, match=r"built outside of this scope.*float32.*mixed_bfloat16"),
    ):
        helpers.compile(model)


def test_a_model_built_outside_is_refused_under_another_strategy(helpers):
    model = helpers.build()
    with (
        tfaccel.Accelerator("mirrored", "float32").scope(),
        pytest.raises(ValueError, match=r"built outside of this scope.*MirroredStrategy"),
    ):
        helpers.compile(model)


def test_a_model_built_outside_is_fine_where_nothing_differs(helpers, small):
    model = helpers.build()
    with tfaccel.Accelerator("one_device", "float32").scope():
        helpers.compile(model)
    model.fit(*small, verbose=0)


def test_a_float32_head_in_a_mixed_model_is_fine(helpers):
    with tfaccel.Accelerator("one_device", "mixed_bfloat16").scope():
        model = helpers.build()
        model.add(keras.layers.Dense(3, dtype="float32"))
        helpers.compile(model)


def test_float16_on_a_device_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(Devices, "find", staticmethod(lambda: Devices("cpu", 1, ("CPU",))))
    with pytest.raises(ValueError, match=r"precision='mixed_float16'.*no float16"):
        tfaccel.Accelerator(precision="mixed_float16")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"strategy": "ddp"}, "strategy='ddp'"),
        ({"precision": "half"}, "precision='half'"),
        ({"jit": "maybe"}, "jit='maybe'"),
        ({"kernels": "fast"}, "kernels='fast'"),
        ({"steps_per_execution": 0}, "steps_per_execution=0"),
        ({"strategy": "tpu"}, "no sign of a TPU"),
        ({"strategy": "multi_worker"}, "TF_CONFIG"),
    ],
)
def test_bad_arguments_say_what_is_allowed(arguments, text):
    with pytest.raises(ValueError, match=text) as caught:
        tfaccel.Accelerator(**arguments)
    assert "Allowed" in str(caught.value)


def test_every_choice_is_printed_with_its_reason():
    accelerator = tfaccel.Accelerator()
    text = str(accelerator)
    for name, choice in accelerator.choices().items():
        assert name in text
        assert choice.reason in text
    assert str(accelerator.devices) in text


def test_making_one_is_instant_even_where_a_tpu_is_only_named():
    """In a process of its own: the variable must be there before devices are looked up."""
    script = (
        "import time, tfaccel; t = time.perf_counter(); a = tfaccel.Accelerator('one_device'); "
        "print(time.perf_counter() - t, a.devices.tpu_environment)"
    )
    environment = {**os.environ, "TPU_NAME": "grpc://127.0.0.1:9"}
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    seconds, signs = answer.stdout.split(maxsplit=1)
    assert float(seconds) < 5
    assert "TPU_NAME" in signs


def test_another_backend_is_refused():
    script = (
        "import keras; keras.backend.backend = lambda: 'jax'; import tfaccel\n"
        "try: tfaccel.Accelerator()\nexcept ValueError as e: print(e)"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "'jax'" in answer.stdout
    assert "KERAS_BACKEND=tensorflow" in answer.stdout


def test_tf_config_with_one_worker_stays_on_one_device():
    config = json.dumps({"cluster": {"worker": ["127.0.0.1:1"]}, "task": {"type": "worker", "index": 0}})
    script = "import tfaccel; print(tfaccel.Accelerator().show('strategy'))"
    answer = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=True, env={**os.environ, "TF_CONFIG": config},
    )  # fmt: skip
    assert answer.stdout.strip() == "one_device"
