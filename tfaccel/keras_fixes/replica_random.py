"""Under `tf.distribute` every replica draws the same random numbers: samples share their dropout masks.

The state of a `SeedGenerator` is mirrored, so all replicas draw from one seed. With 8 replicas each mask
serves 8 samples of the batch: less noise than the same layer gives on one device, and another training. The
same holds for `GaussianNoise` and for the layers that augment images.

Smallest reproduction (Keras 3.15.1, two CPUs): the two masks are equal.

    with strategy.scope():
        layer = keras.layers.Dropout(0.5)
    strategy.run(lambda: layer(tf.ones([1, 8]), training=True)).values

The fix: a replica draws the rows of the numbers that one device would draw for the whole batch.
TensorFlow's generator (Philox) is a function of a key and a counter, four 32-bit words for each value of
the counter; so the rows of a share begin at a counter that can be computed, and nothing is drawn that is
not used. Numbers whose first axis is a multiple of the share's rows are taken for a batch; others stay
equal on all replicas.

Reference: Salmon et al. (2011), "Parallel Random Numbers: As Easy as 1, 2, 3",
https://doi.org/10.1145/2063384.2063405.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import gen_stateless_random_ops_v2, random_ops_util

from tfaccel.keras_fixes.patch import Patch, all_active
from tfaccel.keras_fixes.sample_share import Share

VALUES_A_COUNT = {4: 4, 2: 4, 8: 2}  # by the bytes of a value: uniform and normal kernels alike


def _draw_rows(original: Callable, setting: Callable[[], Share | None]) -> Callable:
    def draw(shape: Any, key: Any, counter: Any, *args: Any, **kwargs: Any) -> tf.Tensor:
        share = setting()
        if share is None:
            return original(shape, key, counter, *args, **kwargs)
        shape = tf.convert_to_tensor(shape, tf.int32)
        if not shape.shape[0]:
            return original(shape, key, counter, *args, **kwargs)
        dtype = tf.as_dtype(kwargs.get("dtype", tf.float32))
        if kwargs.get("minval") is not None:
            dtype = kwargs["minval"].dtype
        begin = first_value(share, shape, tf.get_static_value(shape[0]) is not None)
        each = VALUES_A_COUNT[dtype.size]
        here = advanced(counter, begin // each)
        size = tf.reduce_prod(shape)
        # Where the rows begin within a count, its first values belong to the rows before them.
        drawn = original(tf.stack([size + each]), key, here, *args, **kwargs)
        return tf.reshape(tf.slice(drawn, [begin % each], [size]), shape)

    return draw


def first_value(share: Share, shape: tf.Tensor, is_fixed: bool) -> tf.Tensor:
    """Where a share's values begin among those of the whole batch; 0 where `shape` holds no batch.

    Args:
        share: Of the batch.
        shape: Of the share's values; int32, rank 1.
        is_fixed: Whether its first axis is known while tracing, as that of a weight is.
    """
    rows = tf.maximum(share.rows, 1)
    row_size = tf.reduce_prod(shape) // rows
    of_batch = tf.equal(shape[0], rows) if is_fixed else tf.equal(shape[0] % rows, 0)
    return tf.where(of_batch, share.begin * row_size, 0)


def advanced(counter: tf.Tensor, steps: tf.Tensor) -> tf.Tensor:
    """A Philox counter, two uint64 with the low one first, moved on by `steps`."""
    low = counter[0] + tf.cast(steps, tf.uint64)
    carry = tf.cast(low < counter[0], tf.uint64)
    return tf.stack([low, counter[1] + carry])


_PATCHES = tuple(
    Patch(gen_stateless_random_ops_v2, name, _draw_rows)
    for name in (
        "stateless_random_uniform_v2",
        "stateless_random_normal_v2",
        "stateless_random_uniform_int_v2",
        "stateless_random_uniform_full_int_v2",
    )
)


def _draw_whole(original: Callable, setting: Callable[[], Share | None]) -> Callable:
    """Philox's own key is four drawn words, which a share of four rows would take for its batch."""

    def scramble(seed: Any) -> Any:
        if setting() is None:
            return original(seed)
        with all_active(_PATCHES, None):
            return original(seed)

    return scramble


_KEY_PATCH = Patch(random_ops_util, "_philox_scramble_seed", _draw_whole)


@contextlib.contextmanager
def drawing_rows(share: Share) -> Iterator[None]:
    """Lets layers that this thread traces draw the numbers of `share`'s rows while the block lasts."""
    with all_active((*_PATCHES, _KEY_PATCH), share):
        yield
