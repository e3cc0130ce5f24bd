"""How a training run would scale to more workers: a measured step, and a model of what its gradients cost.

A step over N workers is the step of one, each with its own batch, and then the sum of all gradients: Keras
applies them after the whole backward pass, so nothing overlaps. The sum is a ring all-reduce,

    seconds = 2 (N - 1) (latency + bytes / (N · bandwidth)),

and where a worker has G devices, a reduction and a broadcast among them before and after,

    seconds = 2 (G - 1) / G · bytes / local bandwidth.

Not in it: input pipelines, stragglers, what networks share, and the accuracy that larger batches cost.

Reference:
    Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009), eq. 1;
    Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH" (2005).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import statistics
import time
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from tfaccel.accelerator import Accelerator
from tfaccel.errors import refuse

UNITS = {"b": 1 / 8, "B": 1.0}
PREFIXES = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@dataclasses.dataclass(frozen=True)
class Network:
    """What connects the workers.

    Args:
        bandwidth: Of each worker's link, in bytes a second and direction.
        latency_s: Of one message, in seconds.
        devices: In each worker.
        local_bandwidth: Between the devices of a worker, in bytes a second.
    """

    bandwidth: float
    latency_s: float = 50e-6
    devices: int = 1
    local_bandwidth: float = 50e9

    def __post_init__(self) -> None:
        for name in ("bandwidth", "local_bandwidth", "devices"):
            if not getattr(self, name) > 0:
                raise refuse(name, getattr(self, name), "a number above 0", "Give what the hardware has.")
        if not self.latency_s >= 0:
            raise refuse("latency_s", self.latency_s, "0 or more seconds", "50e-6 is usual in a data centre.")


@dataclasses.dataclass(frozen=True)
class Scaled:
    """What is predicted for a number of workers.

    Args:
        workers: How many.
        step_ms: Of one step, in milliseconds.
        all_reduce_ms: The part of it that sums gradients.
        efficiency: The step of one worker over this one, 0..1.
        speedup: Examples a second over those of one worker.
    """

    workers: int
    step_ms: float
    all_reduce_ms: float
    efficiency: float
    speedup: float


def predict_scaling(
    step_ms: float, gradient_bytes: float, workers: Sequence[int], network: Network
) -> list[Scaled]:
    """Step time and efficiency with more workers, each with the batch that the measured step had.

    Args:
        step_ms: Measured with one worker, in milliseconds.
        gradient_bytes: Of all trainable weights.
        workers: Numbers of workers, 1 or more each.
        network: What connects them.

    Raises:
        ValueError: A number out of range.
    """
    for name, value in (("step_ms", step_ms), ("gradient_bytes", gradient_bytes)):
        if not value > 0:
            raise refuse(name, value, "a number above 0", "Measure it with measure_step.")
    if not workers or min(workers) < 1:
        raise refuse("workers", list(workers), "whole numbers, 1 or more", "Such as 8,64,512.")
    scaled = []
    for count in workers:
        sum_ms = 1e3 * all_reduce_s(gradient_bytes, count, network)
        total_ms = step_ms + sum_ms
        efficiency = step_ms / total_ms
        scaled.append(Scaled(count, total_ms, sum_ms, efficiency, count * efficiency))
    return scaled


def all_reduce_s(size_bytes: float, workers: int, network: Network) -> float:
    """Seconds to sum `size_bytes` over all workers; the formulas stand above."""
    ring = 2 * (workers - 1) * (network.latency_s + size_bytes / (workers * network.bandwidth))
    local = 2 * (network.devices - 1) / network.devices * size_bytes / network.local_bandwidth
    return ring + (local if workers > 1 else 0.0)


def gradient_bytes(model: keras.Model) -> int:
    """Bytes of the gradients of all trainable weights, dense."""
    sizes = [int(np.prod(each.shape)) * tf.as_dtype(each.dtype).size for each in model.trainable_variables]
    return sum(sizes)


def measure_step(model: keras.Model, batch_size: int, steps: int = 20, epochs: int = 5) -> float:
    """Milliseconds of a training step on this machine, with Adam, on made-up samples of the model's inputs.

    Args:
        model: Built, with inputs of known shapes. It is copied.
        batch_size: Samples of a step, 1 or more.
        steps: Of an epoch.
        epochs: That are timed, after two that compile; the median counts.

    Raises:
        ValueError: An input's shape is not known, or a number is out of range.
    """
    if not batch_size >= 1:
        raise refuse("batch_size", batch_size, "1 or more", "Give that of one worker.")
    inputs = keras.tree.map_structure(lambda each: _samples(each, batch_size * steps), model.inputs)
    accelerator = Accelerator("one_device")
    with accelerator.scope():
        copy = keras.models.clone_model(model)
        copy.compile("adam", _mean_square, **accelerator.compile_options())
    ends = []
    clock = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: ends.append(time.perf_counter()))
    targets = [np.zeros(batch_size * steps, "float32")] * len(model.outputs)
    copy.fit(
        inputs if len(inputs) > 1 else inputs[0],
        targets if len(targets) > 1 else targets[0],
        batch_size=batch_size,
        epochs=epochs + 2,
        verbose=0,
        callbacks=[clock],
    )
    seconds = [after - before for before, after in itertools.pairwise(ends)][1:]
    return 1e3 * statistics.median(seconds) / steps


def _mean_square(_: object, y_pred: object) -> object:
    """A loss for outputs of any shape, without labels."""
    return keras.ops.mean(keras.ops.square(y_pred))


def _samples(tensor: keras.KerasTensor, count: int) -> np.ndarray:
    shape = tensor.shape[1:]
    if None in shape:
        raise refuse(
            f"the shape of input {tensor.name!r}",
            tensor.shape,
            "known sizes behind the batch",
            "Build the model for the size that you train with, or give --step-ms.",
        )
    if "int" in tensor.dtype:
        return np.zeros((count, *shape), tensor.dtype)  # an index that every table has
    return np.random.default_rng(0).normal(size=(count, *shape)).astype(tensor.dtype)


def parse_bandwidth(text: str) -> float:
    """Bytes a second of "100Gb/s" (bits) or "12.5GB/s" (bytes).

    Raises:
        ValueError: Another form.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(b|B|bit|Byte)(?:/s|ps)\s*", text)
    if found is None or float(found[1]) <= 0:
        raise refuse("bandwidth", text, '"100Gb/s" for bits, "12.5GB/s" for bytes', "Name the unit.")
    return float(found[1]) * PREFIXES[found[2]] * UNITS[found[3][0]]
