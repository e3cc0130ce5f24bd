"""Each layer moves at its share of the learning rate, in every kind of step."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from distribution_cells import mirrored
from small_fits import Interrupt, fit

import tfaccel

SHARES = {keras.layers.Conv2D: 0.25}


def moved(helpers, small, callbacks=(), optimizer=None, kind="sequential", data=None, **options):
    """How far each variable of the model went, the convolution's first."""
    before = helpers.build(kind).get_weights()
    model, _ = fit(helpers, small, callbacks, optimizer, kind, 1, data, **options)
    return [a - b for a, b in zip(model.get_weights(), before, strict=True)]


def by_hand(helpers, small, make, shares, steps):
    """An optimizer for each layer, in a loop of its own."""
    model = helpers.build()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    layers = [layer for layer in model.layers if layer.trainable_variables]
    optimizers = [make(share) for share in shares]
    for step in range(steps):
        x, y = (each[24 * step : 24 * (step + 1)] for each in small)
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        gradients = iter(tape.gradient(value, [v.value for v in model.trainable_variables]))
        for layer, optimizer in zip(layers, optimizers, strict=True):
            variables = layer.trainable_variables
            optimizer.apply([next(gradients) for _ in variables], variables)
    return model.get_weights()


@pytest.mark.parametrize(
    "make",
    [
        lambda share: keras.optimizers.AdamW(1e-2 * share, weight_decay=0.1),
        lambda share: keras.optimizers.SGD(1e-2 * share, momentum=0.9, weight_decay=0.1),
        lambda share: keras.optimizers.RMSprop(1e-3 * share),
        lambda share: keras.optimizers.Nadam(1e-3 * share),
    ],
    ids=["adamw", "momentum", "rmsprop", "nadam"],
)
@pytest.mark.parametrize("kernels", ["plain", "fused"])
def test_agrees_with_an_optimizer_for_each_layer(helpers, small, make, kernels):
    expected = by_hand(helpers, small, make, (0.25, 1.0), steps=10)
    accelerator = tfaccel.Accelerator("one_device", "float32", False, kernels)
    with accelerator.scope():
        model = helpers.compile(helpers.build(), make(1.0), **accelerator.compile_options())
    rates = tfaccel.LayerLearningRates(SHARES)
    model.fit(*small, batch_size=24, shuffle=False, verbose=0, callbacks=[rates])
    for a, b in zip(model.get_weights(), expected, strict=True):
        # Ten updates of at most 0.01 each, whose rounding is that of float32: 2**-23 of the weights.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def test_muons_decay_of_other_weights_is_shared_too(helpers, small):
    def muon(share):
        options = {"adam_lr_ratio": 1.0, "weight_decay": 0.1, "adam_weight_decay": 0.5}
        return keras.optimizers.Muon(1e-2 * share, **options)

    expected = by_hand(helpers, small, muon, (0.25, 1.0), steps=4)
    rates = tfaccel.LayerLearningRates(SHARES)
    given = tuple(each[:96] for each in small)
    model, _ = fit(helpers, given, [rates], muon(1.0), epochs=1)
    for a, b in zip(model.get_weights(), expected, strict=True):
        # Muon's five Newton-Schulz steps in float32, four times.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rates", [{}, {"decay": 1.0}, {"layers": {keras.layers.Dense: 1.0}}])
def test_shares_of_one_are_plain_keras(helpers, small, rates):
    expected, _ = fit(helpers, small)
    actual, _ = fit(helpers, small, [tfaccel.LayerLearningRates(**rates)])
    for a, b in zip(actual.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


AXES = [
    ("float32", False, 1, None, "sequential", "numpy"),
    ("float32", True, 5, 2, "subclassed", "tf.data"),
    ("mixed_bfloat16", False, 5, None, "functional", "numpy"),
    ("mixed_bfloat16", True, 1, 5, "sequential", "tf.data"),
    ("mixed_float16", False, 1, 2, "functional", "numpy"),
    ("mixed_float16", True, 10, None, "sequential", "numpy"),
]


@pytest.mark.parametrize(("policy", "jit", "steps", "accumulation", "kind", "source"), AXES)
def test_in_every_kind_of_step(helpers, small, policy, jit, steps, accumulation, kind, source):
    """One update of SGD: the share of the way that plain Keras goes."""
    keras.config.set_dtype_policy(policy)
    rows = 24 * (accumulation or 1)
    data = tf.data.Dataset.from_tensor_slices(tuple(each[:rows] for each in small)).batch(24)
    given = (small[0][:rows], small[1][:rows])
    ways = []
    for callbacks in ([], [tfaccel.LayerLearningRates(SHARES)]):
        sgd = keras.optimizers.SGD(0.1, gradient_accumulation_steps=accumulation)
        options = {"jit_compile": jit, "steps_per_execution": min(steps, accumulation or 1)}
        source_of = data if source == "tf.data" else None
        ways.append(moved(helpers, given, callbacks, sgd, kind, source_of, **options))
    keras.config.set_dtype_policy("float32")
    plain, shared = ways
    assert max(np.abs(each).max() for each in plain) > 1e-3
    for a, b, share in zip(shared, plain, (0.25, 0.25, 1.0, 1.0), strict=True):
        # The same gradients; what rounds are weights of about 0.3 by float32's 6e-8.
        np.testing.assert_allclose(a, share * b, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("scope", [True, False])
def test_under_a_strategy(helpers, small, scope):
    expected, _ = fit(helpers, small, [tfaccel.LayerLearningRates(SHARES)])
    if scope:
        accelerator = tfaccel.Accelerator(mirrored(2), "float32", False)
        with accelerator.scope():
            model = helpers.compile(helpers.build(), **accelerator.compile_options())
        data = accelerator.dataset(*small, batch_size=24, shuffle=False)
    else:
        with mirrored(2).scope():
            model = helpers.compile(helpers.build())
        data = tf.data.Dataset.from_tensor_slices(small).batch(24)
    model.fit(data, epochs=2, shuffle=False, verbose=0, callbacks=[tfaccel.LayerLearningRates(SHARES)])
    for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
        # Sums of gradients in another order, which Adam divides by their size: 20 updates of 1e-3 × 1e-4.
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_goes_with_a_schedule(helpers, small):
    sgd = keras.optimizers.SGD
    callbacks = [tfaccel.LearningRate(0.1, tfaccel.schedules.linear()), tfaccel.LayerLearningRates(SHARES)]
    model, history = fit(helpers, small, callbacks, sgd(1.0), epochs=2)
    assert history["learning_rate"] == pytest.approx([0.1 * 10 / 19, 0.0])
    other, _ = fit(helpers, small, callbacks[::-1], sgd(1.0), epochs=2)
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    only_head, _ = fit(
        helpers, small, [callbacks[0], tfaccel.LayerLearningRates({keras.layers.Conv2D: 1e-9})], sgd(1.0)
    )
    first = helpers.build().get_weights()
    np.testing.assert_allclose(only_head.get_weights()[0], first[0], atol=1e-7)
    assert np.abs(model.get_weights()[0] - first[0]).max() > 1e-4


def test_decay_counts_from_the_last_layer(helpers, small):
    layers = keras.layers
    inner = keras.Sequential(
        [
            keras.Input((7, 7, 1)),
            layers.Conv2D(2, 3, name="one"),
            layers.BatchNormalization(name="norm"),
            layers.Conv2D(2, 3, name="two"),
        ],
        name="backbone",
    )
    attention = [layers.Reshape((9, 2)), layers.MultiHeadAttention(1, 2, name="attend")]
    inputs = keras.Input((7, 7, 1))
    x = attention[0](inner(inputs))
    x = layers.Flatten()(attention[1](x, x))
    model = helpers.compile(keras.Model(inputs, layers.Dense(10, name="head")(x)))
    rates = tfaccel.LayerLearningRates({"norm": 2.0}, decay=0.5)
    model.fit(*small, verbose=0, callbacks=[rates])
    assert rates.shares == {"one": 0.125, "norm": 2.0, "two": 0.25, "attend": 0.5, "head": 1.0}
    rates = tfaccel.LayerLearningRates({"backbone": 0.1, lambda layer: layer.name == "two": 0.3})
    model.fit(*small, verbose=0, callbacks=[rates])
    assert rates.shares == {"one": 1.0, "norm": 1.0, "two": 0.3, "attend": 1.0, "head": 1.0, "backbone": 0.1}


def test_the_optimizer_is_plain_behind_it(helpers, small, tmp_path):
    rates = tfaccel.LayerLearningRates(SHARES)
    model, _ = fit(helpers, small, [rates])
    optimizer = model.optimizer
    assert not {"_backend_update_step", "_apply_weight_decay", "apply"} & set(vars(optimizer))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, again):
        each.fit(*small, batch_size=24, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_fit_twice_and_an_interrupted_fit(helpers, small):
    rates = tfaccel.LayerLearningRates(SHARES)
    once, _ = fit(helpers, small, [rates], epochs=2)
    model = helpers.compile(helpers.build())
    for _ in range(2):
        model.fit(*small, batch_size=24, shuffle=False, verbose=0, callbacks=[rates])
    for a, b in zip(model.get_weights(), once.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(KeyboardInterrupt):
        model.fit(*small, verbose=0, callbacks=[rates, Interrupt()])
    model.fit(*small, batch_size=24, verbose=0)
    assert not {"_backend_update_step", "_apply_weight_decay"} & set(vars(model.optimizer))


def test_what_a_layer_does_not_hold_keeps_the_learning_rate(small):
    class Scaled(keras.Model):
        def __init__(self):
            super().__init__()
            self.flatten, self.head = keras.layers.Flatten(), keras.layers.Dense(10, name="head")
            self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

        def call(self, inputs):
            return self.head(self.flatten(inputs)) * self.scale

    ways = []
    for callbacks in ([], [tfaccel.LayerLearningRates({"head": 0.5})]):
        keras.utils.set_random_seed(1)
        model = Scaled()
        model(small[0][:1])
        model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        before = [model.scale.numpy(), model.head.get_weights()[0]]
        model.fit(small[0][:24], small[1][:24], batch_size=24, verbose=0, callbacks=callbacks)
        ways.append(
            [a - b for a, b in zip([model.scale.numpy(), model.head.get_weights()[0]], before, strict=True)]
        )
    (scale, head), (shared_scale, shared_head) = ways
    np.testing.assert_allclose(shared_scale, scale, atol=1e-7)
    np.testing.assert_allclose(shared_head, 0.5 * head, atol=2e-7)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({"a": 0},), "Set layer.trainable = False"),
        (({"a": -1.0},), "a number > 0"),
        ((["a"],), "a dict from layers to shares"),
        (({3: 0.5},), "a layer's name"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        tfaccel.LayerLearningRates(*arguments)


@pytest.mark.parametrize("decay", [0, 1.5, -1, float("nan"), "a"])
def test_a_bad_decay_is_refused(decay):
    with pytest.raises(ValueError, match="decay="):
        tfaccel.LayerLearningRates(decay=decay)


def test_what_fit_refuses(helpers, small):
    with pytest.raises(ValueError, match="what matches one of"):
        fit(helpers, small, [tfaccel.LayerLearningRates({"nowhere": 0.1})])
    with pytest.raises(ValueError, match="Two LayerLearningRates"):
        fit(helpers, small, [tfaccel.LayerLearningRates(), tfaccel.LayerLearningRates(SHARES)])
    model = helpers.build()
    both = keras.optimizers.MultiOptimizer(keras.optimizers.SGD())
    helpers.compile(model, both)
    with pytest.raises(ValueError, match="MultiOptimizer"):
        model.fit(*small, verbose=0, callbacks=[tfaccel.LayerLearningRates(SHARES)])
    assert repr(eval(repr(tfaccel.LayerLearningRates({"a": 0.1}, decay=0.9)), vars(tfaccel))) == (
        "LayerLearningRates({'a': 0.1}, decay=0.9)"
    )
