"""Claim: an update by one op takes less time than Keras's, for dense gradients and for rows of an embedding.

    python benchmarks/optimizer_update.py

Each case is one weight and its gradient, in a loop of updates alone; both ways in turn, in one process. What
is printed is the time of the fused update over that of Keras's, the median of seven turns of 40 updates.
"""

import contextlib
import statistics

import keras
import numpy as np
import tensorflow as tf
from _report import print_row, ratios_in_turn

from tfaccel.fast_kernels.fused_optimizer import fused, fused_update

# optimizer, shape of the weight, rows of its gradient (None: dense)
CASES = [
    ("Adam", (784, 128), None),
    ("SGD", (784, 128), None),
    ("RMSprop", (784, 128), None),
    ("Adam", (1024, 1024), None),
    ("Adam", (20_000, 16), 16_384),
    ("Adam", (20_000, 16), 2_048),
    ("Adam", (100_000, 32), 4_096),
    ("Adam", (100_000, 64), 8_192),
]
UPDATES = 40
TURNS = 7


def updates(name: str, shape: tuple[int, int], rows: int | None, fuse: bool):
    """A function that runs `UPDATES` updates."""
    random = np.random.default_rng(0)
    weight = keras.Variable(random.normal(size=shape), dtype="float32")
    optimizer = getattr(keras.optimizers, name)()
    optimizer.build([weight])
    gradient = tf.constant(random.normal(size=(rows or shape[0], shape[1])), tf.float32)
    if rows:
        some = tf.constant(random.integers(0, shape[0], rows))
        gradient = tf.IndexedSlices(gradient, some, tf.constant(shape))
    around = fused(optimizer, fused_update(optimizer)) if fuse else contextlib.nullcontext()
    with around:
        step = tf.function(lambda: optimizer.apply([gradient]), autograph=False).get_concrete_function()

    def body(index):
        step()
        return [index + 1]

    @tf.function(autograph=False)
    def run():
        tf.while_loop(lambda i: i < UPDATES, body, [tf.constant(0)], parallel_iterations=1)

    run()
    return run


def main() -> None:
    """Prints a line for each case."""
    for name, shape, rows in CASES:
        ways = (updates(name, shape, rows, fuse) for fuse in (True, False))
        ratios = ratios_in_turn(*ways, TURNS)
        print_row(
            benchmark="optimizer_update",
            optimizer=name,
            shape=shape,
            rows=rows,
            turns=TURNS,
            of_keras=round(statistics.median(ratios), 2),
            spread=[round(f(ratios), 2) for f in (min, max)],
        )


if __name__ == "__main__":
    main()
