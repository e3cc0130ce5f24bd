"""Runs a TFLite file in the real LiteRT interpreter, with inputs and outputs by name."""

from __future__ import annotations

import functools
import os
import pathlib
import warnings
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
        if not isinstance(content, bytes):
            content = pathlib.Path(content).read_bytes()
        self.size_bytes = len(content)
        self._new = functools.partial(_open, content, num_threads)
        self._load()

    def _load(self) -> None:
        """Begins anew, so that what a stateful file keeps is as at the start."""
        self._fresh = True
        try:
            self._interpreter = self._new()
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise ExportError(
                f"The standard LiteRT interpreter can't run this file. {first} Is it a whole TFLite file, "
                "and written for builtin operations?"
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
            _check_shape(name, array, detail)
            if tuple(detail["shape"]) != array.shape:
                self._interpreter.resize_tensor_input(detail["index"], array.shape)
                detail["shape"] = np.array(array.shape)
        self._fresh = False
        try:
            self._interpreter.allocate_tensors()
            for name, detail in self._inputs.items():
                self._interpreter.set_tensor(detail["index"], quantize(arrays[name], detail))
            self._interpreter.invoke()
            return {
                name: dequantize(self._interpreter.get_tensor(detail["index"]), detail)
                for name, detail in self._outputs.items()
            }
        except (ValueError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise ExportError(
                f"The LiteRT interpreter can't run this file on these samples. {first}"
            ) from error

    def predict(
        self, samples: Samples, names: list[str] | None = None, batch_size: int = 64
    ) -> dict[str, np.ndarray]:
        """The outputs, by name, for all rows; as many at once as the file takes, where its batch is fixed."""
        fixed = [int(detail["shape_signature"][0]) for detail in self.input_details]
        batch_size = batch_size if all(size == -1 for size in fixed) else max(fixed)
        parts = []
        if not self._fresh:
            self._load()
        for batch in samples.batches(batch_size):
            parts.append(self.run(dict(zip(names, batch, strict=True)) if names else batch))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def invoke_again(self) -> None:
        """Runs on the inputs that are set already: what a latency measurement times."""
        self._interpreter.invoke()


def _check_shape(name: str, array: np.ndarray, detail: dict[str, Any]) -> None:
    """Raises ExportError for samples that the interpreter would take for others of another shape."""
    wanted = [int(size) for size in detail["shape_signature"]]
    given = array.shape[1:]
    if len(wanted) != array.ndim or any(
        size >= 0 and size != mine for size, mine in zip(wanted[1:], given, strict=True)
    ):
        raise ExportError(
            f"The file's input {name!r} takes samples of shape {tuple(wanted[1:])} (-1 is open), not "
            f"{given}. Is it the file of this model?"
        )


def _open(content: bytes, num_threads: int) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(model_content=content, num_threads=num_threads)


def open_with_all_tensors(content: bytes) -> Any:
    """An interpreter that keeps what is between the operations; the delegate would fuse some of it away."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that keeping all tensors is for debugging
        return Interpreter(
            model_content=content,
            experimental_preserve_all_tensors=True,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            num_threads=2,
        )


def sample_shape(detail: dict[str, Any]) -> list[int]:
    """The shape of one sample; open lengths are those that the file was written with."""
    batch, *sizes = (int(size) for size in detail["shape_signature"])
    return [
        max(batch, 1),
        *(int(now) if size < 0 else size for size, now in zip(sizes, detail["shape"][1:], strict=True)),
    ]


def quantize(array: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    """Floats as the integers that an input takes; other inputs as they are."""
    scale, zero_point = detail["quantization"]
    dtype = detail["dtype"]
    if not scale or not np.issubdtype(dtype, np.integer):
        return array.astype(dtype, copy=False)
    limits = np.iinfo(dtype)
    return np.clip(np.round(array / scale) + zero_point, limits.min, limits.max).astype(dtype)


def dequantize(array: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    """The floats that a tensor's integers stand for; other tensors as they are."""
    scale, zero_point = detail["quantization"]
    if not scale or not np.issubdtype(array.dtype, np.integer):
        return array
    return (array.astype(np.float32) - zero_point) * np.float32(scale)
