"""One model on its way to a file: what it was converted to, its ranges and its outputs, each made once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from tfaccel.export.compare import Parity, compare_with
from tfaccel.export.conversion import Converted, convert_model
from tfaccel.export.errors import ExportError
from tfaccel.export.interpreter import TFLiteRunner
from tfaccel.export.layers import Layer, read_layers
from tfaccel.export.quantization import (
    Ranges,
    bits_to_round,
    measure_ranges,
    quantize,
    with_learned,
)
from tfaccel.export.recipes import Recipe
from tfaccel.export.rounding import Rounder
from tfaccel.export.samples import Samples, spread_indices
from tfaccel.export.scoring import Score, Scorer
from tfaccel.export.serving import ServingFunction
from tfaccel.export.shared_values import BITS, shared_kernels, shared_ranges
from tfaccel.learned_ranges import LearnedRanges


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A file that was built and run, not written yet.

    Args:
        recipe: Of the file.
        content: Its bytes.
        parity: Against the model, on the samples.
        score: Of model and file, where there is something to score on.
        batch_size: Where it is fixed.
        float_operations: What computes in floats though the recipe is for integers, by kind and layer.
        layers: Layers with a recipe of their own.
    """

    recipe: Recipe
    content: bytes
    parity: Parity
    score: Score | None
    batch_size: int | None
    float_operations: tuple[str, ...]
    layers: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Workbench:
    """A model and the data that its files are measured on.

    Args:
        model: Built.
        samples: Real ones, or made up.
        scorer: What scores model and file, if anything does.
        input_signature: As for `export_tflite`.
        allow_select_ops: As for `export_tflite`.
        learned: Ranges that the model was trained with.
    """

    def __init__(
        self,
        model: keras.Model,
        serving: ServingFunction,
        samples: Samples,
        scorer: Scorer | None = None,
        input_signature: Any = None,
        allow_select_ops: bool = False,
        learned: LearnedRanges | None = None,
    ):
        self.model = model
        self.serving = serving
        self.samples = samples
        self.allow_select_ops = allow_select_ops
        self._scorer = scorer
        self._input_signature = input_signature
        self._converted: dict[bool, Converted] = {}
        self._ranges: Ranges | None = None
        self._learned = learned
        self._rounders: dict[bool, Rounder] = {}
        self._layers: dict[bool, list[Layer]] = {}
        self._reference: dict[str, np.ndarray] | None = None

    def converted(self, fixed_ranges: bool) -> Converted:
        """The float file; without loops where activations are to have fixed ranges."""
        if fixed_ranges not in self._converted:
            self._converted[fixed_ranges] = convert_model(
                self.model,
                self._input_signature,
                fixed_ranges=fixed_ranges,
                allow_select_ops=self.allow_select_ops,
                lengths=[array.shape[1:] for array in self.samples.inputs],
            )
        return self._converted[fixed_ranges]

    def build(self, recipe: Recipe, chosen: Mapping[str, Recipe] | None = None) -> bytes:
        """The file's bytes."""
        float_file = self.converted(recipe.needs_calibration)
        if recipe.weight_bits == 32 and not chosen:
            return float_file.content
        if recipe.needs_calibration and self._ranges is None:
            names = [spec.name for spec in self.serving.specs]
            self._ranges = measure_ranges(float_file.content, names, self.samples, float_file.batch_size)
            if self._learned is not None:
                learned = self._learned.in_file(float_file.operations)
                self._ranges = with_learned(self._ranges, learned)
        ranges = self._ranges if recipe.needs_calibration else None
        content = float_file.content
        bits = bits_to_round(recipe, float_file.operations, chosen)
        grids = self._shared_ranges(recipe.needs_calibration, bits)
        if bits and not self.samples.made_up:
            content, grids = self._rounder(recipe.needs_calibration).apply(bits, grids)
        if grids:
            ranges = {**(ranges or {}), **grids}
        return quantize(content, recipe, float_file.operations, ranges, chosen)

    def _shared_ranges(self, fixed_ranges: bool, bits: Mapping[str, int]) -> Ranges:
        """Those of weights whose channels share values, if there are any."""
        if BITS not in bits.values() or not self._kernels:
            return {}
        if fixed_ranges not in self._layers:
            self._layers[fixed_ranges] = read_layers(self.converted(fixed_ranges).content)
        return shared_ranges(self._kernels, self._layers[fixed_ranges], bits)

    @functools.cached_property
    def _kernels(self) -> list[np.ndarray]:
        return shared_kernels(self.model)

    def _rounder(self, fixed_ranges: bool) -> Rounder:
        if fixed_ranges not in self._rounders:
            names = [spec.name for spec in self.serving.specs]
            float_file = self.converted(fixed_ranges)
            self._rounders[fixed_ranges] = Rounder(
                float_file.content, names, self.samples, float_file.batch_size
            )
        return self._rounders[fixed_ranges]

    def measure(self, recipe: Recipe, content: bytes) -> Candidate:
        """Runs a file, and compares it with the model."""
        float_file = self.converted(recipe.needs_calibration)
        runner = TFLiteRunner(content)
        left = float_operations(content, float_file) if recipe.activation_bits else ()
        score = self._scorer.score(runner) if self._scorer else None
        return Candidate(recipe, content, self.parity(runner), score, float_file.batch_size, left)

    def parity(self, runner: TFLiteRunner, rows: int | None = None) -> Parity:
        """How far a file's outputs are from the model's, on `rows` samples from all over; default on all."""
        names = [spec.name for spec in self.serving.specs]
        samples = self.samples if rows is None else self.samples.spread(rows)
        which = spread_indices(len(self.samples), rows)
        reference = {name: values[which] for name, values in self.reference.items()}
        return compare_with(reference, runner, samples, names)

    @property
    def reference(self) -> dict[str, np.ndarray]:
        """The model's own outputs on the samples, by name.

        Raises:
            ExportError: They are NaN.
        """
        if self._reference is None:
            found = self.serving.predict(self.samples)
            if any(np.isnan(values).any() for values in found.values()):
                made_up = " Pass calibration= real samples." if self.samples.made_up else ""
                raise ExportError(
                    f"The outputs of {self.model.name!r} itself are NaN. Nothing was written. Look for "
                    f"weights that are NaN, or samples outside of what it can take.{made_up}"
                )
            self._reference = found
        return self._reference

    @property
    def score_of_model(self) -> float | None:
        """The model's own score, where there is something to score on."""
        return self._scorer.of_model if self._scorer else None

    @property
    def scored(self) -> Samples | None:
        """What files are scored on, where a function of the user's does not hide it."""
        return self._scorer.samples if self._scorer else None


def float_operations(content: bytes, float_file: Converted) -> tuple[str, ...]:
    """What still computes in floats, as "KIND of layer"; turning floats into integers does not count."""
    from ai_edge_litert.tools import flatbuffer_utils

    file = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    graph = file.subgraphs[0]
    kinds = {code: name for name, code in vars(flatbuffer_utils.BuiltinOperator).items() if type(code) is int}
    whose = {each.outputs[0]: each for each in float_file.operations if each.outputs}
    left = []
    for each in graph.operators:
        kind = kinds[file.operatorCodes[each.opcodeIndex].builtinCode]
        types = {graph.tensors[i].type for i in each.outputs}
        if kind in ("QUANTIZE", "DEQUANTIZE") or flatbuffer_utils.TensorType.FLOAT32 not in types:
            continue
        name = graph.tensors[each.outputs[0]].name.decode()
        known = whose.get(name) or whose.get(name.removesuffix("_dequant"))
        layer = f" of {known.layer.name}" if known is not None and known.layer is not None else ""
        left.append(f"{kind}{layer}")
    return tuple(left)
