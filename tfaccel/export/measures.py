"""What a score is where the user gives labels and no function: accuracy, or variance explained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from tfaccel.errors import refuse

ROUNDING = 1e-3  # of rows that should sum to one


@dataclasses.dataclass(frozen=True)
class Measure:
    """How outputs are held against labels; higher is better.

    Args:
        name: `"accuracy"` or `"R²"`.
        of: From outputs to the score.
    """

    name: str
    of: Callable[[np.ndarray], float]


def measure_for(labels: np.ndarray, outputs: list[np.ndarray]) -> Measure:
    """What applies to these labels and a model's outputs.

    - A score for each class, in the last axis, and a class index or a one-hot row for each sample or place:
      the share of those whose largest score is the label.
    - Labels of 0 and 1, as many as outputs: the share that lies on the right side, of 0.5 for
      probabilities, of 0 for logits; they are logits where the model gives some outside of 0..1.
    - A model that gives whole numbers itself: the share that is equal to the labels.
    - Other numbers, as many as outputs: the coefficient of determination, 1 − Σ (y − p)² / Σ (y − mean)².

    Raises:
        ValueError: Several outputs, or labels that don't go with them.
    """
    if len(outputs) != 1:
        raise ValueError(
            f"{len(outputs)} outputs can't be scored by one figure. Allowed: a model with one output. Pass "
            "evaluate=function, which is given predict and returns a score."
        )
    scores = outputs[0]
    if labels.dtype.kind not in "biuf":
        allowed = "numbers: the index of a class, not its name"
        raise refuse("evaluate", labels.flat[0], allowed, "Or pass evaluate=function.")
    classes = scores.shape[-1] if scores.ndim > 1 else 1
    places = _without_last(labels) if labels.ndim == scores.ndim else labels
    if classes > 1 and places.shape == scores.shape[:-1] and _are_classes(places, classes):
        return Measure("accuracy", lambda given: float(np.mean(given.argmax(-1) == places)))
    if classes > 1 and labels.shape == scores.shape and _are_one_hot(labels):
        return Measure("accuracy", lambda given: float(np.mean(given.argmax(-1) == labels.argmax(-1))))
    if labels.size == scores.size and _without_last(labels).shape == _without_last(scores).shape:
        numbers = labels.reshape(scores.shape).astype("float64")
        if np.isin(numbers, (0, 1)).all():
            edge = 0.5 if scores.min() >= 0 and scores.max() <= 1 else 0.0
            return Measure("accuracy", lambda given: float(np.mean((given > edge) == numbers)))
        if scores.dtype.kind in "biu":  # the model gives classes, not scores of them
            return Measure("accuracy", lambda given: float(np.mean(given == numbers)))
        if np.isfinite(numbers).all():
            return Measure("R²", lambda given: determination(numbers, given))
    raise ValueError(
        f"Labels of shape {labels.shape}, {labels.min():g} to {labels.max():g}, don't go with outputs of "
        f"shape {scores.shape}. Allowed: a class index (0 to {classes - 1}) or a one-hot row where there is "
        "a score per class; 0 or 1, or another number, for each output. Pass evaluate=function for another."
    )


def determination(labels: np.ndarray, outputs: np.ndarray) -> float:
    """The coefficient of determination; 1 is perfect, 0 as good as the labels' mean.

    Raises:
        ValueError: The labels don't vary.
    """
    spread = np.sum((labels - labels.mean(0)) ** 2)
    if not spread:
        allowed = "labels that vary"
        raise refuse("evaluate", float(labels.flat[0]), allowed, "Pass more samples, or evaluate=function.")
    return float(1 - np.sum((labels - outputs) ** 2) / spread)


def _without_last(array: np.ndarray) -> np.ndarray:
    return array[..., 0] if array.ndim > 1 and array.shape[-1] == 1 else array


def _are_classes(labels: np.ndarray, classes: int) -> bool:
    whole = labels.dtype.kind in "biuf" and (labels == np.round(labels)).all()
    return bool(whole and labels.min() >= 0 and labels.max() < classes)


def _are_one_hot(labels: np.ndarray) -> bool:
    return bool((np.abs(labels.sum(-1) - 1) < ROUNDING).all() and labels.min() >= 0)
