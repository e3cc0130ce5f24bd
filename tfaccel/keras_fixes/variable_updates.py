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

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import tensorflow as tf

Factor = float | Callable[[], Any]
DECAYS = ("weight_decay", "adam_weight_decay")  # the second one is Muon's


def scale_learning_rates(
    optimizer: keras.optimizers.Optimizer, factors: Mapping[int, Factor], decay: bool = True
) -> Callable[[], None]:
    """Updates variables at a multiple of the learning rate; gives back the undo.

    Several may be on at a time, and come off in any order.

    Args:
        optimizer: The one that updates weights, not a `LossScaleOptimizer`. Trace its step anew.
        factors: By the `id` of the model's variables: numbers, or functions that give a tensor inside of the
            step. All others keep the learning rate.
        decay: Whether weight decay takes the multiple too; not for functions.
    """
    # Kept by what stands on the optimizer: a table would keep it alive, as factors may ask it.
    seam = getattr(vars(optimizer).get("_backend_update_step"), "seam", None) or _Seam(optimizer)
    entry = (dict(factors), decay)
    seam.entries.append(entry)

    def undo() -> None:
        seam.entries.remove(entry)
        if not seam.entries:
            seam.remove()

    return undo


class _Seam:
    """What stands in for the two steps of one optimizer."""

    def __init__(self, optimizer: keras.optimizers.Optimizer):
        self.entries: list[tuple[dict[int, Factor], bool]] = []
        reference: Callable[[], Any] = weakref.ref(optimizer)
        update_all, decay = optimizer._backend_update_step, optimizer._apply_weight_decay
        # Replicas are traced in turn, in threads: what is changed on the object meanwhile is not read again.
        decays = {name: getattr(optimizer, name, None) for name in DECAYS}
        rates = {name: rate for name, rate in decays.items() if rate is not None}

        def update_scaled(grads: Any, trainable_variables: Any, learning_rate: Any) -> None:
            optimizer = reference()
            shadowed, update = vars(optimizer).get("update_step"), optimizer.update_step
            if isinstance(update, _Scaled):  # put there by another replica, which waits for this one
                update_all(grads, trainable_variables, learning_rate)
                return
            made: dict[int, Any] = {}  # what functions gave: once in a step, not for each variable
            by_key = {optimizer._var_key(v): self._factor(v, made) for v in trainable_variables}
            optimizer.update_step = _Scaled(lambda variable: by_key[optimizer._var_key(variable)], update)
            try:
                update_all(grads, trainable_variables, learning_rate)
            finally:
                del optimizer.update_step
                if shadowed is not None:
                    optimizer.update_step = shadowed

        def decay_scaled(variables: Iterable[Any]) -> None:
            optimizer = reference()
            groups: dict[float, list[Any]] = {}
            for variable in variables:
                groups.setdefault(self._decay_factor(variable), []).append(variable)
            for factor, group in groups.items():
                try:
                    for name, rate in rates.items():
                        setattr(optimizer, name, rate * factor)
                    decay(group)
                finally:
                    for name, rate in rates.items():
                        setattr(optimizer, name, rate)

        update_scaled.seam = self  # type: ignore[attr-defined]
        optimizer._backend_update_step, optimizer._apply_weight_decay = update_scaled, decay_scaled
        self._optimizer = reference

    def _factor(self, variable: Any, made: dict[int, Any]) -> Any:
        factor: Any = 1.0
        for factors, _ in self.entries:
            own = factors.get(id(variable), 1.0)
            if callable(own):
                if id(own) not in made:
                    made[id(own)] = own()
                own = made[id(own)]
            factor = factor * own
        return factor

    def _decay_factor(self, variable: Any) -> float:
        factor = 1.0
        for factors, decay in self.entries:
            own = factors.get(id(variable), 1.0)
            factor *= own if decay and not callable(own) else 1.0
        return factor

    def remove(self) -> None:
        """Leaves the optimizer as it was."""
        optimizer = self._optimizer()
        if optimizer is not None:
            del optimizer._backend_update_step, optimizer._apply_weight_decay


class _Scaled:
    """`update_step` at a multiple of the learning rate."""

    def __init__(self, factor: Callable[[Any], Any], update: Callable[..., Any]):
        self._factor, self._update = factor, update

    def __call__(self, gradient: Any, variable: Any, learning_rate: Any) -> Any:
        """The update of one variable."""
        factor = self._factor(variable)
        same = isinstance(factor, float) and factor == 1
        return self._update(gradient, variable, learning_rate if same else learning_rate * factor)


def late_start(optimizer: keras.optimizers.Optimizer, start: int) -> Callable[[], Any]:
    """What Adam's bias correction lacks for variables whose moments began at zero at update `start`.

    Keras corrects all moments by `optimizer.iterations`. Moments that began later are further from their
    mean than it thinks: updates would be up to `1 / sqrt(1 - beta_2)` × (1 - beta_1) too large, 3 × by
    default at first and 6.5 × a little later.

    Args:
        optimizer: Adam, AdamW, or a subclass.
        start: The value of its `iterations`.
    """

    def correction(updates: Any) -> Any:
        beta_1, beta_2 = (tf.cast(beta, tf.float32) for beta in (optimizer.beta_1, optimizer.beta_2))
        return tf.sqrt(1 - beta_2**updates) / (1 - beta_1**updates)

    def factor() -> Any:
        updates = tf.cast(optimizer.iterations, tf.float32) + 1
        return correction(updates - start) / correction(updates)

    return factor


def has_moments(optimizer: keras.optimizers.Optimizer, variable: keras.Variable) -> bool:
    """Whether a built Adam has ever updated a variable."""
    second = optimizer._velocities[optimizer._get_variable_index(variable)]
    return bool(keras.ops.any(keras.ops.not_equal(second, 0)))


def unknown_variables(
    optimizer: keras.optimizers.Optimizer, variables: Iterable[keras.Variable]
) -> list[keras.Variable]:
    """Those that a built optimizer has no state for: it raises where it is to update them."""
    known = optimizer._trainable_variables_indices
    return [each for each in variables if optimizer._var_key(each) not in known]
