"""XLA for the whole loop is tried where it may pay, refused where it disagrees, kept where it is faster."""

import keras
import numpy as np
import pytest

import tfaccel
from tfaccel.fast_kernels import trial as trials
from tfaccel.fast_kernels.agreement import STEP_TOLERANCE, same_step
from tfaccel.fast_kernels.trial import Trial, Way


class FakeTimes:
    """Stands for the clock: XLA's calls take `ratio` of the time of the others."""

    def __init__(self, trial, ratio):
        for way in (Way.PLAIN, Way.LOOP):
            for _ in range(trials.CALLS + 1):
                trial.note(way, 10, ratio if way is Way.LOOP else 1.0)


def dense():
    keras.utils.set_random_seed(1)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((7, 7, 1)),
            layers.Flatten(),
            layers.Dense(8, "relu"),
            layers.Dropout(0.3),
            layers.Dense(10),
        ]
    )


def fit(helpers, small, build, jit="auto", epochs=12):
    accelerator = tfaccel.Accelerator(jit=jit, steps_per_execution=4)
    with accelerator.scope():
        model = helpers.compile(build(), **accelerator.compile_options())
    model.fit(accelerator.dataset(*small, batch_size=32, shuffle=False), epochs=epochs, verbose=0)
    return model, str(accelerator)


@pytest.fixture
def eager_to_try(monkeypatch):
    """A run of a second is worth a compilation."""
    monkeypatch.setattr(trials, "COMPILE_SECONDS", 0.0)
    monkeypatch.setattr(trials, "COMPILE_SECONDS_AN_OP", 0.0)


def test_a_short_run_is_not_worth_a_compilation(helpers, small):
    _, text = fit(helpers, small, dense)
    assert "xla:" not in text


@pytest.mark.usefixtures("eager_to_try")
def test_a_trial_ends_with_weights_that_plain_keras_has_too(helpers, small):
    """Batches of 32 out of 240: seven full ones by XLA or not, the partial one without."""
    plain, _ = fit(helpers, small, dense, jit=False)
    tried, text = fit(helpers, small, dense)
    assert "xla: XLA for the whole loop: " in text
    assert "× the time" in text
    for a, b in zip(plain.get_weights(), tried.get_weights(), strict=True):
        # 96 updates of at most 1e-3, each off by some hundred roundings of itself.
        np.testing.assert_allclose(a, b, atol=96 * 1e-3 * 1000 * 1.2e-7)
    assert int(tried.optimizer.iterations) == 96


@pytest.mark.usefixtures("eager_to_try")
def test_a_step_that_xla_computes_otherwise_is_refused_and_leaves_no_trace(helpers, small):
    """Stateful random ops draw anew in each program."""
    import tensorflow as tf

    class Noise(keras.layers.Layer):
        def call(self, x, training=None):
            return x + tf.random.uniform(tf.shape(x)) if training else x

    def noisy():
        keras.utils.set_random_seed(1)
        layers = keras.layers
        stack = [layers.Flatten(), Noise(), layers.Dense(10)]
        return keras.Sequential([keras.Input((7, 7, 1)), *stack])

    model, text = fit(helpers, small, noisy)
    assert "not used" in text
    assert "differed" in text
    assert int(model.optimizer.iterations) == 96


@pytest.mark.parametrize("layer", ["Dropout", "SpatialDropout1D"])
@pytest.mark.parametrize("jit", [False, True])
def test_random_layers_draw_what_keras_draws_with_xla_too(helpers, small, layer, jit):
    """A canary as well: Keras's own step under XLA draws other masks."""

    def build():
        keras.utils.set_random_seed(1)
        layers = keras.layers
        random = getattr(layers, layer)(0.4, seed=3)
        return keras.Sequential(
            [keras.Input((7, 7, 1)), layers.Reshape((7, 7)), random, layers.Flatten(), layers.Dense(10)]
        )

    def losses(kernels, jit):
        accelerator = tfaccel.Accelerator(jit=jit, kernels=kernels, steps_per_execution=4)
        with accelerator.scope():
            model = helpers.compile(build(), keras.optimizers.SGD(0.1), **accelerator.compile_options())
        return model.fit(*small, batch_size=60, epochs=2, verbose=0, shuffle=False).history["loss"]

    expected = losses("plain", False)
    # Eight plain updates: a few hundred roundings of the loss.
    np.testing.assert_allclose(losses("fused", jit), expected, rtol=1e-5)
    if jit:
        assert not np.allclose(losses("plain", True), expected, rtol=1e-4)


@pytest.mark.usefixtures("eager_to_try")
def test_convolutions_are_not_tried_on_a_cpu(helpers, small):
    _, text = fit(helpers, small, helpers.build)
    assert "not used, it is slow for Conv" in text


@pytest.mark.usefixtures("eager_to_try")
def test_what_xla_cannot_compile_is_not_tried(helpers, small):
    import tensorflow as tf

    class Python(keras.layers.Layer):
        def call(self, x):
            y = tf.numpy_function(lambda a: a, [x], tf.float32)
            y.set_shape(x.shape)
            return y

    def build():
        layers = keras.layers
        return keras.Sequential([keras.Input((7, 7, 1)), Python(), layers.Flatten(), layers.Dense(10)])

    model, text = fit(helpers, small, build)
    assert "can't compile" in text
    assert int(model.optimizer.iterations) == 96


@pytest.mark.usefixtures("eager_to_try")
def test_a_rejected_program_is_not_run_for_other_data_either(helpers, small):
    """Trials belong to a number of samples, what was found out about a program doesn't."""
    import tensorflow as tf

    class Histogram(keras.layers.Layer):
        def call(self, x):
            counts = tf.histogram_fixed_width(x, [0.0, 1.0], 4)
            return x + 0 * tf.cast(tf.reduce_sum(counts), x.dtype)

    accelerator = tfaccel.Accelerator(steps_per_execution=4)
    with accelerator.scope():
        layers = [keras.layers.Flatten(), Histogram(), keras.layers.Dense(10)]
        model = keras.Sequential([keras.Input((7, 7, 1)), *layers])
        helpers.compile(model, **accelerator.compile_options())
    for samples in (240, 120):
        x, y = (array[:samples] for array in small)
        model.fit(x, y, batch_size=20, epochs=12, verbose=0)
        assert "not used, it can't compile the step" in str(accelerator)
    assert int(model.optimizer.iterations) == 12 * (12 + 6)


def test_an_undecided_trial_stays_small():
    trial = Trial(0, lambda _: None, [Way.RECURRENT])
    for _ in range(1000):
        trial.note(trial.next_way(None), 1, 1.0)
    assert trial.decided is None
    assert len(trial._step_s[Way.PLAIN]) == trials.REMEMBERED


@pytest.mark.parametrize(("ratio", "used"), [(0.5, True), (0.94, True), (0.96, False), (2.0, False)])
def test_the_faster_of_the_two_stays(ratio, used):
    said = []
    trial = Trial(1000, said.append)
    FakeTimes(trial, ratio)
    assert (trial.decided is Way.LOOP) is used
    assert f"{ratio:.2f} ×" in said[0]


def test_calls_while_xla_is_not_warm_yet_do_not_decide():
    trial = Trial(10_000, lambda _: None, [Way.RECURRENT])
    times = {Way.PLAIN: iter([9.0, 1.1, 1.0, 1.3]), Way.RECURRENT: iter([5.0, 1.4, 1.2, 0.8])}
    while trial.decided is None:
        way = trial.next_way(None)
        trial.note(way, 1, next(times[way]))
    assert trial.decided is Way.RECURRENT


class Variable:
    def __init__(self, name, trainable):
        self.name, self.trainable = name, trainable


def state(scale=1.0):
    random = np.random.default_rng(0)
    kernel, slot = random.normal(size=(2, 50)).astype("float32")
    variables = [Variable("kernel", True), Variable("slot", False), Variable("seed", False)]
    before = [kernel, slot, np.array(3)]
    return variables, before, [kernel + 0.01, slot * 1.1, np.array(4)]


def test_equal_steps_agree_up_to_rounding():
    variables, before, after = state()
    assert same_step(variables, before, after, after) == ""
    rounded = [after[0] * (1 + 1e-7), after[1] * (1 + 1e-7), after[2]]
    assert same_step(variables, before, after, rounded) == ""


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_wrong_variable_is_named(wrong):
    variables, before, after = state()
    got = list(after)
    got[wrong] = got[wrong] + (1 if wrong == 2 else 0.5 * (after[wrong] - before[wrong]))
    assert variables[wrong].name in same_step(variables, before, after, got)
    assert STEP_TOLERANCE < 0.5


def test_a_result_that_is_not_a_number_does_not_agree():
    variables, before, after = state()
    assert same_step(variables, before, after, [after[0] * np.nan, *after[1:]])


@pytest.mark.parametrize("wrong", [0, 1])
def test_without_slots_every_weight_is_held_against_its_own_change(wrong):
    """A bias moves little beside a kernel; with SGD its change is checked all the same."""
    random = np.random.default_rng(0)
    before = [random.normal(size=(40, 40)).astype("float32"), np.zeros(40, "float32")]
    after = [before[0] + 0.1, before[1] + 0.003]
    variables = [Variable("kernel", True), Variable("bias", True)]
    assert same_step(variables, before, after, after) == ""
    got = list(after)
    got[wrong] = got[wrong] + 0.5 * (after[wrong] - before[wrong])
    assert variables[wrong].name in same_step(variables, before, after, got)
