"""A Keras model can't leave the strategy that it was built under, nor enter one.

Its variables and those of its optimizer belong to the scope in which they were made; so a model that came
from elsewhere, compiled and half trained, has to be built again by hand to train on several devices
(keras-team/keras#19891 and many like it).

Smallest reproduction (Keras 3.15.1):

    model.compile("adam", "mse")
    model.fit(x, y)
    with strategy.scope():
        model.fit(x, y)      # RuntimeError: Mixing different tf.distribute.Strategy objects

The fix: the model is built again from its configuration in the scope that is entered, compiled with what it
was compiled with, and given the value of every variable: weights, moving statistics, seeds, the optimizer's
slots and its count of steps.
"""

from __future__ import annotations

from typing import Any

import keras
from keras.src.models.functional import Functional


def rebuilt(model: keras.Model) -> keras.Model:
    """An equal model in the present scope; the old one stays as it is.

    Args:
        model: Built; compiled or not.

    Raises:
        ValueError: It is not built, or can't be made from its configuration.
    """
    if not model.built:
        raise ValueError(
            f"{model.name!r} has no variables yet. Allowed: a model that is built. Build it inside of the "
            "scope: there is nothing to move."
        )
    copy = _cloned(model)
    _assign(copy.variables, model.variables, model.name)
    if model.compiled:
        if type(model).compile is keras.Model.compile:
            copy.compile(**{name: _fresh(value) for name, value in model._compile_config.config.items()})
        else:
            copy.compile_from_config(model.get_compile_config())
        if getattr(model.optimizer, "built", False):
            _keep_exclusions(copy.optimizer, model.optimizer)
            copy.optimizer.build(copy.trainable_variables)
            _assign(copy.optimizer.variables, model.optimizer.variables, "optimizer")
    return copy


def _cloned(model: keras.Model) -> keras.Model:
    try:
        if isinstance(model, keras.Sequential | Functional):
            return keras.models.clone_model(model)
        copy = type(model).from_config(model.get_config())
        copy.build_from_config(model.get_build_config() or {})
    except (NotImplementedError, TypeError) as error:
        raise ValueError(
            f"{type(model).__name__} can't be built again from its configuration "
            f"({str(error).strip().splitlines()[0]}). Allowed: Sequential, functional, and subclasses whose "
            "get_config and from_config belong together. Write a get_config, or build the model inside of "
            "the scope and take over its weights."
        ) from error
    return copy


def _keep_exclusions(copy: Any, original: Any) -> None:
    """Takes over which variables don't decay, which no configuration says."""
    copy, original = (getattr(each, "inner_optimizer", each) for each in (copy, original))
    if getattr(original, "_exclude_from_weight_decay", None):
        raise ValueError(
            f"{type(original).__name__} excludes single variables from weight decay. Allowed: exclusion by "
            "name. Use exclude_from_weight_decay(var_names=[...])."
        )
    copy._exclude_from_weight_decay_pattern = getattr(original, "_exclude_from_weight_decay_pattern", None)


def _fresh(value: Any) -> Any:
    """What a model is compiled with, without the variables of optimizers and metrics."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, keras.optimizers.Optimizer | keras.metrics.Metric):
            return type(leaf).from_config(leaf.get_config())
        return leaf

    return keras.tree.map_structure(one, value, none_is_leaf=False)


def _assign(variables: list[Any], values: list[Any], name: str) -> None:
    shapes = [[tuple(v.shape) for v in each] for each in (variables, values)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{name!r} built from its configuration has {len(shapes[0])} variables, and other ones than the "
            f"{len(shapes[1])} that it has now. Allowed: a configuration that says everything. Complete its "
            "get_config, or build the model inside of the scope."
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(keras.ops.convert_to_numpy(value))
