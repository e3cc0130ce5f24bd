"""A Keras model as one function of flat, named inputs: what a converter takes and a comparison calls."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.export.errors import ExportError
from tfaccel.export.operations import Scopes, noting_scopes
from tfaccel.export.samples import Samples, clean_name
from tfaccel.keras_fixes.inner_layers import inner_layers
from tfaccel.keras_fixes.lite_operations import composed_for_lite
from tfaccel.learned_ranges import take_off_leftovers


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
        take_off_leftovers(model)
        self.model = model
        self._signature = input_signature
        self.structure = input_signature if input_signature is not None else _inputs_of(model)
        self.states = _states_of(model)
        if self.states:  # one row of them for each sample
            batch_size = int(self.states[0].shape[0])
        self.batch_size = batch_size
        self.specs = _name_inputs(self.structure, batch_size)
        self.scopes = Scopes()
        self.outputs: dict[str, Any] = {}
        self._output_structure: Any = None
        self._same: list[str] = []  # outputs that are one tensor
        self._concrete: Any = None

    def call(self, *flat: tf.Tensor) -> dict[str, tf.Tensor]:
        """The model's outputs by name, at inference."""
        outputs = self.model(keras.tree.pack_sequence_as(self.structure, list(flat)), training=False)
        self._output_structure = keras.tree.map_structure(lambda _: 0, outputs)
        named = _name_outputs(outputs)
        tensors = [id(tensor) for tensor in named.values()]
        self._same = [name for name, tensor in named.items() if tensors.count(id(tensor)) > 1]
        return named

    def in_structure(self, outputs: dict[str, np.ndarray]) -> Any:
        """Outputs by name as the model itself gives them: one array, a list, a dict."""
        return keras.tree.pack_sequence_as(self._output_structure, list(outputs.values()))

    def trace(self) -> None:
        """Makes the function that `predict` calls, if it isn't there yet.

        Raises:
            ValueError: The model can't be called with the signature that was given.
            ExportError: It keeps something from call to call that a file would not.
        """
        if self._concrete is not None:
            return
        function = tf.function(self.call, input_signature=self.specs)
        try:
            concrete = function.get_concrete_function()
        except (TypeError, ValueError) as error:
            if self._signature is None:
                raise
            last = str(error).strip().splitlines()[-1].strip()
            raise ValueError(
                f"{self.model.name!r} can't be called with input_signature={self._signature!r}: {last} "
                "Allowed: a tf.TensorSpec for each input, batch axis included, nested as call() takes them. "
                'Pass e.g. [tf.TensorSpec([None, 28, 28, 1], "float32")].'
            ) from error
        self._check_that_nothing_is_kept(concrete)
        self._concrete = concrete

    def check_outputs_are_several(self) -> None:
        """Raises ValueError where one tensor is given back twice: a quantized file would lose one of them."""
        self.trace()
        if self._same:
            raise ValueError(
                f"The outputs {' and '.join(self._same)} are one tensor, which a quantized file can't hold. "
                "Allowed: each tensor once, or 'float32'. Give it back once, and use it twice behind the "
                "file."
            )

    def _check_that_nothing_is_kept(self, concrete: Any) -> None:
        inside = {id(inner): outer for outer, inner in concrete.graph.captures}
        assigned = {
            id(inside.get(id(operation.inputs[0])))
            for operation in concrete.graph.get_operations()
            if operation.type.startswith("Assign") and operation.type.endswith("VariableOp")
        }
        known = {id(state) for state in self.states}
        kept = [
            each.path
            for each in self.model.non_trainable_variables
            if id(each) not in known and id(getattr(each.value, "handle", None)) in assigned
        ]
        if kept:
            raise ExportError(
                f"{self.model.name!r} changes {', '.join(kept)} when it is called at inference, which a file "
                "would not. Nothing was written. Allowed: the states of recurrent layers. Change it in "
                "training only, or make it an input and an output."
            )

    def predict(self, samples: Samples, batch_size: int = 64) -> dict[str, np.ndarray]:
        """The model's outputs for all rows, by name, as float32 or integers; states begin at zero."""
        self.trace()
        kept = [keras.ops.convert_to_numpy(state) for state in self.states]
        try:
            for state in self.states:
                state.assign(keras.ops.zeros_like(state))
            batches = samples.batches(self.batch_size or batch_size)
            parts = [self._concrete(*map(tf.constant, batch)) for batch in batches]
        finally:
            for state, value in zip(self.states, kept, strict=True):
                state.assign(value)
        return {name: np.concatenate([_as_numpy(part[name]) for part in parts]) for name in parts[0]}

    def save(self, directory: str, values: list[np.ndarray] | None = None) -> None:
        """Writes a SavedModel with the signature `serving_default`, and notes whose operations are whose.

        The weights go in as copies with names of their own. Saving the model's variables fails on
        layer names with a leading underscore or a dot, with an error about "root scope names" or,
        where Keras's layers are tracked, "'NoneType' object is not callable". The states of stateful
        layers become variables of the file, zero at the start.

        Args:
            directory: Where it goes.
            values: Of the weights, trainable ones first; default the model's own.
        """
        module = tf.Module()
        variables = self.model.trainable_variables + self.model.non_trainable_variables
        module.copies = _copies(variables if values is None else values)
        module.states = [tf.Variable(tf.zeros(state.shape, state.dtype)) for state in self.states]

        def call(*flat: tf.Tensor) -> dict[str, tf.Tensor]:
            values = [tf.convert_to_tensor(copy) for copy in [*module.copies, *module.states]]
            mapping = list(zip([*variables, *self.states], values, strict=True))
            # A layer name may not stand at the root of the graph if it begins with an underscore.
            with (
                keras.StatelessScope(state_mapping=mapping) as scope,
                tf.name_scope("model"),
                noting_scopes(self.model) as self.scopes,
                composed_for_lite(),
            ):
                self.outputs = self.call(*flat)
            for state, kept in zip(self.states, module.states, strict=True):
                kept.assign(scope.get_current_value(state))
            return self.outputs

        try:
            concrete = tf.function(call, input_signature=self.specs).get_concrete_function()
            tf.saved_model.save(module, directory, signatures={"serving_default": concrete})
        except AssertionError as error:  # TensorFlow's, about a resource that is not the module's
            tables = [layer.name for layer in inner_layers(self.model) if hasattr(layer, "lookup_table")]
            raise ExportError(
                f"{', '.join(tables) or self.model.name} can't be converted: it looks values up in a table, "
                "which LiteRT has for strings only. Nothing was written. Look up before the model, and "
                "export what comes behind."
            ) from error


def _states_of(model: keras.Model) -> list[keras.Variable]:
    """What stateful recurrent layers keep from call to call."""
    stateful = [layer for layer in inner_layers(model) if getattr(layer, "stateful", False)]
    return [state for layer in stateful for state in keras.tree.flatten(getattr(layer, "states", None) or [])]


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
    if not all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves):
        raise ValueError(
            f"input_signature={structure!r} does not tell the inputs. Allowed: nested tf.TensorSpec, with "
            'the batch axis. Pass e.g. [tf.TensorSpec([None, 28, 28, 1], "float32")].'
        )
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


def _copies(weights: list[Any]) -> list[tf.Variable]:
    values = [keras.ops.convert_to_numpy(weight) for weight in weights]
    return [tf.Variable(value, trainable=False, name=f"weight_{i}") for i, value in enumerate(values)]


def _as_numpy(tensor: tf.Tensor) -> np.ndarray:
    return tf.cast(tensor, tf.float32).numpy() if tensor.dtype.is_floating else tensor.numpy()
