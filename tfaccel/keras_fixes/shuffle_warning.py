"""Keras warns about its own default: `fit(dataset)` says that `shuffle=True` is ignored.

`fit` passes its default `shuffle=True` to the adapter for `tf.data.Dataset`, which then warns that the
argument "was passed". The user passed nothing, and can only silence it with `shuffle=False`.

Smallest reproduction (Keras 3.15.1):

    model.fit(tf.data.Dataset.from_tensors((x, y)))   # UserWarning: `shuffle=True` was passed, ...

The fix: this one message is filtered once `accelerator.dataset()` has made a dataset whose order is
settled. Nothing else is filtered.
"""

from __future__ import annotations

import re
import warnings

MESSAGE = "`shuffle=True` was passed, but will be ignored since the data `x` was provided as a tf.data"


def silence() -> None:
    """Filters the message; calling it again changes nothing."""
    warnings.filterwarnings("ignore", message=re.escape(MESSAGE), category=UserWarning)
