"""After a `fit` that `BackupAndRestore` resumed, every later `fit` of the model begins at that epoch too.

The callback puts the epoch on the model, and nobody takes it off: a second `fit(epochs=3)` after one that was
resumed at epoch 2 trains one epoch, without a word. No upstream issue was found.

Smallest reproduction (Keras 3.15.1; `backup` holds one of two epochs):

    model.fit(x, y, epochs=4, callbacks=[keras.callbacks.BackupAndRestore("backup")])
    model.fit(x, y, epochs=2)     # trains nothing

The fix: a `fit` begins without it; the callback puts it there anew where there is a backup.
"""

from __future__ import annotations

import keras


def forget_restored_epoch(model: keras.Model) -> None:
    """Call it at the beginning of a `fit`, before its callbacks."""
    model._initial_epoch = None
