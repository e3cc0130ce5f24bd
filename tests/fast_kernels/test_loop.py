"""The compiled loops in `fit` and `evaluate`: everything that they promise still holds, on every road."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel
from tfaccel.fast_kernels import resident

EPS = float(np.finfo("float32").eps)


class Counting(keras.callbacks.Callback):
    """Notes the batch numbers and logs that `fit` hands to callbacks."""

    def __init__(self):
        super().__init__()
        self.batches, self.losses = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(batch)
        self.losses.append(float(logs["loss"]))


def fit(helpers, data, kernels, *, steps=4, kind="sequential", **fit_options):
    accelerator = tfaccel.Accelerator(kernels=kernels, jit=False, steps_per_execution=steps)
    with accelerator.scope():
        model = helpers.compile(helpers.build(kind), **accelerator.compile_options())
    x, y = data(accelerator) if callable(data) else data
    callbacks = [Counting(), *fit_options.pop("callbacks", [])]
    options = {"epochs": 2, "verbose": 0, "shuffle": False, "callbacks": callbacks, **fit_options}
    history = model.fit(x, y, **options)
    return model, history, callbacks[0], accelerator


def assert_same_run(plain, fused, steps):
    """Weights agree as far as `steps` updates let rounding grow.

    Each step adds about 64 roundings of the gradient, relative to the update; Adam's update is at most the
    learning rate (1e-3) an element, and its op takes 1 - beta_2 in float32 (1000 roundings more).
    """
    bound = steps * 1e-3 * (64 + 1000) * EPS * 10 + 4 * EPS
    for a, b in zip(plain.get_weights(), fused.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=bound)
    for a, b in zip(plain.optimizer.variables, fused.optimizer.variables, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        # Slots see gradients at weights that are that far apart.
        assert np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(a) + 1e-7


def arrays(small):
    return lambda accelerator: small


def dataset(small):
    return lambda accelerator: (accelerator.dataset(*small, batch_size=32, shuffle=False), None)


def stream(small):
    return lambda accelerator: (tf.data.Dataset.from_tensor_slices(small).batch(32), None)


def unknown_length(small):
    def data(accelerator):
        return tf.data.Dataset.from_tensor_slices(small).batch(32).filter(lambda *_: True), None

    return data


def python_data(small):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return small[0][32 * i : 32 * i + 32], small[1][32 * i : 32 * i + 32]

    return lambda accelerator: (Batches(), None)


@pytest.mark.parametrize("kind", ["sequential", "functional", "subclassed"])
@pytest.mark.parametrize("road", [arrays, dataset, stream, python_data])
def test_every_road_trains_as_keras_does(helpers, small, kind, road):
    """240 samples in batches of 32: eight steps, the last of them partial; four steps a call."""
    plain, expected, batches, _ = fit(helpers, road(small), "plain", steps=1, kind=kind)
    fused, history, calls, accelerator = fit(helpers, road(small), "fused", kind=kind)
    assert_same_run(plain, fused, 16)
    for name in expected.history:
        np.testing.assert_allclose(expected.history[name], history.history[name], rtol=1e-5)
    assert batches.batches == [0, 1, 2, 3, 4, 5, 6, 7] * 2
    assert calls.batches == [3, 7] * 2
    np.testing.assert_allclose(calls.losses, [batches.losses[i] for i in (3, 7, 11, 15)], rtol=1e-5)
    assert "compiled" in str(accelerator)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # as Keras warns for unknown lengths
def test_a_stream_of_unknown_length_ends_where_it_ends(helpers, small):
    """Against the same data of known length: Keras counts two iterations too many where it isn't known."""
    plain, *_ = fit(helpers, stream(small), "plain", steps=1)
    fused, *_ = fit(helpers, unknown_length(small), "fused", steps=3)
    assert_same_run(plain, fused, 16)
    assert int(fused.optimizer.iterations) == 16


@pytest.mark.parametrize("steps", [1, 3, 5, 8, 100])
def test_an_epoch_need_not_be_a_multiple_of_a_call(helpers, small, steps):
    plain, *_ = fit(helpers, small, "plain", steps=1)
    fused, _, calls, _ = fit(helpers, small, "fused", steps=steps)
    assert_same_run(plain, fused, 16)
    assert calls.batches[-1] == 7


@pytest.mark.parametrize("road", [dataset, stream])
@pytest.mark.parametrize("repeat", [False, True])
def test_steps_per_epoch_are_counted_exactly(helpers, small, road, repeat):
    """Keras rounds them up to whole executions: 3 steps would be 4."""

    def data(accelerator):
        batches, _ = road(small)(accelerator)
        return (batches.repeat() if repeat else batches), None

    options = {"epochs": 2, "steps_per_epoch": 3}
    plain, *_ = fit(helpers, data, "plain", steps=1, **options)
    fused, _, calls, _ = fit(helpers, data, "fused", steps=4, **options)
    assert int(fused.optimizer.iterations) == 6
    assert calls.batches == [2, 2]
    assert_same_run(plain, fused, 6)


def test_running_out_of_data_warns_as_keras_does(helpers, small):
    with pytest.warns(UserWarning, match="ran out of data"):
        model, *_ = fit(helpers, dataset(small), "fused", epochs=2, steps_per_epoch=6)
    assert int(model.optimizer.iterations) == 8  # six, and the two that were left


@pytest.mark.parametrize("road", [arrays, dataset])
def test_class_weight_and_sample_weight(helpers, small, road):
    weights = {"class_weight": {i: 3.0 if i == 0 else 0.5 for i in range(10)}}
    plain, *_ = fit(helpers, road(small), "plain", steps=1, **weights)
    fused, _, _, accelerator = fit(helpers, road(small), "fused", **weights)
    assert_same_run(plain, fused, 16)
    assert "resident" in str(accelerator)
    unweighted, *_ = fit(helpers, road(small), "fused")
    assert np.abs(unweighted.get_weights()[0] - fused.get_weights()[0]).max() > 1e-4
    samples = np.linspace(0, 2, 240).astype("float32")
    plain, *_ = fit(helpers, small, "plain", steps=1, sample_weight=samples)
    fused, *_ = fit(helpers, small, "fused", sample_weight=samples)
    assert_same_run(plain, fused, 16)


def two_inputs():
    keras.utils.set_random_seed(1)
    layers = keras.layers
    image, number = keras.Input((7, 7, 1), name="image"), keras.Input((2,), name="number")
    x = layers.Concatenate()([layers.Flatten()(image), number])
    return keras.Model(
        {"image": image, "number": number},
        {"digit": layers.Dense(10, name="digit")(x), "side": layers.Dense(1, name="side")(x)},
    )


def test_dictionaries_of_inputs_and_outputs(small):
    x = {"image": small[0], "number": np.random.default_rng(0).normal(size=(240, 2))}
    y = {"digit": small[1], "side": np.ones((240, 1), "float32")}
    losses = {"digit": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "side": "mse"}
    models = []
    for kernels in ("plain", "fused"):
        accelerator = tfaccel.Accelerator(kernels=kernels, jit=False)
        with accelerator.scope():
            model = two_inputs()
            model.compile("adam", losses, **accelerator.compile_options())
        model.fit(accelerator.dataset(x, y, batch_size=50, shuffle=False), epochs=2, verbose=0)
        models.append(model)
    assert_same_run(*models, 10)


@pytest.mark.parametrize("road", [arrays, dataset])
def test_validation_and_evaluate_take_the_same_road(helpers, small, road):
    options = {"validation_data": (small[0][:100], small[1][:100]), "validation_batch_size": 30}
    _, expected, _, _ = fit(helpers, road(small), "plain", steps=1, **options)
    fused, history, *_ = fit(helpers, road(small), "fused", **options)
    for name in ("val_loss", "val_accuracy"):
        np.testing.assert_allclose(expected.history[name], history.history[name], rtol=1e-4)
    again = fused.evaluate(small[0][:100], small[1][:100], batch_size=30, verbose=0)
    last = [history.history[f"val_{name}"][-1] for name in ("loss", "accuracy")]
    np.testing.assert_allclose(again, last, rtol=1e-6)


def test_data_of_another_length_share_the_program(helpers, small):
    model, *_ = fit(helpers, small, "fused")
    plain = helpers.compile(helpers.build())
    plain.set_weights(model.get_weights())
    for samples in (200, 33, 240, 31):
        x, y = small[0][:samples], small[1][:samples]
        expected = plain.evaluate(x, y, batch_size=32, verbose=0)
        np.testing.assert_allclose(model.evaluate(x, y, batch_size=32, verbose=0), expected, rtol=1e-5)


def test_every_epoch_has_a_new_order_that_the_seed_decides(small):
    data = resident.of_arrays(small, 240, 32, True)
    orders = []
    for _ in range(2):
        keras.utils.set_random_seed(3)
        orders.append([data.new_order().numpy() for _ in range(2)])
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0][0] != orders[0][1]).any()
    for order in orders[0]:
        np.testing.assert_array_equal(np.sort(order), np.arange(240))


def test_a_shuffled_epoch_sees_every_sample_once(helpers, small):
    """A model whose only weight sums up what it sees: with SGD on a linear loss the order can't matter."""

    def build():
        return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])

    numbers = np.arange(1.0, 241.0, dtype="float32")[:, None]
    accelerator = tfaccel.Accelerator(kernels="fused", jit=False)
    with accelerator.scope():
        model = build()
        model.compile(keras.optimizers.SGD(1.0), lambda y, z: z, **accelerator.compile_options())
    start = model.get_weights()[0].item()
    model.fit(accelerator.dataset(numbers, numbers, batch_size=16), verbose=0)
    # 15 steps, each moves the weight by the mean of its 16 numbers; exact up to rounding of the sums.
    assert model.get_weights()[0].item() == pytest.approx(start - numbers.sum() / 16, rel=1e-5)


def test_stop_training_ends_the_run(helpers, small):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 3

    model, *_ = fit(helpers, small, "fused", callbacks=[Stop()])
    assert int(model.optimizer.iterations) == 4


@pytest.mark.parametrize(
    "option", ["accumulation", "loss_scaling", "mixed_bfloat16", "constraint", "dropout", "xla"]
)
def test_options_of_a_step_hold(helpers, small, option):
    def build():
        keras.utils.set_random_seed(1)
        extra = [keras.layers.Dropout(0.5, seed=4)] if option == "dropout" else []
        limit = keras.constraints.MaxNorm(0.5) if option == "constraint" else None
        layers = [keras.layers.Flatten(), *extra, keras.layers.Dense(10, kernel_constraint=limit)]
        return keras.Sequential([keras.Input((7, 7, 1)), *layers])

    adam = keras.optimizers.Adam
    make = {
        "accumulation": lambda: adam(1e-3, gradient_accumulation_steps=3),
        "loss_scaling": lambda: keras.optimizers.LossScaleOptimizer(adam(1e-3)),
    }.get(option, lambda: adam(1e-3))
    precision = option if option.startswith("mixed") else "float32"
    models = []
    for kernels in ("plain", "fused"):
        accelerator = tfaccel.Accelerator(
            precision=precision, kernels=kernels, jit=option == "xla", steps_per_execution=4
        )
        with accelerator.scope():
            model = build()
            helpers.compile(model, make(), **accelerator.compile_options())
        model.fit(*small, epochs=2, verbose=0, shuffle=False)
        models.append(model)
    if option == "mixed_bfloat16":
        # Activations carry 8 bits, so an update (1e-3 at most) may differ by a few of 2^-8 of itself.
        for a, b in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
            np.testing.assert_allclose(a, b, atol=16 * 1e-3 * 2**-5)
    else:
        assert_same_run(*models, 16)


def test_a_train_step_of_the_users_own_and_its_extra_logs(small):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(10)

        def call(self, x):
            return self.dense(keras.ops.reshape(x, (-1, 49)))

        def train_step(self, data):
            logs = super().train_step(data)
            return {**logs, "twice": 2 * logs["loss"], "nothing": None}

    accelerator = tfaccel.Accelerator(kernels="fused", jit=False)
    with accelerator.scope():
        model = Own()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, **accelerator.compile_options())
    counting = Counting()
    model.fit(*small, verbose=0, callbacks=[counting])
    logs = model.train_on_batch(small[0][:32], small[1][:32], return_dict=True)
    assert logs["twice"] == pytest.approx(2 * logs["loss"])
    assert "resident" in str(accelerator)


@pytest.mark.parametrize("way", ["eager", "own_function"])
def test_models_that_cannot_be_accelerated_train_as_plain_keras_and_say_why(helpers, small, way):
    class Own(helpers.Subclassed):
        def make_train_function(self, force=False):
            return super().make_train_function(force)

    accelerator = tfaccel.Accelerator(kernels="fused", jit=False)
    with accelerator.scope():
        model = Own() if way == "own_function" else helpers.build()
        helpers.compile(model, run_eagerly=way == "eager")
    model.fit(small[0][:64], small[1][:64], verbose=0)
    assert int(model.optimizer.iterations) == 2
    assert "loop: Keras's own" in str(accelerator)


def test_compiled_again_outside_the_scope_is_plain_keras(helpers, small):
    model, _, _, accelerator = fit(helpers, small, "fused")
    helpers.compile(model, jit_compile=False)
    assert type(model.train_function).__name__ == "NoneType"
    model.fit(*small, verbose=0)
    assert type(model.train_function).__name__ == "function"
    assert int(model.optimizer.iterations) == 8
    assert "compiled again outside of the scope" in str(accelerator)
    assert "one fused op" not in str(accelerator)


def test_data_larger_than_the_memory_allows_are_streamed(helpers, small, monkeypatch):
    monkeypatch.setattr(resident, "free_memory_bytes", lambda: 4 * small[0].nbytes - 1)
    plain, *_ = fit(helpers, small, "plain", steps=1)
    fused, _, _, accelerator = fit(helpers, small, "fused")
    assert_same_run(plain, fused, 16)
    assert "data streamed" in str(accelerator)
    assert "free memory" in str(accelerator)


def test_no_step_is_traced_twice_and_a_second_fit_traces_nothing(small):
    traces = []

    class Noting(keras.layers.Layer):
        def call(self, x, training=None):
            if training:
                traces.append(x.shape)
            return x

    accelerator = tfaccel.Accelerator(kernels="fused", jit=False)
    with accelerator.scope():
        stack = [Noting(), keras.layers.Flatten(), keras.layers.Dense(10)]
        model = keras.Sequential([keras.Input((7, 7, 1)), *stack])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, **accelerator.compile_options())
    data = accelerator.dataset(*small, batch_size=32)
    model.fit(data, epochs=3, verbose=0)
    assert len(traces) == 1
    model.fit(data, epochs=1, verbose=0)
    assert len(traces) == 1


def test_trained_here_goes_on_in_plain_keras_and_back(helpers, small, tmp_path):
    """Saved in mid-training, loaded without tfaccel, trained on: as if nothing had happened, both ways."""
    straight, *_ = fit(helpers, small, "plain", steps=1, epochs=4)
    for first, second in (("fused", "plain"), ("plain", "fused")):
        model, *_ = fit(helpers, small, first, epochs=2)
        model.save(tmp_path / "half.keras")
        accelerator = tfaccel.Accelerator(kernels=second, jit=False)
        with accelerator.scope():
            loaded = keras.models.load_model(tmp_path / "half.keras")
        loaded.fit(*small, epochs=2, verbose=0, shuffle=False)
        assert_same_run(straight, loaded, 32)
        assert (type(loaded.train_function).__name__ == "FastFunction") == (second == "fused")


@pytest.mark.parametrize("name", ["adam", "sgd", "rmsprop"])
def test_two_hundred_steps_stay_beside_keras(helpers, small, name):
    """With batch normalization. Rounding grows with the steps; the runs stay together to a thousandth."""

    def build():
        keras.utils.set_random_seed(1)
        layers = keras.layers
        return keras.Sequential(
            [
                keras.Input((7, 7, 1)),
                layers.Conv2D(4, 3),
                layers.BatchNormalization(),
                layers.Activation("gelu"),
                layers.Flatten(),
                layers.Dense(10),
            ]
        )

    make = {
        "adam": lambda: keras.optimizers.Adam(1e-3),
        "sgd": lambda: keras.optimizers.SGD(1e-2, momentum=0.9),
        "rmsprop": lambda: keras.optimizers.RMSprop(1e-4, momentum=0.5),
    }[name]
    histories = []
    for kernels in ("plain", "fused"):
        accelerator = tfaccel.Accelerator(kernels=kernels, jit=False)
        with accelerator.scope():
            model = build()
            helpers.compile(model, make(), **accelerator.compile_options())
        histories.append(model.fit(*small, epochs=25, verbose=0, shuffle=False).history["loss"])
    assert len(histories[0]) * 8 == 200
    np.testing.assert_allclose(histories[0], histories[1], rtol=1e-3)
    assert histories[0][-1] < 0.9 * histories[0][0]


def test_a_model_with_kernels_can_be_copied(helpers, small):
    import pickle

    model, *_ = fit(helpers, small, "fused")
    copies = [pickle.loads(pickle.dumps(model)), keras.models.clone_model(model)]
    for copy in copies:
        assert "make_train_function" not in vars(copy)
    copies[1].set_weights(model.get_weights())
    for copy in copies:
        np.testing.assert_array_equal(copy.predict(small[0], verbose=0), model.predict(small[0], verbose=0))


def test_memory_of_arrays_is_not_taken_twice(helpers, small):
    """Keras keeps a copy of `fit`'s arrays in its pipeline; while the loop runs there is one copy only."""
    seen = []

    class Look(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            frame = __import__("inspect").currentframe()
            while "epoch_iterator" not in frame.f_locals:
                frame = frame.f_back
            seen.append(frame.f_locals["epoch_iterator"]._distributed_dataset.element_spec)

    fit(helpers, small, "fused", callbacks=[Look()])
    assert seen == [tf.TensorSpec([], tf.int64)] * 2
