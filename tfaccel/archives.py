"""Reading files that a user names on the command line: arrays, models, and functions of a script."""

from __future__ import annotations

import os
import pathlib
import runpy
import zipfile
from collections.abc import Callable

import keras
import numpy as np

from tfaccel.keras_fixes.keras_2_files import loading_keras_2


def read_archive(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file by their names.

    Args:
        path: The file.

    Raises:
        ValueError: There is no such file, or it is something else.
    """
    try:
        # numpy leaves a file open that it can't read, unless it is given one.
        with open(path, "rb") as file, np.load(file) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} can't be read: {error}. Allowed: a .npz file as np.savez writes it."
        ) from error


def read_training_data(path: str) -> tuple[np.ndarray, np.ndarray]:
    """`(x, y)` of a `.npz` file; `x_train` and `y_train` where it has no `x`.

    Raises:
        ValueError: The file has neither.
    """
    arrays = read_archive(path)
    for x, y in (("x", "y"), ("x_train", "y_train")):
        if x in arrays and y in arrays:
            return arrays[x], arrays[y]
    raise ValueError(
        f"{path} has {', '.join(arrays) or 'no arrays'}. Allowed: x and y, or x_train and y_train. Write it "
        "with np.savez(path, x=..., y=...)."
    )


def load_function(path: str, name: str) -> Callable:
    """A function that a script defines; what stands under `if __name__ == "__main__"` isn't run.

    Raises:
        ValueError: There is no such script, or no such function in it.
    """
    if not pathlib.Path(path).is_file():
        raise ValueError(f"There is no script {path}. Allowed: a Python file. Check the path.")
    names = runpy.run_path(path, run_name="tfaccel_tune")
    if not callable(names.get(name)):
        found = ", ".join(key for key, value in names.items() if callable(value) and not key.startswith("_"))
        raise ValueError(
            f"{path} has no function {name}. Allowed: {found or 'none is there'}. Name one with --function."
        )
    return names[name]


def load_model(path: str) -> keras.Model:
    """A model from a `.keras` file, or a `.h5` file of Keras 2.

    Raises:
        ValueError: The file is damaged, or has layers of your own.
    """
    if path.endswith(".keras") and pathlib.Path(path).is_file() and not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is damaged: it is not a whole .keras file. Allowed: one that model.save() has written "
            "to the end. Save or copy it again."
        )
    try:
        with loading_keras_2():
            return keras.models.load_model(path, compile=False)
    except TypeError as error:
        raise ValueError(
            f"{path} can't be loaded: {str(error).splitlines()[0]} Allowed: a .keras file of Keras's own "
            "layers. Use tfaccel.export_tflite in Python for custom ones."
        ) from error


def read_samples(path: str, model: keras.Model) -> tuple:
    """`(x,)` or `(x, y)` of a `.npz` file; `x_test` and `y_test` where it has no `x`.

    Of a model with several inputs the arrays are named as they are, beside `y`.

    Raises:
        ValueError: The file has none of these.
    """
    arrays = read_archive(path)
    for x, y in (("x", "y"), ("x_test", "y_test")):
        if x in arrays:
            return (arrays[x], arrays[y]) if y in arrays else (arrays[x],)
    if len(model.inputs or ()) > 1:
        labels = arrays.pop("y", None)
        return (arrays,) if labels is None else (arrays, labels)
    raise ValueError(
        f"{path} has {', '.join(arrays) or 'no arrays'}. Allowed: an array x (and y), or x_test (and "
        "y_test). Write it with np.savez(path, x=..., y=...)."
    )
