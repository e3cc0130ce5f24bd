"""Einsum as one matrix product against numpy, for any order of the indices."""

import contextlib
import string

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tfaccel.fast_kernels import fused_einsum
from tfaccel.fast_kernels.agreement import EPSILON, tolerance, worst_disagreement

SIZES = dict(zip(string.ascii_lowercase, (2, 3, 4, 5, 1, 6, 2, 3), strict=False))


def operands(equation, seed=0):
    random = np.random.default_rng(seed)
    first, second = equation.split("->")[0].split(",")
    return [random.normal(size=[SIZES[i] for i in part]).astype("float32") for part in (first, second)]


@st.composite
def equations(draw):
    """Up to two indices of each kind, in any order everywhere."""
    letters = iter(string.ascii_lowercase)
    batch, rows, summed, columns = (
        [next(letters) for _ in range(draw(st.integers(least, 2)))] for least in (0, 0, 1, 0)
    )
    parts = [batch + rows + summed, batch + summed + columns, batch + rows + columns]
    first, second, result = ("".join(draw(st.permutations(part))) for part in parts)
    return f"{first},{second}->{result}"


@settings(max_examples=60, deadline=None)
@given(equation=equations(), known=st.booleans(), seed=st.integers(0, 2**20))
def test_any_order_of_indices_agrees_with_numpy(equation, known, seed):
    a, b = operands(equation, seed)
    product = fused_einsum.parse(equation)
    specs = [tf.TensorSpec(x.shape if known else [None] * x.ndim) for x in (a, b)]
    got = tf.function(lambda a, b: fused_einsum.multiply(product, a, b), input_signature=specs)(a, b)
    expected = np.einsum(equation, a.astype("float64"), b.astype("float64"))
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("equation", fused_einsum.PROBED)
def test_gradients_agree_with_tensorflow(equation):
    def gradients(way):
        with tf.GradientTape() as tape:
            inputs = [tf.constant(x) for x in operands(equation)]
            tape.watch(inputs)
            loss = tf.reduce_sum(tf.square(way(*inputs)))
        return [g.numpy() for g in tape.gradient(loss, inputs)]

    product = fused_einsum.parse(equation)
    plain = gradients(lambda a, b: tf.einsum(equation, a, b))
    fused = gradients(lambda a, b: fused_einsum.multiply(product, a, b))
    zeros = [np.zeros_like(a) for a in plain]
    assert worst_disagreement(plain, fused, zeros, tolerance()) <= 1


@pytest.mark.parametrize(
    "equation",
    [
        "ab,bc",
        "...ab,bc->...ac",
        "aab,bc->ac",
        "abc,cd->ad",
        "ab,cd->abcd",
        "ab,bc,cd->ad",
        "ab->ba",
        "ab,ab->ab",
    ],
)
def test_what_is_no_product_of_two_matrices_is_left_to_keras(equation):
    assert fused_einsum.parse(equation) is None


def test_a_batch_of_unknown_size_keeps_the_shape_that_is_known():
    layer = keras.layers.EinsumDense("abc,cde->abde", (3, 4, 5))
    layer.build((None, 3, 4))
    call = tf.function(layer, input_signature=[tf.TensorSpec([None, 3, 4])])
    with fused_einsum.fused({"float32"}):
        graph = call.get_concrete_function()
    assert graph.output_shapes.as_list() == [None, 3, 4, 5]
    types = {op.type for op in graph.graph.get_operations()}
    assert "MatMul" in types
    assert not types & {"Einsum", "BatchMatMulV2"}


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bqhd,bkhd->bhqk", ([3, 4, 2, 8], [1, 5, 2, 8])),  # Keras broadcasts a batch of one
        ("bij,bjk->bik", ([2, 3, 6], [3, 4, 5])),  # and refuses this
        ("abcd,cde->abe", ([2, 3, None, 4], [5, 4, 6])),  # and looks at run time here
    ],
)
def test_sizes_that_are_not_known_to_fit_are_left_to_keras(equation, shapes, monkeypatch):
    monkeypatch.setattr(fused_einsum, "multiply", lambda *_: pytest.fail("the product was used"))
    call = tf.function(
        lambda a, b: keras.ops.einsum(equation, a, b), input_signature=[tf.TensorSpec(s) for s in shapes]
    )
    refused = pytest.raises(ValueError, match="must be equal") if equation == "bij,bjk->bik" else None
    with fused_einsum.fused({"float32"}), refused or contextlib.nullcontext():
        call.get_concrete_function()


def test_attention_over_unknown_lengths_is_multiplied():
    call = tf.function(
        lambda a, b: keras.ops.einsum("aecd,abcd->acbe", a, b),
        input_signature=[tf.TensorSpec([None, None, 2, 8]), tf.TensorSpec([None, None, 2, 8])],
    )
    with fused_einsum.fused({"float32"}):
        assert call.get_concrete_function().output_shapes.as_list() == [None, 2, None, None]
    a, b = np.ones((3, 4, 2, 8), "float32"), np.ones((3, 5, 2, 8), "float32")
    np.testing.assert_array_equal(call(a, b), np.full((3, 2, 5, 4), 8))


@pytest.mark.parametrize("dtype", ["int32", "float64"])
def test_other_dtypes_are_left_to_keras(dtype, monkeypatch):
    monkeypatch.setattr(fused_einsum, "multiply", lambda *_: pytest.fail("the product was used"))
    a, b = (np.arange(6).reshape(shape).astype(dtype) for shape in ((2, 3), (3, 2)))
    with fused_einsum.fused({"float32"}):
        np.testing.assert_array_equal(keras.ops.einsum("ab,bc->ac", a, b), a @ b)


@pytest.mark.parametrize("dtype", EPSILON)
def test_the_probe_accepts_the_product_and_refuses_a_wrong_one(dtype, monkeypatch):
    assert fused_einsum.probe(dtype) <= 1
    right = fused_einsum.multiply
    monkeypatch.setattr(fused_einsum, "multiply", lambda *arguments: 1.2 * right(*arguments))
    assert fused_einsum.probe(dtype) > 1
