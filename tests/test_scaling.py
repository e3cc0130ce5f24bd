"""What more workers would bring: the formulas against a simulated ring, and a step that is measured."""

import math

import keras
import numpy as np
import pytest

from tfaccel.cli import main
from tfaccel.scaling import (
    Network,
    all_reduce_s,
    gradient_bytes,
    measure_step,
    parse_bandwidth,
    predict_scaling,
)


def simulated_ring_s(size, workers, network):
    """Moves the chunks one by one: every worker holds N, passes one on in each round, adds or copies it."""
    sums = [[{worker} for _ in range(workers)] for worker in range(workers)]
    seconds, rounds = 0.0, 0
    while any(len(chunk) < workers for own in sums for chunk in own):
        moved = [(w, (w - rounds) % workers) for w in range(workers)]
        arriving = [((w + 1) % workers, chunk, set(sums[w][chunk])) for w, chunk in moved]
        for worker, chunk, content in arriving:
            sums[worker][chunk] |= content
        seconds += network.latency_s + size / workers / network.bandwidth
        rounds += 1
    return seconds


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_the_ring_takes_as_long_as_one_that_is_simulated(workers):
    network = Network(bandwidth=1e9, latency_s=1e-4)
    assert math.isclose(all_reduce_s(3e6, workers, network), simulated_ring_s(3e6, workers, network))


def test_devices_of_a_worker_add_their_own_sum():
    flat = Network(1e9)
    deep = Network(1e9, devices=8, local_bandwidth=1e10)
    extra = all_reduce_s(8e6, 4, deep) - all_reduce_s(8e6, 4, flat)
    assert math.isclose(extra, 2 * 7 / 8 * 8e6 / 1e10)


def test_one_worker_is_the_measured_step():
    (alone,) = predict_scaling(20.0, 1e6, [1], Network(1e9))
    assert (alone.step_ms, alone.all_reduce_ms, alone.efficiency, alone.speedup) == (20.0, 0.0, 1.0, 1.0)


def test_efficiency_falls_with_workers_and_rises_with_bandwidth():
    slow = predict_scaling(20.0, 1e8, [2, 8, 64], Network(1e9))
    fast = predict_scaling(20.0, 1e8, [2, 8, 64], Network(1e10))
    assert [row.efficiency for row in slow] == sorted((row.efficiency for row in slow), reverse=True)
    assert all(a.efficiency < b.efficiency for a, b in zip(slow, fast, strict=True))
    assert all(math.isclose(row.speedup, row.workers * row.efficiency) for row in slow)


@pytest.mark.parametrize(
    ("text", "value"),
    [("100Gb/s", 12.5e9), ("12.5 GB/s", 12.5e9), ("1Gbit/s", 1.25e8), ("10Gbps", 1.25e9), ("8kb/s", 1e3)],
)
def test_bandwidth_has_a_unit(text, value):
    assert math.isclose(parse_bandwidth(text), value)


@pytest.mark.parametrize("text", ["100", "fast", "-1Gb/s", "0Gb/s", "1G/s"])
def test_a_bandwidth_without_one_is_refused(text):
    with pytest.raises(ValueError, match=r"bandwidth=.*Allowed.*Name the unit"):
        parse_bandwidth(text)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: predict_scaling(0, 1, [2], Network(1)), "step_ms=0"),
        (lambda: predict_scaling(1, -1, [2], Network(1)), "gradient_bytes=-1"),
        (lambda: predict_scaling(1, 1, [], Network(1)), r"workers=\[\]"),
        (lambda: predict_scaling(1, 1, [0], Network(1)), r"workers=\[0\]"),
        (lambda: Network(0), "bandwidth=0"),
        (lambda: Network(1, -1), "latency_s=-1"),
        (lambda: Network(1, devices=0), "devices=0"),
    ],
)
def test_numbers_out_of_range_are_refused(call, said):
    with pytest.raises(ValueError, match=rf"{said}.*Allowed"):
        call()


def two_inputs():
    words = keras.Input((5,), dtype="int32")
    features = keras.Input((3,))
    text = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(7, 4)(words))
    x = keras.layers.Concatenate()([text, features])
    return keras.Model([words, features], [keras.layers.Dense(2)(x), keras.layers.Dense(1)(x)])


def test_gradients_are_those_of_the_trainable_weights():
    model = two_inputs()
    assert gradient_bytes(model) == 4 * sum(int(np.prod(w.shape)) for w in model.get_weights())
    table = next(layer for layer in model.layers if isinstance(layer, keras.layers.Embedding))
    table.trainable = False
    assert gradient_bytes(model) == 4 * (model.count_params() - table.count_params())


def test_a_step_is_measured_and_the_model_is_left_alone():
    model = two_inputs()
    before = model.get_weights()
    assert measure_step(model, 4, steps=2, epochs=1) > 0
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_model_of_unknown_size_is_refused():
    model = keras.Sequential([keras.Input((None, 3)), keras.layers.GlobalAveragePooling1D()])
    with pytest.raises(ValueError, match="known sizes behind the batch"):
        measure_step(model, 4)


def test_the_command_prints_a_row_for_each_number(tmp_path, capsys):
    two_inputs().save(tmp_path / "model.keras")
    arguments = ["--workers", "8,64", "--bandwidth", "100Gb/s", "--batch-size", "4"]
    assert main(["plan", *arguments, "--model", str(tmp_path / "model.keras")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines if line and line[0].isdigit() and len(line) == 5] == ["8", "64"]


def test_the_command_needs_a_step_to_start_from(capsys):
    assert main(["plan", "--workers", "8"]) == 2
    assert "--step-ms and --gradient-mb" in capsys.readouterr().err
    assert main(["plan", "--workers", "8", "--step-ms", "20", "--gradient-mb", "100"]) == 0


def test_plan_with_a_model_tells_its_memory(tmp_path, capsys):
    model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(1000)])
    model.save(tmp_path / "model.keras")  # not compiled: Adam is taken
    assert main(["plan", "--model", str(tmp_path / "model.keras"), "--batch-size", "64"]) == 0
    estimate, free = capsys.readouterr().out.splitlines()
    assert "at batch size 64: weights 404 kB, optimizer 808 kB, gradients 404 kB, activations" in estimate
    assert "are free on one device here" in free
    assert main(["plan", "--model", str(tmp_path / "model.keras"), "--batch-size", "0"]) == 2
    assert "batch_size=0" in capsys.readouterr().err
