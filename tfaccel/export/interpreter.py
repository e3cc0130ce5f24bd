"""Runs a TFLite file in the real LiteRT interpreter, with inputs and outputs by name."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np

from tfaccel.export.errors import ExportError
from tfaccel.export.samples import Samples


class TFLiteRunner:
    """A TFLite file, ready to run on batches of any size that it takes.

    Args:
        content: The file's bytes, or its path.
        num_threads: Threads of the interpreter. Default 1, as on a phone's little cores.

    Raises:
        ExportError: The standard interpreter can't run the file; the text names the operations.
        FileNotFoundError: There is no such file.
    """

    def __init__(self, content: bytes | str | os.PathLike, num_threads: int = 1):
        from ai_edge_litert.interpreter import Interpreter

        if not isinstance(content, bytes):
            content = pathlib.Path(content).read_bytes()
        self.size_bytes = len(content)
        try:
            self._interpreter = Interpreter(model_content=content, num_threads=num_threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ExportError(
                f"The standard LiteRT interpreter can't run this file. {str(error).strip().splitlines()[0]}"
            ) from error
        self._inputs = self._named("inputs", self._interpreter.get_input_details())
        self._outputs = self._named("outputs", self._interpreter.get_output_details())

    def _named(self, side: str, details: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Details by signature name; files without a signature go by position."""
        signatures = self._interpreter.get_signature_list()
        if len(signatures) != 1:
            prefix = side.removesuffix("s")
            return {f"{prefix}_{i}": detail for i, detail in enumerate(details)}
        key = next(iter(signatures))
        runner = self._interpreter.get_signature_runner(key)
        return runner.get_input_details() if side == "inputs" else runner.get_output_details()

    @property
    def input_details(self) -> list[dict[str, Any]]:
        """The interpreter's description of each input (shape, dtype, quantization)."""
        return list(self._inputs.values())

    @property
    def input_names(self) -> list[str]:
        """The inputs' names, in the order in which `run` takes arrays by position."""
        return list(self._inputs)

    def run(self, arrays: dict[str, np.ndarray] | tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """The outputs, by name, for one batch. Integer inputs and outputs are (de)quantized.

        Args:
            arrays: One array per input: by name, or by position.
        """
        if not isinstance(arrays, dict):
            arrays = dict(zip(self._inputs, arrays, strict=True))
        for name, detail in self._inputs.items():
            array = arrays[name]
            if tuple(detail["shape"]) != array.shape:
                self._interpreter.resize_tensor_input(detail["index"], array.shape)
                detail["shape"] = np.array(array.shape)
        self._interpreter.allocate_tensors()
        for name, detail in self._inputs.items():
            self._interpreter.set_tensor(detail["index"], _quantize(arrays[name], detail))
        self._interpreter.invoke()
        return {
            name: _dequantize(self._interpreter.get_tensor(detail["index"]), detail)
            for name, detail in self._outputs.items()
        }

    def predict(
        self, samples: Samples, names: list[str] | None = None, batch_size: int = 64
    ) -> dict[str, np.ndarray]:
        """The outputs, by name, for all rows; row by row where the file's batch size is fixed."""
        if any(detail["shape_signature"][0] != -1 for detail in self.input_details):
            batch_size = 1
        parts = []
        for batch in samples.batches(batch_size):
            parts.append(self.run(dict(zip(names, batch, strict=True)) if names else batch))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def invoke_again(self) -> None:
        """Runs on the inputs that are set already: what a latency measurement times."""
        self._interpreter.invoke()


def _quantize(array: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    scale, zero_point = detail["quantization"]
    dtype = detail["dtype"]
    if not scale or not np.issubdtype(dtype, np.integer):
        return array.astype(dtype, copy=False)
    limits = np.iinfo(dtype)
    return np.clip(np.round(array / scale) + zero_point, limits.min, limits.max).astype(dtype)


def _dequantize(array: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    scale, zero_point = detail["quantization"]
    if not scale or not np.issubdtype(array.dtype, np.integer):
        return array
    return (array.astype(np.float32) - zero_point) * np.float32(scale)
