"""How fast a run is and whether it waits for its input, in the logs of every epoch.

When to use: any run. The compiled loops of an `Accelerator` count by themselves, so it costs one reading per
epoch. A model that trains with Keras's own loop gets a stage behind its input pipeline, 0.02 ms a batch on a
2-core machine (`benchmarks/overhead.py`). Validation is left out of the rates, and so is the first
execution (tracing, compiling) where the epoch has more than one.
"""

from __future__ import annotations

import math
import pathlib
import sys
import time
from typing import Any

import keras
import tensorflow as tf

from tfaccel.keras_fixes.input_clock import Clock, watch_running_fit
from tfaccel.keras_fixes.whole_executions import check_whole_executions


def rates(
    examples: float, batches: float, seconds: float, waited_s: float, skipped: int = 0
) -> dict[str, float]:
    """Turns counts into rates.

    Args:
        examples: Examples of the epoch.
        batches: Batches of the epoch.
        seconds: Time for the batches behind the first `skipped` ones.
        waited_s: Seconds that all batches together waited for input.
        skipped: Batches that `seconds` leaves out.
    """
    counted = batches - skipped
    if counted <= 0 or seconds <= 0:
        return {}
    return {
        "examples_per_s": examples * counted / batches / seconds,
        "step_ms": 1e3 * seconds / counted,
        # The first batches' waiting can't be told apart: it counts as an average batch's.
        "input_wait": min(waited_s * counted / batches / seconds, 1.0),
    }


def peak_memory_bytes() -> int:
    """The most memory used so far: of the first GPU where there is one, else of the process."""
    gpus = tf.config.list_logical_devices("GPU")
    if gpus:
        return int(tf.config.experimental.get_memory_info(gpus[0].name)["peak"])
    status = pathlib.Path("/proc/self/status")  # Linux; there `getrusage` begins with the parent's peak
    if status.exists():
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    try:
        import resource
    except ImportError:  # Windows has no such module.
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Throughput(keras.callbacks.Callback):
    """Writes speed, input wait, time left and memory into the logs, per epoch.

    Adds to `logs`, and so to `History`, `CSVLogger` and TensorBoard: `examples_per_s`; `step_ms`;
    `input_wait`, the share of the training time (0..1) that the step waited for its input; `eta_s`,
    seconds until `fit` ends; `peak_memory_bytes`. A first epoch of one call, most of which is tracing, has no
    rates: they are NaN. Where the input is distributed over replicas,
    TensorFlow fetches it ahead per device, and `input_wait` and `examples_per_s` are left out.

    List it before callbacks that write logs, such as `CSVLogger`.

    Args:
        verbose: 1 prints one line per epoch. Default 0.

    Raises:
        ValueError: `verbose` is not 0 or 1.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> model.compile("sgd", "mse")
        >>> history = model.fit(
        ...     np.ones((64, 4)), np.ones((64, 2)), epochs=2, verbose=0, callbacks=[tfaccel.Throughput()]
        ... )
        >>> 0 <= history.history["input_wait"][-1] <= 1
        True

    Reference:
        `tfaccel.keras_fixes.input_clock` says how the waiting is measured.
    """

    def __init__(self, verbose: int = 0):
        super().__init__()
        if verbose not in (0, 1):
            raise ValueError(
                f"verbose={verbose!r} is not usable. Allowed: 0 or 1. Use 1 for a line an epoch."
            )
        self.verbose = verbose
        self._clock: Clock | None = None

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Puts the clock into the input pipeline."""
        check_whole_executions(self)
        self._clock = watch_running_fit(self)
        self._epochs_done = 0
        self._started = time.time()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Starts the epoch's count."""
        if self._clock is not None:
            self._clock.reset()
        self._epoch_started = time.time()
        self._trained_at: float | None = None

    def on_test_begin(self, logs: dict | None = None) -> None:
        """Validation begins: what follows is not training time."""
        if getattr(self, "_trained_at", 0.0) is None:
            self._trained_at = time.time()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes the rates into the logs."""
        trained_at = self._trained_at or time.time()
        self._epochs_done += 1
        per_epoch = (time.time() - self._started) / self._epochs_done
        figures = self._rates(trained_at)
        figures["eta_s"] = per_epoch * max(self.params.get("epochs", 0) - epoch - 1, 0)
        figures["peak_memory_bytes"] = float(peak_memory_bytes())
        if logs is not None:
            logs.update(figures)
        if self.verbose:
            print(_line(figures), flush=True)

    def _rates(self, trained_at: float) -> dict[str, float]:
        first_epoch = self._epochs_done == 1
        if self._clock is None:
            batches = self.params.get("steps")
            if not batches:
                return {}
            return {"step_ms": 1e3 * (trained_at - self._epoch_started) / batches}
        reading = self._clock.read()
        skipped, since = 0, self._epoch_started
        if first_epoch and reading.steady_at > 0:
            skipped, since = self._clock.skip, reading.steady_at
        known = rates(reading.examples, reading.batches, trained_at - since, reading.waited_s, skipped)
        # A history has as many values of each figure as epochs, and CSVLogger its columns from the first one.
        return known or dict.fromkeys(("examples_per_s", "step_ms", "input_wait"), math.nan)

    def __repr__(self) -> str:
        """The call that makes the same callback."""
        return f"Throughput(verbose={self.verbose})"


def _line(figures: dict[str, Any]) -> str:
    parts = []
    figures = {name: value for name, value in figures.items() if not math.isnan(value)}
    if "examples_per_s" in figures:
        parts.append(f"{figures['examples_per_s']:,.0f} examples/s")
    if "step_ms" in figures:
        parts.append(f"{figures['step_ms']:.2f} ms a step")
    if "input_wait" in figures:
        parts.append(f"{figures['input_wait']:.0%} of it waiting for input")
    parts.append(f"{figures['eta_s']:.0f} s left")
    parts.append(f"{figures['peak_memory_bytes'] / 2**20:,.0f} MiB at most")
    return ", ".join(parts)
