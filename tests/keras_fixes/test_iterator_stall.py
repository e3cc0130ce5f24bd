"""The end of an epoch does not wait for the thread that tunes a pipeline."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel
from tfaccel.keras_fixes.iterator_stall import prompt


def pipeline():
    return tf.data.Dataset.range(20).shuffle(20, seed=1).map(lambda i: i * 2, num_parallel_calls=2).batch(8)


def test_prompt_is_the_same_data_and_not_tuned():
    data, same = pipeline(), prompt(pipeline(), cores=2)
    assert same.options().autotune.enabled is False
    assert same.element_spec == data.element_spec
    assert same.cardinality() == 3
    for _ in range(2):  # each pass has an order of its own
        for expected, got in zip(data, same, strict=True):
            np.testing.assert_array_equal(expected, got)


def test_what_stays_as_it_is():
    """Options of the user, hosts where tuning has more to choose, and what is no data set."""
    options = tf.data.Options()
    options.autotune.enabled = True
    asked_for = pipeline().with_options(options)
    assert prompt(asked_for, cores=2) is asked_for
    data = pipeline()
    assert prompt(data, cores=17) is data
    assert prompt([1, 2], cores=2) == [1, 2]


def test_fit_and_evaluate_read_untuned_pipelines(monkeypatch):
    monkeypatch.setattr("tfaccel.keras_fixes.iterator_stall._cores", lambda: 2)
    tuned, begin = [], tf.data.Dataset.__iter__

    def note(dataset):
        tuned.append(dataset.options().autotune.enabled)
        return begin(dataset)

    monkeypatch.setattr(tf.data.Dataset, "__iter__", note)
    accelerator = tfaccel.Accelerator("one_device", "float32", kernels="fused")
    with accelerator.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse", **accelerator.compile_options())
    data = tf.data.Dataset.from_tensor_slices((np.ones((24, 4)), np.ones((24, 1)))).batch(8).map(tuple_of)
    model.fit(data, epochs=2, validation_data=data, shuffle=False, verbose=0)
    model.evaluate(data, verbose=0)
    assert len(tuned) >= 5
    assert set(tuned) == {False}


def tuple_of(x, y):
    return x, y


LOST = """
import os, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import tensorflow as tf
from tfaccel.keras_fixes.iterator_stall import prompt

weights = tf.random.normal([400, 400])

@tf.function
def train(iterator, steps):
    x = weights
    for _ in tf.range(steps):
        x = tf.tanh(x @ weights) + iterator.get_next()[0, 0]
    return x

def images(i):
    return tf.cast(i, tf.float32)[:, None] * tf.ones([1, 1000])

def lost(data):
    waits = 0
    for _ in range(20):
        begun = time.perf_counter()
        iterator = iter(data)
        train(iterator, tf.constant(250))
        lived = time.perf_counter() - begun
        del iterator
        waits += time.perf_counter() - begun > 1.4 * lived
    return waits

data = tf.data.Dataset.range(4000).batch(8).map(images, num_parallel_calls=2).prefetch(4)
train(iter(data), tf.constant(1))
print(lost(data), lost(prompt(data)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a process can't be held on one core here")
def test_canary_a_tuned_pipeline_waits_at_its_end(tmp_path):
    """On one core a third of the iterators lived twice as long as they were read."""
    script = tmp_path / "lost.py"  # AutoGraph reads it
    script.write_text(LOST)
    answer = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert answer.stdout, answer.stderr[-2000:]
    tuned, untuned = map(int, answer.stdout.split())
    assert tuned > untuned, answer.stderr[-2000:]
