"""Each fix does its work and comes off; each canary fails on the day upstream heals."""

import contextlib
import warnings

import keras
import pytest
import tensorflow as tf

from tfaccel.keras_fixes import compile_checks, shuffle_warning
from tfaccel.keras_fixes.callback_siblings import siblings


def dataset(small):
    return tf.data.Dataset.from_tensor_slices(small).batch(24)


def test_canary_keras_warns_of_its_own_default(helpers, small):
    model = helpers.compile(helpers.build())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(dataset(small), verbose=0)
    assert any(str(w.message).startswith(shuffle_warning.MESSAGE) for w in caught)


def test_shuffle_warning_filters_that_message_only(helpers, small):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shuffle_warning.silence()
        shuffle_warning.silence()
        helpers.compile(helpers.build()).fit(dataset(small), verbose=0)
        with pytest.raises(UserWarning, match="another"):
            warnings.warn("another", stacklevel=1)


def test_siblings_are_those_of_the_running_fit_in_order(helpers, small):
    found = {}

    class Look(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            found["train"] = siblings(self)

        def on_epoch_end(self, epoch, logs=None):
            found["epoch"] = siblings(self)

    look, other = Look(), keras.callbacks.TerminateOnNaN()
    helpers.compile(helpers.build()).fit(*small, verbose=0, callbacks=[other, look])
    for hook in ("train", "epoch"):
        assert found[hook][:2] == [other, look]
        assert isinstance(found[hook][-1], keras.callbacks.History)


def test_siblings_through_the_users_own_callback_list(helpers, small):
    found = []

    class Look(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            found.extend(siblings(self))

    look = Look()
    model = helpers.compile(helpers.build())
    own = keras.callbacks.CallbackList([look], add_history=True, model=model, epochs=1, steps=1)
    model.fit(*small, verbose=0, callbacks=own)
    assert look in found
    assert siblings(look) == [look], "outside of a fit there are none"


def test_canary_a_callback_knows_no_siblings():
    known = set(vars(keras.callbacks.Callback())) | set(dir(keras.callbacks.Callback))
    assert not known & {"callbacks", "siblings", "callback_list"}


def test_canary_keras_compiles_a_model_of_another_policy(helpers):
    model = helpers.build()
    keras.config.set_dtype_policy("mixed_bfloat16")
    helpers.compile(model)
    keras.config.set_dtype_policy("float32")
    assert model.layers[0].compute_dtype == "float32"


@contextlib.contextmanager
def mirrored():
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    with strategy.scope():
        yield strategy


def test_canary_keras_compiles_a_model_of_another_strategy(helpers, small):
    model = helpers.build()
    with mirrored():
        helpers.compile(model)
    with pytest.raises(RuntimeError, match=r"strategy\.scope|Mixing different"):
        model.fit(*small, verbose=0)


@pytest.mark.parametrize(
    "options", [{"gradient_accumulation_steps": 2}, {"use_ema": True, "ema_overwrite_frequency": 2}]
)
def test_canary_branching_optimizers_fail_under_a_strategy(helpers, small, options):
    with mirrored():
        model = helpers.compile(helpers.build(), keras.optimizers.Adam(**options))
    with pytest.raises(RuntimeError, match="merge_call"):
        model.fit(*small, batch_size=24, verbose=0)


def test_compile_checks_are_gone_after_the_block(helpers):
    original = keras.Model.compile
    strategy = tf.distribute.get_strategy()
    with compile_checks.refuse_at_compile(strategy, keras.DTypePolicy("mixed_bfloat16")):
        assert keras.Model.compile is not original
    assert keras.Model.compile is original
