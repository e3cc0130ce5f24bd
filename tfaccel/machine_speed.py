"""How fast this machine multiplies matrices and moves memory: what a step's own figures are held against."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import tensorflow as tf

SIDE = 2048  # of the matrices: large enough for the machine's best
MEGABYTES = 64  # of each array that is moved: larger than caches
REPEATS = 5


@dataclasses.dataclass(frozen=True)
class MachineSpeed:
    """The best of several short probes.

    Args:
        flops_per_s: Floating point operations a second of a large matrix product.
        bytes_per_s: Bytes a second that an elementwise operation reads and writes.
    """

    flops_per_s: float
    bytes_per_s: float


@functools.cache
def machine_speed(dtype: str = "float32") -> MachineSpeed:
    """Measures once per process and dtype, for about half a second.

    Args:
        dtype: In which the model computes, such as `"float32"` or `"bfloat16"`.

    Returns:
        The speed of the first device.
    """
    left = tf.cast(tf.random.stateless_normal([SIDE, SIDE], (1, 2)), dtype)

    @tf.function
    def multiply() -> tf.Tensor:
        return tf.cast(tf.matmul(left, left)[0, 0], tf.float32)

    moved = tf.Variable(tf.zeros([MEGABYTES * 2**18]), trainable=False)
    added = tf.ones_like(moved)

    @tf.function
    def move() -> tf.Tensor:
        return moved.assign_add(added)[0]

    # The product of two n × n matrices; two arrays are read and one is written.
    return MachineSpeed(2 * SIDE**3 / _least_s(multiply), 3 * MEGABYTES * 2**20 / _least_s(move))


def _least_s(run: Callable[[], tf.Tensor]) -> float:
    """Seconds of the fastest of several; a number is fetched, so that a GPU has finished."""
    run().numpy()
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        run().numpy()
        times.append(time.perf_counter() - begun)
    return min(times)
