"""Fixtures: small real data, small models of each kind, two logical CPUs."""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest
import tensorflow as tf

# Must come before TensorFlow's runtime starts: the mirrored cases need two devices.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)

from tfaccel.demo.images import load_images


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Every test begins with the same seed and policy, and must leave the policy as it was."""
    keras.utils.set_random_seed(0)
    yield
    policy = keras.config.dtype_policy().name
    keras.config.set_dtype_policy("float32")
    assert policy == "float32", "a test or the library left a dtype policy behind"


@pytest.fixture(autouse=True, scope="module")
def _few_objects():
    """What earlier files left is not looked at again: the converter collects garbage in every call."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def images():
    """The built-in Fashion-MNIST sample."""
    return load_images()


@pytest.fixture(scope="session")
def small(images):
    """240 real images, shrunk to 7×7, and their labels: enough for a few steps."""
    x = images["x_train"][:240].reshape(240, 7, 4, 7, 4, 1).mean((2, 4)).astype("float32")
    return x, images["y_train"][:240]


class Subclassed(keras.Model):
    """The same small network as `build("sequential")`, as a subclass."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.convolution = keras.layers.Conv2D(4, 3, activation="relu")
        self.flatten = keras.layers.Flatten()
        self.head = keras.layers.Dense(10)

    def call(self, inputs, training=None):
        return self.head(self.flatten(self.convolution(inputs)))


def build(kind="sequential"):
    """A small classifier of 7×7 images, built; the first weights depend on the seed only."""
    keras.utils.set_random_seed(1)
    layers = keras.layers
    if kind == "subclassed":
        model = Subclassed()
        model(np.zeros((1, 7, 7, 1), "float32"))
        return model
    stack = [layers.Conv2D(4, 3, activation="relu"), layers.Flatten(), layers.Dense(10)]
    if kind == "sequential":
        return keras.Sequential([keras.Input((7, 7, 1)), *stack])
    inputs = outputs = keras.Input((7, 7, 1))
    for layer in stack:
        outputs = layer(outputs)
    return keras.Model(inputs, outputs)


def compile_model(model, optimizer=None, **options):
    """Compiles with the loss and metric that all tests share."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"], **options)
    return model


@pytest.fixture(scope="session")
def helpers():
    """`build` and `compile_model`, for tests of every folder."""

    class Helpers:
        build = staticmethod(build)
        compile = staticmethod(compile_model)
        Subclassed = Subclassed

    return Helpers
