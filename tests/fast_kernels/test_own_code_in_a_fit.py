"""What a script does in and around a `fit` that plain Keras runs: here its result is plain Keras's."""

import gc
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel

layers = keras.layers
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(96, 6)).astype("float32")
Y = RANDOM.normal(size=(96, 2)).astype("float32")
LABELS = RANDOM.integers(0, 3, 96)


def net(units=2):
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((6,)), layers.Dense(8, activation="tanh"), layers.Dense(units)])


def fused(build=net, optimizer="sgd", loss="mse", *, jit=False, **options):
    """A model that was compiled in a scope, and the accelerator."""
    accelerator = tfaccel.Accelerator("one_device", "float32", jit, "fused")
    with accelerator.scope():
        model = build()
        model.compile(optimizer, loss, **{**accelerator.compile_options(), **options})
    return model, accelerator


def plain(build=net, optimizer="sgd", loss="mse", **options):
    model = build()
    model.compile(optimizer, loss, jit_compile=False, **options)
    return model


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("form", ["classes", "column", "floats", "one-hot"])
def test_a_class_without_a_weight_weighs_one(jit, form):
    labels = {
        "classes": LABELS,
        "column": LABELS[:, None],
        "floats": LABELS.astype("float32"),
        "one-hot": np.eye(3, dtype="float32")[LABELS],
    }[form]
    make = (
        keras.losses.CategoricalCrossentropy
        if form == "one-hot"
        else keras.losses.SparseCategoricalCrossentropy
    )
    weights = {0: np.asarray(3.0), 1: 0.2}  # and none for the last class
    expected = plain(lambda: net(3), loss=make(from_logits=True))
    expected.fit(X, labels, class_weight=weights, shuffle=False, verbose=0)
    model, accelerator = fused(lambda: net(3), loss=make(from_logits=True), jit=jit)
    data = accelerator.dataset(X, labels, shuffle=False)
    model.fit(data, class_weight=weights, verbose=0)
    np.testing.assert_allclose(model.get_weights()[0], expected.get_weights()[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("y", "weights", "says"),
    [
        (LABELS, LABELS.astype("float32"), "at the same time"),
        ((LABELS, LABELS), None, "single output"),
    ],
)
def test_class_weights_that_have_no_meaning_are_refused(y, weights, says):
    inputs = keras.Input((6,))
    heads = [layers.Dense(3)(inputs) for _ in range(2 if isinstance(y, tuple) else 1)]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model, accelerator = fused(lambda: keras.Model(inputs, heads), loss=[loss] * len(heads))
    with pytest.raises(ValueError, match=says):
        model.fit(accelerator.dataset(X, y, sample_weight=weights), class_weight={0: 2.0}, verbose=0)


@pytest.mark.parametrize("form", ["arrays", "stream"])
def test_data_are_let_go_without_the_collector(form):
    model, _ = fused()

    def train():
        x, y = X.copy(), Y.copy()
        data = (x, y) if form == "arrays" else (tf.data.Dataset.from_tensors((x, y)),)
        model.fit(*data, verbose=0, shuffle=False)
        model.evaluate(*data, verbose=0)

    def held():
        kinds = ("ResidentBatches", "TFEpochIterator")
        return sum(type(each).__name__ in kinds for each in gc.get_objects())

    train()
    gc.collect()
    before = held()
    gc.disable()
    try:
        for _ in range(3):
            train()
        assert held() <= before
    finally:
        gc.enable()


@pytest.mark.parametrize("options", [{}, {"batch_size": 50}, {"batch_size": 32, "steps": 2}])
def test_predictions_have_the_order_of_the_data(options):
    model, accelerator = fused()
    found = model.predict(accelerator.dataset(X), verbose=0, **options)
    assert len(found) == 32 * options.get("steps", 3)
    np.testing.assert_allclose(found, model.predict(X, verbose=0)[: len(found)], rtol=1e-5)


def test_predict_takes_a_generator_with_nothing_for_an_input():
    inputs = [keras.Input((6,)), keras.Input((2,), optional=True)]

    class First(layers.Layer):
        def call(self, given):
            return given[0]

        def compute_output_shape(self, shapes):
            return shapes[0]

    model, _ = fused(lambda: keras.Model(inputs, layers.Dense(2)(First()(inputs))))
    found = model.predict((((x, None),) for x in (X[:32], X[32:64])), verbose=0, steps=2)
    np.testing.assert_allclose(found, model.layers[-1](X[:64]), rtol=1e-5)


@pytest.mark.parametrize("given", ["arrays", "dataset"])
@pytest.mark.parametrize("jit", [False, True])
def test_a_loss_may_ask_how_many_rows_a_batch_has(given, jit):
    def contrastive(_, predicted):
        return keras.losses.categorical_crossentropy(
            tf.eye(predicted.shape[0]), predicted @ tf.transpose(predicted), from_logits=True
        )

    expected = plain(loss=contrastive)
    expected.fit(X, Y, 16, epochs=2, shuffle=False, verbose=0)
    model, accelerator = fused(loss=contrastive, jit=jit)
    data = {"x": X, "y": Y, "batch_size": 16, "shuffle": False}
    if given == "dataset":
        data = {"x": accelerator.dataset(X, Y, batch_size=16, shuffle=False)}
    model.fit(**data, epochs=2, verbose=0)
    np.testing.assert_allclose(model.get_weights()[0], expected.get_weights()[0], rtol=1e-4, atol=1e-5)
    with pytest.raises((ValueError, TypeError)):  # the last batch is smaller
        model.fit(X[:90], Y[:90], 16, verbose=0)


@pytest.mark.parametrize("trains", [True, False])
def test_a_callback_may_choose_what_trains(trains):
    class Choosing(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.model.layers[0].trainable = trains

    def build():
        model = net()
        model.layers[0].trainable = not trains
        return model

    models = [plain(build, "adam"), fused(build, "adam")[0]]
    for model in models:
        model.fit(X, Y, shuffle=False, verbose=0, callbacks=[Choosing()])
    assert len(models[1].optimizer.variables) == len(models[0].optimizer.variables)
    np.testing.assert_allclose(models[1].get_weights()[0], models[0].get_weights()[0], rtol=1e-5, atol=1e-5)


def test_a_step_that_trains_some_weights_has_slots_for_those_only():
    class Partial(keras.Model):
        def __init__(self):
            super().__init__()
            self.body, self.head = layers.Dense(4), layers.Dense(2)
            self(X[:1])

        def call(self, x):
            return self.head(self.body(x))

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
            weights = self.head.trainable_variables
            self.optimizer.apply(tape.gradient(loss, weights), weights)
            return {"loss": loss}

    counts = []
    for model in (plain(Partial, "adam"), fused(Partial, "adam")[0]):
        model.fit(X, Y, verbose=0)
        counts.append(len(model.optimizer.variables))
    assert counts[1] == counts[0]


def test_own_code_runs_in_training_only():
    class Careful(keras.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            if not training:
                raise AssertionError("nobody validates here")
            return super().compute_loss(x, y, y_pred, sample_weight, training)

    model, _ = fused(lambda: Careful([keras.Input((6,)), layers.Dense(2)]))
    model.fit(X, Y, verbose=0)
    model.fit(X, Y, verbose=0)


def test_targets_of_unknown_rank():
    class Shaping(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = layers.Dense(2)

        def call(self, x):
            return self.head(tf.ensure_shape(x, [None, 6]))

        def train_step(self, data):
            return super().train_step(
                [tf.ensure_shape(part, [None, n]) for part, n in zip(data, (6, 2), strict=True)]
            )

    model, _ = fused(Shaping)

    def copy(x, y):
        return tf.numpy_function(lambda *parts: parts, [x, y], (tf.float32, tf.float32))

    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(32).map(copy)
    for _ in range(2):
        assert np.isfinite(model.fit(data, verbose=0, shuffle=False).history["loss"][0])


def test_scopes_are_those_of_their_thread():
    original = keras.Model.compile
    first_is_open, second_is_open, first_is_closed = (threading.Event() for _ in range(3))
    seen = {}

    def first():
        with tfaccel.Accelerator("one_device", "float32", False, "fused").scope():
            first_is_open.set()
            second_is_open.wait(60)
        first_is_closed.set()

    def second():
        first_is_open.wait(60)
        with tfaccel.Accelerator("one_device", "float32", False, "fused").scope():
            second_is_open.set()
            first_is_closed.wait(60)
            seen["inside"] = "make_train_function" in vars(plain())

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    second_is_open.wait(60)
    seen["beside"] = "make_train_function" in vars(plain())
    for thread in threads:
        thread.join()
    assert seen == {"inside": True, "beside": False}
    assert keras.Model.compile is original


@pytest.mark.parametrize("inner", ["mixed_bfloat16", "float32"])
def test_a_scope_inside_of_another_counts_alone(inner):
    with tfaccel.Accelerator("one_device", "float32", False, "fused").scope():
        with tfaccel.Accelerator("one_device", inner, False, "plain").scope():
            model = plain()
        other = plain()
    assert "make_train_function" not in vars(model)
    assert "make_train_function" in vars(other)


def test_an_update_that_was_put_on_the_optimizer_is_used():
    model, _ = fused()
    model.fit(X, Y, verbose=0)
    calls = []
    model.optimizer.update_step = lambda gradient, variable, rate: calls.append(variable.name)
    model.make_train_function(force=True)
    before = model.get_weights()
    model.fit(X, Y, verbose=0)
    assert calls
    assert "update_step" in vars(model.optimizer)
    np.testing.assert_array_equal(model.get_weights()[0], before[0])


def test_a_checkpoint_with_hooks_of_its_own_sees_every_batch(tmp_path):
    class Counting(keras.callbacks.ModelCheckpoint):
        batches = 0

        def on_train_batch_end(self, batch, logs=None):
            self.batches += 1

    model, _ = fused(steps_per_execution=1)
    counting = Counting(tmp_path / "m.keras")
    model.fit(X, Y, batch_size=1, verbose=0, callbacks=[counting])
    assert counting.batches == 96


@pytest.mark.parametrize("name", ["train_on_batch", "test_on_batch"])
def test_a_callback_may_use_single_batches(name):
    lengths = []

    class Between(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            lengths.append(self.model.train_function.length.steps)
            getattr(self.model, name)(X[:4], Y[:4])

    model, _ = fused()
    model.fit(X, Y, batch_size=1, epochs=4, verbose=0, callbacks=[Between()])
    assert lengths == sorted(lengths)  # calls go on growing


def test_the_report_is_that_of_the_model_and_of_its_compilation():
    model, accelerator = fused(optimizer="adam")
    model.fit(X, Y, verbose=0)
    with accelerator.scope():
        model.compile("sgd", "mse")
    assert "outside of the scope" not in str(accelerator)
    model.fit(X, Y, verbose=0)
    assert "one fused op" in str(accelerator)
    with accelerator.scope():
        net().compile(keras.optimizers.Lion(), "mse")
    model.fit(X, Y, verbose=0)
    assert "one fused op" not in str(accelerator)  # it tells of the other one


def test_the_same_optimizer_outside_of_the_scope_is_plain_keras():
    model, accelerator = fused()
    model.fit(X, Y, verbose=0)
    model.compile(model.optimizer, "mae")
    model.fit(X, Y, verbose=0)
    assert "compiled again outside of the scope" in str(accelerator)


def test_python_inside_of_a_step_is_called_once_a_step():
    calls = []

    class Counting(layers.Layer):
        def call(self, x):
            def count(values):
                calls.append(1)
                return values

            return tf.ensure_shape(tf.py_function(count, [x], tf.float32), x.shape)

    def build():
        sequence = [keras.Input((4, 6)), Counting(), layers.LSTM(4), layers.Dense(2)]
        return keras.Sequential(sequence)

    model, _ = fused(build, jit="auto")
    calls.clear()
    model.fit(np.tile(X[:, None], (1, 4, 1)), Y, batch_size=4, epochs=40, verbose=0)
    assert len(calls) == 40 * 24
