"""Few values of a layer stay few integers in the file, and zeros stay zeros."""

import zlib

import keras
import numpy as np
import pytest

import tfaccel
from tfaccel.export import workbench
from tfaccel.export.interpreter import open_with_all_tensors
from tfaccel.export.rounding import best_scales, round_with_inputs
from tfaccel.export.shared_values import MOST_VALUES, can_share_a_scale

L = keras.layers
PALETTE = np.array([-0.9, -0.55, -0.31, -0.2, 0.0, 0.17, 0.3, 0.42, 0.6], "float32")


def shared_kernel(shape, palette=PALETTE, seed=0):
    """A kernel whose channels take the same values, each of another range: some lack the large ones."""
    random = np.random.default_rng(seed)
    picks = random.integers(0, len(palette), shape)
    small = random.random(shape[-1]) < 0.5
    middle = len(palette) // 2
    return palette[np.where(small, np.clip(picks, middle - 2, middle + 2), picks)]


def trained(layers, shape=(12, 12, 3), palette=PALETTE):
    """A net of such kernels, with normalizations that have seen something and gammas of both signs."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input(shape), *layers, L.Dense(10, name="scores")])
    random = np.random.default_rng(1)
    for layer in model.layers[:-1]:
        for variable in layer.weights:
            if variable.name == "kernel":
                variable.assign(shared_kernel(variable.shape, palette))
            elif variable.name == "gamma" or "moving" not in variable.name:
                variable.assign(random.normal(size=variable.shape))
    x = random.normal(size=(64, *shape)).astype("float32")
    for axis in range(1, len(shape)):  # neighbours are alike, as in images
        x = np.cumsum(x, axis) / 3
    return see(model, x), x


def see(model, x):
    """Normalizations know these samples, as if they had been trained on."""
    for layer in model.layers:
        layer.momentum = 0.0
    model(x, training=True)
    return model


def integers(path, size):
    """The integer weights of so many numbers in a file."""
    interpreter = open_with_all_tensors(path.read_bytes())
    found = []
    for detail in interpreter.get_tensor_details():
        if detail["dtype"] is np.int8 and len(detail["quantization_parameters"]["scales"]) > 1:
            tensor = interpreter.get_tensor(detail["index"])
            if tensor.size == size:
                found.append(tensor)
    assert found
    return found


def norm_block(layer):
    return [layer, L.BatchNormalization(), L.ReLU(), L.Flatten()]  # which the converter folds


NETS = {
    "convolution": lambda: trained([L.Conv2D(16, 3, name="shared"), L.Flatten()]),
    "folded": lambda: trained(norm_block(L.Conv2D(16, 3, use_bias=False, name="shared"))),
    "dense": lambda: trained([L.Dense(16, name="shared")], (40,)),
    "dense folded": lambda: trained(norm_block(L.Dense(16, use_bias=False, name="shared")), (40,)),
    "conv1d": lambda: trained([L.Conv1D(16, 5, name="shared"), L.Flatten()], (12, 6)),
}


@pytest.mark.parametrize("recipe", ["int8", "weight_only_int8", "dynamic_int8"])
@pytest.mark.parametrize("net", list(NETS))
def test_a_value_is_one_integer_in_all_channels(net, recipe, tmp_path):
    model, x = NETS[net]()
    path = tmp_path / "m.tflite"
    file = tfaccel.export_tflite(model, path, recipe, calibration=x)
    kernel = np.asarray(model.get_layer("shared").kernel)
    expected = np.round(127 * kernel / np.abs(kernel).max())
    (found,) = integers(path, kernel.size)
    gammas = [layer.gamma for layer in model.layers if hasattr(layer, "gamma")]
    signs = np.sign(gammas[0]) if gammas else 1.0
    rows = np.moveaxis(expected * signs, -1, 0).reshape(kernel.shape[-1], -1)
    np.testing.assert_array_equal(found.reshape(kernel.shape[-1], -1), rows)
    assert file.parity.sqnr_db > 25


def test_the_zipped_file_is_smaller_and_as_good(tmp_path, monkeypatch):
    def zipped(name):
        file = tfaccel.export_tflite(model, tmp_path / name, "int8", calibration=x)
        return len(zlib.compress((tmp_path / name).read_bytes())), file.parity.sqnr_db

    layers = norm_block(L.Conv2D(64, 3, use_bias=False, name="shared"))
    model, x = trained([*layers[:-1], L.GlobalAveragePooling2D()], (12, 12, 32))
    small, near = zipped("shared.tflite")
    monkeypatch.setattr(workbench, "shared_kernels", lambda model: [])
    large, nearest = zipped("alone.tflite")
    assert small < 0.92 * large
    assert near > nearest - 3


def test_channels_that_are_gone_do_no_harm(tmp_path):
    model, x = trained(norm_block(L.Conv2D(16, 3, use_bias=False, name="shared")))
    kernel = np.asarray(model.get_layer("shared").kernel).copy()
    kernel[..., 3] = 0
    model.get_layer("shared").kernel.assign(kernel)
    gamma = np.asarray(model.layers[1].gamma).copy()
    gamma[5] = 0
    model.layers[1].gamma.assign(gamma)
    see(model, x)
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8", calibration=x)
    (found,) = integers(tmp_path / "m.tflite", kernel.size)
    assert not found[3].any()
    assert not found[5].any()
    assert file.parity.sqnr_db > 25


def test_four_bits_keep_a_scale_for_each_channel(tmp_path):
    model, x = NETS["dense"]()
    tfaccel.export_tflite(model, tmp_path / "m.tflite", "int4_weights", calibration=x)
    interpreter = open_with_all_tensors((tmp_path / "m.tflite").read_bytes())
    scales = [each["quantization_parameters"]["scales"] for each in interpreter.get_tensor_details()]
    assert any(max(each) > 1.5 * min(each) for each in scales if len(each) == 16)


def rows_of(values, channels=8, weights=400, seed=0):
    """Rows that take some values, each row all of them."""
    random = np.random.default_rng(seed)
    return np.asarray(values, "float32")[random.integers(0, len(values), (channels, weights))]


def test_which_channels_can_share_a_scale():
    random = np.random.default_rng(0)
    assert can_share_a_scale(rows_of(PALETTE))
    assert can_share_a_scale(rows_of(np.linspace(-1, 1, MOST_VALUES)))
    assert not can_share_a_scale(rows_of(random.normal(size=MOST_VALUES + 1)))
    assert not can_share_a_scale(random.normal(size=(8, 400)))
    assert not can_share_a_scale(np.zeros((8, 400)))
    # Of another number of values, where they are whole steps already, however few weights there are.
    grid = np.arange(-127, 128) * 0.003
    assert can_share_a_scale(rows_of(grid))
    assert can_share_a_scale(np.array([[0.0, 1.0, -1.0]]))
    late = np.zeros((10, 10_000))
    late.flat[-90:] = random.normal(size=90)  # many values where the first look sees none
    assert not can_share_a_scale(late)


def test_channels_with_values_of_their_own_keep_their_scales():
    random = np.random.default_rng(0)
    own = np.concatenate([rows_of(random.normal(size=8), 1, seed=seed) for seed in range(4)])
    assert len(np.unique(own)) <= MOST_VALUES
    assert not can_share_a_scale(own)
    small = np.concatenate([rows_of(PALETTE, 1), 0.003 * rows_of(PALETTE, 1)])
    assert not can_share_a_scale(small)


def test_values_that_would_become_one_or_zero_keep_their_scales():
    assert not can_share_a_scale(rows_of([-1, -0.5, -0.001, 0.001, 0.003, 0.5, 1]))
    assert not can_share_a_scale(rows_of([-1, 0, 0.3, 0.302, 0.9]))
    # A channel of small ones would be rounded coarsely.
    assert not can_share_a_scale(np.concatenate([rows_of([-1, 0.0236, 0.5]), rows_of([0.0236, -0.0354], 1)]))


@pytest.mark.parametrize("recipe", ["int8", "weight_only_int8"])
def test_no_output_is_lost(recipe, tmp_path):
    """Clustered by channels, the second a hundredth of the first."""
    random = np.random.default_rng(0)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((200,)), L.Dense(2)])
    kernel = np.concatenate([rows_of(random.normal(size=16), 1, 200), 0.003 * rows_of(PALETTE, 1, 200)]).T
    model.layers[0].kernel.assign(kernel)
    x = random.normal(size=(128, 200)).astype("float32")
    tfaccel.export_tflite(model, tmp_path / "m.tflite", recipe, calibration=x)
    interpreter = open_with_all_tensors((tmp_path / "m.tflite").read_bytes())
    (found,) = [
        interpreter.get_tensor(each["index"])
        for each in interpreter.get_tensor_details()
        if each["dtype"] is np.int8 and list(each["shape"]) == [2, 200]
    ]
    assert np.abs(found).max(1).min() > 100


def test_layers_of_equal_shape_are_told_apart(tmp_path):
    """One shares values, the other, of the same shape, does not."""
    random = np.random.default_rng(0)
    model, x = trained([L.Dense(40, name="shared"), L.Dense(40, name="free")], (40,))
    model.get_layer("free").kernel.assign(random.normal(size=(40, 40)))
    tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8", calibration=x)
    distinct = sorted(len(np.unique(each)) for each in integers(tmp_path / "m.tflite", 1600))
    assert distinct[0] == len(PALETTE)
    assert distinct[1] > 100


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_with_samples_keeps_zeros(bits):
    with_samples = nearest = 0.0
    for seed in range(4):
        random = np.random.default_rng(seed)
        weights = random.normal(size=(16, 60)) * (random.random((16, 60)) < 0.3)
        inputs = np.maximum(random.normal(size=(400, 60)) @ random.normal(size=(60, 60)) / 8 + 0.3, 0)
        products = inputs.T @ inputs
        scales, top = best_scales(weights, bits, np.diag(products)), 2 ** (bits - 1) - 1
        rounded = round_with_inputs(weights, scales, bits, products)
        assert not rounded[weights == 0].any()
        each = np.clip(np.round(weights / scales), -top, top) * scales
        with_samples += np.square(inputs @ (rounded - weights).T).sum()
        nearest += np.square(inputs @ (each - weights).T).sum()
    # The weights that are left make up for what rounding gets wrong, all the same.
    assert with_samples < 0.85 * nearest


@pytest.mark.parametrize("recipe", ["int8", "int4_weights"])
def test_a_pruned_model_is_as_sparse_in_the_file(recipe, helpers, small, tmp_path):
    model = helpers.compile(helpers.build())
    prune = tfaccel.PruneWeights(0.8, layers=keras.layers.Dense)
    model.fit(*small, epochs=3, verbose=0, callbacks=[prune])
    tfaccel.export_tflite(model, tmp_path / "m.tflite", recipe, calibration=small[0])
    interpreter = open_with_all_tensors((tmp_path / "m.tflite").read_bytes())
    shares = [
        float(np.mean(interpreter.get_tensor(each["index"]) == 0))
        for each in interpreter.get_tensor_details()
        if list(each["shape"]) == [10, 100]
    ]
    zeros = float(np.mean(np.asarray(model.layers[-1].kernel) == 0))
    assert zeros == pytest.approx(0.8, abs=0.01)
    assert min(shares) >= zeros
