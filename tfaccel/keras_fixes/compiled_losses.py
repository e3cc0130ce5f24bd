"""Keras has no public way to ask which loss, with which weight, `compile` gave to which output.

Smallest reproduction (Keras 3.15.1): `model.compile(loss={"a": "mse"}, loss_weights={"a": 0.5})`; behind it
`model.loss` is the dict that was passed, `"mse"` a string in it, and the weights are in no public attribute.
`_compile_loss` has them resolved, from the first time on that it was called.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import keras


@dataclasses.dataclass(frozen=True)
class OutputLoss:
    """What one output is trained with.

    Args:
        path: Keys and indices that lead to the output.
        loss: Of labels and the output.
        weight: In the sum over all outputs.
    """

    path: tuple
    loss: keras.losses.Loss
    weight: float

    def output_of(self, outputs: Any, names: list[str]) -> Any:
        """The output among what a model gives; by its name, where losses were given by names."""
        by_name = self.path and self.path[0] in names and not isinstance(outputs, dict)
        if by_name:
            flat = outputs if isinstance(outputs, list | tuple) else [outputs]
            outputs = dict(zip(names, flat, strict=True))
        for key in self.path:
            outputs = outputs[key]
        return outputs


def compiled_losses(model: keras.Model) -> list[OutputLoss]:
    """The losses of a model whose compiled loss has been called; none, if it never is."""
    resolved = getattr(model._compile_loss, "_flat_losses", None) or []
    return [
        OutputLoss(each.path, each.loss, 1.0 if each.loss_weights is None else each.loss_weights)
        for each in resolved
    ]
