"""How an epoch is cut into calls: what `fit` and `evaluate` iterate over in place of Keras's rounding.

Keras calls its train function once per `steps_per_execution` steps, and rounds an epoch up to whole calls.
`count_exactly` replaces that one generator on the iterator of the running `fit`: the last call of an epoch is
shorter, batch numbers are right to the end, and where nobody watches the batches a call grows until it takes
about a tenth of a second.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

CALL_SECONDS = 0.1  # Ctrl-C and the progress bar come through this often
MOST_STEPS = 4096


class Chunk:
    """Some steps of an epoch: what Keras hands to the train function.

    Args:
        source: A `Pass`, or an iterator of batches.
        first: Number of the first batch in this pass.
        count: How many batches.
        epoch_iterator: Keras's, which counts what was seen.
    """

    def __init__(self, source: Any, first: int, count: int, epoch_iterator: Any):
        self.source = source
        self.first = first
        self.count = count
        self._epoch_iterator = epoch_iterator

    def ran(self, steps: int) -> None:
        """Says how many steps were run: fewer than `count` where a stream ended.

        Raises:
            StopIteration: There was nothing left; Keras takes it as the end of the epoch.
        """
        self.count = steps
        self._epoch_iterator._steps_seen += steps
        if steps == 0:
            raise StopIteration


class CallLength:
    """How many steps the next call runs.

    Args:
        steps: To begin with.
        grows: Whether it may be more, up to `CALL_SECONDS`.
    """

    def __init__(self, steps: int, grows: bool):
        self.steps = steps
        self.grows = grows

    def took(self, steps: int, seconds: float) -> None:
        """Notes how long a call took; the first of a program, which compiles, is not noted."""
        if self.grows and steps == self.steps and seconds < CALL_SECONDS / 2:
            self.steps = min(2 * steps, MOST_STEPS)


def count_exactly(epoch_iterator: Any, begin: Callable[[], Any], function: Any) -> None:
    """Lets a Keras epoch iterator hand out chunks.

    Args:
        epoch_iterator: Of the running `fit` or `evaluate`.
        begin: Starts a pass through the data.
        function: Has the `length` of a call.
    """
    it: Any = weakref.proxy(epoch_iterator)  # not kept by what it keeps: a cycle would hold the data

    def chunks() -> Iterator[tuple[int, int, Chunk]]:
        it.data_adapter.on_epoch_begin()
        steps = it.steps_per_epoch or it._num_batches
        if it._current_iterator is None or it.steps_per_epoch is None:
            it._current_iterator, it._steps_seen = begin(), 0
        step = 0
        while steps is None or step < steps:
            if it._num_batches and it._steps_seen >= it._num_batches:
                it._interrupted_warning()
                break
            # Where the data end is not known, and a long call would be numbered far past it.
            count = function.length.steps if steps else it.steps_per_execution
            for total, done in ((steps, step), (it._num_batches, it._steps_seen)):
                count = min(count, total - done) if total else count
            chunk = Chunk(it._current_iterator, it._steps_seen, count, it)
            yield step, step + count - 1, chunk
            step += chunk.count
        if it.steps_per_epoch and it._num_batches and it._steps_seen >= it._num_batches:
            it._current_iterator, it._steps_seen = begin(), 0
        it.data_adapter.on_epoch_end()

    it._enumerate_iterator = chunks


def watches_batches(callbacks: Any) -> bool:
    """Whether a callback of the user's looks at single batches, and so at how long a call is."""
    hooks = [f"on_{kind}batch_{end}" for kind in ("", "train_", "test_") for end in ("begin", "end")]

    def watches(callback: keras.callbacks.Callback) -> bool:
        # These have batch hooks that do nothing, unless they were told to save by batches.
        idle = (
            isinstance(callback, keras.callbacks.ProgbarLogger) or vars(callback).get("save_freq") == "epoch"
        )
        # On the object: `LambdaCallback` puts its hooks there.
        own = [getattr(callback, hook) for hook in hooks]
        own = [hook for hook in own if not getattr(hook, "_is_default", False)]
        return any(not (idle and getattr(hook, "__module__", "").startswith("keras.")) for hook in own)

    return any(watches(callback) for callback in getattr(callbacks, "callbacks", ()))


def running_loop(name: str = "") -> dict[str, Any]:
    """The local variables of the innermost `fit` or `evaluate` on the call stack; none where there is none.

    Args:
        name: Which of the two it must be.
    """
    frame = inspect.currentframe()
    try:
        while frame is not None:
            found = frame.f_code.co_name
            if found in ("fit", "evaluate") and "epoch_iterator" in frame.f_locals:
                return dict(frame.f_locals) if name in ("", found) else {}
            frame = frame.f_back
        return {}
    finally:
        del frame


def is_stream(epoch_iterator: Any) -> bool:
    """Whether it hands out batches of a `tf.data` pipeline, distributed over replicas or not."""
    return isinstance(epoch_iterator._distributed_dataset, tf.data.Dataset | tf.distribute.DistributedDataset)
