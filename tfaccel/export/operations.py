"""Which layer each operation of a TFLite file comes from: what selection by layer and reports go by.

While the model is traced each layer notes the name scope that it is called in. TensorFlow's converter keeps
those names in the tensors of the file, also where it fuses operations: `model/net_1/relu_1/Relu;model/net_1/
conv_1/convolution` is a convolution with its activation. Only the model's outputs lose theirs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfaccel.keras_fixes.inner_layers import inner_layers


@dataclasses.dataclass
class Scopes:
    """What was noted while a model was traced.

    Args:
        layers: The layer that was called in a name scope, by that scope.
        returned: The innermost layer that gave a tensor back, with the tensor, by the tensor's identity.
    """

    layers: dict[str, keras.layers.Layer] = dataclasses.field(default_factory=dict)
    returned: dict[int, tuple[Any, keras.layers.Layer]] = dataclasses.field(default_factory=dict)

    def layer_of(self, tensor: Any) -> keras.layers.Layer | None:
        """The innermost layer that gave this tensor back."""
        return self.returned.get(id(tensor), (None, None))[1]

    def layer_named(self, name: str) -> keras.layers.Layer | None:
        """The innermost layer in whose scope a tensor of this name was made."""
        while name:
            name = name.rpartition("/")[0]
            if name in self.layers:
                return self.layers[name]
        return None


@contextlib.contextmanager
def calls_replaced(
    layers: Iterable[keras.layers.Layer], replace: Callable[[keras.layers.Layer, Any], Any]
) -> Iterator[None]:
    """Each layer's `call` is what `replace(layer, call)` gives in the block; not for use by two threads."""
    changed: list[keras.layers.Layer] = []
    try:
        for layer in layers:
            if "call" not in vars(layer):
                layer.call = replace(layer, layer.call)
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            del layer.call


@contextlib.contextmanager
def noting_scopes(model: keras.Model) -> Iterator[Scopes]:
    """Each layer inside of the model notes its calls in the block."""
    scopes = Scopes()

    def noting(layer: keras.layers.Layer, call: Any) -> Any:
        @functools.wraps(call)
        def call_noted(*args: Any, **kwargs: Any) -> Any:
            scopes.layers[tf.get_current_name_scope()] = layer
            outputs = call(*args, **kwargs)
            for each in keras.tree.flatten(outputs):
                scopes.returned.setdefault(id(each), (each, layer))
            return outputs

        return call_noted

    with calls_replaced((layer for layer in inner_layers(model) if layer is not model), noting):
        yield scopes


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a file.

    Args:
        kind: Its name in TFLite, such as `"CONV_2D"`; that of TensorFlow's own begins with `"Flex"`.
        inputs: The names of the tensors that it reads.
        outputs: The names of the tensors that it makes.
        layer: Whose it is; None where nothing tells.
        weights: How many constant values it reads.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layer: keras.layers.Layer | None
    weights: int


def find_operations(content: bytes, scopes: Scopes, outputs: dict[str, Any]) -> list[Operation]:
    """The operations of a file's main graph, in the order in which they run.

    Args:
        content: The file.
        scopes: What was noted while it was traced.
        outputs: The traced outputs, by name.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    file = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    graph = file.subgraphs[0]
    kinds = {code: name for name, code in vars(flatbuffer_utils.BuiltinOperator).items() if type(code) is int}
    of_output = _layers_of_outputs(file, scopes, outputs)
    maker: dict[int, keras.layers.Layer | None] = {}
    found = []
    for each in graph.operators:
        constants = [
            i for i in each.inputs if i >= 0 and file.buffers[graph.tensors[i].buffer].data is not None
        ]
        names = [graph.tensors[i].name.decode() for i in [*each.outputs, *constants]]
        layer = (
            _layer_of_names(names, scopes)
            or next((of_output[i] for i in each.outputs if i in of_output), None)
            or next((maker[i] for i in each.inputs if maker.get(i)), None)
        )
        maker.update(dict.fromkeys(each.outputs, layer))
        weights = sum(_size(graph.tensors[i]) for i in constants)
        code = file.operatorCodes[each.opcodeIndex]
        kind = code.customCode.decode() if code.customCode else kinds[code.builtinCode]
        read = tuple(graph.tensors[i].name.decode() for i in each.inputs if i >= 0)
        made = tuple(graph.tensors[i].name.decode() for i in each.outputs)
        found.append(Operation(kind, read, made, layer, weights))
    return found


def constant_names(content: bytes) -> set[str]:
    """The names of the tensors of a file that hold constants, such as weights."""
    from ai_edge_litert.tools import flatbuffer_utils

    file = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    tensors = [tensor for graph in file.subgraphs for tensor in graph.tensors]
    return {each.name.decode() for each in tensors if file.buffers[each.buffer].data is not None}


def _layer_of_names(names: list[str], scopes: Scopes) -> keras.layers.Layer | None:
    """Of the layers that were fused the one with weights to multiply by, else the first."""
    layers = [scopes.layer_named(part) for name in names for part in name.split(";")]
    known = [layer for layer in layers if layer is not None]
    heavy = [layer for layer in known if any(len(weight.shape) > 1 for weight in layer.weights)]
    return next(iter(heavy + known), None)


def _layers_of_outputs(file: Any, scopes: Scopes, outputs: dict[str, Any]) -> dict[int, keras.layers.Layer]:
    found = {}
    for signature in file.signatureDefs or []:
        for each in signature.outputs:
            layer = scopes.layer_of(outputs.get(each.name.decode()))
            if layer is not None:
                found[each.tensorIndex] = layer
    return found


def _size(tensor: Any) -> int:
    size = 1
    for length in tensor.shape if tensor.shape is not None else ():
        size *= int(length)
    return size
