"""The two runs: plain Keras, and the same network with an `Accelerator` and one cycle."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.accelerator import Accelerator
from tfaccel.fit.learning_rate import OneCycle

PLAIN_EPOCHS = 15
EPOCHS = 8
BATCH_SIZE = 32
MAX_LEARNING_RATE = 5e-3
WARMUP = 0.25

Report = Callable[[str, float], None]


def build_model(input_shape: tuple[int, ...], classes: int) -> keras.Model:
    """The network of Keras's own example "Simple MNIST convnet", which is trained for 15 epochs."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(classes),
        ]
    )


class TrainingClock(keras.callbacks.Callback):
    """Training time and validation accuracy after each epoch; validation itself is not counted.

    Args:
        started: `time.perf_counter()` when the run began; building and tracing count.
        report: Is told the epoch and its accuracy.
    """

    def __init__(self, started: float, report: Report | None = None):
        super().__init__()
        self.seconds: list[float] = []
        self.accuracies: list[float] = []
        self._resumed_at = started
        self._trained_s = 0.0
        self._report = report

    def on_test_begin(self, logs: dict | None = None) -> None:
        """Stops the clock."""
        self._trained_s += time.perf_counter() - self._resumed_at

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Notes the epoch and lets the clock go on."""
        self.seconds.append(self._trained_s)
        self.accuracies.append(float((logs or {})["val_accuracy"]))
        if self._report is not None:
            done = (epoch + 1) / self.params["epochs"]
            self._report(f"epoch {epoch + 1}, accuracy {self.accuracies[-1]:.3f}", done)
        self._resumed_at = time.perf_counter()

    def seconds_to(self, accuracy: float) -> float | None:
        """Training time until an epoch first ended at `accuracy` or above; None if none did."""
        reached = zip(self.seconds, self.accuracies, strict=True)
        return next((seconds for seconds, value in reached if value >= accuracy), None)


def accuracy_of_both(one: TrainingClock, other: TrainingClock) -> float:
    """The highest accuracy that both runs reached: what their times are compared at."""
    return min(max(one.accuracies), max(other.accuracies))


def build_from_seed(build: Callable[[], keras.Model], seed: int) -> keras.Model:
    """A model whose first weights depend on `seed`; what comes later is drawn freely.

    A global seed that stays on would make Keras's `fit` repeat one order of the images in every epoch,
    and the comparison unfair to plain Keras.
    """
    keras.utils.set_random_seed(seed)
    model = build()
    tf.random.set_seed(None)
    return model


def compile_arguments(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    """What both runs compile with."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return {"optimizer": optimizer, "loss": loss, "metrics": ["accuracy"]}


def train_plain(
    build: Callable[[], keras.Model],
    data: dict[str, np.ndarray],
    *,
    epochs: int = PLAIN_EPOCHS,
    seed: int = 0,
    report: Report | None = None,
) -> tuple[keras.Model, TrainingClock]:
    """As Keras's tutorials do it: Adam(1e-3), batches of 32, arrays straight into `fit`."""
    clock = TrainingClock(time.perf_counter(), report)
    model = build_from_seed(build, seed)
    model.compile(**compile_arguments(keras.optimizers.Adam(1e-3)))
    model.fit(
        data["x_train"],
        data["y_train"],
        epochs=epochs,
        validation_data=(data["x_test"], data["y_test"]),
        validation_batch_size=500,
        verbose=0,
        callbacks=[clock],
    )
    return model, clock


def train_accelerated(
    build: Callable[[], keras.Model],
    data: dict[str, np.ndarray],
    *,
    epochs: int = EPOCHS,
    batch_size: int = BATCH_SIZE,
    max_learning_rate: float = MAX_LEARNING_RATE,
    warmup: float = WARMUP,
    beta_2: float = 0.999,
    seed: int = 0,
    report: Report | None = None,
    accelerator: Accelerator | None = None,
) -> tuple[keras.Model, TrainingClock]:
    """The same network with an `Accelerator` around it and one cycle of Adam's learning rate."""
    clock = TrainingClock(time.perf_counter(), report)
    accelerator = accelerator or Accelerator()
    with accelerator.scope():
        model = build_from_seed(build, seed)
        adam = keras.optimizers.Adam(beta_2=beta_2)
        model.compile(**compile_arguments(adam), **accelerator.compile_options())
    model.fit(
        accelerator.dataset(data["x_train"], data["y_train"], batch_size=batch_size),
        epochs=epochs,
        validation_data=accelerator.dataset(data["x_test"], data["y_test"], batch_size=500, shuffle=False),
        verbose=0,
        callbacks=[OneCycle(max_learning_rate, warmup=warmup), clock],
    )
    return model, clock
