"""What `QuantizeAware` learns about a model's activations, and `export_tflite` makes a file with.

Training and export don't import one another; they meet here. What was learnt is kept as long as the model is,
and holds for the weights that it was learnt with: a model that was changed since has none.
"""

from __future__ import annotations

import dataclasses
import weakref
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

if TYPE_CHECKING:
    from tfaccel.export.operations import Operation


@dataclasses.dataclass(frozen=True)
class RoundedTensor:
    """A value that the file rounds.

    Args:
        name: Of the tensor in the float file.
        place: Of the tensor among all that the float file's operations make, in order; -1: an input.
        layer: Whose output it is; None: an input of the model.
        call: Which call of the layer, from 0.
        leaf: Which output of that call, or which input of the model, from 0.
    """

    name: str
    place: int
    layer: keras.layers.Layer | None
    call: int
    leaf: int


@dataclasses.dataclass(frozen=True)
class FileRounding:
    """What an integer file of a model rounds.

    Args:
        tensors: The inputs and the layers' outputs that it rounds, in the order of computing.
        kinds: Of the file's operations. In a file with other weights a tensor may have another name (a bias
            that is zero is no part of it); where the operations are of the same kinds, the places hold.
        inputs: The model's.
    """

    tensors: list[RoundedTensor]
    kinds: list[str]
    inputs: list[tf.TensorSpec]


@dataclasses.dataclass(frozen=True)
class LearnedRanges:
    """The ranges that a model was trained with.

    Args:
        bits: Of the activations.
        tensors: Those that were rounded.
        spans: Lowest and highest value of each.
        kinds: Of the operations of the file that `tensors` are told of.
        samples: Rows of the training data, an array an input, to measure what layers have inside; none where
            a length is open.
    """

    bits: int
    tensors: Sequence[RoundedTensor]
    spans: Sequence[tuple[float, float]]
    kinds: Sequence[str]
    samples: tuple[np.ndarray, ...]

    def in_file(self, operations: Sequence[Operation]) -> dict[str, tuple[float, float]]:
        """The ranges by the names of the tensors that a float file's operations make."""
        made = [name for each in operations for name in each.outputs]
        alike = [each.kind for each in operations] == list(self.kinds)
        names = [made[each.place] if alike and each.place >= 0 else each.name for each in self.tensors]
        return dict(zip(names, self.spans, strict=True))


_learned: weakref.WeakKeyDictionary[keras.Model, tuple[int, LearnedRanges]] = weakref.WeakKeyDictionary()


def remember(model: keras.Model, learned: LearnedRanges) -> None:
    """Keeps what was learnt with the model's present weights."""
    _learned[model] = _fingerprint(model), learned


def has_learned(model: keras.Model) -> bool:
    """Whether anything was learnt, with whatever weights."""
    return model in _learned


def recall(model: keras.Model, bits: int) -> LearnedRanges | None:
    """What was learnt with the weights that the model has now, if it is for so many bits."""
    fingerprint, learned = _learned.get(model, (0, None))
    if learned is None or learned.bits != bits or fingerprint != _fingerprint(model):
        return None
    return learned


def take_off_leftovers(model: keras.Model) -> None:
    """Ends what an interrupted `fit` left on a model, as the next `fit`, `evaluate` and `predict` do."""
    seam = vars(model).get("make_predict_function")
    if getattr(seam, "attached", None):
        seam()


def find_rounded_tensors(model: keras.Model, bits: int, input_signature: Any = None) -> FileRounding:
    """`tfaccel.export.rounded_tensors.find_rounded_tensors`, for training."""
    from tfaccel.export import rounded_tensors

    return rounded_tensors.find_rounded_tensors(model, bits, input_signature)


def _fingerprint(model: keras.Model) -> int:
    checksum = 0
    for variable in model.weights:
        values = np.ascontiguousarray(keras.ops.convert_to_numpy(variable))
        checksum = zlib.crc32(values.reshape(-1).view(np.uint8).data, checksum)  # bfloat16 has none
    return checksum
