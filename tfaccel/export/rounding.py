"""Weights rounded so that what their layer computes on real samples changes least.

Rounding to nearest treats each weight alone. Here the error of one is made up for by those that are not
rounded yet, weighted by how the layer's inputs go together on the calibration samples (GPTQ).

Cost: for a layer with K weights a unit one matrix of K × K, and K steps: seconds for a small net. Above 2,048
the inputs are taken in parts of 1,024, and what one part gets wrong is not made up for by another.

Reference: Frantar et al., 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", https://arxiv.org/abs/2210.17323, algorithm 1.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfaccel.export.interpreter import open_with_all_tensors
from tfaccel.export.layers import Layer, layers_of
from tfaccel.export.quantization import Ranges
from tfaccel.export.samples import Samples

DAMPING = 0.01  # of the mean diagonal: keeps the inverse tame where inputs go together
ROWS = 16_384  # of inputs that are looked at, over all samples
BATCH = 16
COLUMNS = 128  # that are rounded before the others are made up
CLIPS = np.linspace(1.0, 0.4, 25)  # of the largest weight: ranges that are tried
LEAST_SHARE = 0.25  # of the mean importance: an input that these samples lack may come all the same
WHOLE, PART = 2048, 1024  # inputs that are taken together


def best_scales(weights: np.ndarray, bits: int, importance: np.ndarray | None = None) -> np.ndarray:
    """The scale of each output channel with the least squared error of rounding.

    Args:
        weights: Of shape `(channels, K)`.
        bits: Of the integers, symmetric about zero.
        importance: Of each of the K weights, as a factor of its squared error; default all alike.

    Returns:
        Shape `(channels, 1)`, never 0.
    """
    top = 2 ** (bits - 1) - 1
    largest = np.maximum(np.abs(weights).max(1, keepdims=True), 1e-12) / top
    importance = np.ones(weights.shape[1]) if importance is None else importance
    importance = np.maximum(importance, LEAST_SHARE * importance.mean())
    best, least = largest, np.full_like(largest, np.inf)
    for clip in CLIPS:
        scale = largest * clip
        error = (np.clip(np.round(weights / scale), -top, top) * scale - weights) ** 2 @ importance
        better = error[:, None] < least
        best, least = np.where(better, scale, best), np.where(better, error[:, None], least)
    return best


def round_with_inputs(weights: np.ndarray, scales: np.ndarray, bits: int, products: np.ndarray) -> np.ndarray:
    """Rounded weights, as floats on the grid of their channel; zeros, which pruning may have made, stay.

    Args:
        weights: Of shape `(channels, K)`.
        scales: Of shape `(channels, 1)`.
        bits: Of the integers.
        products: Of the inputs with one another, summed over samples, shape `(K, K)`.
    """
    top = 2 ** (bits - 1) - 1
    order = np.argsort(-np.diag(products), kind="stable")  # what matters most is rounded first
    left = weights[:, order].astype(np.float64)
    factor = _inverse_factor(products[np.ix_(order, order)])
    rounded, gone = np.empty_like(left), left == 0.0
    for start in range(0, left.shape[1], COLUMNS):
        stop = min(start + COLUMNS, left.shape[1])
        errors = np.empty((len(left), stop - start))
        for k in range(start, stop):
            rounded[:, k] = np.clip(np.round(left[:, k] / scales[:, 0]), -top, top) * scales[:, 0]
            rounded[gone[:, k], k] = 0.0
            errors[:, k - start] = (left[:, k] - rounded[:, k]) / factor[k, k]
            left[:, k + 1 : stop] -= np.outer(errors[:, k - start], factor[k, k + 1 : stop])
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    result = np.empty_like(rounded)
    result[:, order] = rounded
    return result.astype(np.float32)


def _inverse_factor(products: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of the inverse of the damped products."""
    hessian = products.astype(np.float64)
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1.0
    hessian[np.diag_indices_from(hessian)] += DAMPING * np.mean(np.diag(hessian))
    return np.linalg.cholesky(np.linalg.inv(hessian)).T


class Rounder:
    """Rounds layers of a float file; what was measured and rounded once is kept for the next mix of recipes.

    Args:
        content: The float file.
        names: Its inputs, in the order of the samples' arrays.
        samples: Real ones.
        batch_size: Where the file has a fixed one.
    """

    def __init__(self, content: bytes, names: list[str], samples: Samples, batch_size: int | None):
        self._content = content
        self._names = names
        self._samples = samples
        self._batch_size = batch_size
        self._products: dict[str, list[np.ndarray]] = {}
        self._rounded: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    def apply(self, bits: dict[str, int], given: Ranges) -> tuple[bytes, Ranges]:
        """The file with weights on grids, and the ranges of these grids.

        Args:
            bits: Of the operations that are to be rounded (convolutions and dense layers are), by the tensor
                that they make.
            given: Ranges of weights that have them already, and stay as they are.
        """
        from ai_edge_litert.tools import flatbuffer_utils

        file = flatbuffer_utils.read_model_from_bytearray(bytearray(self._content))
        layers = [each for each in layers_of(file) if each.output in bits and each.name not in given]
        self._measure([layer for layer in layers if layer.name not in self._products])
        ranges: Ranges = dict(given)
        done: dict[int, int] = {}
        for layer in layers:
            # Weights that several layers share are rounded for the first one.
            if (
                done.setdefault(layer.buffer, bits[layer.output]) != bits[layer.output]
                or layer.name in ranges
            ):
                continue
            values, edge = self._round(layer, bits[layer.output])
            file.buffers[layer.buffer].data = np.frombuffer(values.astype("<f4").tobytes(), np.uint8)
            ranges[layer.name] = {"min": -edge, "max": edge}
        return bytes(flatbuffer_utils.convert_object_to_bytearray(file)), ranges

    def _round(self, layer: Layer, bits: int) -> tuple[np.ndarray, np.ndarray]:
        if (layer.name, bits) not in self._rounded:
            weights = layer.weights.reshape(layer.shape[0], -1)
            products = self._products[layer.name]
            scales = best_scales(weights, bits, np.concatenate([np.diag(part) for part in products]))
            edge = scales * (2 ** (bits - 1) - 1)
            rounded = [
                round_with_inputs(weights[:, span], scales, bits, part)
                for span, part in zip(_spans(weights.shape[1]), products, strict=True)
            ]
            self._rounded[layer.name, bits] = (
                np.concatenate(rounded, axis=1),
                edge.reshape(-1, *[1] * (len(layer.shape) - 1)).astype(np.float32),
            )
        return self._rounded[layer.name, bits]

    def _measure(self, layers: list[Layer]) -> None:
        """Sums the products of each layer's inputs with one another."""
        if not layers:
            return
        interpreter = open_with_all_tensors(self._content)
        runner = interpreter.get_signature_runner()
        indices = {detail["name"]: detail["index"] for detail in interpreter.get_tensor_details()}
        random = np.random.default_rng(0)
        size = self._batch_size or BATCH
        share = max(1, ROWS * size // len(self._samples))
        for batch in self._samples.batches(size):
            runner(**dict(zip(self._names, batch, strict=True)))
            for layer in layers:
                rows = _rows(interpreter.get_tensor(indices[layer.input]), layer)
                if len(rows) > share:
                    rows = rows[random.choice(len(rows), share, replace=False)]
                spans = _spans(rows.shape[1])
                empty = [np.zeros((span.stop - span.start,) * 2) for span in spans]
                known = self._products.setdefault(layer.name, empty)
                for span, part in zip(spans, known, strict=True):
                    part += rows[:, span].T @ rows[:, span]


def _spans(inputs: int) -> list[slice]:
    """The inputs that are taken together."""
    size = inputs if inputs <= WHOLE else PART
    return [slice(start, min(start + size, inputs)) for start in range(0, inputs, size)]


def _rows(inputs: np.ndarray, layer: Layer) -> np.ndarray:
    """The inputs as rows that the weights of a unit are multiplied with."""
    if len(layer.shape) == 2:
        return inputs.reshape(-1, layer.shape[1])
    _, height, width, channels = layer.shape
    options = layer.options
    patches = tf.image.extract_patches(
        inputs[..., :channels],  # of grouped convolutions the first group stands for all
        [1, height, width, 1],
        [1, options.strideH, options.strideW, 1],
        [1, options.dilationHFactor, options.dilationWFactor, 1],
        "SAME" if options.padding == 0 else "VALID",
    )
    return patches.numpy().reshape(-1, height * width * channels)
