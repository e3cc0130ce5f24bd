"""Activations rounded in training: where the file rounds, as it rounds, and its ranges without
calibration."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from distribution_cells import mirrored
from small_fits import Interrupt, fit, fit_under

import tfaccel
from tfaccel.export.interpreter import TFLiteRunner
from tfaccel.export.rounded_tensors import find_rounded_tensors
from tfaccel.export.samples import Samples
from tfaccel.fit import _activations as activations
from tfaccel.fit._kept_rows import KeptRows
from tfaccel.learned_ranges import recall

L = keras.layers


def residual(images=(7, 7, 1)):
    """Fused and folded layers, one called twice, a residual, poolings, a branch, an activation of its own."""
    relu = L.ReLU(name="relu")
    inputs = keras.Input(images, name="image")
    hidden = L.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(inputs)
    hidden = skip = relu(L.BatchNormalization(name="norm")(hidden))
    hidden = L.DepthwiseConv2D(3, padding="same", name="depthwise")(hidden)
    hidden = relu(L.BatchNormalization(name="depthwise_norm")(hidden))
    hidden = L.BatchNormalization(name="last_norm")(L.Conv2D(8, 1, name="pointwise")(hidden))
    hidden = L.Activation("relu", name="joined")(L.Add(name="add")([skip, hidden]))
    hidden = L.Dropout(0.1, name="dropout")(L.MaxPooling2D(name="pool")(hidden))
    hidden = L.Conv2D(8, 3, padding="same", activation="relu", name="fused")(hidden)
    hidden = L.GlobalAveragePooling2D(name="mean")(hidden)
    return keras.Model(inputs, L.Dense(10, name="scores")(hidden))


def attention():
    inputs = keras.Input((7, 7), name="rows")
    hidden = L.Add(name="add")([inputs, L.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)])
    hidden = L.LayerNormalization(name="norm")(hidden)
    return keras.Model(inputs, L.Dense(10, name="scores")(L.Flatten(name="flat")(hidden)))


class Twice(keras.Model):
    """A layer that is called at three places."""

    def __init__(self):
        super().__init__()
        self.flat, self.relu = L.Flatten(), L.ReLU(name="relu")
        self.first, self.second = L.Dense(16, name="first"), L.Dense(16, name="second")
        self.norm, self.scores = L.BatchNormalization(name="norm"), L.Dense(10, name="scores")

    def call(self, inputs, training=None):
        hidden = self.relu(self.first(self.relu(self.flat(inputs) - 0.2)))
        return self.scores(self.relu(self.norm(self.second(hidden), training=training)))


def twice():
    model = Twice()
    model(np.zeros((1, 7, 7, 1), "float32"))
    return model


def recurrent():
    stack = [L.Bidirectional(L.GRU(4, return_sequences=True), name="both"), L.LSTM(8, name="lstm")]
    return keras.Sequential([keras.Input((7, 7)), *stack, L.Dense(10, name="scores")])


class Predictions(keras.callbacks.Callback):
    """What the model says at the end of the last epoch, still with everything rounded."""

    def __init__(self, x):
        super().__init__()
        self.x = x

    def on_epoch_end(self, epoch, logs=None):
        self.rounded = self.model.predict(self.x, verbose=0)


def sqnr_db(reference, values):
    return float(10 * np.log10(np.square(reference).mean() / np.square(reference - values).mean()))


# 1. Which values.


def test_the_file_says_which_values_it_rounds():
    found = [
        (each.layer.name if each.layer is not None else None, each.call)
        for each in find_rounded_tensors(residual(), 8).tensors
    ]
    expected = ["relu", "relu", "last_norm", "joined", "fused", "mean", "scores"]
    assert found == [(None, 0), *zip(expected, [0, 1, 0, 0, 0, 0, 0], strict=True)]


def test_each_call_of_a_shared_layer_is_a_value_of_its_own():
    model = twice()
    found = [(each.layer, each.call) for each in find_rounded_tensors(model, 8).tensors if each.layer]
    assert [call for layer, call in found if layer is model.relu] == [0, 1, 2]
    assert not [layer for layer, _ in found if layer in (model.first, model.second, model.norm)]


def test_recurrent_layers_are_rounded_behind_their_loop():
    names = {each.layer.name for each in find_rounded_tensors(recurrent(), 8).tensors if each.layer}
    assert names == {"both", "lstm", "scores"}


def test_looking_changes_nothing():
    model = residual()
    before = model.get_weights()
    find_rounded_tensors(model, 8)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not any("call" in vars(layer) for layer in model.layers)


# 2. How they are rounded.


@pytest.mark.parametrize("ends", [(-1.3, 2.9), (0.0, 6.0), (-4.0, 0.0)])
def test_eight_bits_are_litert_s(ends):
    """LiteRT's: q = round(x / s) + z, -128..127, with s = (high - low) / 255 and a whole z."""
    values = np.random.default_rng(0).uniform(-5, 5, 1000).astype("float32")
    scale = (ends[1] - ends[0]) / 255
    zero = np.round(-128 - ends[0] / scale)
    expected = (np.clip(np.round(values / scale) + zero, -128, 127) - zero) * scale
    found = activations.on_range(tf.constant(values), tf.constant(ends), 8).numpy()
    off = np.abs(found - expected)
    assert off.max() < 1.01 * scale
    assert (off > 1e-5).mean() < 0.01  # halves may go either way


def test_sixteen_bits_are_symmetric():
    values = np.array([-9.0, -3.0, 0.0, 1.23456789, 9.0], "float32")
    found = activations.on_range(tf.constant(values), tf.constant([-3.0, 2.0]), 16).numpy()
    expected = np.clip(np.round(values / (3 / 32767)), -32767, 32767) * 3 / 32767
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_range_follows_the_batches_extremes():
    rng = np.random.default_rng(0)
    ours, ends = activations._Range(8), np.zeros(2)
    for step in range(5):
        batch = rng.normal(size=(16, 4)).astype("float32")
        ours.round(tf.constant(batch), momentum=0.9)
        extremes = np.array([batch.min(), batch.max()])
        ends = extremes if step == 0 else 0.9 * ends + 0.1 * extremes
        np.testing.assert_allclose(ours.span(), ends, rtol=1e-5)
    ours.round(tf.constant([1e6]))
    ours.round(tf.constant([np.nan, np.inf]), momentum=0.9)
    np.testing.assert_allclose(ours.span(), ends, rtol=1e-5)


def test_extremes_are_held_and_come_in_slowly():
    rng = np.random.default_rng(0)
    ours, ends, held = activations._ExtremeRange(8), np.zeros(2), 0
    for step in range(50):
        batch = rng.normal(scale=1 / (1 + step), size=(16, 4)).astype("float32")
        ours.round(tf.constant(batch), momentum=0.9)
        reach = np.array([batch.min(), batch.max()])
        if step == 0:
            ends = reach
        else:
            nearer = ends + 0.1 * 0.1 * (reach - ends)
            held += int(ends[1] > reach[1]) + int(ends[0] < reach[0])
            ends = np.array([min(reach[0], nearer[0]), max(reach[1], nearer[1])])
        np.testing.assert_allclose(ours.span(), ends, rtol=1e-4)
    assert held > 90, "the batches shrink"


def test_outputs_that_are_rarely_large_are_not_cut_off(tmp_path):
    """Of a regression, in small batches: the file is about as good as one with measured ranges."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1280, 48)).astype("float32")
    y = x.sum(1)
    dense = keras.layers.Dense
    model = keras.Sequential([keras.Input((48,)), dense(32, "relu"), dense(1)])
    model.compile(keras.optimizers.Adam(3e-3), "mse", steps_per_execution=40)
    model.fit(x, y, epochs=30, verbose=0)
    errors = {}
    for ranges in ("extremes", "moving_average"):
        copy = keras.models.clone_model(model)
        copy.set_weights(model.get_weights())
        copy.compile(keras.optimizers.Adam(1e-3), "mse", steps_per_execution=40)
        copy.fit(x, y, epochs=2, verbose=0, callbacks=[tfaccel.QuantizeAware(ranges=ranges)])
        file = tfaccel.export_tflite(copy, tmp_path / f"{ranges}.tflite", "int8", evaluate=(x, y))
        errors[ranges] = 1 - file.score.file, 1 - file.score.model
    of_file, of_model = errors["extremes"]
    assert of_file - of_model < 0.2 * (errors["moving_average"][0] - errors["moving_average"][1])


def test_ranges_and_values_are_tfmots(twins):
    ours = activations._Range(8)
    for batch, expected in zip(twins["activations/batches"], twins["activations/rounded"], strict=True):
        found = ours.round(tf.constant(batch), momentum=0.99).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(ours.span(), twins["activations/range"], rtol=1e-5)


def test_nothing_is_rounded_before_a_range_is_known():
    values = tf.constant([1.0, 2.345678])
    np.testing.assert_array_equal(activations._Range(8).round(values), values)


def test_the_average_begins_short_as_tensorflow_s():
    theirs = tf.train.ExponentialMovingAverage(0.99, num_updates=tf.Variable(7))
    followed = tf.Variable(0.0)
    theirs.apply([followed])
    followed.assign(1.0)
    theirs.apply([followed])
    assert float(theirs.average(followed)) == pytest.approx(1 - float(activations._momentum(7)))
    assert [round(float(activations._momentum(n)), 3) for n in (0, 10, 10_000)] == [0.1, 0.55, 0.99]


def test_the_gradient_to_a_range_is_its_derivative():
    """Against the difference quotient, with the same integers on both sides: rounding has no derivative."""
    values = np.random.default_rng(0).normal(size=500).astype("float64") * 2
    upstream = np.random.default_rng(1).normal(size=500)
    ends = np.array([-2.0, 3.0])

    def loss(ends, integers):
        scale = (ends[1] - ends[0]) / 255
        inside = values + (integers - (values - ends0[0]) / scale0) * scale  # straight-through within
        return (
            upstream * np.where(values < ends0[0], ends[0], np.where(values > ends0[1], ends[1], inside))
        ).sum()

    ends0, scale0 = ends, 5 / 255
    integers = np.round((values - ends[0]) / scale0)
    rounded = np.clip(integers, 0, 255) * scale0 + ends[0]
    found = activations._gradient(*(tf.constant(v, tf.float32) for v in (values, rounded, ends, upstream)))
    for side in (0, 1):
        step = np.eye(2)[side] * 1e-6
        quotient = (loss(ends + step, integers) - loss(ends - step, integers)) / 2e-6
        assert float(found[side]) == pytest.approx(quotient, rel=1e-3)


def test_a_learned_range_cuts_an_outlier_off_where_that_helps():
    """One value of a thousand is far out; fitting the others well wants a narrower grid."""
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 1, 4000).astype("float32")
    values[:4] = 40.0
    ours = activations._LearnedRange(8)
    variable = tf.Variable(values)

    def error():  # a loss that outliers don't count in
        rounded = ours.round(variable, momentum=0.99)
        return tf.reduce_mean(tf.square(rounded - values)[4:])

    first = float(error())
    for _ in range(1500):
        with tf.GradientTape() as tape:
            loss = error()
        tape.gradient(loss, variable)
    assert ours.span()[1] < 20
    assert float(error()) < first / 2
    assert ours.span()[0] == 0, "an end that is 0 stays there"


# 3. The file agrees with what was trained, and needs no calibration.

# The last is the least agreement in dB: half precision rounds by itself; what lies inside of attention and
# recurrent layers is rounded in the file only. Elsewhere nothing is left but the last bit of sums.
AXES = [
    (residual, "float32", False, 1, None, 8, "extremes", 38),
    (residual, "mixed_bfloat16", True, 4, None, 8, "learned", 17),
    (residual, "mixed_float16", False, 4, 2, 16, "extremes", 38),
    (twice, "float32", True, 1, 2, 8, "learned", 38),
    (attention, "float32", False, 4, 2, 8, "extremes", 20),
    (attention, "mixed_bfloat16", False, 1, None, 16, "learned", 30),
    (recurrent, "float32", False, 1, None, 8, "moving_average", 22),
]


@pytest.mark.parametrize(("build", "policy", "jit", "steps", "accumulation", "bits", "ranges", "least"), AXES)
def test_the_file_is_the_model_that_was_trained(
    helpers, small, tmp_path, build, policy, jit, steps, accumulation, bits, ranges, least
):
    keras.config.set_dtype_policy(policy)
    model = build()
    x = small[0].reshape(-1, *model.input_shape[1:]) if hasattr(model, "input_shape") else small[0]
    adam = keras.optimizers.Adam(3e-3, gradient_accumulation_steps=accumulation)
    helpers.compile(model, adam, jit_compile=jit, steps_per_execution=steps)
    keras.config.set_dtype_policy("float32")
    model.fit(x, small[1], batch_size=24, epochs=4, verbose=0)
    look = Predictions(x)
    quantize = tfaccel.QuantizeAware(8, bits, ranges=ranges)
    model.fit(x, small[1], batch_size=24, epochs=3, verbose=0, callbacks=[quantize, look])
    assert not any("call" in vars(layer) for layer in [model, *model.layers])
    recipe = "int8" if bits == 8 else "int16x8"
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", recipe)
    written = next(iter(TFLiteRunner(file.path).predict(Samples((x,))).values()))
    agreement = sqnr_db(look.rounded, written)
    print(
        f"{agreement:.1f} dB with the rounded model, {sqnr_db(model.predict(x, verbose=0), written):.1f} dB"
    )
    assert agreement > least
    if bits == 8 and least == 38:
        plain = model.predict(x, verbose=0)
        assert agreement > sqnr_db(plain, written) + 3, "nearer than to the plain model"


def test_ranges_of_a_model_that_was_changed_are_not_taken(helpers, small, tmp_path):
    model, _ = fit(helpers, small, [tfaccel.QuantizeAware()])
    assert recall(model, 8) is not None
    assert recall(model, 16) is None
    with pytest.raises(ValueError, match="activation_bits=16"):
        tfaccel.export_tflite(model, tmp_path / "m.tflite", "int16x8")
    model.fit(*small, batch_size=24, verbose=0)
    with pytest.raises(ValueError, match="other weights"):
        tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8")
    tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8", calibration=small[0])


def test_with_calibration_the_learned_ranges_are_taken_too(helpers, small, tmp_path):
    model, _ = fit(helpers, small, [tfaccel.QuantizeAware()])
    written = [
        next(iter(TFLiteRunner(file.path).predict(Samples((small[0],))).values()))
        for given in ({}, {"calibration": small[0]})
        for file in [tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8", **given)]
    ]
    np.testing.assert_array_equal(*written)
    assert tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8", calibration=small).size_bytes


def test_the_rows_that_are_remembered_are_training_data(helpers, small):
    model, _ = fit(helpers, small, [tfaccel.QuantizeAware()])
    (rows,) = recall(model, 8).samples
    assert rows.shape == (256, 7, 7, 1)
    for row in rows:
        assert (small[0] == row).all((1, 2, 3)).any()
    assert len(np.unique(rows, axis=0)) > 100, "of several batches"


def test_a_few_steps_and_wide_rows_keep_fewer(helpers):
    kept = KeptRows([tf.TensorSpec([None, 2**19]), tf.TensorSpec([None], "int32")])
    assert [each.shape for each in kept._rows] == [(15, 2**19), (15,)]
    assert kept.rows() == ()
    kept.keep([tf.ones([1, 2**19]), tf.constant([7])])
    assert kept.rows()[1].tolist() == [7, 7]
    kept.keep([tf.zeros([0, 2**19]), tf.zeros([0], "int32")])


def test_a_model_of_open_length_learns_ranges_and_wants_samples(tmp_path):
    inputs = keras.Input((None, 3))
    hidden = L.Dense(8, activation="relu")(inputs)
    model = keras.Model(inputs, L.Dense(2)(L.GlobalAveragePooling1D()(hidden)))
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(48, 5, 3)).astype("float32")
    model.fit(x, np.zeros((48, 2)), verbose=0, callbacks=[tfaccel.QuantizeAware()])
    with pytest.raises(ValueError, match="open length"):
        tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8")
    tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8", calibration=x)


# 4. Strategies, again and interrupted, other callbacks.


def test_two_replicas_learn_what_one_device_does(helpers, small, tmp_path):
    """Extremes of half a batch are narrower, so ranges are near, not equal."""
    spans = {}
    for name, strategy in (
        ("one", "one_device"),
        ("two", mirrored(2)),
    ):
        model = fit_under(strategy, helpers, small, tfaccel.QuantizeAware())
        spans[name] = np.array(recall(model, 8).spans)
        assert len(recall(model, 8).samples[0]) == 256
        assert tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8").parity.sqnr_db > 20
    np.testing.assert_allclose(spans["two"], spans["one"], rtol=0.25, atol=0.05)


def test_export_in_the_same_fit(helpers, small, tmp_path):
    export = tfaccel.ExportTFLite(tmp_path / "m.tflite", "int8")
    model, _ = fit(helpers, small, [tfaccel.QuantizeAware(), export])
    assert export.file.recipe == "int8"
    for callbacks, message in (
        ([export], "needs calibration data"),
        ([tfaccel.QuantizeAware(8, 16), export], "needs calibration data"),
        ([export, tfaccel.QuantizeAware()], "List it last"),
        (
            [tfaccel.QuantizeAware(), tfaccel.ExportTFLite(tmp_path / "m.tflite", "int8", monitor="loss")],
            "of the last epoch",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit(*small, batch_size=24, verbose=0, callbacks=callbacks)


def test_frozen_norms_keep_their_statistics_and_learn_their_scales(helpers, small):
    seen = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            norm = self.model.get_layer("norm")
            seen.append([np.asarray(v) for v in (norm.moving_mean, norm.gamma)])

    model = helpers.compile(residual())
    quantize = tfaccel.QuantizeAware(freeze_norms_epoch=1)
    model.fit(*small, batch_size=24, epochs=3, verbose=0, callbacks=[quantize, Look()])
    np.testing.assert_array_equal(seen[2][0], seen[0][0])
    assert np.abs(seen[2][1] - seen[0][1]).max() > 0
    model.fit(*small, batch_size=24, verbose=0, callbacks=[Look()])
    assert np.abs(seen[3][0] - seen[2][0]).max() > 0, "a plain fit moves them"


def test_delayed_interrupted_and_again(helpers, small):
    model = helpers.compile(residual())
    quantize = tfaccel.QuantizeAware(begin_epoch=1, freeze_norms_epoch=1)
    with pytest.raises(KeyboardInterrupt):
        model.fit(*small, batch_size=24, epochs=3, verbose=0, callbacks=[quantize, Interrupt(1)])
    model.fit(*small, batch_size=24, verbose=0)
    assert not any("call" in vars(layer) for layer in [model, *model.layers])
    assert recall(model, 8) is None
    model.fit(*small, batch_size=24, epochs=2, verbose=0, callbacks=[quantize])
    assert recall(model, 8) is not None


def test_a_model_that_no_file_can_be_made_of_is_refused(helpers, small):
    @keras.saving.register_keras_serializable("tests")
    class Determinant(L.Layer):
        def call(self, inputs):
            return inputs * tf.linalg.det(inputs[:, :7, :7, 0])[:, None, None, None]

    model = keras.Sequential([keras.Input((7, 7, 1)), Determinant(), L.Flatten(), L.Dense(10)])
    helpers.compile(model)
    with pytest.raises(ValueError, match="Pass activation_bits=None"):
        model.fit(*small, batch_size=24, verbose=0, callbacks=[tfaccel.QuantizeAware()])
    model.fit(*small, batch_size=24, verbose=0, callbacks=[tfaccel.QuantizeAware(8, None)])


def test_a_train_step_that_goes_round_the_model_learns_no_ranges(small, tmp_path):
    class Parts(keras.Sequential):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                for layer in self.layers:
                    x = layer(x, training=True) if isinstance(layer, L.Dropout) else layer(x)
                loss = self.compute_loss(y=y, y_pred=x)
            variables = self.trainable_variables
            self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
            return {"loss": loss}

    model = Parts([keras.Input((7, 7, 1)), L.Flatten(), L.Dense(10)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*small, batch_size=24, verbose=0, callbacks=[tfaccel.QuantizeAware()])
    with pytest.raises(ValueError, match="needs calibration data"):
        tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8")


def test_an_extreme_that_one_replica_saw_is_held():
    strategy = mirrored(2)
    with strategy.scope():
        ours = activations._ExtremeRange(8)

    def step():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        ours.round(tf.where(replica == 0, [-1.0, 10.0], [-3.0, 1.0]), momentum=0.9)

    strategy.run(tf.function(step))
    assert ours.span() == (-3, 10)
