"""What Keras and TensorFlow get wrong under `tf.distribute`: each a canary, and the fix.

That each fix gives what one device gives is in `tests/test_distribution_matrix.py`.
"""

import contextlib
import itertools
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel
from tfaccel.keras_fixes.control_flow_captures import captured_outside
from tfaccel.keras_fixes.iterator_stall import untuned, untuned_iterator
from tfaccel.keras_fixes.python_batches import calls_python, copied
from tfaccel.keras_fixes.replica_random import drawing_rows
from tfaccel.keras_fixes.sample_share import Share


@pytest.fixture(scope="module")
def strategy():
    return tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def data(samples=64):
    random = np.random.default_rng(0)
    x = random.normal(size=(samples, 6)).astype("float32")
    return x, (x @ random.normal(size=(6, 1)) + 0.1).astype("float32")


def sgd():
    return keras.optimizers.SGD(0.01)


def build(*layers, kind=keras.Sequential, **options):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6,))
    x = inputs
    for layer in (*layers, keras.layers.Dense(1, dtype="float32")):
        x = layer(x)
    model = (keras.Model if kind is keras.Sequential else kind)(inputs, x)
    model.compile(options.pop("optimizer", sgd)(), **{"loss": "mse", **options})
    return model


def stock(strategy, *layers, **options):
    """A model under the strategy, in Keras as it is."""
    with strategy.scope():
        return build(*(make() for make in layers), **options)


def healed(strategy, *layers, policy="float32", **options):
    accelerator = tfaccel.Accelerator(strategy, policy, kernels="plain")
    with accelerator.scope():
        return build(*(make() for make in layers), **options, **accelerator.compile_options())


def fit(model, *arrays, **options):
    arrays = arrays or data()
    model.fit(*arrays, **{"batch_size": 16, "shuffle": False, "verbose": 0, **options})
    return model


def furthest(one, other):
    pairs = zip(one.get_weights(), other.get_weights(), strict=True)
    return max(np.abs(a - b).max() for a, b in pairs)


# Rounding of a few steps of 0.01 with gradients of about 10: 0.1 · 2⁻²⁴ · terms.
ROUNDING = 2e-7


def test_canary_uneven_batches_weigh_replicas(strategy):
    x, y = data(61)
    one = fit(build(), x, y)
    assert furthest(one, fit(stock(strategy), x, y)) > 1e-4
    assert furthest(one, fit(healed(strategy), x, y)) < ROUNDING


def test_canary_clipping_clips_parts(strategy):
    def optimizer():
        return keras.optimizers.SGD(0.01, clipvalue=0.1)

    one = fit(build(optimizer=optimizer))
    assert furthest(one, fit(stock(strategy, optimizer=optimizer))) > 1e-3
    assert furthest(one, fit(healed(strategy, optimizer=optimizer))) < ROUNDING


def overflowing():
    """Sample 15, which the second replica gets, has a gradient that is not finite."""
    x, y = data()
    y[15] = 1e38
    return x, y


def scaled():
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), initial_scale=1024.0)


def test_canary_an_overflow_in_the_second_replica_stays(strategy):
    model = fit(stock(strategy, optimizer=scaled), *overflowing())
    assert not all(np.isfinite(w).all() for w in model.get_weights())


def test_an_overflow_in_any_replica_skips_the_step(strategy):
    one = fit(build(optimizer=scaled), *overflowing())
    two = fit(healed(strategy, optimizer=scaled), *overflowing())
    assert furthest(one, two) < ROUNDING
    for model in (one, two):
        assert float(keras.ops.convert_to_numpy(model.optimizer.dynamic_scale)) == 512
        assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == 3


def test_canary_replicas_draw_the_same_masks(strategy):
    with strategy.scope():
        layer = keras.layers.Dropout(0.5, seed=1)
    masks = strategy.run(lambda: layer(tf.ones([1, 64]), training=True)).values
    np.testing.assert_array_equal(*masks)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int32", "int64"])
@pytest.mark.parametrize("shape", [(10, 8), (10, 7), (13, 3, 5)])
def test_replicas_draw_the_rows_of_one_device(dtype, shape):
    def draws(shape):
        if dtype.startswith("int"):
            return [tf.random.stateless_uniform(shape, [1, 2], 0, 100, dtype=dtype)]
        return [
            draw(shape, [1, 2], dtype=dtype)
            for draw in (tf.random.stateless_uniform, tf.random.stateless_normal)
        ]

    samples, replicas = shape[0], 3
    parts = []
    for replica in range(replicas):
        begin, end = samples * replica // replicas, samples * (replica + 1) // replicas
        share = Share(*(tf.constant(number) for number in (begin, end - begin, samples)))
        with drawing_rows(share):
            parts.append(draws((end - begin, *shape[1:])))
    for whole, rows in zip(draws(shape), zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(tf.concat(rows, 0), whole)


@pytest.mark.parametrize("rows", [3, 4, 5])
def test_a_share_draws_its_rows_with_philox_too(rows):
    """As XLA draws: the generator's own key is four drawn words, which are no batch of four."""
    share = Share(*(tf.constant(number) for number in (rows, rows, 3 * rows)))
    with drawing_rows(share):
        part = tf.random.stateless_uniform([rows, 8], [1, 2], alg="philox")
    whole = tf.random.stateless_uniform([3 * rows, 8], [1, 2], alg="philox")
    np.testing.assert_array_equal(part, whole[rows : 2 * rows])


def test_canary_batch_norm_keeps_statistics_of_each_replica(strategy):
    model = fit(stock(strategy, keras.layers.BatchNormalization))
    own = [v.numpy() for v in model.layers[1].moving_mean.value.values]
    assert np.abs(own[0] - own[1]).max() > 1e-3


def test_batch_norm_over_all_replicas(strategy):
    one = fit(build(keras.layers.BatchNormalization()))
    model = fit(healed(strategy, keras.layers.BatchNormalization))
    assert furthest(one, model) < ROUNDING
    np.testing.assert_array_equal(*(v.numpy() for v in model.layers[1].moving_mean.value.values))


def test_local_batch_norm_is_kerass_own(strategy):
    accelerator = tfaccel.Accelerator(strategy, "float32", kernels="plain", batch_norm="local")
    with accelerator.scope():
        model = build(keras.layers.BatchNormalization())
    assert furthest(fit(model), fit(stock(strategy, keras.layers.BatchNormalization))) < ROUNDING


def test_canary_a_first_batch_that_does_not_divide_fails(strategy):
    with pytest.raises(tf.errors.InvalidArgumentError, match="AddN"):
        fit(stock(strategy), batch_size=15)
    assert furthest(fit(build(), batch_size=15), fit(healed(strategy), batch_size=15)) < ROUNDING


def batches(x, y, size=16):
    for begin in range(0, len(x), size):
        yield x[begin : begin + size], y[begin : begin + size]


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_canary_generators_lose_batches(strategy):
    one = build()
    one.fit(batches(*data()), shuffle=False, verbose=0)
    lost, model = stock(strategy), healed(strategy)
    for each in (lost, model):
        each.fit(batches(*data()), shuffle=False, verbose=0)
    assert furthest(one, lost) > 1e-3
    assert furthest(one, model) < ROUNDING
    assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == 4


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_canary_iterations_count_the_end_of_unknown_data(strategy):
    x, y = data()
    unknown = tf.data.Dataset.from_tensor_slices((x, y)).filter(lambda *_: True).batch(16)
    counts = []
    for model in (stock(strategy), healed(strategy)):
        model.fit(unknown, epochs=3, shuffle=False, verbose=0)
        counts.append(int(keras.ops.convert_to_numpy(model.optimizer.iterations)))
    assert counts == [15, 12]


class Views(keras.utils.PyDataset):
    """Batches that are views of the arrays, as most users write them."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.x[16 * i : 16 * i + 16], self.y[16 * i : 16 * i + 16]


def aligned(array):
    """A copy that begins at a multiple of 64 bytes, whose memory TensorFlow takes without a copy."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    view = memory[-memory.ctypes.data % 64 :][: array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


@pytest.mark.parametrize("heals", [False, True])
def test_canary_labels_are_overwritten(strategy, heals):
    x, y = (aligned(array) for array in data())
    before = y.copy()
    model = (healed if heals else stock)(strategy)
    model.fit(Views(x, y), epochs=3, shuffle=False, verbose=0)
    assert (y == before).all() == heals


def test_only_data_that_call_python_are_copied():
    plain = tf.data.Dataset.range(8).map(lambda i: i + 1).batch(2)
    python = tf.data.Dataset.from_generator(
        lambda: itertools.repeat(np.ones(2), 3), output_signature=tf.TensorSpec([2], tf.float64)
    )
    assert not calls_python(plain)
    assert copied(plain) is plain
    assert calls_python(python.prefetch(1))
    for batch in copied(python):
        np.testing.assert_array_equal(batch, np.ones(2))


def captures_in_a_branch_in_a_loop():
    def key():
        return tf.constant(7)

    @tf.function
    def inner():
        graph = tf.compat.v1.get_default_graph()
        return graph.capture_call_time_value(key, tf.TensorSpec([], tf.int32))

    @tf.function(autograph=False)
    def outer(n):
        return tf.while_loop(
            lambda i, _: i < n,
            lambda i, last: (i + 1, tf.cond(i >= 0, inner, lambda: last)),
            [tf.constant(0), tf.constant(0)],
        )[1]

    return int(outer(tf.constant(2)))


def test_canary_captures_are_lost_in_a_branch_in_a_loop():
    with pytest.raises(tf.errors.InvalidArgumentError, match="must feed a value for placeholder"):
        captures_in_a_branch_in_a_loop()
    with captured_outside():
        assert captures_in_a_branch_in_a_loop() == 7


DEFAULT_ALL_REDUCE = """
import numpy as np, keras, tensorflow as tf, tfaccel
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
x, y = np.ones((8, 3)), np.ones((8, 1))
accelerator = tfaccel.Accelerator(strategy, "float32", steps_per_execution=2)
for scope in (accelerator.scope, strategy.scope):
    with scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse", steps_per_execution=2)
    try:
        model.fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(2), verbose=0)
        print("runs", model.optimizer.iterations.numpy())
    except tf.errors.InvalidArgumentError:
        print("fails")
"""


@pytest.mark.slow
def test_canary_steps_per_execution_fails_under_a_strategy():
    """With TensorFlow's default all-reduce; in a process of its own, because it poisons collectives."""
    answer = subprocess.run([sys.executable, "-c", DEFAULT_ALL_REDUCE], capture_output=True, text=True)
    assert answer.stdout.split("\n")[:2] == ["runs 4", "fails"], answer.stderr[-2000:]


def test_canary_xla_spans_devices(strategy):
    with pytest.raises(tf.errors.InvalidArgumentError, match="located in device"):
        fit(stock(strategy, jit_compile=True))


@pytest.mark.slow
def test_the_end_of_an_iterator_does_not_wait(strategy):
    """The canary is in the docstring of the fix: it takes minutes, and luck."""
    pipeline = untuned(tf.data.Dataset.range(64).batch(8).prefetch(tf.data.AUTOTUNE))
    dataset = strategy.experimental_distribute_dataset(pipeline)
    waits = []
    for _ in range(5):
        iterator = untuned_iterator(dataset)
        next(iterator)
        time.sleep(2)  # a tuned one would wait as long again, in about half of the cases
        assert sum(1 for _ in iterator) == 7
        started = time.perf_counter()
        del iterator
        waits.append(time.perf_counter() - started)
    assert max(waits) < 1


def test_options_of_the_user_stay():
    options = tf.data.Options()
    options.autotune.enabled = True
    dataset = tf.data.Dataset.range(3).with_options(options)
    assert untuned(dataset) is dataset


class ByHand(keras.Model):
    divisor = staticmethod(lambda model: 1)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(y - self(x, training=True))) / self.divisor(self)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"squares": loss}


class Divided(ByHand):
    divisor = staticmethod(lambda model: model.distribute_strategy.num_replicas_in_sync)


def test_a_loss_by_hand_that_is_not_divided_is_refused(strategy):
    model = healed(strategy, kind=ByHand)
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"2 times too large.*num_replicas_in_sync"):
        fit(model)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_loss_by_hand_that_is_divided_trains(strategy):
    assert furthest(fit(build(kind=ByHand)), fit(healed(strategy, kind=Divided))) < ROUNDING


class GivesItsLoss(keras.Model):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"own_loss": loss}


def test_a_train_step_reports_the_loss_of_the_batch(strategy):
    x, y = data(15)
    logs = [
        fit(m, x, y).history.history["own_loss"]
        for m in (build(kind=GivesItsLoss), healed(strategy, kind=GivesItsLoss))
    ]
    np.testing.assert_allclose(*logs, rtol=1e-6)


def masked_arrays():
    random = np.random.default_rng(0)
    x = random.normal(size=(22, 5, 3)).astype("float32")
    for row, steps in enumerate(random.integers(1, 6, 22)):
        x[row, steps:] = 0
    return x, random.normal(size=(22, 5, 1)).astype("float32")


def build_masked(loss):
    keras.utils.set_random_seed(1)
    layers = [keras.Input((5, 3)), keras.layers.Masking(), keras.layers.SimpleRNN(4, return_sequences=True)]
    model = keras.Sequential([*layers, keras.layers.BatchNormalization(), keras.layers.Dense(1)])
    rate = 0.1 if loss.reduction != "sum" else 0.1 / 45  # 9 samples of 5 steps
    model.compile(keras.optimizers.SGD(rate), loss)
    return model


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight", "sum"])
def test_masked_losses_divide_by_all_samples(strategy, reduction):
    accelerator = tfaccel.Accelerator(strategy, "float32", kernels="plain")
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    models = [build_masked(loss)]
    with accelerator.scope():
        models.append(build_masked(loss))
    x, y = masked_arrays()
    weights = np.random.default_rng(1).random((22, 1)).astype("float32")
    for model in models:
        fit(model, x, y, sample_weight=weights, batch_size=9)
    assert furthest(*models) < 1e-6
    assert models[0].history.history["loss"] == pytest.approx(models[1].history.history["loss"], rel=1e-5)


def test_single_batches_are_shared(strategy):
    x, y = data(15)
    models = [build(metrics=["mae"]), healed(strategy, metrics=["mae"])]
    logs = [[*m.train_on_batch(x, y), *m.test_on_batch(x, y)] for m in models]
    np.testing.assert_allclose(*logs, rtol=1e-6)
    assert furthest(*models) < ROUNDING


@pytest.mark.parametrize("clip", [None, 0.1])
def test_eager_models_are_healed_too(strategy, clip):
    models = []
    for make in (build, lambda **k: healed(strategy, **k)):
        model = make(optimizer=lambda: keras.optimizers.SGD(0.01, clipnorm=clip), run_eagerly=True)
        models.append(fit(model, *data(30), epochs=2))
    assert furthest(*models) < ROUNDING


def test_nothing_is_patched_outside_of_a_step(strategy):
    from keras.src.losses import loss
    from keras.src.optimizers.base_optimizer import BaseOptimizer

    before = (
        loss.scale_loss_for_distribution,
        BaseOptimizer.apply,
        tf.distribute.Strategy.num_replicas_in_sync,
    )
    fit(healed(strategy, keras.layers.BatchNormalization))
    assert before == (
        loss.scale_loss_for_distribution,
        BaseOptimizer.apply,
        tf.distribute.Strategy.num_replicas_in_sync,
    )


@pytest.mark.parametrize("scaled_loss", [False, True])
def test_an_optimizer_of_another_scope_is_refused(strategy, scaled_loss):
    outside = scaled() if scaled_loss else sgd()
    with pytest.raises(ValueError, match=r"SGD was made outside of this scope.*MirroredStrategy"):
        healed(strategy, optimizer=lambda: outside)


def two_outputs(activation="gelu"):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6,))
    x = keras.layers.BatchNormalization()(keras.layers.Dense(8, activation=activation)(inputs))
    model = keras.Model(inputs, {name: keras.layers.Dense(1, name=name)(x) for name in "ab"})
    optimizer = keras.optimizers.RMSprop(0.01, momentum=0.9)
    losses = {"a": "mse", "b": "mae"}
    model.compile(optimizer, losses, loss_weights={"a": 0.5, "b": 2.0}, metrics={"a": ["mae"]})
    return model


@pytest.mark.parametrize("kernels", ["plain", "auto"])
def test_a_fit_inside_of_the_scope_with_two_outputs(strategy, kernels):
    x, y = data(61)
    targets = {"a": y, "b": -y}
    one = fit(two_outputs(), x, targets, epochs=2, validation_split=0.2)
    accelerator = tfaccel.Accelerator(strategy, "float32", kernels=kernels)
    with accelerator.scope():
        two = two_outputs()
        throughput = tfaccel.Throughput()
        fit(two, x, targets, epochs=2, validation_split=0.2, callbacks=[throughput])
        predicted = two.predict(x, batch_size=16, verbose=0)
    # RMSprop divides by the root of a sum of squares that may cancel: as in the distribution matrix.
    assert furthest(one, two) < 1e-6
    for name, values in one.predict(x, batch_size=16, verbose=0).items():
        np.testing.assert_allclose(predicted[name], values, rtol=0, atol=1e-5)
    for name, values in one.history.history.items():
        assert two.history.history[name] == pytest.approx(values, rel=1e-5)
    if kernels == "auto":
        assert "one fused op for each weight" in str(accelerator)


class TwoSteps(keras.Model):
    """Two networks and two optimizers, as a GAN has them; no `call`."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential([keras.Input((6,)), keras.layers.Dense(6)])
        self.critic = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])

    def compile(self):
        super().compile()
        self.optimizers = [keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.02)]
        self.loss_of = keras.losses.BinaryCrossentropy(from_logits=True)
        for optimizer, network in zip(self.optimizers, (self.generator, self.critic), strict=True):
            optimizer.build(network.trainable_variables)

    def train_step(self, x):
        ones = tf.ones([tf.shape(x)[0], 1])
        for optimizer, network in zip(self.optimizers, (self.generator, self.critic), strict=True):
            with tf.GradientTape() as tape:
                made = self.loss_of(ones, self.critic(self.generator(x)))
                loss = made if network is self.generator else self.loss_of(ones, self.critic(x)) - made
            gradients = tape.gradient(loss, network.trainable_variables)
            optimizer.apply_gradients(zip(gradients, network.trainable_variables, strict=True))
        return {"generator": made}


def test_two_optimizers_in_a_step(strategy):
    models = []
    for accelerator in (None, tfaccel.Accelerator(strategy, "float32")):
        keras.utils.set_random_seed(1)
        with contextlib.nullcontext() if accelerator is None else accelerator.scope():
            models.append(TwoSteps())
            models[-1].compile()
        models[-1].fit(data(61)[0], batch_size=15, shuffle=False, verbose=0)
    assert furthest(*models) < 1e-6  # Adam, as in the distribution matrix


def mean_absolute(y_true, y_pred):
    return tf.reduce_mean(tf.abs(y_true - y_pred))


@pytest.mark.parametrize("samples", [17, 61])
@pytest.mark.parametrize("eager", [False, True])
def test_functions_that_take_the_mean_themselves(strategy, samples, eager):
    def regularized():
        first = keras.initializers.GlorotUniform(seed=3)
        return keras.layers.Dense(4, kernel_regularizer="l2", kernel_initializer=first)

    x, y = data(samples)
    options = {"loss": mean_absolute, "metrics": [mean_absolute], "run_eagerly": eager}
    models = [build(regularized(), **options), healed(strategy, regularized, **options)]
    for model in models:
        fit(model, x, y)
    assert furthest(*models) < ROUNDING
    for name, values in models[0].history.history.items():
        assert models[1].history.history[name] == pytest.approx(values, rel=1e-5)


def test_single_batches_of_an_eager_model(strategy):
    x, y = data(15)
    for where in (strategy, tf.distribute.OneDeviceStrategy("CPU:0")):
        models = [build(run_eagerly=True), healed(where, run_eagerly=True)]
        logs = [[m.train_on_batch(x, y), m.test_on_batch(x, y)] for m in models]
        np.testing.assert_allclose(*logs, rtol=1e-6)
        assert furthest(*models) < ROUNDING


def test_an_optimizer_that_is_not_built_is_refused(strategy):
    class Lazy(TwoSteps):
        def compile(self):
            super().compile()
            self.optimizers = [keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.02)]

    with tfaccel.Accelerator(strategy, "float32").scope():
        model = Lazy()
        model.compile()
    with pytest.raises(ValueError, match=r"has no variables yet.*optimizer\.build"):
        model.fit(data()[0], batch_size=16, shuffle=False, verbose=0)


def test_weights_get_the_same_noise_on_all_replicas():
    whole = tf.random.stateless_uniform((16, 3), [1, 2])
    share = Share(tf.constant(4), tf.constant(4), tf.constant(8))
    with drawing_rows(share):
        np.testing.assert_array_equal(tf.random.stateless_uniform((16, 3), [1, 2]), whole)


@pytest.mark.parametrize("kernels", ["plain", "auto"])
def test_an_empty_share_of_a_convolution_is_refused(strategy, kernels):
    accelerator = tfaccel.Accelerator(strategy, "float32", kernels=kernels)
    with accelerator.scope():
        layers = [
            keras.Input((5, 3)),
            keras.layers.Conv1D(4, 2),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
        model = keras.Sequential(layers)
        model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"last batch has 1 samples for 2 replicas.*batch_size"):
        model.fit(np.ones((17, 5, 3)), np.ones((17, 1)), batch_size=16, verbose=0)


def test_sparse_batches_on_one_device():
    x, y = data()
    sparse = tf.data.Dataset.from_tensor_slices((tf.sparse.from_dense(x), y)).batch(16)
    models = [build(), healed(tf.distribute.OneDeviceStrategy("CPU:0"))]
    for model in models:
        model.fit(sparse, shuffle=False, verbose=0)
    assert furthest(*models) < ROUNDING
