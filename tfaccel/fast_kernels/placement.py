"""Where a step runs, and how what it reads every time is kept there."""

from __future__ import annotations

import tensorflow as tf

# As what a GPU keeps numbers that TensorFlow can't pick rows of there. int32 always lies in the host's
# memory, and is copied for every use; small integers have no kernel. All of these hold every value exactly.
WIDENED = {
    tf.int32: tf.int64,
    tf.uint32: tf.int64,
    tf.uint8: tf.float16,
    tf.int8: tf.float16,
    tf.uint16: tf.float32,
    tf.int16: tf.float32,
}
KEPT = (tf.bool, tf.int64, tf.bfloat16, tf.float16, tf.float32, tf.float64, tf.complex64, tf.complex128)


def step_device() -> str:
    """Where TensorFlow puts a step that nobody placed: on the first GPU, or the CPU where there is none."""
    return "GPU:0" if on_gpu() else "CPU:0"


def on_gpu() -> bool:
    """Whether a step that nobody placed runs on a GPU."""
    return bool(tf.config.list_logical_devices("GPU"))


def can_keep(dtype: tf.DType) -> bool:
    """Whether a GPU can keep such numbers, and pick rows of them."""
    return dtype in WIDENED or dtype in KEPT


def stored_dtype(dtype: tf.DType, device: str) -> tf.DType:
    """As what numbers are kept on a device."""
    return WIDENED.get(dtype, dtype) if device.startswith("GPU") else dtype


def put(tensor: tf.Tensor, device: str) -> tf.Tensor:
    """A tensor in the memory of a device, in its `stored_dtype` there."""
    wide = tf.cast(tensor, stored_dtype(tensor.dtype, device))  # on the host, which has every kind
    with tf.device(device):
        return tf.identity(wide)
