"""A Keras model as one function of flat, named inputs: what a converter takes and a comparison calls."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.export.samples import Samples, clean_name


class ServingFunction:
    """The model at inference, with an open batch size, inputs by position and outputs by name.

    Args:
        model: A built model.
        input_signature: Nested `tf.TensorSpec` or `keras.InputSpec` of the inputs, batch axis
            included; None asks the model.
        batch_size: Of the inputs; None leaves it open.

    Raises:
        ValueError: The model is not built, or does not tell its inputs.
    """

    def __init__(self, model: keras.Model, input_signature: Any = None, batch_size: int | None = None):
        if not isinstance(model, keras.Model):
            raise ValueError(
                f"model={type(model).__name__} can't be exported. Allowed: a keras.Model (Sequential, "
                "Functional or subclassed). Load the file with keras.models.load_model first."
            )
        if not model.built:
            raise ValueError(
                f"{model.name!r} is not built. Allowed: a model with weights. Call it on a batch, or "
                "train it, first."
            )
        self.model = model
        self.structure = input_signature if input_signature is not None else _inputs_of(model)
        self.specs = _name_inputs(self.structure, batch_size)
        self._concrete: Any = None

    def _call(self, *flat: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = self.model(keras.tree.pack_sequence_as(self.structure, list(flat)), training=False)
        return _name_outputs(outputs)

    def predict(self, samples: Samples, batch_size: int = 64) -> dict[str, np.ndarray]:
        """The model's outputs for all rows, by name, as float32 or integers."""
        if self._concrete is None:
            function = tf.function(self._call, input_signature=self.specs)
            self._concrete = function.get_concrete_function()
        parts = [self._concrete(*map(tf.constant, b)) for b in samples.batches(batch_size)]
        return {name: np.concatenate([_as_numpy(part[name]) for part in parts]) for name in parts[0]}

    def save(self, directory: str) -> None:
        """Writes a SavedModel with the signature `serving_default`.

        The weights go in as copies with names of their own. Saving the model's variables fails on
        layer names with a leading underscore or a dot, with an error about "root scope names" or,
        where Keras's layers are tracked, "'NoneType' object is not callable".
        """
        module = tf.Module()
        variables = self.model.trainable_variables + self.model.non_trainable_variables
        module.copies = _copies(variables)

        def call(*flat: tf.Tensor) -> dict[str, tf.Tensor]:
            values = [tf.convert_to_tensor(copy) for copy in module.copies]
            mapping = list(zip(variables, values, strict=True))
            # A layer name may not stand at the root of the graph if it begins with an underscore.
            with keras.StatelessScope(state_mapping=mapping), tf.name_scope("model"):
                return self._call(*flat)

        concrete = tf.function(call, input_signature=self.specs).get_concrete_function()
        tf.saved_model.save(module, directory, signatures={"serving_default": concrete})


def _inputs_of(model: keras.Model) -> Any:
    if isinstance(model, keras.Sequential):
        return model.inputs[0]
    if getattr(model, "inputs", None):
        return model.input
    # A subclassed model only remembers the shapes that it was built with.
    shape = (model.get_build_config() or {}).get("input_shape")
    if shape is None or not all(size is None or isinstance(size, int) for size in shape):
        raise ValueError(
            f"{model.name!r} does not tell its inputs: it is a subclassed model. Allowed: a model with "
            "one input tensor, or input_signature=. Pass e.g. "
            'input_signature=[tf.TensorSpec([None, 28, 28, 1], "float32")], nested as call() takes it.'
        )
    return tf.TensorSpec([None, *shape[1:]], keras.config.floatx())


def _name_inputs(structure: Any, batch_size: int | None) -> list[tf.TensorSpec]:
    leaves = keras.tree.flatten(structure)
    names = [getattr(leaf, "name", None) or f"input_{i}" for i, leaf in enumerate(leaves)]
    if isinstance(structure, dict) and len(structure) == len(leaves):
        names = sorted(structure)  # the order in which keras.tree flattens a dict
    return [
        tf.TensorSpec([batch_size, *tuple(leaf.shape)[1:]], leaf.dtype, name=name)
        for leaf, name in zip(leaves, _unique(names), strict=True)
    ]


def _name_outputs(outputs: Any) -> dict[str, tf.Tensor]:
    leaves = keras.tree.flatten(outputs)
    names = [f"output_{i}" for i in range(len(leaves))]
    if isinstance(outputs, dict) and len(outputs) == len(leaves):
        names = sorted(outputs)
    return dict(zip(_unique(names), leaves, strict=True))


def _unique(names: list[str]) -> list[str]:
    cleaned = [clean_name(name) for name in names]
    return [n if cleaned.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(cleaned)]


def _copies(variables: list[keras.Variable]) -> list[tf.Variable]:
    values = [keras.ops.convert_to_numpy(variable) for variable in variables]
    return [tf.Variable(value, trainable=False, name=f"weight_{i}") for i, value in enumerate(values)]


def _as_numpy(tensor: tf.Tensor) -> np.ndarray:
    return tf.cast(tensor, tf.float32).numpy() if tensor.dtype.is_floating else tensor.numpy()
