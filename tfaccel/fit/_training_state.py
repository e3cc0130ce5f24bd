"""What a trial run on a user's own model has to put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras


@contextlib.contextmanager
def training_state_kept(model: keras.Model) -> Iterator[None]:
    """Puts back, behind the block, weights, seeds, the optimizer's state, metrics and `model.history`.

    Args:
        model: Built and compiled.
    """
    optimizer = model.optimizer
    with model.distribute_strategy.scope():
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
    variables = {id(each): each for each in (*model.variables, *optimizer.variables)}
    before = [(each, keras.ops.convert_to_numpy(each)) for each in variables.values()]
    attributes = {name: getattr(model, name, None) for name in ("history", "stop_training")}
    try:
        yield
    finally:
        model.reset_metrics()
        for each, value in before:
            each.assign(value)
        for name, value in attributes.items():
            setattr(model, name, value)
