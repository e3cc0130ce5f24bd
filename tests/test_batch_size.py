"""The search for a batch size: real fits, stopped by memory, data, budget; everything undone."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from distribution_cells import mirrored

import tfaccel


def state(model):
    return [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]


@pytest.mark.parametrize("form", ["arrays", "dataset"])
def test_sizes_double_up_to_the_data_and_nothing_changes(helpers, small, form):
    x, y = small
    data = (x, y) if form == "arrays" else tf.data.Dataset.from_tensor_slices((x, y)).batch(24)
    model = helpers.compile(helpers.build())
    model.fit(x, y, verbose=0)
    before, seeded = state(model), tf.random.uniform([3])
    keras.utils.set_random_seed(5)
    expected = tf.random.uniform([3])
    keras.utils.set_random_seed(5)
    found = tfaccel.find_batch_size(model, data, smallest=30, largest=240)
    np.testing.assert_array_equal(tf.random.uniform([3]), expected)
    for a, b in zip(before, state(model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [row.batch_size for row in found.rows] == [30, 60, 120, 240]
    assert found.largest == 240
    assert found.fastest in (30, 60, 120, 240)
    assert "No larger one: 240 samples" in str(found)
    memory = [row.memory_bytes for row in found.rows]
    assert memory == sorted(memory)
    assert seeded.shape == (3,)


def test_it_trains_on_as_if_nothing_had_been(helpers, small):
    weights = []
    for searched in (False, True):
        model = helpers.compile(helpers.build())
        if searched:
            tfaccel.find_batch_size(model, small, smallest=60, largest=60)
        keras.utils.set_random_seed(3)
        model.fit(*small, epochs=2, verbose=0)
        weights.append(model.get_weights())
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_memory_ends_the_search_before_it_is_taken(helpers, small):
    model = helpers.compile(helpers.build())
    limit = tfaccel.estimate_memory(model, 60, small).total
    found = tfaccel.find_batch_size(model, small, smallest=30, memory_bytes=limit)
    assert found.largest == 60
    assert "120 samples need about" in found.stopped
    with pytest.raises(ValueError, match="smallest=30"):
        tfaccel.find_batch_size(model, small, smallest=30, memory_bytes=1000)


def test_a_device_without_memory_ends_it_too(helpers, small):
    class Full(keras.Model):
        """Takes more than there is for batches above 60."""

        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(10)

        def call(self, x):
            # 40 terabytes, and the machine says no.
            numbers = tf.cast(tf.shape(x)[0] > 60, tf.int64) * 10**13 + 1
            extra = tf.fill([numbers], tf.reduce_mean(x))
            return self.dense(keras.ops.reshape(x, (-1, 49))) + tf.reduce_sum(extra)

        def compute_output_shape(self, shape):
            return (shape[0], 10)

    model = Full()
    model(np.zeros((1, 7, 7, 1), "float32"))
    helpers.compile(model)
    found = tfaccel.find_batch_size(model, small, smallest=30, memory_bytes=1e18)
    assert found.largest == 60
    assert "no memory for 120" in found.stopped


def test_the_budget_ends_it(helpers, small):
    model = helpers.compile(helpers.build())
    found = tfaccel.find_batch_size(model, small, smallest=1, budget_s=1e-6)
    assert [row.batch_size for row in found.rows] == [1]
    assert found.stopped == "the budget was spent"


def test_under_a_strategy_sizes_are_global(helpers, small):
    with mirrored(2).scope():
        model = helpers.compile(helpers.build())
    found = tfaccel.find_batch_size(model, small, smallest=30, largest=60)
    single = tfaccel.estimate_memory(helpers.compile(helpers.build()), 15, small)
    assert [row.batch_size for row in found.rows] == [30, 60]
    assert found.rows[0].memory_bytes == pytest.approx(single.total, rel=0.2)


def test_learning_rates_scale_with_the_batch():
    assert tfaccel.scale_learning_rate(0.1, 8192, 256) == pytest.approx(3.2)
    assert tfaccel.scale_learning_rate(1e-3, 32, 128, "sqrt") == pytest.approx(5e-4)
    for rule in ("linear", "sqrt"):
        assert tfaccel.scale_learning_rate(0.3, 64, 64, rule) == 0.3
    for arguments, words in [
        ((-0.1, 2, 1), "learning_rate=-0.1"),
        ((0.1, 0, 1), "batch_size=0"),
        ((0.1, 2, 1.5), "base_batch_size=1.5"),
        ((0.1, 2, 1, "cube"), "rule='cube'"),
    ]:
        with pytest.raises(ValueError, match=words):
            tfaccel.scale_learning_rate(*arguments)


def test_bad_arguments_are_refused(helpers, small):
    model = helpers.compile(helpers.build())
    for given, words in [
        ({"smallest": 0}, "smallest=0"),
        ({"largest": 4}, "largest=4"),
        ({"memory_bytes": -1}, "memory_bytes=-1"),
        ({"budget_s": 0}, "budget_s=0"),
    ]:
        with pytest.raises(ValueError, match=words):
            tfaccel.find_batch_size(model, small, **given)
    with pytest.raises(ValueError, match="dataset='generator'"):
        tfaccel.find_batch_size(model, (each for each in ()))
    with pytest.raises(ValueError, match="compiled and built"):
        tfaccel.find_batch_size(helpers.build(), small)


def test_fewer_samples_than_the_smallest_batch_are_refused(helpers, small):
    model = helpers.compile(helpers.build())
    with pytest.raises(ValueError, match="at most the 4 samples"):
        tfaccel.find_batch_size(model, tuple(each[:4] for each in small))


def test_a_dataset_ends_where_its_samples_do(helpers, small):
    """240 samples in batches of 24; the search would repeat them for ever."""
    data = tf.data.Dataset.from_tensor_slices(small).batch(24)
    sizes = tfaccel.find_batch_size(helpers.compile(helpers.build()), data, smallest=64)
    assert sizes.largest == 128
    assert "the most that there are" in str(sizes)
