"""Einsum of two operands as one matrix product: what `EinsumDense` and attention are made of.

Keras multiplies a batch of sequences with a kernel as so many small products, whose gradient for the kernel
is a batch of matrices that are then summed; and for the products of attention it calls `tf.einsum`, whose
gradients transpose every operand again. Here every index is batch, kept by one operand, or summed; operands
are transposed once where their order asks for it, and one `tf.matmul` does the rest: a flat one where there
is no batch index.

Used for floating-point operands whose sizes fit; indices that occur in one operand alone and not in the
result, or twice in one operand, go to Keras. Measured by `benchmarks/step_time.py --models transformer`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Container
from typing import Any

import numpy as np
import tensorflow as tf
from keras.src.backend.tensorflow import numpy as keras_numpy

from tfaccel.fast_kernels.agreement import ways_apart
from tfaccel.keras_fixes.patch import Patch

# Of MultiHeadAttention: projection, output, scores, values; each is probed.
PROBED = ("abc,cde->abde", "abcd,cde->abe", "aecd,abcd->acbe", "acbe,aecd->abcd")


@dataclasses.dataclass(frozen=True)
class Product:
    """How an equation becomes a product: its indices by what they do, each in the order of their operand."""

    first: str
    second: str
    result: str
    batch: str
    rows: str
    summed: str
    columns: str

    @property
    def is_simple(self) -> bool:
        """Whether `tf.matmul` takes the operands without reshaping, and so checks their sizes itself."""
        return len(self.rows) == len(self.summed) == len(self.columns) == 1

    def fits(self, first: tf.TensorShape, second: tf.TensorShape) -> bool:
        """Whether the sizes of the shared indices are known to be equal, or `tf.matmul` will look.

        Keras broadcasts a size of 1 in some equations.
        """
        if (first.rank, second.rank) != (len(self.first), len(self.second)):
            return False
        for index in self.batch + self.summed:
            sizes = first[self.first.index(index)], second[self.second.index(index)]
            if sizes[0] != sizes[1] or (sizes[0] is None and not self.is_simple):
                return False
        return True


@functools.lru_cache(maxsize=256)
def parse(equation: str) -> Product | None:
    """Reads an equation; None where it is no product of matrices.

    Args:
        equation: As `tf.einsum` takes it, for two operands, without an ellipsis.
    """
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if not arrow or len(operands) != 2 or "." in equation:
        return None
    first, second = operands
    if any(len(set(indices)) < len(indices) for indices in (first, second, result)):
        return None
    everywhere = set(first) & set(second)
    batch = "".join(i for i in result if i in everywhere)
    rows, columns = ("".join(i for i in own if i not in everywhere) for own in (first, second))
    summed = "".join(i for i in first if i in everywhere and i not in result)
    if set(result) != set(batch + rows + columns) or not summed:
        return None
    return Product(first, second, result, batch, rows, summed, columns)


def multiply(product: Product, first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    """The einsum of two tensors.

    Args:
        product: What `parse` gave.
        first: One dimension for each index of `product.first`.
        second: One for each index of `product.second`, same dtype.
    """
    kind = product
    left, right_first = kind.batch + kind.rows + kind.summed, kind.batch + kind.summed + kind.columns
    # A product reads a matrix in either order; a copy is made only where neither fits.
    right_second = kind.batch + kind.columns + kind.summed
    left_second = kind.batch + kind.summed + kind.rows
    transpose_first = kind.first == left_second != left
    transpose_second = kind.second == right_second != right_first
    a = _arranged(first, kind.first, left_second if transpose_first else left)
    b = _arranged(second, kind.second, right_second if transpose_second else right_first)
    if kind.is_simple:
        c = tf.matmul(a, b, transpose_a=transpose_first, transpose_b=transpose_second)
        return _arranged(c, kind.batch + kind.rows + kind.columns, kind.result)
    sizes = {**_sizes(product.second, second), **_sizes(product.first, first)}
    batch = [sizes[i] for i in kind.batch]
    rows, summed, columns = (_volume(sizes, part) for part in (kind.rows, kind.summed, kind.columns))
    a = tf.reshape(a, batch + ([summed, rows] if transpose_first else [rows, summed]))
    b = tf.reshape(b, batch + ([columns, summed] if transpose_second else [summed, columns]))
    c = tf.matmul(a, b, transpose_a=transpose_first, transpose_b=transpose_second)
    order = kind.batch + kind.rows + kind.columns
    return _arranged(tf.reshape(c, [sizes[i] for i in order]), order, kind.result)


def _sizes(indices: str, tensor: tf.Tensor) -> dict[str, Any]:
    """The size of each index, as a number where it is known."""
    known: list[Any] = tensor.shape.as_list()
    if None in known:
        dynamic = tf.unstack(tf.shape(tensor))
        known = [size or dynamic[i] for i, size in enumerate(known)]
    return dict(zip(indices, known, strict=True))


def _volume(sizes: dict[str, Any], indices: str) -> Any:
    known = math.prod(sizes[i] for i in indices if isinstance(sizes[i], int))
    for i in indices:
        known = known if isinstance(sizes[i], int) else known * sizes[i]
    return known


def _arranged(tensor: tf.Tensor, order: str, wanted: str) -> tf.Tensor:
    return tensor if order == wanted else tf.transpose(tensor, [order.index(i) for i in wanted])


def _wrap(original: Callable, allowed: Callable[[], Any]) -> Callable:
    def einsum(subscripts: str, *operands: Any, **kwargs: Any) -> Any:
        if not allowed() or kwargs or len(operands) != 2 or not isinstance(subscripts, str):
            return original(subscripts, *operands, **kwargs)
        product = parse(subscripts)
        first, second = (tf.convert_to_tensor(operand) for operand in operands)
        same = first.dtype == second.dtype and first.dtype.name in allowed()
        if product is None or not same or not product.fits(first.shape, second.shape):
            return original(subscripts, *operands)
        return multiply(product, first, second)

    return einsum


_PATCH = Patch(keras_numpy, "einsum", _wrap)


def fused(dtypes: Container[str]) -> contextlib.AbstractContextManager[None]:
    """Lets `keras.ops.einsum` multiply in this thread while the block lasts: wrap the tracing of a step.

    Args:
        dtypes: Those of the operands for which it may.
    """
    return _PATCH.active(dtypes)


def probe(dtype: str) -> float:
    """Runs the products of attention both ways on small tensors, with their gradients.

    Args:
        dtype: "float32", "float16" or "bfloat16".

    Returns:
        As `disagreement`: up to 1 they agree.
    """
    random = np.random.default_rng(0)
    sizes = dict(zip("abcde", (2, 3, 4, 5, 6), strict=True))
    worst = 0.0
    for equation in PROBED:
        product = parse(equation)
        assert product is not None
        operands = [random.normal(size=[sizes[i] for i in part]) for part in (product.first, product.second)]
        ways = functools.partial(keras_numpy.einsum, equation), functools.partial(multiply, product)
        worst = max(worst, ways_apart(*ways, operands, dtype, roundings=4))
    return worst
