"""Layer-wise learning rates: each layer trains at its own share of the optimizer's learning rate.

When to use: fine-tuning. What was trained before, and lies near the input, should move less than a new head.
It goes together with every schedule, which moves the learning rate that these are shares of. It costs one
multiplication for each different share a step.

References: Howard & Ruder (2018), https://arxiv.org/abs/1801.06146, section 3.2 (discriminative fine-tuning).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from tfaccel.errors import is_number, refuse
from tfaccel.fit._layer_groups import by_depth, check_built, chosen_layers, own_variables
from tfaccel.fit._optimizer import inner_optimizer
from tfaccel.fit._run import check_alone, check_updates, updates_done
from tfaccel.fit._session import Attachment, detach_leftovers
from tfaccel.keras_fixes.variable_updates import scale_learning_rates
from tfaccel.selection import Selector, check_selector


class LayerLearningRates(keras.callbacks.Callback):
    """Trains each layer at its own share of the learning rate, while `fit` runs.

    It is the learning rate that counts for an update and for weight decay, whoever sets it: the optimizer, a
    schedule of Keras's, `OneCycle` or another callback, in whose logs it stays. The optimizer is a plain one
    afterwards.

    Args:
        layers: A dict from layers (a name, a class, or a function of a layer) to their share, > 0, such as
            `{"backbone": 0.1}`. Of two that mean the same layer the later one counts. Default: none.
        decay: What each layer's share is multiplied with for the layer before it, 0 < decay ≤ 1, counted from
            the last. Models in the model are opened; a normalization belongs to the layer before it. Where
            `layers` says something else, that counts. Default 1: all layers alike.

    Raises:
        ValueError: At construction for a bad argument; when `fit` begins, for a layer that doesn't exist or
            isn't trained, a model without weights, or several optimizers.

    Example:
        >>> model = keras.Sequential(
        ...     [keras.Input((4,)), keras.layers.Dense(8, name="old"), keras.layers.Dense(2, name="new")]
        ... )
        >>> model.compile("adam", "mse")
        >>> rates = tfaccel.LayerLearningRates({"old": 0.1})
        >>> _ = model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0, callbacks=[rates])
        >>> rates.shares
        {'old': 0.1, 'new': 1.0}

    Reference:
        Howard & Ruder, 2018, "Universal Language Model Fine-tuning for Text Classification",
        https://arxiv.org/abs/1801.06146, section 3.2.
    """

    def __init__(self, layers: Mapping[Selector, float] | None = None, *, decay: float = 1.0):
        super().__init__()
        if layers is not None and not isinstance(layers, Mapping):
            raise refuse("layers", layers, "a dict from layers to shares", 'Such as {"backbone": 0.1}.')
        for selector, share in (layers or {}).items():
            check_selector("layers", selector)
            if not is_number(share, 0) or share == 0:
                remedy = "Set layer.trainable = False for a layer that is to stay as it is."
                raise refuse(f"layers[{selector!r}]", share, "a number > 0", remedy)
        if not is_number(decay, 0, 1 + 1e-9) or decay == 0:
            raise refuse("decay", decay, "a number above 0, at most 1", "0.8 is usual for transformers.")
        self.layers, self.decay = dict(layers or {}), float(decay)
        self.shares: dict[str, float] = {}
        self._attachment: Attachment | None = None
        self._updates_before: int | None = None  # the first epoch of this fit

    def set_model(self, model: keras.Model) -> None:
        """Takes off what an interrupted fit left on the model."""
        super().set_model(model)
        detach_leftovers(model)

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Finds the layers, and lets the optimizer update them at their shares."""
        self._attachment = None
        check_alone(self)
        optimizer = inner_optimizer(self.model.optimizer)
        if hasattr(optimizer, "optimizers"):
            raise ValueError(
                f"LayerLearningRates can't drive a {type(optimizer).__name__}: each of its optimizers has a "
                "learning rate. Allowed: one optimizer. Set the rate of each of yours."
            )
        check_built(self.model)
        factors = self._factors()
        if any(factor != 1 for factor in factors.values()):
            self._attachment = Attachment(self.model, scale_learning_rates(optimizer, factors))
            self._updates_before = updates_done(optimizer)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Says, after the first epoch, if there were no updates that it could have had a share in."""
        if self._updates_before is not None:
            check_updates(self, self._updates_before)
            self._updates_before = None

    def _factors(self) -> dict[int, float]:
        """The share of each variable, by its id; fills `shares` for a person."""
        chosen = [
            (layer, self.decay**depth, own_variables(layer))
            for depth, group in enumerate(reversed(by_depth(self.model)))
            for layer in group
        ][::-1]
        for selector, share in self.layers.items():
            chosen += [
                (layer, float(share), layer.trainable_variables)
                for layer in chosen_layers(self.model, selector)
            ]
        self.shares = {layer.name: share for layer, share, _ in chosen}
        return {id(variable): share for _, share, variables in chosen for variable in variables}

    def on_train_end(self, logs: dict | None = None) -> None:
        """Leaves the optimizer as it was."""
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {"layers": self.layers, "decay": self.decay}

    def __repr__(self) -> str:
        """The call that makes the same callback."""
        return f"LayerLearningRates({self.layers!r}, decay={self.decay})"
