"""Another value's gradient, on a tape and in a loop's body, and nothing that stays behind."""

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import ops

from tfaccel.keras_fixes.straight_through import straight_through

WEIGHTS = tf.constant([0.2, 0.7, -1.4])


def rounded(weights):
    return straight_through(tf.round(weights), weights)


def gradients(weights):
    """Of one use, and of uses in a loop."""
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(weights)
        once = tf.reduce_sum(rounded(weights) ** 2)
        several = tf.constant(0.0)
        for step in tf.range(3):
            several += tf.reduce_sum(rounded(weights) ** 2) * tf.cast(step, tf.float32)
    return tape.gradient(once, weights), tape.gradient(several, weights)


@pytest.mark.parametrize("way", ["eager", "graph", "xla"])
def test_the_rounded_value_with_the_gradient_of_the_exact_one(way):
    run = gradients if way == "eager" else tf.function(gradients, jit_compile=way == "xla")
    once, several = run(WEIGHTS)
    expected = 2 * np.round(WEIGHTS.numpy())
    np.testing.assert_array_equal(once, expected)
    np.testing.assert_array_equal(several, 3 * expected)
    np.testing.assert_array_equal(rounded(WEIGHTS), np.round(WEIGHTS.numpy()))


def test_it_leaves_no_graph_behind():
    before = len(ops.gradient_registry.list())
    function = tf.function(gradients)
    concrete = function.get_concrete_function(tf.TensorSpec([3]))
    graph = weakref.ref(concrete.graph)
    del function, concrete
    gc.collect()
    assert graph() is None
    assert len(ops.gradient_registry.list()) == before


def test_canary_a_custom_gradient_is_registered_for_each_trace():
    @tf.custom_gradient
    def same(x):
        return tf.identity(x), lambda upstream: upstream

    before = len(ops.gradient_registry.list())
    for _ in range(3):
        tf.function(same)(WEIGHTS)
    assert len(ops.gradient_registry.list()) == before + 3
