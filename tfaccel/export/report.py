"""`layer_report`: behind which layers a quantized file differs from the float one, and which of them hurt.

Reference: signal-to-quantization-noise by layer, Lin et al., 2016, "Fixed Point Quantization of Deep
Convolutional Networks", https://arxiv.org/abs/1511.06393, section 3.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tfaccel.export.compare import parity
from tfaccel.export.errors import ExportError
from tfaccel.export.interpreter import TFLiteRunner, dequantize, open_with_all_tensors, quantize
from tfaccel.export.metadata import read_metadata
from tfaccel.export.operations import Operation
from tfaccel.export.recipes import RECIPES
from tfaccel.export.samples import Samples, collect_samples
from tfaccel.export.serving import ServingFunction
from tfaccel.export.workbench import Workbench
from tfaccel.plots import new_figure

ROWS = 64  # samples that both files are run on


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One layer of a report.

    Args:
        layer: Its name.
        kinds: What it computes in the file.
        weights: How many constant values it reads.
        sqnr_db: Signal-to-error ratio of its output, in dB; what came in is part of it.
        added_noise: What the layer itself adds: power of the error over power of the signal at its output,
            less that at its inputs. 0.01 is an error of a tenth.
    """

    layer: str
    kinds: tuple[str, ...]
    weights: int
    sqnr_db: float
    added_noise: float


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """Layers of a quantized file, the worst first.

    Args:
        rows: One for each layer that computes anything.
        samples: How many samples they were measured on.

    Example:
        >>> row = tfaccel.LayerRow("dense", ("FULLY_CONNECTED",), 24, sqnr_db=38.2, added_noise=1.5e-4)
        >>> print(tfaccel.LayerReport((row,), samples=64))
        layer  added noise  SQNR behind it  weights  computes
        dense      0.00015         38.2 dB       24  FULLY_CONNECTED
    """

    rows: tuple[LayerRow, ...]
    samples: int

    def __str__(self) -> str:
        """A table for a person."""
        width = max([5, *(len(row.layer) for row in self.rows)])
        lines = [f"{'layer':<{width}}  added noise  SQNR behind it  weights  computes"]
        for row in self.rows:
            kinds = ", ".join(dict.fromkeys(row.kinds))
            lines.append(
                f"{row.layer:<{width}}  {row.added_noise:>11.2g}  {row.sqnr_db:>11.1f} dB  "
                f"{row.weights:>7,}  {kinds}"
            )
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike) -> pathlib.Path:
        """Draws the table as bars, in the order in which the layers run, and gives the path back.

        Args:
            path: Of the picture, `.png` or what else matplotlib writes.

        Raises:
            ValueError: matplotlib is not installed.
        """
        figure, (axes,) = new_figure(8, 1.2 + 0.24 * len(self.rows))
        names = [row.layer for row in self.rows][::-1]
        noise = [max(row.added_noise, 1e-9) for row in self.rows][::-1]
        axes.barh(names, noise, color="tab:red")
        axes.set_xscale("log")
        axes.set_xlabel("noise that the layer adds (power of the error over power of the signal)")
        axes.set_title(f"Quantized against float, {self.samples} samples")
        axes.grid(axis="x", alpha=0.3)
        figure.savefig(path, dpi=120)
        return pathlib.Path(path)


def layer_report(
    model: keras.Model, path: str | os.PathLike, samples: Any, *, input_signature: Any = None
) -> LayerReport:
    """Compares a quantized file with the model layer by layer, and ranks the layers that hurt.

    Use it where `max_drop` was missed: give the worst layers another recipe with `layers=`. It costs one
    conversion and one run of 64 samples through the float file and the quantized one.

    Args:
        model: The model that the file was made of.
        path: The file, written by `export_tflite`.
        samples: Real ones, as for `compare`.
        input_signature: As for `export_tflite`.

    Raises:
        ValueError: Samples that the model can't take.
        ExportError: The file is damaged, or was not made of this model by tfaccel.

    Example:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, name="scores")])
        >>> x = np.random.default_rng(0).random((100, 8), dtype="float32")
        >>> _ = tfaccel.export_tflite(model, "reported.tflite", "int8", calibration=x)
        >>> tfaccel.layer_report(model, "reported.tflite", x).rows[0].layer
        'scores'

    Reference:
        Lin et al., 2016, https://arxiv.org/abs/1511.06393, section 3.
    """
    content = pathlib.Path(path).read_bytes()
    facts = read_metadata(content, str(path))
    serving = ServingFunction(model, input_signature)
    rows = collect_samples(samples, serving.specs, ROWS, argument="samples")
    bench = Workbench(model, serving, rows.whole_batches(serving.batch_size), None, input_signature)
    return report_layers(bench, content, RECIPES[facts["recipe"]].needs_calibration)


def report_layers(bench: Workbench, content: bytes, fixed_ranges: bool) -> LayerReport:
    """`layer_report` for parts that exist already."""
    float_file = bench.converted(fixed_ranges)
    samples = bench.samples.spread(ROWS)
    if set(TFLiteRunner(content).input_names) != {spec.name for spec in bench.serving.specs}:
        raise ExportError(
            "The file's inputs have other names than the model's. Is it the file of this model?"
        )
    sqnr_db = _sqnr_by_tensor(bench, float_file.content, content, samples, float_file.batch_size)
    weighty = [each for each in float_file.operations if each.layer is not None and each.weights > 1]
    missing = [each for each in weighty if not any(name in sqnr_db for name in each.outputs)]
    if missing and 2 * len(missing) >= len(weighty):
        lost = ", ".join(dict.fromkeys(each.layer.name for each in missing if each.layer is not None))
        raise ExportError(
            f"The file has no tensors of the names and shapes that {lost} make. Is it the file of this "
            "model, and not of one with other layers' names?"
        )
    rows: dict[str, list[tuple[Operation, float, float]]] = {}
    for each in float_file.operations:
        behind = [sqnr_db[name] for name in each.outputs if name in sqnr_db]
        if each.layer is None or not behind:
            continue
        before = [sqnr_db[name] for name in each.inputs if name in sqnr_db]
        added = _noise(min(behind)) - _noise(min(before, default=math.inf))
        rows.setdefault(each.layer.name, []).append((each, min(behind), added))
    if not rows:
        raise ExportError(
            "No tensor of the file has a name that this model gives. Is it the file of this model?"
        )
    found = [
        LayerRow(
            name,
            tuple(each.kind for each, _, _ in parts),
            sum(each.weights for each, _, _ in parts),
            parts[-1][1],
            sum(added for _, _, added in parts),
        )
        for name, parts in rows.items()
    ]
    return LayerReport(tuple(sorted(found, key=lambda row: -row.added_noise)), len(samples))


def _noise(sqnr_db: float) -> float:
    """The power of the error over that of the signal."""
    return 10 ** (-sqnr_db / 10) if math.isfinite(sqnr_db) else (0.0 if sqnr_db > 0 else math.inf)


def _sqnr_by_tensor(
    bench: Workbench, reference: bytes, content: bytes, samples: Samples, batch_size: int | None
) -> dict[str, float]:
    names = [spec.name for spec in bench.serving.specs]
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    files = [_tensors(each, names, samples, batch_size) for each in (reference, content)]
    for ours, theirs in zip(*files, strict=True):
        for name in ours.keys() & theirs.keys():
            if ours[name].shape == theirs[name].shape:
                parts.setdefault(name, []).append((ours[name].ravel(), theirs[name].ravel()))
    return {
        name: parity(*(np.concatenate(side) for side in zip(*pairs, strict=True))).sqnr_db
        for name, pairs in parts.items()
    }


def _tensors(
    content: bytes, names: list[str], samples: Samples, batch_size: int | None
) -> Iterator[dict[str, np.ndarray]]:
    """All that a file computes, by name and as floats, batch by batch."""
    interpreter = open_with_all_tensors(content)
    runner = interpreter.get_signature_runner()
    inputs = runner.get_input_details()
    for batch in samples.batches(batch_size or 16):
        runner(**{name: quantize(rows, inputs[name]) for name, rows in zip(names, batch, strict=True)})
        yield dict(_values(interpreter))


def _values(interpreter: Any) -> Iterator[tuple[str, np.ndarray]]:
    for detail in interpreter.get_tensor_details():
        scale, _ = detail["quantization"]
        if detail["dtype"] is not np.float32 and not scale:
            continue
        try:
            values = interpreter.get_tensor(detail["index"])
        except ValueError:  # never computed
            continue
        if values.size:
            yield detail["name"], dequantize(values, detail)
