"""Masks that are made and held inside of the compiled step.

The first of the pruned weights whose constraint Keras applies makes the masks of all of them, where a step
asks for it: by then the optimizer has updated every weight, and no mask has been held yet. That is the moment
at which tfmot makes its masks, so both prune the same weights; and it costs one condition a step, not one a
weight.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import weakref
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.errors import refuse
from tfaccel.fit import _masks as masks
from tfaccel.fit._choice import Choice
from tfaccel.fit._layout import Layout
from tfaccel.fit._run import updates_with_this_one
from tfaccel.fit._state import beside
from tfaccel.fit._weights import own_constraint
from tfaccel.fit.sparsity_schedule import Plan

PATTERNS = "'unstructured', m zeros of n as '2:4', or blocks of inputs × outputs as '4x1'"


def parse_pattern(pattern: str) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """What a pattern's name says: (m, n) or None, and (inputs, outputs) of a block or None.

    Raises:
        ValueError: It says nothing that is known, or m ≥ n.
    """
    if pattern == "unstructured":
        return None, None
    found = re.fullmatch(r"(\d+)([:x])(\d+)", pattern) if isinstance(pattern, str) else None
    if found is None:
        raise refuse("pattern", pattern, PATTERNS, "Take 'unstructured'.")
    first, second = int(found[1]), int(found[3])
    if found[2] == ":":
        if not 0 < first < second <= 64:
            raise refuse("pattern", pattern, "m:n with 0 < m < n ≤ 64", "'2:4' sets two of four to zero.")
        return (first, second), None
    if first * second < 2:
        raise refuse("pattern", pattern, "blocks of two weights or more", "Take 'unstructured'.")
    return None, (first, second)


class Pattern:
    """How a mask may look, and what it is made from.

    Args:
        group: (m, n): m zeros in each n inputs; or None.
        block: (inputs, outputs) of a block; or None.
        threshold: Magnitudes below it go; or None.
        joint: Whether all weights are compared with one another.
    """

    def __init__(
        self,
        group: tuple[int, int] | None,
        block: tuple[int, int] | None,
        threshold: float | None,
        joint: bool,
    ):
        self.group, self.block, self.threshold, self.joint = group, block, threshold, joint

    def fit(self, choice: Choice, asked_for: bool) -> Choice:
        """The choice, or why a weight can't have the pattern.

        Raises:
            ValueError: It can't, and was asked for.
        """
        if choice.skipped or not (self.group or self.block):
            return choice
        try:
            inputs = Layout(choice.layer, choice.variable).sizes[1]
            problem = (
                f"has fewer inputs than {self.group[1]}" if self.group and inputs < self.group[1] else ""
            )
        except ValueError as error:
            problem = str(error)
        if problem and asked_for:
            raise ValueError(
                f"{choice.variable.path} can't have a pattern: it {problem}. Allowed: kernels of dense, "
                "convolution and recurrent layers, and n inputs or more for m:n. Leave it out of layers=."
            )
        return dataclasses.replace(choice, skipped=problem)

    def make(self, weights: list[Pruned], scores: list[Any], sparsities: list[Any]) -> list[Any]:
        """A mask for each weight, from its scores, at its sparsity."""
        if self.threshold is not None:
            return [score >= self.threshold for score in scores]
        if self.group is not None:
            zeros, size = self.group
            return [
                each.layout.together(
                    masks.keep_of_groups(each.layout.apart(score), _zeros(s, zeros, size), size)
                )
                for each, score, s in zip(weights, scores, sparsities, strict=True)
            ]
        if self.block is not None:
            height, width = self.block
            scores = [
                masks.block_scores(each.layout.apart(score), height, width)
                for each, score in zip(weights, scores, strict=True)
            ]
        kept = self._keep(scores, sparsities)
        if self.block is None:
            return kept
        return [
            each.layout.together(masks.spread_blocks(mask, height, width, *each.layout.sizes[1:]))
            for each, mask in zip(weights, kept, strict=True)
        ]

    def _keep(self, scores: list[Any], sparsities: list[Any]) -> list[Any]:
        if self.joint:
            size = sum(math.prod(score.shape) for score in scores)
            return masks.keep_largest(scores, masks.num_kept(size, sparsities[0]))
        return [
            masks.keep_largest([score], masks.num_kept(math.prod(score.shape), sparsity))[0]
            for score, sparsity in zip(scores, sparsities, strict=True)
        ]


def _zeros(sparsity: Any, most: int, size: int) -> Any:
    """Zeros in a group of `size` on the way to `most`."""
    return tf.minimum(tf.cast(tf.round(sparsity * size), tf.int32), most)


class Pruned:
    """A weight with its mask, and with what its importance is summed in.

    Args:
        choice: The weight and its sparsity.
        importance: `"magnitude"`, `"movement"` or `"gradient"`.
        initial: The sparsity that it begins with.
    """

    def __init__(self, choice: Choice, importance: str, initial: float):
        self.variable, self.target = choice.variable, choice.amount
        self.importance = importance
        self.own = own_constraint(choice.variable)
        values = keras.ops.convert_to_numpy(choice.variable.value)
        self.initial = initial
        self.mask = beside(np.ones(values.shape, bool))
        self.scores = self.before = None
        if importance != "magnitude":
            self.scores = beside(np.zeros(values.shape, "float32"))
            self.before = beside(values)
        with contextlib.suppress(ValueError):  # `Pattern.fit` has refused it where a pattern needs one
            self.layout = Layout(choice.layer, choice.variable)

    def score(self) -> Any:
        """How much each of its weights matters."""
        if self.scores is not None:
            return tf.convert_to_tensor(self.scores.value)
        value = self.own(self.variable.value) if self.own is not None else self.variable.value
        return tf.abs(tf.cast(value, tf.float32))

    def note(self, value: Any) -> None:
        """Adds an update to what its importance is summed in."""
        if self.scores is None or self.before is None:
            return
        before = tf.convert_to_tensor(self.before.value)
        moved = tf.cast((value - before) * before, tf.float32)
        self.scores.assign_add(moved if self.importance == "movement" else moved**2)

    def hold(self, value: Any) -> Any:
        """The value with its zeros."""
        held = tf.where(tf.convert_to_tensor(self.mask.value), value, tf.zeros([], value.dtype))
        if self.before is not None:
            self.before.assign(held)
        return held


class Masks:
    """The masks of one `fit`.

    Args:
        model: That is fitted.
        weights: Those that are pruned.
        pattern: How masks may look.
        plan: When they are made.
        start: Updates of the optimizer when the schedule's step 0 was.
    """

    def __init__(self, model: keras.Model, weights: list[Pruned], pattern: Pattern, plan: Plan, start: int):
        self.model, self.weights, self.pattern, self.plan, self.start = model, weights, pattern, plan, start
        self._graph: Callable[[], Any] | None = None  # of the step that is being traced
        self._updated: set[int] = set()  # ids of the weights that it has updated
        self.in_steps = False  # outside of a step masks are held, but none are made

    def begin(self, done: int) -> None:
        """The masks that a run has after `done` steps: none, or those of the last time before.

        Importance that is summed over steps begins anew in a resumed run, so these are made by magnitude.
        """
        last = self.plan.last_due(done)
        if last < 0:
            return
        magnitudes = [tf.abs(tf.cast(each.variable.value, tf.float32)) for each in self.weights]
        self._make(magnitudes, tf.constant(last, tf.int64))

    def updates(self) -> list[tuple[keras.Variable, Callable[[Any], Any]]]:
        """What each weight is given after an update, for `WeightUpdates`."""
        return [(each.variable, self._update(each)) for each in self.weights]

    def _update(self, weight: Pruned) -> Callable[[Any], Any]:
        def update(value: Any) -> Any:
            if self.in_steps and self._begins_a_step(weight):
                self._step()
            return weight.hold(value)

        return update

    def _begins_a_step(self, weight: Pruned) -> bool:
        """Whether a weight is the first one that a step updates: a step may leave some out.

        Seen in the order in which updates are traced: what comes again, or in another graph, begins another.
        """
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        same_graph = graph is (self._graph and self._graph())
        begins = not self._updated or not same_graph or id(weight) in self._updated
        if begins:
            self._graph, self._updated = graph and weakref.ref(graph), set()
        self._updated.add(id(weight))
        return begins

    def _step(self) -> None:
        for each in self.weights:
            each.note(each.variable.value)
        done, is_update = updates_with_this_one(self.model.optimizer)
        step = done - self.start
        due = tf.logical_and(is_update, self.plan.is_due(step))

        def make() -> None:
            self._make([each.score() for each in self.weights], step)

        tf.cond(due, make, lambda: None)

    def _make(self, scores: list[Any], step: Any) -> None:
        made = self.pattern.make(self.weights, scores, [self._sparsity(each, step) for each in self.weights])
        for each, mask in zip(self.weights, made, strict=True):
            each.mask.assign(mask)

    def _sparsity(self, weight: Pruned, step: Any) -> Any:
        if self.plan.target is not None:
            return self.plan.target(step)
        assert self.plan.progress is not None
        # What is sparser than its target stays so.
        target = max(weight.target, min(weight.initial, 0.999)) if weight.target else weight.initial
        return target + (weight.initial - target) * (1 - self.plan.progress(step))
