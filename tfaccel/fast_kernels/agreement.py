"""How far two ways to the same numbers may lie apart, and the probes that say whether they do.

Two kernels that do the same mathematics differ by rounding: operations are fused or come in another order.
For a sum of `n` terms the difference grows like `sqrt(n)` units in the last place; the chains here are a few
dozen operations long, so a relative difference of 64 units in the last place of the *change* is far above
rounding and far below any wrong factor, sign, axis or missing term. Where a value was stored, one rounding of
the value itself comes on top.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfaccel.fast_kernels.placement import step_device

UNITS = 64
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def tolerance(dtype: str = "float32", roundings: int = 1) -> float:
    """The relative difference of two ways that compute in float32 and store in `dtype`.

    Args:
        dtype: A key of `EPSILON`.
        roundings: How often a value is rounded to half precision on its way, where that is the dtype.
    """
    return UNITS * EPSILON["float32"] + (0.0 if dtype == "float32" else roundings * EPSILON[dtype])


def disagreement(plain: np.ndarray, other: np.ndarray, before: np.ndarray, tolerance: float) -> float:
    """How often the difference of two results contains what is allowed; up to 1 they agree.

    The norm of the difference is held against `tolerance · ‖plain − before‖`, plus two roundings of the
    values themselves. Norms, because single elements whose gradient is rounding noise may go anywhere.

    Args:
        plain: The result of Keras's own operation.
        other: The result of the kernel; same shape.
        before: The value before the step; zeros for what is computed anew.
        tolerance: The relative difference of the change that is allowed.

    Returns:
        A number ≥ 0; infinite where one of the results has NaN or infinity and the other hasn't.
    """
    plain, other, before = (np.asarray(a, np.float64) for a in (plain, other, before))
    if not np.array_equal(np.isfinite(plain), np.isfinite(other)):
        return np.inf
    plain, other, before = (np.nan_to_num(a, posinf=0.0, neginf=0.0) for a in (plain, other, before))
    difference = np.linalg.norm(plain - other)
    stored = 2 * np.finfo(np.float32).eps * max(np.linalg.norm(plain), np.linalg.norm(before))
    allowed = tolerance * np.linalg.norm(plain - before) + stored
    return 0.0 if difference == 0 else float(difference / allowed) if allowed else np.inf


def worst_disagreement(
    plain: Sequence[np.ndarray], other: Sequence[np.ndarray], before: Sequence[np.ndarray], tolerance: float
) -> float:
    """The largest `disagreement` of several arrays."""
    cases = zip(plain, other, before, strict=True)
    return max((disagreement(a, b, c, tolerance) for a, b, c in cases), default=0.0)


def value_and_gradients(way: Callable[..., tf.Tensor], operands: list[tf.Tensor]) -> list[np.ndarray]:
    """What a kernel's probe compares: the result, and the gradients of the sum of its squares.

    Args:
        way: From the operands to a tensor; Keras's operation, or a kernel.
        operands: Floating-point tensors; a gradient is taken for each.
    """
    with tf.GradientTape() as tape:
        tape.watch(operands)
        result = way(*operands)
        square = tf.reduce_sum(tf.square(tf.cast(result, tf.float32)))
    return [tf.cast(t, tf.float32).numpy() for t in [result, *tape.gradient(square, operands)]]


def ways_apart(
    plain: Callable[..., tf.Tensor],
    other: Callable[..., tf.Tensor],
    operands: Sequence[Any],
    dtype: str = "float32",
    roundings: int = 1,
) -> float:
    """Runs Keras's operation and a kernel where a step runs, with their gradients.

    Args:
        plain: Keras's operation, from the operands to a tensor.
        other: The kernel, which does the same.
        operands: Floating-point tensors or arrays; both ways get them in `dtype`.
        dtype: A key of `EPSILON`.
        roundings: As in `tolerance`.

    Returns:
        As `disagreement`: up to 1 they agree.
    """
    with tf.device(step_device()):
        cast = [tf.cast(operand, dtype) for operand in operands]
        expected, got = (value_and_gradients(way, cast) for way in (plain, other))
    zeros = [np.zeros_like(a) for a in expected]
    return worst_disagreement(expected, got, zeros, tolerance(dtype, roundings))


STEP_TOLERANCE = 1e-3  # sums of n terms differ by sqrt(n)·eps: 1e-4 for a million, and ten such in a row


def same_step(
    variables: Sequence[tf.Variable],
    before: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
    got: Sequence[np.ndarray],
    slots: Container[int] = (),
) -> str:
    """Compares what two programs made of every variable in one training step.

    Integers (seeds, counts) must be equal. A floating-point variable may differ by `STEP_TOLERANCE` of its
    change, and by two roundings of its value. Some gradients are zero but for rounding (a bias before a
    normalization, the key bias of attention): what rounding makes of them may differ, up to a thousandth of
    the largest mean change that a variable of its kind has. Adam scales such noise up to a full step; so
    where the optimizer has slots, which see the gradient before that, weights are held against the change
    of all weights together, at a tenth of it.

    Args:
        variables: Everything that a step changes.
        before: Their values before the step.
        expected: Their values after Keras's way.
        got: Their values after the other way.
        slots: `id` of those that are the optimizer's.

    Returns:
        An empty string, or a sentence that says what differs.
    """
    kinds = [_kind(v, a, slots) for v, a in zip(variables, before, strict=True)]
    moved = [
        0.0 if k == "exact" else _distance(a, b) for k, a, b in zip(kinds, before, expected, strict=True)
    ]
    whole = float(np.linalg.norm(np.array([m for m, k in zip(moved, kinds, strict=True) if k == "weight"])))
    typical = {"weight": 0.0, "slot": 0.0, "other": 0.0}
    for i, kind in enumerate(kinds):
        if kind in ("weight", "slot"):
            typical[kind] = max(typical[kind], moved[i] / np.sqrt(before[i].size))
    for i, (variable, kind) in enumerate(zip(variables, kinds, strict=True)):
        if kind == "exact":
            agrees = np.array_equal(expected[i], got[i])
        else:
            noise = STEP_TOLERANCE * typical[kind] * np.sqrt(before[i].size)
            if kind == "weight" and "slot" in kinds:
                noise = 0.1 * whole
            stored = 2 * np.finfo(np.float32).eps * np.linalg.norm(np.float64(expected[i]))
            agrees = bool(_distance(expected[i], got[i]) <= STEP_TOLERANCE * moved[i] + noise + stored)
        if not agrees:
            return f"its {variable.name} differed from TensorFlow's after one step by more than rounding"
    return ""


def _kind(variable: tf.Variable, value: np.ndarray, slots: Container[int]) -> str:
    if not (np.issubdtype(value.dtype, np.floating) or value.dtype.name == "bfloat16"):
        return "exact"
    if variable.trainable:
        return "weight"
    return "slot" if id(variable) in slots and value.ndim > 0 else "other"


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(np.float64(b) - np.float64(a)))
