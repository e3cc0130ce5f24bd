"""How far a file's outputs are from the model's, in a few figures."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import keras
import numpy as np

from tfaccel.errors import refuse
from tfaccel.export.errors import ExportError
from tfaccel.export.interpreter import TFLiteRunner
from tfaccel.export.samples import Samples, collect_samples
from tfaccel.export.serving import ServingFunction


@dataclasses.dataclass(frozen=True)
class Parity:
    """The distance between two sets of outputs; over several outputs, the worst of them.

    Args:
        max_abs_error: Largest absolute difference of any value, in the output's unit.
        sqnr_db: Signal-to-error ratio, `10 log10(Σ reference² / Σ error²)`, in dB; infinite where
            the outputs are equal. 20 dB is an error of a tenth, 40 dB of a hundredth.
        top1_agreement: Share (0..1) of samples whose largest output is the same; None where an
            output has one unit only.
        mean_abs_error: Mean absolute difference, in the output's unit.
        outputs: The same figures for each output, by its name, where there are several.

    Example:
        >>> print(tfaccel.Parity(0.0123, 38.2, top1_agreement=0.995, mean_abs_error=0.0021))
        max |error| 0.0123, mean 0.0021, SQNR 38.2 dB, top-1 agreement 99.50 %
    """

    max_abs_error: float
    sqnr_db: float
    top1_agreement: float | None
    mean_abs_error: float = 0.0
    outputs: dict[str, Parity] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """One line for a person."""
        text = f"max |error| {self.max_abs_error:.3g}, mean {self.mean_abs_error:.2g}"
        text += f", SQNR {self.sqnr_db:.1f} dB"
        if self.top1_agreement is not None:
            text += f", top-1 agreement {100 * self.top1_agreement:.2f} %"
        return text


def parity(reference: np.ndarray, actual: np.ndarray) -> Parity:
    """Measures `actual` against `reference` (arrays of equal shape, samples first)."""
    reference, actual = np.asarray(reference, np.float64), np.asarray(actual, np.float64)
    error = actual - reference
    signal, noise = float(np.sum(reference**2)), float(np.sum(error**2))
    if noise == 0:
        sqnr_db = math.inf
    else:
        sqnr_db = 10 * math.log10(signal / noise) if signal > 0 else -math.inf
    agreement = None
    if reference.ndim > 1 and reference.shape[-1] > 1:
        agreement = float(np.mean(reference.argmax(-1) == actual.argmax(-1)))
    absolute = np.abs(error)
    return Parity(float(np.max(absolute)), sqnr_db, agreement, float(np.mean(absolute)))


def worst(outputs: dict[str, Parity]) -> Parity:
    """The worst of each figure, over outputs by name."""
    if len(outputs) == 1:
        return next(iter(outputs.values()))
    parities = outputs.values()
    agreements = [p.top1_agreement for p in parities if p.top1_agreement is not None]
    return Parity(
        max(p.max_abs_error for p in parities),
        min(p.sqnr_db for p in parities),
        min(agreements) if agreements else None,
        max(p.mean_abs_error for p in parities),
        outputs,
    )


def compare(
    model: keras.Model,
    path: str | os.PathLike,
    samples: Any,
    *,
    input_signature: Any = None,
    max_samples: int = 1000,
) -> Parity:
    """Runs model and file on the same samples and says how far apart they are.

    Use it on any TFLite file of the model, also one that another tool made. The file runs in the real
    LiteRT interpreter, on the CPU.

    Args:
        model: A built `keras.Model`.
        path: The TFLite file. Integer inputs and outputs are (de)quantized by their own scale.
        samples: Arrays, `(x, y)`, a `tf.data.Dataset` or a `keras.utils.PyDataset`. Use real data.
        input_signature: Nested `tf.TensorSpec` of the inputs; only for a subclassed model that can't
            tell them.
        max_samples: How many samples to run at most. Default 1000.

    Raises:
        ValueError: Samples or model that can't be run.
        ExportError: A file that the standard interpreter can't run, or with other outputs.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> file = tfaccel.export_tflite(model, "compared.tflite", "float16")
        >>> tfaccel.compare(model, "compared.tflite", np.ones((5, 4), "float32")).top1_agreement
        1.0

    Reference:
        SQNR as a measure of quantization: Jacob et al., 2018, https://arxiv.org/abs/1712.05877.
    """
    if not isinstance(max_samples, int) or max_samples < 1:
        raise refuse("max_samples", max_samples, "an integer ≥ 1", "Leave it out for 1000.")
    serving = ServingFunction(model, input_signature)
    rows = collect_samples(samples, serving.specs, max_samples, argument="samples")
    return compare_outputs(serving, TFLiteRunner(path), rows.whole_batches(serving.batch_size))


def compare_outputs(serving: ServingFunction, runner: TFLiteRunner, samples: Samples) -> Parity:
    """`compare` for parts that exist already."""
    return compare_with(serving.predict(samples), runner, samples, [spec.name for spec in serving.specs])


def compare_with(
    reference: dict[str, np.ndarray], runner: TFLiteRunner, samples: Samples, names: list[str]
) -> Parity:
    """`compare` with outputs of the model that are known already."""
    known = set(runner.input_names) == set(names)
    actual = runner.predict(samples, names if known else None)
    if not set(reference) <= set(actual):
        # A file of another tool: its outputs have other names, and go by position.
        if len(reference) != len(actual):
            raise ExportError(
                f"The file has {len(actual)} outputs, the model {len(reference)}. Is it the file of "
                "this model?"
            )
        actual = dict(zip(reference, actual.values(), strict=True))
    for name, values in reference.items():
        if values.shape != actual[name].shape:
            raise ExportError(
                f"The file's output {name!r} has shape {actual[name].shape}, the model's "
                f"{values.shape}. Is it the file of this model?"
            )
    return worst({name: parity(values, actual[name]) for name, values in reference.items()})
