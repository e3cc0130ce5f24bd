"""Every strategy gives what one device gives: precision, XLA, accumulation, clipping, data… crossed pairwise.

The oracle is plain Keras on one device, step by step and without XLA. A cell is equal within a derived
bound, or it is refused before the first step.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

import distribution_cells
import numpy as np
import pytest
import tensorflow as tf
from distribution_cells import AXES, pairwise, plain, refusal

CELLS = pairwise()
RAN = {"equal": 0, "refused": 0}
SCRIPT = pathlib.Path(distribution_cells.__file__)


def cell_id(number):
    return "-".join(str(value) for value in CELLS[number].values())


@pytest.fixture(scope="module")
def strategies():
    return {
        "one_device_strategy": tf.distribute.OneDeviceStrategy("CPU:0"),
        "mirrored2": distribution_cells.mirrored(2),
    }


def start(arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(SCRIPT), *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def load(path):
    results = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            number, name = key.split("/")
            results.setdefault(int(number), {})[name] = arrays[key]
    return results


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The cells that need processes of their own: four devices, and two workers; by strategy, a list each."""
    folder = tmp_path_factory.mktemp("cells")
    workers = [f"127.0.0.1:{port}" for port in free_ports(2)]
    paths = {"mirrored4": [folder / "mirrored4.npz"], "multi_worker": []}
    processes = [start(["mirrored4", str(paths["mirrored4"][0])])]
    for index in range(2):
        path = folder / f"worker{index}.npz"
        paths["multi_worker"].append(path)
        task = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
        processes.append(start(["multi_worker", str(path)], TF_CONFIG=json.dumps(task)))
    try:
        for process in processes:
            output, _ = process.communicate(timeout=420)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in processes:
            process.kill()
    return {kind: [load(path) for path in kind_paths] for kind, kind_paths in paths.items()}


def results_of(number, strategies, request):
    cell = CELLS[number]
    if cell["strategy"] in strategies:
        return [distribution_cells.run(strategies[cell["strategy"]], cell)]
    return [results[number] for results in request.getfixturevalue("elsewhere")[cell["strategy"]]]


def bounds(cell, expected):
    """How far weights and logs may lie from the oracle's.

    float32: sums of at most 16 rows, in another order, for 8 or 10 steps of at most 0.01: 8 · 0.01 · 16 ·
    2⁻²⁴ is under 1e-7; Adam and its kin divide by the root of a sum of squares, which may cancel: 1e-6. A
    loss of about 1 moves with 100 weights: 1e-5. Half precision: the parts of a gradient are rounded one by
    one, as is every value of the forward pass; so twice as far as the oracle lies from float32, on top.
    """
    limits = {"weight": 1e-6, "history": 1e-5, "evaluated": 1e-5, "steps": 0}
    if cell["precision"] != "float32":
        rounding = dict.fromkeys(limits, 0)
        exact = distribution_cells.run("one_device", plain(cell, precision="float32"))
        for name, value in expected.items():
            kind = name.split("_")[0]
            if kind != "steps":
                rounding[kind] = max(rounding[kind], np.abs(value - exact[name]).max())
        limits = {kind: limit + 2 * rounding[kind] for kind, limit in limits.items()}
    return limits


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("number", range(len(CELLS)), ids=cell_id)
def test_equals_one_device(number, strategies, request):
    cell = CELLS[number]
    each_process = results_of(number, strategies, request)
    refused = refusal(cell)
    if refused:
        for result in each_process:
            assert refused in str(result["error"])
            assert result["steps"] == 0
        RAN["refused"] += 1
        return
    expected = distribution_cells.run("one_device", plain(cell))
    limits = bounds(cell, expected)
    for result in each_process:
        assert set(result) == set(expected), result.get("error")
        for name, value in expected.items():
            limit = limits[name.split("_")[0]]
            np.testing.assert_allclose(result[name], value, rtol=0, atol=limit, err_msg=name)
    RAN["equal"] += 1


def test_every_epoch_sees_every_sample_once_over_all_workers(elsewhere):
    first, second = (results[-1] for results in elsewhere["multi_worker"])
    for kernels in AXES["kernels"]:
        np.testing.assert_array_equal(first[kernels], second[kernels])
        *epochs, whole = first[kernels]
        assert len(epochs) == 3
        # A sample left out moves the mean of 61 by 1e-2; its float32 sum is right to 61 · 2⁻²⁴.
        np.testing.assert_allclose(epochs, whole, atol=1e-5)


def test_an_overflow_in_one_worker_skips_the_step_on_all(elsewhere):
    for kind in ("mirrored4", "multi_worker"):
        for results in elsewhere[kind]:
            np.testing.assert_array_equal(results[-1]["overflow"], [512, 3, True])


def test_every_pair_was_covered_and_every_cell_ran(request):
    for a in AXES:
        for b in set(AXES) - {a}:
            met = {(cell[a], cell[b]) for cell in CELLS}
            assert met == {(i, j) for i in AXES[a] for j in AXES[b]}
    assert len(CELLS) >= max(len(v) for v in AXES.values()) ** 2
    if sum(RAN.values()) == 0 or request.config.option.keyword:
        pytest.skip("the cells were not run")
    print(f"{RAN['equal']} cells equal one device, {RAN['refused']} are refused")
    assert RAN["equal"] + RAN["refused"] == len(CELLS)
