"""What a `fit` leaves behind that was interrupted, and what may happen in the middle of one."""

import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel
from tfaccel import schedules
from tfaccel.keras_fixes.random_state import random_state_kept

layers = keras.layers
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(64, 4)).astype("float32")
Y = RANDOM.normal(size=(64, 2)).astype("float32")


def net(optimizer="sgd", **options):
    keras.utils.set_random_seed(1)
    sequence = [layers.Dense(16, name="a"), layers.Dense(8, name="b"), layers.Dense(2, name="c")]
    model = keras.Sequential([keras.Input((4,)), *sequence])
    model.compile(optimizer, "mse", jit_compile=False, **options)
    return model


class Stop(keras.callbacks.Callback):
    """Interrupts a `fit` in its epoch 2, at the first batch, as Ctrl-C does."""

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if self.epoch == 2:
            raise KeyboardInterrupt


def interrupt(model, *callbacks, epochs=4):
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, epochs=epochs, verbose=0, callbacks=[*callbacks, Stop()])


CALLBACKS = {
    "schedule": lambda: tfaccel.OneCycle(0.1),
    "plateau": lambda: tfaccel.LearningRate(
        0.1, schedules.constant(), plateau=tfaccel.Plateau("loss", factor=0.5, patience=1, min_delta=1e3)
    ),
    "shares": lambda: tfaccel.LayerLearningRates({"a": 0.1}),
    "unfreeze": lambda: tfaccel.UnfreezeLayers({"a": 3}, unit="epochs"),
    "prune": lambda: tfaccel.PruneWeights(0.5),
    "cluster": lambda: tfaccel.ClusterWeights(4),
    "quantize": lambda: tfaccel.QuantizeAware(2, None),
    "profile": lambda: tfaccel.Profile(verbose=0),
    "distill": lambda: tfaccel.Distill(net()),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_the_same_callback_in_another_model_leaves_the_first_plain(name):
    first, second = net("adam"), net("adam")
    rate = float(first.optimizer.learning_rate)
    callback = CALLBACKS[name]()
    interrupt(first, callback)
    second.fit(X, Y, epochs=5, verbose=0, callbacks=[callback])
    before = first.get_weights()[0]
    first.fit(X, Y, verbose=0)
    for model in (first, second):
        assert float(model.optimizer.learning_rate) == rate
        assert all(layer.trainable for layer in model.layers)
        assert all(v.constraint is None and type(v).__name__ == "Variable" for v in model.trainable_variables)
        assert not {"make_train_function", "make_test_function", "train_step", "compute_loss"} & set(
            vars(model)
        )
        assert not {"apply", "_backend_update_step"} & set(vars(model.optimizer))
    assert not np.array_equal(first.get_weights()[0], before)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_model_can_go_behind_an_interrupted_fit(name):
    model = net()
    gone = weakref.ref(model)
    interrupt(model, CALLBACKS[name]())
    del model
    keras.backend.clear_session()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("ask", ["evaluate", "predict"])
def test_what_comes_next_is_that_of_the_plain_model(ask):
    def answer(model):
        return model.evaluate(X, Y, verbose=0) if ask == "evaluate" else model.predict(X, verbose=0)

    model = net()
    callbacks = [tfaccel.QuantizeAware(2, None), Stop()]
    with pytest.raises(KeyboardInterrupt):  # validation has traced the rounded model
        model.fit(X, Y, epochs=4, verbose=0, validation_data=(X, Y), callbacks=callbacks)
    twin = net()
    twin.set_weights(model.get_weights())
    np.testing.assert_allclose(answer(model), answer(twin), rtol=1e-6)


@pytest.mark.parametrize("act", ["train_on_batch", "evaluate", "predict"])
def test_a_callback_of_the_users_does_not_end_what_others_do(act):
    class Between(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            arguments = (X,) if act == "predict" else (X, Y)
            quiet = {} if act == "train_on_batch" else {"verbose": 0}
            getattr(self.model, act)(*arguments, **quiet)

    model = net()
    prune, rate = tfaccel.PruneWeights(0.5), tfaccel.LearningRate(0.1, schedules.linear())
    history = model.fit(X, Y, epochs=4, verbose=0, callbacks=[rate, prune, Between()]).history
    assert history["sparsity"][-1] == pytest.approx(0.5, abs=0.01)
    assert history["learning_rate"] == sorted(history["learning_rate"], reverse=True)
    assert np.mean(model.layers[1].get_weights()[0] == 0) == 0.5


def test_pruning_where_a_step_leaves_weights_out():
    class Partial(keras.Sequential):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
            weights = [v for layer in self.layers[1:] for v in layer.trainable_variables]
            self.optimizer.apply(tape.gradient(loss, weights), weights)
            return {"loss": loss}

    sequence = [layers.Dense(16), layers.Dense(16), layers.Dense(2)]
    model = Partial([keras.Input((4,)), *sequence])
    model.compile("sgd", jit_compile=False)
    prune = tfaccel.PruneWeights(0.5, layers=[layer.name for layer in sequence])
    model.fit(X, Y, epochs=4, verbose=0, callbacks=[prune])
    zeros = [np.mean(layer.get_weights()[0] == 0) for layer in sequence]
    assert zeros[1:] == [0.5, 0.5]


def test_shuffling_goes_on_as_if_a_trial_had_not_been():
    order = tf.range(100)
    keras.utils.set_random_seed(3)
    expected = [tf.random.shuffle(order).numpy() for _ in range(3)]
    keras.utils.set_random_seed(3)
    found = [tf.random.shuffle(order).numpy()]
    with random_state_kept():
        for _ in range(5):
            tf.random.shuffle(order)
    found += [tf.random.shuffle(order).numpy() for _ in range(2)]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["profile", "finder"])
def test_losses_that_are_not_summed_up(name):
    model = net()
    model.compile("adam", keras.losses.MeanSquaredError(reduction=None), jit_compile=False)
    if name == "finder":
        assert np.isfinite(tfaccel.find_learning_rate(model, (X, Y), batch_size=16, steps=20).losses).all()
    else:
        model.fit(X, Y, verbose=0, callbacks=[tfaccel.Profile(verbose=0)])


def test_two_quantizations_in_a_fit_are_refused():
    both = [tfaccel.QuantizeAware(8, None), tfaccel.QuantizeAware(4, None, layers=["b"])]
    with pytest.raises(ValueError, match="Two QuantizeAware run in this fit"):
        net().fit(X, Y, verbose=0, callbacks=both)
