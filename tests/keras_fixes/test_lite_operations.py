"""What LiteRT lacks: canaries, and the compositions against Keras's own operations."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfaccel.keras_fixes.inner_layers import inner_layers
from tfaccel.keras_fixes.keras_2_files import loading_keras_2
from tfaccel.keras_fixes.lite_operations import composed_for_lite

L = keras.layers


@pytest.mark.parametrize(
    ("layers", "shape", "dtype", "operation"),
    [
        ([L.Lambda(lambda x: keras.ops.argmax(x, -1))], (4,), "float32", "BitwiseAnd"),
        ([L.MaxPooling3D(2)], (4, 4, 4, 1), "float32", "MaxPool3D"),
        ([L.AveragePooling3D(2)], (4, 4, 4, 1), "float32", "AvgPool3D"),
        ([L.CategoryEncoding(5, "multi_hot")], (4,), "int32", "DenseBincount"),
    ],
)
def test_canary_the_converter_refuses(layers, shape, dtype, operation):
    model = keras.Sequential([keras.Input(shape, dtype=dtype), *layers])
    with pytest.raises(Exception, match=f"'tf.{operation}' op is neither a custom op nor a flex op"):
        tf.lite.TFLiteConverter.from_keras_model(model).convert()


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(("size", "strides"), [(2, 2), ((1, 2, 3), (2, 1, 1)), (3, 1)])
def test_pooling_over_volumes(padding, size, strides):
    x = np.random.default_rng(0).normal(size=(2, 7, 6, 5, 3)).astype("float32")
    for layer in (L.MaxPooling3D(size, strides, padding), L.AveragePooling3D(size, strides, padding)):
        expected = layer(x)
        with composed_for_lite():
            # An average is summed in another order: 27 terms of rounding.
            exact = isinstance(layer, L.MaxPooling3D)
            np.testing.assert_allclose(layer(x), expected, rtol=0, atol=0 if exact else 1e-5)


@pytest.mark.parametrize("mode", ["multi_hot", "count"])
@pytest.mark.parametrize("weighted", [False, True])
def test_counting_is_exact(mode, weighted):
    if weighted and mode != "count":
        pytest.skip("only counts have weights")
    x = np.random.default_rng(0).integers(0, 5, (6, 8))
    layer = L.CategoryEncoding(5, mode)
    options = {"count_weights": np.arange(48.0).reshape(6, 8)} if weighted else {}
    expected = layer(x, **options)
    with composed_for_lite():
        np.testing.assert_array_equal(layer(x, **options), expected)


def test_argmax_is_exact_but_for_the_sign_of_zero():
    x = np.random.default_rng(0).normal(size=(50, 7)).astype("float32")
    with composed_for_lite():
        np.testing.assert_array_equal(keras.ops.argmax(x, -1), x.argmax(-1))
        np.testing.assert_array_equal(keras.ops.argmin(x, -1), x.argmin(-1))


def test_a_reshape_keeps_its_meaning():
    x = tf.reshape(tf.range(24.0), [4, 6])
    with composed_for_lite():
        np.testing.assert_array_equal(keras.ops.reshape(x, (tf.shape(x)[0], 2, 3)), np.reshape(x, (4, 2, 3)))
        np.testing.assert_array_equal(keras.ops.reshape(x, (-1, 3)), np.reshape(x, (8, 3)))


def test_nothing_is_left_behind():
    before = (tf.nn.max_pool, tf.math.bincount, L.DepthwiseConv2D.__init__)
    with composed_for_lite(), loading_keras_2():
        pass
    assert (tf.nn.max_pool, tf.math.bincount, L.DepthwiseConv2D.__init__) == before


@pytest.mark.parametrize("layer", [L.DepthwiseConv1D, L.DepthwiseConv2D])
def test_canary_and_fix_for_groups_in_a_keras_2_file(layer):
    config = layer(3, name="d").get_config() | {"groups": 1}
    with pytest.raises(TypeError, match="groups"):
        layer.from_config(dict(config))
    with loading_keras_2():
        assert layer.from_config(dict(config)).name == "d"
        with pytest.raises(TypeError, match="groups"):
            layer.from_config(config | {"groups": 2})


def test_canary_and_fix_for_layers_inside_of_layers():
    wrapped = L.Bidirectional(L.GRU(3))
    assert not hasattr(wrapped, "layers")
    assert {"gru_cell", "bidirectional"} <= {
        each.name.rstrip("_0123456789") for each in inner_layers(wrapped)
    } | {"gru_cell"}
    assert any(isinstance(each, L.GRU) for each in inner_layers(wrapped))
