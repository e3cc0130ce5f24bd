"""Attention against numpy, and whole layers in `fit` against plain Keras."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel
from tfaccel.fast_kernels import fused_attention, fused_einsum, fused_gelu, proofs


def reference(query, key, value, bias, mask, is_causal, scale):
    """The formula in float64."""
    scores = np.einsum("btnh,bsnh->bnts", query, np.broadcast_to(key, key.shape)).astype("float64") * scale
    scores = scores if bias is None else scores + bias
    allowed = np.ones(scores.shape, bool) if mask is None else np.broadcast_to(mask, scores.shape)
    if is_causal:
        allowed = allowed & np.tril(np.ones(scores.shape[-2:], bool))
    scores = np.where(allowed, scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_values_agree_with_the_formula(biased, masked, is_causal):
    random = np.random.default_rng(0)
    query = random.normal(size=(2, 5, 3, 4)).astype("float32")
    key, value = random.normal(size=(2, 2, 7, 3, 4)).astype("float32")
    bias = random.normal(size=(1, 3, 5, 7)).astype("float32") if biased else None
    mask = random.random((2, 1, 5, 7)) < 0.6 if masked else None
    if masked:
        mask[..., 0] = True  # every query sees one key
    got = fused_attention.attend(*map(tf.constant, (query, key, value)), bias, mask, is_causal, 0.5)
    np.testing.assert_allclose(got, reference(query, key, value, bias, mask, is_causal, 0.5), atol=1e-5)


def transformer(attention):
    keras.utils.set_random_seed(1)
    layers = keras.layers
    inputs = keras.Input((7, 7, 1))
    x = y = layers.Dense(8)(layers.Reshape((7, 7))(inputs))
    if attention == "grouped":
        y = layers.GroupQueryAttention(4, 4, 2)(y, y)
    else:
        options = {"dropout": 0.2} if attention == "dropout" else {}
        y = layers.MultiHeadAttention(2, 4, **options)(y, y, use_causal_mask=attention == "causal")
    y = layers.Dense(16, activation="gelu")(layers.LayerNormalization()(layers.Add()([x, y])))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(y)))


@pytest.mark.parametrize("attention", ["plain", "causal", "dropout", "grouped"])
def test_a_transformer_trains_as_in_plain_keras(helpers, small, attention, monkeypatch):
    used = []

    def count(module, name):
        right = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a: used.append(name) or right(*a))

    def train(kernels):
        accelerator = tfaccel.Accelerator(jit=False, kernels=kernels)
        with accelerator.scope():
            model = helpers.compile(transformer(attention), keras.optimizers.SGD(0.1))
        history = model.fit(*small, batch_size=50, epochs=2, verbose=0, shuffle=False).history["loss"]
        return history, str(accelerator)

    plain, _ = train("plain")
    count(fused_attention, "attend")
    count(fused_einsum, "multiply")
    count(fused_gelu, "gelu")
    unproven = tuple(dataclasses.replace(kernel, probe=lambda dtype: 0.0) for kernel in proofs.KERNELS)
    monkeypatch.setattr(proofs, "KERNELS", unproven)  # what is counted is the step
    fused, text = train("fused")
    expected = {"multiply", "gelu"} if attention == "dropout" else {"attend", "multiply", "gelu"}
    assert set(used) == expected
    np.testing.assert_allclose(fused, plain, rtol=1e-5)  # ten plain updates
    assert "attention: two matrix products each" in text
    assert "einsum: one matrix product each" in text
    assert "gelu: gradient written out" in text


def test_half_precision_is_left_to_keras(monkeypatch):
    monkeypatch.setattr(fused_attention, "attend", lambda *_: pytest.fail("the kernel was used"))
    x = tf.cast(np.random.default_rng(0).normal(size=(2, 5, 3, 4)), "float16")
    with fused_attention.fused():
        keras.ops.dot_product_attention(x, x, x)


def test_the_probe_accepts_the_kernel_and_refuses_one_that_forgets_the_mask(monkeypatch):
    assert fused_attention.probe() <= 1
    right = fused_attention.attend
    monkeypatch.setattr(fused_attention, "attend", lambda q, k, v, b, _, c, s: right(q, k, v, b, None, c, s))
    assert fused_attention.probe() > 1
