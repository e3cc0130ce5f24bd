"""Real data sets for the benchmarks: from the cache where they are, else through `keras.datasets`.

The cache is `$TFACCEL_DATA`, default `~/.cache/tfaccel/data`, with one `NAME.npz` of `x_train`,
`y_train`, `x_test`, `y_test` for each data set; texts are in a `NAME.json.gz` of the same.
"""

import gzip
import json
import os
import pathlib

import numpy as np

NAMES = ("mnist", "fashion_mnist", "cifar10")
WORDS, LENGTH = 20_000, 200  # of texts: different ones, and how many of each


def load(name: str) -> dict[str, np.ndarray]:
    """The data set as arrays: images uint8 with a channel axis, or numbers of words, int32; labels int32.

    Raises:
        ValueError: Unknown name.
    """
    if name == "imdb":
        return load_imdb()
    if name not in NAMES:
        raise ValueError(f"name={name!r} is not known. Allowed: {', '.join(NAMES)}, imdb.")
    path = cache() / f"{name}.npz"
    data = read(path) if path.exists() else download(name)
    for split in ("train", "test"):
        x, y = data[f"x_{split}"], data[f"y_{split}"]
        data[f"x_{split}"] = x if x.ndim == 4 else x[..., None]
        data[f"y_{split}"] = y.reshape(-1).astype("int32")
    return data


def load_imdb() -> dict[str, np.ndarray]:
    """Film reviews as the numbers of their first 200 words: 0 where there is none, 1 for a rare one."""
    import keras

    path = cache() / "imdb.json.gz"
    if not path.exists():
        (x_train, y_train), (x_test, y_test) = keras.datasets.imdb.load_data(num_words=WORDS)
        texts = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
        pad = keras.utils.pad_sequences
        numbered = {
            split: pad(texts[split], LENGTH, "int32", "post", "post") for split in ("x_train", "x_test")
        }
    else:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts = json.load(file)
        number = keras.layers.TextVectorization(WORDS, output_sequence_length=LENGTH)
        number.adapt(texts["x_train"])
        numbered = {
            split: np.concatenate([number(rows).numpy() for rows in np.array_split(texts[split], 50)])
            for split in ("x_train", "x_test")
        }
    labels = {split: np.asarray(texts[split], "int32") for split in ("y_train", "y_test")}
    return {**{split: rows.astype("int32") for split, rows in numbered.items()}, **labels}


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
