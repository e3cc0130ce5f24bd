"""What a training step computes and keeps, read off its traced graph; nothing is run.

The step is traced for batches of one shape. Its operations are then walked in the order in which they were
made, which is forward, then backward, then the update: each output is there from its operation to its last
reader. Elementwise operations write into an input that nobody reads any more, as TensorFlow's executor does.
Loops count as often as they run; what they keep of each round for the backward pass is kept until the end.

Not seen: what kernels need for themselves (cuDNN's workspaces, oneDNN's packed weights), what XLA makes of
it, and that TensorFlow may run independent operations at the same time.

Reference: the floating point operations are those of matrix products and convolutions, 2 for each
multiplication with its addition, as is usual for "model FLOPs utilization" (Chowdhery et al., 2022, "PaLM",
appendix B, https://arxiv.org/abs/2204.02311).
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfaccel.keras_fixes.inner_graphs import inner_graphs

# Their output is their input's memory.
ALIASES = {
    "CheckNumerics", "EnsureShape", "ExpandDims", "Identity", "IdentityN", "PreventGradient", "Reshape",
    "Squeeze", "StopGradient",
}  # fmt: skip
# What they give back was there before.
FREE = {"Arg", "Const", "Placeholder", "ReadVariableOp", "VarHandleOp", "VariableShape"}
# They may write into an input that nobody else reads.
IN_PLACE = {
    "Add", "AddV2", "AddN", "BiasAdd", "Cast", "DivNoNan", "Elu", "EluGrad", "Exp", "Log", "Maximum",
    "Minimum", "Mul", "MulNoNan", "Neg", "RealDiv", "Relu", "Relu6", "Relu6Grad", "ReluGrad", "Rsqrt",
    "RsqrtGrad", "Select", "SelectV2", "Selu", "SeluGrad", "Sigmoid", "SigmoidGrad", "Softmax", "Sqrt",
    "SqrtGrad", "Square", "SquaredDifference", "StatelessWhile", "Sub", "Tanh", "TanhGrad", "While",
}  # fmt: skip
# They put a part of a list by.
LISTED = {"TensorListPushBack", "TensorListSetItem"}


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What a step takes.

    Args:
        flops: Floating point operations of its matrix products and convolutions.
        peak_bytes: The most memory that its tensors take at one time, the batch among them; without
            variables.
        moved_bytes: That its operations read and write, if no two of them were fused.
        unknown: Names of operations whose shapes or number of rounds are not known before they run; an
            unknown size counts as one.
    """

    flops: float
    peak_bytes: int
    moved_bytes: float = 0.0
    unknown: tuple[str, ...] = ()


def step_cost(step: Callable[[Any], Any], batch: Any) -> StepCost:
    """Traces a step and adds up what it takes.

    Args:
        step: From a batch to logs, such as `model.train_step`. Its variables are there already.
        batch: `tf.TensorSpec`s, nested as the step takes them.

    Returns:
        The cost of one step.
    """
    graph = tf.function(step, autograph=False).get_concrete_function(batch).graph
    walk = _Walk(graph)
    given = sum(_bytes(spec) for spec in tf.nest.flatten(batch) if spec is not None)
    return StepCost(walk.flops, given + walk.peak + walk.kept, walk.moved, tuple(walk.unknown))


class _Walk:
    """What one graph takes: `peak`, `kept` behind it, `listed` in each round of a loop, `flops`, `moved`,
    `unknown`."""

    def __init__(self, graph: Any):
        self.peak, self.kept, self.listed = 0, 0, 0
        self.flops, self.moved = 0.0, 0.0
        self.unknown: dict[str, None] = {}
        self._live: dict[int, int] = {}  # the tensor that owns the memory: bytes
        self._total = 0
        self._loops: dict[str, int] = {}  # by name: how often each was passed
        operations = _needed(graph)
        self._owner: dict[int, int] = {}
        for tensor in (tensor for operation in operations for tensor in operation.outputs):
            self._owner[id(tensor)] = _owner(tensor)
        read = [*(each for operation in operations for each in operation.inputs), *graph.outputs]
        self._reads_left = collections.Counter(self._owner[id(tensor)] for tensor in read)
        for operation in operations:
            self._run(operation)

    def _run(self, operation: tf.Operation) -> None:
        graphs = inner_graphs(operation)
        inside = self._inside(operation, graphs)
        self.peak = max(self.peak, self._total + inside)
        if operation.type in LISTED:
            self.listed += _bytes(operation.inputs[-1])
        reads = collections.Counter(self._owner[id(tensor)] for tensor in operation.inputs)
        last = [owner for owner, count in reads.items() if self._reads_left[owner] == count]
        if operation.type not in FREE | ALIASES:
            self.moved += 0 if graphs else sum(map(_bytes, (*operation.inputs, *operation.outputs)))
            for tensor in operation.outputs:
                self._make(operation, tensor, last)
        self.peak = max(self.peak, self._total)
        for owner, count in reads.items():
            self._reads_left[owner] -= count
        for owner in (*last, *(id(tensor) for tensor in operation.outputs)):
            if not self._reads_left[owner]:
                self._total -= self._live.pop(owner, 0)

    def _make(self, operation: tf.Operation, tensor: Any, last: list[int]) -> None:
        size = _bytes(tensor)
        if operation.type in IN_PLACE:
            over = next((owner for owner in last if self._live.get(owner) == size), None)
            self._total -= self._live.pop(over, 0) if over is not None else 0
        self._live[id(tensor)] = size
        self._total += size

    def _inside(self, operation: tf.Operation, graphs: tuple[Any, ...]) -> int:
        """Adds up what an operation computes; gives what its body needs besides what is there already."""
        if operation.type in FLOPS:
            self.flops += FLOPS[operation.type](operation)
            tensors = (*operation.inputs, *operation.outputs)
            if not all(tensor.shape.is_fully_defined() for tensor in tensors):
                self.unknown[operation.name] = None
        walks = [_Walk(graph) for graph in graphs]
        if not walks:
            return 0
        rounds = self._rounds(operation, graphs[0]) if operation.type.endswith("While") else 1
        # Of two branches the dearer one counts; the condition of a loop computes nothing.
        self.flops += rounds * max(walk.flops for walk in walks)
        self.moved += rounds * max(walk.moved for walk in walks)
        self.kept += rounds * max(walk.kept + walk.listed for walk in walks)
        for walk in walks:
            self.unknown.update(walk.unknown)
        return max(walk.peak for walk in walks)

    def _rounds(self, operation: tf.Operation, condition: Any) -> int:
        """How often a loop runs: the least bound that its condition names and that is known."""
        positions = {id(tensor): index for index, tensor in enumerate(condition.inputs)}
        bounds = []
        for inner in condition.get_operations():
            counts = inner.type in ("Less", "LessEqual") and inner.inputs[0].dtype.is_integer
            if counts and id(inner.inputs[0]) in positions:
                end = inner.inputs[1]
                bounds.append(
                    self._known(operation.inputs[positions[id(end)]] if id(end) in positions else end)
                )
        known = [int(bound) for bound in bounds if bound is not None and 0 < bound < 2**31 - 1]
        if not known:
            self.unknown[operation.name] = None
        self._loops[operation.name] = min(known, default=1)
        return self._loops[operation.name]

    def _known(self, tensor: Any) -> int | None:
        """A number that is known before anything runs: also how often the forward loop was passed."""
        while tensor.op.type in ALIASES:
            tensor = tensor.op.inputs[0]
        return self._loops.get(tensor.op.name, tf.get_static_value(tensor))


def _needed(graph: Any) -> list[tf.Operation]:
    """Those that are run, in the order in which they were made: gradients that nobody reads are not."""
    waiting = [tensor.op for tensor in graph.outputs] + list(graph.control_outputs)
    found = set()
    while waiting:
        operation = waiting.pop()
        if operation.name not in found:
            found.add(operation.name)
            waiting += [*(tensor.op for tensor in operation.inputs), *operation.control_inputs]
    return [operation for operation in graph.get_operations() if operation.name in found]


def _owner(tensor: Any) -> int:
    """The tensor in whose memory this one lies."""
    while tensor.op.type in ALIASES:
        tensor = tensor.op.inputs[tensor.value_index if tensor.op.type == "IdentityN" else 0]
    return id(tensor)


def _bytes(tensor: Any) -> int:
    return (
        0 if tensor.dtype in (tf.resource, tf.variant, tf.string) else tensor.dtype.size * _elements(tensor)
    )


def _elements(tensor: Any) -> int:
    return math.prod(size or 1 for size in tensor.shape) if tensor.shape.rank is not None else 1


def _product(operation: tf.Operation) -> float:
    left, transposed = operation.inputs[0], "transpose_a" if operation.type == "MatMul" else "adj_x"
    summed = left.shape[-2] if operation.get_attr(transposed) else left.shape[-1]
    return 2.0 * _elements(operation.outputs[0]) * (summed or 1)


def _convolution(one: Any, kernel: Any, depthwise: bool) -> float:
    """Each value of the convolution's output, `one`, sums a kernel's worth of products."""
    channels = (kernel.shape[-1] or 1) * ((kernel.shape[-2] or 1) if depthwise else 1)
    return 2.0 * _elements(one) * _elements(kernel) / channels


def _einsum(operation: tf.Operation) -> float:
    terms = operation.get_attr("equation").decode().split("->")[0].split(",")
    sizes: dict[Any, int] = {}
    for term, tensor in zip(terms, operation.inputs, strict=True):
        named = len(term.replace("...", ""))
        left, dots, right = term.partition("...")
        broadcast = [-index for index in range(len(tensor.shape) - named, 0, -1)] if dots else []
        for label, size in zip([*left, *broadcast, *right], tensor.shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), size or 1)
    return 2.0 * math.prod(sizes.values())


def _convolutions(name: str) -> dict[str, Callable[[tf.Operation], float]]:
    """Forward, and the gradients of input and kernel, which sum the same products."""
    depth = name.startswith("Depthwise")
    found: dict[str, Callable[[tf.Operation], float]] = {
        name: lambda op: _convolution(op.outputs[0], op.inputs[1], depth)
    }
    for version in ("", "V2"):
        found[f"{name}BackpropInput{version}"] = lambda op: _convolution(op.inputs[2], op.inputs[1], depth)
        found[f"{name}BackpropFilter{version}"] = lambda op: _convolution(op.inputs[2], op.outputs[0], depth)
    return found


FLOPS: dict[str, Callable[[tf.Operation], float]] = {
    **dict.fromkeys(("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), _product),
    **_convolutions("Conv2D"),
    **_convolutions("Conv3D"),
    **_convolutions("DepthwiseConv2dNative"),
    "Einsum": _einsum,
}
