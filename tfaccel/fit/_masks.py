"""Which weights stay: pure functions from scores to masks, exact at any size, traceable also by XLA.

A score says how much a weight matters, such as its magnitude. The largest are found without sorting: the bits
of a float32, read as an integer, are in the order of the floats, so 32 halvings of that range, each a count,
end at exactly the value that is wanted. It takes no memory beside the scores, and several weights can share
one limit without being put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf


def num_kept(size: int, sparsity: Any) -> Any:
    """How many of `size` weights stay at a sparsity (0..1): at least one, rounded as tfmot rounds."""
    kept = tf.round(tf.cast(size, tf.float32) * (1 - tf.cast(sparsity, tf.float32)))
    return tf.cast(tf.maximum(kept, 1), tf.int32)


def keep_largest(scores: Sequence[Any], kept: Any) -> list[Any]:
    """True where a score is among the `kept` largest of all; of equal ones the first stay.

    Args:
        scores: float32 tensors of any shapes, finite.
        kept: int32 scalar, from 1 to the number of all scores.
    """
    ranks = [_ordered(tf.reshape(score, [-1])) for score in scores]
    limit = _largest_limit(ranks, kept)
    above = [rank > limit for rank in ranks]
    room = kept - tf.add_n([_count(part) for part in above])
    masks = []
    for rank, part, score in zip(ranks, above, scores, strict=True):
        equal = rank == limit
        order = tf.cumsum(tf.cast(equal, tf.int32))
        masks.append(tf.reshape(part | (equal & (order <= room)), score.shape))
        room -= _count(equal)
    return masks


def _ordered(values: Any) -> Any:
    """int32 in the order of the floats: the bits of a negative one count backwards."""
    bits = tf.bitcast(tf.cast(values, tf.float32), tf.int32)
    return tf.where(bits < 0, tf.bitwise.bitwise_xor(bits, np.int32(0x7FFFFFFF)), bits)


def _largest_limit(ranks: list[Any], kept: Any) -> Any:
    """The largest integer that at least `kept` ranks reach."""

    def halve(low: Any, high: Any) -> tuple[Any, Any]:
        # The middle, rounded up, in int64: the range is wider than int32 can count.
        middle = (low + high + 1) // 2
        enough = tf.add_n([_count(rank >= tf.cast(middle, tf.int32)) for rank in ranks]) >= kept
        return tf.where(enough, middle, low), tf.where(enough, high, middle - 1)

    whole = (tf.constant(-(2**31), tf.int64), tf.constant(2**31 - 1, tf.int64))
    low, _ = tf.while_loop(lambda low, high: low < high, halve, whole, maximum_iterations=33)
    return tf.cast(low, tf.int32)


def _count(mask: Any) -> Any:
    return tf.reduce_sum(tf.cast(mask, tf.int32))


def keep_of_groups(scores: Any, zeros: Any, size: int) -> Any:
    """True for the `size - zeros` largest of each `size` neighbours along the rows.

    Args:
        scores: float32, (positions, rows, columns); rows are the inputs of a layer.
        zeros: int32 scalar, how many of each group go.
        size: Neighbours that make a group; the last one may be short, and then its missing ones go first.
    """
    positions, rows, columns = scores.shape
    groups = -(-rows // size)
    lowest = tf.fill([positions, groups * size - rows, columns], -np.inf)
    padded = tf.reshape(tf.concat([scores, lowest], 1), [positions, groups, size, columns])
    mine, others = padded[:, :, :, None, :], padded[:, :, None, :, :]
    earlier = tf.constant(np.tri(size, k=-1, dtype=bool)[:, :, None])
    better = tf.reduce_sum(tf.cast((others > mine) | ((others == mine) & earlier), tf.int32), axis=3)
    return tf.reshape(better < size - zeros, [positions, groups * size, columns])[:, :rows]


def block_scores(scores: Any, height: int, width: int) -> Any:
    """The mean score of each block of `height` inputs by `width` outputs; less where the weight ends.

    Args:
        scores: float32, (positions, rows, columns).
    """
    sums, sizes = (_block_sums(part, height, width) for part in (scores, tf.ones_like(scores)))
    return sums / sizes


def _block_sums(values: Any, height: int, width: int) -> Any:
    positions, rows, columns = values.shape
    down, across = -(-rows // height), -(-columns // width)
    padding = [[0, 0], [0, down * height - rows], [0, across * width - columns]]
    blocks = tf.reshape(tf.pad(values, padding), [positions, down, height, across, width])
    return tf.reduce_sum(blocks, [2, 4])


def spread_blocks(mask: Any, height: int, width: int, rows: int, columns: int) -> Any:
    """A mask of weights from one of blocks."""
    return tf.repeat(tf.repeat(mask, height, 1), width, 2)[:, :rows, :columns]
