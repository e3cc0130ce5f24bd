"""LSTM and GRU on CPUs: the whole sequence in one XLA program for each core, forwards and backwards.

Keras runs a step of a recurrent layer as about fifteen small operations in a TensorFlow loop, and so its
gradient. cuDNN does a sequence at once, on GPUs only. Here a sequence is two programs, one for each
direction, whose gradients are written out (so that nothing but the gates is kept), and XLA compiles them.
XLA gains nothing from a second core on matrices this small; so the batch is cut into as many parts as there
are cores, and the parts run side by side. Features come first and samples last: the gates are then whole
rows, which XLA vectorizes, and the input's product joins the state's.

Used for float32, tanh and sigmoid, no mask, no dropout in the layer, `reset_after=True`, and batches and
sequences of known length; Keras's own code runs otherwise. Unrolling the steps was tried: 0.8 × Keras's time
without XLA, and many times of it with XLA, against 0.5 × for these programs (LSTM of 64 units, 32 steps).

References: Hochreiter & Schmidhuber (1997), https://doi.org/10.1162/neco.1997.9.8.1735; Cho et al. (2014),
https://arxiv.org/abs/1406.1078. Measured by `benchmarks/step_time.py --models lstm gru`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import record

from tfaccel.fast_kernels.patch import Patch

SAMPLES_A_PART = 8  # at least


def why_not(layer: keras.layers.Layer) -> str:
    """What in the settings of an LSTM or GRU the programs don't have; empty where they have everything."""
    cell: Any = getattr(layer, "cell", None)
    pairs = [(keras.layers.LSTM, keras.layers.LSTMCell), (keras.layers.GRU, keras.layers.GRUCell)]
    if (type(layer), type(cell)) not in pairs:
        return "it is a subclass or has another cell"
    if layer.use_cudnn is True:
        return "use_cudnn=True"
    if cell.activation is not keras.activations.tanh:
        return "its activation is not tanh"
    if cell.recurrent_activation is not keras.activations.sigmoid:
        return "its recurrent activation is not sigmoid"
    if cell.dropout or cell.recurrent_dropout:
        return "it drops inside the layer"
    if not getattr(cell, "reset_after", True):
        return "reset_after=False"
    return "" if layer.compute_dtype == layer.variable_dtype == "float32" else "it is not float32"


def can_fuse(layer: keras.layers.Layer, sequences: Any, mask: Any, graph: Any) -> bool:
    """Whether the programs compute what this call of the layer's `inner_loop` would.

    Args:
        layer: LSTM or GRU.
        sequences: What it is called on.
        mask: None, or which steps count.
        graph: The graph of the step. In one inside of it (a loop, a condition, a function of the user's)
            no tape tells whether the inputs want a gradient.
    """
    inner = tf.compat.v1.get_default_graph() is not graph
    if mask is not None or inner or tf.executing_eagerly() or why_not(layer):
        return False
    return sequences.shape.is_fully_defined() and sequences.dtype == tf.float32 and sequences.shape[0] > 0


def fused_call(
    layer: keras.layers.Layer, sequences: tf.Tensor, initial_state: Sequence[tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
    """`layer.inner_loop(sequences, initial_state, mask=None)`: last output, outputs, states."""
    cell = layer.cell
    kind: type[_Lstm] | type[_Gru] = _Lstm if isinstance(layer, keras.layers.LSTM) else _Gru
    kernel, recurrent = (tf.convert_to_tensor(w) for w in (cell.kernel, cell.recurrent_kernel))
    gates = kernel.shape[1]
    bias_shape = [gates] if kind is _Lstm else [2, gates]
    bias = tf.convert_to_tensor(cell.bias) if cell.use_bias else tf.zeros(bias_shape)
    sequences = tf.reverse(sequences, [1]) if layer.go_backwards else sequences
    run = _sequence(
        kind(cell.units, all_outputs=layer.return_sequences, wants_inputs=_is_watched(sequences)),
        _part_sizes(sequences.shape[0]),
    )
    outputs, *states = run(sequences, kernel, recurrent, bias, *initial_state)
    if layer.return_sequences:
        return outputs[:, -1], outputs, states
    return outputs, outputs[:, None], states


def _is_watched(tensor: tf.Tensor) -> bool:
    """Whether a gradient may be asked for: not where the layer is the first one with weights."""
    return bool(record.should_record_backprop([tensor]))


def _part_sizes(samples: int) -> list[int]:
    cores = tf.config.threading.get_intra_op_parallelism_threads() or len(os.sched_getaffinity(0))
    parts = max(1, min(cores, samples // SAMPLES_A_PART))
    return [len(part) for part in np.array_split(np.arange(samples), parts)]


def _sequence(program: _Lstm | _Gru, sizes: list[int]) -> Callable[..., Any]:
    """The layer as a function of the sequences, its weights and states, all samples first."""
    forward = tf.function(program.forward, jit_compile=True, autograph=False)
    backward = tf.function(program.backward, jit_compile=True, autograph=False)

    @tf.custom_gradient
    def run(sequences: tf.Tensor, *rest: tf.Tensor) -> Any:
        weights, states = rest[:3], rest[3:]
        inputs = tf.split(tf.transpose(sequences, [1, 2, 0]), sizes, axis=2)
        starts = list(zip(*(tf.split(tf.transpose(s), sizes, axis=1) for s in states), strict=True))
        kept = [forward(x, *weights, *start) for x, start in zip(inputs, starts, strict=True)]

        def gradient(*upstream: tf.Tensor) -> Any:
            cut = [tf.split(_samples_last(u), sizes, axis=-1) for u in upstream]
            parts = [
                backward(list(up), x, *weights, *of)
                for up, x, of in zip(zip(*cut, strict=True), inputs, kept, strict=True)
            ]
            of_weights, of_states, of_inputs = zip(*parts, strict=True)
            d_weights = [tf.add_n(w) for w in zip(*of_weights, strict=True)]
            d_states = [tf.transpose(tf.concat(s, 1)) for s in zip(*of_states, strict=True)]
            d_inputs = tf.transpose(tf.concat(of_inputs, 2), [2, 0, 1]) if program.wants_inputs else None
            return [d_inputs, *d_weights, *d_states]

        results = [_samples_first(tf.concat(r, -1)) for r in zip(*(k[0] for k in kept), strict=True)]
        return results, gradient

    return run


def _samples_last(tensor: tf.Tensor) -> tf.Tensor:
    return tf.transpose(tensor, [1, 2, 0] if tensor.shape.rank == 3 else [1, 0])


def _samples_first(tensor: tf.Tensor) -> tf.Tensor:
    return tf.transpose(tensor, [2, 0, 1] if tensor.shape.rank == 3 else [1, 0])


@dataclasses.dataclass(frozen=True)
class _Program:
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


class _Lstm(_Program):
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


class _Gru(_Program):
    """Gates in Keras's order: update, reset, candidate; the reset acts after the recurrent product."""

    def _halves(self) -> tf.Tensor:
        return tf.constant(np.repeat([0.5, 0.5, 1.0], self.units)[:, None].astype("float32"))

    def forward(
        self, x: tf.Tensor, kernel: tf.Tensor, recurrent: tf.Tensor, bias: tf.Tensor, h: tf.Tensor
    ) -> Any:
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


def _wrap(original: Callable, graph_of_the_step: Callable[[], Any]) -> Callable:
    def inner_loop(self: Any, sequences: Any, initial_state: Any, mask: Any, training: bool = False) -> Any:
        graph = graph_of_the_step()
        if graph is not None and can_fuse(self, sequences, mask, graph):
            return fused_call(self, sequences, initial_state)
        return original(self, sequences, initial_state, mask, training=training)

    return inner_loop


_PATCHES = [Patch(layer, "inner_loop", _wrap) for layer in (keras.layers.LSTM, keras.layers.GRU)]


@contextlib.contextmanager
def fused() -> Any:
    """Lets LSTM and GRU fuse in this thread while the block lasts: enter it where a step is being traced."""
    with contextlib.ExitStack() as stack:
        for patch in _PATCHES:
            stack.enter_context(patch.active(tf.compat.v1.get_default_graph()))
        yield
