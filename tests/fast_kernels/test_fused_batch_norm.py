"""Fused batch normalization against Keras's layer, option by option; and when it stays away."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tfaccel.fast_kernels import fused_batch_norm
from tfaccel.fast_kernels.agreement import EPSILON, UNITS, worst_disagreement

EPS = float(np.finfo("float32").eps)


def step(shape, fuse, seed=0, policy="float32", **options):
    """Outputs, gradients and moving statistics of one training call."""
    random = np.random.default_rng(seed)
    layer = keras.layers.BatchNormalization(dtype=policy, **options)
    layer.build(shape)
    inputs = tf.cast(random.normal(0.5, 3, shape), layer.compute_dtype)
    upstream = tf.cast(random.normal(size=shape), layer.compute_dtype)
    for weight in layer.trainable_weights:
        weight.assign(random.uniform(0.5, 1.5, weight.shape))
    watched = [inputs, *(weight.value for weight in layer.trainable_weights)]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        if fuse:
            assert fused_batch_norm.can_fuse(layer, inputs, True, None)
            with fused_batch_norm.fused(EPSILON):
                outputs = layer(inputs, training=True)
        else:
            outputs = layer(inputs, training=True)
    gradients = tape.gradient(outputs, watched, upstream)
    assert outputs.dtype == layer.compute_dtype
    assert outputs.shape == inputs.shape
    arrays = [keras.ops.convert_to_numpy(t) for t in [outputs, *gradients, *layer.non_trainable_weights]]
    # A sum that cancels has no relative bound: what was summed is its scale, and goes in as one more value.
    scales = [np.abs(upstream).astype("float32"), np.abs(inputs).astype("float32")]
    summed = [each.reshape(-1, shape[-1]).sum(0).max() for each in scales]
    rows = np.prod(shape[:-1])
    last = len(layer.trainable_weights) + 2
    return (
        arrays[:2]
        + [np.append(each, summed[0]) for each in arrays[2:last]]
        + [np.append(each, summed[1] / rows) for each in arrays[last:]]
    )


def disagreement(shape, half_epsilon=0.0, **options):
    plain, fused = step(shape, False, **options), step(shape, True, **options)
    return worst_disagreement(plain, fused, [np.zeros_like(a) for a in plain], UNITS * EPS + half_epsilon)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    samples=st.integers(4, 12),
    seed=st.integers(0, 2**20),
    scale=st.booleans(),
    center=st.booleans(),
    epsilon=st.sampled_from([1e-5, 1e-3, 0.1]),
    momentum=st.sampled_from([0.0, 0.9, 0.99]),
)
def test_any_shape_and_option_agrees_with_keras(shape, samples, seed, scale, center, epsilon, momentum):
    options = {"scale": scale, "center": center, "epsilon": epsilon, "momentum": momentum}
    assert disagreement((samples, *shape), seed=seed, **options) <= 1


@pytest.mark.parametrize(
    ("policy", "half_epsilon"),
    # The outputs are rounded to half precision once; Keras rounds the gradient's terms as well: two more.
    [("mixed_float16", 3 * 2.0**-10), ("mixed_bfloat16", 3 * 2.0**-7)],
)
def test_half_precision_agrees_with_keras(policy, half_epsilon):
    assert disagreement((16, 5, 4, 3), half_epsilon, policy=policy) <= 1


def test_a_single_sample_gives_keras_statistics():
    plain, fused = step((1, 1, 1, 3), False), step((1, 1, 1, 3), True)
    for a, b in zip(plain, fused, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)  # everything but the offset is zero


@pytest.mark.parametrize(
    ("options", "shape", "call"),
    [
        ({"renorm": True}, (8, 3), {}),
        ({"synchronized": True}, (8, 3), {}),
        ({"epsilon": 1e-7}, (8, 3), {}),
        ({"axis": 1}, (8, 3, 4), {}),
        ({"trainable": False}, (8, 3), {}),
        ({"dtype": "float64"}, (8, 3), {}),
        ({}, (8, 2, 2, 2, 2, 3), {}),
        ({}, (8, 4, 3), {"mask": np.ones((8, 4), bool)}),
        ({}, (8, 3), {"training": False}),
    ],
)
def test_keras_own_code_runs_where_the_op_computes_something_else(options, shape, call, monkeypatch):
    monkeypatch.setattr(fused_batch_norm, "fused_call", lambda *_: pytest.fail("the fused op was used"))
    inputs = np.random.default_rng(0).normal(size=shape).astype("float32")
    outputs = []
    for fuse in (False, True):
        layer = keras.layers.BatchNormalization(**options)
        if fuse:
            with fused_batch_norm.fused(EPSILON):
                outputs.append(layer(inputs, **{"training": True, **call}))
        else:
            outputs.append(layer(inputs, **{"training": True, **call}))
    np.testing.assert_array_equal(*outputs)


def test_a_layer_of_another_thread_and_the_class_afterwards_are_keras_own():
    import threading

    original = keras.layers.BatchNormalization.call
    layer, seen = keras.layers.BatchNormalization(), []
    layer.build((4, 3))
    with fused_batch_norm.fused(()):
        keras.layers.BatchNormalization()(np.ones((4, 3), "float32"), training=True)
    with fused_batch_norm.fused(EPSILON):
        patched = keras.layers.BatchNormalization.call
        thread = threading.Thread(
            target=lambda: seen.append(layer(np.ones((4, 3), "float32"), training=True))
        )
        thread.start()
        thread.join()
    assert patched is not original
    assert keras.layers.BatchNormalization.call is original
    np.testing.assert_allclose(seen[0], np.zeros((4, 3)), atol=1e-6)


@pytest.mark.parametrize("dtype", EPSILON)
def test_the_probe_accepts_the_op_and_refuses_a_wrong_one(dtype, monkeypatch):
    assert fused_batch_norm.probe(dtype) <= 1
    right = fused_batch_norm.normalize

    def unbiased(inputs, *arguments):
        outputs, mean, variance = right(inputs, *arguments)
        return outputs, mean, variance * 1.1

    monkeypatch.setattr(fused_batch_norm, "normalize", unbiased)
    assert fused_batch_norm.probe(dtype) > 1


def test_the_probe_refuses_a_wrong_gradient(monkeypatch):
    right = fused_batch_norm.normalize

    def frozen(inputs, gamma, *arguments):
        return right(inputs, tf.stop_gradient(gamma) + 0.9 * (gamma - tf.stop_gradient(gamma)), *arguments)

    monkeypatch.setattr(fused_batch_norm, "normalize", frozen)
    assert fused_batch_norm.probe("float32") > 1
