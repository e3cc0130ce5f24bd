"""Which values an integer file rounds, and which layers make them: what training has to round too.

Nobody has to know which operations TensorFlow's converter fuses: the file is made, and tells. To find a value
of the file among those that layers return, both are computed, from made-up samples and from weights that were
shaken: in a fresh model a batch normalization gives back what it was given, and a zero branch of a residual
block adds nothing, so that values of several layers are equal.

Cost: one conversion, one quantization, and a few rows through both; seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.export.conversion import Converted, convert_model
from tfaccel.export.interpreter import open_with_all_tensors
from tfaccel.export.operations import calls_replaced
from tfaccel.export.quantization import measure_ranges, quantize
from tfaccel.export.recipes import RECIPES
from tfaccel.export.samples import Samples, make_up_samples
from tfaccel.export.serving import ServingFunction
from tfaccel.keras_fixes.half_precision import computing_in_float32
from tfaccel.keras_fixes.inner_layers import inner_layers
from tfaccel.learned_ranges import FileRounding, RoundedTensor

# LiteRT gives these the grid of what they read, so there is nothing to round behind them.
PASSED_ON = {
    *("AVERAGE_POOL_2D", "BROADCAST_TO", "EXPAND_DIMS", "GATHER", "GATHER_ND", "MAX_POOL_2D", "MIRROR_PAD"),
    *("PAD", "REDUCE_MIN", "RESHAPE", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "SLICE"),
    *("SPACE_TO_DEPTH", "SPLIT", "SQUEEZE", "STRIDED_SLICE", "TRANSPOSE", "UNPACK"),
}
# And these a grid that is always the same one.
GIVEN = {"LOGISTIC", "SOFTMAX", "TANH"}
SAME = 1e-4  # of the largest value: two ways to compute one value differ by less, other values by more


ROWS = 64  # enough that a ReLU somewhere cuts something off, and differs from what it was given
FEWEST_ROWS = 2  # of a model that is so large that some of its values are cut off in any row
MOST_BYTES = 2**27  # of all values of the file
WIDER = 4.0  # than normal: by biases alone no value would become negative


def find_rounded_tensors(model: keras.Model, bits: int, input_signature: Any = None) -> FileRounding:
    """Makes a file with fixed ranges of the model, and looks which values it rounds.

    Args:
        model: Built.
        bits: Of activations, 8 or 16.
        input_signature: As for `export_tflite`.

    Raises:
        ExportError: The model can't be converted.
        ValueError: It does not tell its inputs.
    """
    values = _shaken(model)
    file = convert_model(model, input_signature, fixed_ranges=True, values=values)
    serving = ServingFunction(model, input_signature, batch_size=file.batch_size)
    made_up = make_up_samples(serving.specs, serving.batch_size or _rows(file)).inputs
    floats = [np.issubdtype(array.dtype, np.floating) for array in made_up]
    samples = Samples(tuple(WIDER * a if real else a for a, real in zip(made_up, floats, strict=True)))
    names = [spec.name for spec in serving.specs]
    ranges = measure_ranges(file.content, names, samples, file.batch_size)
    recipe = RECIPES["int8" if bits == 8 else "int16x8"]
    is_rounded = _integer_tensors(quantize(file.content, recipe, file.operations, ranges))
    interpreter = open_with_all_tensors(file.content)
    runner = interpreter.get_signature_runner()
    runner(**dict(zip(names, samples.inputs, strict=True)))
    inputs = {detail["name"]: names.index(name) for name, detail in runner.get_input_details().items()}
    found = [RoundedTensor(name, -1, None, 0, leaf) for name, leaf in inputs.items() if is_rounded(name)]
    index = {detail["name"]: detail["index"] for detail in interpreter.get_tensor_details()}
    returned = _returned(serving, values, samples.inputs)
    made = [(each.kind, name) for each in file.operations for name in each.outputs]
    for place, (kind, name) in enumerate(made):
        if kind not in PASSED_ON | GIVEN and is_rounded(name):
            value = interpreter.get_tensor(index[name])
            match = next((whose for whose, ours in returned if _equal(ours, value)), None)
            found += [] if match is None else [RoundedTensor(name, place, *match)]
    return FileRounding(found, [each.kind for each in file.operations], serving.specs)


def _rows(file: Converted) -> int:
    """How many rows are looked at: all values of all of them are in memory, several times."""
    made = {name for each in file.operations for name in each.outputs}
    details = open_with_all_tensors(file.content).get_tensor_details()
    row = sum(4 * math.prod(each["shape"].tolist()) for each in details if each["name"] in made)
    return int(np.clip(MOST_BYTES // max(row, 1), FEWEST_ROWS, ROWS))


def _shaken(model: keras.Model) -> list[np.ndarray]:
    """The weights, each with noise of its own; what is positive, such as a variance, stays so."""
    random = np.random.default_rng(0)
    shaken = []
    for variable in model.trainable_variables + model.non_trainable_variables:
        value = keras.ops.convert_to_numpy(variable)
        if keras.backend.is_float_dtype(variable.dtype):
            size = np.abs(value).max(initial=0.0) or 1.0
            noise = random.uniform(0.5, 1.5, value.shape), random.uniform(0, 0.1 * size, value.shape)
            value = (value * noise[0] + noise[1]).astype(value.dtype)
        shaken.append(value)
    return shaken


def _integer_tensors(content: bytes) -> Callable[[str], bool]:
    """Whether a tensor of the float file holds integers in the quantized one, or a copy of it does."""
    from ai_edge_litert.tools import flatbuffer_utils

    file = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    integers = {flatbuffer_utils.TensorType.INT8, flatbuffer_utils.TensorType.INT16}
    names = {
        each.name.decode() for graph in file.subgraphs for each in graph.tensors if each.type in integers
    }
    return lambda name: name in names or f"{name}_quantized" in names


def _returned(
    serving: ServingFunction, values: list[np.ndarray], inputs: tuple[np.ndarray, ...]
) -> list[tuple[tuple[keras.layers.Layer, int, int], np.ndarray]]:
    """What the layers gave back for a batch, with the layer, its call and the output, in order."""
    model = serving.model
    found: list[tuple[tuple[keras.layers.Layer, int, int], np.ndarray]] = []
    calls: dict[int, int] = {}

    def noting(layer: keras.layers.Layer, call: Any) -> Any:
        def call_noted(*args: Any, **kwargs: Any) -> Any:
            number = calls.get(id(layer), 0)
            calls[id(layer)] = number + 1
            outputs = call(*args, **kwargs)
            for leaf, each in enumerate(keras.tree.flatten(outputs)):
                if tf.is_tensor(each) and each.dtype.is_floating:
                    found.append(((layer, number, leaf), np.asarray(each, "float32")))
            return outputs

        return call_noted

    variables = model.trainable_variables + model.non_trainable_variables
    mapping = list(zip(variables, map(tf.constant, values), strict=True))
    # A cell is called in its layer's loop, where the file has a tensor for each step.
    loops = [each for each in inner_layers(model) if isinstance(each, keras.layers.RNN)]
    hidden = {id(inner) for loop in loops for inner in inner_layers(loop) if inner is not loop}
    layers = [each for each in inner_layers(model) if each is not model and id(each) not in hidden]
    with (
        keras.StatelessScope(state_mapping=mapping),
        computing_in_float32(model),
        calls_replaced(layers, noting),
    ):
        serving.call(*map(tf.constant, inputs))
    return found


def _equal(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether these are the same values, in any shape."""
    if ours.size != theirs.size or theirs.dtype != np.float32:
        return False
    largest = np.abs(theirs).max(initial=0.0)
    return largest > 0 and bool(np.abs(ours.ravel() - theirs.ravel()).max() <= SAME * largest)
