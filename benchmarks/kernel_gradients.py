"""Claim: on a CPU the gradient of a 1×1 kernel, and in half precision that of a 3×3 kernel over a small map,
take less time as matrix products than as the gradient of a convolution.

    python benchmarks/kernel_gradients.py

Each case is one kernel's gradient, in a loop of its own; both ways in turn, in one process. What is printed
is the time of oneDNN's way over that of the products, the median of eleven turns. A case that
`fused_convolution` leaves to Keras is marked `used: false`; it shows why.
"""

import statistics

import keras
import tensorflow as tf
from _report import print_row, ratios_in_turn

from tfaccel.fast_kernels.fused_convolution import fits, kernel_gradient, serves

# samples, height and width, channels, filters, size of the kernel
CASES = [
    (32, 16, 16, 32, 1),
    (32, 8, 64, 64, 1),
    (32, 4, 64, 128, 1),
    (128, 16, 96, 192, 1),
    (256, 8, 64, 128, 1),
    (32, 14, 256, 1024, 1),
    (32, 7, 512, 512, 3),
    (128, 5, 64, 64, 3),
    (128, 4, 128, 128, 3),
    (32, 16, 32, 32, 3),
    (32, 28, 128, 128, 3),
]
GRADIENTS = 20
TURNS = 11


def gradients(case: tuple[int, ...], dtype: tf.DType, products: bool):
    """A function that takes `GRADIENTS` gradients."""
    samples, side, channels, filters, size = case
    random = tf.random.Generator.from_seed(0)
    x = tf.cast(random.normal((samples, side, side, channels)), dtype)
    upstream = tf.cast(random.normal((samples, side, side, filters)), dtype)

    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        if products:
            return kernel_gradient(x, upstream, (size, size), "same")
        return tf.raw_ops.Conv2DBackpropFilter(
            input=x,
            filter_sizes=[size, size, channels, filters],
            out_backprop=upstream,
            strides=[1] * 4,
            padding="SAME",
        )

    def body(index: tf.Tensor, last: tf.Tensor) -> list[tf.Tensor]:
        return [index + 1, gradient(upstream) + 0 * last]

    @tf.function(autograph=False)
    def run() -> tf.Tensor:
        first = [tf.constant(0), tf.zeros([size, size, channels, filters], dtype)]
        return tf.while_loop(lambda i, _: i < GRADIENTS, body, first, parallel_iterations=1)[1]

    run()
    return run


def is_used(case: tuple[int, ...], dtype: tf.DType) -> bool:
    """Whether `fit` takes the products."""
    samples, side, channels, filters, size = case
    layer = keras.layers.Conv2D(filters, size, padding="same", dtype=dtype.name)
    layer.build((samples, side, side, channels))
    return serves(layer) and fits(layer, tf.zeros((samples, side, side, channels), dtype), layer.kernel)


def main() -> None:
    """Prints a line for each case."""
    for dtype in (tf.float32, tf.bfloat16):
        for case in CASES:
            ways = (gradients(case, dtype, products) for products in (False, True))
            ratios = ratios_in_turn(*ways, TURNS)
            print_row(
                benchmark="kernel_gradients",
                dtype=dtype.name,
                case=case,
                used=is_used(case, dtype),
                turns=TURNS,
                faster=round(statistics.median(ratios), 2),
                spread=[round(f(ratios), 2) for f in (min, max)],
            )


if __name__ == "__main__":
    main()
