"""A Keras model as one function of flat, named inputs: what a converter takes and a comparison calls."""

from __future__ import annotations

import re
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.export.errors import ExportError
from tfaccel.export.samples import Samples


class ServingFunction:
    """The model at inference, with an open batch size, inputs by position and outputs by name.

    Args:
        model: A built model.
        input_signature: Nested `tf.TensorSpec` or `keras.InputSpec` of the inputs, batch axis
            included; None asks the model.

    Raises:
        ValueError: The model is not built, or does not tell its inputs.
    """

    def __init__(self, model: keras.Model, input_signature: Any = None):
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
        self.specs = _name_inputs(keras.tree.flatten(self.structure))
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


def _name_inputs(leaves: list[Any]) -> list[tf.TensorSpec]:
    specs, taken = [], set()
    for index, leaf in enumerate(leaves):
        name = _clean(getattr(leaf, "name", None) or f"input_{index}")
        name = name if name not in taken else f"{name}_{index}"
        taken.add(name)
        specs.append(tf.TensorSpec([None, *tuple(leaf.shape)[1:]], leaf.dtype, name=name))
    return specs


def _name_outputs(outputs: Any) -> dict[str, tf.Tensor]:
    if isinstance(outputs, dict):
        return {_clean(name): value for name, value in outputs.items()}
    return {f"output_{i}": value for i, value in enumerate(keras.tree.flatten(outputs))}


def _copies(variables: list[keras.Variable]) -> list[tf.Variable]:
    values = [keras.ops.convert_to_numpy(variable) for variable in variables]
    return [tf.Variable(value, trainable=False, name=f"weight_{i}") for i, value in enumerate(values)]


def _clean(name: str) -> str:
    """A name that a SavedModel argument may have."""
    cleaned = re.sub(r"\W", "_", name).lstrip("_")
    return cleaned if cleaned and not cleaned[0].isdigit() else f"input_{cleaned}"


def _as_numpy(tensor: tf.Tensor) -> np.ndarray:
    return tf.cast(tensor, tf.float32).numpy() if tensor.dtype.is_floating else tensor.numpy()


def float32_twin(model: keras.Model, samples: Samples | None = None) -> keras.Model:
    """A copy of `model` that computes in float32 with the same weights; `model` itself if it does.

    The converter has no kernels for float16 or bfloat16 graphs (tensorflow/tensorflow#46380). The
    weights of a mixed-precision model are float32 already: only the computation changes.

    Raises:
        ExportError: The model can't be made again from its config.
    """
    layers = _all_layers(model)
    if all(layer.compute_dtype in ("float32", None) for layer in layers):
        return model
    custom = {type(layer).__name__: type(layer) for layer in layers}
    previous = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("float32")
        with keras.saving.custom_object_scope(custom):
            twin = type(model).from_config(_in_float32(model.get_config()))
        if not twin.built and samples is not None:
            twin(*(array[:1] for array in samples.inputs))
        twin.set_weights(model.get_weights())
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ExportError(
            f"{model.name!r} computes in half precision, which TFLite can't, and a float32 copy could "
            "not be made from its config. Give the model a get_config(), or build it under "
            f'precision="float32" and load the weights. ({error})'
        ) from error
    finally:
        keras.config.set_dtype_policy(previous)
    return twin


def _all_layers(model: keras.Model) -> list[keras.layers.Layer]:
    found, queue = [], [model]
    while queue:
        layer = queue.pop()
        found.append(layer)
        queue.extend(getattr(layer, "layers", []))
    return found


def _in_float32(config: Any) -> Any:
    """The config with every serialised dtype policy replaced by float32."""
    if isinstance(config, dict):
        if config.get("class_name") == "DTypePolicy":
            return {**config, "config": {**config["config"], "name": "float32"}}
        return {key: _in_float32(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return type(config)(_in_float32(value) for value in config)
    return config
