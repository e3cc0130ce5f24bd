"""The one place that attaches to, chains with and detaches from a model's weights.

`Variable.constraint` is the seam: Keras applies it inside the compiled step, right after the optimizer's
update. So an update held there survives `steps_per_execution`, XLA, gradient accumulation, loss scaling
and every strategy, and costs no Python per step. A constraint that the user set stays first in the chain.

Two moments lie outside of the step, and the caller has to `reapply()` there: an optimizer with
`use_ema=True` overwrites the weights at the end of `fit`, before `on_train_end`; and so does
`EarlyStopping(restore_best_weights=True)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from tfaccel.fit._session import Attachment

Update = Callable[[Any], Any]


class WeightUpdates:
    """Applies a function to each of some weights after every optimizer update, until detached.

    Args:
        model: A built model.
        updates: Pairs of a `keras.Variable` of the model and a function from its new value to the
            value that it is given instead (same shape and dtype; traceable by TensorFlow).

    Raises:
        ValueError: A variable is not a trainable variable of the model: no update would ever come.
    """

    def __init__(self, model: keras.Model, updates: Sequence[tuple[keras.Variable, Update]]):
        trainable = {id(variable) for variable in model.trainable_variables}
        for variable, _ in updates:
            if id(variable) not in trainable:
                raise ValueError(
                    f"{variable.path} is not a trainable variable of {model.name!r}. Allowed: its "
                    "trainable_variables. Build the model first, and unfreeze the layer."
                )
        self.model = model
        self.updates = list(updates)
        self._attachment: Attachment | None = None

    def attach(self) -> None:
        """From the next step on, and for the present values too."""
        for variable, update in self.updates:
            if not isinstance(variable.constraint, _Chain):
                variable.constraint = _Chain(variable.constraint)
            variable.constraint.updates.append((update, self))
        self._attachment = Attachment(self.model, self._remove)
        self.reapply()

    def reapply(self) -> None:
        """Applies the user's constraint and these updates once, outside of a step.

        Not what others have attached: theirs may count on an update of the optimizer before it.
        """
        for variable, update in self.updates:
            own = own_constraint(variable)
            value = own(variable) if own is not None else keras.ops.convert_to_tensor(variable)
            variable.assign(update(value))

    @property
    def is_left_over(self) -> bool:
        """Whether they were attached in a `fit` that was interrupted, and stand on weights for nothing."""
        return self._attachment is not None and self._attachment.is_left_over

    def detach(self) -> None:
        """Gives the variables their own constraints back; their values stay."""
        if self._attachment is not None:
            self._attachment.detach()

    def _remove(self) -> None:
        for variable, update in self.updates:
            chain = variable.constraint
            chain.updates.remove((update, self))
            if not chain.updates:
                variable.constraint = chain.own


def own_constraint(variable: keras.Variable) -> Callable | None:
    """The user's constraint of a weight, whatever is attached to it."""
    constraint = variable.constraint
    return constraint.own if isinstance(constraint, _Chain) else constraint


class _Chain(keras.constraints.Constraint):
    """The user's constraint, then each update in the order in which they were attached.

    Where a `fit` was interrupted, another model with the same weights may come first: it is not updated so.
    """

    def __init__(self, own: Callable | None):
        self.own = own
        self.updates: list[tuple[Update, WeightUpdates]] = []

    def __call__(self, weight: Any) -> Any:
        value = self.own(weight) if self.own is not None else keras.ops.convert_to_tensor(weight)
        for update, whose in self.updates:
            if not whose.is_left_over:
                value = update(value)
        return value
