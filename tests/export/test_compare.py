"""Three figures, each against its definition; and files of other tools."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel
from tfaccel.export.compare import parity, worst


def test_parity_is_its_definition():
    reference = np.array([[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]])
    actual = np.array([[3.0, 4.0], [0.0, 0.1], [2.1, 2.0]])
    figures = parity(reference, actual)
    assert figures.max_abs_error == pytest.approx(1.1)
    assert figures.sqnr_db == pytest.approx(10 * math.log10(30 / (0.1**2 + 1.1**2)))
    assert figures.top1_agreement == pytest.approx(1 / 3)


def test_equal_outputs_and_single_units():
    same = parity(np.ones((4, 1)), np.ones((4, 1)))
    assert same.sqnr_db == math.inf
    assert same.top1_agreement is None
    assert parity(np.zeros((2, 2)), np.ones((2, 2))).sqnr_db == -math.inf


def test_worst_takes_the_worst_of_each():
    joined = worst({"a": tfaccel.Parity(1.0, 40.0, None, 0.1), "b": tfaccel.Parity(0.5, 20.0, 0.9, 0.2)})
    assert (joined.max_abs_error, joined.sqnr_db, joined.top1_agreement) == (1.0, 20.0, 0.9)
    assert joined.mean_abs_error == 0.2
    assert joined.outputs["a"].sqnr_db == 40.0


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.filterwarnings("ignore:Statistics for quantized inputs")
def test_a_file_that_tensorflow_itself_wrote_with_integer_io(helpers, small, tmp_path):
    model = helpers.compile(helpers.build(), keras.optimizers.Adam(1e-2))
    model.fit(*small, epochs=3, verbose=0)
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([row[None]] for row in small[0])
    converter.inference_input_type = converter.inference_output_type = tf.int8
    path = tmp_path / "foreign.tflite"
    path.write_bytes(converter.convert())
    figures = tfaccel.compare(model, path, small)
    # 8 bits over a range of some sigma: about 40 dB for one tensor, less for three in a row.
    assert figures.sqnr_db > 20
    assert figures.top1_agreement > 0.9


def test_the_file_of_another_model_is_refused(helpers, small, tmp_path):
    other = keras.Sequential([keras.Input((7, 7, 1)), keras.layers.Flatten()])
    tfaccel.export_tflite(other, tmp_path / "other.tflite")
    with pytest.raises(tfaccel.ExportError, match="file of this model"):
        tfaccel.compare(helpers.build(), tmp_path / "other.tflite", small)


def test_a_broken_file_is_refused(helpers, small, tmp_path):
    (tmp_path / "broken.tflite").write_bytes(b"not a model at all" * 10)
    with pytest.raises(tfaccel.ExportError, match="can't run this file"):
        tfaccel.compare(helpers.build(), tmp_path / "broken.tflite", small)
    with pytest.raises(FileNotFoundError):
        tfaccel.compare(helpers.build(), tmp_path / "none.tflite", small)


def test_a_file_that_needs_select_ops_is_refused(tmp_path):
    """TensorFlow writes it without complaint; the standard interpreter can't run it."""
    function = tf.function(lambda x: tf.linalg.det(x), input_signature=[tf.TensorSpec([1, 3, 3], tf.float32)])
    module = tf.Module()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()], module)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS]
    (tmp_path / "flex.tflite").write_bytes(converter.convert())
    with pytest.raises(tfaccel.ExportError, match="can't run this file"):
        tfaccel.benchmark_tflite(tmp_path / "flex.tflite")


def test_latency(helpers, tmp_path):
    file = tfaccel.export_tflite(helpers.build(), tmp_path / "m.tflite")
    latency = tfaccel.benchmark_tflite(file.path, runs=30, num_threads=2)
    assert 0 < latency.median_ms <= latency.p90_ms
    assert (latency.runs, latency.num_threads, latency.size_bytes) == (30, 2, file.size_bytes)
    for arguments in ({"runs": 0}, {"num_threads": 0}):
        with pytest.raises(ValueError, match="Allowed: an integer"):
            tfaccel.benchmark_tflite(file.path, **arguments)


def test_a_slower_model_takes_longer(tmp_path):
    times = []
    for size in (4, 512):
        layers = [keras.layers.Dense(size) for _ in range(4)]
        model = keras.Sequential([keras.Input((size,)), *layers])
        file = tfaccel.export_tflite(model, tmp_path / "m.tflite")
        times.append(tfaccel.benchmark_tflite(file.path, runs=50).median_ms)
    assert times[1] > times[0]


def test_memory_is_that_of_the_values_alive_at_once(tmp_path):
    """Input 4 kB and hidden 8 kB, hidden and output 8 + 2 kB: the arena holds the larger pair."""
    layers = keras.layers
    model = keras.Sequential([keras.Input((1000,)), layers.Dense(2000, "relu"), layers.Dense(500)])
    path = tmp_path / "m.tflite"
    tfaccel.export_tflite(model, path)
    latency = tfaccel.benchmark_tflite(path, runs=5)
    assert latency.arena_bytes == 4 * (1000 + 2000)
    weights = 4 * model.count_params()
    assert weights < latency.peak_memory_bytes < 4 * weights + 20e6
    assert "arena 12,000 bytes, peak memory" in str(latency)
