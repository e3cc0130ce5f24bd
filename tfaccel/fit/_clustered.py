"""A weight whose values are shared, and what a compiled step does with it."""

from __future__ import annotations

import contextlib
import math
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from tfaccel.fit._choice import Choice
from tfaccel.fit._clusters import first_centroids, group_means, kmeans, member_counts, nearest
from tfaccel.fit._layout import Layout
from tfaccel.fit._run import updates_with_this_one
from tfaccel.fit._state import beside


class Options(Protocol):
    """What `ClusterWeights` was asked for."""

    initialization: str
    scope: str
    preserve_sparsity: bool


def channel_size(choice: Choice) -> int:
    """How many weights of a choice share values where each output channel has clusters of its own."""
    with contextlib.suppress(ValueError):  # no inputs, as an embedding: one group of clusters
        return math.prod(Layout(choice.layer, choice.variable).sizes[:2])
    return math.prod(choice.variable.shape)


class Clustered:
    """A weight with its clusters.

    Args:
        choice: The weight and its number of clusters.
        options: Of the callback.
        every: Updates from one regrouping to the next.
        reserves_zero: Whether one cluster is kept for zeros that are still to come.
    """

    def __init__(self, choice: Choice, options: Options, every: int, reserves_zero: bool):
        self.variable, self.number, self.every = choice.variable, choice.amount, every
        self.optimizer: keras.optimizers.Optimizer | None = None  # outside of a step there is none
        self.layout: Layout | None = None
        if options.scope == "channel":
            with contextlib.suppress(ValueError):  # no inputs, as an embedding: one group of clusters
                self.layout = Layout(choice.layer, choice.variable)
        values = np.asarray(self._apart(tf.convert_to_tensor(choice.variable.value)), "float32")
        zero = (values == 0) & options.preserve_sparsity
        centroids = _rows(
            [
                self._first(row[~gone], choice.amount - (reserves_zero or gone.any()), options)
                for row, gone in zip(values, zero, strict=True)
            ]
        )
        groups = nearest(tf.constant(values), tf.constant(centroids))
        counts = member_counts(groups, tf.constant(~zero, tf.float32), centroids.shape)
        means = group_means(tf.constant(values), groups, counts, tf.constant(centroids))
        self.preserve, self.more_zeros = options.preserve_sparsity, reserves_zero
        # What no weight needs costs nothing in a step.
        self.zero = beside(zero) if zero.any() or reserves_zero else None
        self.first_zero = beside(zero) if zero.any() and reserves_zero else None
        self.groups, self.counts = beside(groups.numpy()), beside(counts.numpy())
        self.centroids = beside(means.numpy())
        self.offset = beside(values - self._values().numpy())

    @staticmethod
    def _first(values: np.ndarray, number: int, options: Options) -> np.ndarray:
        if not values.size:
            return np.zeros(1, "float32")
        return first_centroids(values, int(number), options.initialization)

    def _apart(self, values: Any) -> Any:
        """As (channels, weights)."""
        if self.layout is None:
            return tf.reshape(values, [1, -1])
        positions, inputs, outputs = self.layout.sizes
        return tf.transpose(tf.reshape(self.layout.apart(values), [positions * inputs, outputs]))

    def _together(self, values: Any) -> Any:
        if self.layout is None:
            return tf.reshape(values, self.variable.shape)
        return self.layout.together(tf.reshape(tf.transpose(values), self.layout.sizes))

    def update(self, value: Any) -> Any:
        """What the weight is given behind an update: its clusters' new values."""
        if self.optimizer is None:
            return tf.cast(self._together(self._values()), value.dtype)
        moved = self._move(tf.cast(self._apart(value), tf.float32))
        values = tf.cast(self._values(), value.dtype)
        self.offset.assign(moved - tf.cast(values, tf.float32))
        return self._together(values)

    def settle(self) -> None:
        """Clusters what was put into the weight behind the last step, such as a moving average."""
        values = np.array(self._apart(tf.convert_to_tensor(self.variable.value)), "float32")
        for row in values:
            free = row[row != 0] if self.preserve else row
            if len(np.unique(row)) > self.number and free.size:
                centroids = kmeans(
                    free, first_centroids(free, self.number - (len(free) < len(row)), "density")
                )
                row[...] = np.where(
                    (row == 0) & self.preserve, 0, centroids[nearest(row[None], centroids[None])[0]]
                )
        self.variable.assign(self._together(tf.constant(values)))

    def _values(self) -> Any:
        """Of the members of each cluster."""
        values = tf.gather(tf.reshape(self.centroids.value, [-1]), self.groups.value)
        return values if self.zero is None else tf.where(self.zero.value, 0.0, values)

    def _move(self, updated: Any) -> Any:
        """Moves each member by its own update, and the clusters with them; gives where the members are.

        A member lies its `offset` away from the value that its cluster gave it.
        """
        moved = self.offset.value + updated
        if self.zero is not None:
            if self.more_zeros:  # what pruning has just made zero, and no more what it has let go
                pruned = updated == 0
                zero = pruned if self.first_zero is None else tf.logical_or(self.first_zero.value, pruned)
                self.zero.assign(zero)
            moved = tf.where(self.zero.value, 0.0, moved)
        done, is_update = updates_with_this_one(self.optimizer)

        def regroup() -> None:
            ordered = tf.sort(self.centroids.value, axis=1)
            self.centroids.assign(ordered)
            self.groups.assign(nearest(moved, ordered))
            if not self.more_zeros:  # which are counted in each step
                self._count()

        tf.cond(tf.logical_and(is_update, done % self.every == 0), regroup, lambda: None)
        if self.more_zeros:
            self._count()
        means = group_means(
            moved, self.groups.value, self.counts.value, tf.convert_to_tensor(self.centroids.value)
        )
        self.centroids.assign(means)
        return moved

    def _count(self) -> None:
        zero = tf.zeros(self.groups.shape, tf.bool) if self.zero is None else self.zero.value
        counted = tf.cast(tf.logical_not(zero), tf.float32)
        self.counts.assign(member_counts(self.groups.value, counted, self.centroids.shape))


def _rows(centroids: list[np.ndarray]) -> np.ndarray:
    """One array of them; where a channel has fewer, its last one again."""
    most = max(map(len, centroids))
    return np.stack([np.pad(row, (0, most - len(row)), mode="edge") for row in centroids])
