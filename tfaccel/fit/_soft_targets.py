"""How far a model's answers are from a teacher's: Keras losses of both, in the place of those of labels."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from tfaccel.errors import refuse

CATEGORICAL = (
    keras.losses.categorical_crossentropy,
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.categorical_focal_crossentropy,
)
BINARY = (keras.losses.binary_crossentropy, keras.losses.binary_focal_crossentropy)
OF_NUMBERS = (
    keras.losses.mean_squared_error,
    keras.losses.mean_absolute_error,
    keras.losses.mean_absolute_percentage_error,
    keras.losses.mean_squared_logarithmic_error,
    keras.losses.huber,
    keras.losses.log_cosh,
    keras.losses.cosine_similarity,
    keras.losses.kl_divergence,
    keras.losses.poisson,
)
LEAST_PROBABILITY = 1e-7  # as in Keras's cross-entropies


def categorical_divergence(teacher: Any, model: Any, temperature: float, axis: int = -1) -> Any:
    """T² · KL between the softmaxes of logits / T: from (…, classes) to (…)."""
    theirs, ours = (ops.log_softmax(logits / temperature, axis) for logits in (teacher, model))
    return temperature**2 * ops.sum(ops.exp(theirs) * (theirs - ours), axis)


def binary_divergence(teacher: Any, model: Any, temperature: float, axis: int = -1) -> Any:
    """T² · KL between yes and no of each unit, the mean over the units: from (…, units) to (…)."""
    theirs, ours = (logits / temperature for logits in (teacher, model))
    share = ops.sigmoid(theirs)
    yes = share * (ops.log_sigmoid(theirs) - ops.log_sigmoid(ours))
    no = (1 - share) * (ops.log_sigmoid(-theirs) - ops.log_sigmoid(-ours))
    return temperature**2 * ops.mean(yes + no, axis)


class SoftTargets(keras.losses.Loss):
    """A divergence in the form that a Keras loss has: of a teacher's outputs and a model's.

    Args:
        function: The cross-entropy of the labels.
        settings: Of it: whether it takes logits, and its axis.
        reduction: As it has it.
        temperature: T.
    """

    def __init__(self, function: Any, settings: Mapping[str, Any], reduction: str | None, temperature: float):
        super().__init__(name="soft_targets", reduction=reduction)
        self._binary = function in BINARY
        self._from_logits = settings.get("from_logits", False)
        self._axis = settings.get("axis", -1)
        self._temperature = temperature

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value for each sample, or each place of a sample."""
        divergence = binary_divergence if self._binary else categorical_divergence
        return divergence(self._logits(y_true), self._logits(y_pred), self._temperature, self._axis)

    def _logits(self, outputs: Any) -> Any:
        if self._from_logits:
            return outputs
        outputs = ops.clip(outputs, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
        return ops.log(outputs) - (ops.log(1 - outputs) if self._binary else 0.0)


class Whole(keras.losses.Loss):
    """The prediction itself: what is one number already, shared by replicas as other losses are."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """The prediction."""
        return y_pred


class _Function(keras.losses.Loss):
    def __init__(self, function: Any):
        super().__init__(name=getattr(function, "__name__", None))
        self._function = function

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self._function(y_true, y_pred)


def of_answers(of_labels: keras.losses.Loss, temperature: float) -> keras.losses.Loss:
    """The loss that takes a teacher's answers where `of_labels` takes labels: itself, if they can be labels.

    Raises:
        ValueError: That can't be told of a loss of the user's own.
    """
    function: Any = getattr(of_labels, "fn", None)
    settings = vars(of_labels)
    while isinstance(function, functools.partial):
        function, settings = function.func, {**settings, **function.keywords}
    if function in CATEGORICAL + BINARY:
        return SoftTargets(function, settings, of_labels.reduction, temperature)
    if function in OF_NUMBERS:
        return of_labels
    raise ValueError(
        f"The loss {of_labels.name!r} is made for labels, and may mean something else of a teacher's "
        "answers. Allowed: Keras's cross-entropies and losses of numbers. Pass Distill(teacher, loss=...), "
        "of the teacher's outputs and the model's."
    )


def as_loss(given: Any) -> keras.losses.Loss | None:
    """A loss by its name, as a function, or as an object; None stays None.

    Raises:
        ValueError: Keras doesn't know it.
    """
    if given is None or isinstance(given, keras.losses.Loss):
        return given
    try:
        found = keras.losses.get(given)
    except ValueError as error:
        allowed = "a Keras loss, by name, as a function or as an object, or None"
        raise refuse("loss", given, allowed, 'Such as "mse".') from error
    return found if isinstance(found, keras.losses.Loss) else _Function(found)
