"""What a step is said to cost, against formulas, and against the same network written otherwise."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfaccel.step_graph import step_cost


def spec(*shape, dtype="float32"):
    return tf.TensorSpec(shape, dtype)


def compiled(*layers, optimizer="sgd"):
    model = keras.Sequential(list(layers))
    model.compile(optimizer, "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def test_dense_layers_count_forward_and_both_gradients():
    model = compiled(keras.Input((20,)), keras.layers.Dense(30), keras.layers.Dense(5))
    cost = step_cost(model.train_step, (spec(8, 20), spec(8, 5)))
    products = 20 * 30 + 30 * 5
    # Weights need a product each way; the first layer's input needs no gradient.
    assert cost.flops == 2 * 8 * (products + products + 30 * 5)
    assert cost.unknown == ()


def test_convolutions_count_by_their_outputs():
    layers = keras.layers
    model = compiled(
        keras.Input((12, 12, 3)),
        layers.Conv2D(4, 3),
        layers.DepthwiseConv2D(3, depth_multiplier=2),
        layers.Flatten(),
    )
    cost = step_cost(model.train_step, (spec(2, 12, 12, 3), spec(2, 8 * 8 * 8)))
    first, second = 10 * 10 * 4 * (3 * 3 * 3), 8 * 8 * 8 * (3 * 3)
    assert cost.flops == 2 * 2 * (2 * first + 3 * second)


def test_an_einsum_counts_all_its_labels():
    a, b = spec(6, 2, 3, 4), spec(3, 4, 5)
    cost = step_cost(lambda data: tf.einsum("...ij,ijk->...k", *data), (a, b))
    assert cost.flops == 2 * 6 * 2 * 3 * 4 * 5


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("SimpleRNN", 1)])
def test_a_loop_counts_as_often_as_it_runs(kind, gates):
    costs = []
    for unroll in (False, True):
        model = compiled(keras.Input((7, 3)), getattr(keras.layers, kind)(5, unroll=unroll))
        costs.append(step_cost(model.train_step, (spec(256, 7, 3), spec(256, 5))))
    loop, unrolled = costs
    assert loop.unknown == unrolled.unknown == ()
    # Forward, the weights' gradients, and the state's: of the first state only the loop computes it.
    state = 2 * 256 * gates * 5 * 5
    assert loop.flops == 7 * (2 * 2 * 256 * gates * (3 + 5) * 5 + state)
    assert unrolled.flops == loop.flops - state
    assert 0.5 * unrolled.peak_bytes <= loop.peak_bytes <= 3 * unrolled.peak_bytes


def test_a_loop_without_a_bound_is_named():
    def step(x):
        return tf.while_loop(lambda y: tf.reduce_sum(y) < 100, lambda y: (tf.matmul(y, y),), (x,))

    cost = step_cost(step, spec(3, 3))
    assert len(cost.unknown) == 1
    assert cost.flops == 2 * 27


def test_memory_is_what_is_alive_at_one_time():
    kilobyte = spec(256)

    def chain(x):  # each value dies where the next is made, in its place
        for _ in range(10):
            x = tf.nn.relu(x)
        return x

    def fan(x):  # nine, and the tenth with what it is made of; then they are added
        return tf.add_n([tf.cumsum(x + float(i)) for i in range(10)])

    assert step_cost(chain, kilobyte).peak_bytes == 2 * 1024  # the batch and one value
    assert step_cost(fan, kilobyte).peak_bytes == 12 * 1024


def test_what_the_forward_pass_keeps_grows_with_its_layers():
    def peak(depth, rows):
        hidden = [keras.layers.Dense(64, activation="relu") for _ in range(depth)]
        model = compiled(keras.Input((64,)), *hidden, keras.layers.Dense(64))
        return step_cost(model.train_step, (spec(rows, 64), spec(rows, 64))).peak_bytes

    row = 4 * 64
    assert peak(5, 2048) - peak(5, 1024) == pytest.approx(peak(5, 3072) - peak(5, 2048))
    # Each hidden layer keeps what it gave, and that is all.
    assert (peak(9, 4096) - peak(5, 4096)) / (4 * row * 4096) == pytest.approx(1.0, abs=0.1)


def test_nothing_is_run():
    model = compiled(keras.Input((20,)), keras.layers.Dense(5), optimizer="adam")
    before = [
        np.array(each) for each in (*model.get_weights(), *(v.numpy() for v in model.optimizer.variables))
    ]
    step_cost(model.train_step, (spec(8, 20), spec(8, 5)))
    after = [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
