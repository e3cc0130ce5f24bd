"""LSTM and GRU on CPUs: the whole sequence in one XLA program for each core, forwards and backwards.

Keras runs a step of a recurrent layer as about fifteen small operations in a TensorFlow loop, and so its
gradient. cuDNN does a sequence at once, on GPUs only. Here a sequence is two programs, one for each
direction, whose gradients are written out (nothing is kept but what they multiply by), and XLA compiles them.
XLA gains nothing from a second core on matrices this small; so the batch is cut into as many parts as there
are cores, and the parts run side by side.

Used for float32, tanh and sigmoid, no mask, no dropout in the layer, `reset_after=True`, and batches and
sequences of known length; Keras's own code runs otherwise. Unrolling the steps was tried: 0.8 × Keras's time
without XLA, and many times of it with XLA, against 0.2 to 0.5 × for these programs (64 units, 32 steps).

References: Hochreiter & Schmidhuber (1997), https://doi.org/10.1162/neco.1997.9.8.1735; Cho et al. (2014),
https://arxiv.org/abs/1406.1078. Measured by `benchmarks/step_time.py --models lstm gru`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import record

from tfaccel.fast_kernels.recurrent_programs import Gru, Lstm
from tfaccel.keras_fixes.patch import Patch, all_active

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
    kind: type[Lstm] | type[Gru] = Lstm if isinstance(layer, keras.layers.LSTM) else Gru
    kernel, recurrent = (tf.convert_to_tensor(w) for w in (cell.kernel, cell.recurrent_kernel))
    gates = kernel.shape[1]
    bias_shape = [gates] if kind is Lstm else [2, gates]
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
    cores = tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count() or 1
    parts = max(1, min(cores, samples // SAMPLES_A_PART))
    return [len(part) for part in np.array_split(np.arange(samples), parts)]


def _sequence(program: Lstm | Gru, sizes: list[int]) -> Callable[..., Any]:
    """The layer as a function of the sequences, its weights and states, all samples first."""
    forward = tf.function(program.forward, jit_compile=True, autograph=False)
    backward = tf.function(program.backward, jit_compile=True, autograph=False)

    @tf.custom_gradient
    def run(sequences: tf.Tensor, *rest: tf.Tensor) -> Any:
        weights, states = rest[:3], rest[3:]
        inputs, *starts = (tf.split(tensor, sizes) for tensor in (sequences, *states))
        parts = [forward(x, *weights, *start) for x, *start in zip(inputs, *starts, strict=True)]
        results, *kept = zip(*parts, strict=True)

        def gradient(*upstream: tf.Tensor) -> Any:
            cut = [tf.split(u, sizes) for u in upstream]
            gradients = [
                backward(list(up), x, *weights[:2], *of)
                for up, x, *of in zip(zip(*cut, strict=True), inputs, *kept, strict=True)
            ]
            of_weights, of_states, of_inputs = zip(*gradients, strict=True)
            d_weights = [tf.add_n(w) for w in zip(*of_weights, strict=True)]
            d_states = [tf.concat(s, 0) for s in zip(*of_states, strict=True)]
            return [tf.concat(of_inputs, 0) if program.wants_inputs else None, *d_weights, *d_states]

        return [tf.concat(r, 0) for r in zip(*results, strict=True)], gradient

    return run


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
    with all_active(_PATCHES, tf.compat.v1.get_default_graph()):
        yield
