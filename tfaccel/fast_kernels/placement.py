"""Where a step runs, and how what it reads every time is kept there."""

from __future__ import annotations

import tensorflow as tf


def step_device() -> str:
    """Where TensorFlow puts a step that nobody placed: on the first GPU, or the CPU where there is none."""
    return "GPU:0" if on_gpu() else "CPU:0"


def on_gpu() -> bool:
    """Whether a step that nobody placed runs on a GPU."""
    return bool(tf.config.list_logical_devices("GPU"))


def put(tensor: tf.Tensor, device: str) -> tf.Tensor:
    """A tensor in the memory of a device, in its `stored_dtype` there."""
    with tf.device(device):
        return tf.identity(tf.cast(tensor, stored_dtype(tensor.dtype, device)))


def stored_dtype(dtype: tf.DType, device: str) -> tf.DType:
    """As what numbers are kept on a device.

    TensorFlow keeps int32 in the host's memory, whatever the device is, and copies it for every use: for a
    GPU it is widened to int64.
    """
    return tf.int64 if dtype == tf.int32 and device.startswith("GPU") else dtype
