"""Quantization-aware training inside `fit`: the model learns with the few values that its file will have.

When to use: for four bits and fewer, where rounding afterwards loses points, and for int8 files of nets that
lose some too (depthwise ones). Train on for a few epochs at a small learning rate, then export: an int8
recipe for eight bits, `int4_weights` for four.

What it costs: some passes over the weights and activations each step (`benchmarks/compression_overhead.py`),
and a conversion when `fit` begins, seconds, to see which values the file rounds.

    weights:      s · round(w / s),  s = max |w| / (2 ** (bits − 1) − 1) for each output channel
    activations:  s · round(a / s),  s = (high − low) / 255, one for each value that the file has
    gradients:    as if nothing had been rounded (straight-through); none where a value was cut off

Batch normalization is folded into the layer before it, in the file. That scales whole channels, so weights
that are on a grid stay on one, and nothing has to be folded in training. What differs is that training
normalizes by the batch, and the file by the moving statistics: `freeze_norms_epoch` ends that difference.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras

from tfaccel.errors import is_whole, refuse
from tfaccel.fit._activations import KINDS, RoundedActivations
from tfaccel.fit._calls import undo_all, wrap_call
from tfaccel.fit._choice import (
    Choice,
    Layers,
    check_finite,
    check_layers,
    check_some,
    choose_weights,
    skipped_weights,
)
from tfaccel.fit._layout import is_depthwise
from tfaccel.fit._rounded_weights import RoundedWeight, read_rounded
from tfaccel.fit._run import check_alone, check_begin_epoch, check_order
from tfaccel.fit._session import Attachment, detach_leftovers
from tfaccel.fit.cluster_weights import ClusterWeights
from tfaccel.fit.compression_report import CompressionReport, compression_report
from tfaccel.keras_fixes.callback_siblings import siblings
from tfaccel.keras_fixes.inner_layers import inner_layers
from tfaccel.learned_ranges import find_rounded_tensors, remember

ARGUMENTS = ("bits", "activation_bits", "ranges", "begin_epoch", "freeze_norms_epoch", "layers")
ONE_GRID = (keras.layers.Dense, keras.layers.Conv1D, keras.layers.Conv2D)  # for shared values


class QuantizeAware(keras.callbacks.Callback):
    """Trains with weights and activations that are rounded in every forward pass, and leaves a plain model.

    The optimizer goes on with the exact weights, so that small updates add up. It all happens in the compiled
    step, so it holds under `steps_per_execution`, XLA, gradient accumulation, mixed precision and every
    strategy; validation sees the rounded model too. Behind the last step nothing of it is left but weights
    on the grid that `export_tflite` gives them. Zeros stay zero, and equal weights of a channel stay equal,
    so it composes with `PruneWeights` and `ClusterWeights`; list it behind them. Values that `ClusterWeights`
    shares over a dense layer or a convolution in the same fit stay equal in all channels: with eight bits or
    more such a layer has one grid for all of them.

    Activations are rounded where the int8 file has them, which a conversion when `fit` begins tells. Their
    ranges are remembered with the model, and `export_tflite(model, path, "int8")` takes them: it needs no
    calibration data, as long as the weights stay as they are. What layers have inside is measured on up to
    256 rows of the training data, which are remembered too.

    Args:
        bits: Of each weight, 2 to 16. Default 8. A dict in `layers` gives some layers another number.
        activation_bits: Of each activation: 8 (default) for int8 files, 16 for `"int16x8"`, None leaves
            activations alone.
        ranges: `"extremes"` (default): the batches' lowest and highest values, held, and let go slowly where
            they shrink. `"moving_average"`: the average of those, which cuts off what is rare; as tfmot has
            it. `"learned"`: moved by the loss's gradient from those of the first batch on; what is far out is
            cut off where that serves the loss.
        begin_epoch: The epoch at whose beginning it starts. Default 0.
        freeze_norms_epoch: The epoch from which on batch normalizations use their moving statistics, as the
            file does, and keep them; their scales and offsets go on learning. Default None: never.
        layers: Whose weights, as for `PruneWeights`; a dict gives them other bits, and 0 leaves them alone.
            Default: all kernels but embeddings; depthwise ones with 8 bits at least, as LiteRT has them.
            Frozen layers stay as they are, though the file rounds them too. Activations are those of the
            whole file.
        input_signature: As for `export_tflite`, for subclassed models that it is needed for.

    Raises:
        ValueError: A bad argument; or, when `fit` begins and before its first step, a layer that doesn't
            exist or is frozen, weights that aren't finite, a model that no int8 file can be made of, or
            `ClusterWeights` listed behind it.

    Example:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(32), keras.layers.Dense(1)])
        >>> model.compile(keras.optimizers.Adam(1e-3), "mse")
        >>> history = model.fit(
        ...     np.random.rand(64, 8), np.random.rand(64, 1), verbose=0, callbacks=[tfaccel.QuantizeAware()]
        ... )
        >>> file = tfaccel.export_tflite(model, "eight_bits.tflite", "int8")

    Reference:
        Jacob et al., 2018, https://arxiv.org/abs/1712.05877, section 3; straight-through: Bengio et al.,
        2013, https://arxiv.org/abs/1308.3432, section 2; learned ranges: Jain et al., 2020,
        https://arxiv.org/abs/1903.08066; freezing: Krishnamoorthi, 2018, https://arxiv.org/abs/1806.08342.
    """

    settles_weights = True  # when training ends: what exports them comes behind

    def __init__(
        self,
        bits: int = 8,
        activation_bits: int | None = 8,
        *,
        ranges: str = "extremes",
        begin_epoch: int = 0,
        freeze_norms_epoch: int | None = None,
        layers: Layers = None,
        input_signature: Any = None,
    ):
        super().__init__()
        check_layers(layers)
        own = [each for each in layers.values() if each != 0] if isinstance(layers, Mapping) else []
        for number in (bits, *own):
            if not is_whole(number, 2, 16):
                raise refuse("bits", number, "an integer, 2 to 16", "8 for int8 files, 4 for int4_weights.")
        if activation_bits not in (8, 16, None) or activation_bits is True:
            raise refuse("activation_bits", activation_bits, "8, 16 or None", "8 for int8 files.")
        if ranges not in KINDS:
            raise refuse("ranges", ranges, ", ".join(map(repr, KINDS)), "Leave it out for the first.")
        if not is_whole(begin_epoch, 0):
            raise refuse("begin_epoch", begin_epoch, "an integer ≥ 0", "0 is the first epoch.")
        if freeze_norms_epoch is not None and not is_whole(freeze_norms_epoch, 0):
            raise refuse(
                "freeze_norms_epoch", freeze_norms_epoch, "an integer ≥ 0, or None", "0 is the first epoch."
            )
        self.bits, self.activation_bits, self.ranges = bits, activation_bits, ranges
        self.begin_epoch, self.freeze_norms_epoch, self.layers = begin_epoch, freeze_norms_epoch, layers
        self.input_signature = input_signature
        self.report: CompressionReport | None = None
        self._forget()

    def _forget(self) -> None:
        self._has_begun = False
        self._attachment: Attachment | None = None
        self._frozen: Attachment | None = None
        self._weights: list[RoundedWeight] = []
        self._activations: RoundedActivations | None = None

    def set_model(self, model: keras.Model) -> None:
        """Takes off what an interrupted fit left on the model."""
        super().set_model(model)
        detach_leftovers(model)

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks, before the first step, that the model can be trained so."""
        self._forget()
        self.report = None
        check_alone(self)
        check_order(self)
        self._check_clustered_before()
        check_begin_epoch(self)
        if self.freeze_norms_epoch is not None and self.freeze_norms_epoch >= self.params["epochs"]:
            allowed = f"an epoch of this fit, 0 to {self.params['epochs'] - 1}"
            raise refuse("freeze_norms_epoch", self.freeze_norms_epoch, allowed, "Train longer, or earlier.")
        self.choices = choose_weights(self.model, self.layers, self.bits, spared=("embedding",))
        self.chosen = [each for each in self.choices if not each.skipped and each.amount]
        check_some(self.model, self.choices, "quantize")
        check_finite(self.chosen)
        if self.activation_bits is not None:
            self._activations = self._find_activations(self.activation_bits)

    def _check_clustered_before(self) -> None:
        others = siblings(self)
        if any(isinstance(other, ClusterWeights) for other in others[others.index(self) :]):
            raise ValueError(
                "QuantizeAware is listed before ClusterWeights, which would move the rounded weights off "
                "their grid when training ends. Allowed: ClusterWeights first. Exchange the two."
            )

    def _find_activations(self, bits: int) -> RoundedActivations:
        try:
            rounding = find_rounded_tensors(self.model, bits, self.input_signature)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"activation_bits={bits} can't be used: no int8 file can be made of {self.model.name!r}. "
                f"{error} Allowed: what export_tflite takes with 'int8'. Pass activation_bits=None to round "
                "weights only."
            ) from error
        return RoundedActivations(self.model, rounding, bits, self.ranges)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Starts, and freezes, in the first epoch that is not before theirs."""
        self._has_begun = True
        if self._attachment is None and epoch >= self.begin_epoch and (self.chosen or self._activations):
            shared = self._shared()
            self._weights = [
                RoundedWeight(each, self._bits(each), shared=id(each.variable) in shared)
                for each in self.chosen
            ]
            # A recurrent layer hands its cell's weights to a kernel for the whole sequence, and a tied weight
            # is read by a layer that it does not belong to; a `train_step` may call layers by themselves.
            layers = {id(each.layer): each.layer for each in self.chosen} | {id(self.model): self.model}
            undo = [each.restore for each in self._weights]
            undo += [read_rounded(layer) for layer in layers.values()]
            if self._activations is not None:
                undo.append(self._activations.attach())
            undo += [wrap_call(layer, self._unless_left_over(layer)) for layer in layers.values()]
            self._attachment = self._attach(undo)
        if self._frozen is None and self.freeze_norms_epoch is not None and epoch >= self.freeze_norms_epoch:
            norms = [each for each in inner_layers(self.model) if hasattr(each, "moving_variance")]
            self._frozen = self._attach([wrap_call(layer, _at_inference) for layer in norms])

    def _unless_left_over(self, layer: keras.layers.Layer) -> Callable[..., Any]:
        """Lets whoever calls a layer behind an interrupted fit, by whatever way, find it as it was."""

        def call_guarded(call: Any, *args: Any, **kwargs: Any) -> Any:
            if self._attachment is None or not self._attachment.is_left_over:
                return call(*args, **kwargs)
            detach_leftovers(self.model)
            return layer.call(*args, **kwargs)

        return call_guarded

    def _attach(self, undo: list[Callable[[], None]]) -> Attachment:
        """Traces everything anew, now and when it comes off."""

        def trace_again() -> None:
            self.model.make_test_function(force=True)
            self.model.make_predict_function(force=True)

        def take_off() -> None:
            undo_all(undo)()
            trace_again()

        attachment = Attachment(self.model, take_off)
        trace_again()
        return attachment

    def _bits(self, choice: Choice) -> int:
        """LiteRT has no depthwise convolution of less than eight bits."""
        raised = is_depthwise(choice.layer, choice.variable) and not choice.asked_for
        return max(choice.amount, 8) if raised else choice.amount

    def _shared(self) -> set[int]:
        """The weights whose channels share values, by `id`: what the same fit clusters by layers.

        With fewer than eight bits a scale for each channel is worth more, here and in the file; and the file
        has one for the layer in `ONE_GRID` only.
        """
        clustering = [each for each in siblings(self) if isinstance(each, ClusterWeights)]
        shared = {id(variable) for each in clustering for variable in each.shared_by_channels()}
        able = [each for each in self.chosen if isinstance(each.layer, ONE_GRID) and self._bits(each) >= 8]
        return shared & {id(each.variable) for each in able}

    def on_train_end(self, logs: dict | None = None) -> None:
        """Rounds the weights, and makes the model a plain one."""
        for attachment in (self._frozen, self._attachment):
            if attachment is not None:
                attachment.detach()
        if not self._has_begun and self.chosen:
            self._weights = self._resumed_at_the_end()
        for each in self._weights:
            each.settle()
        learned = self._activations.learned() if self._activations is not None else None
        if learned is not None:
            remember(self.model, learned)
        self._forget()
        self.report = compression_report(self.model, skipped=skipped_weights(self.model, self.choices))

    def _resumed_at_the_end(self) -> list[RoundedWeight]:
        """The weights of a run that was cut off behind its last epoch and goes on: `BackupAndRestore`."""
        if self._activations is not None:
            warnings.warn(
                "This fit had no epoch left, so QuantizeAware rounds the weights and knows no ranges of "
                "activations. Pass calibration= to export_tflite, or train for another epoch.",
                stacklevel=2,
            )
        weights = [RoundedWeight(each, self._bits(each)) for each in self.chosen]
        for each in weights:
            each.restore()
        return weights

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {name: getattr(self, name) for name in ARGUMENTS}

    def __repr__(self) -> str:
        """The call that makes the same callback."""
        given = [f"{name}={getattr(self, name)!r}" for name in ARGUMENTS[1:]]
        return f"QuantizeAware({self.bits}, {', '.join(given)})"


def _at_inference(call: Any, inputs: Any, **kwargs: Any) -> Any:
    """A batch normalization's call, as the file has it."""
    return call(inputs, **{**kwargs, "training": False})
