"""GELU against the formula in float64, and against Keras."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfaccel.fast_kernels import fused_gelu

NUMBERS = np.concatenate([np.linspace(-12, 12, 241), [-1e30, -1e-30, 0.0, 1e-30, 1e30]]).astype("float32")


def normal(x):
    return 0.5 * math.erfc(-x / math.sqrt(2)), math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def test_value_and_gradient_agree_with_the_formula():
    x = tf.constant(NUMBERS)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = fused_gelu.gelu(x)
    slope = tape.gradient(y, x)
    for i, number in enumerate(NUMBERS.astype(float)):
        below, density = normal(number)
        # Two units in the last place of 1, times the number.
        assert y[i].numpy() == pytest.approx(number * below, rel=1e-6, abs=2.4e-7 * abs(number))
        assert slope[i].numpy() == pytest.approx(below + number * density, abs=1e-6)


def test_the_second_derivative_is_right_too():
    x = tf.constant(np.linspace(-3, 3, 31), tf.float32)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = fused_gelu.gelu(x)
        slope = inner.gradient(y, x)
    expected = [(2 - a * a) * normal(a)[1] for a in x.numpy().astype(float)]
    np.testing.assert_allclose(outer.gradient(slope, x), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("approximate", "dtype"), [(True, "float32"), (False, "float16"), (False, "float64")]
)
def test_the_other_forms_are_left_to_keras(approximate, dtype, monkeypatch):
    monkeypatch.setattr(fused_gelu, "gelu", lambda *_: pytest.fail("the kernel was used"))
    x = tf.constant([-1.0, 2.0], dtype)
    with fused_gelu.fused():
        fused = keras.ops.gelu(x, approximate=approximate)
    np.testing.assert_array_equal(fused, keras.ops.gelu(x, approximate=approximate))


def test_keras_gelu_is_this_one_inside_the_block_only(monkeypatch):
    calls, right = [], fused_gelu.gelu
    monkeypatch.setattr(fused_gelu, "gelu", lambda x: calls.append(x) or right(x))
    x = tf.constant([-1.0, 2.0])
    with fused_gelu.fused():
        keras.activations.gelu(x)
    assert len(calls) == 1
    keras.activations.gelu(x)
    assert len(calls) == 1


def test_the_probe_accepts_the_kernel_and_refuses_a_wrong_gradient(monkeypatch):
    assert fused_gelu.probe() <= 1

    @tf.custom_gradient
    def wrong(x):
        return keras.ops.gelu(x, approximate=False), lambda upstream: upstream

    monkeypatch.setattr(fused_gelu, "gelu", wrong)
    assert fused_gelu.probe() > 1
