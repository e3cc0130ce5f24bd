"""Layer by layer through the real converter: what a Keras model may contain, and still runs in LiteRT."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel
from tfaccel.export.interpreter import TFLiteRunner

L = keras.layers


def stack(shape, *layers, dtype="float32"):
    return keras.Sequential([keras.Input(shape, dtype=dtype), *layers])


def functional(shape, call):
    inputs = keras.Input(shape)
    return keras.Model(inputs, call(inputs))


def normalized():
    layer = L.Normalization()
    layer.adapt(np.random.default_rng(0).random((20, 8)) * 4)
    return stack((8,), layer, L.Dense(3))


def nested():
    inner = stack((8,), L.Dense(4, activation="relu"), L.Dense(4))
    first, second = keras.Input((8,), name="a"), keras.Input((8,), name="b")
    outputs = {"same": L.Dot(1)([inner(first), inner(second)]), "other": inner(first) - inner(second)}
    return keras.Model({"a": first, "b": second}, outputs)


class Gate(L.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],))

    def call(self, x):
        return keras.ops.silu(x) * self.scale + keras.ops.mean(x, -1, keepdims=True)


ACTIVATIONS = ["elu", "selu", "softplus", "softsign", "swish", "gelu", "mish", "hard_sigmoid", "hard_silu"]
ACTIVATIONS += ["relu6", "log_softmax", "celu"]

MODELS = {
    "attention": lambda: functional((10, 16), lambda x: L.MultiHeadAttention(2, 8)(x, x)),
    "causal": lambda: functional((10, 16), lambda x: L.MultiHeadAttention(2, 8)(x, x, use_causal_mask=True)),
    "grouped attention": lambda: functional((10, 16), lambda x: L.GroupQueryAttention(8, 4, 2)(x, x)),
    "dot attention": lambda: functional((6, 4), lambda x: L.Attention()([x, x])),
    "masked embedding": lambda: stack(
        (10,), L.Embedding(50, 8, mask_zero=True), L.GlobalAveragePooling1D(), dtype="int32"
    ),
    "layer norm": lambda: stack((8, 8), L.LayerNormalization(), L.RMSNormalization(), L.Dense(4)),
    "group norm": lambda: stack((8, 8, 8), L.GroupNormalization(4), L.Conv2D(4, 3)),
    "unit and spectral norm": lambda: stack((8,), L.UnitNormalization(), L.SpectralNormalization(L.Dense(4))),
    "normalization": normalized,
    "rescaling": lambda: stack((8, 8, 3), L.Rescaling(1 / 255), L.Resizing(6, 6), dtype="uint8"),
    "augmentation": lambda: stack((8, 8, 3), L.RandomFlip(), L.RandomRotation(0.1), L.CenterCrop(6, 6)),
    "depthwise": lambda: stack((8, 8, 4), L.DepthwiseConv2D(3, depth_multiplier=2), L.BatchNormalization()),
    "separable": lambda: stack((8, 8, 4), L.SeparableConv2D(6, 3), L.Flatten()),
    "transposed": lambda: stack((8, 8, 4), L.Conv2DTranspose(3, 3, strides=2, padding="same")),
    "grouped": lambda: stack((8, 8, 4), L.Conv2D(8, 3, groups=2)),
    "one dimension": lambda: stack(
        (12, 4), L.Conv1D(8, 3, dilation_rate=2, padding="causal"), L.MaxPooling1D()
    ),
    "three dimensions": lambda: stack((6, 6, 6, 2), L.Conv3D(3, 3), L.AveragePooling3D(2)),
    "channels first": lambda: stack((3, 8, 8), L.Conv2D(4, 3, data_format="channels_first")),
    "pooling": lambda: stack((8, 8, 4), L.AveragePooling2D(3, 2), L.UpSampling2D(), L.GlobalMaxPooling2D()),
    "time distributed": lambda: stack((3, 8, 8, 2), L.TimeDistributed(L.Conv2D(2, 3)), L.Flatten()),
    "activations": lambda: stack((8,), *[L.Dense(8, activation=name) for name in ACTIVATIONS]),
    "trained activations": lambda: stack((8, 8, 4), L.PReLU(shared_axes=[1, 2]), L.LeakyReLU(), L.Softmax()),
    "einsum": lambda: stack((8, 4), L.EinsumDense("abc,cd->abd", output_shape=(None, 6), bias_axes="d")),
    "nested and shared": nested,
    "custom": lambda: stack((8,), Gate(), L.Dense(3)),
    "open length": lambda: stack((None, 4), L.Conv1D(4, 3), L.GlobalAveragePooling1D(), L.Dense(2)),
    "open size": lambda: stack((None, None, 3), L.Conv2D(4, 3), L.GlobalAveragePooling2D(), L.Dense(2)),
    # Composed of what LiteRT has; TensorFlow's converter refuses each alone.
    "argmax": lambda: stack((8,), L.Dense(4), L.Lambda(lambda x: keras.ops.argmax(x, -1))),
    "pooled volumes": lambda: stack((7, 6, 5, 2), L.MaxPooling3D((2, 3, 2), (1, 2, 3))),
    "padded volumes": lambda: stack((7, 6, 5, 2), L.MaxPooling3D(3, 2, padding="same")),
    "decoder": lambda: stack(
        (6, 5, 3), *[f() for _ in range(3) for f in (L.UpSampling2D, lambda: L.Conv2D(4, 3, padding="same"))]
    ),
    "repeated": lambda: stack(
        (6, 4),
        L.UpSampling1D(3),
        L.Conv1D(4, 3),
        L.Reshape((4, 4, 2, 2)),
        L.UpSampling3D((1, 2, 3)),
        L.Conv3D(2, 2),
    ),
    "multi-hot": lambda: stack((8,), L.CategoryEncoding(5, "multi_hot"), dtype="int32"),
    "counts": lambda: stack((8,), L.CategoryEncoding(5, "count"), dtype="int32"),
}
WITHOUT_INTEGERS = ("multi-hot", "counts", "argmax", "masked embedding", "nested and shared")


def samples(model, rows=40):
    generator = np.random.default_rng(0)

    def of(tensor):
        shape = (rows, *(16 if size is None else size for size in tensor.shape[1:]))
        if tensor.dtype in ("int32", "uint8"):
            return generator.integers(0, 5, shape).astype(tensor.dtype)
        return generator.random(shape, dtype="float32")

    structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    return keras.tree.map_structure(of, structure)


@pytest.mark.parametrize("kind", MODELS)
def test_float_files_agree(tmp_path, kind):
    model = MODELS[kind]()
    before = [vars(layer).get("call") for layer in model.layers]
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", calibration=samples(model))
    assert file.parity.sqnr_db > 100  # 24 bits are 144 dB
    assert file.batch_size is None
    assert [vars(layer).get("call") for layer in model.layers] == before


@pytest.mark.filterwarnings("ignore:calibration looks like noise")
@pytest.mark.parametrize("recipe", ["int8", "int16x8"])
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in WITHOUT_INTEGERS])
def test_integer_files_agree(tmp_path, kind, recipe):
    model = MODELS[kind]()
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", recipe, calibration=samples(model, 64))
    # 8 bits of a range are about 40 dB; a dozen layers one behind the other keep half of that.
    assert file.parity.sqnr_db > (20 if recipe == "int8" else 25)


@pytest.mark.filterwarnings("ignore:calibration looks like noise")
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_biases_that_are_equal_leave_no_operation_in_floats(tmp_path, value):
    """The converter keeps equal constants once: two kinds of layers may read one."""
    bias = keras.initializers.Constant(value)
    wide, deep = (
        (lambda: L.Conv2D(8, 1, bias_initializer=bias)),
        (lambda: L.DepthwiseConv2D(3, bias_initializer=bias)),
    )
    model = stack((9, 9, 4), wide(), deep(), wide(), deep(), L.Flatten(), L.Dense(8, bias_initializer=bias))
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8", calibration=samples(model, 64))
    assert file.float_operations == ()
    assert file.parity.sqnr_db > 30


@pytest.mark.filterwarnings("ignore:calibration looks like noise")
def test_a_constant_that_is_compared_stays_in_floats(tmp_path):
    least = np.linspace(0, 1, 8, dtype="float32")
    bounded = L.Lambda(lambda x: keras.ops.maximum(x, least))
    model = stack((6,), L.Dense(8, bias_initializer="ones"), bounded, L.Dense(3))
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8", calibration=samples(model, 64))
    assert file.parity.sqnr_db > 25
    assert any("MAXIMUM" in each for each in file.float_operations)


def test_weights_and_arrays_can_be_repeated(tmp_path):
    class Stretched(L.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(1, 3), initializer="random_normal")

        def call(self, x):
            stretched = keras.ops.repeat(self.scale, 2, axis=1)
            return x * stretched + keras.ops.repeat(np.ones((1, 3), "float32"), 2, axis=1)

    model = stack((6,), Stretched())
    assert (
        tfaccel.export_tflite(model, tmp_path / "m.tflite", calibration=samples(model)).parity.sqnr_db > 100
    )


def test_canary_the_converter_refuses_several_upsamplings():
    with pytest.raises(Exception, match="Conv2D"):
        tf.lite.TFLiteConverter.from_keras_model(MODELS["decoder"]()).convert()


def test_a_mask_does_not_take_the_range_of_what_it_masks(tmp_path):
    """The -1e9 of a causal mask in one range with the scores left 5 dB of the output."""
    model = MODELS["causal"]()
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8", calibration=samples(model, 64))
    assert file.parity.sqnr_db > 25
    assert 0 < len(file.float_operations) < 8


@pytest.mark.slow
def test_a_whole_application(tmp_path):
    model = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), classes=5, alpha=0.35)
    x = np.random.default_rng(0).random((32, 32, 32, 3), dtype="float32")
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", "dynamic_int8", calibration=x)
    assert file.parity.sqnr_db > 20
    assert file.size_bytes < 0.45 * 4 * model.count_params()


def test_a_file_with_open_sizes_runs_in_the_plain_interpreter(tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    file = tfaccel.export_tflite(MODELS["open size"](), tmp_path / "m.tflite")
    interpreter = Interpreter(str(file.path))
    interpreter.allocate_tensors()  # fails on the converter's own file: a picture of 1 × 1 is too small
    interpreter.invoke()
    assert TFLiteRunner(file.path).run((np.ones((2, 30, 20, 3), "float32"),))["output_0"].shape == (2, 2)
