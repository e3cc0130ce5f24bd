"""Under `MirroredStrategy` the end of a data set can take a minute: nothing runs, nothing is said.

When an iterator goes, TensorFlow waits for the thread that tunes its pipeline. That thread looks up ever
more rarely, at last once a minute, and the call that should wake it can come too early. An iterator of
several devices that has been read to its end loses this race often: the wait is as long as the iterator has
lived, up to 60 s.

Smallest reproduction (TensorFlow 2.21, four CPUs; several times):

    iterator = iter(strategy.experimental_distribute_dataset(tf.data.Dataset.range(64).batch(8)))
    next(iterator)
    time.sleep(5)
    for _ in iterator: pass
    del iterator                                             # 5 s

The fix: the pipelines of a distributed `fit` are not tuned, unless the user's own options say so.
`tf.data.AUTOTUNE` then means as many calls in parallel as there are cores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.data.ops import multi_device_iterator_ops

from tfaccel.keras_fixes.patch import Patch


def untuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The same data set without the thread that tunes it; as it is where its options ask for one."""
    if dataset.options().autotune.enabled is not None:
        return dataset
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def _untuned_on_device(original: Callable, setting: Callable[[], Any]) -> Callable:
    def create_device_dataset(*args: Any) -> tf.data.Dataset:
        return untuned(original(*args)) if setting() else original(*args)

    return create_device_dataset


_PATCH = Patch(multi_device_iterator_ops, "_create_device_dataset", _untuned_on_device)


def untuned_iterator(dataset: Any) -> Any:
    """An iterator of a distributed data set whose stages on the devices are not tuned."""
    with _PATCH.active(True):
        return iter(dataset)
