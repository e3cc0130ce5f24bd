"""`adopt` and `release`: a training that goes in and out of a scope is the training that never did."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel


@pytest.fixture(scope="module")
def strategy():
    return tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.hidden = keras.layers.Dense(units, activation="tanh")
        self.head = keras.layers.Dense(1)

    def call(self, inputs):
        return self.head(self.hidden(inputs))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


class WithoutConfig(keras.Model):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, inputs):
        return self.layer(inputs)


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "accumulation": lambda: keras.optimizers.AdamW(0.01, gradient_accumulation_steps=3, use_ema=True),
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.05, 20), momentum=0.9),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), initial_scale=64.0),
}


def data():
    random = np.random.default_rng(0)
    x = random.normal(size=(50, 6)).astype("float32")
    return x, (x @ random.normal(size=(6, 1))).astype("float32")


def build(kind, optimizer="adam"):
    keras.utils.set_random_seed(1)
    layers = keras.layers
    if kind == "subclassed":
        model = Subclassed(5)
        model(np.zeros((1, 6)))
    elif kind == "sequential":
        # A bias before the normalization has a gradient of rounding errors, which Adam takes for full size.
        body = [
            layers.Dense(5, use_bias=False),
            layers.BatchNormalization(),
            layers.Dropout(0.2, seed=2),
            layers.Dense(1),
        ]
        model = keras.Sequential([keras.Input((6,)), *body])
    else:
        inputs, shared = keras.Input((6,)), layers.Dense(6, activation="tanh")
        model = keras.Model(inputs, layers.Dense(1)(shared(shared(inputs))))
        model.layers[1].trainable = True
    model.compile(OPTIMIZERS[optimizer](), "mse", metrics=["mae", keras.metrics.RootMeanSquaredError()])
    return model


def fit(model):
    return model.fit(*data(), batch_size=16, shuffle=False, verbose=0).history


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        ("sequential", "adam"),
        ("functional", "accumulation"),
        ("subclassed", "schedule"),
        ("functional", "scaled"),
    ],
)
def test_in_and_out_of_a_strategy_is_one_training(strategy, kind, optimizer):
    alone = build(kind, optimizer)
    expected = [fit(alone) for _ in range(3)]
    accelerator = tfaccel.Accelerator(strategy, "float32", kernels="plain")
    model = build(kind, optimizer)
    histories = [fit(model)]
    inside = accelerator.adopt(model)
    assert inside is not model
    histories.append(fit(inside))
    outside = accelerator.release(inside)
    assert outside.distribute_strategy is tf.distribute.get_strategy()
    assert "make_train_function" not in vars(outside)
    histories.append(fit(outside))
    for a, b in zip(expected, histories, strict=True):
        assert a == {name: pytest.approx(values, rel=1e-5) for name, values in b.items()}
    # Twelve steps of 0.01, Adam's with gradients that may cancel: as in the distribution matrix.
    for a, b in zip(alone.get_weights(), outside.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    for a, b in zip(alone.optimizer.variables, outside.optimizer.variables, strict=True):
        np.testing.assert_allclose(*map(keras.ops.convert_to_numpy, (a, b)), rtol=1e-4, atol=1e-5)


def test_one_device_keeps_the_model(small, helpers):
    model = helpers.compile(helpers.build())
    accelerator = tfaccel.Accelerator("one_device", "float32")
    assert accelerator.adopt(model) is model
    model.fit(*small, epochs=1, verbose=0)
    assert "compiled, data resident" in str(accelerator)
    assert accelerator.release(model) is model
    plain = helpers.compile(helpers.build())
    assert set(vars(model)) - {"history", "_eval_epoch_iterator"} == set(vars(plain)) - {"history"}


def test_a_model_that_is_not_compiled_comes_in_too(strategy):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    inside = tfaccel.Accelerator(strategy, "float32").adopt(model)
    assert not inside.compiled
    np.testing.assert_array_equal(inside.get_weights()[0], model.get_weights()[0])


def test_what_cannot_move_is_refused(strategy):
    accelerator = tfaccel.Accelerator(strategy, "float32")
    with pytest.raises(ValueError, match="has no variables yet"):
        accelerator.adopt(keras.Sequential([keras.layers.Dense(1)]))
    without = WithoutConfig(keras.layers.Dense(1))
    without(np.zeros((1, 6)))
    with pytest.raises(ValueError, match=r"WithoutConfig can't be built again.*get_config"):
        accelerator.adopt(without)
    half = tfaccel.Accelerator(strategy, keras.DTypePolicy("mixed_bfloat16"))
    with pytest.raises(ValueError, match="precision='float32'"):
        half.adopt(build("functional"))
    with accelerator.scope(), pytest.raises(ValueError, match="after the `with` block"):
        accelerator.release(build("functional"))


def test_a_model_of_another_scope_hears_of_adopt(strategy):
    model = build("functional")
    accelerator = tfaccel.Accelerator(strategy, "float32")
    with accelerator.scope(), pytest.raises(ValueError, match=r"accelerator\.adopt"):
        model.compile("adam", "mse")
