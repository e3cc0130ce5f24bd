"""`keras.distribution` does nothing on the TensorFlow backend, and says nothing.

`DataParallel` and `ModelParallel` are built for JAX; under TensorFlow `set_distribution` succeeds, `fit`
runs, and everything stays on one device (keras-team/keras#19049, #21190). The speed-up never comes.

Smallest reproduction (Keras 3.15.1, two CPUs):

    keras.distribution.set_distribution(keras.distribution.DataParallel())
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse"); model.fit(x, y)      # one device, no warning

It can't be healed from outside: the backend has no counterpart to JAX's sharding. It is refused.
"""

from __future__ import annotations

import keras


def check_no_keras_distribution() -> None:
    """Raises where the user has asked Keras for a distribution that this backend ignores.

    Raises:
        ValueError: `keras.distribution` is set.
    """
    distribution = keras.distribution.distribution()
    if distribution is not None:
        raise ValueError(
            f"keras.distribution is set to {type(distribution).__name__}, which the TensorFlow backend "
            "ignores without a word: one device would train. Allowed: a tf.distribute strategy. Leave "
            'keras.distribution out; Accelerator(strategy="mirrored") or `tfaccel launch` distributes. For '
            "ModelParallel use Keras on JAX."
        )
