"""Real data sets for the benchmarks: from the cache where they are, else through `keras.datasets`.

The cache is `$TFACCEL_DATA`, default `~/.cache/tfaccel/data`, with one `NAME.npz` of `x_train`,
`y_train`, `x_test`, `y_test` for each data set.
"""

import os
import pathlib

import numpy as np

NAMES = ("mnist", "fashion_mnist", "cifar10")


def load(name: str) -> dict[str, np.ndarray]:
    """The data set as arrays: images uint8 with a channel axis, labels int32.

    Raises:
        ValueError: Unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"name={name!r} is not known. Allowed: {', '.join(NAMES)}.")
    path = cache() / f"{name}.npz"
    data = read(path) if path.exists() else download(name)
    for split in ("train", "test"):
        x, y = data[f"x_{split}"], data[f"y_{split}"]
        data[f"x_{split}"] = x if x.ndim == 4 else x[..., None]
        data[f"y_{split}"] = y.reshape(-1).astype("int32")
    return data


def cache() -> pathlib.Path:
    """The folder that is looked into first."""
    return pathlib.Path(os.environ.get("TFACCEL_DATA", "~/.cache/tfaccel/data")).expanduser()


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file."""
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files}


def download(name: str) -> dict[str, np.ndarray]:
    """Through `keras.datasets`, which keeps a cache of its own."""
    import keras

    (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
