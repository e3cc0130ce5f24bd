"""What concerns single processes of the fixes for several workers; `tests/test_launch.py` has the rest."""

import json
import os
import random
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel
from tfaccel.cluster import tf_config
from tfaccel.keras_fixes.late_strategy import check_nothing_ran
from tfaccel.keras_fixes.worker_seeds import random_state, take_random_state


def draw():
    return random.random(), np.random.rand(), float(tf.random.uniform(()))


def test_workers_draw_the_same_numbers_once_they_took_the_chiefs_state():
    state = json.loads(json.dumps(random_state()))
    expected = draw()
    random.seed(5)
    np.random.seed(5)
    tf.random.set_seed(None)
    take_random_state(state)
    assert draw()[:2] == expected[:2]
    tf.random.set_seed(None)
    take_random_state(state)
    first = float(tf.random.uniform(()))
    tf.random.set_seed(None)
    take_random_state(state)
    assert float(tf.random.uniform(())) == first


def test_a_seed_of_the_users_stays():
    keras.utils.set_random_seed(3)
    expected = draw()
    keras.utils.set_random_seed(3)
    take_random_state(random_state())
    assert draw() == expected


def test_too_late_for_several_workers():
    tf.constant(1)
    with pytest.raises(ValueError, match=r"Allowed: nothing of TensorFlow before the Accelerator"):
        check_nothing_ran()


def epochs_of_a_second_fit(model, folder):
    x, y = np.ones((8, 4)), np.ones((8, 1))
    options = {"verbose": 0, "shuffle": False}

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise InterruptedError

    backup = keras.callbacks.BackupAndRestore(folder / "backup", delete_checkpoint=False)
    with pytest.raises(InterruptedError):
        model.fit(x, y, epochs=4, callbacks=[backup, Interrupt()], **options)
    resumed = model.fit(x, y, epochs=4, callbacks=[backup], **options)
    assert resumed.epoch == [2, 3]
    return model.fit(x, y, epochs=3, **options).epoch


def small_model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])


def test_a_restored_epoch_is_forgotten_in_the_next_fit(tmp_path):
    accelerator = tfaccel.Accelerator("one_device", "float32")
    with accelerator.scope():
        model = small_model()
        model.compile("sgd", "mse", **accelerator.compile_options())
    assert epochs_of_a_second_fit(model, tmp_path) == [0, 1, 2]


def test_canary_upstream_begins_every_fit_at_the_restored_epoch(tmp_path):
    model = small_model()
    model.compile("sgd", "mse")
    assert epochs_of_a_second_fit(model, tmp_path) == [2]


def test_canary_upstream_refuses_a_late_strategy_in_words_of_its_own():
    script = (
        "import tensorflow as tf\ntf.constant(1)\n"
        "try: tf.distribute.MultiWorkerMirroredStrategy()\nexcept RuntimeError as error: print(error)"
    )
    environment = {**os.environ, "TF_CONFIG": tf_config(["127.0.0.1:1", "127.0.0.1:2"], 0)}
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment
    )
    assert "Collective ops must be configured at program startup" in answer.stdout
