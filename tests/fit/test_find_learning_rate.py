"""The finder: what it sees, what it suggests, and that nothing is left of it."""

import random

import keras
import numpy as np
import pytest
import tensorflow as tf
from distribution_cells import mirrored

import tfaccel
from tfaccel.fit.learning_rate_curve import LearningRateCurve, explodes, longest_fall, smooth
from tfaccel.keras_fixes.random_state import random_state_kept


def net(helpers, optimizer=None, accumulation=None, **options):
    """With dropout, whose seeds are part of the model's state, and batch normalization."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    stack = [layers.Flatten(), layers.Dense(32), layers.BatchNormalization(), layers.ReLU()]
    model = keras.Sequential([keras.Input((7, 7, 1)), *stack, layers.Dropout(0.2), layers.Dense(10)])
    adam = keras.optimizers.Adam(1e-3, gradient_accumulation_steps=accumulation)
    return helpers.compile(model, optimizer or adam, **options)


def state(model):
    values = [np.asarray(v) for v in (*model.variables, *model.optimizer.variables)]
    return [*values, np.random.get_state()[1], np.array(random.getstate()[1])]


@pytest.mark.parametrize(
    ("jit", "steps_per_execution", "accumulation", "policy"),
    [
        (False, 1, None, "float32"),
        (True, 4, 2, "float32"),
        (True, 1, None, "mixed_float16"),
    ],
)
def test_nothing_is_left_of_it(helpers, small, jit, steps_per_execution, accumulation, policy):
    """A fit behind it is bit for bit the fit without it; also one that had begun before."""
    keras.config.set_dtype_policy(policy)
    found = []
    for look in (False, True):
        model = net(
            helpers,
            accumulation=accumulation,
            jit_compile=jit,
            steps_per_execution=steps_per_execution,
        )
        model.fit(*small, batch_size=24, epochs=1, verbose=0)
        if look:
            before = state(model)
            curve = tfaccel.find_learning_rate(model, small, batch_size=24, steps=20)
            assert len(curve.losses) <= 20
            for a, b in zip(state(model), before, strict=True):
                np.testing.assert_array_equal(a, b)
        model.fit(*small, batch_size=24, epochs=1, verbose=0)
        found.append(state(model))
    keras.config.set_dtype_policy("float32")
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_random_state_is_kept():
    keras.utils.set_random_seed(3)

    def draw():
        values = [random.random(), np.random.random(), float(keras.random.normal([]))]
        values += [float(tf.random.get_global_generator().normal([]))]
        order = tf.data.Dataset.range(50).shuffle(50, reshuffle_each_iteration=False)
        return [*values, *order.as_numpy_iterator()]

    tf.random.get_global_generator()  # made at its first use, from the machine's own randomness
    with random_state_kept():
        first = draw()
    assert draw() == first
    assert draw() != first


def test_it_sees_the_losses_of_a_fit_at_those_rates(helpers, small):
    """Against plain Keras, a batch at a time."""
    curve = tfaccel.find_learning_rate(
        net(helpers, keras.optimizers.SGD(0.1)), _batches(small), lowest=1e-3, highest=0.5, steps=15
    )
    model = net(helpers, keras.optimizers.SGD(0.1))
    batches = list(_batches(small)) * 2
    losses = []
    for rate, (x, y) in zip(curve.learning_rates, batches, strict=False):
        model.optimizer.learning_rate = float(rate)
        model.reset_metrics()
        losses.append(model.train_on_batch(x, y, return_dict=True)["loss"])
    np.testing.assert_allclose(curve.learning_rates, np.geomspace(1e-3, 0.5, 15), rtol=1e-5)
    np.testing.assert_allclose(curve.losses, losses, rtol=1e-4)


def test_accumulated_losses_are_means(helpers, small):
    def make(accumulation):
        sgd = keras.optimizers.SGD(0.1, gradient_accumulation_steps=accumulation)
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((7, 7, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])
        return helpers.compile(model, sgd)

    given = {"lowest": 1e-3, "highest": 0.5, "steps": 10}
    halves = tfaccel.find_learning_rate(make(2), _batches(small, 12), **given)
    whole = tfaccel.find_learning_rate(make(None), _batches(small, 24), **given)
    np.testing.assert_allclose(halves.losses, whole.losses, rtol=1e-4)


def test_two_replicas_see_what_one_device_sees(helpers, small):
    found = []
    for strategy in ("one_device", mirrored(2)):
        accelerator = tfaccel.Accelerator(strategy, "float32", False)
        with accelerator.scope():
            model = helpers.compile(
                helpers.build(), keras.optimizers.SGD(0.1), **accelerator.compile_options()
            )
        before = model.get_weights()
        data = accelerator.dataset(*small, batch_size=24, shuffle=False)
        curve = tfaccel.find_learning_rate(model, data, lowest=1e-3, highest=0.5, steps=15)
        found.append(curve.losses)
        for a, b in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(*found, rtol=1e-3)


def test_it_gives_up_where_the_loss_explodes(helpers, small):
    curve = tfaccel.find_learning_rate(
        net(helpers, keras.optimizers.SGD(0.1)), small, batch_size=24, highest=1e6, steps=100
    )
    assert curve.diverged
    assert len(curve.losses) < 100
    assert 1e-4 < curve.valley < curve.minimum_tenth * 10
    assert np.isfinite(curve.smoothed).all()


def test_what_it_suggests_trains(helpers, small):
    curve = tfaccel.find_learning_rate(net(helpers), small, batch_size=24, steps=100)
    losses = {}
    for name, rate in (("peak", curve.peak), ("lowest", 1e-6)):
        model = net(helpers)
        history = model.fit(*small, batch_size=24, epochs=6, verbose=0, callbacks=[tfaccel.OneCycle(rate)])
        losses[name] = history.history["loss"][-1]
    assert losses["peak"] < 0.4 * losses["lowest"]


def test_the_suggestions_of_a_known_curve():
    """Flat, a fall whose middle is at 1e-2, a minimum at 1e-1, an explosion."""
    rates = np.geomspace(1e-5, 10, 241)
    losses = 2 - 1 / (1 + (1e-2 / rates) ** 2) + 0.2 * np.maximum(np.log10(rates) + 1, 0)
    curve = tfaccel.LearningRateCurve(rates, losses, losses, False)
    assert curve.steep == pytest.approx(1e-2, rel=0.1)
    assert curve.minimum_tenth == pytest.approx(1e-2, rel=0.2)
    assert curve.peak == pytest.approx(10 / 3 * curve.minimum_tenth)
    begin, end = longest_fall(losses)
    assert (begin, rates[end]) == (0, pytest.approx(0.1, rel=0.2))
    assert longest_fall(np.array([3.0, 5, 4, 4.5, 3, 2, 6])) == (1, 5)
    assert longest_fall(np.ones(4)) == (0, 0)


def test_plot_and_text(helpers, small, tmp_path):
    curve = tfaccel.find_learning_rate(net(helpers), small, batch_size=24, steps=30)
    assert curve.plot(tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    for word in ("peak", "valley", "steep", "minimum/10", "30 steps"):
        assert word in str(curve)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"lowest": 0}, "lowest=0"),
        ({"lowest": 1.0, "highest": 0.1}, "highest=0.1"),
        ({"highest": float("inf")}, "highest=inf"),
        ({"steps": 3}, "steps=3"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_arguments(helpers, small, arguments, text):
    with pytest.raises(ValueError, match=text):
        tfaccel.find_learning_rate(net(helpers), small, **arguments)


def test_models_that_it_can_not_use(helpers, small):
    plain = keras.Sequential([keras.Input((7, 7, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])
    with pytest.raises(ValueError, match="compiled and built"):
        tfaccel.find_learning_rate(plain, small)
    scheduled = net(helpers, keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 10)))
    with pytest.raises(ValueError, match="a schedule of its own"):
        tfaccel.find_learning_rate(scheduled, small)
    model = net(helpers)
    before = state(model)
    with pytest.raises(ValueError, match="not finite from step 0"):
        tfaccel.find_learning_rate(model, (small[0] * np.nan, small[1]))
    for a, b in zip(state(model), before[: len(state(model))], strict=False):
        if a.shape == b.shape:
            np.testing.assert_array_equal(a, b)

    class Own(keras.Sequential):
        def train_step(self, data):
            return {"loss": tf.reduce_mean(self(data[0]))}

    own = Own([keras.Input((7, 7, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])
    own.compile("sgd")
    with pytest.raises(ValueError, match=r"self.compute_loss\(x, y, y_pred\)"):
        tfaccel.find_learning_rate(own, small, steps=10)


def _batches(small, size=24):
    return tf.data.Dataset.from_tensor_slices(small).batch(size)


def test_a_trained_model_is_told_apart_and_its_noise_is_no_explosion():
    """The loss of a trained model falls at no rate: what counts is where it begins to rise."""
    rates = np.geomspace(1e-6, 1, 200)
    noise = np.random.default_rng(0).normal(scale=0.05, size=200)
    losses = 0.1 + np.abs(noise) + np.where(rates > 1e-2, 2 * np.log10(rates / 1e-2), 0)
    curve = LearningRateCurve(rates, losses, smooth(losses), diverged=False)
    assert not curve.fell
    assert "the loss fell nowhere" in str(curve)
    assert 3e-3 < 3 * curve.peak < 3e-2
    assert 10 * curve.minimum_tenth == pytest.approx(3 * curve.peak)
    explosions = [explodes(losses[:n]) for n in range(5, 200)]
    assert not any(explosions[:130]), "rates up to 1e-2"
    assert any(explosions[130:])


def test_a_loss_that_falls_has_its_minimum_where_it_is_smallest():
    rates = np.geomspace(1e-5, 1, 60)
    losses = 2.3 - 2 / (1 + (1e-2 / rates) ** 2) + rates**2
    curve = LearningRateCurve(rates, losses, losses, diverged=False)
    assert curve.fell
    assert 3 * curve.peak == pytest.approx(rates[np.argmin(losses)])


@pytest.mark.parametrize("steps", [10, 15, 18])
def test_few_steps_tell_an_explosion_too(steps):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    data = rng.normal(size=(64, 4)), rng.normal(size=(64, 1))
    curve = tfaccel.find_learning_rate(model, data, lowest=1e-3, highest=1e3, steps=steps)
    assert curve.diverged
    assert curve.peak < 1
