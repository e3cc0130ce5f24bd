"""How much memory there is, and how much of it is free: of the machine and of its GPUs."""

from __future__ import annotations

import functools
import math
import os
import subprocess

import tensorflow as tf


def free_memory_bytes() -> float:
    """What the machine can give without swapping; infinite where the system doesn't say."""
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":") for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        names = getattr(os, "sysconf_names", {})
        if "SC_AVPHYS_PAGES" in names:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return math.inf


@functools.cache
def gpu_memory_bytes() -> int | None:
    """Memory of the smallest GPU as `nvidia-smi` gives it, or None. TensorFlow has no call for it."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
        return min(int(line) for line in answer.stdout.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def free_gpu_memory_bytes() -> float | None:
    """What the first GPU has left of its memory, as far as this process knows; None without a GPU."""
    gpus = tf.config.list_logical_devices("GPU")
    total = gpu_memory_bytes() if gpus else None
    if total is None:
        return None
    parts = tf.config.get_logical_device_configuration(tf.config.list_physical_devices("GPU")[0])
    if parts and parts[0].memory_limit:  # in megabytes, as `limit_gpu_memory` sets it
        total = min(total, parts[0].memory_limit * 2**20)
    return total - tf.config.experimental.get_memory_info(gpus[0].name)["current"]
