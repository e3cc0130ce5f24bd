"""What a training step needs in memory, told from its traced graph before anything is run.

When to use: before a batch size is chosen, or a machine rented. Weights and the optimizer's state do not
depend on the batch; what the forward pass keeps for the backward pass does, and is most of it for
convolutional nets.

Reference: `benchmarks/memory_estimate.py` holds it against what processes were seen to use.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import keras
import tensorflow as tf

from tfaccel.errors import is_whole, refuse
from tfaccel.free_memory import free_gpu_memory_bytes, free_memory_bytes
from tfaccel.keras_fixes.first_batch import build_state, input_structure
from tfaccel.step_graph import step_cost

UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes, by what they are for.

    Args:
        batch_size: Samples a step, of one device.
        weights: Of the model, those that are not trained among them.
        optimizer: Its slots and counters.
        gradients: Of the trainable weights.
        activations: The batch, what the forward pass keeps for the backward pass, and temporary values, at
            the moment when most is there.
        flops: Floating point operations of the step's matrix products and convolutions.
        unknown: Names of operations whose sizes are not known before they run; they count as one row.

    Example:
        >>> estimate = tfaccel.MemoryEstimate(32, 4_000_000, 8_000_000, 4_000_000, 84_000_000)
        >>> estimate.total
        100000000
        >>> print(estimate)
        100 MB at batch size 32: weights 4 MB, optimizer 8 MB, gradients 4 MB, activations 84 MB
    """

    batch_size: int
    weights: int
    optimizer: int
    gradients: int
    activations: int
    flops: float = 0.0
    unknown: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """All of it, bytes."""
        return self.weights + self.optimizer + self.gradients + self.activations

    def __str__(self) -> str:
        """One line for a person."""
        parts = ", ".join(
            f"{name} {shown_bytes(getattr(self, name))}"
            for name in ("weights", "optimizer", "gradients", "activations")
        )
        line = f"{shown_bytes(self.total)} at batch size {self.batch_size}: {parts}"
        if self.unknown:
            line += f"; without what {len(self.unknown)} operations of unknown size need ({self.unknown[0]})"
        return line


def estimate_memory(model: keras.Model, batch_size: int = 32, dataset: Any = None) -> MemoryEstimate:
    """Estimates what a training step needs in memory on one device; nothing is trained.

    The step is traced for the batch size and its tensors are followed from the operation that makes them to
    the last one that reads them. Not in it: the data set, TensorFlow itself (some 400 MB of a process), what
    kernels need for themselves, and what XLA saves or adds.

    Args:
        model: Compiled. Its optimizer is built, as its first `fit` would do.
        batch_size: Samples a step, of one device. Default 32.
        dataset: What `fit` gets: arrays as `(x, y)`, a batched `tf.data.Dataset` or a `PyDataset`, for the
            shapes of inputs and labels. Left out, they are those of the model's inputs, and the loss is a
            mean square.

    Returns:
        Bytes of weights, optimizer, gradients and activations.

    Raises:
        ValueError: A bad argument; a model that is not compiled; without `dataset`, a model whose inputs'
        shapes
            are not known.

    Example:
        >>> model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(1000)])
        >>> model.compile("adam", "mse")
        >>> estimate = tfaccel.estimate_memory(model, 64)
        >>> estimate.weights == 4 * 101_000
        True

    Reference:
        `tfaccel.step_graph` has the rules; `benchmarks/memory_estimate.py` the test against measured peaks.
    """
    if not isinstance(model, keras.Model) or not model.compiled or model.optimizer is None:
        name = getattr(model, "name", model)
        raise refuse(
            "model", name, "a compiled keras.Model", "Compile it with the optimizer that you train with."
        )
    if not is_whole(batch_size, 1):
        raise refuse("batch_size", batch_size, "an integer ≥ 1", "Give that of one device.")
    if dataset is None:
        batch, step = _input_specification(model, int(batch_size)), functools.partial(_stand_in_step, model)
    else:
        batch, step = batch_specification(dataset, int(batch_size)), functools.partial(_own_step, model)
        build_state(model, batch)
    if not model.optimizer.built and model.built:
        with model.distribute_strategy.scope():
            model.optimizer.build(model.trainable_variables)
    cost = step_cost(step, batch)
    gradients = _bytes(model.trainable_variables)
    return MemoryEstimate(
        int(batch_size),
        _bytes(model.variables),
        _bytes(model.optimizer.variables),
        gradients,
        max(cost.peak_bytes - gradients, 0),
        cost.flops,
        cost.unknown,
    )


def batch_specification(dataset: Any, batch_size: int) -> Any:
    """Shapes and types of one batch of what `fit` gets, as `tf.TensorSpec`s.

    Args:
        dataset: Arrays as `(x, y)`, a batched `tf.data.Dataset` or a `PyDataset`.
        batch_size: Rows.

    Raises:
        ValueError: Anything else, or ragged or sparse batches.
    """
    if isinstance(dataset, tf.data.Dataset):
        form = dataset.element_spec
    elif isinstance(dataset, keras.utils.PyDataset):
        form = dataset[0]
    elif isinstance(dataset, tuple):
        form = dataset
    else:
        allowed = "arrays as (x, y), a tf.data.Dataset or a keras.utils.PyDataset"
        raise refuse("dataset", type(dataset).__name__, allowed, "Leave it out for the model's own inputs.")

    def to_spec(leaf: Any) -> tf.TensorSpec:
        if not hasattr(leaf, "shape") or isinstance(leaf, tf.RaggedTensorSpec | tf.SparseTensorSpec):
            raise refuse(
                "dataset", type(leaf).__name__, "dense batches", "Their size is not known before they come."
            )
        shape, dtype = tuple(leaf.shape), tf.as_dtype(leaf.dtype)
        # Keras casts arrays, and not what a tf.data pipeline gives.
        cast = dtype.is_floating and not isinstance(leaf, tf.TensorSpec)
        return tf.TensorSpec(
            [batch_size, *shape[1:]] if shape else [], keras.config.floatx() if cast else dtype
        )

    return keras.tree.map_structure(to_spec, form, none_is_leaf=False)


def _input_specification(model: keras.Model, batch_size: int) -> Any:
    inputs = input_structure(model)
    shapes = [tuple(leaf.shape) for leaf in keras.tree.flatten(inputs)] if inputs is not None else []
    if not shapes or any(None in shape[1:] for shape in shapes):
        raise refuse(
            f"the shape of the inputs of {model.name!r}",
            shapes or None,
            "known sizes behind the batch",
            "Pass dataset=, whose batches have them.",
        )
    return keras.tree.map_structure(
        lambda leaf: tf.TensorSpec([batch_size, *leaf.shape[1:]], leaf.dtype), inputs
    )


def _own_step(model: keras.Model, batch: Any) -> Any:
    """What `fit` runs; without the update under a strategy, which would wait for the other replicas."""
    if not tf.distribute.has_strategy() and model.distribute_strategy.num_replicas_in_sync == 1:
        return model.train_step(batch)
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x=x, y=y, y_pred=model(x, training=True), sample_weight=sample_weight)
    return tape.gradient(loss, model.trainable_weights)


def _stand_in_step(model: keras.Model, x: Any) -> Any:
    """A step with a loss for outputs of any shape, without labels."""
    with tf.GradientTape() as tape:
        outputs = keras.tree.flatten(model(x, training=True))
        terms = [*(keras.ops.mean(keras.ops.square(each)) for each in outputs), *model.losses]
        loss = sum(keras.ops.cast(term, "float32") for term in terms)
    gradients = tape.gradient(loss, [each.value for each in model.trainable_variables])
    if model.distribute_strategy.num_replicas_in_sync == 1:
        model.optimizer.apply(gradients, model.trainable_variables)
    return gradients


def shown_bytes(size: float) -> str:
    """With three digits and a unit of thousands: "84 MB"."""
    power = min(int(math.log(max(size, 1), 1000)), len(UNITS) - 1)
    return f"{size / 1000**power:.3g} {UNITS[power]}"


def _bytes(variables: Any) -> int:
    return sum(math.prod(each.shape) * tf.as_dtype(each.dtype).size for each in variables)


def free_memory() -> float:
    """Bytes that one device has left: of the first GPU where there is one, else of the machine."""
    on_gpu = free_gpu_memory_bytes()
    return free_memory_bytes() if on_gpu is None else on_gpu
