"""Every shape against its closed form and, where Keras has it, against Keras's own; joined; in fit; drawn."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from distribution_cells import mirrored
from small_fits import fit_under

import tfaccel
from tfaccel import schedules

RUN = np.linspace(0, 1, 101)
theirs = keras.optimizers.schedules


def values(schedule, epochs=10, run=RUN):
    return np.array([float(schedule(tf.constant(each, tf.float32), epochs)) for each in run])


def restarts(p, lengths, decay, final):
    begin = 0.0
    for index, length in enumerate(lengths):
        if p < begin + length - 1e-9 or index == len(lengths) - 1:
            where = (p - begin) / length
            return decay**index * (final + (1 - final) * (1 + math.cos(math.pi * where)) / 2)
        begin += length
    raise AssertionError


CLOSED = {
    "constant": (schedules.constant(), lambda p: 1.0),
    "step": (schedules.step(), lambda p: 1.0 if p < 0.5 else 0.1 if p < 0.75 else 0.01),
    "step in epochs": (
        schedules.step([3, 7], 0.5, unit="epochs"),
        lambda p: 0.5 ** (int(p >= 0.3) + int(p >= 0.7)),
    ),
    "exponential": (schedules.exponential(0.01), lambda p: 0.01**p),
    "polynomial": (schedules.polynomial(0.1, 3), lambda p: 0.1 + 0.9 * (1 - p) ** 3),
    "linear": (schedules.linear(0.2), lambda p: 1 - 0.8 * p),
    "inverse time": (schedules.inverse_time(4), lambda p: 1 / (1 + 4 * p)),
    "cosine": (schedules.cosine(0.1), lambda p: 0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2),
    "restarts": (schedules.cosine_restarts(2, 3.0, 0.5, 0.1), lambda p: restarts(p, (0.25, 0.75), 0.5, 0.1)),
    "flat cosine": (
        schedules.flat_cosine(0.6),
        lambda p: 1.0 if p < 0.6 else (1 + math.cos(math.pi * (p - 0.6) / 0.4)) / 2,
    ),
    "warmup, stable, decay": (
        schedules.warmup_stable_decay(0.1, 0.25, 0.2),
        lambda p: p / 0.1 if p < 0.1 else 1.0 if p < 0.75 else 1 - 0.8 * (p - 0.75) / 0.25,
    ),
    "warmup": (
        schedules.warmup(schedules.linear(), 2, initial_fraction=0.5, unit="epochs"),
        lambda p: 0.5 + 0.5 * p / 0.2 if p < 0.2 else 1 - (p - 0.2) / 0.8,
    ),
    "joined": (
        schedules.join((schedules.constant(), 0.2), (schedules.linear(0.5), 0.3), schedules.exponential(0.1)),
        lambda p: 1.0 if p < 0.2 else 1 - 0.5 * (p - 0.2) / 0.3 if p < 0.5 else 0.1 ** ((p - 0.5) / 0.5),
    ),
}


@pytest.mark.parametrize("name", CLOSED)
def test_a_shape_is_its_closed_form(name):
    schedule, by_hand = CLOSED[name]
    # A grid of float32 that misses the boundaries by its rounding: those are tested in fit.
    run = RUN + 1e-4 * (RUN < 1)
    np.testing.assert_allclose(values(schedule, run=run), [by_hand(p) for p in run], atol=2e-6)


@pytest.mark.parametrize(
    ("ours", "keras_own"),
    [
        (schedules.cosine(0.1), theirs.CosineDecay(1.0, 100, alpha=0.1)),
        (
            schedules.warmup(schedules.cosine(), 0.2),
            theirs.CosineDecay(0.0, 80, 0.0, warmup_target=1.0, warmup_steps=20),
        ),
        (schedules.exponential(0.3), theirs.ExponentialDecay(1.0, 100, 0.3)),
        (schedules.inverse_time(2.5), theirs.InverseTimeDecay(1.0, 100, 2.5)),
        (schedules.polynomial(0.1, 2), theirs.PolynomialDecay(1.0, 100, 0.1, power=2)),
        (schedules.step((0.31, 0.71), 0.1), theirs.PiecewiseConstantDecay([30, 70], [1.0, 0.1, 0.01])),
        (schedules.cosine_restarts(2, 1.0, 0.5), theirs.CosineDecayRestarts(1.0, 50, t_mul=1.0, m_mul=0.5)),
    ],
)
def test_it_agrees_with_keras(ours, keras_own):
    steps = [step for step in range(100) if step != 50]  # float32 puts a restart on either side
    found = values(ours, run=[step / 100 for step in steps])
    np.testing.assert_allclose(found, [float(keras_own(step)) for step in steps], atol=2e-6)


def test_one_cycle_is_the_callback_s():
    callback = tfaccel.OneCycle(1.0, warmup=0.4)
    expected = [float(callback.learning_rate_at(tf.constant(p, tf.float32), 10)) for p in RUN]
    np.testing.assert_array_equal(values(schedules.one_cycle(0.4)), np.float32(expected))


def test_parts_without_length_and_whole_ones():
    linear = schedules.linear()
    np.testing.assert_array_equal(values(schedules.join((schedules.cosine(), 0), linear)), values(linear))
    np.testing.assert_array_equal(values(schedules.flat_cosine(1.0)), np.ones(101))
    np.testing.assert_allclose(values(schedules.warmup(linear, 1.0)), RUN, atol=1e-7)
    nested = schedules.join((schedules.step((1,), unit="epochs"), 2), linear, unit="epochs")
    assert values(nested, 4, [0.2, 0.3, 0.75]) == pytest.approx([1.0, 0.1, 0.5], abs=1e-6)


def test_printing_gives_the_call():
    for schedule, _ in CLOSED.values():
        again = eval(repr(schedule), {"schedules": schedules})
        np.testing.assert_array_equal(values(again), values(schedule))


class Rates(keras.callbacks.Callback):
    """The learning rate of each update, read behind it."""

    def __init__(self):
        super().__init__()
        self.rates = []

    def on_train_batch_end(self, batch, logs=None):
        self.rates.append(float(np.asarray(self.model.optimizer.learning_rate)))


def fit(helpers, small, schedule, epochs=4, peak=0.1, **options):
    model = helpers.compile(helpers.build(), keras.optimizers.SGD(0.5, **options))
    rates = Rates()
    callbacks = [tfaccel.LearningRate(peak, schedule), rates]
    history = model.fit(*small, batch_size=24, epochs=epochs, verbose=0, shuffle=False, callbacks=callbacks)
    assert float(np.asarray(model.optimizer.learning_rate)) == 0.5, "its own rate is back"
    return model, rates.rates, history.history


def test_boundaries_are_those_of_epochs(helpers, small):
    """Ten updates an epoch: the first of an epoch is the first with the new rate."""
    for schedule in (schedules.step((1, 3), unit="epochs"), schedules.step((0.25, 0.75))):
        _, rates, history = fit(helpers, small, schedule)
        np.testing.assert_allclose(rates, np.repeat([0.1, 0.01, 0.01, 0.001], 10), rtol=1e-6)
        np.testing.assert_allclose(history["learning_rate"], [0.1, 0.01, 0.01, 0.001], rtol=1e-6)


def test_constant_is_plain_keras(helpers, small):
    model, _, _ = fit(helpers, small, schedules.constant(), peak=0.05)
    plain = helpers.compile(helpers.build(), keras.optimizers.SGD(0.05))
    plain.fit(*small, batch_size=24, epochs=4, verbose=0, shuffle=False)
    for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_whole_run_is_keras_own_schedule(helpers, small):
    """The last update is at progress 1: Keras's is asked for one step less than it has updates."""
    model, _, _ = fit(helpers, small, schedules.exponential(0.1))
    own = theirs.ExponentialDecay(0.1, 39, 0.1)
    plain = helpers.compile(helpers.build(), keras.optimizers.SGD(own))
    plain.fit(*small, batch_size=24, epochs=4, verbose=0, shuffle=False)
    for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_accumulation_counts_updates(helpers, small):
    _, rates, _ = fit(helpers, small, schedules.step((0.5,)), gradient_accumulation_steps=2)
    assert rates[19] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.01)


def test_two_replicas_follow_it(helpers, small):
    """Against one device, with XLA off and four steps a call."""
    callback = lambda: tfaccel.LearningRate(0.05, schedules.warmup_stable_decay())  # noqa: E731
    one = fit_under("one_device", helpers, small, callback())
    two = fit_under(mirrored(2), helpers, small, callback())
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: schedules.step((0.5, 3)), "unit='epochs'"),
        (lambda: schedules.step((0.7, 0.5)), "rising"),
        (lambda: schedules.step(0.5), "sequence"),
        (lambda: schedules.exponential(0.0), "> 0"),
        (lambda: schedules.polynomial(power=-1), "power=-1"),
        (lambda: schedules.cosine(1.5), "final_fraction=1.5"),
        (lambda: schedules.cosine_restarts(0), "periods=0"),
        (lambda: schedules.warmup_stable_decay(0.6, 0.6), "≤ 0.4"),
        (lambda: schedules.warmup(schedules.cosine(), 3), "unit='epochs'"),
        (lambda: schedules.join(), "pairs"),
        (lambda: schedules.join((schedules.cosine(), 0.5)), "Leave off the last length"),
        (lambda: schedules.join(schedules.cosine(), schedules.cosine()), "Give each a length"),
        (lambda: schedules.warmup(schedules.cosine(), unit="steps"), "'run' or 'epochs'"),
        (lambda: tfaccel.LearningRate(0.1, "cosine"), "schedules.cosine"),
        (lambda: tfaccel.LearningRate(0.0), "max_learning_rate=0.0"),
        (lambda: tfaccel.LearningRate(0.1, steps_per_epoch=0), "steps_per_epoch=0"),
    ],
)
def test_bad_arguments(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_schedule_longer_than_the_run_is_refused(helpers, small):
    with pytest.raises(ValueError, match="within the run, 4 epochs"):
        fit(helpers, small, schedules.warmup(schedules.cosine(), 5, unit="epochs"))


def test_plot(tmp_path):
    pairs = [tfaccel.OneCycle(0.1), tfaccel.LearningRate(0.1, schedules.step())]
    path = tfaccel.plot_schedule(pairs, tmp_path / "rates.png", epochs=10)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert tfaccel.plot_schedule(schedules.cosine(), tmp_path / "one.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="Allowed: OneCycle"):
        tfaccel.plot_schedule(0.1, tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()
