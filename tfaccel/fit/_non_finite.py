"""Watches a training step for values that are not finite, inside of the compiled step.

Each step asks one question, whether its loss is finite. Only where it is not, the layers are run again on the
same batch to see which of them was first, and which weights were bad already. So watching costs next to
nothing until it happens.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.fit._calls import undo_all, wrap_call, wrap_method
from tfaccel.fit._optimizer import inner_optimizer
from tfaccel.fit._state import beside
from tfaccel.keras_fixes.inner_layers import held_alone, inner_layers

NONE = -1
LEAST_LOSS_SCALE = 1e-3


class NonFiniteWatch:
    """What is put round the loss of one `fit`.

    Args:
        model: Compiled. Attach before its step is traced.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self._step = threading.local()  # what this thread's training step works on, while it is traced
        self._order: list[keras.layers.Layer] = []  # as their calls end, so the inner before the outer
        with model.distribute_strategy.scope():
            # The update, the first layer with an output that is not finite, the first with such weights.
            self._at, self._output, self._weights = (beside(np.full([], NONE, "int32")) for _ in range(3))

    @contextlib.contextmanager
    def watching(self, data: Any) -> Iterator[None]:
        """While the block lasts the loss of this thread's step is watched; that of validation is not.

        Args:
            data: What the step works on.
        """
        self._step.data = data
        try:
            yield
        finally:
            del self._step.data

    def attach(self) -> Callable[[], None]:
        """Puts the watch round `compute_loss`; gives back the undo."""

        def compute_and_watch(compute_loss: Any, x: Any = None, *args: Any, **kwargs: Any) -> Any:
            loss = compute_loss(x, *args, **kwargs)
            if not hasattr(self._step, "data"):
                return loss
            # A train_step of the user's may leave it out.
            inputs = keras.utils.unpack_x_y_sample_weight(self._step.data)[0] if x is None else x
            finite = tf.math.is_finite(loss)
            if loss.shape.rank != 0:  # reduction=None has several
                finite = tf.reduce_all(finite)
            # A call that is not inlined is one node where there is nothing to inspect; the layers' operations
            # would each be skipped by itself, which took a sixth of a small step.
            inspect = tf.function(self._inspect, autograph=False, experimental_attributes={"_noinline": True})
            tf.cond(finite, lambda: 0, lambda: inspect(inputs))
            return loss

        return wrap_method(self._model, "compute_loss", compute_and_watch)

    def _inspect(self, x: Any) -> Any:
        """Notes the first of such steps, and the first layers whose output or weights are not finite."""
        return tf.cond(self._at.value < 0, lambda: self._note(x), lambda: 0)

    def _note(self, x: Any) -> int:
        eager, graph = tf.executing_eagerly(), tf.compat.v1.get_default_graph()
        seen: dict[int, list[tf.Tensor]] = {}
        order: list[keras.layers.Layer] = []
        undo = []

        def watched(layer: keras.layers.Layer) -> Callable[..., Any]:
            def around(call: Any, *args: Any, **kwargs: Any) -> Any:
                outputs = call(*args, **kwargs)
                floats = [each for each in keras.tree.flatten(outputs) if _is_float_tensor(each)]
                if id(layer) not in seen:
                    order.append(layer)
                # What is made inside of a loop can't be read outside of it.
                flags = [_is_bad(each) for each in floats if eager or each.graph is graph]
                seen.setdefault(id(layer), []).extend(flags)
                return outputs

            return around

        layers = [layer for layer in inner_layers(self._model) if layer is not self._model]
        for layer in layers:
            undo.append(wrap_call(layer, watched(layer)))
        try:
            self._model(x, training=True)
        finally:
            undo_all(undo)()
        called = {id(layer) for layer in order}
        self._order = [*order, *(layer for layer in layers if id(layer) not in called)]
        self._output.assign(_first([_any(seen.get(id(layer), [])) for layer in self._order]))
        weights = [
            [_is_bad(v.value) for v in held_alone(layer) if keras.backend.is_float_dtype(v.dtype)]
            for layer in self._order
        ]
        self._weights.assign(_first([_any(flags) for flags in weights]))
        self._at.assign(tf.cast(inner_optimizer(self._model.optimizer).iterations, tf.int32))
        return 0

    def found(self) -> str:
        """Says what was not finite and where, on whichever replica it came first; empty while all is well."""
        copies = [self._copies(each) for each in (self._at, self._weights, self._output)]
        seen = [found for found in zip(*copies, strict=True) if found[0] != NONE]
        if not seen:
            return ""
        step, weights, output = min(seen)
        if weights != NONE:
            where = (
                f"the weights of layer {self._name(weights)!r} were not finite before it: an earlier update "
                "spoiled them"
            )
        elif output != NONE:
            where = f"the output of layer {self._name(output)!r} is the first that is not finite"
        else:
            where = "all layers gave finite outputs: the loss function, or the labels, are not"
        return f"The loss of {self._model.name!r} is not finite at update {step + 1}: {where}."

    def _copies(self, variable: keras.Variable) -> list[int]:
        """Of each replica on this machine."""
        local = self._model.distribute_strategy.experimental_local_results(variable.value)
        return [int(copy.numpy()) for copy in local]

    def _name(self, place: int) -> str:
        layer = self._order[place]
        return (layer.path or layer.name).removeprefix(f"{self._model.name}/")


def check_loss_scale(optimizer: Any, found: str) -> None:
    """Raises where dynamic loss scaling has halved its scale to nothing.

    Args:
        optimizer: That of the model.
        found: What a watch says of the first loss that was not finite.

    Raises:
        FloatingPointError: No scale makes the gradients finite.
    """
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or not optimizer.built:
        return
    scale = float(keras.ops.convert_to_numpy(optimizer.dynamic_scale))
    if scale < LEAST_LOSS_SCALE:
        raise FloatingPointError(
            f"The loss scale has decayed to {scale:.3g}: the gradients of the last updates were not finite "
            f"at any scale, and nothing is learned. {found or 'Every loss was finite: a gradient is not.'} "
            "Allowed: finite gradients. Look for a division by zero or a logarithm of zero there, lower the "
            'learning rate, or train with "float32".'
        )


def _is_float_tensor(each: Any) -> bool:
    return isinstance(each, tf.Tensor) and each.dtype.is_floating


def _is_bad(tensor: tf.Tensor) -> tf.Tensor:
    return tf.logical_not(tf.reduce_all(tf.math.is_finite(tensor)))


def _any(flags: list[tf.Tensor]) -> tf.Tensor:
    return tf.reduce_any(tf.stack(flags)) if flags else tf.constant(False)


def _first(flags: list[tf.Tensor]) -> tf.Tensor:
    """The place of the first that is true, or `NONE`."""
    together = tf.stack(flags)
    return tf.where(tf.reduce_any(together), tf.argmax(together, output_type=tf.int32), NONE)
