"""Known shares of time are found, what is not finite is named, and nothing else changes."""

import contextlib
import dataclasses
import itertools
import pathlib
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from distribution_cells import mirrored

import tfaccel
from tfaccel.fit.profile_report import PARTS, ProfileReport, ProfileRow


def fitted(model, data, callbacks=(), **options):
    profile = tfaccel.Profile(verbose=0)
    history = model.fit(*data, verbose=0, callbacks=[*callbacks, profile], **options)
    return profile, history


def slow_map(x, y, seconds, batch=24, only=None):
    numbers = itertools.count()

    def wait(a):
        if only in (None, next(numbers)):
            time.sleep(seconds)
        return a

    def slow(a, b):
        waited = tf.numpy_function(wait, (a,), a.dtype)
        return tf.ensure_shape(waited, a.shape), b

    return tf.data.Dataset.from_tensor_slices((x, y)).batch(batch, drop_remainder=True).map(slow)


class Lazy(keras.callbacks.Callback):
    """Sleeps where it is told to."""

    def __init__(self, hook, seconds):
        super().__init__()
        setattr(self, hook, lambda *_, **__: time.sleep(seconds))


@pytest.fixture(params=["plain", "fused"])
def make(request, helpers):
    """Compiles outside of a scope, and in one."""
    if request.param == "plain":
        return lambda **options: helpers.compile(helpers.build(), **options)

    def in_scope(**options):
        accelerator = tfaccel.Accelerator("one_device", "float32", jit=False)
        with accelerator.scope():
            return helpers.compile(helpers.build(), **{**accelerator.compile_options(), **options})

    return in_scope


def test_weights_are_those_without_it(make, small):
    weights = []
    for callbacks in ([], [tfaccel.Profile(verbose=0)]):
        model = make()
        model.fit(*small, epochs=3, batch_size=24, verbose=0, callbacks=callbacks)
        model.fit(*small, epochs=1, batch_size=24, verbose=0)  # and behind it
        weights.append(model.get_weights())
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_waiting_for_input_is_found(make, small):
    profile, history = fitted(make(), (slow_map(*small, seconds=0.05),), epochs=3, shuffle=False)
    # 30 batches of 50 ms each; prefetching hides what the steps take.
    assert sum(row.input for row in profile.report.rows) > 0.4
    keys = {"compute", "callbacks", "host", "compile", "mfu", "input_wait", "examples_per_s"}
    assert set(history.history) >= keys


@pytest.mark.parametrize("late", [0, 25], ids=["the traced one", "a later one"])
def test_one_late_batch_is_input_and_nothing_else(make, small, late):
    data = slow_map(*small, seconds=1.0, only=late).prefetch(1)
    profile, _ = fitted(make(steps_per_execution=1), (data,), epochs=4, shuffle=False)
    row = profile.report.rows[late // 10]
    assert row.input > 0.8
    assert row.compute > 0
    if late:  # nothing is compiled there
        assert row.compile < row.input


@pytest.mark.parametrize("hook", ["on_epoch_end", "on_train_batch_end"])
def test_a_slow_callback_is_named(make, small, hook):
    lazy = Lazy(hook, 0.4 if hook == "on_epoch_end" else 0.04)
    profile, _ = fitted(make(steps_per_execution=1), small, [lazy], epochs=4, batch_size=24)
    assert profile.report.callbacks["Lazy"] > 1.2
    assert max(profile.report.callbacks, key=profile.report.callbacks.get) == "Lazy"
    assert sum(row.callbacks for row in profile.report.rows) > 1.2
    assert set(vars(lazy)) & {"on_epoch_begin", "on_train_batch_begin"} == set()  # the clocks are off again


def test_parts_add_up_to_the_epochs(make, small):
    begun = time.perf_counter()
    profile, _ = fitted(make(), small, epochs=3, validation_data=small)
    took = time.perf_counter() - begun
    report = profile.report
    assert len(report.rows) == 3
    assert all(getattr(row, part) >= 0 for row in report.rows for part in PARTS)
    assert sum(report.share(part) for part in PARTS) == pytest.approx(1)
    assert 0 < report.seconds <= took
    assert report.share("validation") > 0
    assert sum(row.steps for row in report.rows) == 3 * 8
    assert sum(row.examples for row in report.rows) == 3 * 240


def test_every_trace_is_told_with_its_cause(helpers, small):
    x, y = small
    model = helpers.compile(helpers.build())
    profile, _ = fitted(model, (x, y), epochs=2)
    traces = profile.report.traces
    assert traces[0] == "the first step"
    assert "traced" in str(profile.report)
    other, _ = fitted(model, (x, y), epochs=2)
    assert other.report.traces[0] == "the first step"  # a fit of its own


def test_another_form_of_batch_is_the_cause_of_a_trace(helpers):
    model = keras.Sequential(
        [keras.Input((None, 3)), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    profile = tfaccel.Profile(verbose=0)

    class Probe(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                data = tf.data.Dataset.from_tensors((tf.zeros([2, 9, 3], tf.float64), tf.zeros([2, 1])))
                self.model.train_function(iter(data))

    model.fit(np.zeros((8, 4, 3)), np.zeros((8, 1)), epochs=2, verbose=0, callbacks=[Probe(), profile])
    assert any(cause.startswith("batches of float64") for cause in profile.report.traces)


def test_operations_are_counted(make, small):
    profile, history = fitted(make(), small, epochs=3, batch_size=24)
    rows = 24
    convolution, dense = 25 * 4 * 9, 100 * 10
    assert profile.report.flops == 2 * rows * (2 * convolution + 3 * dense)
    assert 0 < profile.report.utilization < 1
    assert profile.report.bandwidth > 0
    used = history.history["mfu"]  # of a first epoch of one call it is not known
    assert all(0 <= each < 1.5 or (index == 0 and np.isnan(each)) for index, each in enumerate(used))


def test_logs_reach_tensorboard_and_csv(make, small, tmp_path):
    profile = tfaccel.Profile(verbose=0)
    board, table = (
        keras.callbacks.TensorBoard(tmp_path / "board"),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
    )
    make().fit(*small, epochs=2, verbose=0, callbacks=[profile, board, table])
    assert "host" in (tmp_path / "log.csv").read_text().splitlines()[0].split(",")
    tags = set()
    for file in (tmp_path / "board").rglob("*tfevents*"):
        for record in tf.data.TFRecordDataset(str(file)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            tags |= {value.tag for value in event.summary.value}
    assert {"epoch_mfu", "epoch_host", "epoch_input_wait"} <= tags


def test_evaluate_takes_it_too(helpers, small):
    model = helpers.compile(helpers.build())
    assert model.evaluate(*small, verbose=0, callbacks=[tfaccel.Profile(verbose=0)])


def test_the_page_has_plot_and_advice(make, small, tmp_path):
    path = tmp_path / "new" / "report.html"
    profile = tfaccel.Profile(path, verbose=0)
    make().fit(*small, epochs=2, verbose=0, callbacks=[profile])
    text = path.read_text()
    assert "data:image/png;base64," in text
    assert "of the time" in text
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]


def test_it_prints_the_report(make, small, capsys):
    make().fit(*small, epochs=2, verbose=0, callbacks=[tfaccel.Profile()])
    shown = capsys.readouterr().out
    assert "in 2 epochs" in shown
    assert "a step:" in shown


class Bad(keras.layers.Layer):
    """Divides by zero where a value is far too large."""

    def call(self, x):
        return x / keras.ops.cast(keras.ops.max(keras.ops.abs(x)) < 50, x.dtype)


def spoiled(small, row=100):
    x, y = small
    x = x.copy()
    x[row] = 1e3
    return x, y


def network(*layers):
    return keras.Sequential([keras.Input((7, 7, 1)), *layers, keras.layers.Flatten(), keras.layers.Dense(10)])


@pytest.mark.parametrize("where", ["plain", "plain_xla", "eager", "fused", "xla"])
def test_the_layer_and_the_update_are_named(helpers, small, where):
    keras.utils.set_random_seed(1)
    accelerator = tfaccel.Accelerator("one_device", "float32", jit=where == "xla")
    options = {"plain_xla": {"jit_compile": True}, "eager": {"run_eagerly": True}}.get(where, {})
    scope = contextlib.nullcontext()
    if where in ("fused", "xla"):
        scope, options = accelerator.scope(), accelerator.compile_options()
    with scope:
        model = network(keras.layers.Conv2D(2, 3), Bad(name="divides"), keras.layers.Conv2D(2, 3))
        helpers.compile(model, **options)
    with pytest.raises(FloatingPointError, match="'divides' is the first that is not finite") as error:
        model.fit(
            *spoiled(small), batch_size=24, shuffle=False, verbose=0, callbacks=[tfaccel.Profile(verbose=0)]
        )
    assert "update 5:" in str(error.value)  # the batch of row 100


def test_spoiled_weights_are_told_from_spoiled_outputs(helpers, small):
    model = helpers.compile(helpers.build(), keras.optimizers.SGD(1e30))
    with pytest.raises(FloatingPointError, match="not finite"):
        fitted(model, small, batch_size=24, epochs=3)
    model = helpers.compile(helpers.build())
    kernel = model.layers[-1].kernel
    kernel.assign(np.full(kernel.shape, np.nan))
    with pytest.raises(FloatingPointError, match=r"weights of layer '.*dense.*' were not finite before"):
        fitted(model, small, batch_size=24)


def test_a_bad_loss_is_told_from_bad_layers(helpers, small):
    x, y = small
    model = helpers.build()
    model.compile("sgd", lambda y_true, y_pred: keras.ops.log(-1 - keras.ops.square(y_pred)))
    with pytest.raises(FloatingPointError, match="the loss function, or the labels"):
        fitted(model, (x, y))


class Apart(keras.Model):
    """Layers made in another order than they are called in; one of them inside of a model."""

    def __init__(self, custom=False):
        super().__init__()
        self.head = keras.layers.Dense(10, name="head")
        around = [keras.layers.Conv2D(2, 3) for _ in range(2)]
        self.body = keras.Sequential([around[0], Bad(name="divides"), around[1]])
        self.flatten, self.custom = keras.layers.Flatten(), custom

    def call(self, inputs):
        return self.head(self.flatten(self.body(inputs)))

    def train_step(self, data):
        if not self.custom:
            return super().train_step(data)
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"loss": loss}


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("built", [False, True])
def test_the_first_layer_is_the_first_that_is_called(helpers, small, custom, built):
    model = Apart(custom)
    if built:
        model(small[0][:1])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = small[0].copy()
    x[100] = 1e6
    with pytest.raises(FloatingPointError, match=r"output of layer '.*divides' is the first"):
        fitted(model, (x, small[1]), batch_size=24, shuffle=False)


def test_validation_is_not_watched(helpers, small):
    layers = [keras.layers.Conv2D(2, 3), keras.layers.BatchNormalization()]
    model = helpers.compile(network(*layers))
    x = small[0].copy()
    x[3] = np.nan
    profile, history = fitted(model, small, validation_data=(x, small[1]), epochs=2)
    assert np.isnan(history.history["val_loss"]).all()
    assert profile.report.rows
    before = model.get_weights()
    model.evaluate(x, small[1], verbose=0)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_callbacks_behind_it_may_make_the_train_function_anew(helpers, small):
    model = helpers.compile(helpers.build())
    behind = [tfaccel.OneCycle(1e-3), tfaccel.UnfreezeLayers({keras.layers.Conv2D: 1}, unit="epochs")]
    profile = tfaccel.Profile(verbose=0)
    history = model.fit(*small, epochs=3, batch_size=24, verbose=0, callbacks=[profile, *behind]).history
    assert [row.steps for row in profile.report.rows] == [10] * 3
    assert profile.report.traces[-1] == "a callback changed what the step does"
    assert min(history["compute"]) > 0


def test_the_model_trains_on_behind_an_error(helpers, small):
    model = helpers.compile(network(keras.layers.Conv2D(2, 3)), keras.optimizers.SGD(0.01))
    before = model.get_weights()
    x, y = spoiled(small)
    x[100] = np.nan
    with pytest.raises(FloatingPointError):
        fitted(model, (x, y), batch_size=24)
    model.set_weights(before)
    history = model.fit(*small, epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert "train_step" not in vars(model)
    assert "compute_loss" not in vars(model)


def test_watch_can_be_left_out(helpers, small):
    x, y = spoiled(small)
    x[100] = np.nan
    profile = tfaccel.Profile(watch=False, verbose=0)
    model = helpers.compile(network(keras.layers.Conv2D(2, 3)))
    history = model.fit(x, y, verbose=0, callbacks=[profile])
    assert np.isnan(history.history["loss"]).all()


def test_a_loss_scale_that_decayed_ends_the_run(helpers, small):
    x, y = small
    model = network(keras.layers.Conv2D(2, 3))
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0)
    helpers.compile(model, optimizer)
    fine, _ = fitted(model, (x, y), batch_size=24)
    assert fine.report.rows
    x = x.copy()
    x[::10] = np.nan  # in every batch
    with pytest.raises(FloatingPointError, match="loss scale has decayed") as error:
        fitted(model, (x, y), batch_size=24, epochs=4, shuffle=False)
    assert "conv2d" in str(error.value)


def test_loss_scaling_may_get_over_one_bad_batch(helpers, small):
    x, y = spoiled(small)
    x[100] = np.nan
    model = network(keras.layers.Conv2D(2, 3))
    helpers.compile(model, keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)))
    profile, _ = fitted(model, (x, y), batch_size=24)
    assert np.isfinite(model.get_weights()[0]).all()
    assert profile.report.rows


@pytest.mark.parametrize("kind", ["functional", "subclassed"])
def test_other_kinds_of_models(helpers, small, kind):
    model = helpers.compile(helpers.build(kind))
    profile, _ = fitted(model, small, epochs=2)
    assert profile.report.flops > 0
    kernel = model.layers[-1].kernel
    kernel.assign(np.full(kernel.shape, np.inf))
    with pytest.raises(FloatingPointError, match=r"weights of layer '.*(dense|head).*' were not finite"):
        fitted(model, small, epochs=2)


def test_recurrent_layers_are_watched_from_outside(helpers):
    model = keras.Sequential(
        [keras.Input((5, 3)), keras.layers.LSTM(4, name="memory"), keras.layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    x = np.zeros((64, 5, 3), "float32")
    x[40, 2] = np.nan
    with pytest.raises(FloatingPointError, match="memory"):
        fitted(model, (x, np.zeros((64, 1))))


@pytest.mark.parametrize("row", [24 * 2 + 3, 24 * 2 + 20])  # of the third batch: in each replica's share
def test_under_a_strategy(helpers, small, row):
    with mirrored(2).scope():
        model = helpers.compile(network(keras.layers.Conv2D(2, 3)))
    profile, _ = fitted(model, small, epochs=2, batch_size=24)
    assert profile.report.share("compute") > 0
    assert profile.report.utilization is None
    assert profile.report.traces == ("the first step",)
    x = small[0].copy()
    x[row] = np.nan
    with pytest.raises(FloatingPointError, match=r"update 23: the output of layer '.*conv2d.*' is the first"):
        fitted(model, (x, small[1]), batch_size=24, shuffle=False)


def test_gradient_accumulation_and_steps_per_execution(helpers, small):
    optimizer = keras.optimizers.Adam(1e-3, gradient_accumulation_steps=2)
    model = helpers.compile(helpers.build(), optimizer, steps_per_execution=5)
    profile, _ = fitted(model, small, epochs=2, batch_size=24)
    assert sum(row.steps for row in profile.report.rows) == 20


def report(**shares):
    row = ProfileRow(**{**dict.fromkeys(PARTS, 0.0), **shares}, examples=320, steps=10)
    return ProfileReport((row,), ("the first step",), callbacks={"Slow": 1.0, "Fast": 0.1})


def test_advice_follows_the_largest_part():
    assert "Python between the steps" in report(compute=1, host=3).advice
    assert "tracing and compiling" in report(compute=1, compile=3).advice
    assert "Slow" in report(compute=1, callbacks=3).advice
    assert report(compute=1, input=1.5).advice.startswith("60 % of the time")
    assert report(compute=9, host=1).advice == "90 % of the time computes: nothing stands out."


def test_advice_on_computing_knows_the_roof():
    base = dataclasses.replace(report(compute=10.0), peak_flops_per_s=1e9, peak_bytes_per_s=1e9)
    small_operations = dataclasses.replace(base, flops=1e7, bytes_moved=1e7)
    assert small_operations.utilization == pytest.approx(0.01)
    assert "its operations are small" in small_operations.advice
    assert "it waits for memory" in dataclasses.replace(small_operations, bytes_moved=8e8).advice
    assert "nothing stands out" in dataclasses.replace(base, flops=6e8).advice


def test_bad_arguments_are_refused(monkeypatch):
    for given, words in [({"path": 3}, "path=3"), ({"watch": 1}, "watch=1"), ({"verbose": 2}, "verbose=2")]:
        with pytest.raises(ValueError, match=words):
            tfaccel.Profile(**given)
    with pytest.raises(ValueError, match="No fit has ended"):
        _ = tfaccel.Profile().report
    assert eval(repr(tfaccel.Profile(pathlib.Path("a.html"), watch=False)), vars(tfaccel)).watch is False
