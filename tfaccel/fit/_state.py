"""What a technique remembers from step to step, beside the weights and not part of the model."""

from __future__ import annotations

import keras
import numpy as np


def beside(values: np.ndarray, aggregation: str = "only_first_replica") -> keras.Variable:
    """A variable with these values; make it in the strategy's scope.

    Each replica keeps its own copy. What is computed from the weights alone is the same in all.

    Args:
        values: At the start.
        aggregation: What one reads outside of a step, where copies differ: the first, or `"mean"`.
    """
    return keras.Variable(
        values,
        dtype=values.dtype.name,
        trainable=False,
        autocast=False,
        aggregation=aggregation,
        synchronization="on_read",
    )
