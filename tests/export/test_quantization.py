"""Ranges, grids and rounding against numpy; recipes by layer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel
from tfaccel.export.conversion import convert_model
from tfaccel.export.interpreter import TFLiteRunner, open_with_all_tensors
from tfaccel.export.quantization import measure_ranges
from tfaccel.export.rounding import _spans, best_scales, round_with_inputs
from tfaccel.export.samples import Samples

L = keras.layers


@pytest.fixture(scope="module")
def net(small):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((7, 7, 1), name="image"),
            L.Conv2D(6, 3, name="stem", activation="relu"),
            L.DepthwiseConv2D(3, name="depth"),
            L.Flatten(name="flat"),
            L.Dense(16, name="inner", activation="relu"),
            L.Dense(10, name="scores"),
        ]
    )
    model.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*small, epochs=4, verbose=0)
    return model


def test_ranges_are_those_of_numpy(net, small):
    converted = convert_model(net, None)
    ranges = measure_ranges(converted.content, ["image"], Samples((small[0],)), None)
    outputs = {each.layer.name: each.outputs[0] for each in converted.operations if each.layer is not None}
    for name in ("stem", "depth", "inner", "scores"):
        values = keras.Model(net.inputs, net.get_layer(name).output).predict(small[0], verbose=0)
        found = ranges[outputs[name]]
        np.testing.assert_allclose(found["min"].item(), values.min(), atol=1e-4)
        np.testing.assert_allclose(found["max"].item(), values.max(), atol=1e-4)
    assert not any("kernel" in name for name in ranges)


def test_weight_only_int8_is_each_units_weights_on_a_grid(small, tmp_path):
    model = keras.Sequential([keras.Input((49,)), L.Dense(10, kernel_initializer="normal")])
    x = small[0].reshape(-1, 49)
    tfaccel.export_tflite(model, tmp_path / "m.tflite", "weight_only_int8")
    (output,) = TFLiteRunner(tmp_path / "m.tflite").run((x,)).values()
    kernel, bias = model.get_weights()
    scale = np.abs(kernel).max(0) / 127
    np.testing.assert_allclose(output, x @ (np.round(kernel / scale) * scale) + bias, atol=1e-5)


def naive_rounding(weights, scales, top, products, damping=0.01):
    """Optimal brain surgeon one weight at a time, the inverse updated after each: no factor, no blocks."""
    order = np.argsort(-np.diag(products), kind="stable")
    hessian = products[np.ix_(order, order)].copy()
    hessian += np.eye(len(hessian)) * damping * np.mean(np.diag(hessian))
    inverse, left = np.linalg.inv(hessian), weights[:, order].copy()
    for k in range(left.shape[1]):
        rounded = np.clip(np.round(left[:, k] / scales[:, 0]), -top, top) * scales[:, 0]
        error = (left[:, k] - rounded) / inverse[k, k]
        left[:, k + 1 :] -= np.outer(error, inverse[k, k + 1 :])
        left[:, k] = rounded
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    result = np.empty_like(left)
    result[:, order] = left
    return result


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [9, 150])
def test_rounding_agrees_with_one_weight_at_a_time(bits, size):
    random = np.random.default_rng(size)
    inputs = random.normal(size=(400, size)) @ random.normal(size=(size, size))
    weights = random.normal(size=(5, size))
    scales = best_scales(weights, bits)
    found = round_with_inputs(weights, scales, bits, inputs.T @ inputs)
    expected = naive_rounding(weights, scales, 2 ** (bits - 1) - 1, inputs.T @ inputs)
    # The same arithmetic in another order: a value on the edge of two steps may fall to either side.
    assert np.mean(np.abs(found - expected) > 1e-4 * scales) < 0.05

    def error(candidate):
        return np.sum((inputs @ (candidate - weights).T) ** 2)

    nearest = np.clip(np.round(weights / scales), -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) * scales
    assert error(found) < 0.8 * error(nearest)


def test_weights_on_the_grid_stay_where_they_are():
    random = np.random.default_rng(0)
    weights = random.integers(-7, 8, (4, 20)).astype("float64")
    weights[:, 0] = 7
    inputs = random.normal(size=(100, 20))
    scales = best_scales(weights, 4)
    np.testing.assert_allclose(scales, 1)
    np.testing.assert_array_equal(round_with_inputs(weights, scales, 4, inputs.T @ inputs), weights)


def test_inputs_that_are_always_zero_do_no_harm():
    weights, products = np.ones((2, 3)), np.diag([1.0, 0.0, 2.0])
    rounded = round_with_inputs(weights, best_scales(weights, 4), 4, products)
    np.testing.assert_allclose(rounded, weights, atol=1e-6)


@pytest.mark.parametrize("recipe", ["int4_weights", "weight_only_int8"])
def test_samples_make_few_bits_better(net, small, tmp_path, recipe):
    with_samples = tfaccel.export_tflite(net, tmp_path / "a.tflite", recipe, calibration=small)
    tfaccel.export_tflite(net, tmp_path / "b.tflite", recipe)
    assert with_samples.parity.sqnr_db > tfaccel.compare(net, tmp_path / "b.tflite", small[0]).sqnr_db + 1


def dtypes(path):
    """The type of each operation's weights, by the layer in its name."""
    from ai_edge_litert.tools import flatbuffer_utils

    graph = flatbuffer_utils.read_model(str(path)).subgraphs[0]
    names = {code: name for name, code in vars(flatbuffer_utils.TensorType).items() if type(code) is int}
    found = {}
    # Weights of layers that compute in floats are turned into floats by an operation of their own.
    source = {each.outputs[0]: each.inputs[0] for each in graph.operators if len(each.inputs) == 1}
    for each in graph.operators:
        for layer in ("stem", "depth", "inner"):
            if len(each.inputs) > 1 and f"/{layer}_1/" in graph.tensors[each.outputs[0]].name.decode():
                kernel = each.inputs[1]
                found[layer] = names[graph.tensors[source.get(kernel, kernel)].type]
    return found


@pytest.mark.parametrize(
    ("recipe", "layers", "expected"),
    [
        ("dynamic_int8", {"stem": "float32"}, {"stem": "FLOAT32", "depth": "INT8", "inner": "INT8"}),
        ("float32", {L.Dense: "dynamic_int8"}, {"stem": "FLOAT32", "depth": "FLOAT32", "inner": "INT8"}),
        ("int4_weights", {L.Conv2D: "dynamic_int8"}, {"stem": "INT8", "depth": "INT8", "inner": "INT4"}),
        ("int8", {lambda layer: layer.name == "depth": "float32"}, {"stem": "INT8", "depth": "FLOAT32"}),
        ("int8", {L.Layer: "float32", "stem": "dynamic_int8"}, {"stem": "INT8", "inner": "FLOAT32"}),
        ("dynamic_int8", {"inner": "int4_weights"}, {"stem": "INT8", "depth": "INT8", "inner": "INT4"}),
    ],
)
def test_recipes_by_layer(net, small, tmp_path, recipe, layers, expected):
    file = tfaccel.export_tflite(net, tmp_path / "m.tflite", recipe, layers=layers, calibration=small)
    found = dtypes(file.path)
    assert {name: found[name] for name in expected} == expected
    assert file.layers
    assert "otherwise" in str(file)


def test_all_layers_left_alone_is_the_float_file(net, small, tmp_path):
    tfaccel.export_tflite(net, tmp_path / "a.tflite")
    tfaccel.export_tflite(net, tmp_path / "b.tflite", "int8", layers={L.Layer: "float32"}, calibration=small)
    outputs = [TFLiteRunner(tmp_path / name).run((small[0][:9],)) for name in ("a.tflite", "b.tflite")]
    for name, values in outputs[0].items():
        np.testing.assert_array_equal(values, outputs[1][name])


def test_strict_refuses_floats_inside(net, small, tmp_path):
    tfaccel.export_tflite(net, tmp_path / "m.tflite", "int8", calibration=small, strict=True)
    (tmp_path / "m.tflite").unlink()
    with pytest.raises(tfaccel.ExportError, match="still computes in floats: CONV_2D of stem"):
        tfaccel.export_tflite(
            net, tmp_path / "m.tflite", "int8", calibration=small, layers={"stem": "float32"}, strict=True
        )
    assert list(tmp_path.iterdir()) == []


def test_integer_inputs_and_outputs(net, small, tmp_path):
    file = tfaccel.export_tflite(
        net, tmp_path / "m.tflite", "int8_integer_io", calibration=small, strict=True
    )
    runner = TFLiteRunner(file.path)
    assert runner.input_details[0]["dtype"] is np.int8
    assert file.float_operations == ()


@pytest.mark.parametrize(
    ("recipe", "layers", "text"),
    [
        ("int8", {"steam": "float32"}, r"layers='steam'.*one of depth, flat, inner, scores, stem"),
        ("int8", {"stem": "int3"}, "recipe='int3'"),
        ("int8", {3: "float32"}, "layers=3"),
        ("dynamic_int8", {"stem": "int8"}, "without fixed ranges"),
        ("int8", {"stem": "int8_integer_io"}, "only a file has inputs"),
    ],
)
def test_bad_rules_are_refused(net, small, tmp_path, recipe, layers, text):
    with pytest.raises(ValueError, match=text):
        tfaccel.export_tflite(net, tmp_path / "m.tflite", recipe, layers=layers, calibration=small)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", ["weight_only_int8", "dynamic_int8", "int4_weights", "int8", "int16x8"])
def test_files_do_not_depend_on_the_delegate(tmp_path, recipe):
    """LiteRT's own kernels compute blocks of four-bit weights wrong, in silence; XNNPACK does right."""
    from tfaccel.export.interpreter import open_with_all_tensors

    model = keras.Sequential([keras.Input((64,)), L.Dense(64, activation="relu"), L.Dense(10)])
    x = np.random.default_rng(0).random((64, 64), dtype="float32")
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", recipe, calibration=x)
    runner = open_with_all_tensors(file.path.read_bytes()).get_signature_runner()
    (output,) = runner(**{next(iter(runner.get_input_details())): x}).values()
    assert tfaccel.export.compare.parity(model(x).numpy(), output).sqnr_db > file.parity.sqnr_db - 6  # 1 bit


def test_a_feature_that_the_samples_lack_keeps_its_weights(tmp_path):
    """Weights of an input that is always zero here are not cut off to make the others' steps finer."""
    random = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((50,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(3)])
    kernel = model.layers[0].kernel.numpy()
    kernel[49] *= 8
    model.layers[0].kernel.assign(kernel)
    seen = np.eye(50, dtype="float32")[random.integers(0, 49, 500)]
    rare = np.eye(50, dtype="float32")[[49] * 8]
    for recipe in ("dynamic_int8", "weight_only_int8"):
        tfaccel.export_tflite(model, tmp_path / "m.tflite", recipe, calibration=seen)

        assert tfaccel.compare(model, tmp_path / "m.tflite", rare).sqnr_db > 30


def test_calibration_looks_at_arrays_from_end_to_end(tmp_path):
    random = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(2)])
    ordered = np.concatenate([random.normal(0, 1, (1000, 4)), random.normal(10, 3, (1000, 4))])
    ordered = ordered.astype("float32")
    tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8", calibration=ordered)
    # With the first half's ranges it is 2 dB; shuffled, 37.
    assert tfaccel.compare(model, tmp_path / "m.tflite", ordered).sqnr_db > 30

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 200

        def __getitem__(self, index):
            return ordered[10 * index : 10 * index + 10]

    tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8", calibration=Batches())
    assert tfaccel.compare(model, tmp_path / "m.tflite", ordered).sqnr_db > 30
    of_one_class = tf.data.Dataset.from_tensor_slices((ordered, np.repeat([0, 1], 1000))).batch(50)
    with pytest.raises(UserWarning, match="all have the label 0"):  # warnings are errors here
        tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8", calibration=of_one_class.take(10))


def test_wide_layers_are_rounded_in_parts(tmp_path):
    spans = [(span.start, span.stop) for span in _spans(2500)]
    assert spans == [(0, 1024), (1024, 2048), (2048, 2500)]
    assert _spans(2048) == [slice(0, 2048)]
    random = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((2500,)), L.Dense(4, use_bias=False)])
    x = (random.normal(size=(64, 20)) @ random.normal(size=(20, 2500))).astype("float32")
    figures = []
    for calibration in (None, x):
        tfaccel.export_tflite(model, tmp_path / "m.tflite", "int4_weights", calibration=calibration)
        figures.append(tfaccel.compare(model, tmp_path / "m.tflite", x).sqnr_db)
    # 64 samples of 20 dimensions leave nearly every error free to be made up for.
    assert figures[1] > figures[0] + 6


@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_units_that_are_dead_leave_a_file_that_runs_without_the_delegate(tmp_path, size):
    depthwise = [L.Conv2D(3, 3), L.ReLU(6.0), L.DepthwiseConv2D(3), L.ReLU(6.0)]
    model = keras.Sequential([keras.Input((6, 6, 2)), *depthwise, L.Flatten(), L.Dense(2)])
    model.layers[0].set_weights([np.full((3, 3, 2, 3), -size), np.zeros(3)])
    x = np.random.default_rng(0).random((64, 6, 6, 2), dtype="float32") * (1 if size == 0 else -1)
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8", calibration=x, max_drop=None)
    interpreter = open_with_all_tensors(file.path.read_bytes())
    interpreter.allocate_tensors()
    assert tfaccel.benchmark_tflite(file.path, runs=50).arena_bytes > 0
