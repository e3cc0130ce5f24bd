"""One score for model and file on the same labelled data: what `max_drop` is held against."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tfaccel.export.interpreter import TFLiteRunner
from tfaccel.export.measures import measure_for
from tfaccel.export.samples import Samples, collect_samples
from tfaccel.export.serving import ServingFunction

Predict = Callable[[Samples], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Score:
    """Two scores on the same data, higher is better.

    Args:
        model: The Keras model's.
        file: The file's.
        samples: How many samples they were measured on; None where the user's function did it.
        name: `"accuracy"`, `"R²"`, or `"score"` where the user's function did it.

    Example:
        >>> print(tfaccel.Score(model=0.91, file=0.905, samples=1000, name="accuracy"))
        accuracy 0.9100 (model) → 0.9050 (file) on 1000 samples
    """

    model: float
    file: float
    samples: int | None = None
    name: str = "score"

    @property
    def drop(self) -> float:
        """How much lower the file's score is; negative where it is higher."""
        return self.model - self.file

    def __str__(self) -> str:
        """One line for a person."""
        rows = "" if self.samples is None else f" on {self.samples} samples"
        return f"{self.name} {self.model:.4f} (model) → {self.file:.4f} (file){rows}"


def is_within(drop: float, max_drop: float) -> bool:
    """Whether a score fell by no more than that: 0.838 − 0.833 is 0.005, but not in floats."""
    return drop <= max_drop + 1e-9


class Scorer:
    """Scores model and files with the user's function, or by what `measure_for` finds for labelled data.

    Args:
        serving: The model.
        evaluate: A function of `predict`, labelled data, or None to take `calibration`.
        calibration: Labelled data for that case.

    Raises:
        ValueError: No labels, or labels that don't go with the outputs.
    """

    def __init__(self, serving: ServingFunction, evaluate: Any, calibration: Any):
        self._serving = serving
        self._function: Any = evaluate if is_function(evaluate) else None
        self.samples: Samples | None = None  # what is scored on, where the user's function does not hide it
        if self._function is None:
            data, argument = scoring_data(evaluate, calibration)
            samples = collect_samples(data, serving.specs, None, argument=argument)
            self.samples = samples.whole_batches(serving.batch_size)
            outputs = list(serving.predict(self.samples).values())
            self._measure = measure_for(labels_of(self.samples, argument), outputs)
            self.of_model = self._measure.of(outputs[0])
        else:
            self.of_model = self._score(serving.predict)

    def score(self, runner: TFLiteRunner) -> Score:
        """The file's score beside the model's."""
        names = [spec.name for spec in self._serving.specs]
        of_file = self._score(lambda samples: runner.predict(samples, names))
        if self.samples is None:
            return Score(self.of_model, of_file)
        return Score(self.of_model, of_file, len(self.samples), self._measure.name)

    def _score(self, predict: Predict) -> float:
        if self.samples is None:
            score = self._function(_for_user(predict, self._serving))
            if not isinstance(score, numbers.Real) or not math.isfinite(score):
                raise ValueError(
                    f"evaluate returned {score!r}. Allowed: a finite number, higher is better. It is given "
                    "predict, which takes arrays and gives the outputs; return float(score)."
                )
            return float(score)
        return self._measure.of(next(iter(predict(self.samples).values())))


def is_function(evaluate: Any) -> bool:
    """Whether `evaluate` is the user's own function rather than data."""
    return callable(evaluate) and not isinstance(evaluate, keras.utils.PyDataset)


def scoring_data(evaluate: Any, calibration: Any) -> tuple[Any, str]:
    """The labelled data to score on, and the name of the argument that it came by."""
    return (calibration, "calibration") if evaluate is None else (evaluate, "evaluate")


def labels_of(samples: Samples, argument: str) -> np.ndarray:
    """The samples' labels.

    Raises:
        ValueError: They have none.
    """
    if samples.labels is None and samples.several_labels:
        raise ValueError(
            f"{argument} has labels for several outputs, which one figure can't score. Allowed: a function. "
            "Pass evaluate=function, which is given predict and returns a score."
        )
    if samples.labels is None:
        raise ValueError(
            f"{argument} has no labels to score with. Allowed: (x, y), a dataset of (x, y), or a "
            "function. Pass evaluate=(x_test, y_test)."
        )
    return samples.labels


def _for_user(predict: Predict, serving: ServingFunction) -> Callable:
    """`predict` as the user's function sees it: arrays in, outputs out, in the model's structure."""

    def predict_arrays(x: Any) -> Any:
        samples = collect_samples(x, serving.specs, None, argument="predict's argument")
        if serving.batch_size is not None and len(samples) % serving.batch_size:
            raise ValueError(
                f"predict was given {len(samples)} samples, and the model takes {serving.batch_size} at "
                f"once. Allowed: multiples of {serving.batch_size}. Leave the rest out in evaluate."
            )
        return serving.in_structure(predict(samples))

    return predict_arrays
