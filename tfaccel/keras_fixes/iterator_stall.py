"""The end of an epoch can take as long as the epoch, up to a minute: nothing runs, nothing is said.

When an iterator of `tf.data` goes, TensorFlow waits for the thread that tunes its pipeline. That thread looks
up ever more rarely, at last once a minute; to be woken it is told that it is over, but a moment before it can
see that it is (`CancellationManager::StartCancelWithStatus` calls first and sets `is_cancelled_` then). Where
it wakes faster than that, it sleeps on, until twice the time that the iterator has lived, or a minute. On one
core that is so in nearly every epoch, on two cores that are busy in some, with several devices often.

Smallest reproduction (TensorFlow 2.21, one core, `taskset -c 0`; an epoch of 2.7 s takes 5.1):

    data = tf.data.Dataset.range(4000).batch(8).map(images, num_parallel_calls=2).prefetch(4)
    model.fit(data, epochs=4)

The fix: the pipelines of a `fit` in the scope are not tuned, unless the user's own options say so.
`tf.data.AUTOTUNE` then means what tuning begins with: as many calls in parallel as there are cores, 16 at
most. So on a host with more of them, where the thread hardly ever wakes in that moment, one device's
pipelines are tuned as ever.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.data.ops import multi_device_iterator_ops

from tfaccel.keras_fixes.patch import Patch

CALLS_OF_AUTOTUNE = 16  # that it begins with at most: `tf.data.experimental.AutotuneOptions`


def untuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The same data set without the thread that tunes it; as it is where its options ask for one."""
    if dataset.options().autotune.enabled is not None:
        return dataset
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def prompt(dataset: Any, cores: int | None = None) -> Any:
    """The same data set, whose iterators end at once.

    Args:
        dataset: Of one device; what is none is given back as it is.
        cores: That the process may use. Default: counted.
    """
    if not isinstance(dataset, tf.data.Dataset) or (cores or _cores()) > CALLS_OF_AUTOTUNE:
        return dataset
    # Tuning puts this behind a pipeline that ends in something else.
    result = untuned(dataset)
    return dataset if result is dataset else result.prefetch(tf.data.AUTOTUNE)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prompt_iterator(dataset: Any) -> Any:
    """An iterator of `prompt(dataset)`."""
    return iter(prompt(dataset))


def _untuned_on_device(original: Callable, setting: Callable[[], Any]) -> Callable:
    def create_device_dataset(*args: Any) -> tf.data.Dataset:
        return untuned(original(*args)) if setting() else original(*args)

    return create_device_dataset


_PATCH = Patch(multi_device_iterator_ops, "_create_device_dataset", _untuned_on_device)


def untuned_iterator(dataset: Any) -> Any:
    """An iterator of a distributed data set whose stages on the devices are not tuned."""
    with _PATCH.active(True):
        return iter(dataset)
