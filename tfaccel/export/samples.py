"""Real samples for calibration, comparison and scoring, out of whatever form the user's data has."""

from __future__ import annotations

import dataclasses
import keyword
import re
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Samples:
    """Some rows of data, one array per model input.

    Args:
        inputs: Arrays of shape `(rows, ...)`, flat, in the order of the model's inputs.
        labels: Array of shape `(rows, ...)`, or None where the data has none.
        made_up: True where no data was given and the rows are random numbers.
        several_labels: Whether the data has labels for several outputs, which are left out.
    """

    inputs: tuple[np.ndarray, ...]
    labels: np.ndarray | None = None
    made_up: bool = False
    several_labels: bool = False

    def __len__(self) -> int:
        return len(self.inputs[0])

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, ...]]:
        """The inputs, `batch_size` rows at a time; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            yield tuple(array[start : start + batch_size] for array in self.inputs)

    def first(self, rows: int) -> Samples:
        """The first rows."""
        return self._rows(slice(rows))

    def spread(self, rows: int) -> Samples:
        """Rows from the first to the last in equal steps: data that is sorted is seen from all sides."""
        return self._rows(spread_indices(len(self), rows))

    def _rows(self, which: Any) -> Samples:
        labels = None if self.labels is None else self.labels[which]
        inputs = tuple(array[which] for array in self.inputs)
        return Samples(inputs, labels, self.made_up, self.several_labels)

    def whole_batches(self, batch_size: int | None) -> Samples:
        """As many rows as fill batches of that size; all where none is fixed.

        Raises:
            ValueError: There are fewer.
        """
        if batch_size is None or len(self) % batch_size == 0:
            return self
        rows = len(self) // batch_size * batch_size
        if rows == 0:
            raise ValueError(
                f"There are {len(self)} samples, and the model takes {batch_size} at once. Allowed: at "
                "least one batch. Pass more."
            )
        return self.first(rows)


def spread_indices(length: int, limit: int | None) -> Any:
    """`limit` of the numbers below `length`, from the first to the last in equal steps; None takes all."""
    if limit is None or limit >= length:
        return slice(None)
    return np.linspace(0, length - 1, limit).round().astype(int)


def collect_samples(data: Any, specs: list[tf.TensorSpec], limit: int | None, *, argument: str) -> Samples:
    """Takes up to `limit` rows of `data` and checks them against the model's inputs.

    Of arrays and of a `PyDataset` they come from all over, as data is often sorted; of a dataset they are the
    first.

    Args:
        data: Arrays (a list or dict for several inputs), `(x, y)`, a `tf.data.Dataset` of batches or
            of single samples, with or without labels, or a `keras.utils.PyDataset`.
        specs: The model's inputs.
        limit: Rows to take; None takes all.
        argument: The name of the user's argument, for the error text.

    Raises:
        ValueError: No rows, or rows that the model can't take.
    """
    inputs: list[tuple[np.ndarray, ...]] = []
    labels: list[Any] = []
    rows = 0
    for batch in _batches(data, specs, limit):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
        arrays = tuple(np.asarray(leaf) for leaf in _by_name(x, specs, argument))
        _check_batch(arrays, specs, argument)
        inputs.append(arrays)
        labels.append(keras.tree.flatten(y))
        rows += len(arrays[0])
        if limit is not None and rows >= limit:
            break
    if rows == 0:
        raise ValueError(
            f"{argument} holds no samples. Allowed: at least one. Some hundred real ones are usual; "
            "check the dataset, or that a generator was not read before."
        )
    for column, spec in zip(zip(*inputs, strict=True), specs, strict=True):
        lengths = sorted({array.shape[1:] for array in column})
        if len(lengths) > 1:
            raise ValueError(
                f"{argument} has samples of several shapes for {spec.name!r}: {lengths[0]} to {lengths[-1]}. "
                "Allowed: one shape. Pad all to one length (keras.utils.pad_sequences, or padded_batch with "
                "padded_shapes)."
            )
    merged = tuple(
        np.concatenate(column)[:limit].astype(spec.dtype.as_numpy_dtype, copy=False)
        for column, spec in zip(zip(*inputs, strict=True), specs, strict=True)
    )
    if all(len(y) == 1 and hasattr(y[0], "shape") for y in labels):
        return Samples(merged, np.concatenate([np.asarray(y[0]) for y in labels])[:limit])
    return Samples(merged, several_labels=all(len(y) > 1 for y in labels))


def make_up_samples(specs: list[tf.TensorSpec], rows: int = 16) -> Samples:
    """Random rows for a comparison without data: normal for floats, 0 and 1 for integers."""
    generator = np.random.default_rng(0)
    inputs = []
    for spec in specs:
        # A length that the model leaves open can be anything; 16 is short and more than one.
        shape = (rows, *(16 if size is None else size for size in spec.shape[1:]))
        if spec.dtype.is_floating:
            inputs.append(generator.standard_normal(shape).astype(spec.dtype.as_numpy_dtype))
        else:
            inputs.append(generator.integers(0, 2, shape).astype(spec.dtype.as_numpy_dtype))
    return Samples(tuple(inputs), made_up=True)


def _batches(data: Any, specs: list[tf.TensorSpec], limit: int | None) -> Iterator[Any]:
    if isinstance(data, tf.data.Dataset):
        if limit is None and data.cardinality() == tf.data.INFINITE_CARDINALITY:
            raise ValueError(
                "The dataset has no end, and all of it would be scored. Allowed: a finite one. Use "
                "dataset.take(batches)."
            )
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data.element_spec)
        given = _by_name(x, specs, "The dataset")
        # A single sample has one axis less than the model's input, which has the batch axis.
        single = len(given) == len(specs) and all(
            mine.shape.rank is not None and mine.shape.rank == spec.shape.rank - 1
            for mine, spec in zip(given, specs, strict=True)
        )
        yield from (data.batch(64) if single else data).as_numpy_iterator()
    elif isinstance(data, keras.utils.PyDataset):
        yield from _batches_of(data, limit)
    elif isinstance(data, tuple | list | dict) or hasattr(data, "__array__"):
        # A list is several inputs; only a tuple is (x, y).
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data if isinstance(data, tuple) else (data,))
        rows = spread_indices(len(keras.tree.flatten(x)[0]), limit)
        y = np.asarray(y) if isinstance(y, list) and y and not hasattr(y[0], "__len__") else y
        yield keras.tree.map_structure(lambda array: np.asarray(array)[rows], (x, y), none_is_leaf=False)
    else:
        raise ValueError(
            f"{type(data).__name__} is not data that samples can be taken from. Allowed: arrays, "
            "(x, y), tf.data.Dataset, keras.utils.PyDataset. Turn a generator into a dataset."
        )


def _batches_of(data: keras.utils.PyDataset, limit: int | None) -> Iterator[Any]:
    """As many batches as hold `limit` rows, from all over."""
    if not len(data):
        return
    first = data[0]
    rows = len(keras.tree.flatten(first)[0])
    needed = None if limit is None or not rows else -(-limit // rows)
    for index in np.arange(len(data))[spread_indices(len(data), needed)]:
        yield data[int(index)] if index else first


def _by_name(x: Any, specs: list[tf.TensorSpec], argument: str) -> list[Any]:
    """The arrays in the order of the model's inputs; a flat dict goes by the inputs' names."""
    if not isinstance(x, dict) or any(isinstance(v, dict | list | tuple) for v in x.values()):
        return keras.tree.flatten(x)
    named = {clean_name(name): array for name, array in x.items()}
    names = [spec.name for spec in specs]
    if not set(names) <= set(named):  # Keras ignores what it doesn't know
        raise ValueError(
            f"{argument} has inputs named {sorted(x)}, the model {sorted(names)}. Allowed: the model's "
            "names. Rename the keys."
        )
    return [named[name] for name in names]


def clean_name(name: str) -> str:
    """A name that a SavedModel argument may have."""
    cleaned = re.sub(r"\W", "_", name).lstrip("_")
    if keyword.iskeyword(cleaned) or cleaned == "self":
        return f"{cleaned}_"
    return cleaned if cleaned and not cleaned[0].isdigit() else f"input_{cleaned}"


def _check_batch(arrays: tuple[np.ndarray, ...], specs: list[tf.TensorSpec], argument: str) -> None:
    if len(arrays) != len(specs):
        raise ValueError(
            f"{argument} has {len(arrays)} inputs, the model {len(specs)}. Allowed: one array per "
            "model input. Labels go beside them: (x, y)."
        )
    for array, spec in zip(arrays, specs, strict=True):
        if not spec.shape[1:].is_compatible_with(array.shape[1:]) or array.ndim != spec.shape.rank:
            raise ValueError(
                f"{argument} has samples of shape {array.shape[1:]}, the model's input "
                f"{spec.name!r} takes {tuple(spec.shape[1:])}. Allowed: that shape behind a sample "
                "axis. Reshape or resize as the training data was."
            )
        if array.dtype.kind in "USO":
            raise ValueError(
                f"{argument} holds text for the input {spec.name!r}, which a TFLite file can't look up. "
                "Allowed: numbers. Export the model behind the layer that looks words up, and look up before."
            )
        if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
            raise ValueError(
                f"{argument} has dtype {array.dtype}, the model's input {spec.name!r} is "
                f"{spec.dtype.name}. Allowed: numbers. Preprocess it as the training data was."
            )
