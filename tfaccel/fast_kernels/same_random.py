"""The same uniform random numbers with XLA and without, so that a seed means one run whichever is taken.

Dropout draws other masks under `jit_compile=True`. Two things differ. The stateless random ops choose their
generator by the device that they are compiled for (`alg="auto_select"`). And where both take Philox, the bits
are equal, but TensorFlow makes a float of the low 23 and XLA of the high 23. So no comparison of the two ways
can tell a fault from a different mask. While a step is traced for XLA, "auto_select" is read as "philox", and
the bits become floats as TensorFlow's CPU kernel has it: the numbers are equal bit for bit.

Float32 uniform numbers only, which is what dropout draws. Normal numbers come from different formulas.

Reference: Salmon et al. (2011), "Parallel Random Numbers: As Easy as 1, 2, 3",
https://doi.org/10.1145/2063384.2063405.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import gen_stateless_random_ops_v2, random_ops_util

from tfaccel.keras_fixes.patch import Patch, all_active


def uniform_from_bits(bits: tf.Tensor) -> tf.Tensor:
    """Turns random bits into numbers in [0, 1): the low 23 are the fraction of a float in [1, 2), less 1.

    Args:
        bits: uint32, any shape.
    """
    one = tf.constant(0x3F800000, tf.uint32)
    in_one_to_two = tf.bitwise.bitwise_or(tf.bitwise.bitwise_and(bits, tf.constant(0x7FFFFF, tf.uint32)), one)
    return tf.bitcast(in_one_to_two, tf.float32) - 1.0


def _choose_philox(original: Callable, setting: Callable[[], Any]) -> Callable:
    algorithms = random_ops_util.Algorithm

    def get_key_counter_alg(seed: Any, alg: Any) -> Any:
        # The same choice comes as None, a name, a member of the enumeration or its number.
        if setting() and (alg is None or isinstance(alg, int | str | algorithms)):
            number = random_ops_util.convert_alg_to_int("auto_select" if alg is None else alg)
            alg = algorithms.PHILOX.value if number == algorithms.AUTO_SELECT.value else number
        return original(seed, alg)

    return get_key_counter_alg


def _take_low_bits(original: Callable, setting: Callable[[], Any]) -> Callable:
    def stateless_random_uniform_v2(
        shape: Any, key: Any, counter: Any, alg: Any, dtype: Any = tf.float32, name: Any = None
    ) -> Any:
        if not setting() or dtype != tf.float32:
            return original(shape, key=key, counter=counter, alg=alg, dtype=dtype, name=name)
        bits = gen_stateless_random_ops_v2.stateless_random_uniform_full_int_v2(
            shape, key=key, counter=counter, alg=alg, dtype=tf.uint32
        )
        return uniform_from_bits(bits)

    return stateless_random_uniform_v2


_PATCHES = (
    Patch(random_ops_util, "get_key_counter_alg", _choose_philox),
    Patch(gen_stateless_random_ops_v2, "stateless_random_uniform_v2", _take_low_bits),
)


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Lets this thread trace for XLA with the uniform numbers that TensorFlow draws without it."""
    with all_active(_PATCHES, True):
        yield
