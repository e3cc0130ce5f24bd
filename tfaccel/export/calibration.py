"""Calibration that can't go wrong in silence: are these samples such as the model was trained on?

Ranges measured on other data cut off what real data would bring, or waste their steps on what it never does;
the file is worse, and nothing says why. The figures of a model's own BatchNormalization layers tell what it
saw when it was trained.
"""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.export.operations import calls_replaced
from tfaccel.export.samples import Samples
from tfaccel.export.serving import ServingFunction
from tfaccel.keras_fixes.inner_layers import inner_layers

FEW = 32  # samples; extremes of fewer move with every sample that joins
LOOK_AT = 64  # samples that are run through the model
# Moving statistics follow the data within a factor of two or so; bytes for fractions are off by 255.
FARTHEST = 4.0
SCALING_LAYERS = (keras.layers.Rescaling, keras.layers.Normalization, keras.layers.BatchNormalization)


def check_values(samples: Samples, argument: str) -> None:
    """Refuses samples that nothing can be measured on.

    Raises:
        ValueError: Values that are not finite.
    """
    for array in samples.inputs:
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise ValueError(
                f"{argument} holds values that are not finite (NaN or infinity). Allowed: finite numbers. "
                "Find them with np.isfinite, and clean the data as for training."
            )


def check_for_ranges(serving: ServingFunction, samples: Samples, evaluated: Samples | None) -> None:
    """Refuses samples that the model's ranges must not be measured on, and warns of doubtful ones.

    Args:
        serving: The model.
        samples: For calibration.
        evaluated: What the file is scored on, where that is known.

    Raises:
        ValueError: They are all equal, or differ from what the model was trained or is scored on.
    """
    if len(samples) > 1 and all((array == array[0]).all() for array in samples.inputs):
        raise ValueError(
            f"calibration holds {len(samples)} equal samples. Allowed: samples that differ as real ones do: "
            "ranges are measured on them. Pass a part of the training data."
        )
    if evaluated is not None:
        _compare_spans(serving, samples, evaluated)
    _compare_with_training(serving, samples)
    for doubt in _doubts(serving, samples):
        warnings.warn(doubt, UserWarning, stacklevel=4)


def _compare_spans(serving: ServingFunction, samples: Samples, evaluated: Samples) -> None:
    for spec, ours, theirs in zip(serving.specs, samples.inputs, evaluated.inputs, strict=True):
        sizes = [float(np.abs(array).mean()) for array in (ours, theirs)]  # extremes grow with the samples
        if min(sizes) > 0 and max(sizes) / min(sizes) > 2 * FARTHEST:
            raise ValueError(
                f"calibration's {spec.name!r} is {sizes[0]:.4g} in the mean, that of the data it is scored "
                f"on {sizes[1]:.4g}. Allowed: one scale for both. Preprocess both as the training data was."
            )


def _compare_with_training(serving: ServingFunction, samples: Samples) -> None:
    seen = _seen_by_first_norm(serving, samples)
    if seen is None:
        return
    layer, values = seen
    axes = tuple(axis for axis in range(values.ndim) if axis != layer.axis % values.ndim)
    wider, off = _distance(layer, values.mean(axes), values.var(axes), _share_of_start(serving.model))
    if 1 / FARTHEST < wider < FARTHEST and off < FARTHEST:
        return
    low, high = min(a.min() for a in samples.inputs), max(a.max() for a in samples.inputs)
    raise ValueError(
        f"calibration holds other values than the model was trained on: at {layer.name!r} they vary "
        f"{wider:.3g} times as much as its moving statistics say, and lie {off:.3g} standard deviations "
        f"off. Allowed: samples preprocessed as for training. These span {low:.4g} to {high:.4g}: divide by "
        "255, or leave that out, whichever training did; shuffle the samples if they are sorted."
    )


def _share_of_start(model: keras.Model) -> float:
    """How much of the moving variances may still be the 1 that they begin with, at most.

    They all keep the same share of it, and no channel's can be more than its whole moving variance.
    """
    norms = [each for each in inner_layers(model) if isinstance(each, keras.layers.BatchNormalization)]
    smallest = [float(keras.ops.convert_to_numpy(each.moving_variance).min()) for each in norms if each.built]
    return min([0.99, *smallest])


def _distance(
    layer: keras.layers.BatchNormalization, mean: np.ndarray, variance: np.ndarray, share: float
) -> tuple[float, float]:
    """How many times as wide as in training, and how many widths off; medians over the channels."""
    moving_mean, moving = (keras.ops.convert_to_numpy(v) for v in (layer.moving_mean, layer.moving_variance))
    # What training's own figures can have been: those kept, or those less what the start left in them.
    without = np.maximum(moving - share, 0) / (1 - share)
    low, high = np.minimum(moving, without) + layer.epsilon, np.maximum(moving, without) + layer.epsilon
    variance = variance + layer.epsilon
    ratio = np.where(variance > high, variance / high, np.where(variance < low, variance / low, 1.0))
    ends = np.sort([moving_mean, moving_mean / (1 - share)], axis=0)
    beyond = np.maximum(np.maximum(ends[0] - mean, mean - ends[1]), 0)
    return float(np.sqrt(np.median(ratio))), float(np.median(beyond / np.sqrt(high)))


def _seen_by_first_norm(
    serving: ServingFunction, samples: Samples
) -> tuple[keras.layers.BatchNormalization, np.ndarray] | None:
    """The first BatchNormalization that was trained, and what comes to it from these samples."""
    norms = [
        each
        for each in inner_layers(serving.model)
        if isinstance(each, keras.layers.BatchNormalization) and _was_trained(each)
    ]
    seen: list[tuple[Any, np.ndarray]] = []

    def noting(layer: keras.layers.Layer, call: Any) -> Any:
        def call_noted(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not seen:
                seen.append((layer, tf.cast(inputs, tf.float32).numpy()))
            return call(inputs, *args, **kwargs)

        return call_noted

    if norms and not serving.states:
        with calls_replaced(norms, noting):
            rows = samples.spread(serving.batch_size or LOOK_AT).inputs
            serving.call(*map(tf.constant, rows))
    return seen[0] if seen else None


def _was_trained(layer: keras.layers.BatchNormalization) -> bool:
    return bool(layer.built and (keras.ops.convert_to_numpy(layer.moving_variance) != 1).any())


def _doubts(serving: ServingFunction, samples: Samples) -> list[str]:
    doubts = []
    if len(samples) < FEW:
        doubts.append(
            f"calibration holds {len(samples)} samples. The ranges of int8 are their extremes: some hundred "
            "samples are usual."
        )
    labels = samples.labels
    if labels is not None and labels.ndim == 1 and len(labels) >= FEW and (labels == labels[0]).all():
        doubts.append(
            f"calibration's {len(labels)} samples all have the label {labels[0]}: the ranges would be those "
            "of one class. Shuffle the dataset."
        )
    images = [a for a in samples.inputs if a.ndim == 4 and a.dtype == np.float32 and min(a.shape[1:3]) >= 8]
    scaled = any(isinstance(each, SCALING_LAYERS) for each in inner_layers(serving.model))
    for array in images:
        if not scaled and array.min() >= 0 and 2 < array.max() <= 255 and (array == np.round(array)).all():
            doubts.append(
                "calibration looks like bytes (whole numbers, 0..255), and the model has no layer that "
                "scales them. Divide by 255 if training did."
            )
        if _is_noise(array):
            doubts.append(
                "calibration looks like noise: neighbouring pixels have nothing to do with one another. "
                "Ranges measured on noise do not fit real images."
            )
    return doubts


def _is_noise(images: np.ndarray) -> bool:
    """Whether neighbours are uncorrelated; those of natural images correlate above 0.5."""
    centred = images - images.mean((1, 2), keepdims=True)
    power = float((centred**2).mean())
    products = [
        float((centred[:, 1:] * centred[:, :-1]).mean()),
        float((centred[:, :, 1:] * centred[:, :, :-1]).mean()),
    ]
    return power > 0 and max(abs(product) for product in products) / power < 0.05
