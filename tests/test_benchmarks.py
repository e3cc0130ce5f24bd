"""The benchmarks' own parts: the data sets and the networks that the claims are made on."""

import gzip
import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _beside_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(FOLDER.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_benchmark_finds_what_it_imports(path):
    assert callable(getattr(load(path.stem), "main", None) or load(path.stem).load)


def test_datasets_come_from_the_cache_first(tmp_path, monkeypatch):
    monkeypatch.setenv("TFACCEL_DATA", str(tmp_path))
    arrays = {
        "x_train": np.zeros((3, 28, 28), "uint8"), "y_train": np.ones((3, 1), "uint8"),
        "x_test": np.zeros((2, 28, 28), "uint8"), "y_test": np.ones(2, "uint8"),
    }  # fmt: skip
    np.savez(tmp_path / "mnist.npz", **arrays)
    data = load("datasets").load("mnist")
    assert data["x_train"].shape == (3, 28, 28, 1)
    assert data["y_train"].shape == (3,)
    with pytest.raises(ValueError, match="name='cifar'"):
        load("datasets").load("cifar")


def test_texts_come_as_numbers_of_words(tmp_path, monkeypatch):
    monkeypatch.setenv("TFACCEL_DATA", str(tmp_path))
    texts = {"x_train": ["a good film", "a bad film"] * 30, "y_train": [1, 0] * 30}
    texts |= {"x_test": ["a film so odd"] * 50, "y_test": [1] * 50}
    with gzip.open(tmp_path / "imdb.json.gz", "wt") as file:
        json.dump(texts, file)
    data = load("datasets").load("imdb")
    assert data["x_train"].shape == (60, 200)
    assert data["x_train"][0, 0] == data["x_train"][1, 0] == data["x_test"][0, 0] > 1  # "a"
    assert list(data["x_test"][0, 2:5]) == [1, 1, 0]  # unknown, unknown, none
    assert data["y_train"].tolist() == [1, 0] * 30


def test_ways_are_compared_at_an_accuracy_that_both_reach():
    module = load("time_to_accuracy")
    clocks = [module.TrainingClock(0.0) for _ in range(2)]
    clocks[0].accuracies, clocks[0].seconds = [0.7, 0.8], [1.0, 2.0]
    clocks[1].accuracies, clocks[1].seconds = [0.6, 0.75, 0.9], [3.0, 6.0, 9.0]
    assert module.faster(*clocks) == 9.0 / 2.0  # the first to end an epoch at 0.8
    assert module.faster(*clocks[::-1]) == 2.0 / 9.0


def test_resnet8_is_resnet8():
    model = load("time_to_accuracy").build_resnet8()
    assert model.output_shape == (None, 10)
    # MLPerf Tiny's has 78,666 trainable weights, with biases on its convolutions.
    assert 76_000 < model.count_params() < 80_000


def test_spread_is_median_and_range():
    assert load("_report").spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "runs": 3}


@pytest.mark.parametrize(
    "name", ["mlp", "tabular", "cnn_bn", "resnet20", "depthwise", "transformer", "lstm", "gru"]
)
def test_networks_of_step_time_take_their_data(name):
    models = load("_step_models")
    x, y = models.make_data(name, 32)
    assert models.build_keras(name)(x[:2]).shape == (2, models.CLASSES)
    assert len(x) == len(y) == 32 * models.SHAPES[name][1][32]


@pytest.mark.slow
def test_step_time_measures_in_processes_of_their_own():
    benchmark = load("step_time")
    options = benchmark.parse_options(
        ["--contenders", "tf_plain", "tfaccel", "--turns", "1", "--steps", "40"]
    )
    row = benchmark.measure("mlp", 256, benchmark.start("mlp", 256, options), options)
    assert row["not_run"] == {}
    assert row["faster_than_plain"] == pytest.approx(
        row["step_ms"]["tf_plain"] / row["step_ms"]["tfaccel"], rel=0.05
    )


@pytest.mark.slow
def test_training_needs_no_more_memory_than_plain_keras_and_the_data():
    memory, megabytes = load("peak_memory"), 100
    plain, ours = (memory.measure(contender, "mlp", megabytes) for contender in ("plain", "tfaccel"))
    assert plain > megabytes  # Keras copies the arrays, so something was measured
    assert ours <= plain + megabytes
