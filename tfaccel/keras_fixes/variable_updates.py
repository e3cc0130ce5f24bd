"""A Keras optimizer has one learning rate for all variables, and no public seam for more than one.

`update_step(gradient, variable, learning_rate)` can be replaced on the object; but weight decay, which comes
before it, asks the optimizer for its own learning rate, and a fused update has to stand at that very place.
`keras.optimizers.MultiOptimizer` gives layers whole optimizers instead, each with a clipping and a count of
its own, and no learning-rate callback can drive it.

Smallest reproduction (Keras 3.15.1): no argument of `keras.optimizers.AdamW(0.1)` lets a kernel be updated,
and decay, at 0.1 and another one at 0.01.

The seam: `_backend_update_step` is where `apply` hands the learning rate to `update_step`, whichever is on
the object by then, so that is wrapped while it runs (calling it once for each factor would be wrong: Nadam
counts its calls); `_apply_weight_decay` takes a list of variables, and is called once for each factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras


def scale_learning_rates(
    optimizer: keras.optimizers.Optimizer, factors: Mapping[int, float]
) -> Callable[[], None]:
    """Updates variables at a multiple of the learning rate, weight decay with it; gives back the undo.

    Args:
        optimizer: The one that updates weights, not a `LossScaleOptimizer`. Trace its step anew.
        factors: By the `id` of the model's variables; all others keep the learning rate.
    """
    update_all, decay = optimizer._backend_update_step, optimizer._apply_weight_decay
    by_key: dict[str, float] = {}
    # Replicas are traced in turn, in threads: what is changed on the object meanwhile is not read again.
    whole_decay = optimizer.weight_decay

    def update_scaled(grads: Any, trainable_variables: Any, learning_rate: Any) -> None:
        by_key.update({optimizer._var_key(v): factors.get(id(v), 1.0) for v in trainable_variables})
        shadowed, update = vars(optimizer).get("update_step"), optimizer.update_step
        if isinstance(update, _Scaled):  # put there by another replica, which waits for this one
            update_all(grads, trainable_variables, learning_rate)
            return
        optimizer.update_step = _Scaled(lambda variable: by_key[optimizer._var_key(variable)], update)
        try:
            update_all(grads, trainable_variables, learning_rate)
        finally:
            del optimizer.update_step
            if shadowed is not None:
                optimizer.update_step = shadowed

    def decay_scaled(variables: Iterable[Any]) -> None:
        groups: dict[float, list[Any]] = {}
        for variable in variables:
            groups.setdefault(factors.get(id(variable), 1.0), []).append(variable)
        for factor, group in groups.items():
            optimizer.weight_decay = None if whole_decay is None else whole_decay * factor
            try:
                decay(group)
            finally:
                optimizer.weight_decay = whole_decay

    def undo() -> None:
        del optimizer._backend_update_step, optimizer._apply_weight_decay

    optimizer._backend_update_step, optimizer._apply_weight_decay = update_scaled, decay_scaled
    return undo


class _Scaled:
    """`update_step` at a multiple of the learning rate."""

    def __init__(self, factor: Callable[[Any], float], update: Callable[..., Any]):
        self._factor, self._update = factor, update

    def __call__(self, gradient: Any, variable: Any, learning_rate: Any) -> Any:
        """The update of one variable."""
        factor = self._factor(variable)
        return self._update(gradient, variable, learning_rate if factor == 1 else learning_rate * factor)


def unknown_variables(
    optimizer: keras.optimizers.Optimizer, variables: Iterable[keras.Variable]
) -> list[keras.Variable]:
    """Those that a built optimizer has no state for: it raises where it is to update them."""
    known = optimizer._trainable_variables_indices
    return [each for each in variables if optimizer._var_key(each) not in known]
