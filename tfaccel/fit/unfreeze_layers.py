"""Gradual unfreezing: the last layers train first, and the others join in while `fit` runs.

When to use: fine-tuning a model that was trained before, under a new head. Until the head fits, its gradients
would spoil what is below; and a step of the head alone costs a fraction of a whole one, because nothing is
differentiated below the first layer that trains. It costs a new trace of the step each time that layers join.

Reference: Howard & Ruder (2018), https://arxiv.org/abs/1801.06146, section 3.3 (gradual unfreezing).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import keras

from tfaccel.errors import is_number, refuse
from tfaccel.fit._joined_schedules import check_unit, share_of_run
from tfaccel.fit._layer_groups import by_depth, chosen_layers
from tfaccel.fit._optimizer import inner_optimizer
from tfaccel.fit._session import Attachment, detach_leftovers
from tfaccel.fit.cluster_weights import ClusterWeights
from tfaccel.fit.layer_learning_rates import check_alone
from tfaccel.fit.prune_weights import PruneWeights
from tfaccel.keras_fixes.callback_siblings import siblings
from tfaccel.keras_fixes.inner_layers import inner_layers
from tfaccel.keras_fixes.variable_updates import unknown_variables
from tfaccel.selection import Selector, check_selector


class UnfreezeLayers(keras.callbacks.Callback):
    """Keeps layers frozen until their moment of the `fit` has come, the last layers first.

    Frozen means what it means in Keras: `layer.trainable = False`; batch normalization runs as in inference,
    the optimizer leaves the weights and its own state for them alone. Behind the fit, or an interrupted one,
    every layer is as trainable as it was before.

    Args:
        layers: A dict from layers (a name, a class, or a function of a layer) to the moment at which they
            begin to train, such as `{"backbone": 0.3}`; what is not in it trains from the beginning. Or a
            number: the moment from which on the whole model trains; layers join in evenly until then, from
            the last to the first. Default 0.5.
        unit: Of the moments: `"run"` for fractions of the run, 0..1 (default), or `"epochs"`. Layers join in
            at the beginning of the next epoch.
        verbose: 1 prints a line where layers join in; 0 is silent. Default 0.

    Raises:
        ValueError: At construction for a bad argument; when `fit` begins, for a layer that doesn't exist or
            would never be trained, where nothing would be trained at the beginning, where the optimizer was
            made for fewer weights, and beside `PruneWeights` or `ClusterWeights`.

    Example:
        >>> model = keras.Sequential(
        ...     [keras.Input((4,)), keras.layers.Dense(8, name="old"), keras.layers.Dense(2, name="new")]
        ... )
        >>> model.compile("adam", "mse")
        >>> before = model.layers[0].get_weights()[0]
        >>> unfreeze = tfaccel.UnfreezeLayers({"old": 2}, unit="epochs")
        >>> _ = model.fit(np.ones((8, 4)), np.ones((8, 2)), epochs=3, verbose=0, callbacks=[unfreeze])
        >>> unfreeze.first_epochs
        {'old': 2}

    Reference:
        Howard & Ruder, 2018, "Universal Language Model Fine-tuning for Text Classification",
        https://arxiv.org/abs/1801.06146, section 3.3.
    """

    def __init__(
        self, layers: Mapping[Selector, float] | float = 0.5, *, unit: str = "run", verbose: int = 0
    ):
        super().__init__()
        check_unit(unit)
        moments = layers if isinstance(layers, Mapping) else {"layers": layers}
        for selector, moment in moments.items():
            check_selector("layers", selector)
            if not is_number(moment, 0) or (unit == "run" and moment >= 1):
                allowed = "a fraction of the run, 0 ≤ … < 1" if unit == "run" else "an epoch ≥ 0"
                raise refuse("layers", moment, allowed, "Pass unit='epochs' if you mean epochs.")
        if not moments:
            raise refuse("layers", layers, "at least one layer", "Leave it out for all, one by one.")
        if verbose not in (0, 1):
            raise refuse("verbose", verbose, "0 or 1", "1 prints a line where layers join in.")
        self.layers = dict(layers) if isinstance(layers, Mapping) else float(layers)
        self.unit, self.verbose = unit, verbose
        self.first_epochs: dict[str, int] = {}
        self._attachment: Attachment | None = None

    def set_model(self, model: keras.Model) -> None:
        """Takes off what an interrupted fit left on the model."""
        super().set_model(model)
        detach_leftovers(model)

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks, before the first step, that all layers can be trained when their moment comes."""
        self._attachment = None
        check_alone(self)
        for other in siblings(self):
            if isinstance(other, PruneWeights | ClusterWeights):
                raise ValueError(
                    f"UnfreezeLayers and {type(other).__name__} run in one fit: masks and groups are held by "
                    "updates, and frozen layers get none. Allowed: one of them. Compress in a second fit."
                )
        self._joining = self._find_layers()
        self.first_epochs = {layer.name: epoch for layer, epoch in self._joining}
        late = [layer.name for layer, epoch in self._joining if epoch >= self.params["epochs"]]
        if late:
            allowed = f"moments before the last of the {self.params['epochs']} epochs begins"
            raise refuse("layers", self.layers, allowed, f"{', '.join(late)} would never be trained.")
        held = {id(v) for layer, epoch in self._joining if epoch for v in layer.trainable_variables}
        if all(id(variable) in held for variable in self.model.trainable_variables):
            raise refuse("layers", self.layers, "some layer that trains at once", "Leave the last one out.")
        self._build_optimizer()

    def _find_layers(self) -> list[tuple[keras.layers.Layer, int]]:
        """Layers with the epoch in which they begin to train."""
        if isinstance(self.layers, dict):
            found = {}  # of two selectors that mean the same layer the later one counts
            for selector, moment in self.layers.items():
                for layer in chosen_layers(self.model, selector):
                    found[id(layer)] = (layer, self._epoch(moment))
            return list(found.values())
        groups = by_depth(self.model)[::-1]
        steps = max(len(groups) - 1, 1)
        return [
            (layer, self._epoch(self.layers * place / steps))
            for place, group in enumerate(groups)
            for layer in group
        ]

    def _epoch(self, moment: float) -> int:
        """The first one that does not begin before a moment; a hair after it is not another epoch."""
        epochs = self.params["epochs"]
        return math.ceil(share_of_run(moment, self.unit, epochs) * epochs - 1e-6)

    def _build_optimizer(self) -> None:
        """With state for all variables, also those that are frozen at first."""
        optimizer = inner_optimizer(self.model.optimizer)
        if not self.model.optimizer.built:
            with self.model.distribute_strategy.scope():
                self.model.optimizer.build(self.model.trainable_variables)
        unknown = (
            []
            if hasattr(optimizer, "optimizers")
            else unknown_variables(optimizer, self.model.trainable_variables)
        )
        if unknown:
            raise ValueError(
                f"The optimizer was made when {unknown[0].path} was frozen, and can't train it. Allowed: an "
                "optimizer for all weights. Call model.compile again with all layers trainable."
            )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Lets the layers join in whose epoch this is; a resumed run begins with another than 0."""
        if self._attachment is None:
            frozen = [layer for layer, first in self._joining if first > epoch]
            if not frozen:
                return
            self._flags = _Flags([layer for layer, _ in self._joining])
            for layer in frozen:
                layer.trainable = False
            self._attachment = Attachment(self.model, self._flags.restore)
            return
        joining = [layer for layer, first in self._joining if first == epoch]
        if joining:
            self._flags.restore()
            for layer, first in self._joining:
                if first > epoch:
                    layer.trainable = False
            self.model.make_train_function(force=True)
            if self.verbose:
                names = ", ".join(layer.name for layer in joining)
                print(f"\nEpoch {epoch + 1}: {names} trains from here on.", flush=True)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Leaves every layer as trainable as it was."""
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {"layers": self.layers, "unit": self.unit, "verbose": self.verbose}

    def __repr__(self) -> str:
        """The call that makes the same callback."""
        return f"UnfreezeLayers({self.layers!r}, unit={self.unit!r}, verbose={self.verbose})"


class _Flags:
    """What `trainable` said of some layers, of all that is inside of them, and of their variables.

    Args:
        layers: Setting the flag of one sets those of all that is inside of it.
    """

    def __init__(self, layers: list[keras.layers.Layer]):
        # From outside to inside, so that the inner ones have the last word.
        self._layers = [(each, each.trainable) for layer in layers for each in inner_layers(layer)]
        self._variables = [(v, v.trainable) for layer in layers for v in layer.variables]

    def restore(self) -> None:
        """As they were."""
        for each, flag in (*self._layers, *self._variables):
            each.trainable = flag
