"""What every callback asks of the running fit."""

import keras
import pytest
import tensorflow as tf

import tfaccel


class OwnOptimizer(keras.Model):
    """Applies an optimizer of its own, as a GAN does; the one that Keras gives it makes no update."""

    def __init__(self):
        super().__init__()
        self.flatten, self.head = keras.layers.Flatten(), keras.layers.Dense(10)
        self.own = keras.optimizers.SGD(0.1)

    def call(self, inputs):
        return self.head(self.flatten(inputs))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.own.apply(gradients, self.trainable_variables)
        return {"loss": loss}


@pytest.mark.parametrize(
    "callback",
    [
        tfaccel.OneCycle(1e-2),
        tfaccel.WarmupCosine(1e-2),
        tfaccel.PruneWeights(0.5),
        tfaccel.LayerLearningRates({keras.layers.Dense: 0.5}),
    ],
    ids=lambda callback: type(callback).__name__,
)
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_optimizers_that_fit_does_not_know_are_named(helpers, small, callback, policy):
    keras.config.set_dtype_policy(policy)
    model = OwnOptimizer()
    model(small[0][:1])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.own.build(model.trainable_variables)
    model.compile("rmsprop", loss)  # which mixed_float16 wraps in loss scaling
    keras.config.set_dtype_policy("float32")
    with pytest.raises(ValueError, match=r"a RMSprop, which made none .* 'own_optimizer"):
        model.fit(*small, epochs=3, verbose=0, callbacks=[callback])
    model.fit(*small, verbose=0)


def test_loss_scaling_that_skips_a_whole_epoch_is_no_reason(helpers, small):
    """A scale that overflows in each of three steps, and is halved."""
    adam = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), initial_scale=2.0**126)
    model = helpers.compile(helpers.build(), adam)
    few = small[0][:72] * 1e4, small[1][:72]
    model.fit(*few, batch_size=24, epochs=2, verbose=0, callbacks=[tfaccel.OneCycle(1e-3)])
    assert float(adam.dynamic_scale) < 2.0**126


def test_accumulation_over_more_than_an_epoch_is_no_reason(helpers, small):
    """Five batches an epoch, an update every seven."""
    model = helpers.compile(helpers.build(), keras.optimizers.SGD(0.1, gradient_accumulation_steps=7))
    prune = tfaccel.PruneWeights(0.5)
    history = model.fit(*small, batch_size=48, epochs=4, verbose=0, callbacks=[prune]).history
    assert history["sparsity"][-1] == pytest.approx(0.5, abs=0.01)


@pytest.mark.filterwarnings("ignore:The training ended after 0 updates")  # which PruneWeights tells
@pytest.mark.parametrize("callback", [tfaccel.OneCycle(1e-2), tfaccel.PruneWeights(0.5)])
def test_a_fit_that_is_stopped_before_its_first_update_is_no_reason(helpers, small, callback):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = True

    model = helpers.compile(helpers.build(), keras.optimizers.SGD(0.1, gradient_accumulation_steps=4))
    model.fit(*small, batch_size=24, epochs=3, verbose=0, callbacks=[callback, Stop()])


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
def test_a_model_with_nothing_to_train_is_no_reason(helpers, small):
    model = helpers.build()
    model.trainable = False
    helpers.compile(model)
    model.fit(*small, verbose=0, callbacks=[tfaccel.OneCycle(1e-2)])
