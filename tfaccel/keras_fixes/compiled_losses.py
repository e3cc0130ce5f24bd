"""Keras has no public way to ask which loss, with which weight, `compile` gave to which output.

Smallest reproduction (Keras 3.15.1): `model.compile(loss={"a": "mse"}, loss_weights={"a": 0.5})`; behind it
`model.loss` is the dict that was passed, `"mse"` a string in it, and the weights are in no public attribute.
`_compile_loss` has them resolved, from the first time on that it was called.
"""

from __future__ import annotations

import dataclasses

import keras


@dataclasses.dataclass(frozen=True)
class OutputLoss:
    """What one output is trained with.

    Args:
        path: Keys and indices that lead to the output; of a list, names where the losses were given by name.
        loss: Of labels and the output.
        weight: In the sum over all outputs.
    """

    path: tuple
    loss: keras.losses.Loss
    weight: float


def compiled_losses(model: keras.Model) -> list[OutputLoss]:
    """The losses of a model whose compiled loss has been called; none, if it never is."""
    resolved = getattr(model._compile_loss, "_flat_losses", None) or []
    return [
        OutputLoss(each.path, each.loss, 1.0 if each.loss_weights is None else each.loss_weights)
        for each in resolved
    ]
