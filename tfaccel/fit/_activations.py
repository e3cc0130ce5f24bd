"""Activations rounded in the forward pass, as the integer file will round them, with ranges that are learnt.

Where: `find_rounded_tensors` says which layers' outputs exist in the file. A value that it doesn't have, such
as what lies between a convolution and the normalization that is folded into it, is left alone.

How: a range is one small variable a value. Each replica has its own, so that nothing has to be exchanged in
the middle of a step; they are averaged when they are asked for.

Reference: Jacob et al., 2018, https://arxiv.org/abs/1712.05877, section 3.1; learned ranges: Jain et al.,
2020, https://arxiv.org/abs/1903.08066, sections 3 and 4.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.fit._calls import undo_all, wrap_call
from tfaccel.fit._kept_rows import KeptRows
from tfaccel.fit._state import beside
from tfaccel.keras_fixes.first_batch import input_structure
from tfaccel.learned_ranges import FileRounding, LearnedRanges

MOMENTUM = 0.99  # of what is learnt by step; less in the first ones, see `_momentum`
COMING_IN = 0.1  # how much slower than that a range that follows the batches gets narrower
RATE = 2e-3  # of its width, that a learned range moves by at most, by step
NARROWEST = 1e-5  # below it a value is always zero, such as a dead unit's, and its range is not known


class RoundedActivations:
    """The values of a model that are rounded, while `attach()` holds.

    Args:
        model: Built.
        rounding: What its file rounds.
        bits: 8 or 16.
        ranges: A name of `KINDS`: where they come from.
    """

    def __init__(self, model: keras.Model, rounding: FileRounding, bits: int, ranges: str):
        self._model, self._bits, self._rounding = model, bits, rounding
        self._state = _State()
        self._ranges: dict[tuple[int, int, int], _Range] = {}
        self._layers = {id(each.layer): each.layer for each in rounding.tensors if each.layer is not None}
        with model.distribute_strategy.scope():
            for each in rounding.tensors:
                if _key(each) not in self._ranges:
                    self._ranges[_key(each)] = KINDS[ranges](bits)
            self._kept = KeptRows(rounding.inputs)

    def attach(self) -> Callable[[], None]:
        """From the next trace on; gives back the undo."""
        undo = [wrap_call(layer, self._around(key)) for key, layer in self._layers.items()]
        undo.append(wrap_call(self._model, self._around_model))

        return undo_all(undo)

    def _around(self, key: int) -> Callable[..., Any]:
        def call_rounding(call: Any, *args: Any, **kwargs: Any) -> Any:
            number = self._state.calls.get(key, 0)
            self._state.calls[key] = number + 1
            return self._rounded(key, number, call(*args, **kwargs))

        return call_rounding

    def _around_model(self, call: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._state.calls = {}
        keys = _keys(self._model, inputs)
        flat = [inputs[key] for key in keys] if keys else keras.tree.flatten(inputs)
        self._state.training = _is_training(flat[0])
        if self._state.training:
            self._state.momentum = _momentum(self._kept.keep(flat))
        flat = self._rounded(0, 0, flat)
        if keys is None:
            return call(keras.tree.pack_sequence_as(inputs, flat), *args, **kwargs)
        return call({**inputs, **dict(zip(keys, flat, strict=True))}, *args, **kwargs)

    def _rounded(self, key: int, number: int, values: Any) -> Any:
        flat = keras.tree.flatten(values)
        for leaf, value in enumerate(flat):
            known = self._ranges.get((key, number, leaf))
            if known is not None:
                flat[leaf] = known.round(value, self._state.momentum if self._state.training else None)
        return keras.tree.pack_sequence_as(values, flat)

    def learned(self) -> LearnedRanges | None:
        """What the file is made with; None where nothing was seen, such as in a `train_step` of one's own."""
        spans = {key: each.span() for key, each in self._ranges.items()}
        seen = [each for each in self._rounding.tensors if max(map(abs, spans[_key(each)])) > NARROWEST]
        if not seen:
            return None
        found = [spans[_key(each)] for each in seen]
        return LearnedRanges(self._bits, seen, found, self._rounding.kinds, self._kept.rows())


def _keys(model: keras.Model, inputs: Any) -> list[str] | None:
    """The keys of a dict of inputs in the order of `model.inputs`, as Keras looks them up inside of `call`.

    None where inputs come in their own order: lists, and the dicts of a subclassed model.
    """
    form = input_structure(model)
    if not isinstance(inputs, dict) or form is None:
        return None
    keys = sorted(form) if isinstance(form, dict) else [each.name for each in keras.tree.flatten(form)]
    is_flat = all(key in inputs and not keras.tree.is_nested(inputs[key]) for key in keys)
    return keys if is_flat else None


def _key(tensor: Any) -> tuple[int, int, int]:
    return (0 if tensor.layer is None else id(tensor.layer), tensor.call, tensor.leaf)


class _State(threading.local):
    """What a replica's thread knows of the forward pass that it traces."""

    def __init__(self) -> None:
        self.calls: dict[int, int] = {}
        self.training = False
        self.momentum: Any = MOMENTUM


def _momentum(steps: Any) -> Any:
    """That of `tf.train.ExponentialMovingAverage(num_updates=)`: a short run forgets its beginning too."""
    steps = tf.cast(steps, tf.float32)
    return tf.minimum(MOMENTUM, (1 + steps) / (10 + steps))


def _is_training(value: Any) -> bool:
    """Whether the running call of the model is one of training; Keras tells this to layers only."""
    told = []

    class Ask(keras.layers.Layer):
        def call(self, inputs: Any, training: Any = None) -> Any:
            told.append(bool(training))
            return inputs

    Ask(autocast=False)(tf.zeros([1]) if value is None else value)
    return told[0]


class _Range:
    """The range of one value; it follows the extremes of the batches, as a moving average."""

    def __init__(self, bits: int):
        self.bits = bits
        self.ends = beside(np.zeros(2, "float32"), "mean")

    def span(self) -> tuple[float, float]:
        """Lowest and highest value, between which 0 lies; both are 0 where nothing was seen."""
        low, high = keras.ops.convert_to_numpy(self.ends)
        return float(low), float(high)

    def round(self, value: Any, momentum: Any = None) -> Any:
        """A tensor on the range's grid, of its own dtype; with a momentum the range learns from it."""
        exact = tf.cast(value, tf.float32)
        if momentum is not None:
            return tf.cast(self._round_and_learn(exact, momentum), value.dtype)
        ends = tf.convert_to_tensor(self.ends.value)
        return tf.cast(tf.where(ends[0] < ends[1], on_range(exact, ends, self.bits), exact), value.dtype)

    def _round_and_learn(self, exact: Any, momentum: Any) -> Any:
        before = tf.convert_to_tensor(self.ends.value)
        ends = _extremes(exact, before)
        ends = tf.where(before[0] < before[1], self.follow(before, ends, momentum), ends)
        self.ends.assign(ends)
        return on_range(exact, ends, self.bits)

    def follow(self, before: Any, ends: Any, momentum: Any) -> Any:
        """The ends after a batch, from those before and the extremes of the batch."""
        return before + (1 - momentum) * (ends - before)


class _ExtremeRange(_Range):
    """The range of one value; it holds the extremes, and comes in slowly where batches reach less far.

    A moving average is the extreme of a usual batch, and cuts off what is rare: of a regression with batches
    of 32 a third of the outputs' range, which made the error ten times that of ranges measured afterwards.
    """

    def __init__(self, bits: int):
        super().__init__(bits)
        self._strategy = tf.distribute.get_strategy()

    def span(self) -> tuple[float, float]:
        """What the replicas' ranges hold together: one that saw more than the others counts."""
        if self._strategy.num_replicas_in_sync == 1:
            return super().span()
        each = self._strategy.run(lambda: tf.convert_to_tensor(self.ends.value)[None])
        ends = self._strategy.gather(each, axis=0).numpy()
        return float(ends[:, 0].min()), float(ends[:, 1].max())

    def follow(self, before: Any, ends: Any, momentum: Any) -> Any:
        """The ends after a batch, from those before and the extremes of the batch."""
        nearer = super().follow(before, ends, 1 - COMING_IN * (1 - momentum))
        return tf.stack([tf.minimum(ends[0], nearer[0]), tf.maximum(ends[1], nearer[1])])


class _LearnedRange(_Range):
    """The range of one value, moved by the loss's gradient; it begins with the first batch's extremes.

    Gradients grow with the loss and its scale, so only their sign and their steadiness count: each is
    divided by the root of its mean square.
    """

    def __init__(self, bits: int):
        super().__init__(bits)
        self.squares = beside(np.zeros(2, "float32"), "mean")

    def _round_and_learn(self, exact: Any, momentum: Any) -> Any:
        before = tf.convert_to_tensor(self.ends.value)
        ends = tf.where(before[0] < before[1], before, _extremes(exact, before))
        self.ends.assign(ends)

        @tf.custom_gradient
        def rounded(exact: Any) -> Any:
            result = on_range(exact, ends, self.bits)

            def backward(upstream: Any) -> Any:
                self._move(ends, _gradient(exact, result, ends, upstream), momentum)
                inside = (exact >= ends[0]) & (exact <= ends[1])
                return tf.where(inside, upstream, 0.0)

            return result, backward

        return rounded(exact)

    def _move(self, ends: Any, gradient: Any, momentum: Any) -> None:
        finite = tf.reduce_all(tf.math.is_finite(gradient))
        gradient = tf.where(finite, gradient, 0.0)
        squares = momentum * self.squares.value + (1 - momentum) * tf.square(gradient)
        self.squares.assign(squares)
        direction = tf.tanh(gradient * tf.math.rsqrt(squares + 1e-30))
        # An end at 0, such as a ReLU's, has nothing behind it.
        moved = tf.where(tf.equal(ends, 0.0), 0.0, ends - RATE * (ends[1] - ends[0]) * direction)
        self.ends.assign(tf.stack([tf.minimum(moved[0], 0.0), tf.maximum(moved[1], 0.0)]))


KINDS = {"extremes": _ExtremeRange, "moving_average": _Range, "learned": _LearnedRange}


def on_range(values: Any, ends: Any, bits: int) -> Any:
    """Values on the grid that LiteRT gives a range: of 8 bits with a zero of its own, of 16 bits symmetric.

    Args:
        values: A float32 tensor.
        ends: Lowest and highest value, of shape (2,); 0 lies between them.
        bits: 8 or 16.
    """
    ends = tf.stop_gradient(ends)
    if bits == 16:
        reach = tf.maximum(tf.maximum(-ends[0], ends[1]), NARROWEST)
        return tf.quantization.fake_quant_with_min_max_vars(values, -reach, reach, 16, narrow_range=True)
    high = tf.maximum(ends[1], ends[0] + NARROWEST)
    return tf.quantization.fake_quant_with_min_max_vars(values, ends[0], high, 8)


def _extremes(values: Any, otherwise: Any) -> Any:
    """Lowest and highest value, and 0 between them; `otherwise` where they aren't finite."""
    values = tf.stop_gradient(values)
    ends = tf.stack([tf.minimum(tf.reduce_min(values), 0.0), tf.maximum(tf.reduce_max(values), 0.0)])
    return tf.where(tf.reduce_all(tf.math.is_finite(ends)), ends, otherwise)


def _gradient(exact: Any, rounded: Any, ends: Any, upstream: Any) -> Any:
    """Of the loss by both ends: what is cut off moves with its end, and all others with the grid's width."""
    below, above = exact < ends[0], exact > ends[1]
    with_width = (rounded - exact) / tf.maximum(ends[1] - ends[0], NARROWEST)
    by_low = tf.where(below, 1.0, tf.where(above, 0.0, -with_width))
    by_high = tf.where(above, 1.0, tf.where(below, 0.0, with_width))
    return tf.stack([tf.reduce_sum(upstream * by_low), tf.reduce_sum(upstream * by_high)])
