"""Keras has no public way to list the layers inside of a layer: `Model.layers` stops at the first level.

Smallest reproduction (Keras 3.15.1): `keras.layers.Bidirectional(keras.layers.GRU(3)).layers` raises
AttributeError, and so does `keras.layers.MultiHeadAttention(2, 4).layers`; `layer._flatten_layers()` lists
what is inside of both.
"""

from __future__ import annotations

import keras


def inner_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layer itself and all layers inside of it, at every depth, each once."""
    return layer._flatten_layers()


def held_alone(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The variables that a layer holds by itself, and no layer inside of it."""
    inside = {id(v) for other in inner_layers(layer) if other is not layer for v in other.variables}
    return [v for v in layer.variables if id(v) not in inside]
