"""The estimate's parts, against what can be counted by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel
from tfaccel.prepare.memory import shown_bytes


def state(model):
    return [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]


@pytest.mark.parametrize(
    ("optimizer", "slots"), [("sgd", 0), ("adam", 2), (keras.optimizers.SGD(momentum=0.9), 1)]
)
def test_weights_gradients_and_slots_are_counted(optimizer, slots):
    model = keras.Sequential(
        [keras.Input((100,)), keras.layers.Dense(200), keras.layers.BatchNormalization()]
    )
    model.compile(optimizer, "mse")
    estimate = tfaccel.estimate_memory(model, 16)
    trained = 4 * (100 * 200 + 200 + 400)
    assert estimate.weights == trained + 4 * 400
    assert estimate.gradients == trained
    assert estimate.optimizer == pytest.approx(slots * trained, abs=64)  # and its counters
    assert estimate.total == estimate.weights + estimate.optimizer + estimate.gradients + estimate.activations


@pytest.mark.parametrize("kind", ["sequential", "functional", "subclassed"])
@pytest.mark.parametrize("form", ["arrays", "dataset"])
def test_every_kind_of_model_and_data(helpers, small, kind, form):
    x, y = small
    data = (x, y) if form == "arrays" else tf.data.Dataset.from_tensor_slices((x, y)).batch(7)
    model = helpers.compile(helpers.build(kind))
    one, two, four = (tfaccel.estimate_memory(model, size, data) for size in (256, 512, 1024))
    assert one.weights == two.weights
    assert four.activations - two.activations == pytest.approx(
        2 * (two.activations - one.activations), rel=0.01
    )
    assert two.flops == pytest.approx(2 * one.flops)
    # The images, and what the convolution gives: at least.
    assert one.activations > 256 * 4 * (49 + 2 * 100)


def test_without_data_the_loss_stands_in(helpers, small):
    model = helpers.compile(helpers.build())
    exact, stand_in = tfaccel.estimate_memory(model, 1024, small), tfaccel.estimate_memory(model, 1024)
    assert stand_in.activations == pytest.approx(exact.activations, rel=0.2)


def test_half_precision_needs_less(small):
    totals = {}
    for policy in ("float32", "mixed_bfloat16"):
        layers = [
            keras.layers.Conv2D(16, 3, padding="same", activation="relu", dtype=policy) for _ in range(6)
        ]
        model = keras.Sequential(
            [keras.Input((28, 28, 1)), *layers, keras.layers.GlobalAveragePooling2D(dtype=policy)]
        )
        model.compile("sgd", "mse")
        totals[policy] = tfaccel.estimate_memory(model, 64).activations
    assert 0.4 < totals["mixed_bfloat16"] / totals["float32"] < 0.7


def test_under_a_strategy_it_is_one_devices():
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        twin = keras.Sequential([keras.Input((100,)), keras.layers.Dense(200), keras.layers.Dense(100)])
        twin.compile("adam", "mse")
    single = keras.Sequential([keras.Input((100,)), keras.layers.Dense(200), keras.layers.Dense(100)])
    single.compile("adam", "mse")
    one, other = (tfaccel.estimate_memory(model, 512) for model in (single, twin))
    assert other.total == pytest.approx(one.total, rel=0.1)


def test_a_trained_model_is_left_as_it_was(helpers, small):
    model = helpers.compile(helpers.build())
    model.fit(*small, verbose=0)
    before = state(model)
    tfaccel.estimate_memory(model, 64, small)
    for a, b in zip(before, state(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bad_arguments_are_refused(helpers, small):
    model = helpers.compile(helpers.build())
    with pytest.raises(ValueError, match="batch_size=0"):
        tfaccel.estimate_memory(model, 0)
    with pytest.raises(ValueError, match="compiled"):
        tfaccel.estimate_memory(helpers.build())
    with pytest.raises(ValueError, match="dataset='list'"):
        tfaccel.estimate_memory(model, 8, [1, 2])
    ragged = tf.data.Dataset.from_tensors(tf.ragged.constant([[1.0], [2.0, 3.0]]))
    with pytest.raises(ValueError, match="dense batches"):
        tfaccel.estimate_memory(model, 8, ragged)
    anywhere = keras.Sequential([keras.Input((None, 3)), keras.layers.LSTM(2)])
    anywhere.compile("sgd", "mse")
    with pytest.raises(ValueError, match="Pass dataset="):
        tfaccel.estimate_memory(anywhere, 8)


def test_bytes_are_shown_with_three_digits():
    assert [shown_bytes(n) for n in (0, 999, 1000, 84_200_000, 2e13)] == [
        "0 B",
        "999 B",
        "1 kB",
        "84.2 MB",
        "20 TB",
    ]


def test_half_precision_with_a_regularizer():
    keras.config.set_dtype_policy("mixed_bfloat16")
    dense = keras.layers.Dense(3, kernel_regularizer="l2")
    model = keras.Sequential([keras.Input((4,)), dense, keras.layers.Dense(2, dtype="float32")])
    model.compile("adam")
    keras.config.set_dtype_policy("float32")
    assert tfaccel.estimate_memory(model, 8).activations > 0
