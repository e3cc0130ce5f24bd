"""The clock in the input counts what the step saw and how long it waited, and nothing else."""

import gc
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel
from tfaccel.keras_fixes.input_clock import InputClock, watch_running_fit


def test_clock_counts_examples_batches_and_waiting():
    clock = InputClock(skip=1)
    data = tf.data.Dataset.from_tensor_slices({"a": np.zeros((10, 3)), "b": np.zeros(10)}).batch(4)
    watched = clock.watch(data)
    assert watched.element_spec == data.element_spec
    assert watched.cardinality() == 3
    for _ in range(2):
        assert len(list(watched)) == 3
        reading = clock.read()
        assert (reading.examples, reading.batches) == (10, 3)
        assert reading.waited_s > 0
        clock.reset()
    assert clock.read().examples == 0
    endless = InputClock(skip=1).watch(data.repeat())
    assert endless.cardinality() == tf.data.INFINITE_CARDINALITY


def test_clock_counts_ragged_rows():
    clock = InputClock(skip=1)
    ragged = tf.ragged.constant([[1, 2], [3], [4, 5, 6]])
    list(clock.watch(tf.data.Dataset.from_tensor_slices(ragged).batch(2)))
    assert clock.read().examples == 3


def batched(small, batch_size, **options):
    return tf.data.Dataset.from_tensor_slices(small).batch(batch_size, **options)


class Batches(keras.utils.PyDataset):
    """The data in batches from Python."""

    def __init__(self, small, batch_size):
        super().__init__()
        self.small, self.batch_size = small, batch_size

    def __len__(self):
        return -(-len(self.small[0]) // self.batch_size)

    def __getitem__(self, index):
        return [leaf[index * self.batch_size :][: self.batch_size] for leaf in self.small]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda small, batch_size: small, {"batch_size": 100}),
        (lambda small, batch_size: small, {"batch_size": 100, "steps_per_epoch": 3}),
        (lambda small, batch_size: small, {"batch_size": 100, "steps_per_epoch": 2, "epochs": 1}),
        (lambda small, batch_size: small, {"batch_size": 60}),
        (lambda small, batch_size: (batched(small, batch_size),), {}),
        (lambda small, batch_size: (batched(small, batch_size).repeat(),), {"steps_per_epoch": 5}),
        (lambda small, batch_size: (batched(small, batch_size, drop_remainder=True),), {}),
        (lambda small, batch_size: (Batches(small, batch_size),), {}),
    ],
    ids=["partial", "passes", "cut", "whole", "tf.data", "repeated", "fixed size", "python"],
)
def test_clock_counts_what_the_step_saw(helpers, small, make, options):
    class Rows(keras.metrics.Metric):
        """How many rows came."""

        def __init__(self):
            super().__init__(name="rows")
            self.seen = self.add_weight(initializer="zeros")

        def update_state(self, y, prediction, sample_weight=None):
            self.seen.assign_add(keras.ops.cast(keras.ops.shape(y)[0], "float32"))

        def result(self):
            return self.seen.value

    model = helpers.build()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=[Rows()])
    profile = tfaccel.Profile(verbose=0)
    options = {"epochs": 3, "verbose": 0, "shuffle": False, "callbacks": [profile], **options}
    data = make(small, options.get("batch_size", 100))
    history = model.fit(*data, **options).history
    assert [row.examples for row in profile.report.rows] == history["rows"]


def slow(batches, seconds):
    """A synchronous stage that takes its time."""

    def wait(number):
        time.sleep(seconds)
        return number

    def function(number):
        return tf.ensure_shape(tf.numpy_function(wait, (number,), tf.int64), ())

    return tf.data.Dataset.range(batches).map(function)


def waited_by_a_slow_loop(dataset):
    """Seconds that a loop waits which takes twice as long itself."""
    waited = 0.0
    batches = iter(dataset)
    for _ in range(8):
        begun = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - begun
        time.sleep(0.2)
    return waited


@pytest.mark.parametrize("make", [lambda d: d, lambda d: d.prefetch(1), lambda d: d.with_options(alone())])
def test_what_is_made_beforehand_is_not_waited_for(make):
    clock = InputClock(skip=1)
    waited = waited_by_a_slow_loop(clock.watch(make(slow(8, seconds=0.1))))
    assert clock.read().waited_s == pytest.approx(waited, abs=0.2)


def alone():
    """No prefetch that nobody asked for."""
    options = tf.data.Options()
    options.experimental_optimization.inject_prefetch = False
    return options


def test_canary_a_clock_behind_a_pipeline_runs_in_the_background():
    """Fails on the day tf.data puts no prefetch of its own behind the last stage."""
    asked = []

    def note(number):
        return tf.numpy_function(lambda n: asked.append(time.perf_counter()) or n, (number,), tf.int64)

    batches = iter(tf.data.Dataset.range(3).map(note))
    next(batches)
    time.sleep(0.5)
    begun = time.perf_counter()
    next(batches)
    assert asked[1] < begun


def test_statistics_keep_the_options_and_say_nothing(capfd):
    options = tf.data.Options()
    options.threading.private_threadpool_size = 3
    clock = InputClock(skip=1)
    watched = clock.watch(tf.data.Dataset.range(4).batch(2).with_options(options))
    assert watched.options().threading.private_threadpool_size == 3
    assert len(list(watched)) == 2
    assert "UNIMPLEMENTED" not in capfd.readouterr().err


def test_statistics_go_with_the_clock():
    clock = InputClock(skip=1)
    handle = clock._statistics._handle
    tf.raw_ops.StatsAggregatorSummary(iterator=handle)
    clock.itself = clock
    del clock

    @tf.function
    def traced():
        gc.collect()  # as it may come at any moment
        return tf.constant(1)

    graph = traced.get_concrete_function().graph
    assert "DestroyResourceOp" not in {op.type for op in graph.get_operations()}
    with pytest.raises(tf.errors.NotFoundError):
        tf.raw_ops.StatsAggregatorSummary(iterator=handle)


def test_no_fit_to_watch():
    assert watch_running_fit(keras.callbacks.Callback()) is None


def test_canary_fit_shows_a_callback_nothing_of_its_input(helpers, small):
    """Fails on the day Keras hands its iterator, or a measured waiting time, to callbacks."""
    seen = {}

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.update(params=set(self.params), logs=set(logs), own=set(vars(self)))

    model = helpers.compile(helpers.build())
    model.fit(*small, verbose=0, callbacks=[Look()])
    assert seen["params"] == {"verbose", "epochs", "steps"}
    assert seen["logs"] == {"loss", "accuracy"}
    assert seen["own"] <= {"validation_data", "_model", "params", "_params"}
    assert not [name for name in vars(model) if "iterator" in name and not name.startswith("_")]
