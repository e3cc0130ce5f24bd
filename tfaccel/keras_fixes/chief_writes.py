"""On several workers every one writes the same checkpoint: HDF5's lock fails one, and the others with it.

`ModelCheckpoint` and `BackupAndRestore` with one path on all workers (Keras documents no other way) end in
`BlockingIOError: [Errno 11] Unable to synchronously create file`. A path for each worker works, but then each
restores what it saved itself, and workers that saved different epochs wait for one another for ever.

Smallest reproduction (Keras 3.15.1, a `TF_CONFIG` of two workers, in each):

    with tf.distribute.MultiWorkerMirroredStrategy().scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    model.fit(x, y, callbacks=[keras.callbacks.ModelCheckpoint("model.keras")])

The fix: in a `fit` of several workers only the first keeps the callbacks that write or print. What
`BackupAndRestore` restored there, the others are sent: one path is right, on a shared disk and without one.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from typing import Any

import keras
import tensorflow as tf
from keras.src.utils import file_utils

from tfaccel.errors import refuse
from tfaccel.keras_fixes.workers import from_first_worker, is_multi_worker

# A callback of another kind says so itself: class or object have the attribute.
ATTRIBUTE = "chief_only"
_WRITERS = (
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.CSVLogger,
    keras.callbacks.TensorBoard,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.ProgbarLogger,
)


def only_chief_writes(callbacks: Any, strategy: tf.distribute.Strategy) -> None:
    """Takes callbacks that write out of the list of a running `fit`, on all workers but the first.

    Args:
        callbacks: A `keras.callbacks.CallbackList`; anything else is left alone.
        strategy: Of the model.

    Raises:
        ValueError: The first worker can't write where a callback is to.
    """
    if not isinstance(callbacks, keras.callbacks.CallbackList) or not is_multi_worker(strategy):
        return
    chief = strategy.extended.should_checkpoint
    kept: list[keras.callbacks.Callback] = []
    already = [each.backup for each in callbacks.callbacks if isinstance(each, RestoredByChief)]
    for callback in callbacks.callbacks:
        if chief:
            check_writable(callback)
        if chief or not (isinstance(callback, _WRITERS) or getattr(callback, ATTRIBUTE, False)):
            kept.append(callback)
        if isinstance(callback, keras.callbacks.BackupAndRestore) and callback not in already:
            if not chief:
                kept.pop()
            restored = RestoredByChief(callback, chief)
            restored.set_model(callback.model)
            kept.append(restored)
    callbacks.callbacks[:] = kept


class RestoredByChief(keras.callbacks.Callback):
    """Sends what `BackupAndRestore` restored on the first worker to all.

    Args:
        backup: The callback; it acts on the first worker only.
        chief: Whether this is the first worker.
    """

    def __init__(self, backup: keras.callbacks.BackupAndRestore, chief: bool):
        super().__init__()
        self.backup = backup
        self._chief = chief

    def on_train_begin(self, logs: dict | None = None) -> None:
        """After the backup was loaded, before the first step; all workers come here."""
        model = self.model
        found = self._chief and file_utils.exists(self.backup._weights_path)
        state = tf.constant([int(found), model._initial_epoch or 0] if self._chief else [0, 0])
        found, epoch = from_first_worker(model.distribute_strategy, [state])[0].numpy()
        if not found:
            return
        model._initial_epoch = int(epoch)
        variables = [*model.variables, *model.optimizer.variables]
        own = [_summable(tf.convert_to_tensor(variable.value)) for variable in variables]
        values = from_first_worker(model.distribute_strategy, own)
        for variable, value in zip(variables, values, strict=True):
            variable.assign(tf.cast(value, variable.dtype))


def _summable(tensor: tf.Tensor) -> tf.Tensor:
    """In a type that the workers can sum without loss."""
    if tensor.dtype.is_floating:
        return tensor if tensor.dtype == tf.float64 else tf.cast(tensor, tf.float32)
    return tf.cast(tensor, tf.int64)


def check_writable(callback: keras.callbacks.Callback) -> None:
    """Raises where a callback could not write what it is to write at the end of an epoch.

    Args:
        callback: `ModelCheckpoint`, `BackupAndRestore` or `CSVLogger`; others pass.

    Raises:
        ValueError: The folder can't be made or written.
    """
    if isinstance(callback, keras.callbacks.BackupAndRestore):
        argument, path, folder = "backup_dir", callback.backup_dir, callback.backup_dir
    elif isinstance(callback, keras.callbacks.ModelCheckpoint):
        argument, path, folder = "filepath", callback.filepath, os.path.dirname(callback.filepath)
    elif isinstance(callback, keras.callbacks.CSVLogger):
        argument, path, folder = "filename", callback.filename, os.path.dirname(callback.filename)
    else:
        return
    if "://" in str(path) or "{" in str(folder):
        return  # not on this disk, or not known yet
    present = pathlib.Path(folder or ".").absolute()
    with contextlib.suppress(OSError):
        while not present.exists():
            present = present.parent
        if present.is_dir() and os.access(present, os.W_OK | os.X_OK):
            return
    raise refuse(
        f"{type(callback).__name__}: {argument}",
        path,
        "a path that the first worker can write",
        f"{present} is no folder that it may write: choose another one.",
    )
