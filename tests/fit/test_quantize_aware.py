"""Training with rounded weights: the grid against TensorFlow's, in every kind of step, gone at the end."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from distribution_cells import mirrored
from small_fits import Interrupt, fit, fit_under, kernels, off_grid

import tfaccel
from tfaccel.export.interpreter import open_with_all_tensors
from tfaccel.fit._rounded_weights import on_grid


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_grid_is_tensorflows_narrow_range(bits):
    values = np.random.default_rng(0).normal(size=(3, 3, 4, 6)).astype("float32")
    top = np.abs(values).max((0, 1, 2))
    expected = tf.quantization.fake_quant_with_min_max_vars_per_channel(
        values, -top, top, num_bits=bits, narrow_range=True
    )
    # Halves may go either way: TensorFlow adds the range's lower end before it rounds.
    found = on_grid(tf.constant(values), bits, [3]).numpy()
    steps = 2 * top / (2**bits - 2)
    wrong = np.abs(found - expected.numpy()) > 1e-5
    halves = np.abs(np.abs(values / steps % 1) - 0.5) < 1e-3
    assert not (wrong & ~halves).any()
    assert wrong.mean() < 0.01


def test_the_grid_by_hand_and_of_zeros():
    values = tf.constant([[1.0, 0.0], [-0.3, 0.0], [0.6, 0.0]])
    np.testing.assert_allclose(on_grid(values, 2, [1]), [[1, 0], [0, 0], [1, 0]])
    np.testing.assert_allclose(on_grid(values, 3, []), [[1, 0], [-1 / 3, 0], [2 / 3, 0]], rtol=1e-6)


def test_a_step_is_what_numpy_says():
    """The gradient of the rounded weights moves the exact ones."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 6)).astype("float32"), rng.normal(size=(64, 3)).astype("float32")
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, use_bias=False)])
    exact = rng.normal(size=(6, 3)).astype("float32")
    model.set_weights([exact])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, y, batch_size=16, shuffle=False, verbose=0, callbacks=[tfaccel.QuantizeAware(3, None)])

    def rounded(weights):
        scale = np.abs(weights).max(0) / 3
        return np.round(weights / scale) * scale

    for step in range(4):
        rows = slice(16 * step, 16 * step + 16)
        exact = exact - 0.1 * 2 * x[rows].T @ (x[rows] @ rounded(exact) - y[rows]) / (16 * 3)
    np.testing.assert_allclose(kernels(model)[0], rounded(exact), atol=1e-5)


def test_a_layer_reads_the_grid_itself():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(50, use_bias=False)])
    model.compile("adam", "mse")
    one_each = np.eye(6, dtype="float32")
    read = {}

    def look(epoch, logs):
        read["eager"], read["graph"] = model(one_each).numpy(), model.predict(one_each, verbose=0)
        read["expected"] = on_grid(tf.constant(model.layers[0].kernel.numpy()), 8, [1]).numpy()

    see = keras.callbacks.LambdaCallback(on_epoch_end=look)
    model.fit(one_each, np.ones((6, 50)), verbose=0, callbacks=[tfaccel.QuantizeAware(8, None), see])
    np.testing.assert_array_equal(read["eager"], read["expected"])
    # Grappler multiplies by 1 / 127 where it was to divide by 127.
    np.testing.assert_allclose(read["graph"], read["expected"], rtol=3e-7)


def test_no_layers_is_bit_identical(helpers, small):
    expected, _ = fit(helpers, small)
    actual, _ = fit(helpers, small, [tfaccel.QuantizeAware(8, None, layers={keras.layers.Layer: 0})])
    for a, b in zip(actual.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


AXES = [
    ("float32", False, 1, None, "sequential", 8),
    ("float32", True, 4, 2, "subclassed", 4),
    ("mixed_bfloat16", False, 4, None, "functional", 4),
    ("mixed_float16", True, 1, 2, "sequential", 8),
    ("mixed_float16", False, 4, 2, "functional", 2),
    ("mixed_bfloat16", True, 4, None, "subclassed", 8),
]


@pytest.mark.parametrize(("policy", "jit", "steps", "accumulation", "kind", "bits"), AXES)
def test_ends_on_the_grid_in_every_kind_of_step(helpers, small, policy, jit, steps, accumulation, kind, bits):
    keras.config.set_dtype_policy(policy)
    adam = keras.optimizers.Adam(1e-3, gradient_accumulation_steps=accumulation)
    quantize = tfaccel.QuantizeAware(bits)
    model, history = fit(helpers, small, [quantize], adam, kind, jit_compile=jit, steps_per_execution=steps)
    keras.config.set_dtype_policy("float32")
    assert [off_grid(kernel, bits) < 1e-3 for kernel in kernels(model)] == [True, True]
    assert np.isfinite(history["loss"]).all()
    assert all(type(v) is keras.Variable for v in model.trainable_variables)
    assert not any("call" in vars(layer) for layer in model.layers)


def test_all_roads_end_alike(helpers, small):
    accelerator = tfaccel.Accelerator("one_device", "float32", False, "fused", steps_per_execution=4)
    with accelerator.scope():
        fused = helpers.compile(helpers.build(), **accelerator.compile_options())
    data = accelerator.dataset(*small, batch_size=24, shuffle=False)
    fused.fit(data, epochs=2, verbose=0, callbacks=[tfaccel.QuantizeAware(4, None)])
    expected = kernels(fit(helpers, small, [tfaccel.QuantizeAware(4, None)])[0])
    roads = [{"steps_per_execution": 4}, {"jit_compile": True}, {"run_eagerly": True}]
    results = [kernels(fit(helpers, small, [tfaccel.QuantizeAware(4, None)], **road)[0]) for road in roads]
    for result in [kernels(fused), *results]:
        for a, b in zip(result, expected, strict=True):
            # A weight that ends halfway between two steps may fall to either.
            assert np.mean(np.abs(a - b) > 1e-4) < 0.02


def test_two_replicas_end_where_one_device_does(helpers, small):
    def run(strategy):
        return kernels(fit_under(strategy, helpers, small, tfaccel.QuantizeAware(4, None)))

    one = run("one_device")
    two = run(mirrored(2))
    for a, b in zip(two, one, strict=True):
        assert np.mean(np.abs(a - b) > 1e-4) < 0.02


def test_validation_sees_the_rounded_weights_and_checkpoints_the_exact_ones(helpers, small, tmp_path):
    seen = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append((logs["val_loss"], self.model.get_weights()))
            self.model.save(tmp_path / "between.keras")

    sgd = keras.optimizers.SGD(0.05)
    model, _ = fit_with_validation(helpers, small, [tfaccel.QuantizeAware(2, None), Look()], sgd)
    loss, weights = seen[0]
    assert off_grid(weights[2], 2) > 0.1
    loaded = keras.models.load_model(tmp_path / "between.keras")
    np.testing.assert_array_equal(loaded.get_weights()[2], seen[-1][1][2])
    rounded = [np.asarray(on_grid(tf.constant(w), 2, [w.ndim - 1])) if w.ndim > 1 else w for w in weights]
    model.set_weights(rounded)
    assert model.evaluate(*small, batch_size=24, verbose=0)[0] == pytest.approx(loss, rel=1e-4)


def fit_with_validation(helpers, small, callbacks, optimizer):
    model = helpers.compile(helpers.build(), optimizer)
    history = model.fit(
        *small, batch_size=24, epochs=2, verbose=0, callbacks=callbacks, validation_data=small
    )
    return model, history.history


def test_fit_twice_after_and_interrupted(helpers, small):
    quantize = tfaccel.QuantizeAware(4)
    model, _ = fit(helpers, small, [quantize])
    model.fit(*small, batch_size=24, verbose=0, callbacks=[quantize])
    assert off_grid(kernels(model)[1], 4) < 1e-3
    model.fit(*small, batch_size=24, verbose=0)
    assert off_grid(kernels(model)[1], 4) > 0.1, "a plain fit moves all weights"
    with pytest.raises(KeyboardInterrupt):
        model.fit(*small, batch_size=24, verbose=0, callbacks=[quantize, Interrupt()])
    model.fit(*small, batch_size=24, verbose=0)
    assert all(type(v) is keras.Variable for v in model.trainable_variables)
    assert not any("call" in vars(layer) for layer in model.layers)


def test_recurrent_attention_and_depthwise_layers():
    layers = keras.layers
    inputs = keras.Input((6, 8))
    hidden = layers.MultiHeadAttention(2, 4)(inputs, inputs)
    hidden = layers.Bidirectional(layers.GRU(4, return_sequences=True))(hidden)
    hidden = layers.SeparableConv1D(8, 3)(hidden)
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(hidden)))
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(48, 6, 8)).astype("float32")
    before = model.predict(x, verbose=0)
    quantize = tfaccel.QuantizeAware(4)
    model.fit(x, np.zeros((48, 2)), epochs=2, verbose=0, callbacks=[quantize])
    assert np.abs(model.predict(x, verbose=0) - before).max() > 1e-3
    checked = 0
    for variable in model.trainable_variables:
        dense = "/dense" in f"/{variable.path}" and variable.name == "kernel"
        if dense or variable.name in ("recurrent_kernel", "pointwise_kernel"):
            assert off_grid(np.asarray(variable), 4) < 1e-3
            checked += 1
    depthwise = next(np.asarray(v) for v in model.weights if v.name == "depthwise_kernel")
    assert off_grid(depthwise.reshape(-1, 8), 8) < 1e-3
    assert checked == 4


@pytest.mark.parametrize(
    ("scope", "bits", "one_grid"), [("layer", 8, True), ("layer", 4, False), ("channel", 8, False)]
)
def test_it_keeps_zeros_and_clusters(helpers, small, scope, bits, one_grid):
    model, _ = fit(helpers, small, [tfaccel.PruneWeights(0.7)])
    zeros = kernels(model)[1] == 0
    chain = [tfaccel.ClusterWeights(16, scope=scope), tfaccel.QuantizeAware(bits)]
    model.fit(*small, batch_size=24, epochs=2, verbose=0, callbacks=chain)
    head = kernels(model)[1]
    np.testing.assert_array_equal(head[zeros], 0)
    assert max(len(np.unique(column)) for column in head.T) <= 16
    # What all channels share stays one value in all of them.
    assert (len(np.unique(head)) <= 16) == one_grid
    assert off_grid(head.reshape(-1, 1) if one_grid else head, bits) < 1e-3


@pytest.mark.parametrize("clusters", [4, 16, 128])
@pytest.mark.parametrize("kind", ["dense", "narrow", "conv2d", "conv1d"])
def test_shared_values_stay_so_in_the_file(kind, clusters, tmp_path):
    """However many values and weights there are, the file has what was trained, exactly."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    layer, shape = {
        "dense": (layers.Dense(32, name="shared"), (20,)),
        "narrow": (layers.Dense(5, name="shared"), (40,)),
        "conv2d": (layers.Conv2D(16, 3, use_bias=False, name="shared"), (6, 6, 3)),
        "conv1d": (layers.Conv1D(16, 3, name="shared"), (8, 6)),
    }[kind]
    norm = [layers.BatchNormalization()] if kind == "conv2d" else []
    model = keras.Sequential([keras.Input(shape), layer, *norm, layers.Flatten(), layers.Dense(1)])
    model.compile("adam", "mse")
    random = np.random.default_rng(0)
    x, y = np.cumsum(random.normal(size=(64, *shape)), -1), random.normal(size=(64, 1))
    chain = [tfaccel.ClusterWeights(clusters, layers="shared"), tfaccel.QuantizeAware(layers="shared")]
    model.fit(x, y, epochs=2, verbose=0, callbacks=chain)
    tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8")
    interpreter = open_with_all_tensors((tmp_path / "m.tflite").read_bytes())
    kernel = np.asarray(model.get_layer("shared").kernel)
    rows = np.moveaxis(kernel, -1, 0).reshape(kernel.shape[-1], -1)
    found = [
        interpreter.get_tensor(each["index"]).reshape(rows.shape)
        for each in interpreter.get_tensor_details()
        if each["dtype"] is np.int8 and each["shape"][0] == len(rows) and np.prod(each["shape"]) == rows.size
    ]
    expected = np.round(127 * rows / np.abs(rows).max())
    assert len(np.unique(rows)) <= clusters
    assert any(np.array_equal(each, expected) for each in found)


def test_the_file_has_the_weights_exactly(helpers, small, tmp_path):
    """On the grid, rounding to the file's integers changes nothing; off it, four bits do."""
    figures = []
    for callbacks in ([], [tfaccel.QuantizeAware(4)]):
        model, _ = fit(helpers, small, callbacks, keras.optimizers.Adam(1e-2), epochs=6)
        file = tfaccel.export_tflite(model, tmp_path / "m.tflite", "int4_weights", calibration=small[0])
        figures.append(file.parity.sqnr_db)
    # What is left is the eight bits of the activations.
    assert figures[1] > max(figures[0] + 8, 30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "2 to 16"),
        ({"bits": 4.0}, "2 to 16"),
        ({"bits": 32}, "2 to 16"),
        ({"begin_epoch": -1}, "an integer ≥ 0"),
        ({"freeze_norms_epoch": -1}, "an integer ≥ 0"),
        ({"activation_bits": 4}, "8, 16 or None"),
        ({"activation_bits": True}, "8, 16 or None"),
        ({"ranges": "minmax"}, "'extremes', 'moving_average', 'learned'"),
        ({"layers": {"head": 1}}, "2 to 16"),
        ({"layers": 5}, "a layer's name"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tfaccel.QuantizeAware(**arguments)


def test_what_fit_refuses_before_its_first_step(helpers, small):
    with pytest.raises(ValueError, match="an epoch of this fit"):
        fit(helpers, small, [tfaccel.QuantizeAware(begin_epoch=2)])
    with pytest.raises(ValueError, match="freeze_norms_epoch=2"):
        fit(helpers, small, [tfaccel.QuantizeAware(freeze_norms_epoch=2)])
    with pytest.raises(ValueError, match="what matches one of"):
        fit(helpers, small, [tfaccel.QuantizeAware(layers="nothing")])
    model = keras.Sequential([keras.Input((4,)), keras.layers.LayerNormalization()])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="no weights to quantize"):
        model.fit(np.ones((8, 4)), np.ones((8, 4)), verbose=0, callbacks=[tfaccel.QuantizeAware()])
