"""`Plateau`: a learning rate that falls where a figure has stopped getting better, on top of any schedule.

When to use: `LearningRate(0.1, schedules.constant(), plateau=Plateau())`, where the length of a run is not
known. Where it is, a schedule that falls to its end is better than waiting for a plateau.

Why not `keras.callbacks.ReduceLROnPlateau`: it refuses to share the learning rate with a schedule, and
forgets how long it has waited, and for what, where `BackupAndRestore` resumes a run.

Reference: the rule, and the names of its arguments, are those of `keras.callbacks.ReduceLROnPlateau`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import keras
import numpy as np

from tfaccel.errors import is_number, is_whole, refuse
from tfaccel.fit._state import beside
from tfaccel.keras_fixes.callback_siblings import siblings
from tfaccel.keras_fixes.input_clock import validation_comes
from tfaccel.keras_fixes.metric_direction import rises

STATE_FILE = "tfaccel_plateau.json"


@dataclasses.dataclass(frozen=True)
class Plateau:
    """When, and by how much, the learning rate falls because a figure stopped getting better.

    Args:
        monitor: The figure in the logs. Default `"val_loss"`.
        factor: What the learning rate is multiplied with each time, 0 < factor < 1. Default 0.1.
        patience: Epochs without an improvement that are waited for. Default 10.
        mode: `"min"`, `"max"`, or `"auto"` to ask the metric. Default `"auto"`.
        min_delta: What counts as an improvement, ≥ 0. Default 1e-4.
        cooldown: Epochs after a fall in which nothing is counted. Default 0.
        least: Of the schedule's learning rate: all falls together leave at least this share, 0..1. Default 0.

    Raises:
        ValueError: An argument out of range.

    Example:
        >>> from tfaccel import schedules
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> model.compile(keras.optimizers.SGD(0.01), "mse")
        >>> rule = tfaccel.Plateau("loss", factor=0.5, patience=1, min_delta=1e3)
        >>> rate = tfaccel.LearningRate(0.1, schedules.constant(), plateau=rule)
        >>> history = model.fit(np.ones((8, 4)), np.ones((8, 2)), epochs=4, verbose=0, callbacks=[rate])
        >>> [round(value, 4) for value in history.history["learning_rate"]]
        [0.1, 0.1, 0.05, 0.025]
    """

    monitor: str = "val_loss"
    factor: float = 0.1
    patience: int = 10
    mode: str = "auto"
    min_delta: float = 1e-4
    cooldown: int = 0
    least: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.monitor, str):
            raise refuse("monitor", self.monitor, "the name of a figure in the logs", 'Such as "val_loss".')
        if not (is_number(self.factor, 0, 1) and self.factor > 0):
            raise refuse("factor", self.factor, "a number above 0 and below 1", "0.1 is usual.")
        if not is_whole(self.patience, 1):
            raise refuse("patience", self.patience, "an integer ≥ 1", "10 is usual.")
        if self.mode not in ("auto", "min", "max"):
            raise refuse("mode", self.mode, '"auto", "min" or "max"', '"min" is for losses.')
        if not is_number(self.min_delta, 0):
            raise refuse("min_delta", self.min_delta, "a number ≥ 0", "1e-4 is usual.")
        if not is_whole(self.cooldown, 0):
            raise refuse("cooldown", self.cooldown, "an integer ≥ 0", "0 counts at once.")
        if not (is_number(self.least, 0) and self.least <= 1):
            raise refuse(
                "least", self.least, "a share of the schedule's learning rate, 0..1", "0 is no limit."
            )

    def set_model(self, model: keras.Model) -> None:
        """Says where it belongs, as `fit` asks this of what is listed among callbacks.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "Plateau is a rule for a learning rate, not a callback. Allowed: LearningRate(plateau=...). Pass "
            f"callbacks=[tfaccel.LearningRate(1e-3, tfaccel.schedules.constant(), plateau={self!r})]."
        )


class PlateauState:
    """What one run has seen so far.

    Args:
        rule: When the learning rate falls.
        callback: Whose `fit` it is; make this in a hook of it.
        epoch: The first epoch of the run, counted from 0: not 0 where a run is resumed.
    """

    def __init__(self, rule: Plateau, callback: keras.callbacks.Callback, epoch: int):
        self._rule = rule
        self._model = callback.model
        backups = [each for each in siblings(callback) if isinstance(each, keras.callbacks.BackupAndRestore)]
        self._path = pathlib.Path(backups[0].backup_dir, STATE_FILE) if backups else None
        self._is_kept = bool(backups) and not backups[0].delete_checkpoint
        self._states = {str(epoch - 1): self._restored(epoch)}
        self._now = dict(self._states[str(epoch - 1)])
        with self._model.distribute_strategy.scope():
            self.factor = beside(np.full([], self._now["factor"], "float32"))

    def _restored(self, epoch: int) -> dict[str, Any]:
        """That of the epoch before the first one of a resumed run."""
        try:
            return json.loads(self._path.read_text())[str(epoch - 1)]  # type: ignore[union-attr]
        except (OSError, ValueError, KeyError, AttributeError):
            return {"factor": 1.0, "best": None, "waited": 0, "cooling": 0}

    def begin_epoch(self) -> None:
        """Lets the next epoch train with what the last one came to."""
        self.factor.assign(self._now["factor"])

    def see(self, epoch: int, logs: dict[str, Any]) -> None:
        """Takes an epoch's figure into account.

        Args:
            epoch: Counted from 0.
            logs: Of the epoch, with `monitor` in it.

        Raises:
            ValueError: It isn't there, or its direction can't be told.
        """
        rule, now = self._rule, self._now
        if rule.monitor not in logs:
            validated = any(name.startswith("val_") for name in logs)
            if not rule.monitor.startswith("val_") or validated or not validation_comes():
                remedy = "Validation figures need validation_data."
                raise refuse("monitor", rule.monitor, f"one of {sorted(logs)}", remedy)
            self._keep(epoch)  # with validation_freq it comes behind another epoch
            return
        value = float(logs[rule.monitor])
        up = rises(self._model, rule.monitor) if rule.mode == "auto" else rule.mode == "max"
        best = now["best"]
        gain = math.inf if best is None else value - best if up else best - value
        better = not math.isnan(value) and gain > rule.min_delta
        now["cooling"] = max(now["cooling"] - 1, 0)
        now["waited"] = 0 if now["cooling"] or better else now["waited"] + 1
        if better:
            now["best"] = value
        if now["waited"] >= rule.patience:
            now["factor"] = max(now["factor"] * rule.factor, rule.least)
            now["waited"], now["cooling"] = 0, rule.cooldown
        self._keep(epoch)

    def _keep(self, epoch: int) -> None:
        """Writes this epoch's state and the one before: the backup may be of either."""
        if self._path is None or not self._model.distribute_strategy.extended.should_checkpoint:
            return
        before = str(epoch - 1)
        kept = {before: self._states[before]} if before in self._states else {}
        self._states = {**kept, str(epoch): dict(self._now)}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside_it = self._path.with_name(f"{STATE_FILE}.{os.getpid()}")
        beside_it.write_text(json.dumps(self._states))
        beside_it.replace(self._path)

    def forget(self) -> None:
        """The run is over: the next one begins anew, unless the backup stays."""
        if self._path is not None and not self._is_kept:
            self._path.unlink(missing_ok=True)
