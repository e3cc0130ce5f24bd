"""`ExportTFLite`: the export as the last line of a `fit`."""

from __future__ import annotations

import os
from typing import Any

import keras

from tfaccel.export.file import TFLiteFile
from tfaccel.export.recipes import find_recipe
from tfaccel.export.tflite import (
    check_arguments,
    check_data,
    check_path,
    export_tflite,
)
from tfaccel.keras_fixes.callback_siblings import siblings


class ExportTFLite(keras.callbacks.Callback):
    """Exports the trained model when `fit` ends; the result is in `.file`.

    List it last: a callback that changes the weights when training ends, such as
    `EarlyStopping(restore_best_weights=True)`, must have run before. The order is checked when `fit`
    begins. The arguments are those of `tfaccel.export_tflite`, and are checked at construction.

    Args:
        path: Where the file goes; its folder must exist.
        recipe: `"float32"`, `"float16"`, `"dynamic_int8"` or `"int8"`.
        calibration: Real samples; needed for `"int8"`.
        evaluate: Labelled data or a function, for `max_drop`; default the labels of `calibration`.
        max_drop: How much the score may fall; more raises `ExportError` when training is over, with
            the trained model unharmed.
        input_signature: Only for a subclassed model that can't tell its inputs.

    Raises:
        ValueError: A bad argument; or, when `fit` begins, a callback in the wrong order.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> model.compile("sgd", "mse")
        >>> export = tfaccel.ExportTFLite("trained.tflite", "float16")
        >>> history = model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0, callbacks=[export])
        >>> export.file.recipe
        'float16'

    Reference:
        `tfaccel.export_tflite`.
    """

    chief_only = True  # on several workers the first one exports

    def __init__(
        self,
        path: str | os.PathLike,
        recipe: str = "float32",
        *,
        calibration: Any = None,
        evaluate: Any = None,
        max_drop: float | None = None,
        input_signature: Any = None,
    ):
        super().__init__()
        self.path = check_path(path)
        self.recipe = find_recipe(recipe).name
        check_arguments(find_recipe(recipe), calibration, evaluate, max_drop)
        self.calibration = calibration
        self.evaluate = evaluate
        self.max_drop = max_drop
        self.input_signature = input_signature
        self.file: TFLiteFile | None = None

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks that no callback behind this one changes the weights at the end."""
        self.file = None
        if self.model.built:
            check_data(self.model, self.calibration, self.evaluate, self.max_drop, self.input_signature)
        others = siblings(self)
        for other in others[others.index(self) + 1 :]:
            if _changes_weights_at_end(other):
                raise ValueError(
                    f"ExportTFLite is listed before {type(other).__name__}, which changes the weights "
                    "when training ends: another model would be exported than the one you keep. "
                    "Allowed: ExportTFLite behind it. List it last."
                )

    def on_train_end(self, logs: dict | None = None) -> None:
        """Exports."""
        self.file = export_tflite(
            self.model,
            self.path,
            self.recipe,
            calibration=self.calibration,
            evaluate=self.evaluate,
            max_drop=self.max_drop,
            input_signature=self.input_signature,
        )

    def __repr__(self) -> str:
        """The call, without the data."""
        return f"ExportTFLite({str(self.path)!r}, {self.recipe!r}, max_drop={self.max_drop!r})"


def _changes_weights_at_end(callback: keras.callbacks.Callback) -> bool:
    if isinstance(callback, keras.callbacks.EarlyStopping):
        return callback.restore_best_weights
    return isinstance(callback, keras.callbacks.SwapEMAWeights)
