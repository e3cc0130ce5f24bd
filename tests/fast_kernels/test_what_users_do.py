"""Scripts that plain Keras runs, and that a loop of our own could break."""

import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from distribution_cells import mirrored

import tfaccel

layers = keras.layers


def compile_in_scope(model_or_build, optimizer="adam", loss="mse", *, jit=False, steps="auto", **options):
    accelerator = tfaccel.Accelerator(kernels="fused", jit=jit, steps_per_execution=steps)
    with accelerator.scope():
        built = isinstance(model_or_build, keras.Model)
        model = model_or_build if built else model_or_build()
        model.compile(optimizer, loss, **{**accelerator.compile_options(), **options})
    return model, accelerator


def linear():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((3,)), layers.Dense(2)])


X, Y = np.random.default_rng(0).normal(size=(2, 100, 3)).astype("float32")
Y = Y[:, :2]


class Warmup(keras.optimizers.schedules.LearningRateSchedule):
    """As in Keras's own documentation: no get_config."""

    def __call__(self, step):
        return 1e-3 * tf.cast(step + 1, tf.float32)


class OwnArguments(keras.optimizers.Adam):
    def __init__(self, total):
        super().__init__(1e-3)
        self.total = total


@pytest.mark.parametrize("make", [lambda: keras.optimizers.Adam(Warmup()), lambda: OwnArguments(1000)])
def test_optimizers_that_cannot_be_serialised_are_fused_too(make):
    model, accelerator = compile_in_scope(linear, make())
    model.fit(X, Y, verbose=0, shuffle=False)
    assert "one fused op" in str(accelerator)
    plain = linear()
    plain.compile(make(), "mse", jit_compile=False)
    plain.fit(X, Y, verbose=0, shuffle=False)
    # Four updates of a few thousandths at most, a thousand roundings each.
    np.testing.assert_allclose(model.get_weights()[0], plain.get_weights()[0], atol=4 * 4e-3 * 1000 * 1.2e-7)


def test_a_trial_sets_back_a_second_optimizer_too(monkeypatch):
    from tfaccel.fast_kernels import trial as trials

    monkeypatch.setattr(trials, "COMPILE_SECONDS", 0.0)
    monkeypatch.setattr(trials, "COMPILE_SECONDS_AN_OP", 0.0)

    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = layers.Dense(2), layers.Dense(2)

        def build(self, shape):
            self.first.build(shape)
            self.second.build((None, 2))

        def call(self, x):
            return self.second(self.first(x))

        def train_step(self, data):
            x, y = data
            with tf.GradientTape(persistent=True) as tape:
                loss = tf.reduce_mean((self(x) - y) ** 2)
            for optimizer, layer in ((self.optimizer, self.first), (self.own_optimizer, self.second)):
                weights = layer.trainable_variables
                optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            return {"loss": loss}

    weights, text = [], ""
    for jit in ("auto", False):
        keras.utils.set_random_seed(2)
        model = Two()
        model.own_optimizer = keras.optimizers.Adam(1e-2)
        model.build((None, 3))
        model.own_optimizer.build(model.second.trainable_variables)
        model, accelerator = compile_in_scope(model, jit=jit, steps=4)
        model.fit(X[:96], Y[:96], batch_size=8, epochs=8, verbose=0, shuffle=False)
        text = text or str(accelerator)
        assert int(model.own_optimizer.iterations) == int(model.optimizer.iterations) == 96
        weights.append(model.get_weights())
    assert "xla: XLA for the whole loop" in text
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, atol=96 * 1e-2 * 1000 * 1.2e-7)


def resident():
    """What is held in memory for a compiled loop; tests before this one may have left something."""
    return [each for each in gc.get_objects() if type(each).__name__ == "ResidentBatches"]


def test_a_new_batch_size_is_no_new_trace_and_old_data_go():
    traces = []

    class Noting(layers.Layer):
        def call(self, x, training=None):
            if training:
                traces.append(1)
            return x

    model, _ = compile_in_scope(lambda: keras.Sequential([keras.Input((3,)), Noting(), layers.Dense(2)]))
    gone, before = [], resident()
    for samples in (20, 31, 64, 90):
        data = X[:samples].copy()
        gone.append(weakref.ref(data))
        model.fit(data, Y[:samples], batch_size=samples, verbose=0)
        del data
    assert len(traces) == 1
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4
    held = [o for o in resident() if not any(o is other for other in before)]
    assert [batches.samples for batches in held] == []


@pytest.mark.parametrize("way", ["fit", "predict"])
def test_one_array_is_handed_over_bare(way):
    seen = []

    class Bare(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return self.dense(x)

        def train_step(self, data):
            seen.append(type(data))
            return {"loss": tf.reduce_mean(self(data))}

        def predict_step(self, data):
            seen.append(type(data))
            return self(data)

    model, accelerator = compile_in_scope(Bare)
    if way == "fit":
        model.fit(X, verbose=0)
        model.fit(accelerator.dataset(X), verbose=0)
    else:
        model.predict(X, verbose=0)
    assert seen
    assert not any(issubclass(kind, tuple) for kind in seen)


def test_hooks_of_a_lambda_callback_come_every_call_of_the_asked_length():
    calls = []
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: calls.append(batch))
    model, _ = compile_in_scope(linear)
    model.fit(X, Y, batch_size=1, epochs=3, verbose=0, callbacks=[callback])
    assert calls == [15, 31, 47, 63, 79, 95, 99] * 3


def test_calls_grow_where_nobody_watches(tmp_path):
    lengths = []
    model, _ = compile_in_scope(linear)
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "m.keras")
    model.fit(X, Y, batch_size=1, epochs=3, verbose=0, callbacks=[checkpoint])
    lengths.append(model.train_function.length.steps)
    assert lengths[0] > 16


def test_predict_with_steps_reads_what_keras_reads():
    model, _ = compile_in_scope(linear)
    plain = keras.models.clone_model(model)
    plain.set_weights(model.get_weights())
    for options in ({"steps": 2}, {"steps": 2, "batch_size": 30}, {}):
        expected = plain.predict(X, verbose=0, **options)
        got = model.predict(X, verbose=0, **options)
        # 16 steps are one execution here, so Keras reads more batches where both are given.
        assert len(got) >= len(expected)
        np.testing.assert_allclose(got[: len(expected)], expected, rtol=1e-5, atol=1e-6)


def test_a_layer_that_xla_cannot_compile_is_left_to_tensorflow():
    def build():
        lookup = layers.IntegerLookup(vocabulary=[1, 2, 3])
        words = keras.Input((2,), dtype="int64")
        return keras.Model(words, layers.Dense(1)(layers.Flatten()(layers.Embedding(5, 2)(lookup(words)))))

    with pytest.warns(UserWarning, match="jit_compile"):
        model, _ = compile_in_scope(build, jit=True)
    model.fit(np.ones((40, 2), "int64"), np.ones((40, 1)), verbose=0)
    assert int(model.optimizer.iterations) == 2


@pytest.mark.filterwarnings("ignore:Even though the")
def test_debugging_eagerly_and_back():
    model, _ = compile_in_scope(linear)
    model.fit(X, Y, verbose=0)
    for eagerly in (True, False):
        tf.config.run_functions_eagerly(eagerly)
        try:
            model.fit(X, Y, verbose=0)
            model.evaluate(X, Y, verbose=0)
            model.predict(X, verbose=0)
        finally:
            tf.config.run_functions_eagerly(False)
        assert (type(model.train_function).__name__ == "FastFunction") != eagerly
    assert int(model.optimizer.iterations) == 12


def test_a_train_function_of_the_users_own_is_kept():
    model, _ = compile_in_scope(linear)
    model.fit(X, Y, verbose=0)
    calls, fast = [], keras.Model._make_function(model, model.train_step)

    def own(iterator):
        calls.append(1)
        return fast(iterator)

    model.train_function = own
    model.fit(X, Y, verbose=0)
    assert calls


def test_generators_with_targets_that_are_none():
    def batches():
        while True:
            yield X[:10], {"a": Y[:10], "b": None}

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x)

        def train_step(self, data):
            x, y = data
            assert y["b"] is None
            return super().train_step((x, y["a"]))

    model, _ = compile_in_scope(Own)
    model.fit(batches(), steps_per_epoch=5, verbose=0, shuffle=False)
    assert int(model.optimizer.iterations) == 5


def test_elements_without_a_sample_axis():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.scale = self.add_weight(name="scale", initializer="ones")

        def call(self, x):
            return x * self.scale

        def train_step(self, data):
            return {"loss": tf.cast(data, "float32") * self.scale}

    model, _ = compile_in_scope(Own)
    model.fit(tf.data.Dataset.range(40), verbose=0, shuffle=False)


def test_batch_numbers_of_unknown_length_stay_within_a_call():
    seen = []

    class Note(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(self.params)

    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(1).filter(lambda *_: True)
    model, _ = compile_in_scope(linear)
    with pytest.warns(UserWarning, match="ran out of data"):
        model.fit(data, epochs=2, verbose=0, shuffle=False, callbacks=[Note()])
    assert int(model.optimizer.iterations) == 200
    assert model.train_function.clock.read().batches == 200


def test_evaluate_does_not_build_the_optimizer():
    model, _ = compile_in_scope(linear)
    model.layers[0].trainable = False
    model.compile("adam", "mse")
    model, _ = compile_in_scope(model)
    model.evaluate(X, Y, verbose=0)
    assert not model.optimizer.built
    model.layers[0].trainable = True
    model.fit(X, Y, verbose=0)
    assert len(model.optimizer.variables) == 2 + 2 * 2


def test_a_stream_is_compiled_by_xla_where_it_was_asked_for():
    model, _ = compile_in_scope(linear, jit=True)
    model.fit(tf.data.Dataset.from_tensor_slices((X, Y)).batch(20), verbose=0, shuffle=False)
    program = model.train_function._programs["stream"]
    text = str(program._list_all_concrete_functions()[0].graph.as_graph_def())
    assert "_XlaMustCompile" in text


def test_fit_inside_fit_and_evaluate_inside_a_callback():
    inner, _ = compile_in_scope(linear)
    outer, _ = compile_in_scope(linear)

    class Inside(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            inner.fit(X[:50], Y[:50], verbose=0)
            logs["other"] = self.model.evaluate(X[:50], Y[:50], verbose=0)

    history = outer.fit(X, Y, epochs=2, verbose=0, callbacks=[Inside()])
    assert int(outer.optimizer.iterations) == 8
    assert int(inner.optimizer.iterations) == 4
    assert history.history["other"][1] < history.history["other"][0]


@pytest.mark.parametrize("callback", [lambda: tfaccel.OneCycle(1e-3), lambda: tfaccel.PruneWeights(0.5)])
def test_a_fit_that_traces_anew_keeps_no_graph(callback):
    """TensorFlow keeps the gradient of a sum over replicas, and with it the graph, for ever."""
    model, accelerator = compile_in_scope(lambda: keras.Sequential([keras.Input((3,)), layers.Dense(40)]))
    data = accelerator.dataset(X, np.ones((100, 40), "float32"))

    def graphs():
        gc.collect()
        return sum(type(each).__name__ == "FuncGraph" for each in gc.get_objects())

    counts = []
    for _ in range(4):
        model.fit(data, verbose=0, callbacks=[callback()])
        counts.append(graphs())
    assert counts[1] == counts[2] == counts[3] > 0


def test_data_are_freed_without_a_garbage_collection():
    accelerator = tfaccel.Accelerator(kernels="fused")
    gc.collect()
    gc.disable()
    try:
        for shuffle in (True, False):
            data = accelerator.dataset(X, Y, shuffle=shuffle)
            held = weakref.ref(data.tfaccel_batches.leaves[0])
            assert held() is not None
            del data
            assert held() is None
    finally:
        gc.enable()


def test_many_models_do_not_make_tensorflow_warn_of_tracing(caplog):
    """Its count goes by the place in the source: loops of several models are one to it."""
    logger = tf.get_logger()
    logger.addHandler(caplog.handler)
    try:
        for _ in range(8):
            model, accelerator = compile_in_scope(linear)
            model.fit(accelerator.dataset(X, Y), verbose=0, callbacks=[tfaccel.OneCycle(1e-3)])
            model.fit(tf.data.Dataset.from_tensor_slices((X, Y)).batch(32), verbose=0)
            model.predict(X, verbose=0)
            del model
    finally:
        logger.removeHandler(caplog.handler)
    assert "retracing" not in caplog.text


def test_predictions_of_shuffled_data_are_in_its_order():
    model, accelerator = compile_in_scope(linear)
    expected = model.predict(X, verbose=0)
    for data in (accelerator.dataset(X, Y, batch_size=32), accelerator.dataset(X, batch_size=7)):
        np.testing.assert_allclose(model.predict(data, verbose=0), expected, rtol=1e-6, atol=1e-6)
    some = model.predict(accelerator.dataset(X, Y, batch_size=30), steps=2, verbose=0)
    np.testing.assert_allclose(some, expected[:60], rtol=1e-6, atol=1e-6)


def test_predictions_of_several_replicas_are_in_the_order_of_the_data():
    accelerator = tfaccel.Accelerator(mirrored(2), "float32", False)
    with accelerator.scope():
        model = linear()
        model.compile("adam", "mse", **accelerator.compile_options())
    expected = model.predict(X, verbose=0)
    got = model.predict(accelerator.dataset(X, Y, batch_size=32), verbose=0)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
