"""The sequences of `fused_recurrent`, forwards and backwards, in the form that XLA compiles well."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Program:
    """One sequence, forwards and backwards. Shapes: inputs `(steps, features, samples)`, states `(units,
    samples)`, weights as Keras has them.

    `forward` gives `(results, last states, ...)`, of which `backward` takes the rest back: results are the
    outputs (the last one, or all), then the states. `backward` gives the gradients of the weights, of the
    states and, if wanted, of the inputs.
    """

    units: int
    all_outputs: bool
    wants_inputs: bool

    def _outputs(self, h: tf.Tensor, before: tf.Tensor) -> tf.Tensor:
        """All outputs from the states that the steps began with, or the last one."""
        return tf.concat([before[1:], h[None]], 0) if self.all_outputs else h

    def _arrays(self, x: tf.Tensor, *rows: int) -> list[tf.TensorArray]:
        steps, _, samples = x.shape
        return [tf.TensorArray(tf.float32, steps, element_shape=[r, samples]) for r in rows]

    def _upstream(self, upstream: list[tf.Tensor]) -> tuple[tf.Tensor | None, list[tf.Tensor]]:
        """The gradient that each step's output gets, if they do, and those that the last states get."""
        outputs, *states = upstream
        if self.all_outputs:
            return outputs, states
        return None, [states[0] + outputs, *states[1:]]


def _loop(steps: int, body: Callable[..., Any], first: list[Any], backwards: bool = False) -> list[Any]:
    """`body(step, *carried)`, over all steps."""
    end, by = (-1, -1) if backwards else (steps, 1)
    start = tf.constant(steps - 1 if backwards else 0)
    result = tf.while_loop(
        lambda step, *_: tf.not_equal(step, end),
        lambda step, *carried: [step + by, *body(step, *carried)],
        [start, *first],
        maximum_iterations=steps,
    )
    return result[1:]


class Lstm(Program):
    """Gates in Keras's order: input, forget, candidate, output."""

    def _halves(self) -> tf.Tensor:
        """sigmoid(x) = 0.5 tanh(0.5 x) + 0.5: one tanh serves all gates."""
        return tf.constant(np.repeat([0.5, 0.5, 1.0, 0.5], self.units)[:, None].astype("float32"))

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
        half = self._halves()
        weights = tf.transpose(tf.concat([kernel, recurrent], 0)) * half
        shift = bias[:, None] * half

        def step(t: tf.Tensor, h: tf.Tensor, c: tf.Tensor, gates: Any, hs: Any, cs: Any) -> list[Any]:
            gate = tf.tanh(tf.matmul(weights, tf.concat([x[t], h], 0)) + shift) * half + (1 - half)
            i, f, g, o = tf.split(gate, 4, 0)
            new = f * c + i * g
            return [o * tf.tanh(new), new, gates.write(t, gate), hs.write(t, h), cs.write(t, c)]

        arrays = self._arrays(x, 4 * self.units, self.units, self.units)
        h, c, *arrays = _loop(x.shape[0], step, [h, c, *arrays])
        gates, hs, cs = (array.stack() for array in arrays)
        return [self._outputs(h, hs), h, c], gates, hs, cs

    def backward(
        self,
        upstream: list[tf.Tensor],
        x: tf.Tensor,
        kernel: tf.Tensor,
        recurrent: tf.Tensor,
        bias: tf.Tensor,
        results: list[tf.Tensor],
        gates: tf.Tensor,
        hs: tf.Tensor,
        cs: tf.Tensor,
    ) -> Any:
        """The gradients, from those that the results got."""
        each, (dh, dc) = self._upstream(upstream)
        weights = tf.concat([kernel, recurrent], 0)

        def step(t: tf.Tensor, dh: tf.Tensor, dc: tf.Tensor, c: tf.Tensor, *sums: Any) -> list[Any]:
            d_weights, d_bias, *d_inputs = sums
            i, f, g, o = tf.split(gates[t], 4, 0)
            squashed, before = tf.tanh(c), cs[t]
            dh = dh if each is None else dh + each[t]
            dc += dh * o * (1 - squashed * squashed)
            d_gates = [dc * g * i * (1 - i), dc * before * f * (1 - f)]
            d_gates += [dc * i * (1 - g * g), dh * squashed * o * (1 - o)]
            d = tf.concat(d_gates, 0)
            d_weights += tf.matmul(tf.concat([x[t], hs[t]], 0), d, transpose_b=True)
            d_inputs = [array.write(t, tf.matmul(kernel, d)) for array in d_inputs]
            return [
                tf.matmul(recurrent, d),
                dc * f,
                before,
                d_weights,
                d_bias + tf.reduce_sum(d, 1),
                *d_inputs,
            ]

        wanted = self._arrays(x, x.shape[1]) if self.wants_inputs else []
        first = [dh, dc, results[2], tf.zeros_like(weights), tf.zeros_like(bias), *wanted]
        dh, dc, _, d_weights, d_bias, *d_inputs = _loop(x.shape[0], step, first, backwards=True)
        d_kernel, d_recurrent = tf.split(d_weights, [x.shape[1], self.units], 0)
        given = d_inputs[0].stack() if d_inputs else tf.zeros([])
        return [d_kernel, d_recurrent, d_bias], [dh, dc], given


class Gru(Program):
    """Gates in Keras's order: update, reset, candidate; the reset acts after the recurrent product."""

    def _halves(self) -> tf.Tensor:
        return tf.constant(np.repeat([0.5, 0.5, 1.0], self.units)[:, None].astype("float32"))

    def forward(
        self, x: tf.Tensor, kernel: tf.Tensor, recurrent: tf.Tensor, bias: tf.Tensor, h: tf.Tensor
    ) -> Any:
        """All steps; `Program` says what comes back."""
        half, two = self._halves(), 2 * self.units
        of_input, of_state = tf.transpose(kernel) * half, tf.transpose(recurrent) * half
        shift, inner_shift = bias[0][:, None] * half, bias[1][:, None] * half

        def step(t: tf.Tensor, h: tf.Tensor, gates: Any, inners: Any, news: Any, hs: Any) -> list[Any]:
            outer = tf.matmul(of_input, x[t]) + shift
            inner = tf.matmul(of_state, h) + inner_shift
            gate = 0.5 * tf.tanh(outer[:two] + inner[:two]) + 0.5
            z, r = tf.split(gate, 2, 0)
            new = tf.tanh(outer[two:] + r * inner[two:])
            kept = [gates.write(t, gate), inners.write(t, inner[two:]), news.write(t, new), hs.write(t, h)]
            return [z * h + (1 - z) * new, *kept]

        arrays = self._arrays(x, two, self.units, self.units, self.units)
        h, *arrays = _loop(x.shape[0], step, [h, *arrays])
        gates, inners, news, hs = (array.stack() for array in arrays)
        return [self._outputs(h, hs), h], gates, inners, news, hs

    def backward(
        self,
        upstream: list[tf.Tensor],
        x: tf.Tensor,
        kernel: tf.Tensor,
        recurrent: tf.Tensor,
        bias: tf.Tensor,
        results: list[tf.Tensor],
        gates: tf.Tensor,
        inners: tf.Tensor,
        news: tf.Tensor,
        hs: tf.Tensor,
    ) -> Any:
        """The gradients, from those that the results got."""
        each, (dh,) = self._upstream(upstream)

        def step(t: tf.Tensor, dh: tf.Tensor, *sums: Any) -> list[Any]:
            d_kernel, d_recurrent, d_shift, d_inner_shift, *d_inputs = sums
            z, r = tf.split(gates[t], 2, 0)
            new, h = news[t], hs[t]
            dh = dh if each is None else dh + each[t]
            d_new = dh * (1 - z) * (1 - new * new)
            d_z, d_r = dh * (h - new) * z * (1 - z), d_new * inners[t] * r * (1 - r)
            outer, inner = tf.concat([d_z, d_r, d_new], 0), tf.concat([d_z, d_r, d_new * r], 0)
            d_kernel += tf.matmul(x[t], outer, transpose_b=True)
            d_recurrent += tf.matmul(h, inner, transpose_b=True)
            shifts = [d_shift + tf.reduce_sum(outer, 1), d_inner_shift + tf.reduce_sum(inner, 1)]
            d_inputs = [array.write(t, tf.matmul(kernel, outer)) for array in d_inputs]
            return [dh * z + tf.matmul(recurrent, inner), d_kernel, d_recurrent, *shifts, *d_inputs]

        wanted = self._arrays(x, x.shape[1]) if self.wants_inputs else []
        zeros = [tf.zeros_like(w) for w in (kernel, recurrent, bias[0], bias[1])]
        result = _loop(x.shape[0], step, [dh, *zeros, *wanted], backwards=True)
        dh, d_kernel, d_recurrent, d_shift, d_inner_shift, *d_inputs = result
        given = d_inputs[0].stack() if d_inputs else tf.zeros([])
        return [d_kernel, d_recurrent, tf.stack([d_shift, d_inner_shift])], [dh], given
