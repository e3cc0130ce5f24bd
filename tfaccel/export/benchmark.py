"""How long one sample takes in LiteRT on this machine's CPU, and how much memory."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

from tfaccel.export.interpreter import TFLiteRunner, open_with_all_tensors, sample_shape

# Prints how many kB the process has grown by at most.
GROWTH = """
import re, sys
from ai_edge_litert.interpreter import Interpreter

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1))

before = peak()
interpreter = Interpreter(sys.argv[1], num_threads=1)
interpreter.allocate_tensors()
interpreter.invoke()
print(peak() - before)
"""


@dataclasses.dataclass(frozen=True)
class Latency:
    """Times of single invocations.

    Args:
        median_ms: Half of the runs were faster (milliseconds).
        p90_ms: Nine of ten runs were faster (milliseconds).
        runs: How many were timed.
        num_threads: Threads of the interpreter.
        size_bytes: The file's size.
        arena_bytes: The largest sum of values that are alive at once, which is what an interpreter's arena
            needs at least; weights are not part of it. None where it was not asked for.
        peak_memory_bytes: What a fresh process grows by at most when it loads the file and runs it once; None
            where the system does not tell.

    Example:
        >>> print(tfaccel.Latency(median_ms=0.049, p90_ms=0.055, runs=200, num_threads=1, size_bytes=99000))
        0.049 ms median, 0.055 ms p90 over 200 runs on 1 thread, 99,000 bytes
    """

    median_ms: float
    p90_ms: float
    runs: int
    num_threads: int
    size_bytes: int
    arena_bytes: int | None = None
    peak_memory_bytes: int | None = None

    def __str__(self) -> str:
        """One line for a person."""
        threads = f"{self.num_threads} thread{'s' * (self.num_threads != 1)}"
        text = (
            f"{self.median_ms:.3f} ms median, {self.p90_ms:.3f} ms p90 over {self.runs} runs on "
            f"{threads}, {self.size_bytes:,} bytes"
        )
        text += "" if self.arena_bytes is None else f", arena {self.arena_bytes:,} bytes"
        if self.peak_memory_bytes is not None:
            text += f", peak memory {self.peak_memory_bytes / 1e6:.1f} MB"
        return text


def benchmark_tflite(path: str | os.PathLike, *, runs: int = 200, num_threads: int = 1) -> Latency:
    """Times a TFLite file on one sample, after a warm-up, in the real LiteRT interpreter.

    The time depends on this machine and its load: compare ratios, not figures of different machines.
    The sample is zeros: a feed-forward model takes as long on any values.

    Args:
        path: The file.
        runs: Invocations to time. Default 200; a tenth as many are run before, untimed.
        num_threads: Threads of the interpreter. Default 1.

    Raises:
        ValueError: `runs` or `num_threads` below 1.
        FileNotFoundError: There is no such file.
        ExportError: The standard interpreter can't run the file.

    Example:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
        >>> file = tfaccel.export_tflite(model, "timed.tflite")
        >>> tfaccel.benchmark_tflite(file.path, runs=20).runs
        20

    Reference:
        The interpreter's own tool measures the same: https://ai.google.dev/edge/litert/models/measurement.
    """
    for name, value in (("runs", runs), ("num_threads", num_threads)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not usable. Allowed: an integer ≥ 1. Try 200 runs.")
    content = pathlib.Path(path).read_bytes()
    latency = time_runner(TFLiteRunner(content, num_threads), runs, num_threads)
    return dataclasses.replace(
        latency, arena_bytes=arena_bytes(content), peak_memory_bytes=_peak_memory_bytes(path)
    )


def arena_bytes(content: bytes) -> int:
    """The largest sum of values that are alive at once while a file runs on one sample."""
    from ai_edge_litert.tools import flatbuffer_utils

    file = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    graph = file.subgraphs[0]
    interpreter = open_with_all_tensors(content)
    interpreter.allocate_tensors()
    sizes = {}
    for detail in interpreter.get_tensor_details():
        tensor = graph.tensors[detail["index"]] if detail["index"] < len(graph.tensors) else None
        if tensor is not None and file.buffers[tensor.buffer].data is None:
            width = np.dtype(detail["dtype"]).itemsize
            sizes[detail["index"]] = int(np.prod(detail["shape"], dtype=np.int64)) * width
    last_use = {i: step for step, each in enumerate(graph.operators) for i in each.inputs}
    last_use.update(dict.fromkeys(graph.outputs, len(graph.operators)))
    alive = {i for i in graph.inputs if i in sizes}
    most = sum(sizes[i] for i in alive)
    for step, each in enumerate(graph.operators):
        alive |= {i for i in each.outputs if i in sizes}
        most = max(most, sum(sizes[i] for i in alive))
        alive = {i for i in alive if last_use.get(i, -1) > step}
    return most


def _peak_memory_bytes(path: str | os.PathLike) -> int | None:
    """The growth of a process of its own, as Linux tells it."""
    if not pathlib.Path("/proc/self/status").exists():
        return None
    command = [sys.executable, "-c", GROWTH, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    return 1024 * int(result.stdout) if result.returncode == 0 else None


def time_runner(runner: TFLiteRunner, runs: int, num_threads: int = 1) -> Latency:
    """`benchmark_tflite` for a file that is open already."""
    shapes = [sample_shape(detail) for detail in runner.input_details]
    runner.run(tuple(np.zeros(shape, np.float32) for shape in shapes))
    times = []
    for _ in range(max(runs // 10, 1)):
        runner.invoke_again()
    for _ in range(runs):
        start = time.perf_counter()
        runner.invoke_again()
        times.append(1e3 * (time.perf_counter() - start))
    return Latency(
        float(np.median(times)),
        float(np.quantile(times, 0.9)),
        runs,
        num_threads,
        runner.size_bytes,
    )
