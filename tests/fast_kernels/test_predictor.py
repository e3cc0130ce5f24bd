"""`predictor`: the numbers of `model.predict`, from any thread, in bounded memory."""

import gc
import threading
import weakref

import keras
import numpy as np
import pytest

import tfaccel


def assert_equal_outputs(a, b):
    # One program against another over the same ops: rounding of fused elementwise chains only.
    keras.tree.map_structure(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


@pytest.mark.parametrize("kind", ["sequential", "functional", "subclassed"])
@pytest.mark.parametrize("jit", [False, True])
def test_it_gives_what_predict_gives(helpers, small, kind, jit):
    model = helpers.build(kind)
    predict = tfaccel.predictor(model, jit=jit)
    for samples in (1, 3, 1):
        assert_equal_outputs(predict(small[0][:samples]), model.predict(small[0][:samples], verbose=0))
    assert isinstance(predict(small[0][:1]), np.ndarray)
    assert "2 of 16" in repr(predict)


def test_nested_inputs_and_outputs_other_dtypes_and_an_unbuilt_model():
    layers = keras.layers
    words, number = keras.Input((3,), dtype="int32", name="words"), keras.Input((2,), name="number")
    x = layers.Concatenate()([layers.Flatten()(layers.Embedding(9, 2)(words)), number])
    model = keras.Model({"words": words, "number": number}, {"a": layers.Dense(1)(x), "b": [x, x]})
    inputs = {"words": np.array([[1, 2, 8]]), "number": np.array([[0.5, 1.5]], "float64")}
    assert_equal_outputs(tfaccel.predictor(model)(inputs), model.predict(inputs, verbose=0))

    class Lazy(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, x, training=None):
            return self.dense(x) + (1.0 if training else 0.0)

    lazy = Lazy()
    assert_equal_outputs(tfaccel.predictor(lazy)(np.ones((2, 3))), lazy.predict(np.ones((2, 3)), verbose=0))


def test_the_same_shapes_in_another_structure_are_another_program():
    a, b = keras.Input((2,), name="query"), keras.Input((2,), name="document")
    model = keras.Model([a, b], keras.layers.Subtract()([a, b]))
    predict = tfaccel.predictor(model)
    query, document = np.full((1, 2), 5.0), np.full((1, 2), 3.0)
    np.testing.assert_array_equal(predict({"query": query, "document": document}), [[2.0, 2.0]])
    np.testing.assert_array_equal(predict([query, document]), [[2.0, 2.0]])


def test_training_on_is_seen(helpers, small):
    model = helpers.compile(helpers.build())
    predict = tfaccel.predictor(model)
    before = predict(small[0][:2])
    model.fit(*small, verbose=0)
    assert np.abs(predict(small[0][:2]) - before).max() > 1e-4
    assert_equal_outputs(predict(small[0][:2]), model.predict(small[0][:2], verbose=0))


def test_memory_does_not_grow_with_new_shapes(helpers, small):
    predict = tfaccel.predictor(helpers.build(), max_shapes=2)
    predict(small[0][:1])
    (first,) = predict._programs.values()
    gone = weakref.ref(first)
    del first
    for samples in range(2, 6):
        predict(small[0][:samples])
        assert len(predict._programs) <= 2
    gc.collect()
    assert gone() is None
    # The one that was used last stays.
    kept = predict._programs[next(reversed(predict._programs))]
    predict(small[0][:5])
    assert predict._programs[next(reversed(predict._programs))] is kept


def test_threads_get_their_own_answers(helpers, small):
    model = helpers.build()
    predict = tfaccel.predictor(model, max_shapes=2)
    expected = {n: model.predict(small[0][:n], verbose=0) for n in range(1, 5)}
    failures, done = [], []

    def work(n):
        for _ in range(5):
            try:
                assert_equal_outputs(predict(small[0][:n]), expected[n])
                done.append(n)
            except AssertionError as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(done) == 20


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"model": "model.keras"}, "model=str"),
        ({"max_shapes": 0}, "max_shapes=0"),
        ({"max_shapes": True}, "max_shapes=True"),
    ],
)
def test_bad_arguments_say_what_is_allowed(helpers, arguments, text):
    with pytest.raises(ValueError, match=text) as caught:
        tfaccel.predictor(**{"model": helpers.build(), **arguments})
    assert "Allowed" in str(caught.value)


def test_a_single_number_is_refused(helpers):
    with pytest.raises(ValueError, match="sample axis"):
        tfaccel.predictor(helpers.build())(1.0)
