"""The seam: an update held through every way of running a step, and taken off again."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_fits import Interrupt

from tfaccel.fit._weights import WeightUpdates


def mask_update(shape, seed=0):
    """A function that zeroes half of the weight, and where the zeros are."""
    keep = (np.random.default_rng(seed).random(shape) > 0.5).astype("float32")
    return (lambda value: value * keras.ops.cast(keep, value.dtype)), keep == 0


class Masked(keras.callbacks.Callback):
    """Holds masks on all kernels for one fit."""

    def on_train_begin(self, logs=None):
        kernels = [v for v in self.model.trainable_variables if len(v.shape) > 1]
        pairs = [mask_update(v.shape) for v in kernels]
        self.zeros = [(v, zeros) for v, (_, zeros) in zip(kernels, pairs, strict=True)]
        updates = [(v, update) for v, (update, _) in zip(kernels, pairs, strict=True)]
        self.updates = WeightUpdates(self.model, updates)
        self.updates.attach()

    def on_train_end(self, logs=None):
        self.updates.reapply()
        self.updates.detach()

    def held(self):
        return all((np.asarray(v)[zeros] == 0).all() for v, zeros in self.zeros)


def fit(helpers, small, callbacks=(), optimizer=None, kind="sequential", epochs=2, **options):
    model = helpers.compile(helpers.build(kind), optimizer, **options)
    model.fit(*small, batch_size=24, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks))
    return model


AXES = [
    ("float32", False, 1, None, "sequential"),
    ("float32", True, 4, 2, "subclassed"),
    ("mixed_bfloat16", False, 4, None, "functional"),
    ("mixed_bfloat16", True, 1, 2, "sequential"),
    ("mixed_float16", False, 1, 2, "functional"),
    ("mixed_float16", True, 4, None, "sequential"),
    ("mixed_float16", False, 4, None, "subclassed"),
]


@pytest.mark.parametrize(("policy", "jit", "steps", "accumulation", "kind"), AXES)
def test_holds_in_every_kind_of_step(helpers, small, policy, jit, steps, accumulation, kind):
    keras.config.set_dtype_policy(policy)
    masked = Masked()
    adam = keras.optimizers.Adam(1e-2, gradient_accumulation_steps=accumulation)
    model = fit(helpers, small, [masked], adam, kind, jit_compile=jit, steps_per_execution=steps)
    keras.config.set_dtype_policy("float32")
    assert len(masked.zeros) == 2
    assert masked.held()
    free = [np.asarray(v)[~zeros] for v, zeros in masked.zeros]
    assert all((values != 0).mean() > 0.99 for values in free)
    assert all(v.constraint is None for v in model.trainable_variables)


def test_identity_is_bit_identical(helpers, small):
    class Nothing(Masked):
        def on_train_begin(self, logs=None):
            updates = [(v, lambda value: value) for v in self.model.trainable_variables]
            self.updates = WeightUpdates(self.model, updates)
            self.updates.attach()

    expected, actual = fit(helpers, small), fit(helpers, small, [Nothing()])
    for a, b in zip(actual.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_trap_a_attaching_after_an_earlier_fit(helpers, small):
    model = fit(helpers, small)
    masked = Masked()
    model.fit(*small, batch_size=24, verbose=0, callbacks=[masked])
    assert masked.held()


def test_trap_b_detaching(helpers, small):
    masked = Masked()
    model = fit(helpers, small, [masked])
    model.fit(*small, batch_size=24, verbose=0)
    assert not masked.held(), "the plain fit behind it must move all weights"


def test_trap_c_ema_overwrites_at_the_end(helpers, small):
    masked = Masked()
    fit(helpers, small, [masked], keras.optimizers.Adam(1e-2, use_ema=True))
    assert masked.held()


def test_trap_d_interrupted_fit(helpers, small):
    masked = Masked()
    model = helpers.compile(helpers.build())
    with pytest.raises(KeyboardInterrupt):
        model.fit(*small, batch_size=24, verbose=0, callbacks=[masked, Interrupt()])
    assert masked.held()
    model.fit(*small, batch_size=24, verbose=0)
    assert not masked.held()
    assert all(v.constraint is None for v in model.trainable_variables)
    assert "make_train_function" not in vars(model)


def test_the_users_constraint_stays_first_in_the_chain(small):
    model = keras.Sequential(
        [
            keras.Input((49,)),
            keras.layers.Dense(10, kernel_constraint=keras.constraints.MaxNorm(0.1)),
        ]
    )
    own = model.layers[0].kernel.constraint
    model.compile(keras.optimizers.SGD(1.0), "sparse_categorical_crossentropy")
    masked = Masked()
    model.fit(small[0].reshape(240, 49), small[1], epochs=2, verbose=0, callbacks=[masked])
    assert masked.held()
    norms = np.linalg.norm(model.get_weights()[0], axis=0)
    # MaxNorm divides by norm + 1e-7, and the mask only takes away.
    assert (norms <= 0.1 + 1e-5).all()
    assert model.layers[0].kernel.constraint is own


def test_two_updates_on_one_weight_come_off_in_any_order(helpers):
    model = helpers.compile(helpers.build())
    kernel = model.trainable_variables[0]
    first_update, first_zeros = mask_update(kernel.shape, 1)
    second_update, second_zeros = mask_update(kernel.shape, 2)
    first = WeightUpdates(model, [(kernel, first_update)])
    second = WeightUpdates(model, [(kernel, second_update)])
    first.attach()
    second.attach()
    assert (np.asarray(kernel)[first_zeros | second_zeros] == 0).all()
    first.detach()
    kernel.assign(np.ones(kernel.shape, "float32"))
    second.reapply()
    np.testing.assert_array_equal(np.asarray(kernel) == 0, second_zeros)
    second.detach()
    second.detach()
    assert kernel.constraint is None


def test_holds_under_mirrored_strategy(helpers, small):
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    masked = Masked()
    with strategy.scope():
        model = helpers.compile(helpers.build())
    model.fit(*small, batch_size=24, epochs=1, verbose=0, callbacks=[masked])
    assert masked.held()


@pytest.mark.parametrize("layer", ["grouped", "separable", "embedding", "attention", "lstm", "twice"])
def test_holds_on_other_layers(layer):
    layers = keras.layers
    generator = np.random.default_rng(0)
    x = generator.random((64, 6, 6, 4), dtype="float32")
    inputs = keras.Input((6, 6, 4))
    flat = layers.Reshape((6, 24))(inputs)
    if layer == "grouped":
        y = layers.Flatten()(layers.Conv2D(8, 3, groups=2)(inputs))
    elif layer == "separable":
        y = layers.Flatten()(layers.SeparableConv2D(8, 3)(inputs))
    elif layer == "attention":
        y = layers.Flatten()(layers.MultiHeadAttention(2, 4)(flat, flat))
    elif layer == "lstm":
        y = layers.LSTM(8)(flat)
    elif layer == "twice":
        shared = layers.Dense(24)
        y = layers.Flatten()(shared(shared(flat)))
    else:
        x = generator.integers(0, 20, (64, 8))
        inputs = keras.Input((8,), dtype="int32")
        y = layers.Flatten()(layers.Embedding(20, 8)(inputs))
    model = keras.Model(inputs, layers.Dense(3)(y))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    masked = Masked()
    model.fit(x, generator.integers(0, 3, 64), batch_size=16, verbose=0, callbacks=[masked])
    assert len(masked.zeros) >= 2
    assert masked.held()


def test_saved_file_needs_no_tfaccel(helpers, small, tmp_path):
    class Save(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.save(tmp_path / "meanwhile.keras")

    masked = Masked()
    model = fit(helpers, small, [masked, Save()], epochs=1)
    loaded = keras.models.load_model(tmp_path / "meanwhile.keras", safe_mode=True)
    for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_variable_of_another_model_is_refused(helpers):
    model, other = helpers.compile(helpers.build()), helpers.build()
    with pytest.raises(ValueError, match="not a trainable variable"):
        WeightUpdates(model, [(other.trainable_variables[0], lambda value: value)])
