"""From a Keras model to a float TFLite file: TensorFlow's converter, and what it wants to be asked."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.export.errors import ExportError
from tfaccel.export.operations import Operation, find_operations
from tfaccel.export.serving import ServingFunction
from tfaccel.keras_fixes.half_precision import computing_in_float32
from tfaccel.keras_fixes.inner_layers import inner_layers

LOOP_OPERATION = "TensorListReserve"  # what a loop stacks its steps in: its size must be known
OPEN_LENGTH = 16  # that an interpreter begins with; short, and enough for most kernels
LONGEST_UNROLLED = 128  # steps; the file grows by a handful of operations for each


@dataclasses.dataclass(frozen=True)
class Converted:
    """A float file, and what is known of it.

    Args:
        content: Its bytes.
        operations: What it computes, and whose that is.
        batch_size: Where it could not stay open.
    """

    content: bytes
    operations: list[Operation]
    batch_size: int | None


def convert_model(
    model: keras.Model,
    input_signature: Any,
    *,
    fixed_ranges: bool = False,
    allow_select_ops: bool = False,
    lengths: list[tuple[int, ...]] | None = None,
    values: list[np.ndarray] | None = None,
) -> Converted:
    """Converts in float32, whatever the model computes in; with an open batch size where that can be.

    Args:
        model: Built.
        input_signature: As for `export_tflite`.
        fixed_ranges: Whether its activations are to be quantized with ranges, which can't be measured inside
            of a loop: recurrent layers are unrolled.
        allow_select_ops: Whether operations may be TensorFlow's own where LiteRT has none.
        lengths: The shapes of real samples, one an input: where a length stays open, the file is written with
            this one.
        values: Of the weights, trainable ones first; default the model's own.

    Raises:
        ExportError: TensorFlow's converter refuses, or a loop can't be unrolled.
    """
    loops = [
        layer for layer in inner_layers(model) if isinstance(layer, keras.layers.RNN) and not layer.unroll
    ]
    with computing_in_float32(model), _unrolled(loops if fixed_ranges else []):
        if not loops or fixed_ranges:
            try:
                return _convert(ServingFunction(model, input_signature), allow_select_ops, lengths, values)
            except ExportError as error:
                if LOOP_OPERATION not in str(error):
                    raise
                if fixed_ranges:
                    raise ExportError(
                        f"A loop in {model.name!r} can't be converted to fixed ranges: they are not known "
                        "inside. Nothing was written. Take 'dynamic_int8', which measures them as it runs."
                    ) from error
        return _convert(
            ServingFunction(model, input_signature, batch_size=1), allow_select_ops, lengths, values
        )


@contextlib.contextmanager
def _unrolled(layers: list[keras.layers.RNN]) -> Iterator[None]:
    """The recurrent layers step without a loop in the block; not for use by two threads."""
    for layer in layers:
        steps = _steps(layer)
        if steps is None or steps > LONGEST_UNROLLED:
            raise ExportError(
                f"{layer.name} can't be converted to fixed ranges: it takes {steps or 'any number of'} "
                f"steps, and ranges are not known inside of its loop. Allowed: up to {LONGEST_UNROLLED}, "
                "which are unrolled. Nothing was written. Take 'dynamic_int8', which measures ranges as it "
                "runs."
            )
    try:
        for layer in layers:
            layer.unroll = True
        yield
    finally:
        for layer in layers:
            layer.unroll = False


def _steps(layer: keras.layers.RNN) -> int | None:
    """How many steps it was built for; None is any number."""
    built = layer.get_build_config() or {}
    shapes = built.get("shapes_dict") or {}  # of one that is given its first state too
    shape = built.get("input_shape") or shapes.get("sequences_shape") or shapes.get("input_shape")
    return shape[1] if shape else None


def _convert(
    serving: ServingFunction,
    allow_select_ops: bool,
    lengths: list[tuple[int, ...]] | None,
    values: list[np.ndarray] | None,
) -> Converted:
    with tempfile.TemporaryDirectory() as folder:
        serving.save(folder, values)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.experimental_enable_resource_variables = bool(serving.states)
        if allow_select_ops:
            converter.target_spec.supported_ops = [
                tf.lite.OpsSet.TFLITE_BUILTINS,
                tf.lite.OpsSet.SELECT_TF_OPS,
            ]
        content = _with_open_lengths(_run_converter(converter, serving), serving, lengths)
    operations = find_operations(content, serving.scopes, serving.outputs)
    return Converted(content, operations, serving.batch_size)


def _with_open_lengths(
    content: bytes, serving: ServingFunction, lengths: list[tuple[int, ...]] | None
) -> bytes:
    """Lengths that stay open are 1 in the converter's file, which most layers can't take.

    An interpreter refuses it before anybody could resize its inputs. They become those of the samples.
    """
    if all(None not in spec.shape.as_list()[1:] for spec in serving.specs):
        return content
    from ai_edge_litert.tools import flatbuffer_utils

    known = {spec.name: shape for spec, shape in zip(serving.specs, lengths or [], strict=False)}
    file = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    graph = file.subgraphs[0]
    for signature in file.signatureDefs or []:
        for each in signature.inputs:
            tensor = graph.tensors[each.tensorIndex]
            shape = known.get(each.name.decode())
            for axis, size in enumerate(tensor.shapeSignature if tensor.shapeSignature is not None else ()):
                if size < 0 and axis > 0:
                    tensor.shape[axis] = OPEN_LENGTH if shape is None else shape[axis - 1]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(file))


def _run_converter(converter: Any, serving: ServingFunction) -> bytes:
    try:
        return converter.convert()
    # The converter's own error class is private, and derives from Exception alone.
    except Exception as error:
        raise ExportError(_explain(str(error), serving)) from error


def _explain(message: str, serving: ServingFunction) -> str:
    """The layer and the operation that TensorFlow's converter stumbled over."""
    missing = sorted(set(re.findall(r"'tf\.(\w+)' op is neither a custom op nor a flex op", message)))
    named = [serving.scopes.layer_named(name) for name in re.findall(r'"(model/[^"@]+)@', message)]
    layers = ", ".join(dict.fromkeys(layer.name for layer in named if layer is not None))
    whose = f"layer{'s' * (',' in layers)} {layers} of " if layers else ""
    if missing and LOOP_OPERATION not in missing:
        return (
            f"LiteRT has no operation {', '.join(missing)}, which {whose}{serving.model.name!r} needs. "
            "Nothing was written. Compute it before or behind the model, replace the layer, or pass "
            "allow_select_ops=True, and ship TensorFlow's operations (Flex) with the interpreter."
        )
    return f"TensorFlow's converter refused {whose}{serving.model.name!r}. Its message: {message[:500]}"
