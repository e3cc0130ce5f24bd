"""What a technique remembers from step to step, beside the weights and not part of the model."""

from __future__ import annotations

import keras
import numpy as np


def beside(values: np.ndarray) -> keras.Variable:
    """A variable with these values; make it in the strategy's scope.

    Each replica keeps its own copy, and as all compute the same from the same weights, the copies agree.
    """
    return keras.Variable(
        values,
        dtype=values.dtype.name,
        trainable=False,
        autocast=False,
        aggregation="only_first_replica",
        synchronization="on_read",
    )
