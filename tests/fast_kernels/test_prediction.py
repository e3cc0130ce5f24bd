"""`predict` of a model with kernels: Keras's results, callbacks and errors, without its pipeline."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel


def pair(helpers, kind="sequential", **options):
    """The same model plain and with kernels."""
    accelerator = tfaccel.Accelerator(kernels="fused", jit=False, **options)
    with accelerator.scope():
        fused = helpers.compile(helpers.build(kind), **accelerator.compile_options())
    plain = helpers.compile(helpers.build(kind), jit_compile=False)
    plain.set_weights(fused.get_weights())
    return plain, fused


@pytest.mark.parametrize("kind", ["sequential", "functional", "subclassed"])
@pytest.mark.parametrize("batch_size", [None, 7, 240, 500])
def test_arrays_give_what_keras_gives(helpers, small, kind, batch_size):
    plain, fused = pair(helpers, kind)
    for x in (small[0], small[0].astype("float64"), tf.constant(small[0])):
        expected = plain.predict(x, batch_size=batch_size, verbose=0)
        got = fused.predict(x, batch_size=batch_size, verbose=0)
        assert isinstance(got, np.ndarray)
        # The same operations on the same batches.
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_other_data_go_keras_own_way(helpers, small):
    plain, fused = pair(helpers)
    x = small[0]

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return (x[60 * i : 60 * i + 60],)

    expected = plain.predict(x, verbose=0)
    for data in (tf.data.Dataset.from_tensor_slices(x).batch(50), Batches()):
        np.testing.assert_allclose(fused.predict(data, verbose=0), expected, rtol=1e-5, atol=1e-6)


def test_callbacks_steps_and_single_batches(helpers, small):
    class Noting(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.batches, self.rows = [], 0

        def on_predict_batch_end(self, batch, logs=None):
            self.batches.append(batch)
            self.rows += len(logs["outputs"])

    plain, fused = pair(helpers, steps_per_execution=3)
    noting = Noting()
    fused.predict(small[0], verbose=0, callbacks=[noting])
    assert noting.rows == 240
    assert noting.batches == [2, 5, 8]
    some = fused.predict(small[0], verbose=0, steps=2, batch_size=30)
    np.testing.assert_allclose(
        some, plain.predict(small[0][:90], verbose=0)[: len(some)], rtol=1e-5, atol=1e-6
    )
    one = fused.predict_on_batch(small[0][:5])
    np.testing.assert_allclose(one, plain.predict_on_batch(small[0][:5]), rtol=1e-5, atol=1e-6)


def test_dictionaries_in_and_out():
    layers = keras.layers
    a, b = keras.Input((3,), name="a"), keras.Input((2,), dtype="int32", name="b")
    x = layers.Concatenate()([a, layers.Flatten()(layers.Embedding(5, 2)(b))])
    accelerator = tfaccel.Accelerator(kernels="fused")
    with accelerator.scope():
        model = keras.Model({"a": a, "b": b}, {"one": layers.Dense(1)(x), "two": [x, x]})
        model.compile("sgd", **accelerator.compile_options())
    data = {"a": np.random.default_rng(0).normal(size=(70, 3)), "b": np.ones((70, 2), "int32")}
    got = model.predict(data, verbose=0)
    expected = keras.Model.predict(model, tf.data.Dataset.from_tensor_slices((data,)).batch(32), verbose=0)
    keras.tree.map_structure(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-5), got, expected)


def test_one_trace_serves_every_call(helpers, small):
    traces = []

    class Noting(keras.layers.Layer):
        def call(self, x):
            traces.append(x.shape)
            return x

    accelerator = tfaccel.Accelerator(kernels="fused")
    with accelerator.scope():
        model = keras.Sequential([keras.Input((7, 7, 1)), Noting(), keras.layers.Flatten()])
        model.compile("sgd", **accelerator.compile_options())
    traces.clear()
    for samples in (64, 320, 32):
        model.predict(np.resize(small[0], (samples, 7, 7, 1)), verbose=0)
    assert len(traces) == 1


@pytest.mark.parametrize(
    "x", [np.zeros((0, 7, 7, 1), "float32"), np.zeros((4, 3, 3, 1), "float32"), "text", None]
)
def test_bad_input_gets_the_error_of_keras(helpers, x):
    errors = []
    for model in pair(helpers):
        with pytest.raises(Exception) as caught:
            model.predict(x, verbose=0)
        errors.append(type(caught.value))
    assert errors[0] is errors[1]


def test_a_predict_of_the_users_own_stays(helpers, small):
    class Own(helpers.Subclassed):
        def predict(self, x, **options):
            return super().predict(x * 0, **options)

    accelerator = tfaccel.Accelerator(kernels="fused")
    with accelerator.scope():
        model = helpers.compile(Own(), **accelerator.compile_options())
    outputs = model.predict(small[0], verbose=0)
    np.testing.assert_allclose(outputs, np.broadcast_to(outputs[:1], outputs.shape), atol=1e-6)
