"""Weights that take few values, as clustering leaves them, keep few values as integers.

A file has a scale for each output channel, as wide as the channel's largest weight. One value that a whole
layer shares then becomes another integer in each channel, sixteen values become sixty, and a zip gains little
by them. Here all channels of such a layer get the scale of its largest value, each times what the converter
multiplied the channel with where it folded a normalization into it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import keras
import numpy as np

from tfaccel.export.layers import Layer
from tfaccel.export.quantization import Ranges

MOST_VALUES = 64  # of a layer: with more, the integers of eight bits are as good as all used
BITS = 8  # with less, a scale for each channel is worth more than a small file
LOOKED_AT = 4096  # weights that are looked at first: most layers have many values among these
FOLDED_EXACTLY = 1e-4  # of a channel's largest weight: a product, and rounding


def few_values(weights: np.ndarray) -> bool:
    """Whether many weights take at most `MOST_VALUES` values, zero among them or not."""
    flat = weights.reshape(-1)
    if flat.size < 4 * MOST_VALUES or len(np.unique(flat[:: max(flat.size // LOOKED_AT, 1)])) > MOST_VALUES:
        return False
    return len(np.unique(flat)) <= MOST_VALUES


def shared_ranges(model: keras.Model, layers: Collection[Layer], bits: Mapping[str, int]) -> Ranges:
    """The ranges of weights that share values, by their tensors' names.

    Args:
        model: Whose file it is.
        layers: Of the float file.
        bits: Of the layers that are to be rounded, by the tensor that they make.
    """
    kernels = list(_few_valued_kernels(model)) if BITS in bits.values() else []
    ranges: Ranges = {}
    for layer in layers if kernels else ():
        if bits.get(layer.output) != BITS:
            continue
        weights = layer.weights.reshape(layer.shape[0], -1)
        for kernel in kernels:
            factors = _channel_factors(weights, kernel)
            if factors is not None:
                edge = np.abs(kernel).max() * np.where(factors == 0, 1.0, np.abs(factors))
                edge = edge.reshape(-1, *[1] * (len(layer.shape) - 1)).astype(np.float32)
                ranges[layer.name] = {"min": -edge, "max": edge}
                break
    return ranges


def _few_valued_kernels(model: keras.Model) -> Iterator[np.ndarray]:
    """As rows, one for each output channel, in the order in which a file has them."""
    for variable in model.weights:
        if len(variable.shape) < 2 or not keras.backend.is_float_dtype(variable.dtype):
            continue
        kernel = np.asarray(keras.ops.convert_to_numpy(variable), np.float32)
        if few_values(kernel) and kernel.any():
            yield np.moveaxis(kernel, -1, 0).reshape(kernel.shape[-1], -1)


def _channel_factors(weights: np.ndarray, kernel: np.ndarray) -> np.ndarray | None:
    """What each row of a kernel was multiplied with to become that of the file; None where it wasn't."""
    if weights.shape != kernel.shape:
        return None
    factors = (weights * kernel).sum(1) / np.maximum((kernel * kernel).sum(1), 1e-30)
    apart = np.abs(weights - factors[:, None] * kernel).max(1)
    return factors if (apart <= FOLDED_EXACTLY * np.abs(weights).max(1)).all() else None
