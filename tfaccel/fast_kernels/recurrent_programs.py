"""The sequences of `fused_recurrent`, forwards and backwards, in the form that XLA compiles well.

A step of a sequence has to wait for one matrix product and for what stands between it and the next; all else
is done for all steps at once. The inputs' product comes before the loop. The gradient of a step is linear in
the gradients that arrive at its state, so the loop forwards keeps the factors, while the gates are at hand,
and the loop backwards only multiplies by them and by the recurrent weights; the gradients of the weights are
one product over all steps and samples after it. An array is read and written at the same place, which XLA
does in place. Steps come first and units last: a gate is a part of each row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Program:
    """One sequence, forwards and backwards. Shapes: inputs `(samples, steps, features)`, states `(samples,
    units)`, weights as Keras has them.

    `forward` gives `(results, ...)`, of which `backward` takes the rest back: results are the outputs (the
    last one, or all), then the states. `backward` gives the gradients of the weights, of the states and, if
    wanted, of the inputs.
    """

    units: int
    all_outputs: bool
    wants_inputs: bool

    def _outputs(self, h: tf.Tensor, before: tf.Tensor) -> tf.Tensor:
        """All outputs from the states that the steps began with, or the last one."""
        return _swapped(tf.concat([before[1:], h[None]], 0)) if self.all_outputs else h

    def _upstream(
        self, upstream: Sequence[tf.Tensor]
    ) -> tuple[Callable[[tf.Tensor, tf.Tensor], tf.Tensor], list[tf.Tensor]]:
        """What adds the gradient of a step's output, if it has one, and the gradients of the last states."""
        outputs, *states = upstream
        if not self.all_outputs:
            return lambda dh, step: dh, [states[0] + outputs, *states[1:]]
        each = _swapped(outputs)
        return lambda dh, step: dh + each[step], states

    def _of_inputs(self, d: tf.Tensor, kernel: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        """The gradient of the inputs, if wanted, from that of their product."""
        if not self.wants_inputs:
            return tf.zeros([])
        samples, steps, features = x.shape
        product = tf.matmul(_rows(d), kernel, transpose_b=True)
        return _swapped(tf.reshape(product, [steps, samples, features]))


def _swapped(x: tf.Tensor) -> tf.Tensor:
    """Steps and samples."""
    return tf.transpose(x, [1, 0, 2])


def _rows(x: tf.Tensor) -> tf.Tensor:
    return tf.reshape(x, [-1, x.shape[-1]])


def _of_weights(inputs: tf.Tensor, d: tf.Tensor) -> tf.Tensor:
    """The gradient of a matrix, from its inputs and the gradients of its products in all steps."""
    return tf.matmul(_rows(inputs), _rows(d), transpose_a=True)


def _input_product(x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """For all steps: `(steps, samples, gates)`."""
    samples, steps, _ = x.shape
    return tf.reshape(tf.matmul(_rows(_swapped(x)), kernel) + bias, [steps, samples, kernel.shape[1]])


def _by_gate(values: Sequence[float], units: int) -> tf.Tensor:
    return tf.constant(np.repeat(np.asarray(values, "float32"), units))


def _array(values: tf.Tensor) -> tf.TensorArray:
    """One that holds the values, a step each."""
    steps, *shape = values.shape
    return tf.TensorArray(tf.float32, steps, element_shape=shape, clear_after_read=False).unstack(values)


def _empty(steps: int, like: tf.Tensor, count: int) -> list[tf.TensorArray]:
    return [tf.TensorArray(tf.float32, steps, element_shape=like.shape) for _ in range(count)]


def _loop(steps: int, body: Callable[..., Any], first: list[Any], backwards: bool = False) -> list[Any]:
    """`body(step, *carried)`, over all steps."""
    end, by = (-1, -1) if backwards else (steps, 1)
    start = tf.constant(steps - 1 if backwards else 0)
    result = tf.while_loop(
        lambda step, *_: tf.not_equal(step, end),
        lambda step, *carried: [step + by, *body(step, *carried)],
        [start, *first],
    )
    return result[1:]


class Lstm(Program):
    """Gates in Keras's order: input, forget, candidate, output."""

    def forward(
        self,
        x: tf.Tensor,
        kernel: tf.Tensor,
        recurrent: tf.Tensor,
        bias: tf.Tensor,
        h: tf.Tensor,
        c: tf.Tensor,
    ) -> Any:
        """All steps; `Program` says what comes back."""
        # sigmoid(x) = 0.5 tanh(0.5 x) + 0.5: one tanh serves all gates.
        half = _by_gate([0.5, 0.5, 1, 0.5], self.units)
        candidate = _by_gate([0, 0, 1, 0], self.units)
        product, recurrent = _input_product(x, kernel * half, bias * half), recurrent * half

        def step(t: tf.Tensor, h: tf.Tensor, c: tf.Tensor, to_gates: Any, *arrays: Any) -> list[Any]:
            gates = tf.tanh(to_gates.read(t) + tf.matmul(h, recurrent)) * half + (1 - half)
            i, f, g, o = tf.split(gates, 4, 1)
            new = f * c + i * g
            squashed = tf.tanh(new)
            # What the gates are multiplied by, and their slopes: 1 - g² is (1 - g) (g + 1).
            factors = tf.concat([g, c, i, squashed], 1) * ((1 - gates) * (gates + candidate))
            kept = zip(arrays, (o * (1 - squashed * squashed), f, h), strict=True)
            return [o * squashed, new, to_gates.write(t, factors), *(a.write(t, v) for a, v in kept)]

        steps = x.shape[1]
        h, c, *arrays = _loop(steps, step, [h, c, _array(product), *_empty(steps, h, 3)])
        to_gates, to_c, forgets, hs = (array.stack() for array in arrays)
        return [self._outputs(h, hs), h, c], to_gates, to_c, forgets, hs

    def backward(
        self,
        upstream: list[tf.Tensor],
        x: tf.Tensor,
        kernel: tf.Tensor,
        recurrent: tf.Tensor,
        to_gates: tf.Tensor,
        to_c: tf.Tensor,
        forgets: tf.Tensor,
        hs: tf.Tensor,
    ) -> Any:
        """The gradients, from those that the results got."""
        with_outputs, (dh, dc) = self._upstream(upstream)
        back = tf.transpose(recurrent)

        def step(t: tf.Tensor, dh: tf.Tensor, dc: tf.Tensor, factors: Any) -> list[Any]:
            dh = with_outputs(dh, t)
            dc += dh * to_c[t]
            d = tf.concat([dc, dc, dc, dh], 1) * factors.read(t)
            return [tf.matmul(d, back), dc * forgets[t], factors.write(t, d)]

        dh, dc, array = _loop(x.shape[1], step, [dh, dc, _array(to_gates)], backwards=True)
        d = array.stack()
        weights = [_of_weights(_swapped(x), d), _of_weights(hs, d), tf.reduce_sum(d, [0, 1])]
        return weights, [dh, dc], self._of_inputs(d, kernel, x)


class Gru(Program):
    """Gates in Keras's order: update, reset, candidate; the reset acts after the recurrent product."""

    def forward(
        self, x: tf.Tensor, kernel: tf.Tensor, recurrent: tf.Tensor, bias: tf.Tensor, h: tf.Tensor
    ) -> Any:
        """All steps; `Program` says what comes back."""
        two = 2 * self.units
        half = _by_gate([0.5, 0.5, 1], self.units)
        product, recurrent = _input_product(x, kernel * half, bias[0] * half), recurrent * half
        shift = bias[1] * half

        def step(t: tf.Tensor, h: tf.Tensor, to_inner: Any, *arrays: Any) -> list[Any]:
            outer, inner = to_inner.read(t), tf.matmul(h, recurrent) + shift
            z, r = tf.split(0.5 * tf.tanh(outer[:, :two] + inner[:, :two]) + 0.5, 2, 1)
            inner = inner[:, two:]
            new = tf.tanh(outer[:, two:] + r * inner)
            to_new = (1 - z) * (1 - new * new)
            factors = [(h - new) * z * (1 - z), to_new * inner * r * (1 - r), to_new * r]
            kept = zip(arrays, (to_new, z, h), strict=True)
            to_inner = to_inner.write(t, tf.concat(factors, 1))
            return [z * h + (1 - z) * new, to_inner, *(a.write(t, v) for a, v in kept)]

        steps = x.shape[1]
        h, *arrays = _loop(steps, step, [h, _array(product), *_empty(steps, h, 3)])
        to_inner, to_new, updates, hs = (array.stack() for array in arrays)
        return [self._outputs(h, hs), h], to_inner, to_new, updates, hs

    def backward(
        self,
        upstream: list[tf.Tensor],
        x: tf.Tensor,
        kernel: tf.Tensor,
        recurrent: tf.Tensor,
        to_inner: tf.Tensor,
        to_new: tf.Tensor,
        updates: tf.Tensor,
        hs: tf.Tensor,
    ) -> Any:
        """The gradients, from those that the results got."""
        with_outputs, (dh,) = self._upstream(upstream)
        back = tf.transpose(recurrent)

        def step(t: tf.Tensor, dh: tf.Tensor, inner: Any, new: Any) -> list[Any]:
            dh = with_outputs(dh, t)
            d = tf.concat([dh, dh, dh], 1) * inner.read(t)
            kept = [inner.write(t, d), new.write(t, dh * new.read(t))]
            return [tf.matmul(d, back) + dh * updates[t], *kept]

        first = [dh, _array(to_inner), _array(to_new)]
        dh, *arrays = _loop(x.shape[1], step, first, backwards=True)
        inner, new = (array.stack() for array in arrays)
        # The outer gradients are the inner ones, but for the candidate's.
        two = 2 * self.units
        of_inner, of_new = (_of_weights(_swapped(x), d) for d in (inner, new))
        bias_inner, bias_new = (tf.reduce_sum(d, [0, 1]) for d in (inner, new))
        weights = [
            tf.concat([of_inner[:, :two], of_new], 1),
            _of_weights(hs, inner),
            tf.stack([tf.concat([bias_inner[:two], bias_new], 0), bias_inner]),
        ]
        outer = tf.concat([inner[..., :two], new], 2)
        return weights, [dh], self._of_inputs(outer, kernel, x)
