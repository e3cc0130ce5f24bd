"""Quantization-aware training of weights inside `fit`: the model learns with the few values that its file
will have.

When to use: for four bits and fewer, where rounding afterwards loses points; eight rarely need it. Train on
for a few epochs at a small learning rate, then export: `int4_weights` for four bits, any int8 recipe for
eight.

What it costs: some passes over the weights each step (`benchmarks/compression_overhead.py`).

    values:     s · round(w / s),  s = max |w| / (2 ** (bits − 1) − 1) for each output channel
    gradients:  as if nothing had been rounded (straight-through)
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from tfaccel.errors import is_whole, refuse
from tfaccel.fit._choice import (
    Choice,
    Layers,
    check_finite,
    check_layers,
    check_some,
    choose_weights,
    skipped_weights,
)
from tfaccel.fit._layout import channel_axes
from tfaccel.fit._run import check_begin_epoch, check_order
from tfaccel.fit._session import Attachment, detach_leftovers
from tfaccel.fit.compression_report import CompressionReport, compression_report


def on_grid(values: Any, bits: int, axes: list[int]) -> Any:
    """Values rounded to a symmetric grid that reaches to the largest of each channel.

    Args:
        values: A float tensor.
        bits: Of the integers, 2 to 16; the grid has `2 ** bits - 1` values.
        axes: The channels' axes: along the others the scale is the same.
    """
    whole = tf.cast(values, tf.float32)
    others = [axis for axis in range(len(values.shape)) if axis not in axes]
    largest = tf.reduce_max(tf.abs(whole), axis=others, keepdims=True)
    scale = tf.maximum(largest, 1e-12) / (2 ** (bits - 1) - 1)
    return tf.cast(tf.round(whole / scale) * scale, values.dtype)


class QuantizeAware(keras.callbacks.Callback):
    """Trains with weights that are rounded to `bits` in every forward pass, and leaves them rounded.

    The optimizer goes on with the exact weights, so that small updates add up. It all happens in the compiled
    step, so it holds under `steps_per_execution`, XLA, gradient accumulation, mixed precision and every
    strategy; validation sees the rounded weights too. Behind the last step the model is a plain one, whose
    weights are on the grid that `export_tflite` gives them: the file has them exactly. Zeros stay zero, and
    equal weights of a channel stay equal, so it composes with `PruneWeights` and `ClusterWeights`; list it
    behind them. Activations are not rounded: an int8 file takes their ranges from its calibration samples.

    Args:
        bits: Of each weight, 2 to 16. Default 8. A dict in `layers` gives some layers another number.
        begin_epoch: The epoch at whose beginning it starts. Default 0.
        layers: Which layers, as for `PruneWeights`; a dict gives them other bits, and 0 leaves them alone.
            Default: all kernels but embeddings; depthwise ones with 8 bits at least, as LiteRT has them.

    Raises:
        ValueError: A bad argument; or, when `fit` begins and before its first step, a layer that doesn't
            exist or is frozen, or weights that aren't finite.

    Example:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(32), keras.layers.Dense(1)])
        >>> model.compile(keras.optimizers.Adam(1e-3), "mse")
        >>> history = model.fit(
        ...     np.random.rand(64, 8), np.random.rand(64, 1), verbose=0, callbacks=[tfaccel.QuantizeAware(4)]
        ... )
        >>> file = tfaccel.export_tflite(model, "four_bits.tflite", "int4_weights")

    Reference:
        Jacob et al., 2018, https://arxiv.org/abs/1712.05877, section 3; straight-through: Bengio et al.,
        2013, https://arxiv.org/abs/1308.3432, section 2.
    """

    def __init__(self, bits: int = 8, *, begin_epoch: int = 0, layers: Layers = None):
        super().__init__()
        check_layers(layers)
        own = [each for each in layers.values() if each != 0] if isinstance(layers, Mapping) else []
        for number in (bits, *own):
            if not is_whole(number, 2, 16):
                raise refuse("bits", number, "an integer, 2 to 16", "8 for int8 files, 4 for int4_weights.")
        if not is_whole(begin_epoch, 0):
            raise refuse("begin_epoch", begin_epoch, "an integer ≥ 0", "0 is the first epoch.")
        self.bits, self.begin_epoch, self.layers = bits, begin_epoch, layers
        self.report: CompressionReport | None = None
        self._attachment: Attachment | None = None

    def set_model(self, model: keras.Model) -> None:
        """Takes off what an interrupted fit left on the model."""
        super().set_model(model)
        detach_leftovers(model)

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks, before the first step, that the model can be trained so."""
        self._attachment, self.report = None, None
        check_order(self)
        check_begin_epoch(self)
        self.choices = choose_weights(self.model, self.layers, self.bits, spared=("embedding",))
        self._chosen = [each for each in self.choices if not each.skipped and each.amount]
        check_some(self.model, self.choices, "quantize")
        check_finite(self._chosen)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Starts in the first epoch that is not before `begin_epoch`."""
        if self._attachment is not None or not self._chosen or epoch < self.begin_epoch:
            return
        self._weights = [_Rounded(each, self._bits(each)) for each in self._chosen]
        layers = {id(each.layer): each.layer for each in self._chosen}
        undo = [_reading_rounded(layer) for layer in layers.values()]

        def take_off() -> None:
            for step in (*undo, *(each.restore for each in self._weights)):
                step()
            self.model.make_test_function(force=True)
            self.model.make_predict_function(force=True)

        self._attachment = Attachment(self.model, take_off)
        self.model.make_test_function(force=True)
        self.model.make_predict_function(force=True)

    def _bits(self, choice: Choice) -> int:
        """LiteRT has no depthwise convolution of less than eight bits."""
        named = self.layers is not None
        return choice.amount if named or "depthwise" not in choice.variable.name else max(choice.amount, 8)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Rounds the weights, and makes the model a plain one."""
        if self._attachment is not None:
            self._attachment.detach()
            for each in self._weights:
                each.variable.assign(on_grid(tf.convert_to_tensor(each.variable.value), each.bits, each.axes))
            self._attachment, self._weights = None, []
        self.report = compression_report(self.model, skipped=skipped_weights(self.choices))

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {name: getattr(self, name) for name in ("bits", "begin_epoch", "layers")}

    def __repr__(self) -> str:
        """The call that makes the same callback."""
        return f"QuantizeAware({self.bits}, begin_epoch={self.begin_epoch}, layers={self.layers!r})"


class _Reading(threading.local):
    """Whether this thread is inside of a layer that reads rounded weights."""

    depth = 0


_reading = _Reading()


class _Rounded:
    """A variable that is read rounded inside of its layer's call, until `restore()`.

    Args:
        choice: The weight.
        bits: It is read with.
    """

    def __init__(self, choice: Choice, bits: int):
        self.variable, self.bits = choice.variable, bits
        self.axes = channel_axes(choice.layer, choice.variable)
        self._plain = plain = type(choice.variable)
        axes = self.axes

        class RoundedVariable(plain):  # type: ignore[misc, valid-type]
            """The optimizer, a saved file and a checkpoint see the exact values; the layer sees these."""

            @property
            def value(self) -> Any:
                exact = plain.value.fget(self)
                if not _reading.depth:
                    return exact
                exact = tf.convert_to_tensor(exact)
                return exact + tf.stop_gradient(on_grid(exact, bits, axes) - exact)

        RoundedVariable.__name__ = plain.__name__
        choice.variable.__class__ = RoundedVariable

    def restore(self) -> None:
        """Makes it the plain variable that it was."""
        self.variable.__class__ = self._plain


def _reading_rounded(layer: keras.layers.Layer) -> Callable[[], None]:
    """Lets a layer read rounded weights in its `call`; gives back the undo."""
    shadowed = vars(layer).get("call")
    call = layer.call

    @functools.wraps(call)
    def call_rounded(*args: Any, **kwargs: Any) -> Any:
        _reading.depth += 1
        try:
            return call(*args, **kwargs)
        finally:
            _reading.depth -= 1

    def undo() -> None:
        if shadowed is None:
            del layer.call
        else:
            layer.call = shadowed

    layer.call = call_rounded
    return undo
