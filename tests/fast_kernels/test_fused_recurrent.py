"""LSTM and GRU as whole programs against Keras's own loop, option by option; and when they stay away."""

import contextlib
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel
from tfaccel.fast_kernels import fused_recurrent
from tfaccel.fast_kernels import trial as trials
from tfaccel.fast_kernels.agreement import tolerance, worst_disagreement

LAYERS = ["LSTM", "GRU"]
FLAGS = ["return_sequences", "return_state", "go_backwards", "use_bias", "watched"]
# Every pair of values of the five flags, in six rows.
ROWS = ["00000", "01111", "10110", "11001", "10011", "01100"]
STEPS = 7
FORGIVEN = 4  # the gradient of a sequence is a chain of steps


def run(layer, x, states, watched, fuse):
    """Outputs, and the gradients of weights, states and, if watched, inputs."""

    @tf.function
    def step(x, states):
        with tf.GradientTape() as tape, fused_recurrent.fused() if fuse else contextlib.nullcontext():
            tape.watch([x, *states] if watched else states)
            results = tf.nest.flatten(layer(x, initial_state=states))
            loss = tf.add_n([tf.reduce_sum(tf.square(r)) * (k + 1) for k, r in enumerate(results)])
        sources = [*(v.value for v in layer.trainable_variables), *states, *([x] if watched else [])]
        return results, tape.gradient(loss, sources)

    ops = {op.type for op in step.get_concrete_function(x, states).graph.get_operations()}
    assert ("TensorListReserve" in ops) is not fuse
    return [t.numpy() for t in tf.nest.flatten(step(x, states))]


@pytest.mark.parametrize("samples", [5, 37])
@pytest.mark.parametrize("flags", ROWS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_option_agrees_with_keras(kind, flags, samples):
    random = np.random.default_rng(0)
    options = dict(zip(FLAGS, (flag == "1" for flag in flags), strict=True))
    watched = options.pop("watched")
    layer = getattr(keras.layers, kind)(6, **options)
    layer.build((None, STEPS, 3))
    for weight in layer.weights:  # biases that are not zero as well
        weight.assign(0.5 * random.normal(size=weight.shape))
    x = tf.constant(random.normal(size=(samples, STEPS, 3)), tf.float32)
    count = 2 if kind == "LSTM" else 1
    states = [tf.constant(random.normal(size=(samples, 6)), tf.float32) for _ in range(count)]
    plain, fused = (run(layer, x, states, watched, fuse) for fuse in (False, True))
    zeros = [np.zeros_like(a) for a in plain]
    assert worst_disagreement(plain, fused, zeros, FORGIVEN * tolerance()) <= 1


def test_the_rows_hold_every_pair():
    for i, j in itertools.combinations(range(len(FLAGS)), 2):
        assert {(row[i], row[j]) for row in ROWS} == set(itertools.product("01", repeat=2))


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("LSTM", {}, ""),
        ("GRU", {"go_backwards": True}, ""),
        ("LSTM", {"activation": "relu"}, "its activation is not tanh"),
        ("LSTM", {"recurrent_activation": "hard_sigmoid"}, "its recurrent activation is not sigmoid"),
        ("LSTM", {"dropout": 0.1}, "it drops inside the layer"),
        ("GRU", {"recurrent_dropout": 0.1}, "it drops inside the layer"),
        ("GRU", {"reset_after": False}, "reset_after=False"),
        ("GRU", {"dtype": "mixed_bfloat16"}, "it is not float32"),
        ("LSTM", {"dtype": "float64"}, "it is not float32"),
        ("GRU", {"use_cudnn": True}, "use_cudnn=True"),
        ("SimpleRNN", {}, "it is a subclass or has another cell"),
    ],
)
def test_other_settings_are_left_to_keras(kind, options, reason):
    layer = getattr(keras.layers, kind)(4, **options)
    layer.build((None, 5, 3))
    assert fused_recurrent.why_not(layer) == reason


def test_the_report_says_why_a_layer_is_left_to_keras(helpers, small):
    accelerator = tfaccel.Accelerator()
    with accelerator.scope():
        layers = [
            keras.layers.Reshape((7, 7)),
            keras.layers.GRU(4, dropout=0.1, name="gru"),
            keras.layers.Dense(10),
        ]
        model = keras.Sequential([keras.Input((7, 7, 1)), *layers])
        helpers.compile(model, **accelerator.compile_options())
    model.fit(*small, epochs=1, verbose=0)
    assert "recurrent: Keras's own loop or XLA for the whole: gru: it drops inside the layer" in str(
        accelerator
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_masks_and_unknown_sizes_are_left_to_keras(kind, monkeypatch):
    monkeypatch.setattr(fused_recurrent, "fused_call", lambda *_: pytest.fail("the program was used"))
    layer = getattr(keras.layers, kind)(4)
    x = np.ones((2, 5, 3), "float32")
    mask = np.array([[True] * 5, [True, True, False, False, False]])

    def call(x, mask=None):
        with fused_recurrent.fused():
            return layer(x, mask=mask)

    tf.function(call)(x, mask)
    for shape in ([None, 5, 3], [2, None, 3]):
        tf.function(call, input_signature=[tf.TensorSpec(shape)]).get_concrete_function()


@pytest.mark.parametrize("inner", ["function", "condition", "loop"])
def test_a_layer_in_an_inner_graph_is_left_to_keras(inner):
    """No tape watches there, so that the layers before it would get no gradient."""
    layer, before = keras.layers.LSTM(3, return_sequences=True), keras.layers.Dense(3)
    layer.build((None, 5, 3)), before.build((None, 5, 3))

    def apply(x):
        if inner == "function":
            return tf.function(layer)(x)
        if inner == "condition":
            return tf.cond(tf.reduce_sum(x) > -1e9, lambda: layer(x), lambda: x)
        return tf.while_loop(lambda i, _: i < 2, lambda i, x: (i + 1, layer(x)), (0, x))[1]

    def gradients(fuse):
        @tf.function
        def step(x):
            with tf.GradientTape() as tape, fused_recurrent.fused() if fuse else contextlib.nullcontext():
                loss = tf.reduce_sum(tf.square(apply(before(x))))
            return tape.gradient(loss, before.trainable_variables[0].value)

        return step(tf.ones((2, 5, 3))).numpy()

    plain = gradients(False)
    assert np.abs(plain).max() > 0
    np.testing.assert_array_equal(gradients(True), plain)


def recurrent(build):
    keras.utils.set_random_seed(1)
    layers = keras.layers
    stack = {
        "stacked": [layers.LSTM(8, return_sequences=True), layers.GRU(8)],
        "bidirectional": [layers.Bidirectional(layers.GRU(8))],
        "convolution": [layers.Conv1D(8, 3, activation="relu"), layers.LSTM(8)],
    }[build]
    return keras.Sequential([keras.Input((7, 7, 1)), layers.Reshape((7, 7)), *stack, layers.Dense(10)])


@pytest.mark.parametrize("build", ["stacked", "bidirectional", "convolution"])
def test_a_run_tries_the_programs_and_ends_with_plain_weights(helpers, small, build, monkeypatch):
    monkeypatch.setattr(trials, "COMPILE_SECONDS", 0.0)
    monkeypatch.setattr(trials, "COMPILE_SECONDS_AN_OP", 0.0)
    # Whatever this machine finds faster, the programs are what stays.
    monkeypatch.setattr(trials, "FASTER", 1e9)
    monkeypatch.setattr(trials, "SLOW_IN_XLA_ON_CPU", ("",))
    calls, right = [], fused_recurrent.fused_call
    monkeypatch.setattr(fused_recurrent, "fused_call", lambda *a: calls.append(a[0].name) or right(*a))

    def train(kernels):
        accelerator = tfaccel.Accelerator(kernels=kernels, steps_per_execution=4)
        with accelerator.scope():
            model = helpers.compile(
                recurrent(build), keras.optimizers.SGD(0.05), **accelerator.compile_options()
            )
        model.fit(*small, batch_size=50, epochs=8, verbose=0, shuffle=False)
        return model, str(accelerator)

    plain, _ = train("plain")
    fused, text = train("fused")
    assert "XLA for each recurrent layer, on every core: used" in text
    assert len(set(calls)) == (1 if build == "convolution" else 2)
    for a, b in zip(plain.get_weights(), fused.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)  # forty updates of up to 0.05 each
