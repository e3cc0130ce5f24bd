"""The fused updates: every option against Keras's own update, with nothing left behind."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import tfaccel
from tfaccel.fast_kernels import fused_optimizer
from tfaccel.fast_kernels.agreement import UNITS, worst_disagreement

optimizers = keras.optimizers
EPS = float(np.finfo("float32").eps)

FUSED = {
    "adam": optimizers.Adam,
    "amsgrad": lambda **options: optimizers.Adam(amsgrad=True, **options),
    "adamw": lambda **options: optimizers.AdamW(weight_decay=0.02, **options),
    "sgd": optimizers.SGD,
    "momentum": lambda **options: optimizers.SGD(momentum=0.9, **options),
    "nesterov": lambda **options: optimizers.SGD(momentum=0.9, nesterov=True, **options),
    "rmsprop": lambda **options: optimizers.RMSprop(momentum=0.9, **options),
    "centered": lambda **options: optimizers.RMSprop(momentum=0.9, centered=True, **options),
    "rmsprop without momentum": optimizers.RMSprop,
    "centered without momentum": lambda **options: optimizers.RMSprop(centered=True, **options),
    "adamax": optimizers.Adamax,
    "adadelta": optimizers.Adadelta,
}
OPTIONS = {
    "none": {},
    "clipnorm": {"clipnorm": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.1},
    "ema": {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 2},
    "schedule": {"learning_rate": optimizers.schedules.ExponentialDecay(0.01, 2, 0.5)},
}


def run(make, shapes, steps, seed, fuse, options=None, dtype="float32"):
    """State after some updates of variables of the given shapes: weights, then optimizer variables."""
    random = np.random.default_rng(seed)
    starts = [random.normal(size=shape) for shape in shapes]
    variables = [keras.Variable(start, dtype=dtype) for start in starts]
    optimizer = make(**{"learning_rate": 0.01, **(options or {})})
    optimizer.build(variables)
    update = fused_optimizer.fused_update(optimizer)
    assert not isinstance(update, str), update
    for _ in range(steps):
        scale = 10.0 ** random.uniform(-3, 1)
        gradients = [tf.cast(scale * random.normal(size=shape), dtype) for shape in shapes]
        if fuse:
            with fused_optimizer.fused(optimizer, update):
                optimizer.apply(gradients)
        else:
            optimizer.apply(gradients)
    state = [np.asarray(v.numpy(), "float64") for v in [*variables, *optimizer.variables]]
    before = starts + [np.zeros_like(a) for a in state[len(starts) :]]
    return state, before


# The op takes 1 - beta in float32: eps / (1 - 0.999) relative, and a few dozen roundings on top.
TOLERANCE = EPS * (UNITS + 1000)


@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("name", list(FUSED))
def test_every_optimizer_with_every_option_agrees_with_keras(name, options):
    shapes = [(7,), (3, 5), ()]
    plain, before = run(FUSED[name], shapes, 5, 1, False, OPTIONS[options])
    fused, _ = run(FUSED[name], shapes, 5, 1, True, OPTIONS[options])
    assert worst_disagreement(plain, fused, before, TOLERANCE) <= 1


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(list(FUSED)),
    shape=st.lists(st.integers(1, 9), max_size=4),
    steps=st.integers(1, 6),
    seed=st.integers(0, 2**20),
)
def test_any_shape_agrees_with_keras(name, shape, steps, seed):
    plain, before = run(FUSED[name], [tuple(shape)], steps, seed, False)
    fused, _ = run(FUSED[name], [tuple(shape)], steps, seed, True)
    assert worst_disagreement(plain, fused, before, TOLERANCE) <= 1


@pytest.mark.parametrize("make", [optimizers.Lion, optimizers.Nadam, optimizers.Adagrad, optimizers.Lamb])
def test_optimizers_without_an_op_say_why(make):
    reason = fused_optimizer.fused_update(make())
    assert isinstance(reason, str)
    assert make.__name__ in reason


def test_an_update_of_the_users_own_is_left_alone():
    class Signed(optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            self.assign_sub(variable, 0.1 * tf.sign(gradient))

    class Renamed(optimizers.Adam):
        pass

    assert isinstance(fused_optimizer.fused_update(Signed()), str)
    assert fused_optimizer.fused_update(Renamed()) is fused_optimizer.fused_update(optimizers.Adam())


def test_other_dtypes_and_sparse_gradients_without_an_update_take_keras_own():
    calls = []
    adam = optimizers.Adam(0.1)
    table = keras.Variable(np.ones((4, 2)), dtype="float32")
    others = [keras.Variable([1.0], dtype=dtype) for dtype in ("float16", "float64")]
    adam.build([table, *others])
    sparse = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([2]), tf.constant([4, 2]))
    with fused_optimizer.fused(adam, lambda *arguments: calls.append(arguments)):
        adam.apply([sparse, *(tf.ones([1], variable.dtype) for variable in others)])
    assert calls == []
    for variable in (table, *others):
        assert float(np.min(np.asarray(variable.numpy(), "float64"))) < 1


ROWS = {
    "adam": optimizers.Adam,
    "amsgrad": lambda **options: optimizers.Adam(amsgrad=True, **options),
    "adamw": lambda **options: optimizers.AdamW(weight_decay=0.02, **options),
    "no momentum": lambda **options: optimizers.Adam(beta_1=0.0, **options),
}


def rows_of_a_table(make, options, fuse, xla):
    """State after updates by rows: some come several times, some never, some only in later steps."""
    random, shape = np.random.default_rng(0), (6, 3)
    start = random.normal(size=shape)
    variables = [keras.Variable(start, dtype="float32"), keras.Variable(start, dtype="float32")]
    optimizer = make(**{"learning_rate": 0.01, **options})
    optimizer.build(variables)
    update = fused_optimizer.fused_update(optimizer)
    fuse = fuse and (not xla or fused_optimizer.is_for_xla(optimizer))
    around = fused_optimizer.fused(optimizer, update) if fuse else contextlib.nullcontext()

    def step(rows, some, dense):
        table = tf.IndexedSlices(rows, some, tf.constant(shape))
        optimizer.apply([table, dense])

    with around:
        step = tf.function(step, jit_compile=xla)
        for _ in range(5):
            scale = 10.0 ** random.uniform(-3, 1)
            some = random.integers(0, shape[0] - 1, 7).astype("int32")
            rows, dense = scale * random.normal(size=(7, *shape[1:])), scale * random.normal(size=shape)
            step(tf.constant(rows, tf.float32), tf.constant(some), tf.constant(dense, tf.float32))
    state = [np.asarray(v.numpy(), "float64") for v in [*variables, *optimizer.variables]]
    return state, [start, start, *(np.zeros_like(a) for a in state[2:])]


@pytest.mark.parametrize("name", list(FUSED))
def test_every_optimizer_trains_inside_xla(name):
    def train(**choices):
        accelerator = tfaccel.Accelerator("one_device", "float32", **choices)
        with accelerator.scope():
            keras.utils.set_random_seed(0)
            layers = [keras.layers.Embedding(20, 4), keras.layers.Flatten(), keras.layers.Dense(3)]
            model = keras.Sequential([keras.Input((5,), dtype="int32"), *layers])
            model.compile(FUSED[name](), "mse", **accelerator.compile_options())
        words = np.random.default_rng(0).integers(0, 9, (32, 5)).astype("int32")
        model.fit(words, np.ones((32, 3), "float32"), batch_size=8, epochs=2, shuffle=False, verbose=0)
        return [np.asarray(v, "float64") for v in [*model.get_weights(), *model.optimizer.variables]]

    plain = train(kernels="plain", jit=True)
    before = [np.zeros_like(a) for a in plain]
    # Eight steps: each begins where rounding left the one before.
    assert worst_disagreement(plain, train(kernels="fused", jit=True), before, 8 * TOLERANCE) <= 1


@pytest.mark.parametrize(
    ("options", "xla"), [*((name, False) for name in OPTIONS), ("none", True), ("accumulation", True)]
)
@pytest.mark.parametrize("name", list(ROWS))
def test_rows_of_an_embedding_agree_with_keras(name, options, xla):
    plain, before = rows_of_a_table(ROWS[name], OPTIONS[options], False, xla=xla)
    fused, _ = rows_of_a_table(ROWS[name], OPTIONS[options], True, xla=xla)
    assert worst_disagreement(plain, fused, before, TOLERANCE) <= 1


def test_many_rows_sum_in_the_same_order_every_time():
    """TensorFlow adds so many rows to a variable on several threads, in any order."""

    def table():
        random = np.random.default_rng(0)
        table = keras.Variable(random.normal(size=(500, 8)), dtype="float32")
        adam = optimizers.Adam(0.01)
        adam.build([table])
        rows = tf.constant(random.normal(size=(20_000, 8)), tf.float32)
        where = tf.constant(random.integers(0, 500, 20_000))
        with fused_optimizer.fused(adam, fused_optimizer.fused_update(adam)):
            step = tf.function(lambda: adam.apply([tf.IndexedSlices(rows, where, tf.constant([500, 8]))]))
            for _ in range(3):
                step()
        return table.numpy()

    first = table()
    for _ in range(8):
        np.testing.assert_array_equal(table(), first)


def test_rows_agree_with_the_formula():
    random = np.random.default_rng(1)
    start = random.normal(size=(5, 2))
    m, v, weights = np.zeros((5, 2)), np.zeros((5, 2)), start.copy()
    table = keras.Variable(start, dtype="float32")
    adam = optimizers.Adam(0.01)
    adam.build([table])
    with fused_optimizer.fused(adam, fused_optimizer.fused_update(adam)):
        for step in range(1, 5):
            some, rows = random.integers(0, 4, 6), random.normal(size=(6, 2))
            total, squares = np.zeros((5, 2)), np.zeros((5, 2))
            np.add.at(total, some, rows)
            np.add.at(squares, some, rows**2)
            m, v = 0.9 * m + 0.1 * total, 0.999 * v + 0.001 * squares
            weights -= 0.01 * np.sqrt(1 - 0.999**step) / (1 - 0.9**step) * m / (np.sqrt(v) + 1e-7)
            gradient = tf.IndexedSlices(tf.constant(rows, tf.float32), tf.constant(some), tf.constant([5, 2]))
            adam.apply([gradient])
    assert worst_disagreement([weights], [table.numpy()], [start], TOLERANCE) <= 1
    np.testing.assert_array_equal(table.numpy()[4], start.astype("float32")[4])  # never came


def test_nothing_stays_on_the_optimizer_after_an_exception():
    adam = optimizers.Adam()
    with pytest.raises(RuntimeError), fused_optimizer.fused(adam, lambda *_: None):
        raise RuntimeError
    assert "update_step" not in vars(adam)


@pytest.mark.parametrize("name", list(FUSED))
def test_the_probe_accepts_the_op_and_refuses_a_wrong_one(name):
    optimizer = FUSED[name]()
    config, update = optimizer.get_config(), fused_optimizer.fused_update(optimizer)
    assert fused_optimizer.probe(optimizer, update) <= 1

    def a_little_too_far(optimizer, gradient, variable, learning_rate):
        update(optimizer, gradient, variable, learning_rate * 1.001)

    assert fused_optimizer.probe(optimizer, a_little_too_far) > 1
    assert optimizer.get_config() == config
    assert not optimizer.built
