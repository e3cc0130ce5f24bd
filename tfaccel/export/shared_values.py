"""Weights that take few values, as clustering leaves them, keep few values as integers.

A file has a scale for each output channel, as wide as the channel's largest weight. One value that a whole
layer shares then becomes another integer in each channel, sixteen values become sixty, and a zip gains little
by them. Here all channels of such a layer get the scale of its largest value, each times what the converter
multiplied the channel with where it folded a normalization into it.

It is done where nothing is lost by it: the values are integers of that scale already, as `QuantizeAware`
leaves them; or the channels do share a few values, no two of which become one, and none becomes zero.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import keras
import numpy as np

from tfaccel.export.layers import Layer
from tfaccel.export.quantization import Ranges

BITS = 8  # with less, a scale for each channel is worth more than a small file
TOP = 2 ** (BITS - 1) - 1
MOST_VALUES = 64  # of a layer that are looked at as shared
SHARED = 0.75  # of the channels' values, all counted, there are at most so many different ones
WORST_ERROR = 0.05  # of a channel's largest weight
ON_GRID = 1e-3  # of a step
LOOKED_AT = 4095  # weights that are looked at first: most layers have many values among these
FOLDED_EXACTLY = 1e-4  # of a channel's largest weight: a product, and rounding
UNFOLDED = 1e-5  # what a factor of 1 may be off by rounding


def shared_kernels(model: keras.Model) -> list[np.ndarray]:
    """Kernels whose channels can have one scale, as rows: one for each output channel, as a file has them."""
    found = []
    for variable in model.weights:
        if len(variable.shape) < 2 or not keras.backend.is_float_dtype(variable.dtype):
            continue
        kernel = np.asarray(keras.ops.convert_to_numpy(variable), np.float32)
        rows = np.moveaxis(kernel, -1, 0).reshape(kernel.shape[-1], -1)
        if can_share_a_scale(rows):
            found.append(rows)
    return found


def can_share_a_scale(rows: np.ndarray) -> bool:
    """Whether all channels of a kernel can have the scale of its largest value.

    Args:
        rows: Shape `(channels, weights)`.
    """
    largest = np.abs(rows).max()
    if not largest > 0 or not np.isfinite(largest):
        return False
    some = rows.reshape(-1)[:: max(rows.size // LOOKED_AT, 1) | 1]
    if not _on_grid(some / largest) and len(np.unique(some)) > MOST_VALUES:
        return False
    return _on_grid(rows / largest) or _share_few_values(rows)


def _on_grid(values: np.ndarray) -> bool:
    steps = values * TOP
    return bool(np.abs(steps - np.round(steps)).max() < ON_GRID)


def _share_few_values(rows: np.ndarray) -> bool:
    values = np.unique(rows)
    if len(values) > min(MOST_VALUES, rows.size / 4):
        return False
    if len(values) > SHARED * sum(len(np.unique(row)) for row in rows):
        return False
    step = np.abs(values).max() / TOP
    whole = np.round(values / step)
    if len(np.unique(whole)) < len(values) or not whole[values != 0].all():
        return False
    error = np.abs(np.round(rows / step) * step - rows).max(1)
    return bool((error <= WORST_ERROR * np.abs(rows).max(1)).all())


def shared_ranges(
    kernels: Collection[np.ndarray], layers: Collection[Layer], bits: Mapping[str, int]
) -> Ranges:
    """The ranges of weights whose channels have one scale, by their tensors' names.

    Args:
        kernels: From `shared_kernels`.
        layers: Of the float file.
        bits: Of the layers that are to be rounded, by the tensor that they make.
    """
    ranges: Ranges = {}
    # A weight that another layer reads with other bits has those of the first one: see `Rounder`.
    others = {layer.name for layer in layers if bits.get(layer.output) != BITS}
    for layer in layers:
        weights = layer.weights.reshape(layer.shape[0], -1)
        for kernel in kernels if layer.name not in others else ():
            factors = _channel_factors(weights, kernel)
            if factors is not None:
                edge = np.abs(kernel).max() * np.abs(factors)
                edge = edge.reshape(-1, *[1] * (len(layer.shape) - 1)).astype(np.float32)
                ranges[layer.name] = {"min": -edge, "max": edge}
                break
    return ranges


def _channel_factors(weights: np.ndarray, kernel: np.ndarray) -> np.ndarray | None:
    """What each row of a kernel was multiplied with to become that of the file; None where it wasn't.

    Rows that are all zero, which have no scale of their own, have 1.
    """
    if weights.shape != kernel.shape:
        return None
    factors = (weights * kernel).sum(1) / np.maximum((kernel * kernel).sum(1), 1e-30)
    apart = np.abs(weights - factors[:, None] * kernel).max(1)
    if not (apart <= FOLDED_EXACTLY * np.abs(weights).max(1)).all():
        return None
    return np.where((factors == 0) | (np.abs(factors - 1) < UNFOLDED), 1.0, factors)
