"""A Keras callback can't see which other callbacks run in the same `fit`, nor their order.

Order decides what a callback sees: one that exports the model in `on_train_end` and stands before
`EarlyStopping(restore_best_weights=True)` exports other weights than the user ends with; two that both
set the learning rate undo each other. `Callback` is given the model and the epochs, not its neighbours.

Smallest reproduction: there is no attribute of `keras.callbacks.Callback` from which
`fit(callbacks=[A(), B()])` can be told from `fit(callbacks=[B(), A()])` inside `A`.

The fix: every hook is called by a `keras.callbacks.CallbackList`, so it stands on the call stack while
a hook runs, and it holds the list in order.
"""

from __future__ import annotations

import inspect

import keras


def siblings(callback: keras.callbacks.Callback) -> list[keras.callbacks.Callback]:
    """The callbacks of the running `fit`, in order, `callback` among them.

    Call it from inside a hook such as `on_train_begin`. A hook that is called by hand has no
    siblings: the answer is then `[callback]`.
    """
    frame = inspect.currentframe()
    try:
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, keras.callbacks.CallbackList) and callback in owner.callbacks:
                return list(owner.callbacks)
            frame = frame.f_back
    finally:
        del frame
    return [callback]


def changer_behind(callback: keras.callbacks.Callback) -> keras.callbacks.Callback | None:
    """The first callback behind this one that puts other weights into the model in `on_train_end`."""
    others = siblings(callback)
    behind = others[others.index(callback) + 1 :]
    return next((other for other in behind if _changes_weights_at_end(other)), None)


def _changes_weights_at_end(callback: keras.callbacks.Callback) -> bool:
    if isinstance(callback, keras.callbacks.EarlyStopping):
        return callback.restore_best_weights
    return isinstance(callback, keras.callbacks.SwapEMAWeights)
