"""A model as a plain function for serving inside Python: numpy in, numpy out, one compiled program a shape.

When to use: answers one request at a time, in a web server or a control loop. `model.predict` builds a
`tf.data` pipeline, callbacks and a progress bar around every call, and calling the model runs it layer by
layer in Python. Here a call is one lookup and one compiled function. Outside of Python, use `export_tflite`.
"""

from __future__ import annotations

import collections
import threading
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.fast_kernels.resident import in_floatx
from tfaccel.learned_ranges import take_off_leftovers


def predictor(model: keras.Model, *, max_shapes: int = 16, jit: bool = False) -> Predictor:
    """Makes a fast, thread-safe function out of a model.

    It computes `model(x, training=False)` for a whole batch at once, with the weights that the model has at
    the time of the call. The first call with new input shapes traces the model (a second, or more for
    large models); later ones don't run Python layers at all.

    Args:
        model: A Keras model; it is not changed.
        max_shapes: How many compiled functions are kept, at least 1; the one used longest ago goes first.
            Pad or batch inputs to few sizes. Default 16.
        jit: Compile with XLA: slower to make, often faster for models without convolutions. Default False.

    Returns:
        A `Predictor`: call it with what `model.predict` takes as `x` (arrays of shape `(samples, ...)`,
        nested or not); it gives numpy arrays in the structure of the model's outputs.

    Raises:
        ValueError: `model` is not a Keras model, or `max_shapes` is below 1.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> predict = tfaccel.predictor(model)
        >>> predict(np.ones((1, 4), "float32")).shape
        (1, 2)

    Reference:
        `benchmarks/prediction.py` measures it beside `model.predict` and calling the model.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"model={type(model).__name__} can't be served. Allowed: a keras.Model. Load it with "
            "keras.models.load_model."
        )
    if isinstance(max_shapes, bool) or not isinstance(max_shapes, int | np.integer) or max_shapes < 1:
        raise ValueError(
            f"max_shapes={max_shapes!r} is not usable. Allowed: an integer ≥ 1. Leave it out for 16."
        )
    take_off_leftovers(model)
    return Predictor(model, int(max_shapes), bool(jit))


class Predictor:
    """What `predictor` makes. See there for the arguments."""

    def __init__(self, model: keras.Model, max_shapes: int, jit: bool):
        self._model = model
        self._max_shapes = max_shapes
        self._jit = jit
        self._programs: collections.OrderedDict[tuple, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, inputs: Any) -> Any:
        """The model's outputs for a batch, as numpy arrays.

        Args:
            inputs: Arrays of shape `(samples, ...)`, nested as the model takes them.

        Raises:
            ValueError: An input has no sample axis, or is not numeric.
        """
        tensors = keras.tree.map_structure(_as_tensor, inputs)
        leaves = keras.tree.flatten(tensors)
        structure = repr(keras.tree.map_structure(lambda leaf: 0, tensors))
        key = (structure, *((leaf.dtype, *leaf.shape) for leaf in leaves))
        # Tracing changes state that Keras shares between threads, so one at a time.
        with self._lock:
            program = self._programs.get(key)
            if program is None:
                program = self._programs[key] = self._trace(tensors)
                if len(self._programs) > self._max_shapes:
                    self._programs.popitem(last=False)
            else:
                self._programs.move_to_end(key)
        return keras.tree.map_structure(lambda output: output.numpy(), program(*leaves))

    def _trace(self, tensors: Any) -> Any:
        def run(*leaves: tf.Tensor) -> Any:
            return self._model(keras.tree.pack_sequence_as(tensors, leaves), training=False)

        specs = [tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in keras.tree.flatten(tensors)]
        if not self._model.built:
            self._model(tensors, training=False)  # its variables can't be made inside
        return tf.function(run, autograph=False, jit_compile=self._jit).get_concrete_function(*specs)

    def __repr__(self) -> str:
        """The model's name and how many programs are kept."""
        return f"<Predictor of {self._model.name!r}, {len(self._programs)} of {self._max_shapes} shapes>"


def _as_tensor(leaf: Any) -> tf.Tensor:
    tensor = leaf if isinstance(leaf, tf.Tensor) else tf.convert_to_tensor(np.asarray(leaf))
    if tensor.shape.rank == 0:
        raise ValueError(
            "An input is a single number. Allowed: arrays of shape (samples, ...). Add the sample axis, "
            "as in np.asarray(x)[None]."
        )
    return in_floatx(tensor)
