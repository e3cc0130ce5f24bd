"""Speed and input wait: known waiting is found, nothing else changes."""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel
from tfaccel.fit.throughput import peak_memory_bytes, rates

KEYS = {"examples_per_s", "step_ms", "input_wait", "eta_s", "peak_memory_bytes"}


def test_rates_are_their_definition():
    figures = rates(examples=320, batches=10, seconds=2.0, waited_s=0.5)
    assert figures == {"examples_per_s": 160.0, "step_ms": 200.0, "input_wait": 0.25}
    skipped = rates(examples=320, batches=10, seconds=1.0, waited_s=0.5, skipped=5)
    assert skipped == {"examples_per_s": 160.0, "step_ms": 200.0, "input_wait": 0.25}
    assert rates(examples=32, batches=1, seconds=1.0, waited_s=0.0, skipped=1) == {}


def slow_dataset(x, y, seconds):
    def wait(a, b):
        time.sleep(seconds)
        return a, b

    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(24)
    specs = batches.element_spec
    slow = batches.map(lambda a, b: tf.numpy_function(wait, (a, b), (a.dtype, b.dtype)))
    return slow.map(
        lambda a, b: (tf.ensure_shape(a, specs[0].shape), tf.ensure_shape(b, specs[1].shape))
    ).apply(tf.data.experimental.assert_cardinality(10))


@pytest.mark.parametrize("steps", [1, 3])
def test_waiting_for_input_is_found(helpers, small, steps):
    model = helpers.compile(helpers.build(), steps_per_execution=steps)
    slow = slow_dataset(*small, seconds=0.1)
    history = model.fit(slow, epochs=2, shuffle=False, verbose=0, callbacks=[tfaccel.Throughput()])
    # 100 ms of waiting a step against a step of about 2 ms. Prefetching hides what the step takes, so
    # a busy machine gets a smaller share; a third leaves room for a step of 200 ms.
    assert history.history["input_wait"][-1] > 0.33
    assert history.history["step_ms"][-1] >= 90


def test_fast_input_is_not_called_slow(helpers, small):
    # A step that takes far longer than cutting a batch of 24 images.
    model = keras.Sequential(
        [keras.Input((7, 7, 1)), *[keras.layers.Conv2D(64, 3, padding="same") for _ in range(6)]]
    )
    model.add(keras.layers.GlobalAveragePooling2D())
    helpers.compile(model)
    callback = tfaccel.Throughput()
    history = model.fit(*small, batch_size=24, epochs=3, verbose=0, callbacks=[callback])
    assert min(history.history["input_wait"]) < 0.5


@pytest.mark.parametrize("source", ["arrays", "dataset", "accelerator"])
def test_writes_every_key_and_counts_examples(helpers, small, source):
    x, y = small
    data = {
        "arrays": (x, y),
        "dataset": (tf.data.Dataset.from_tensor_slices((x, y)).batch(32),),
        "accelerator": (tfaccel.Accelerator().dataset(x, y),),
    }[source]
    model = helpers.compile(helpers.build())
    callback = tfaccel.Throughput()
    shuffle = source == "arrays"
    history = model.fit(*data, epochs=2, shuffle=shuffle, verbose=0, callbacks=[callback])
    assert set(history.history) >= KEYS
    assert history.history["eta_s"][-1] == 0
    last = {key: history.history[key][-1] for key in KEYS}
    # 240 samples in 8 steps of 32, the last one half full.
    np.testing.assert_allclose(last["examples_per_s"] * last["step_ms"] / 1e3, 240 / 8, rtol=1e-6)


def test_weights_are_bit_identical(helpers, small):
    results = []
    for callbacks in ([], [tfaccel.Throughput()]):
        model = helpers.compile(helpers.build(), steps_per_execution=3)
        keras.utils.set_random_seed(3)
        model.fit(*small, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
        results.append(model.get_weights())
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_first_execution_and_validation_are_left_out(helpers, small):
    class SlowFirstStep(helpers.Subclassed):
        traced = False

        def train_step(self, data):
            if not self.traced:
                time.sleep(1.0)
                self.traced = True
            return super().train_step(data)

        def test_step(self, data):
            time.sleep(1.0)
            return super().test_step(data)

    model = SlowFirstStep()
    helpers.compile(model)
    begun = time.monotonic()
    history = model.fit(
        *small, batch_size=8, validation_data=small, verbose=0, callbacks=[tfaccel.Throughput()]
    )
    # However slow the machine: the 29 steps fit into what is left of the whole without both waits.
    assert 29 * history.history["step_ms"][0] / 1e3 < time.monotonic() - begun - 2.0


def test_distributed_input_leaves_the_wait_out(helpers, small):
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    with strategy.scope():
        model = helpers.compile(helpers.build())
    history = model.fit(*small, batch_size=24, verbose=0, callbacks=[tfaccel.Throughput()])
    assert "input_wait" not in history.history
    assert history.history["step_ms"][0] > 0


@pytest.mark.parametrize("callback", [tfaccel.Throughput, lambda: tfaccel.Profile(verbose=0)])
def test_a_first_epoch_of_one_call_has_no_rates_but_a_place(helpers, small, callback, tmp_path):
    accelerator = tfaccel.Accelerator(kernels="fused", jit=False)
    with accelerator.scope():
        model = helpers.compile(helpers.build(), **accelerator.compile_options())
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    data = accelerator.dataset(*small, batch_size=24)
    history = model.fit(data, epochs=3, verbose=0, callbacks=[callback(), log]).history
    assert {len(values) for values in history.values()} == {3}
    assert np.isnan(history["step_ms"][0])
    assert history["step_ms"][2] > 0
    assert "step_ms" in (tmp_path / "log.csv").read_text().splitlines()[0]


def test_verbose_prints_a_line(helpers, small, capsys):
    model = helpers.compile(helpers.build())
    model.fit(*small, verbose=0, callbacks=[tfaccel.Throughput(verbose=1)])
    assert "examples/s" in capsys.readouterr().out


def test_bad_verbose():
    with pytest.raises(ValueError, match="verbose=2"):
        tfaccel.Throughput(verbose=2)


def test_memory_is_that_of_the_process():
    before = peak_memory_bytes()
    block = np.ones(100 * 2**20, np.uint8)
    assert peak_memory_bytes() >= before > 10 * 2**20
    del block
