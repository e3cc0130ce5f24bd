"""Layers are frozen until their epoch, and everything is as trainable behind the fit as it was before."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from distribution_cells import mirrored
from small_fits import Interrupt, fit

import tfaccel
from tfaccel.keras_fixes.inner_layers import inner_layers

LATER = {keras.layers.Conv2D: 2}


class Weights(keras.callbacks.Callback):
    """The weights at the end of each epoch."""

    def on_train_begin(self, logs=None):
        self.seen = [self.model.get_weights()]

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(self.model.get_weights())

    def moved(self):
        """For each epoch, whether each variable changed."""
        pairs = zip(self.seen, self.seen[1:], strict=False)
        return [[bool((a != b).any()) for a, b in zip(old, new, strict=True)] for old, new in pairs]


def unfreeze(layers, unit="epochs"):
    return tfaccel.UnfreezeLayers(layers, unit=unit)


def by_hand(helpers, small, frozen_epochs, epochs, optimizer):
    """Two fits with layers frozen in the first; the optimizer has state for all."""
    model = helpers.compile(helpers.build(), optimizer)
    optimizer.build(model.trainable_variables)
    model.layers[0].trainable = False
    model.fit(*small, batch_size=24, epochs=frozen_epochs, shuffle=False, verbose=0)
    model.layers[0].trainable = True
    model.make_train_function(force=True)
    model.fit(*small, batch_size=24, epochs=epochs - frozen_epochs, shuffle=False, verbose=0)
    return model


def test_is_what_freezing_by_hand_gives(helpers, small):
    def sgd():
        return keras.optimizers.SGD(1e-2, momentum=0.9)

    expected = by_hand(helpers, small, 2, 3, sgd())
    model, _ = fit(helpers, small, [unfreeze(LATER)], sgd(), epochs=3)
    for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(model.optimizer.variables, expected.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kernels", ["plain", "fused"])
def test_adam_begins_anew_for_a_layer_that_joins(helpers, small, kernels):
    """Against a loop with an Adam for the layer that is made when it joins."""
    model = helpers.build()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    late, head = model.layers[0].trainable_variables, model.layers[-1].trainable_variables
    first, second = keras.optimizers.AdamW(1e-3, weight_decay=0.1), None
    for step in range(40):
        x, y = (each[24 * (step % 10) : 24 * (step % 10 + 1)] for each in small)
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        gradients = tape.gradient(value, [v.value for v in (*head, *late)])
        first.apply(gradients[: len(head)], head)
        if step >= 20:
            second = second or keras.optimizers.AdamW(1e-3, weight_decay=0.1)
            second.apply(gradients[len(head) :], late)
    accelerator = tfaccel.Accelerator("one_device", "float32", False, kernels)
    with accelerator.scope():
        ours = helpers.build()
        adam = keras.optimizers.AdamW(1e-3, weight_decay=0.1)
        helpers.compile(ours, adam, **accelerator.compile_options())
    ours.fit(*small, batch_size=24, epochs=4, shuffle=False, verbose=0, callbacks=[unfreeze(LATER)])
    for a, b in zip(ours.get_weights(), model.get_weights(), strict=True):
        # 40 updates of about 1e-3; Adam divides by gradients, which rounding changes by up to 2e-4 of them.
        np.testing.assert_allclose(a, b, atol=1e-5)
    uncorrected = by_hand(helpers, small, 2, 4, keras.optimizers.AdamW(1e-3, weight_decay=0.1))
    far = np.abs(uncorrected.get_weights()[0] - model.get_weights()[0]).max()
    assert far > 1e-3  # what Keras does without the correction


@pytest.mark.parametrize("layers", [0.0, {keras.layers.Conv2D: 0}])
def test_frozen_for_no_epoch_is_plain_keras(helpers, small, layers):
    expected, _ = fit(helpers, small)
    actual, _ = fit(helpers, small, [unfreeze(layers)])
    for a, b in zip(actual.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


AXES = [
    ("float32", False, 1, None, "sequential", "plain"),
    ("float32", "auto", "auto", None, "functional", "fused"),
    ("float32", True, 5, 2, "subclassed", "plain"),
    ("mixed_bfloat16", True, 5, None, "functional", "fused"),
    ("mixed_float16", False, 5, None, "sequential", "plain"),
    ("mixed_float16", False, 1, 2, "subclassed", "fused"),
]


@pytest.mark.parametrize(("policy", "jit", "steps", "accumulation", "kind", "kernels"), AXES)
def test_in_every_kind_of_step(helpers, small, policy, jit, steps, accumulation, kind, kernels):
    accelerator = tfaccel.Accelerator(
        "one_device", keras.DTypePolicy(policy), jit, kernels, steps_per_execution=steps
    )
    adam = keras.optimizers.Adam(1e-2, gradient_accumulation_steps=accumulation)
    with accelerator.scope():
        model = helpers.compile(helpers.build(kind), adam, **accelerator.compile_options())
    weights = Weights()
    data = accelerator.dataset(*small, batch_size=24)
    model.fit(data, epochs=4, verbose=0, callbacks=[unfreeze(LATER), weights])
    assert weights.moved() == [[False, False, True, True]] * 2 + [[True] * 4] * 2


def test_under_a_strategy(helpers, small):
    expected, _ = fit(helpers, small, [unfreeze(LATER)], keras.optimizers.SGD(0.1), epochs=3)
    accelerator = tfaccel.Accelerator(mirrored(2), "float32", False)
    with accelerator.scope():
        model = helpers.compile(helpers.build(), keras.optimizers.SGD(0.1), **accelerator.compile_options())
    data = accelerator.dataset(*small, batch_size=24, shuffle=False)
    weights = Weights()
    model.fit(data, epochs=3, shuffle=False, verbose=0, callbacks=[unfreeze(LATER), weights])
    assert weights.moved()[:2] == [[False, False, True, True]] * 2
    for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
        # 30 updates of SGD with gradients summed in another order: 30 × 0.1 × 1e-7 of the gradient's size.
        np.testing.assert_allclose(a, b, atol=2e-6)


def deep():
    layers = keras.layers
    inner = [keras.Input((7, 7, 1))]
    for index in range(3):
        inner += [layers.Conv2D(2, 3, name=f"conv_{index}"), layers.BatchNormalization(name=f"norm_{index}")]
    backbone = keras.Sequential(inner, name="backbone")
    return keras.Sequential(
        [keras.Input((7, 7, 1)), backbone, layers.Flatten(), layers.Dense(10, name="head")]
    )


def test_a_number_spreads_the_layers_evenly(helpers, small):
    model = helpers.compile(deep())
    callback = tfaccel.UnfreezeLayers(0.6)
    model.fit(*small, epochs=10, verbose=0, callbacks=[callback])
    assert callback.first_epochs == {
        "head": 0, "conv_2": 2, "norm_2": 2, "conv_1": 4, "norm_1": 4, "conv_0": 6, "norm_0": 6
    }  # fmt: skip


def test_moments_of_layers_in_one_another(helpers, small):
    callback, weights = unfreeze({"backbone": 2, "conv_1": 1}), Weights()
    model = helpers.compile(deep())
    model.fit(*small, epochs=3, verbose=0, callbacks=[callback, weights])
    assert callback.first_epochs == {"backbone": 2, "conv_1": 1}
    moved = {v.path: np.array(weights.moved())[:, place] for place, v in enumerate(model.weights)}
    for path, epochs in moved.items():
        first = 0 if "head" in path else 1 if "conv_1" in path else 2
        assert epochs.tolist() == [epoch >= first for epoch in range(3)], path


def test_weights_that_a_model_holds_itself_join_with_its_first_layers(helpers, small):
    class Shifted(keras.Model):
        def __init__(self):
            super().__init__()
            self.flatten = keras.layers.Flatten()
            self.below, self.head = keras.layers.Dense(8, name="below"), keras.layers.Dense(10, name="head")
            self.shift = self.add_weight(shape=(49,), name="shift")

        def call(self, inputs):
            return self.head(self.below(self.flatten(inputs) + self.shift))

    model = Shifted()
    model(small[0][:1])
    helpers.compile(model)
    weights = Weights()
    model.fit(*small, epochs=4, verbose=0, callbacks=[tfaccel.UnfreezeLayers(0.5), weights])
    for variable, *moved in zip(model.weights, *weights.moved(), strict=True):
        assert moved == ([True] * 4 if "head" in variable.path else [False, False, True, True]), variable.path
    rates = tfaccel.LayerLearningRates(decay=0.5)
    model.fit(*small, verbose=0, callbacks=[rates])
    assert rates.shares == {model.name: 0.5, "below": 0.5, "head": 1.0}


def test_batch_normalization_keeps_its_statistics_while_frozen(helpers, small):
    model = helpers.compile(deep())
    weights = Weights()
    model.fit(*small, epochs=2, verbose=0, callbacks=[unfreeze({"backbone": 1}), weights])
    names = [variable.path for variable in model.weights]
    still = {name for name, moves in zip(names, weights.moved()[0], strict=True) if not moves}
    assert still == {name for name in names if "head" not in name}
    assert all(weights.moved()[1])


@pytest.mark.parametrize("layers", [{"backbone": 1}, 0.5])
def test_a_normalization_without_weights_is_frozen_with_the_layer_before(helpers, small, layers):
    stack = [keras.layers.Conv2D(2, 3), keras.layers.BatchNormalization(center=False, scale=False)]
    backbone = keras.Sequential([keras.Input((7, 7, 1)), *stack], name="backbone")
    head = [keras.layers.Flatten(), keras.layers.Dense(10)]
    model = helpers.compile(keras.Sequential([keras.Input((7, 7, 1)), backbone, *head]))
    weights = Weights()
    callback = tfaccel.UnfreezeLayers(layers, unit="epochs" if isinstance(layers, dict) else "run")
    model.fit(*small, epochs=2, verbose=0, callbacks=[callback, weights])
    assert weights.moved() == [[False] * 4 + [True] * 2, [True] * 6]


def test_flags_are_what_they_were(helpers, small):
    model = deep()
    backbone = model.layers[0]
    backbone.layers[2].trainable = False
    backbone.layers[1].gamma.trainable = False
    helpers.compile(model)
    flags = lambda: (  # noqa: E731
        [layer.trainable for layer in inner_layers(model)],
        [v.trainable for v in model.variables],
    )
    before = flags()
    model.fit(*small, epochs=3, verbose=0, callbacks=[unfreeze({"backbone": 1, "conv_0": 2})])
    assert flags() == before
    with pytest.raises(KeyboardInterrupt):
        model.fit(*small, epochs=3, verbose=0, callbacks=[unfreeze({"backbone": 2}), Interrupt()])
    assert flags() != before
    model.fit(*small, epochs=1, verbose=0)
    assert flags() == before
    callback = unfreeze({"backbone": 2})
    with pytest.raises(KeyboardInterrupt):
        model.fit(*small, epochs=3, verbose=0, callbacks=[callback, Interrupt()])
    callback.restore()
    assert flags() == before


def test_fit_twice_saved_and_loaded(helpers, small, tmp_path):
    callback, weights = unfreeze({keras.layers.Conv2D: 1}), Weights()
    model, _ = fit(helpers, small, [callback])
    model.fit(*small, epochs=2, verbose=0, callbacks=[callback, weights])
    assert weights.moved() == [[False, False, True, True], [True] * 4]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.layers[0].trainable
    for each in (model, again):
        each.fit(*small, batch_size=24, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_resumed_run_goes_on_where_it_was(helpers, small, tmp_path):
    weights = Weights()
    adam = lambda: keras.optimizers.Adam(1e-2)  # noqa: E731
    expected, _ = fit(helpers, small, [unfreeze(LATER)], adam(), epochs=4)
    model = helpers.compile(helpers.build(), adam())
    fitting = {"batch_size": 24, "epochs": 4, "shuffle": False, "verbose": 0}

    def callbacks():
        return [keras.callbacks.BackupAndRestore(tmp_path / "backup"), unfreeze(LATER)]

    with pytest.raises(KeyboardInterrupt):
        model.fit(*small, **fitting, callbacks=[*callbacks(), Interrupt(1)])
    model = helpers.compile(helpers.build(), adam())
    model.fit(*small, **fitting, callbacks=[*callbacks(), weights])
    # The backup is written at the end of an epoch, before the interruption.
    assert weights.moved()[-2:] == [[True] * 4] * 2
    for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_fine_tuning_as_a_whole(helpers, small):
    """With shares of the rate, a schedule and rounded weights."""
    model = helpers.compile(deep(), keras.optimizers.AdamW(1e-3))
    callbacks = [
        tfaccel.OneCycle(1e-2),
        tfaccel.LayerLearningRates(decay=0.5),
        tfaccel.UnfreezeLayers(0.5),
        tfaccel.QuantizeAware(8, None),
    ]
    weights = Weights()
    history = model.fit(*small, epochs=8, verbose=0, callbacks=[*callbacks, weights]).history
    assert np.isfinite(history["loss"]).all()
    moved = np.array(weights.moved())[:, [variable.trainable for variable in model.weights]]
    assert moved.any(1).all()
    assert not moved[0].all()
    assert moved[5].all()


def test_a_frozen_part_is_not_differentiated(helpers, small):
    """That is what makes the step of a head cheap."""
    flops = []
    for first in (1, 0):
        profile = tfaccel.Profile(verbose=0)
        fit(helpers, small, [profile, unfreeze({keras.layers.Conv2D: first})])
        flops.append(profile.report.flops)  # of the first epoch's step
    convolution, dense = 25 * 4 * 9, 100 * 10
    # Forward and the gradient of the kernel; the one of the input only where something below wants it.
    assert flops == [2 * 24 * (convolution + 2 * dense), 2 * 24 * (2 * convolution + 3 * dense)]


def test_it_says_who_joins(helpers, small, capsys):
    fit(helpers, small, [tfaccel.UnfreezeLayers({keras.layers.Conv2D: 1}, unit="epochs", verbose=1)])
    assert "Epoch 2: conv2d" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layers": {}}, "at least one layer"),
        ({"layers": {"a": 2}}, "Pass unit='epochs'"),
        ({"layers": -0.1}, "a fraction of the run"),
        ({"layers": {"a": float("nan")}}, "layers=nan"),
        ({"layers": {"a": "late"}}, "layers='late'"),
        ({"layers": {3: 0.5}}, "a layer's name"),
        ({"unit": "steps"}, "'run' or 'epochs'"),
        ({"verbose": 2}, "0 or 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        tfaccel.UnfreezeLayers(**arguments)


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        (lambda: [unfreeze({"nowhere": 1})], "what matches one of"),
        (lambda: [unfreeze({keras.layers.Conv2D: 2})], "would never be trained"),
        (lambda: [unfreeze({keras.layers.Layer: 1})], "Leave the last one out"),
        (lambda: [unfreeze(0.0), unfreeze(0.0)], "Two UnfreezeLayers"),
        (lambda: [unfreeze({keras.layers.Conv2D: 1}), tfaccel.PruneWeights(0.5)], "Compress in a second fit"),
        (lambda: [tfaccel.ClusterWeights(4), unfreeze({keras.layers.Conv2D: 1})], "Compress in a second fit"),
    ],
)
def test_what_fit_refuses_before_the_first_step(helpers, small, callbacks, words):
    model = helpers.compile(helpers.build())
    before = model.get_weights()
    with pytest.raises(ValueError, match=words):
        model.fit(*small, epochs=2, verbose=0, callbacks=callbacks())
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_moving_average_is_refused(helpers, small):
    model = helpers.compile(helpers.build(), keras.optimizers.SGD(use_ema=True))
    with pytest.raises(ValueError, match="use_ema=True"):
        model.fit(*small, epochs=3, verbose=0, callbacks=[unfreeze(LATER)])


def test_an_optimizer_for_fewer_weights_is_refused(helpers, small):
    model = helpers.compile(helpers.build())
    model.layers[0].trainable = False
    model.fit(*small, verbose=0)
    model.layers[0].trainable = True
    with pytest.raises(ValueError, match="was made when sequential"):
        model.fit(*small, epochs=3, verbose=0, callbacks=[unfreeze(LATER)])


def test_repr_makes_it_again():
    callback = tfaccel.UnfreezeLayers({"a": 2}, unit="epochs", verbose=1)
    assert repr(eval(repr(callback), vars(tfaccel))) == repr(callback)


def test_a_model_that_is_not_built_is_refused(helpers, small):
    model = helpers.compile(helpers.Subclassed())
    with pytest.raises(ValueError, match="no weights to train yet"):
        model.fit(*small, epochs=3, verbose=0, callbacks=[tfaccel.UnfreezeLayers(0.5)])
