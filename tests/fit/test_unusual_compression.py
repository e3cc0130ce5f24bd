"""Pruning, clustering and rounding of models and fits that are put together in unusual ways."""

import re
import warnings

import keras
import numpy as np
import pytest
from small_fits import Interrupt, off_grid

import tfaccel
from tfaccel.fit._choice import choose_weights
from tfaccel.learned_ranges import recall

layers = keras.layers


def net(units=32):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((16,))])
    for name, size in (("a", units), ("b", units), ("c", 4)):
        model.add(layers.Dense(size, name=name))
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    return model


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)
    x = random.normal(size=(256, 16)).astype("float32")
    return x, (x @ random.normal(size=(16, 4))).astype("float32")


def fit(model, data, *callbacks, epochs=4, **options):
    return model.fit(*data, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks), **options)


def warnings_of(run):
    """What it warned of; NumPy's deprecations, which Keras meets, are among it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return "\n".join(str(each.message) for each in caught)


def zeros(weight):
    return float(np.mean(np.asarray(weight) == 0))


def short(variable):
    """The layer's name and the weight's."""
    return "/".join(variable.path.split("/")[-2:])


class TestInputs:
    def of_two(self, given):
        keras.utils.set_random_seed(1)
        wide, narrow = keras.Input((8,), name="wide"), keras.Input((8,), name="narrow")
        x = layers.Concatenate()([layers.Dense(8)(wide), layers.Dense(8)(narrow)])
        inputs = [wide, narrow] if given != "dict of dict" else {"wide": wide, "narrow": narrow}
        model = keras.Model(inputs, layers.Dense(1)(x))
        model.compile("adam", "mse")
        random = np.random.default_rng(0)
        x = {"wide": 10 * random.random((64, 8)), "narrow": random.random((64, 8))}
        x = {name: values.astype("float32") for name, values in x.items()}
        return model, [x["wide"], x["narrow"]] if given == "list" else x

    @pytest.mark.parametrize("given", ["list", "dict", "dict of dict"])
    def test_ranges_belong_to_their_inputs(self, given):
        model, x = self.of_two(given)
        model.fit(x, np.ones((64, 1)), epochs=2, verbose=0, callbacks=[tfaccel.QuantizeAware()])
        learned = recall(model, 8)
        names = ["narrow", "wide"] if given == "dict of dict" else ["wide", "narrow"]
        tops = {
            names[each.leaf]: high
            for each, (_, high) in zip(learned.tensors, learned.spans, strict=True)
            if each.layer is None
        }
        assert 9 < tops["wide"] <= 10
        assert 0.9 < tops["narrow"] <= 1
        assert [each.max() > 5 for each in learned.samples] == [name == "wide" for name in names]

    def test_a_key_that_the_model_does_not_take(self):
        model, x = self.of_two("dict")
        x["more"] = np.ones((64, 3), "float32")
        model.fit(x, np.ones((64, 1)), verbose=0, callbacks=[tfaccel.QuantizeAware()])
        assert recall(model, 8) is not None


class TestReading:
    """Wherever a weight is read in the model, it is read rounded."""

    def test_tied_weights(self, data):
        class Transposed(layers.Layer):
            def __init__(self, of):
                super().__init__()
                self.of = of

            def call(self, x):
                return keras.ops.matmul(x, keras.ops.transpose(self.of.kernel))

        keras.utils.set_random_seed(1)
        encoder = layers.Dense(4, use_bias=False)
        model = keras.Sequential([keras.Input((16,)), encoder, Transposed(encoder)])
        model.compile("adam", "mse")
        inside = {}
        see = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: inside.update(y=model.predict(data[0], verbose=0))
        )
        fit(model, (data[0], data[0]), tfaccel.QuantizeAware(2, None), see, epochs=1)
        np.testing.assert_allclose(inside["y"], model.predict(data[0], verbose=0), atol=1e-5)

    def test_kernels_for_whole_sequences(self, monkeypatch):
        """A GPU's, and ours on CPUs, take the cell's weights outside of its call."""
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((5, 3)), layers.LSTM(8), layers.Dense(1)])
        model.compile("adam", "mse")
        read = []

        def whole(inputs, first, cell_state, mask, kernel, *args, **kwargs):
            read.append(off_grid(kernel, 3))
            raise NotImplementedError  # as on a CPU: Keras goes on with the cell

        monkeypatch.setattr("keras.src.backend.lstm", whole)
        model.run_eagerly = True
        x = np.random.default_rng(0).normal(size=(16, 5, 3)).astype("float32")
        fit(model, (x, np.ones((16, 1))), tfaccel.QuantizeAware(3, None), epochs=1)
        assert read
        assert max(read) < 1e-3


class TestChoice:
    def amounts(self, model, callback, **options):
        choices = choose_weights(model, options.pop("layers", None), callback.bits, ("embedding",))
        return {short(each.variable): (callback._bits(each), each.skipped) for each in choices}

    def test_depthwise_kernels_by_class(self):
        """In Keras 3 their weight is called `kernel`."""
        model = keras.Sequential(
            [keras.Input((9, 4)), layers.Conv1D(8, 3), layers.DepthwiseConv1D(3, name="depth")]
        )
        model.add(layers.Conv1D(8, 3, name="head"))
        prune = {short(each.variable): each.skipped for each in choose_weights(model, None, 0.5)}
        assert prune["depth/kernel"] == "depthwise"
        four = tfaccel.QuantizeAware(4, None)
        assert self.amounts(model, four)["depth/kernel"] == (8, "")
        assert self.amounts(model, four, layers={"head": 6})["depth/kernel"] == (8, "")
        assert self.amounts(model, four, layers={"depth": 5})["depth/kernel"] == (5, "")

    def test_subclasses_of_transposed_convolutions(self, small):
        class Up(layers.Conv2DTranspose):
            pass

        model = keras.Sequential([keras.Input((7, 7, 1)), layers.Conv2D(8, 3), Up(4, 3, name="up")])
        model.compile("adam", "mse")
        y = np.ones((len(small[0]), 7, 7, 4), "float32")
        fit(model, (small[0], y), tfaccel.QuantizeAware(4, None), epochs=1)
        assert off_grid(model.get_layer("up").kernel, 4, axis=2) < 1e-3

    def test_slopes_and_positions_are_not_kernels(self):
        class Positions(layers.Layer):
            def build(self, shape):
                self.table = self.add_weight(shape=(1, *shape[1:]), name="table")

            def call(self, x):
                return x + self.table

        model = keras.Sequential([keras.Input((8, 16)), Positions(name="positions"), layers.Dense(32)])
        model.add(layers.PReLU(name="slopes"))
        model.add(layers.Dense(32))
        why = {short(each.variable): each.skipped for each in choose_weights(model, None, 0.5)}
        assert why["positions/table"] == "one for all samples"
        assert why["slopes/alpha"] == "slopes"
        named = {short(each.variable): each.skipped for each in choose_weights(model, ["positions"], 0.5)}
        assert named["positions/table"] == ""

    def test_lora_is_left_alone_and_refused_by_name(self, data):
        model = net()
        model.layers[0].enable_lora(2)
        model.compile("adam", "mse")
        prune = tfaccel.PruneWeights(0.5)
        fit(model, data, prune)
        told = [row.skipped for row in prune.report.rows if "/a/" in row.weight and len(row.shape) > 1]
        assert told == ["LoRA adds to it"] * 3
        with pytest.raises(ValueError, match="layers without LoRA"):
            fit(model, data, tfaccel.PruneWeights(0.5, layers=["a"]))

    def test_equal_paths_are_told_apart(self, data):
        def inner(name):
            inputs = keras.Input((16,))
            return keras.Model(inputs, layers.Dense(16, name="d")(inputs), name=name)

        keras.utils.set_random_seed(1)
        x = inputs = keras.Input((16,))
        for name in ("one", "two"):
            x = inner(name)(x)
        model = keras.Model(inputs, x)
        model.compile("adam", "mse", metrics=["mae"])
        prune = tfaccel.PruneWeights(0.5, layers=["two"])
        fit(model, (data[0], data[0]), prune, epochs=2)
        rows = {row.weight: row for row in prune.report.rows}
        assert rows["d/kernel"].skipped == "not chosen"
        assert (rows["d/kernel (2)"].skipped, rows["d/kernel (2)"].sparsity) == ("", 0.5)
        found = tfaccel.sensitivity(model, (data[0], data[0]), sparsities=[0.5], bits=[8])
        assert [row.weight for row in found.rows] == ["d/kernel"] * 2 + ["d/kernel (2)"] * 2

    def test_no_weights_tells_why(self):
        model = keras.Sequential([keras.Input((4,)), layers.Dense(8, name="a")])
        model.get_layer("a").trainable = False
        model.compile("adam", "mse")
        with pytest.raises(ValueError, match=r"no weights to prune .*a/kernel: frozen"):
            fit(model, (np.ones((8, 4)), np.ones((8, 8))), tfaccel.PruneWeights(0.5))


class TestTogether:
    def test_restored_weights_stay_what_they_were(self, data):
        """Pruning ends by holding its zeros once more, and not by another step of clustering."""
        model, seen = net(), {}

        def keep(epoch, logs):
            seen[epoch] = model.get_weights()

        def worse(epoch, logs):
            model.optimizer.learning_rate = 1e-2 if epoch < 3 else 0.3

        stop = keras.callbacks.EarlyStopping(
            "loss", restore_best_weights=True, start_from_epoch=2, patience=50
        )
        both = [
            tfaccel.PruneWeights(0.5, schedule=tfaccel.PruningSchedule(end=0.3)),
            tfaccel.ClusterWeights(8),
        ]
        watch = keras.callbacks.LambdaCallback(on_epoch_begin=worse, on_epoch_end=keep)
        fit(model, data, watch, stop, *both, epochs=6)
        assert stop.best_epoch == 2
        for expected, got in zip(seen[2], model.get_weights(), strict=True):
            np.testing.assert_array_equal(expected, got)

    @pytest.mark.parametrize("importance", ["magnitude", "movement", "gradient"])
    def test_clusters_follow_masks_that_move(self, data, importance):
        prune = tfaccel.PruneWeights(0.5, importance=importance)
        model = net()
        fit(model, data, prune, tfaccel.ClusterWeights(8), epochs=4)
        for layer in model.layers[:2]:
            assert zeros(layer.kernel) == pytest.approx(0.5, abs=0.002)
            assert len(np.unique(layer.kernel)) <= 8

    def test_export_waits_for_the_pruning(self, data, tmp_path):
        model = net()
        model.optimizer.learning_rate = 1e-5  # later epochs have more zeros, and are worse
        export = tfaccel.ExportTFLite(tmp_path / "m.tflite", monitor="loss", mode="min")
        prune = tfaccel.PruneWeights(0.8)
        history = fit(model, data, prune, export, epochs=6).history
        assert prune.settled_epoch > int(np.argmin(history["loss"]))
        kept = fit_file_zeros(tmp_path / "m.tflite")
        assert kept == pytest.approx(0.8, abs=0.01)

    @pytest.mark.parametrize(
        ("callbacks", "message"),
        [
            ((tfaccel.PruneWeights(0.5), tfaccel.PruneWeights(0.8, layers=["b"])), "Two PruneWeights"),
            ((tfaccel.ClusterWeights(8), tfaccel.ClusterWeights(4, layers=["b"])), "Two ClusterWeights"),
            ((tfaccel.PruneWeights(0.5), tfaccel.ClusterWeights(8, preserve_sparsity=False)), "zeros would"),
            ((tfaccel.QuantizeAware(4, None), tfaccel.ClusterWeights(8)), "listed before ClusterWeights"),
            ((tfaccel.ClusterWeights(16, scope="channel", layers=["a"]),), "16 weights of a channel"),
        ],
    )
    def test_refused_before_the_first_step(self, data, callbacks, message):
        model = net()
        before = model.get_weights()
        with pytest.raises(ValueError, match=message):
            fit(model, data, *callbacks)
        for expected, got in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(expected, got)

    def test_two_that_prune_different_layers(self, data):
        model = net()
        fit(model, data, tfaccel.PruneWeights(0.5, layers=["a"]), tfaccel.PruneWeights(0.8, layers=["b"]))
        assert zeros(model.get_layer("a").kernel) == pytest.approx(0.5, abs=0.01)
        assert zeros(model.get_layer("b").kernel) == pytest.approx(0.8, abs=0.01)

    def test_channels_of_few_weights_are_left_alone(self, data):
        cluster = tfaccel.ClusterWeights(16, scope="channel")
        fit(net(), data, cluster, epochs=1)
        told = {
            row.weight.split("/")[-2]: row.skipped for row in cluster.report.rows if "kernel" in row.weight
        }
        assert told["a"] == "has 16 weights a channel"
        assert told["b"] == ""


def fit_file_zeros(path):
    """The share of zeros in the largest weight of a float file."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    details = [each for each in interpreter.get_tensor_details() if each["shape"].prod() == 32 * 32]
    return zeros(interpreter.get_tensor(details[0]["index"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.1, "importance": "movement"}, "'magnitude' with a threshold"),
        ({"sparsity": 0.5, "schedule": "one_shot", "importance": "gradient"}, "a later begin"),
        ({"sparsity": 0.5, "schedule": tfaccel.PruningSchedule(initial_sparsity=0.9)}, "at most sparsity"),
    ],
)
def test_arguments_that_contradict_each_other(arguments, message):
    with pytest.raises(ValueError, match=message):
        tfaccel.PruneWeights(**arguments)


class TestRuns:
    def test_initial_epoch_begins_a_schedule(self, data):
        model = net()
        fit(model, data, epochs=3)
        history = fit(model, data, tfaccel.PruneWeights(0.8), epochs=9, initial_epoch=3).history
        assert history["sparsity"][0] < 0.6  # not all at once
        assert history["sparsity"][-1] == pytest.approx(0.8, abs=0.01)

    def test_a_training_that_is_stopped_early_is_told(self, data):
        stop = keras.callbacks.LambdaCallback()
        stop.on_epoch_end = lambda epoch, logs: setattr(stop.model, "stop_training", epoch == 1)
        told = warnings_of(lambda: fit(net(), data, stop, tfaccel.PruneWeights(0.8), epochs=10))
        assert re.search(r"ended after 16 updates, .* at 56: \d+% .*start_from_epoch=6", told)

    def test_a_run_that_is_resumed_behind_its_last_epoch(self, data, tmp_path):
        class Stop(keras.callbacks.Callback):
            def on_train_end(self, logs=None):
                raise KeyboardInterrupt

        def backup():
            return keras.callbacks.BackupAndRestore(tmp_path / "backup")

        with pytest.raises(KeyboardInterrupt):
            fit(net(), data, Stop(), backup(), tfaccel.QuantizeAware(4))
        model = net()
        assert "no epoch left" in warnings_of(lambda: fit(model, data, tfaccel.QuantizeAware(4), backup()))
        assert off_grid(model.get_layer("b").kernel, 4) < 1e-3

    def test_bfloat16_weights(self):
        keras.config.set_dtype_policy("bfloat16")
        model = net()
        keras.config.set_dtype_policy("float32")
        fit(model, (np.ones((32, 16)), np.ones((32, 4))), tfaccel.QuantizeAware(), epochs=1)
        assert recall(model, 8) is not None

    @pytest.mark.parametrize("callback", [tfaccel.PruneWeights(0.9), tfaccel.QuantizeAware(2, None)])
    def test_what_an_interrupted_fit_left_is_not_seen_by_a_part_of_the_model(self, data, callback):
        inner, twin = net(), net()
        outer = keras.Sequential([keras.Input((16,)), inner])
        outer.compile("adam", "mse")
        with pytest.raises(KeyboardInterrupt):
            fit(outer, data, callback, Interrupt())
        twin.set_weights(inner.get_weights())
        for model in (inner, twin):
            model.compile(keras.optimizers.SGD(0.01), "mse")
            fit(model, data, epochs=1)
        for expected, got in zip(twin.get_weights(), inner.get_weights(), strict=True):
            np.testing.assert_array_equal(expected, got)

    def test_what_an_interrupted_fit_left_is_not_exported(self, data, tmp_path):
        model = net()
        with pytest.raises(KeyboardInterrupt):
            fit(model, data, tfaccel.QuantizeAware(2, None), Interrupt())
        exact = net()
        exact.set_weights(model.get_weights())
        expected = exact.predict(data[0], verbose=0)
        np.testing.assert_allclose(tfaccel.predictor(model)(data[0]), expected, atol=1e-5)
        with pytest.raises(KeyboardInterrupt):
            fit(model, data, tfaccel.QuantizeAware(2, None), Interrupt())
        exact.set_weights(model.get_weights())
        np.testing.assert_allclose(model(data[0]), exact(data[0]), atol=1e-5)
        with pytest.raises(KeyboardInterrupt):
            fit(model, data, tfaccel.QuantizeAware(2, None), Interrupt())
        exact.set_weights(model.get_weights())
        file = tfaccel.export_tflite(model, tmp_path / "m.tflite")
        parity = tfaccel.compare(exact, file.path, data[0])
        assert parity.max_abs_error < 1e-4
