"""`ExportTFLite`: the export as the last line of a `fit`."""

from __future__ import annotations

import inspect
import math
import os
from typing import Any

import keras
import numpy as np

from tfaccel.errors import refuse
from tfaccel.export.arguments import check_arguments, check_data, check_path, no_ranges
from tfaccel.export.file import TFLiteFile
from tfaccel.export.recipes import find_recipe
from tfaccel.export.search import AutoRecipe
from tfaccel.export.selection import check_layers
from tfaccel.export.tflite import export_tflite
from tfaccel.keras_fixes.callback_siblings import changer_behind, siblings
from tfaccel.keras_fixes.metric_direction import rises


class ExportTFLite(keras.callbacks.Callback):
    """Exports the trained model when `fit` ends; the result is in `.file`.

    List it last: a callback that changes the weights when training ends, such as
    `EarlyStopping(restore_best_weights=True)`, must have run before. The order is checked when `fit`
    begins. With `monitor` the weights of the best epoch are exported, and the model goes on with its own. The
    arguments are those of `tfaccel.export_tflite`, and are checked at construction. On several workers the
    first one exports.

    Args:
        path: Where the file goes; its folder must exist.
        recipe: As for `export_tflite`; `"auto"` and an `AutoRecipe` too.
        calibration: Real samples; needed for fixed ranges such as `"int8"`, unless `QuantizeAware` is listed
            before.
        evaluate: Labelled data or a function, for `max_drop`; default the labels of `calibration`.
        max_drop: How much the score may fall; more raises `ExportError` when training is over, with
            the trained model unharmed.
        monitor: The epoch's figure to go by, such as `"val_accuracy"`; default None exports the last weights.
            It costs a copy of the weights in memory.
        mode: `"min"`, `"max"`, or `"auto"` (default): accuracies and areas under curves are to rise.
        options: More of `export_tflite`'s arguments, such as `{"layers": {"scores": "float32"}}`.

    Raises:
        ValueError: A bad argument; or, when `fit` begins, a callback in the wrong order; or, after the first
            epoch, nothing of the name `monitor`.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> model.compile("sgd", "mse")
        >>> export = tfaccel.ExportTFLite("trained.tflite", "float16", monitor="loss")
        >>> history = model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0, callbacks=[export])
        >>> export.file.recipe
        'float16'

    Reference:
        `tfaccel.export_tflite`; `keras.callbacks.ModelCheckpoint` for `monitor` and `mode`.
    """

    chief_only = True

    def __init__(
        self,
        path: str | os.PathLike,
        recipe: str | AutoRecipe = "float32",
        *,
        calibration: Any = None,
        evaluate: Any = None,
        max_drop: float | None = None,
        monitor: str | None = None,
        mode: str = "auto",
        options: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.path = check_path(path)
        self.recipe = recipe
        self.calibration = calibration
        self.evaluate = evaluate
        self.max_drop = max_drop
        self.monitor = monitor
        self.mode = mode
        self.options = dict(options or {})
        if mode not in ("auto", "min", "max"):
            raise refuse("mode", mode, "'auto', 'min' or 'max'", "Take 'max' for an accuracy.")
        own = set(inspect.signature(export_tflite).parameters) - {"model", *vars(self)}
        if not set(self.options) <= own:
            raise refuse(
                "options", self.options, f"the keys {', '.join(sorted(own))}", "Look for a typing error."
            )
        names = ("layers", "metadata", "strict", "allow_select_ops")
        own_options = {name: self.options[name] for name in names if name in self.options}
        check_arguments(recipe, calibration, evaluate, max_drop, **own_options)
        self.file: TFLiteFile | None = None
        self._best: float | None = None
        self._best_weights: list[np.ndarray] = []
        self._rises: bool | None = None

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks that no callback behind this one changes the weights at the end."""
        self.file = None
        self._best, self._best_weights, self._rises = None, [], None
        if self.model.built:
            signature = self.options.get("input_signature")
            check_data(self.model, self.calibration, self.evaluate, self.max_drop, signature)
            check_layers(self.options.get("layers"), self.model)
        self._check_ranges()
        others = siblings(self)
        behind = others[others.index(self) + 1 :]
        settling = (each for each in behind if getattr(each, "settles_weights", False))
        other = changer_behind(self) or next(settling, None)
        if other is not None:
            raise ValueError(
                f"ExportTFLite is listed before {type(other).__name__}, which changes the weights "
                "when training ends: another model would be exported than the one you keep. "
                "Allowed: ExportTFLite behind it. List it last."
            )

    def _check_ranges(self) -> None:
        """Without samples a callback before this one has to learn the ranges, and of the weights it takes."""
        if self.calibration is not None or isinstance(self.recipe, AutoRecipe) or self.recipe == "auto":
            return
        recipe = find_recipe(self.recipe)
        if not recipe.needs_calibration:
            return
        if recipe.activation_bits not in [getattr(each, "activation_bits", None) for each in siblings(self)]:
            raise no_ranges(recipe)
        if self.monitor is not None:
            raise refuse(
                "monitor",
                self.monitor,
                f"None with {recipe.name!r} and no calibration: learned ranges are of the last epoch",
                "Pass calibration=x_train too.",
            )

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Keeps the weights of the best epoch; one without the figure, or where it is NaN, is none."""
        if self.monitor is None:
            return
        if epoch < max((getattr(each, "settled_epoch", 0) for each in siblings(self)), default=0):
            return  # weights that are not all pruned yet, or not clustered
        value = float((logs or {}).get(self.monitor, math.nan))
        # Validation may come every few epochs only; what training logs is there from the first.
        validated = any(name.startswith("val_") for name in logs or {})
        if self.monitor not in (logs or {}) and (validated or not self.monitor.startswith("val_")):
            raise self._unknown_figure(logs or {})
        if math.isnan(value):
            return
        if self._rises is None:
            self._rises = rises(self.model, self.monitor) if self.mode == "auto" else self.mode == "max"
        if self._best is None or (value > self._best if self._rises else value < self._best):
            self._best, self._best_weights = value, self.model.get_weights()

    def _unknown_figure(self, logs: dict) -> ValueError:
        allowed = ", ".join(sorted(logs)) or "a figure of the logs"
        return refuse("monitor", self.monitor, allowed, "Pass validation_data for a val_ figure.")

    def on_train_end(self, logs: dict | None = None) -> None:
        """Exports."""
        if self.monitor is not None and self._best is None and self.monitor not in (logs or {}):
            raise self._unknown_figure(logs or {})
        if not self._best_weights:
            self._export()
            return
        last = self.model.get_weights()
        try:
            self.model.set_weights(self._best_weights)
            self._export()
        finally:
            self.model.set_weights(last)
            self._best_weights = []

    def _export(self) -> None:
        self.file = export_tflite(
            self.model,
            self.path,
            self.recipe,
            calibration=self.calibration,
            evaluate=self.evaluate,
            max_drop=self.max_drop,
            **self.options,
        )

    def __repr__(self) -> str:
        """The call, without the data."""
        return f"ExportTFLite({str(self.path)!r}, {self.recipe!r}, max_drop={self.max_drop!r})"
