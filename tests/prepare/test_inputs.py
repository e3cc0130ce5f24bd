"""The pipeline yields what `fit` would have been fed: same samples, same order, same batches."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel
from tfaccel.prepare.inputs import make_dataset

X = np.arange(50 * 3, dtype="float32").reshape(50, 3)
Y = np.arange(50, dtype="int32")


@pytest.fixture(scope="module")
def accelerator():
    return tfaccel.Accelerator("one_device", "float32")


def read(dataset):
    return list(dataset.as_numpy_iterator())


def test_arrays_in_order_with_the_partial_batch(accelerator):
    batches = read(accelerator.dataset(X, Y, batch_size=16, shuffle=False))
    assert [len(x) for x, _ in batches] == [16, 16, 16, 2]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), X)
    np.testing.assert_array_equal(np.concatenate([y for _, y in batches]), Y)


def test_batch_size_is_32_as_in_fit(accelerator):
    assert [len(x) for x, _ in read(accelerator.dataset(X, Y))] == [32, 18]


def test_length_is_known(accelerator):
    assert int(accelerator.dataset(X, Y, batch_size=16).cardinality()) == 4


def test_batch_size_is_static_without_a_partial_batch(accelerator):
    assert accelerator.dataset(X, Y, batch_size=25).element_spec[0].shape == (25, 3)
    assert accelerator.dataset(X, Y, batch_size=16).element_spec[0].shape.as_list() == [None, 3]


def test_one_array_is_handed_over_bare_as_fit_does(accelerator):
    (batch,) = read(accelerator.dataset(X, batch_size=50, shuffle=False))
    np.testing.assert_array_equal(batch, X)


def test_shuffle_draws_a_new_order_every_epoch(accelerator):
    dataset = accelerator.dataset(X, Y, batch_size=16)
    epochs = [read(dataset) for _ in range(2)]
    orders = [np.concatenate([y for _, y in epoch]) for epoch in epochs]
    assert not np.array_equal(*orders)
    for epoch, order in zip(epochs, orders, strict=True):
        assert sorted(order) == list(Y)
        np.testing.assert_array_equal(np.concatenate([x for x, _ in epoch]), X[order])


@pytest.mark.filterwarnings("ignore")
def test_canary_keras_repeats_the_order_of_a_seeded_fit():
    """Fails on the day Keras draws a new order per epoch after `set_random_seed`."""

    first_rows = []

    class Note(keras.Sequential):
        def train_step(self, data):
            first_rows.append(int(data[0][0, 0]))
            return super().train_step(data)

    keras.utils.set_random_seed(0)
    model = Note([keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(X, Y, batch_size=50, epochs=4, verbose=0)
    assert len(first_rows) == 4
    assert len(set(first_rows)) == 1


def test_shuffle_follows_the_global_seed(accelerator):
    orders = []
    for _ in range(2):
        keras.utils.set_random_seed(5)
        orders.append(np.concatenate([y for _, y in read(accelerator.dataset(X, Y))]))
    np.testing.assert_array_equal(*orders)


def test_structures_and_weights(accelerator):
    x, y = {"a": X, "b": [X[:, 0], X[:, 1]]}, (Y, -Y)
    (batch,) = read(accelerator.dataset(x, y, sample_weight=Y * 0.5, batch_size=50, shuffle=False))
    np.testing.assert_array_equal(batch[0]["b"][1], X[:, 1])
    np.testing.assert_array_equal(batch[1][1], -Y)
    np.testing.assert_array_equal(batch[2], (Y * 0.5).astype("float32"))


def test_a_tuple_is_x_y(accelerator):
    a = read(accelerator.dataset((X, Y), batch_size=25, shuffle=False))
    b = read(accelerator.dataset(X, Y, batch_size=25, shuffle=False))
    assert all((u == v).all() for p, q in zip(a, b, strict=True) for u, v in zip(p, q, strict=True))


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8", "int64", "bool", "U3", "S3"])
def test_dtypes_are_those_that_fit_would_feed(accelerator, dtype):
    x = X.astype(dtype)
    (batch,) = read(accelerator.dataset(x, batch_size=50, shuffle=False))
    if np.issubdtype(x.dtype, np.floating):
        assert batch.dtype == "float32"
        np.testing.assert_array_equal(batch, x.astype("float32"))
    elif x.dtype.kind in "US":
        assert [v.decode() for v in batch.ravel()] == [
            np.str_(v) if x.dtype.kind == "U" else v.decode() for v in x.ravel()
        ]
    else:
        assert batch.dtype == x.dtype


def test_tensors_and_frames(accelerator):
    pytest.importorskip("pandas")
    import pandas

    frame = pandas.DataFrame(X)
    (batch,) = read(accelerator.dataset(frame, tf.constant(Y), batch_size=50, shuffle=False))
    np.testing.assert_array_equal(batch[0], X)


def test_lists_stay_structures_and_train_as_in_fit(accelerator):
    first, second = keras.Input((3,)), keras.Input((3,))
    outputs = [keras.layers.Dense(1)(first), keras.layers.Dense(1)(second)]
    model = keras.Model([first, second], outputs)
    start = model.get_weights()
    results = []
    for prepared in (False, True):
        model.set_weights(start)
        model.compile("sgd", ["mse", "mse"])
        x, y = [X / 150, -X / 150], [X[:, :1], X[:, 1:2]]
        if prepared:
            model.fit(accelerator.dataset(x, y, shuffle=False), verbose=0)
        else:
            model.fit(x, y, shuffle=False, verbose=0)
        results.append(model.get_weights())
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_pandas_as_fit_takes_it(accelerator):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": np.arange(4), "b": np.arange(4) / 2, "c": np.arange(4) > 1})
    ((x, y),) = read(accelerator.dataset(frame, frame["b"], shuffle=False))
    assert x.dtype == "float32"
    np.testing.assert_array_equal(x, frame.to_numpy("float32"))
    assert y.shape == (4, 1)


def test_generator_whose_sizes_vary(accelerator):
    lengths = [5, 7, 9, 4]
    batches = ((np.ones((2, n)), np.ones(2)) for n in lengths)
    assert [x.shape for x, _ in read(accelerator.dataset(batches))] == [(2, n) for n in lengths]


def test_a_dataset_keeps_its_batches_and_its_options(accelerator):
    policy = tf.data.experimental.AutoShardPolicy
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)
    again = accelerator.dataset(dataset)
    assert [len(x) for x, _ in read(again)] == [16, 16, 16, 2]
    assert again.options().experimental_distribute.auto_shard_policy == policy.DATA
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = policy.OFF
    kept = accelerator.dataset(dataset.with_options(options))
    assert kept.options().experimental_distribute.auto_shard_policy == policy.OFF


def test_a_random_pipeline_is_not_frozen(accelerator):
    tf.random.set_seed(None)
    dataset = tf.data.Dataset.range(4).map(lambda i: tf.random.uniform([2])).batch(4)
    prepared = accelerator.dataset(dataset)
    assert not np.array_equal(read(prepared), read(prepared))


def test_generator(accelerator):
    def batches():
        for i in range(0, 50, 16):
            yield X[i : i + 16].astype("float64"), Y[i : i + 16]

    found = read(accelerator.dataset(batches()))
    assert [len(x) for x, _ in found] == [16, 16, 16, 2]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in found]), X)
    assert found[0][0].dtype == "float32"


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return X[index * 16 : index * 16 + 16], Y[index * 16 : index * 16 + 16]


def test_pydataset_comes_back_as_it_is(accelerator):
    batches = Batches()
    assert accelerator.dataset(batches) is batches


def sources(x, y):
    return {
        "arrays": lambda: (x, y),
        "dataset": lambda: tf.data.Dataset.from_tensor_slices((x, y)).batch(16),
        "generator": lambda: ((x[i : i + 16], y[i : i + 16]) for i in range(0, len(x), 16)),
    }


@pytest.mark.parametrize("source", ["arrays", "dataset", "generator"])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras, of generators
def test_training_is_bit_identical_to_arrays(accelerator, helpers, small, source, steps):
    x, y = small
    results = []
    for prepared in (False, True):
        model = helpers.compile(helpers.build(), steps_per_execution=steps if prepared else 1)
        data = sources(x, y)[source]()
        if prepared:
            arguments = {"batch_size": 16, "shuffle": False} if source == "arrays" else {}
            model.fit(accelerator.dataset(data, **arguments), shuffle=False, verbose=0)
        else:
            model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
        results.append(model.get_weights())
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_fit_does_not_warn_of_its_own_default(accelerator, helpers, small):
    helpers.compile(helpers.build()).fit(accelerator.dataset(*small), verbose=0)


def test_the_data_set_is_held_once_more_at_most(accelerator):
    import resource

    x = np.ones((100, 2**20), "uint8")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in accelerator.dataset(x, batch_size=10, shuffle=False):
        pass
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    # One copy in TensorFlow (as `fit` makes), and the prefetched batches of a tenth each.
    assert grown < 2.2 * x.nbytes


def test_strings_in_object_arrays_are_strings(accelerator):
    """As pandas hands them over."""
    words = np.array([["good"], ["bad"], ["žluť"]], dtype=object)
    for batch, _ in accelerator.dataset(words, np.arange(3), batch_size=3, shuffle=False):
        assert [word[0].decode() for word in batch.numpy()] == ["good", "bad", "žluť"]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda a: a.dataset(X[:0], Y[:0]), "empty"),
        (lambda a: a.dataset(X, Y[:10]), r"different numbers of samples: \[50, 10\]"),
        (lambda a: a.dataset(X, batch_size=0), "batch_size=0"),
        (lambda a: a.dataset(X, batch_size=2.5), "batch_size=2.5"),
        (lambda a: a.dataset(np.float32(3)), "scalar"),
        (lambda a: a.dataset(np.array([[1], [1, 2]], dtype=object)), "dtype object"),
        (lambda a: a.dataset(np.array(["a", None, "b"], dtype=object)), "dtype object"),
        (lambda a: a.dataset([1, 2, 3]), "is not data"),
        (lambda a: a.dataset([1, 2, 3], Y[:3]), "np.asarray"),
        (lambda a: a.dataset(tf.sparse.from_dense(X), Y), "goes to fit as it is"),
        (lambda a: a.dataset("data.csv"), "is not data"),
        (lambda a: a.dataset(None), "is not data"),
        (lambda a: a.dataset(tf.data.Dataset.range(4).batch(2), Y), "y can't be given"),
        (lambda a: a.dataset(tf.data.Dataset.range(4).batch(2), batch_size=2), "batch_size can't be given"),
        (lambda a: a.dataset(tf.data.Dataset.range(4).take(0)), "dataset is empty"),
        (lambda a: a.dataset(i for i in ()), "generator is empty"),
    ],
)
def test_bad_data(accelerator, call, text):
    with pytest.raises(ValueError, match=text):
        call(accelerator)


def test_weights_may_come_beside_a_tuple():
    x, y, weight = np.ones((4, 2), "float32"), np.zeros(4), np.arange(4.0)
    batch = next(iter(make_dataset((x, y), sample_weight=weight, shuffle=False)))
    np.testing.assert_array_equal(batch[2], weight)
    with pytest.raises(ValueError, match="Allowed: one of them"):
        make_dataset((x, y, weight), sample_weight=weight)


def test_nothing_at_the_end_of_a_generators_batch_is_left_out():
    x, y = np.ones((4, 2), "float32"), np.zeros((4, 1))
    spec = make_dataset(batch for batch in [(x, y, None)] * 3).element_spec
    assert [part.shape[1:] for part in spec] == [(2,), (1,)]


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ([np.ones((4, 2)), np.zeros(4)], "yields lists"),
        ((np.ones((4, 2)), None, np.ones(4)), "has None inside"),
        (({"a": np.ones((4, 2)), "b": None}, np.ones(4)), "has None inside"),
    ],
)
def test_batches_of_a_generator_that_mean_nothing(batch, says):
    with pytest.raises(ValueError, match=says):
        make_dataset(iter_of(batch))


def iter_of(batch):
    yield batch


@pytest.mark.parametrize("scalar", [tf.constant(5.0), np.float32(5)])
def test_a_scalar_is_no_data(scalar):
    with pytest.raises(ValueError, match="A scalar was given"):
        make_dataset(scalar)


def test_shuffle_is_a_switch():
    with pytest.raises(ValueError, match="shuffle='batch' is not usable"):
        make_dataset(np.ones((4, 2)), shuffle="batch")
