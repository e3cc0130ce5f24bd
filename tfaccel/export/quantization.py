"""From a float file to a quantized one, layer by layer if need be: `ai-edge-quantizer` with exact ranges.

The quantizer's own calibration keeps a moving average of each batch's extremes, which ends well inside of the
real ranges: values beyond are cut off (with it a two-head attention model came to 6 dB, with exact ranges to
33 dB, as TensorFlow's own quantizer does). So the ranges are measured here, over all samples.

Weights of four bits have one scale for each output channel. Blocks of 32 with a scale each, which the
quantizer offers for dense layers, are not used: LiteRT 2.3 computes them right in its XNNPACK delegate only
(its own kernels left 1 dB of a small net's output, without a word), and rounding with samples (`rounding.py`)
is better than they are (26 dB against 19).

Reference: Jacob et al., 2018, https://arxiv.org/abs/1712.05877, section 3.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tfaccel.export.interpreter import open_with_all_tensors
from tfaccel.export.operations import Operation, constant_names
from tfaccel.export.recipes import RECIPES, Recipe
from tfaccel.export.samples import Samples

WIDEST = 1e6  # beyond this a value is a mask or an overflow, and no eight bits hold it and the others
NARROWEST = 1e-5  # below it limits such as ReLU6's don't fit into 32 bits
CALIBRATION_BATCH = 16
# Weights, by their bits: turning inputs into integers as it runs costs more than so few multiplications
# bring.
SMALL = {8: 1024, 4: 0}
COMPARING_KINDS = ("MAXIMUM", "MINIMUM")
BIASED_KINDS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")
BIAS_PLACE = 2  # among their inputs
ROUNDED_KINDS = ("FULLY_CONNECTED", "CONV_2D")
FOUR_BIT_KINDS = ("FULLY_CONNECTED", "CONV_2D", "EMBEDDING_LOOKUP")  # LiteRT has kernels for these

Ranges = dict[str, dict[str, np.ndarray]]


def quantize(
    content: bytes,
    recipe: Recipe,
    operations: Sequence[Operation],
    ranges: Ranges | None = None,
    chosen: Mapping[str, Recipe] | None = None,
) -> bytes:
    """A quantized file of a float one.

    Args:
        content: The float file.
        recipe: For all operations but the `chosen`.
        operations: Of the file.
        ranges: Of all tensors, for recipes with fixed ranges.
        chosen: Recipes of single operations, by the name of the first tensor that they make.
    """
    from ai_edge_quantizer import quantizer

    work = quantizer.Quantizer(bytearray(content))
    # What is turned into whole numbers picks rows and classes, and half a step off is another one.
    exact = {name for each in operations if each.kind == "CAST" for name in (*each.inputs, *each.outputs)}
    floats = _constants_in_floats(content, operations) if recipe.needs_calibration else set()
    _add_rules(work, ".*", recipe)
    if recipe.needs_calibration and not recipe.integer_io:
        for side in ("INPUT", "OUTPUT"):
            _leave(work, ".*", side)
    for each in operations:
        if not each.outputs:
            continue
        own = (chosen or {}).get(each.outputs[0], recipe)
        if own.needs_calibration and (_too_wide(each, ranges or {}) or exact.intersection(each.outputs)):
            own = RECIPES["float32"]
        if own.needs_calibration and each.kind not in ROUNDED_KINDS and floats.intersection(_operands(each)):
            own = RECIPES["float32"]
        if own.dynamic and (each.kind == "DEPTHWISE_CONV_2D" or each.weights < SMALL[own.weight_bits]):
            own = RECIPES["weight_only_int8"]
        if own != recipe:
            _add_rules(work, "^" + re.escape(each.outputs[0]) + ";", own)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
    ):  # a bar that can't be turned off
        warnings.simplefilter("ignore")  # numpy's, where a range is empty
        result = work.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    return bytes(result.quantized_model)


def _constants_in_floats(content: bytes, operations: Sequence[Operation]) -> set[str]:
    """Constants that operations of several kinds read, such as an embedding that is also the last layer.

    A product wants a scale for each channel of them, a lookup one for all, and the file has room for one.
    Besides, those that are compared: the quantizer gives them a scale for each number, and then refuses it.
    """
    kinds: dict[str, set[str]] = {}
    for each in operations:
        for name in _operands(each):
            kinds.setdefault(name, set()).add(each.kind)
    found = {name for name, mine in kinds.items() if len(mine) > 1 or mine.intersection(COMPARING_KINDS)}
    return found & constant_names(content) if found else set()


def _operands(operation: Operation) -> tuple[str, ...]:
    """What it reads but for a bias, which the converter keeps once where several are equal.

    The quantizer gives each operation a bias of its own.
    """
    return operation.inputs[: BIAS_PLACE if operation.kind in BIASED_KINDS else None]


def _add_rules(work: Any, scope: str, recipe: Recipe) -> None:
    """What the quantizer calls a recipe, for the operations whose outputs match."""
    from ai_edge_quantizer import qtyping, quantizer

    every = qtyping.TFLOperationName.ALL_SUPPORTED
    if recipe.weight_bits == 32:
        _leave(work, scope, every)
    elif recipe.weight_bits == 16:
        work.update_quantization_recipe(
            scope,
            every,
            qtyping.OpQuantizationConfig(
                weight_tensor_config=qtyping.TensorQuantizationConfig(16, dtype=qtyping.TensorDataType.FLOAT),
                compute_precision=qtyping.ComputePrecision.FLOAT,
                explicit_dequantize=True,
            ),
            quantizer.AlgorithmName.FLOAT_CASTING,
        )
    elif recipe.activation_bits:
        work.add_static_config(scope, every, recipe.activation_bits, recipe.weight_bits)
    elif not recipe.dynamic:
        work.add_weight_only_config(scope, every, recipe.weight_bits)
    else:
        work.add_dynamic_config(scope, every, 8)
        if recipe.weight_bits == 4:
            for kind in FOUR_BIT_KINDS:
                work.add_dynamic_config(scope, qtyping.TFLOperationName(kind), 4)


def _leave(work: Any, scope: str, kind: str) -> None:
    from ai_edge_quantizer import qtyping, quantizer

    name = qtyping.TFLOperationName(kind)
    work.update_quantization_recipe(scope, name, None, quantizer.AlgorithmName.NO_QUANTIZE)


def bits_to_round(
    recipe: Recipe, operations: Sequence[Operation], chosen: Mapping[str, Recipe] | None = None
) -> dict[str, int]:
    """Whose weights are worth rounding with the samples, and to how many bits; by the tensor they make."""
    bits = {}
    for each in operations:
        own = (chosen or {}).get(each.outputs[0], recipe) if each.outputs else recipe
        if own.weight_bits < 16 and each.kind in ROUNDED_KINDS:
            bits[each.outputs[0]] = own.weight_bits
    return bits


def _too_wide(operation: Operation, ranges: Ranges) -> bool:
    """Whether it makes or reads values that no integer range can hold, such as the -1e9 of a mask."""
    for name in (*operation.outputs, *operation.inputs):
        known = ranges.get(name)
        if known is not None and not max(-known["min"].min(), known["max"].max()) < WIDEST:
            return True
    return False


def measure_ranges(content: bytes, names: list[str], samples: Samples, batch_size: int | None) -> Ranges:
    """The smallest and largest value of each activation over all samples.

    Not of weights: those have a range for each output channel, which the quantizer finds itself.

    Args:
        content: A float file.
        names: Its inputs, in the order of the samples' arrays.
        samples: Real ones.
        batch_size: Where the file has a fixed one.
    """
    interpreter = open_with_all_tensors(content)
    runner = interpreter.get_signature_runner()
    constants = constant_names(content)
    ranges: Ranges = {}
    for batch in samples.batches(batch_size or CALIBRATION_BATCH):
        runner(**dict(zip(names, batch, strict=True)))
        for detail in interpreter.get_tensor_details():
            if detail["name"] not in constants:
                _widen(ranges, interpreter, detail)
    for known in ranges.values():
        _give_room(known)
    return ranges


def with_learned(ranges: Ranges, learned: Mapping[str, tuple[float, float]]) -> Ranges:
    """The measured ranges, with those in their places that the model was trained with."""
    spans = {name: span for name, span in learned.items() if name in ranges}
    shapes = {name: ranges[name]["min"].shape for name in spans}
    return ranges | {
        name: {"min": np.full(shapes[name], low, "float32"), "max": np.full(shapes[name], high, "float32")}
        for name, (low, high) in spans.items()
    }


def _give_room(known: dict[str, np.ndarray]) -> None:
    """A range that is a scale: what is always zero here, such as a dead unit, gets one up to 1.

    With a scale of next to nothing the limits of an activation behind it overflow, and LiteRT's own kernels
    refuse the file ("no_integer_overflow_from_quantization") that its XNNPACK delegate runs.
    """
    reach = max(-known["min"].min(), known["max"].max())
    if reach < NARROWEST:
        known["max"] = np.full_like(known["max"], NARROWEST if reach > 0 else 1.0)


def _widen(ranges: Ranges, interpreter: Any, detail: dict[str, Any]) -> None:
    if detail["dtype"] is not np.float32:
        return
    try:
        values = interpreter.get_tensor(detail["index"])
    except ValueError:  # never computed, such as the shape of a constant
        return
    if not values.size:
        return
    low, high = values.min(), values.max()
    known = ranges.get(detail["name"])
    if known is not None:
        low, high = min(low, known["min"].item()), max(high, known["max"].item())
    shape = (1,) * values.ndim
    ranges[detail["name"]] = {"min": np.full(shape, low), "max": np.full(shape, high)}
