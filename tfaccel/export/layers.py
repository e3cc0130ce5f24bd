"""The convolutions and dense layers of a float file, with their weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or a dense layer of a file: `weights` are those of `name`, in `buffer`."""

    name: str
    input: str
    output: str
    buffer: int
    shape: tuple[int, ...]
    weights: np.ndarray
    options: Any


def layers_of(file: Any) -> Iterator[Layer]:
    """Those of a file that `ai_edge_litert.tools.flatbuffer_utils` has read."""
    from ai_edge_litert.tools import flatbuffer_utils as utils

    graph = file.subgraphs[0]
    for each in graph.operators:
        code = file.operatorCodes[each.opcodeIndex].builtinCode
        if code not in (utils.BuiltinOperator.CONV_2D, utils.BuiltinOperator.FULLY_CONNECTED):
            continue
        read, kernel, made = (graph.tensors[i] for i in (*each.inputs[:2], each.outputs[0]))
        data = file.buffers[kernel.buffer].data
        if data is None:
            continue
        yield Layer(
            kernel.name.decode(),
            read.name.decode(),
            made.name.decode(),
            kernel.buffer,
            tuple(int(size) for size in kernel.shape),
            np.frombuffer(bytes(bytearray(data)), "<f4").astype(np.float32),
            each.builtinOptions,
        )


def read_layers(content: bytes) -> list[Layer]:
    """Those of a file's bytes."""
    from ai_edge_litert.tools import flatbuffer_utils

    return list(layers_of(flatbuffer_utils.read_model_from_bytearray(bytearray(content))))
