"""The layers of a model in the order of its depth, and what a selector means."""

from __future__ import annotations

from collections.abc import Iterator

import keras

from tfaccel.keras_fixes.inner_layers import held_alone, inner_layers
from tfaccel.selection import Selector, matches, no_match


def check_built(model: keras.Model) -> None:
    """Raises ValueError where a model has no weights to train, as it was not built yet."""
    if not model.trainable_variables:
        raise ValueError(
            f"{model.name!r} has no weights to train yet. Allowed: a built model. Give it a keras.Input, or "
            "call it on one batch before fit."
        )


def by_depth(model: keras.Model) -> list[list[keras.layers.Layer]]:
    """Groups of the layers that are trained, from the first to the last.

    A model inside of the model is opened; other layers are one each, whatever is inside of them. A layer
    without a kernel, such as a normalization, belongs to the one before it. Weights that a model holds by
    itself, such as positions, belong to the first group: the model stands in it for them.

    Args:
        model: A built model; of a subclassed one, layers come in the order in which they were made.
    """
    groups: list[list[keras.layers.Layer]] = []
    holders = []
    seen: set[int] = set()
    for layer in opened(model):
        if id(layer) in seen or not own_variables(layer):
            continue
        seen.add(id(layer))
        if isinstance(layer, keras.Model):
            holders.append(layer)
            continue
        if not groups or any(len(variable.shape) > 1 for variable in layer.trainable_variables):
            groups.append([])
        groups[-1].append(layer)
    if not holders:
        return groups
    return [[*holders, *groups[0]], *groups[1:]] if groups else [holders]


def opened(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """The model and its layers; models in it come before their own layers."""
    yield model
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from opened(layer)
        else:
            yield layer


def own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The variables to train that a member of a group stands for.

    Args:
        layer: Of a model those that it holds by itself, of another layer all that is inside of it.
    """
    if not isinstance(layer, keras.Model):
        return layer.trainable_variables
    alone = {id(v) for v in held_alone(layer)}
    return [v for v in layer.trainable_variables if id(v) in alone]


def chosen_layers(model: keras.Model, selector: Selector) -> list[keras.layers.Layer]:
    """The layers with weights to train that a selector means, those in one another left out.

    Raises:
        ValueError: There are none.
    """
    holders = [each for each in inner_layers(model)[1:] if each.trainable_variables]
    found = [layer for layer in holders if matches(selector, layer)]
    if not found:
        raise no_match(selector, (layer.name for layer in holders))
    inside = {id(each) for layer in found for each in inner_layers(layer)[1:]}
    return [layer for layer in found if id(layer) not in inside]
