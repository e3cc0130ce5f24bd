"""Kernel gradients as products against Keras's convolution, for any size; and when they stay away."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import tfaccel
from tfaccel.fast_kernels import fused_convolution, proofs
from tfaccel.fast_kernels.agreement import EPSILON, tolerance, worst_disagreement


def built(channels, filters=5, size=1, dtype="float32", **options):
    """A layer that has seen so many channels."""
    policy = keras.DTypePolicy("float32" if dtype == "float32" else f"mixed_{dtype}")
    layer = keras.layers.Conv2D(filters, size, dtype=policy, **options)
    layer.build((None, 6, 6, channels))
    return layer


def step(layer, shape, fuse, seed=0):
    """Outputs and the gradients of inputs, kernel and bias."""
    random = np.random.default_rng(seed)
    inputs = tf.cast(random.normal(size=shape), layer.compute_dtype)
    watched = [inputs, *(weight.value for weight in layer.trainable_weights)]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        if fuse:
            with fused_convolution.fused(EPSILON):
                outputs = layer(inputs)
        else:
            outputs = layer(inputs)
        loss = tf.reduce_sum(tf.square(tf.cast(outputs, tf.float32)))
    return [tf.cast(t, tf.float32).numpy() for t in [outputs, *tape.gradient(loss, watched)]]


def count_products(monkeypatch):
    """The calls of the kernel's own gradient, but for those of its probe."""
    calls, right, probe = [], fused_convolution.kernel_gradient, fused_convolution.probe

    def counted(*args):
        calls.append(args)
        return right(*args)

    def uncounted(dtype):
        far = probe(dtype)
        calls.clear()
        return far

    monkeypatch.setattr(fused_convolution, "kernel_gradient", counted)
    kernels = [
        dataclasses.replace(kernel, probe=uncounted) if kernel.name == "convolution" else kernel
        for kernel in proofs.KERNELS
    ]
    monkeypatch.setattr(proofs, "KERNELS", kernels)
    return calls


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    sides=st.tuples(st.integers(3, 8), st.integers(3, 8)),
    channels=st.integers(1, 40),
    samples=st.integers(1, 5),
    padding=st.sampled_from(["valid", "same"]),
    seed=st.integers(0, 2**20),
)
def test_values_and_gradients_agree_with_keras(dtype, size, sides, channels, samples, padding, seed):
    layer = built(channels, size=size, dtype=dtype, padding=padding)
    shape = (samples, *sides, channels)
    plain, fused = (step(layer, shape, fuse, seed) for fuse in (False, True))
    np.testing.assert_array_equal(plain[0], fused[0])  # the value is Keras's own
    # oneDNN may round sums of half precision on the way, once for each place of the kernel.
    allowed = tolerance(dtype, roundings=4)
    assert worst_disagreement(plain, fused, [np.zeros_like(a) for a in plain], allowed) <= 1


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sides=st.tuples(st.integers(4, 7), st.integers(4, 7)),
    padding=st.sampled_from(["valid", "same"]),
)
def test_the_kernel_gradient_agrees_with_the_sum_in_float64(size, sides, padding):
    random = np.random.default_rng(0)
    x = random.normal(size=(2, *sides, 3))
    places = sides if padding == "same" else tuple(a - n + 1 for a, n in zip(sides, size, strict=True))
    upstream = random.normal(size=(2, *places, 4))
    around = [((n - 1) // 2, n // 2) if padding == "same" else (0, 0) for n in size]
    padded = np.pad(x, [(0, 0), *around, (0, 0)])
    expected = np.zeros((*size, 3, 4))
    for i, j in np.ndindex(*size):
        for a, b in np.ndindex(*places):
            expected[i, j] += padded[:, i + a, j + b].T @ upstream[:, a, b]
    got = fused_convolution.kernel_gradient(
        tf.constant(x, tf.float32), tf.constant(upstream, tf.float32), size, padding
    )
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"strides": 2},
        {"size": 3},
        {"size": 3, "dtype": "bfloat16", "channels": 31},
        {"size": 4, "dtype": "bfloat16"},
        {"size": 3, "dtype": "bfloat16", "dilation_rate": 2},
        {"groups": 2},
    ],
    ids=str,
)
def test_what_products_are_slower_for_is_left_to_keras(options, monkeypatch):
    calls = count_products(monkeypatch)
    options = {"channels": 32, "filters": 4, **options}
    layer = built(options.pop("channels"), **options)
    assert not fused_convolution.serves(layer)
    step(layer, (2, 6, 6, layer.kernel.shape[2] * layer.groups), fuse=True)
    assert not calls


@pytest.mark.parametrize(
    ("sides", "padding", "taken"), [((7, 7), "same", 1), ((9, 9), "valid", 1), ((8, 7), "same", 0)]
)
def test_in_half_precision_small_maps_only(sides, padding, taken, monkeypatch):
    calls = count_products(monkeypatch)
    layer = built(32, size=3, dtype="bfloat16", padding=padding)
    step(layer, (2, *sides, 32), fuse=True)
    assert len(calls) == taken


def test_a_layer_that_convolves_with_another_kernel_is_left_to_keras(monkeypatch):
    calls = count_products(monkeypatch)

    class Widened(keras.layers.Conv2D):
        def call(self, inputs):
            return self.convolution_op(inputs, keras.ops.tile(self.kernel, [2, 2, 1, 1]))

    layer = Widened(5, 1, use_bias=False)
    layer.build((None, 6, 6, 3))
    plain, fused = (step(layer, (2, 6, 6, 3), fuse) for fuse in (False, True))
    for expected, got in zip(plain, fused, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert not calls


def test_a_gpu_keeps_its_own_kernels(monkeypatch):
    assert fused_convolution.serves(built(8))
    monkeypatch.setattr(fused_convolution, "on_gpu", lambda: True)
    assert not fused_convolution.serves(built(8))


def test_batches_of_unknown_length_and_maps_of_unknown_size():
    layer = built(3)
    x = tf.constant(np.random.default_rng(0).normal(size=(4, 5, 6, 3)), tf.float32)

    def gradients(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x) ** 3)
        return tape.gradient(loss, [x, layer.kernel.value])

    expected = gradients(x)
    with fused_convolution.fused(EPSILON):
        traced = tf.function(gradients, input_signature=[tf.TensorSpec([None, None, None, 3])])
        for got, wanted in zip(traced(x), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


def test_second_derivatives_are_those_of_the_convolution():
    layer = built(3)
    x = tf.constant(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), tf.float32)

    def penalty():
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(layer(x) ** 3)
            slope = tf.reduce_sum(inner.gradient(loss, x) ** 2)
        return outer.gradient(slope, layer.kernel.value)

    expected = penalty()
    with fused_convolution.fused(EPSILON):
        np.testing.assert_allclose(penalty(), expected, rtol=1e-4, atol=1e-3)


def test_what_differentiates_without_a_tape_sees_the_convolution(monkeypatch):
    calls, layer = count_products(monkeypatch), built(3)
    x = tf.constant(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), tf.float32)

    @tf.function
    def symbolic():
        with fused_convolution.fused(EPSILON):
            kernel = tf.identity(layer.kernel.value)
            loss = tf.reduce_sum(layer.convolution_op(x, kernel) ** 2)
            return tf.gradients(loss, kernel)[0]

    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer.convolution_op(x, layer.kernel) ** 2)
    np.testing.assert_allclose(symbolic(), tape.gradient(loss, layer.kernel.value), rtol=1e-5, atol=1e-5)
    assert not calls


def test_keras_convolves_so_inside_the_block_only(monkeypatch):
    calls, layer = count_products(monkeypatch), built(3)
    step(layer, (2, 4, 4, 3), fuse=False)
    assert not calls
    step(layer, (2, 4, 4, 3), fuse=True)
    assert len(calls) == 1
    step(layer, (2, 4, 4, 3), fuse=False)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", EPSILON)
def test_the_probe_accepts_the_products_and_refuses_a_wrong_one(dtype, monkeypatch):
    assert fused_convolution.probe(dtype) <= 1
    right = fused_convolution.kernel_gradient
    monkeypatch.setattr(fused_convolution, "kernel_gradient", lambda *args: 1.1 * right(*args))
    assert fused_convolution.probe(dtype) > 1


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_a_fit_takes_the_products_and_ends_where_keras_does(precision, helpers, monkeypatch):
    calls = count_products(monkeypatch)
    random = np.random.default_rng(0)
    x, y = random.normal(size=(96, 8, 8, 4)).astype("float32"), random.integers(0, 3, 96)

    def trained(kernels):
        accelerator = tfaccel.Accelerator(precision=precision, kernels=kernels, jit=False)
        keras.utils.set_random_seed(0)
        with accelerator.scope():
            model = keras.Sequential(
                [
                    keras.Input((8, 8, 4)),
                    keras.layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
                    keras.layers.Conv2D(16, 1, activation="relu"),
                    keras.layers.Conv2D(32, 1, activation="relu"),
                    keras.layers.Conv2D(8, 3, activation="relu"),
                    keras.layers.GlobalAveragePooling2D(),
                    keras.layers.Dense(3),
                ]
            )
            helpers.compile(model, keras.optimizers.SGD(0.1), **accelerator.compile_options())
        before = model.get_weights()
        model.fit(x, y, batch_size=32, epochs=2, verbose=0, shuffle=False)
        return accelerator, before, model.get_weights()

    _, before, expected = trained("plain")
    assert not calls
    accelerator, _, got = trained("fused")
    assert len(calls) == (2 if precision == "float32" else 3)
    assert "convolution: small kernels' gradients as matrix products" in str(accelerator)
    allowed = 1e-4 if precision == "float32" else 0.1
    for a, b, c in zip(expected, got, before, strict=True):
        assert np.linalg.norm(b - a) <= allowed * max(np.linalg.norm(a - c), 1e-6)
