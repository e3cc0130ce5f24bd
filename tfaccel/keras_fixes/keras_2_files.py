"""Keras 3 can't load `.h5` files of Keras 2 with a depthwise convolution: they say `groups=1`.

Keras 2 wrote the `groups` of every convolution, and Keras 3's `DepthwiseConv2D` and `DepthwiseConv1D` have no
such argument (keras-team/keras#19441): "Unrecognized keyword arguments passed to DepthwiseConv2D:
{'groups': 1}". MobileNets are full of them.

Smallest reproduction (Keras 3.15.1):

    config = keras.layers.DepthwiseConv2D(3).get_config() | {"groups": 1}
    keras.layers.DepthwiseConv2D.from_config(config)         # ValueError

The fix: one group is no grouping, so the argument is left out; other values still raise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import keras

from tfaccel.keras_fixes.patch import Patch, all_active


def _without_groups(original: Callable, setting: Callable[[], Any]) -> Callable:
    # Keras reads this signature to pack the arguments, and fails on `*args`; a config names them all.
    def __init__(self: Any, kernel_size: Any, strides: Any = 1, **kwargs: Any) -> None:
        if setting() and kwargs.get("groups") == 1:
            del kwargs["groups"]
        original(self, kernel_size, strides, **kwargs)

    return __init__


_PATCHES = tuple(
    Patch(layer, "__init__", _without_groups)
    for layer in (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
)


def loading_keras_2() -> contextlib.AbstractContextManager[None]:
    """Lets this thread load models that Keras 2 saved while the block lasts."""
    return all_active(_PATCHES, True)
