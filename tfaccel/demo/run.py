"""All stages of the demo in order, and what is known after each."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from tfaccel.accelerator import Accelerator
from tfaccel.demo.training import (
    EPOCHS,
    PLAIN_EPOCHS,
    accuracy_of_both,
    build_model,
    train_accelerated,
    train_plain,
)
from tfaccel.export.benchmark import benchmark_tflite
from tfaccel.export.compare import compare
from tfaccel.export.tflite import export_tflite

KEYS = (
    "plain_seconds",
    "accelerated_seconds",
    "speedup",
    "target_accuracy",
    "plain_accuracy",
    "accelerated_accuracy",
    "tflite_accuracy",
    "float_bytes",
    "tflite_bytes",
    "keras_latency_ms",
    "tflite_latency_ms",
    "top1_agreement",
)


@dataclasses.dataclass
class DemoResult:
    """What is known so far; None where the demo did not get there.

    Args:
        figures: The values of `KEYS`.
        examples_per_s: Training speed of the plain and the accelerated run.
        plan: The accelerator's choices and reasons.
        finished: False after Ctrl-C.
    """

    figures: dict[str, Any] = dataclasses.field(default_factory=lambda: dict.fromkeys(KEYS))
    examples_per_s: dict[str, float] = dataclasses.field(default_factory=dict)
    plan: str = ""
    finished: bool = False


def run_demo(
    data: dict[str, np.ndarray],
    output: str | os.PathLike,
    *,
    report: Callable[[str, str, float], None] | None = None,
    plain_epochs: int = PLAIN_EPOCHS,
    epochs: int = EPOCHS,
) -> DemoResult:
    """Runs all stages; on Ctrl-C gives back what is known by then.

    Args:
        data: What `load_images` gives.
        output: The folder for the model and the files; it is made.
        report: Is told the stage, what it is doing and how far it is (0..1).
        plain_epochs: Epochs of the plain run.
        epochs: Epochs of the accelerated run.

    Raises:
        ValueError: `output` can't be written.
    """
    folder = make_folder(output)
    result = DemoResult()
    tell = report or (lambda stage, text, done: None)
    with contextlib.suppress(KeyboardInterrupt):
        _train_both(data, result, tell, plain_epochs, epochs, folder)
        result.finished = True
    return result


def make_folder(output: str | os.PathLike) -> pathlib.Path:
    """Makes the folder and tries whether a file can be written there.

    Raises:
        ValueError: It can't.
    """
    folder = pathlib.Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"--output {output} can't be written: {error.strerror or error}. Allowed: a folder of "
            "yours, existing or not. Choose another."
        ) from error
    return folder


def _train_both(
    data: dict[str, np.ndarray],
    result: DemoResult,
    tell: Callable[[str, str, float], None],
    plain_epochs: int,
    epochs: int,
    folder: pathlib.Path,
) -> None:
    shape, classes = data["x_train"].shape[1:], int(data["y_train"].max()) + 1
    images, figures = len(data["x_train"]), result.figures

    def build() -> keras.Model:
        return build_model(shape, classes)

    _, plain = train_plain(
        build, data, epochs=plain_epochs, report=lambda text, done: tell("plain Keras", text, done)
    )
    figures["plain_accuracy"] = figures["target_accuracy"] = max(plain.accuracies)
    figures["plain_seconds"] = plain.seconds_to(figures["target_accuracy"])
    result.examples_per_s["plain"] = images * plain_epochs / plain.seconds[-1]

    accelerator = Accelerator()
    result.plan = str(accelerator)
    model, fast = train_accelerated(
        build,
        data,
        epochs=epochs,
        accelerator=accelerator,
        report=lambda text, done: tell("accelerated", text, done),
    )
    figures["accelerated_accuracy"] = fast.accuracies[-1]
    target = figures["target_accuracy"] = accuracy_of_both(plain, fast)
    figures["plain_seconds"], figures["accelerated_seconds"] = (
        clock.seconds_to(target) for clock in (plain, fast)
    )
    figures["speedup"] = figures["plain_seconds"] / figures["accelerated_seconds"]
    result.examples_per_s["accelerated"] = images * epochs / fast.seconds[-1]
    _export(model, data, figures, tell, folder)


def _export(
    model: keras.Model,
    data: dict[str, np.ndarray],
    figures: dict[str, Any],
    tell: Callable[[str, str, float], None],
    folder: pathlib.Path,
) -> None:
    test = (data["x_test"], data["y_test"])
    tell("export", "float32", 0.0)
    with quiet_stderr():
        reference = export_tflite(model, folder / "model_float32.tflite", calibration=test)
        tell("export", "int8", 0.3)
        file = export_tflite(
            model,
            folder / "model_int8.tflite",
            "int8",
            calibration=data["x_train"],
            evaluate=test,
        )
        tell("export", "comparing and timing", 0.6)
        figures["top1_agreement"] = compare(model, file.path, test).top1_agreement
        figures["tflite_latency_ms"] = benchmark_tflite(file.path).median_ms
    figures["float_bytes"], figures["tflite_bytes"] = reference.size_bytes, file.size_bytes
    figures["tflite_accuracy"] = file.score.file if file.score else None
    figures["keras_latency_ms"] = predict_latency_ms(model, data["x_test"][:1])
    partial = folder / ".model.partial.keras"
    try:
        model.save(partial)
        partial.replace(folder / "model.keras")
    finally:
        partial.unlink(missing_ok=True)
    tell("export", "done", 1.0)


def predict_latency_ms(model: keras.Model, sample: np.ndarray, runs: int = 20) -> float:
    """Median time of `model.predict` on one sample, after a warm-up (milliseconds)."""
    times = []
    for _ in range(runs + 3):
        start = time.perf_counter()
        model.predict(sample, verbose=0)
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times[3:]))


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Holds back what the converter's C++ writes to stderr; shows it if an exception leaves."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        # Whatever leaves, Ctrl-C too, goes on; what was held back may say why.
        except BaseException:
            os.dup2(saved, 2)
            held.seek(0)
            sys.stderr.write(held.read().decode(errors="replace"))
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)
