"""A trial run that leaves every random number as it was: nothing public reads all the states there are.

Python, NumPy, TensorFlow's seeds for operations (shuffling among them) and its global generator, and Keras's
own global seed. Dropout layers have seeds of their own, among the model's variables.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator

import numpy as np
from keras.src.backend.common import global_state
from tensorflow.python.eager import context
from tensorflow.python.ops import stateful_random_ops


@contextlib.contextmanager
def layer_names_kept() -> Iterator[None]:
    """Names the layers made behind the block (`dense`, `dense_1`…) as if none had been made in it."""
    names = global_state.get_global_attribute("object_name_uids")
    before = copy.copy(names)
    try:
        yield
    finally:
        global_state.set_global_attribute("object_name_uids", before)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Puts back, behind the block, every random state of this process."""
    python, numpy_state = random.getstate(), np.random.get_state()
    operations = getattr(context.context(), "_rng", None)
    operation_state = None if operations is None else operations.getstate()
    seed = context.global_seed()
    generator = stateful_random_ops.global_generator
    generated = None if generator is None else generator.state.numpy()
    keras_seed = global_state.get_global_attribute("global_seed_generator")
    keras_state = None if keras_seed is None else keras_seed.state.numpy()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        if context.global_seed() != seed:
            context.set_global_seed(seed)
        if operation_state is not None:
            context.context()._rng.setstate(operation_state)
            # Each eager operation has a kernel by its seed, which goes on where the block left it.
            context.context().clear_kernel_cache()
        stateful_random_ops.global_generator = generator
        if generator is not None:
            generator.state.assign(generated)
        global_state.set_global_attribute("global_seed_generator", keras_seed)
        if keras_seed is not None:
            keras_seed.state.assign(keras_state)
