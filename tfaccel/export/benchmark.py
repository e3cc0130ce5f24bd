"""How long one sample takes in LiteRT on this machine's CPU."""

from __future__ import annotations

import dataclasses
import os
import time

import numpy as np

from tfaccel.export.interpreter import TFLiteRunner, sample_shape


@dataclasses.dataclass(frozen=True)
class Latency:
    """Times of single invocations.

    Args:
        median_ms: Half of the runs were faster (milliseconds).
        p90_ms: Nine of ten runs were faster (milliseconds).
        runs: How many were timed.
        num_threads: Threads of the interpreter.
        size_bytes: The file's size.

    Example:
        >>> print(Latency(median_ms=0.049, p90_ms=0.055, runs=200, num_threads=1, size_bytes=99000))
        0.049 ms median, 0.055 ms p90 over 200 runs on 1 thread, 99,000 bytes
    """

    median_ms: float
    p90_ms: float
    runs: int
    num_threads: int
    size_bytes: int

    def __str__(self) -> str:
        """One line for a person."""
        threads = f"{self.num_threads} thread{'s' * (self.num_threads != 1)}"
        return (
            f"{self.median_ms:.3f} ms median, {self.p90_ms:.3f} ms p90 over {self.runs} runs on "
            f"{threads}, {self.size_bytes:,} bytes"
        )


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
    return time_runner(TFLiteRunner(path, num_threads), runs, num_threads)


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
