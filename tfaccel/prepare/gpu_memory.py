"""How much memory TensorFlow takes of a GPU: all of it at once, unless it is told otherwise.

When to use: where several processes share a GPU (growth), or where one must leave a part of it to others (a
limit). It costs nothing; a process that grows can be refused memory that another one has taken meanwhile.

Not run on a GPU: none could be had. Tested with described devices, and with TensorFlow's own refusal.
"""

from __future__ import annotations

import tensorflow as tf

from tfaccel.errors import is_whole, refuse
from tfaccel.free_memory import gpu_memory_bytes

MEGABYTE = 2**20


def limit_gpu_memory(memory_bytes: int | None = None) -> tuple[str, ...]:
    """Lets TensorFlow take a GPU's memory as it needs it, or a fixed part of it; call it first in a script.

    Args:
        memory_bytes: How much of each GPU this process may take, at least 1 MiB, rounded down to whole MiB.
            Default None: as much as it comes to need, and no more.

    Returns:
        The GPUs that it holds for; empty where there are none.

    Raises:
        ValueError: A bad argument, more than the smallest GPU has, or TensorFlow has started already, as it
            does with the first tensor, model or strategy.

    Example:
        >>> tfaccel.limit_gpu_memory() == tuple(gpu.name for gpu in tf.config.list_physical_devices("GPU"))
        True

    Reference:
        https://www.tensorflow.org/guide/gpu#limiting_gpu_memory_growth
    """
    if memory_bytes is not None and not is_whole(memory_bytes, MEGABYTE):
        raise refuse("memory_bytes", memory_bytes, "an integer ≥ 2**20, or None", "4 GiB are 4 * 2**30.")
    gpus = tf.config.list_physical_devices("GPU")
    there = gpu_memory_bytes() if gpus and memory_bytes is not None else None
    if there is not None and memory_bytes is not None and memory_bytes > there:
        raise refuse("memory_bytes", memory_bytes, f"at most the {there} of the GPU", "Leave it out to grow.")
    try:
        for gpu in gpus:
            if memory_bytes is None:
                tf.config.experimental.set_memory_growth(gpu, True)
            else:
                part = tf.config.LogicalDeviceConfiguration(memory_limit=memory_bytes // MEGABYTE)
                tf.config.set_logical_device_configuration(gpu, [part])
    except RuntimeError as error:
        raise ValueError(
            f"TensorFlow has started already and taken its memory ({error}). Allowed: before the first "
            "tensor, model or strategy. Call limit_gpu_memory first in the script."
        ) from error
    return tuple(gpu.name for gpu in gpus)
