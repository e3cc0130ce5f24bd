"""Groups of weights that share one value: pure functions, of tensors where a step needs them.

The first centroids are found once, in numpy; in one dimension a sort makes every step of k-means exact and
cheap. What runs in the compiled step is a lookup and a sum by group.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

INITIALIZATIONS = ("kmeans++", "linear", "density")
MOST_ROUNDS = 50  # of k-means; it has settled long before
MOST_PARTS = 64  # of a sum


def first_centroids(values: np.ndarray, num_clusters: int, initialization: str, seed: int = 0) -> np.ndarray:
    """Where clusters begin, in ascending order.

    Args:
        values: float32 of shape (weights,), at least one.
        num_clusters: How many; fewer come back where there are fewer different values.
        initialization: `"kmeans++"`: k-means from a spread-out random start; `"linear"`: evenly spaced
            between the smallest and the largest value; `"density"`: evenly spaced in rank, so that each has
            about as many members.
        seed: Of the random start.
    """
    different = np.unique(values)
    if len(different) <= num_clusters:
        return different.astype("float32")
    if initialization == "linear":
        return np.linspace(values.min(), values.max(), num_clusters, dtype="float32")
    if initialization == "density":
        ranks = np.linspace(0, 1, num_clusters)
        return np.unique(np.quantile(values.astype("float64"), ranks)).astype("float32")
    return kmeans(values, spread_out(values, num_clusters, np.random.default_rng(seed)))


def spread_out(values: np.ndarray, num_clusters: int, random: np.random.Generator) -> np.ndarray:
    """k-means++: each next centroid is a value drawn by its squared distance to those there are."""
    sample = random.choice(values, min(len(values), 20_000), replace=False).astype("float64")
    chosen = [random.choice(sample)]
    distances = (sample - chosen[0]) ** 2
    while len(chosen) < num_clusters and distances.sum() > 0:
        chosen.append(random.choice(sample, p=distances / distances.sum()))
        distances = np.minimum(distances, (sample - chosen[-1]) ** 2)
    return np.sort(chosen)


def kmeans(values: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Lloyd's algorithm in one dimension, until no value changes its cluster."""
    ordered = np.sort(values.astype("float64"))
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centroids = np.sort(centroids.astype("float64"))
    before = None
    for _ in range(MOST_ROUNDS):
        limits = np.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
        ends = np.concatenate([[0], limits, [len(ordered)]])
        if before is not None and np.array_equal(ends, before):
            break
        before = ends
        counts = np.diff(ends)
        means = np.diff(sums[ends]) / np.maximum(counts, 1)
        centroids = np.where(counts > 0, means, centroids)
    return np.unique(centroids).astype("float32")


def nearest(values: Any, centroids: Any) -> Any:
    """The cluster that each value is nearest to; of two as near the lower.

    Args:
        values: (channels, weights).
        centroids: (channels, clusters), ascending.

    Returns:
        int32 of the shape of `values`; clusters are counted through all channels.
    """
    channels, clusters = centroids.shape
    middles = (centroids[:, 1:] + centroids[:, :-1]) / 2
    return tf.searchsorted(middles, values, side="left") + tf.range(channels)[:, None] * clusters


def group_means(values: Any, groups: Any, counts: Any, otherwise: Any) -> Any:
    """The mean value of each cluster; `otherwise` where it has no members.

    Args:
        values: (channels, weights); 0 where one is not to count.
        groups: From `nearest`.
        counts: From `member_counts`.
        otherwise: (channels, clusters).
    """
    sums = group_sums(tf.reshape(values, [-1]), tf.reshape(groups, [-1]), math.prod(otherwise.shape))
    return tf.where(counts > 0, tf.reshape(sums, otherwise.shape) / tf.maximum(counts, 1), otherwise)


def member_counts(groups: Any, counted: Any, shape: Any) -> Any:
    """How many members each cluster has; float32 of `shape`, (channels, clusters).

    Args:
        groups: From `nearest`.
        counted: 1 for what counts and 0 for what doesn't, float32 of the shape of `groups`.
        shape: (channels, clusters).
    """
    sums = group_sums(tf.reshape(counted, [-1]), tf.reshape(groups, [-1]), math.prod(shape))
    return tf.reshape(sums, shape)


def group_sums(values: Any, groups: Any, size: int) -> Any:
    """The sum of each group's values, in an order that does not depend on threads.

    On a CPU `unsorted_segment_sum` runs on one core, at 14 ns a value; a weighted histogram, in parts that
    are summed one after the other, took 3 (400,000 values in 16 groups, two cores).

    Args:
        values: float32 of shape (values,).
        groups: int32 of the same shape.
        size: How many groups.
    """
    if tf.config.list_physical_devices("GPU"):
        return tf.math.unsorted_segment_sum(values, groups, size)
    count = values.shape[0]
    parts = max(min(count // (4 * size), MOST_PARTS), 1)
    missing = -count % parts
    groups = tf.pad(groups, [[0, missing]], constant_values=size)  # which no sum counts
    sums = tf.raw_ops.DenseBincount(
        input=tf.reshape(groups, [parts, -1]),
        size=size,
        weights=tf.reshape(tf.pad(values, [[0, missing]]), [parts, -1]),
        binary_output=False,
    )
    return tf.reduce_sum(sums, axis=0)
