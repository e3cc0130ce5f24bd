"""The input pipeline: whatever `model.fit` takes, as the fastest input that yields the same batches.

| given | given back |
|---|---|
| arrays, tensors, data frames, nested | a `tf.data.Dataset` that cuts batches out of tensors in memory |
| `tf.data.Dataset` | the same, prefetched; sharded by data where several workers read it |
| a Python generator | a `tf.data.Dataset` that runs the generator ahead |
| `keras.utils.PyDataset` | itself: Keras's loader (workers, order, `on_epoch_end`) is kept |
| a distributed dataset | itself |

Nothing is cached that the user did not cache: a pipeline may augment at random, and a cache would
freeze the first epoch's draws. Floating-point arrays are cast to `keras.config.floatx()` batch by
batch, as `fit` does, so a float64 array is not copied whole.

One difference from `fit(x, y)` is on purpose: every epoch has a new order, also after
`keras.utils.set_random_seed`. Keras 3.15 then repeats the first epoch's order for the whole run.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.errors import refuse
from tfaccel.fast_kernels import resident
from tfaccel.keras_fixes import shuffle_warning

DEFAULT_BATCH_SIZE = 32  # what `fit` takes for arrays


def make_dataset(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int | None = None,
    shuffle: bool = True,
) -> Any:
    """Gives back the fastest input for `fit` that yields the same samples in the same batches.

    Args:
        x: Arrays (shape `(samples, ...)`, nested or not), `(x, y)` or `(x, y, sample_weight)` when
            `y` is left out, a batched `tf.data.Dataset`, a `keras.utils.PyDataset` or a generator
            of batches.
        y: Targets, for arrays only.
        sample_weight: Weights of the samples, for arrays only.
        batch_size: Samples a batch, for arrays only; default 32, as in `fit`. With several replicas
            this is the global batch.
        shuffle: For arrays only: draw a new order every epoch (from TensorFlow's global seed). `predict`
            of a model with fused kernels goes in the arrays' order all the same; else pass False for it.

    Raises:
        ValueError: Empty data, arrays of different lengths or without a sample axis, or an argument
            that this kind of data can't take.
    """
    shuffle_warning.silence()
    if batch_size is not None and (
        isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1
    ):
        raise refuse("batch_size", batch_size, "an integer ≥ 1", "Leave it out for 32.")
    if not isinstance(shuffle, bool | np.bool_):
        raise refuse("shuffle", shuffle, "True or False", "True draws a new order every epoch.")
    if not is_array_data(x):
        _check_stream(x)
        _refuse_array_arguments(x, y, sample_weight, batch_size)
        return _prepare_stream(x)
    if isinstance(x, tuple) and y is None:
        x, y, own_weight = keras.utils.unpack_x_y_sample_weight(x)
        if own_weight is not None and sample_weight is not None:
            raise ValueError(
                "Weights came both in the tuple and as sample_weight. Allowed: one of them. Leave one out."
            )
        sample_weight = own_weight if sample_weight is None else sample_weight
    data = keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
    # tf.data stacks a list into one tensor; a tuple stays a structure.
    data = keras.tree.lists_to_tuples(keras.tree.map_structure(_as_array, data, none_is_leaf=False))
    samples = _count_samples(data)
    return slice_batches(data, samples, int(batch_size or DEFAULT_BATCH_SIZE), shuffle)


def slice_batches(data: Any, samples: int, batch_size: int, shuffle: bool) -> tf.data.Dataset:
    """Cuts batches out of arrays by slice, or by gather of a fresh permutation every epoch.

    Args:
        data: Nested arrays of `samples` rows each.
        samples: Rows in each array.
        batch_size: Rows a batch; the last batch holds what is left.
        shuffle: Whether each pass draws a new order.

    Returns:
        A dataset of known length `ceil(samples / batch_size)`.
    """
    floatx = keras.config.floatx()
    with tf.device("CPU:0"):  # the data set may be larger than a GPU's memory
        tensors = keras.tree.map_structure(tf.convert_to_tensor, data, none_is_leaf=False)
    # Without a partial batch the batch size is static: XLA then compiles once.
    static_size = batch_size if samples % batch_size == 0 else None

    structure = keras.tree.map_structure(lambda _: 0, data, none_is_leaf=False)
    leaves = tuple(leaf for leaf in keras.tree.flatten(tensors) if leaf is not None)

    def cut(tensor: tf.Tensor, start: tf.Tensor, order: tf.Tensor) -> tf.Tensor:
        stop = tf.minimum(start + batch_size, samples)
        batch = tf.gather(tensor, order[start:stop]) if shuffle else tensor[start:stop]
        batch.set_shape([static_size, *tensor.shape[1:]])
        return resident.in_floatx(batch, floatx)

    def one_epoch(order: tf.Tensor, *leaves: tf.Tensor) -> tf.data.Dataset:
        def batch_from(start: tf.Tensor) -> Any:
            rest = iter(leaves)
            return keras.tree.map_structure(
                lambda _: cut(next(rest), start, order), structure, none_is_leaf=False
            )

        starts = tf.data.Dataset.range(0, samples, batch_size)
        return starts.map(batch_from, num_parallel_calls=tf.data.AUTOTUNE)

    # The rows go in as an element: a function that captured them would be garbage in a cycle, and keep them.
    given = tf.data.Dataset.from_tensors(leaves)
    batches = tf.data.Dataset.zip(orders(samples, shuffle), given)
    batches = batches.flat_map(lambda order, leaves: one_epoch(order, *leaves))
    length = math.ceil(samples / batch_size)
    # flat_map forgets the length; Keras, its progress bar and the schedules need it.
    dataset = _with_options(batches.apply(tf.data.experimental.assert_cardinality(length)))
    resident.attach_to(dataset, tensors, samples, batch_size, shuffle)
    return dataset


def orders(samples: int, shuffle: bool) -> tf.data.Dataset:
    """A dataset of one element: the order of the samples, drawn anew on every pass.

    Not `tf.random.shuffle` inside `map`, as Keras's own pipeline for arrays has it: with a global seed
    (`keras.utils.set_random_seed`) its random state begins again with every pass, and every epoch gets
    the same order. A canary in the tests shows it.
    """
    if not shuffle:
        return tf.data.Dataset.from_tensors(tf.range(samples, dtype=tf.int64))
    seeds = tf.data.Dataset.random(rerandomize_each_iteration=True).batch(2).take(1)
    order = tf.range(samples, dtype=tf.int64)
    return seeds.map(lambda seed: tf.random.experimental.stateless_shuffle(order, seed)).prefetch(1)


def _prepare_stream(x: Any) -> Any:
    if isinstance(x, tf.data.Dataset):
        if x.cardinality() == 0:
            raise ValueError(
                "The dataset is empty. Allowed: at least one batch. Check the files or filters it "
                "is made from."
            )
        return _with_options(x)
    if isinstance(x, keras.utils.PyDataset | tf.distribute.DistributedDataset):
        return x
    return _with_options(from_generator(x))


def _check_stream(x: Any) -> None:
    streams = tf.data.Dataset | keras.utils.PyDataset | tf.distribute.DistributedDataset
    if not isinstance(x, streams) and not inspect.isgenerator(x):
        raise ValueError(
            f"x={type(x).__name__} is not data that can be prepared. Allowed: arrays, tensors, data "
            "frames, tf.data.Dataset, keras.utils.PyDataset, a generator. Python lists of numbers: "
            "convert them with np.asarray; sparse and ragged data goes to fit as it is."
        )


def from_generator(generator: Iterator) -> tf.data.Dataset:
    """Turns a generator of batches into a dataset; it is read once, as Keras reads it.

    Raises:
        ValueError: The generator yields nothing, or something else than nested arrays.
    """
    try:
        first = next(generator)
    except StopIteration:
        raise ValueError(
            "The generator is empty. Allowed: at least one batch. A generator can be read only "
            "once: make a new one."
        ) from None
    # Two batches tell which sizes vary (padded sentences); more than Keras looks at are not read.
    peeked = [_as_batch(batch) for batch in (first, *itertools.islice(generator, 1))]

    def to_spec(*leaves: Any) -> tf.TensorSpec:
        arrays = [_as_array(leaf) for leaf in leaves]
        kind = arrays[0].dtype
        dtype = keras.config.floatx() if np.issubdtype(kind, np.floating) else kind
        sizes = [set(sizes) for sizes in zip(*(array.shape[1:] for array in arrays), strict=True)]
        return tf.TensorSpec([None, *(size.pop() if len(size) == 1 else None for size in sizes)], dtype)

    spec = keras.tree.map_structure(to_spec, *peeked, none_is_leaf=False)
    batches = itertools.chain(peeked, map(_as_batch, generator))
    return tf.data.Dataset.from_generator(lambda: batches, output_signature=spec)


def _as_batch(batch: Any) -> tuple:
    if isinstance(batch, list):
        raise ValueError(
            "The generator yields lists. Allowed: arrays, dicts, and tuples (inputs,), (inputs, targets) or "
            "(inputs, targets, sample_weights). Yield a tuple."
        )
    batch = batch if isinstance(batch, tuple) else (batch,)
    while len(batch) > 1 and batch[-1] is None:
        batch = batch[:-1]
    if any(leaf is None for leaf in keras.tree.flatten(batch)):
        raise ValueError(
            "A batch of the generator has None inside. Allowed: None at its end. Leave it out, or pass a new "
            "generator to fit as it is."
        )
    return keras.tree.lists_to_tuples(batch)


def _with_options(dataset: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    policy = tf.data.experimental.AutoShardPolicy
    # A policy that the user set stays. FILE, which AUTO may try, fails on data in memory.
    if dataset.options().experimental_distribute.auto_shard_policy == policy.AUTO:
        options.experimental_distribute.auto_shard_policy = policy.DATA
    return dataset.with_options(options).prefetch(tf.data.AUTOTUNE)


def is_array_data(x: Any) -> bool:
    """Whether `fit` would take it as arrays: anything with a shape, nested or not."""
    leaves = keras.tree.flatten(x)
    some = any(leaf is not None for leaf in leaves)
    return some and all(
        leaf is None or (hasattr(leaf, "shape") and hasattr(leaf, "__array__")) for leaf in leaves
    )


def _as_array(leaf: Any) -> Any:
    if isinstance(leaf, tf.Tensor) and leaf.shape.rank != 0:
        return leaf
    array = np.asarray(leaf)
    if type(leaf).__module__.startswith("pandas"):
        # As `fit` has it: a frame of several numeric types is floats, a series is a column.
        numeric = all(dtype.kind in "biuf" for dtype in np.atleast_1d(leaf.dtypes))
        array = leaf.to_numpy(keras.config.floatx()) if array.dtype == object and numeric else array
        array = array[:, None] if array.ndim == 1 else array
    if array.dtype == object and all(isinstance(value, str) for value in array.flat):
        return array.astype(str)
    if array.dtype == object:
        raise ValueError(
            "An array has dtype object (rows of different lengths, or mixed types). Allowed: "
            "numbers, booleans, strings in a regular shape. Pad the rows, or pass a tf.data.Dataset "
            "of ragged tensors."
        )
    if array.ndim == 0:
        raise ValueError(
            "A scalar was given where an array belongs. Allowed: arrays of shape (samples, ...)."
        )
    return array


def _count_samples(data: Any) -> int:
    lengths = [int(array.shape[0]) for array in keras.tree.flatten(data) if array is not None]
    if len(set(lengths)) != 1:
        raise ValueError(
            f"The arrays have different numbers of samples: {lengths}. Allowed: the same number in "
            "x, y and sample_weight. Check how they were split."
        )
    if lengths[0] == 0:
        raise ValueError("The arrays are empty. Allowed: at least one sample.")
    return lengths[0]


def _refuse_array_arguments(x: Any, y: Any, sample_weight: Any, batch_size: int | None) -> None:
    given = {"y": y, "sample_weight": sample_weight, "batch_size": batch_size}
    extra = [name for name, value in given.items() if value is not None]
    if extra:
        raise ValueError(
            f"{', '.join(extra)} can't be given beside {type(x).__name__} data. Allowed: arrays "
            "only. The dataset yields its own (x, y) batches; batch it where it is made."
        )
