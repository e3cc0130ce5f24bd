"""Watches a training step for values that are not finite, inside of the compiled step.

Each step asks one question, whether its loss is finite. Only where it is not, the layers are run again on the
same batch to see which of them was first, and which weights were bad already. So watching costs next to
nothing until it happens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.fit._calls import wrap_call
from tfaccel.fit._optimizer import inner_optimizer
from tfaccel.fit._state import beside
from tfaccel.keras_fixes.inner_layers import inner_layers

NOT_SEEN = -1
LEAST_LOSS_SCALE = 1e-3


class NonFiniteWatch:
    """What is put round the loss of one `fit`.

    Args:
        model: Built and compiled. Attach before its step is traced.

    `active` is asked while the step is traced.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self.active = True
        self._layers = [layer for layer in inner_layers(model) if layer is not model]
        with model.distribute_strategy.scope():
            self._at = beside(np.full([], NOT_SEEN, "int32"))
            self._bad_outputs = beside(np.zeros(len(self._layers), "float32"))
            self._bad_weights = beside(np.zeros(len(self._layers), "float32"))

    def attach(self) -> Callable[[], None]:
        """Puts the watch round `compute_loss`; gives back the undo."""
        model = self._model
        shadowed, compute_loss = vars(model).get("compute_loss"), model.compute_loss

        def compute_and_watch(x: Any = None, *args: Any, **kwargs: Any) -> Any:
            loss = compute_loss(x, *args, **kwargs)
            if not self.active:
                return loss
            bad = tf.logical_and(
                self._at.value < 0, tf.logical_not(tf.math.is_finite(tf.cast(loss, tf.float32)))
            )
            # A call that is not inlined is one node where there is nothing to inspect; the layers' operations
            # would each be skipped by itself, which took a sixth of a small step.
            inspect = tf.function(self._inspect, autograph=False, experimental_attributes={"_noinline": True})
            tf.cond(bad, lambda: inspect(x), lambda: 0)
            return loss

        def undo() -> None:
            if shadowed is None:
                del model.compute_loss
            else:
                model.compute_loss = shadowed

        model.compute_loss = compute_and_watch
        return undo

    def _inspect(self, x: Any) -> int:
        """Notes the step, and every layer whose output or weights are not finite."""
        eager, graph = tf.executing_eagerly(), tf.compat.v1.get_default_graph()
        seen: list[list[tf.Tensor]] = [[] for _ in self._layers]
        undo = []

        def watched(index: int) -> Callable[..., Any]:
            def around(call: Any, *args: Any, **kwargs: Any) -> Any:
                outputs = call(*args, **kwargs)
                floats = [each for each in keras.tree.flatten(outputs) if _is_float_tensor(each)]
                # What is made inside of a loop can't be read outside of it.
                seen[index].extend(_is_bad(each) for each in floats if eager or each.graph is graph)
                return outputs

            return around

        for index, layer in enumerate(self._layers):
            undo.append(wrap_call(layer, watched(index)))
        try:
            if x is not None:
                self._model(x, training=True)
        finally:
            for step in reversed(undo):
                step()
        weights = [[_is_bad(each.value) for each in _own_floats(layer)] for layer in self._layers]
        self._bad_outputs.assign(tf.stack([_any(flags) for flags in seen]))
        self._bad_weights.assign(tf.stack([_any(flags) for flags in weights]))
        self._at.assign(tf.cast(inner_optimizer(self._model.optimizer).iterations, tf.int32))
        return 0

    def found(self) -> str:
        """Says what was not finite and where; empty while all is well."""
        step = int(keras.ops.convert_to_numpy(self._at))
        if step == NOT_SEEN:
            return ""
        weights = self._first(self._bad_weights)
        outputs = self._first(self._bad_outputs)
        if weights is not None:
            where = (
                f"the weights of layer {weights!r} were not finite before it: an earlier update spoiled them"
            )
        elif outputs is not None:
            where = f"the output of layer {outputs!r} is the first that is not finite"
        else:
            where = "all layers gave finite outputs: the loss function, or the labels, are not"
        return f"The loss of {self._model.name!r} is not finite at update {step + 1}: {where}."

    def _first(self, flags: keras.Variable) -> str | None:
        bad = np.flatnonzero(keras.ops.convert_to_numpy(flags))
        # Of a layer and what is inside of it, which comes behind it in the list, the inner one says more.
        names = [self._layers[index] for index in bad]
        for layer in names:
            inside = [other for other in inner_layers(layer) if other is not layer and other in names]
            if not inside:
                return (layer.path or layer.name).removeprefix(f"{self._model.name}/")
        return None


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
    return tf.cast(tf.reduce_any(tf.stack(flags)), tf.float32) if flags else tf.constant(0.0)


def _own_floats(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The weights of this layer that no layer inside of it has."""
    inside = {id(v) for other in inner_layers(layer) if other is not layer for v in other.variables}
    return [v for v in layer.variables if id(v) not in inside and keras.backend.is_float_dtype(v.dtype)]
