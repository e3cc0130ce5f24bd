"""`keras.distribution` is refused, since TensorFlow's backend ignores it."""

import keras
import numpy as np
import pytest

import tfaccel


@pytest.fixture
def data_parallel():
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=["cpu:0", "cpu:1"]))
    yield
    keras.distribution.set_distribution(None)


def small_model():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    return model


def test_an_accelerator_is_refused(data_parallel):
    with pytest.raises(ValueError, match=r"DataParallel, which the TensorFlow backend ignores.*Allowed"):
        tfaccel.Accelerator("one_device")


def test_compile_is_refused(data_parallel):
    keras.distribution.set_distribution(None)
    accelerator = tfaccel.Accelerator("one_device")
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=["cpu:0", "cpu:1"]))
    with accelerator.scope(), pytest.raises(ValueError, match=r"keras\.distribution is set"):
        small_model()


def test_canary_upstream_trains_on_one_device_without_a_word(data_parallel):
    model = small_model()
    model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0)
    devices = {variable.value.device.rpartition("/")[2] for variable in model.variables}
    assert devices == {"device:CPU:0"}
