"""The schedules: closed forms, plain Keras as the oracle, every way that `fit` can go."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel
from tfaccel.fit._curves import one_cycle, warmup_cosine

EPOCHS, BATCH = 3, 24  # 240 samples: 10 steps an epoch


def one_cycle_by_hand(step, last, peak, warmup, initial=0.04, final=1e-4):
    progress = step / last
    if progress < warmup:
        begin, end, position = initial, 1.0, progress / warmup
    else:
        begin, end, position = 1.0, final, (progress - warmup) / (1 - warmup)
    return peak * (end + (begin - end) * (1 + math.cos(math.pi * position)) / 2)


def warmup_cosine_by_hand(step, last, peak, warmup, initial=0.0, final=0.0):
    progress = step / last
    if progress < warmup:
        return peak * (initial + (1 - initial) * progress / warmup)
    position = (progress - warmup) / (1 - warmup)
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * position)) / 2)


class Table(keras.optimizers.schedules.LearningRateSchedule):
    """Learning rates by micro-batch, worked out in Python: independent of what is tested."""

    def __init__(self, rates):
        self.rates = rates

    def __call__(self, step):
        return tf.gather(tf.constant(self.rates, tf.float32), tf.cast(step, tf.int32))

    def get_config(self):
        return {}


@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("curve", "by_hand", "defaults"),
    [(one_cycle, one_cycle_by_hand, (0.04, 1e-4)), (warmup_cosine, warmup_cosine_by_hand, (0, 0))],
)
def test_curve_is_its_closed_form(curve, by_hand, defaults, warmup):
    steps = np.arange(100) if warmup < 1 else np.arange(99)  # by_hand divides by 1 - warmup
    actual = [float(curve(tf.constant(s / 99, tf.float32), warmup, *defaults)) for s in steps]
    expected = [by_hand(s, 99, 1.0, warmup, *defaults) for s in steps]
    # float32 cosine: 24 bits, and one rounding each for progress and position.
    np.testing.assert_allclose(actual, expected, atol=5e-7)


def fit(helpers, small, optimizer, callbacks=(), kind="sequential", data=None, **options):
    model = helpers.compile(helpers.build(kind), optimizer, **options)
    x, y = small
    arguments = {"epochs": EPOCHS, "shuffle": False, "verbose": 0, "callbacks": list(callbacks)}
    if data is None:
        history = model.fit(x, y, batch_size=BATCH, **arguments)
    else:
        history = model.fit(data, **arguments)
    return model, history.history


AXES = [
    # jit, steps_per_execution, accumulation, loss scaling, kind: every pair occurs.
    (False, 1, None, False, "sequential"),
    (False, 4, 2, True, "functional"),
    (False, 4, None, False, "subclassed"),
    (True, 1, 2, False, "subclassed"),
    (True, 4, None, True, "sequential"),
    (True, 4, 2, False, "functional"),
    (False, 1, None, True, "subclassed"),
    (True, 1, None, False, "functional"),
    (False, 1, 2, True, "sequential"),
]


@pytest.mark.parametrize(
    ("jit", "steps", "accumulation", "scaling", "kind", "schedule"),
    [(*cell, ("one_cycle", "warmup_cosine")[number % 2]) for number, cell in enumerate(AXES)],
)
def test_agrees_with_keras_given_the_same_rates(
    helpers, small, jit, steps, accumulation, scaling, kind, schedule
):
    updates = EPOCHS * 10 // (accumulation or 1)
    if schedule == "one_cycle":
        callback = tfaccel.OneCycle(1e-2, momentum_range=None)
        rates = [one_cycle_by_hand(s, updates - 1, 1e-2, 0.3) for s in range(updates)]
    else:
        callback = tfaccel.WarmupCosine(1e-2)
        rates = [warmup_cosine_by_hand(s, updates - 1, 1e-2, 0.1) for s in range(updates)]

    def optimizer(rate):
        adam = keras.optimizers.Adam(rate, gradient_accumulation_steps=accumulation)
        return keras.optimizers.LossScaleOptimizer(adam) if scaling else adam

    options = {"jit_compile": jit, "steps_per_execution": steps}
    # Keras asks a compiled-in schedule for micro-batches.
    table = Table(np.repeat(rates, accumulation or 1))
    expected, _ = fit(helpers, small, optimizer(table), kind=kind, **options)
    actual, history = fit(helpers, small, optimizer(1e-3), [callback], kind=kind, **options)
    # The rates agree to float32 rounding (6e-8 relative); 30 updates of at most 1e-2 each.
    for a, b in zip(actual.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=30 * 1e-2 * 1e-5)
    per_epoch = updates / EPOCHS
    ends = [rates[math.floor(per_epoch * e) - 1] for e in range(1, EPOCHS + 1)]
    np.testing.assert_allclose(history["learning_rate"], ends, rtol=1e-4, atol=1e-8)


def test_strength_zero_is_bit_identical(helpers, small):
    expected, _ = fit(helpers, small, keras.optimizers.Adam(1e-3))
    flat = tfaccel.OneCycle(1e-3, initial_fraction=1, final_fraction=1, momentum_range=None)
    actual, _ = fit(helpers, small, keras.optimizers.Adam(1e-3), [flat])
    for a, b in zip(actual.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


class NumpyAdam:
    """Adam with a rate and a beta_1 of its own for each update, in float64."""

    def __init__(self, rates, betas):
        self.rates, self.betas, self.step, self.m, self.v = rates, betas, 0, 0.0, 0.0

    def update(self, w, gradient):
        rate, beta = self.rates[self.step], self.betas[self.step]
        self.step += 1
        self.m = self.m + (gradient - self.m) * (1 - beta)
        self.v = self.v + (gradient**2 - self.v) * (1 - 0.999)
        alpha = rate * math.sqrt(1 - 0.999**self.step) / (1 - beta**self.step)
        return w - self.m * alpha / (np.sqrt(self.v) + 1e-7)


class NumpySGD:
    """SGD with Nesterov momentum, a rate and a momentum for each update."""

    def __init__(self, rates, momenta):
        self.rates, self.momenta, self.step, self.m = rates, momenta, 0, 0.0

    def update(self, w, gradient):
        rate, momentum = self.rates[self.step], self.momenta[self.step]
        self.step += 1
        self.m = self.m * momentum - gradient * rate
        return w + self.m * momentum - gradient * rate


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(
    ("optimizer", "oracle"),
    [
        (lambda: keras.optimizers.Adam(1e-3, beta_1=0.9), NumpyAdam),
        (lambda: keras.optimizers.SGD(1e-3, momentum=0.9, nesterov=True), NumpySGD),
    ],
)
def test_momentum_is_cycled(small, optimizer, oracle, steps):
    x = small[0].reshape(240, 49)
    y = x @ np.linspace(-1, 1, 49, dtype="float32")[:, None]
    rates = [one_cycle_by_hand(s, 29, 1e-2, 0.3) for s in range(30)]
    momenta = [0.95 - 0.1 * one_cycle_by_hand(s, 29, 1.0, 0.3, 0, 0) for s in range(30)]
    model = keras.Sequential([keras.Input((49,)), keras.layers.Dense(1, use_bias=False)])
    w = model.get_weights()[0].astype("float64")
    trained = optimizer()
    model.compile(trained, "mse", steps_per_execution=steps)
    callback = tfaccel.OneCycle(1e-2)
    model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=[callback])
    by_hand = oracle(rates, momenta)
    for step in range(30):
        rows = slice(step % 10 * BATCH, step % 10 * BATCH + BATCH)
        gradient = 2 * x[rows].T @ (x[rows] @ w - y[rows]) / BATCH
        w = by_hand.update(w, gradient)
    # 30 float32 updates against float64; the weights are of order 0.1 to 1.
    np.testing.assert_allclose(model.get_weights()[0], w, atol=2e-5)
    assert getattr(trained, "beta_1", None) == 0.9 or trained.momentum == 0.9


@pytest.mark.parametrize("name", ["AdamW", "Nadam", "Lion", "Lamb", "RMSprop", "Adamax", "Ftrl"])
def test_other_optimizers_train(helpers, small, name):
    optimizer = getattr(keras.optimizers, name)(1e-3)
    before = optimizer.get_config()
    _, history = fit(helpers, small, optimizer, [tfaccel.OneCycle(5e-3)], steps_per_execution=3)
    assert history["loss"][-1] < history["loss"][0]
    assert optimizer.get_config() == before


def data_of(kind, x, y):
    batches = [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, len(x), BATCH)]
    if kind == "dataset":
        return tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    if kind == "unknown":
        return tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).filter(lambda a, b: True)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return len(batches)

        def __getitem__(self, index):
            return batches[index]

    return Batches()


@pytest.mark.parametrize("kind", ["dataset", "pydataset"])
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
def test_infers_the_length_of_other_data(helpers, small, kind):
    _, expected = fit(helpers, small, keras.optimizers.Adam(1e-3), [tfaccel.OneCycle(1e-2)])
    data = data_of(kind, *small)
    _, history = fit(helpers, small, keras.optimizers.Adam(1e-3), [tfaccel.OneCycle(1e-2)], data=data)
    np.testing.assert_allclose(history["learning_rate"], expected["learning_rate"], rtol=1e-6)


def test_steps_per_epoch_counts(helpers, small):
    model = helpers.compile(helpers.build())
    data = data_of("dataset", *small).repeat()
    callback = tfaccel.WarmupCosine(1e-2)
    history = model.fit(data, steps_per_epoch=5, epochs=2, verbose=0, shuffle=False, callbacks=[callback])
    expected = [warmup_cosine_by_hand(s, 9, 1e-2, 0.1) for s in (4, 9)]
    np.testing.assert_allclose(history.history["learning_rate"], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras, of unknown lengths
def test_unknown_length_is_refused_before_the_first_step(helpers, small):
    model = helpers.compile(helpers.build())
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"no known length.*steps_per_epoch"):
        model.fit(data_of("unknown", *small), verbose=0, shuffle=False, callbacks=[tfaccel.OneCycle(1e-2)])
    assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))
    callback = tfaccel.OneCycle(1e-2, steps_per_epoch=10)
    history = model.fit(data_of("unknown", *small), verbose=0, shuffle=False, callbacks=[callback])
    assert len(history.history["learning_rate"]) == 1


def test_second_fit_begins_a_new_cycle(helpers, small):
    model = helpers.compile(helpers.build(), keras.optimizers.Adam(1e-3))
    x, y = small
    callback = tfaccel.OneCycle(1e-2)
    rates = []
    for _ in range(2):
        history = model.fit(x, y, batch_size=BATCH, epochs=2, verbose=0, callbacks=[callback])
        rates.append(history.history["learning_rate"])
        assert float(model.optimizer.learning_rate) == np.float32(1e-3)
    assert rates[0] == rates[1]


def test_resumed_run_goes_on_where_it_stopped(helpers, small):
    x, y = small
    model = helpers.compile(helpers.build())
    whole = model.fit(x, y, batch_size=BATCH, epochs=4, verbose=0, callbacks=[tfaccel.OneCycle(1e-2)])
    resumed = model.fit(
        x, y, batch_size=BATCH, epochs=4, initial_epoch=2, verbose=0,
        callbacks=[tfaccel.OneCycle(1e-2)],
    )  # fmt: skip
    assert resumed.history["learning_rate"] == whole.history["learning_rate"][2:]


def test_its_own_rate_comes_back_after_a_backup_was_restored(helpers, small, tmp_path):
    x, y = small

    def run(*callbacks):
        model = helpers.compile(helpers.build(), keras.optimizers.Adam(1e-3))
        backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
        arguments = {"batch_size": BATCH, "epochs": 4, "verbose": 0}
        model.fit(x, y, callbacks=[backup, tfaccel.OneCycle(0.1), *callbacks], **arguments)
        return model

    with pytest.raises(RuntimeError, match="crash"):
        run(Stop(RuntimeError("crash"), epoch=2))
    model = run()
    assert int(model.optimizer.iterations) == 40
    assert float(model.optimizer.learning_rate) == np.float32(1e-3)


def test_a_rate_that_the_user_set_after_an_interruption_stays(helpers, small):
    model = helpers.compile(helpers.build())
    with pytest.raises(KeyboardInterrupt):
        model.fit(*small, epochs=2, verbose=0, callbacks=[tfaccel.OneCycle(0.1), Stop(KeyboardInterrupt())])
    model.optimizer.learning_rate = 1e-6
    model.fit(*small, verbose=0)
    assert float(model.optimizer.learning_rate) == np.float32(1e-6)


def test_steps_that_keras_would_round_up_are_refused(helpers, small):
    data = data_of("dataset", *small).repeat()
    model = helpers.compile(helpers.build(), steps_per_execution=4)
    for callback in (tfaccel.OneCycle(1e-2), tfaccel.Throughput()):
        with pytest.raises(ValueError, match=r"steps_per_epoch=6.*train 8 steps"):
            model.fit(data, steps_per_epoch=6, shuffle=False, verbose=0, callbacks=[callback])
    model.fit(data, steps_per_epoch=8, shuffle=False, verbose=0, callbacks=[tfaccel.OneCycle(1e-2)])
    assert int(model.optimizer.iterations) == 8


def test_canary_keras_rounds_steps_up(helpers, small):
    model = helpers.compile(helpers.build(), steps_per_execution=4)
    data = data_of("dataset", *small).repeat()
    model.fit(data, steps_per_epoch=6, shuffle=False, verbose=0)
    assert int(model.optimizer.iterations) == 8


def test_several_optimizers_are_refused(helpers, small):
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("this Keras has none")
    model = helpers.build()
    several = keras.optimizers.MultiOptimizer(
        [keras.optimizers.SGD(0.1), keras.optimizers.Adam(0.1)],
        lambda variable: 0 if "kernel" in variable.path else 1,
    )
    helpers.compile(model, several)
    with pytest.raises(ValueError, match="MultiOptimizer"):
        model.fit(*small, verbose=0, callbacks=[tfaccel.OneCycle(1e-2)])


def test_fit_after_fit_is_plain_again(helpers, small):
    x, y = small
    results = []
    for callbacks in ([], [tfaccel.OneCycle(1e-3, initial_fraction=1, final_fraction=1)]):
        model = helpers.compile(helpers.build(), keras.optimizers.SGD(0.01))
        model.fit(x, y, batch_size=BATCH, verbose=0, callbacks=callbacks)
        model.set_weights(helpers.build().get_weights())
        model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
        results.append(model.get_weights())
        assert "apply" not in vars(model.optimizer)
        assert "make_train_function" not in vars(model)
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


class Stop(keras.callbacks.Callback):
    """Raises in the second epoch, as Ctrl-C would."""

    def __init__(self, error, epoch=1):
        super().__init__()
        self.error, self.epoch = error, epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("disk full")])
def test_fit_after_an_interrupted_fit_is_plain_again(helpers, small, error):
    x, y = small
    results = []
    for callbacks in ([], [tfaccel.OneCycle(0.5)]):
        model = helpers.compile(helpers.build(), keras.optimizers.SGD(0.01, momentum=0.9))
        with pytest.raises(type(error)):
            model.fit(x, y, batch_size=BATCH, epochs=2, verbose=0, callbacks=[*callbacks, Stop(error)])
        start = helpers.build().get_weights()
        model.set_weights(start)
        for variable in model.optimizer.variables[2:]:
            variable.assign(keras.ops.zeros_like(variable))
        history = model.fit(x, y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0)
        assert "learning_rate" not in history.history
        assert float(model.optimizer.learning_rate) == np.float32(0.01)
        results.append(model.get_weights())
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_saves_and_loads_without_tfaccel_in_mid_run(helpers, small, tmp_path):
    import subprocess
    import sys

    path = tmp_path / "checkpoint.keras"
    checkpoint = keras.callbacks.ModelCheckpoint(str(path))
    model, _ = fit(helpers, small, None, [tfaccel.OneCycle(1e-2), checkpoint])
    script = (
        f"import keras, sys; m = keras.models.load_model({str(path)!r}); "
        "assert 'tfaccel' not in sys.modules; print(len(m.optimizer.variables))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(answer.stdout) == len(model.optimizer.variables)


def test_value_is_in_csv_and_tensorboard(helpers, small, tmp_path):
    callbacks = [
        tfaccel.WarmupCosine(1e-2),
        keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
        keras.callbacks.TensorBoard(str(tmp_path / "board")),
    ]
    _, history = fit(helpers, small, None, callbacks)
    header, *rows = (tmp_path / "log.csv").read_text().splitlines()
    column = header.split(",").index("learning_rate")
    assert [float(row.split(",")[column]) for row in rows] == history["learning_rate"]
    (events,) = (tmp_path / "board" / "train").glob("events*")
    tags = [v.tag for e in tf.compat.v1.train.summary_iterator(str(events)) for v in e.summary.value]
    assert tags.count("epoch_learning_rate") == EPOCHS


@pytest.mark.parametrize(
    "other",
    [
        keras.callbacks.ReduceLROnPlateau(),
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate),
        tfaccel.WarmupCosine(1e-3),
    ],
    ids=lambda other: type(other).__name__,
)
@pytest.mark.parametrize("first", [True, False])
def test_conflicts_are_refused_before_the_first_step(helpers, small, other, first):
    cycle = tfaccel.OneCycle(1e-2)
    callbacks = [cycle, other] if first else [other, cycle]
    model = helpers.compile(helpers.build())
    with pytest.raises(ValueError, match="both set the learning rate"):
        model.fit(*small, verbose=0, callbacks=callbacks)
    assert int(model.optimizer.iterations) == 0


def test_compiled_in_schedule_is_refused(helpers, small):
    schedule = keras.optimizers.schedules.CosineDecay(1e-3, 10)
    model = helpers.compile(helpers.build(), keras.optimizers.Adam(schedule))
    with pytest.raises(ValueError, match="schedule of its own"):
        model.fit(*small, verbose=0, callbacks=[tfaccel.OneCycle(1e-2)])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"max_learning_rate": 0}, "max_learning_rate=0"),
        ({"max_learning_rate": 1e-2, "warmup": 30}, "warmup=30"),
        ({"max_learning_rate": 1e-2, "warmup": 0.1, "warmup_epochs": 1}, "not both"),
        ({"max_learning_rate": 1e-2, "warmup_epochs": -1}, "warmup_epochs=-1"),
        ({"max_learning_rate": 1e-2, "final_fraction": 2}, "final_fraction=2"),
        ({"max_learning_rate": 1e-2, "steps_per_epoch": 0}, "steps_per_epoch=0"),
        ({"max_learning_rate": 1e-2, "steps_per_epoch": 2.5}, "steps_per_epoch=2.5"),
        ({"max_learning_rate": "0.1"}, "max_learning_rate='0.1'"),
        ({"max_learning_rate": float("inf")}, "max_learning_rate=inf"),
    ],
)
@pytest.mark.parametrize("callback", [tfaccel.OneCycle, tfaccel.WarmupCosine])
def test_bad_arguments(callback, arguments, text):
    with pytest.raises(ValueError, match=text):
        callback(**arguments)


def test_bad_momentum_range():
    with pytest.raises(ValueError, match="momentum_range"):
        tfaccel.OneCycle(1e-2, momentum_range=(0.95, 0.85))
    with pytest.raises(ValueError, match="momentum_range"):
        tfaccel.OneCycle(1e-2, momentum_range=0.9)


def test_no_extra_trace(helpers, small):
    """One trace for the whole run, as in plain Keras."""
    traces = []

    class Counting(helpers.Subclassed):
        def train_step(self, data):
            traces.append(1)
            return super().train_step(data)

    model = Counting()
    helpers.compile(model)
    model.fit(*small, batch_size=BATCH, epochs=3, verbose=0)
    plain = len(traces)
    model = Counting()
    helpers.compile(model)
    model.fit(*small, batch_size=BATCH, epochs=3, verbose=0, callbacks=[tfaccel.OneCycle(1e-2)])
    assert len(traces) == 2 * plain
