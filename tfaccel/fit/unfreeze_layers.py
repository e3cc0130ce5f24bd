"""Gradual unfreezing: the last layers train first, and the others join in while `fit` runs.

When to use: fine-tuning a model that was trained before, under a new head. Until the head fits, its gradients
would spoil what is below; and a step of the head alone costs a fraction of a whole one, because nothing is
differentiated below the first layer that trains. It costs a new trace of the step each time that layers join.

Reference: Howard & Ruder (2018), https://arxiv.org/abs/1801.06146, section 3.3 (gradual unfreezing).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import keras

from tfaccel.errors import is_number, refuse
from tfaccel.fit._calls import undo_all
from tfaccel.fit._joined_schedules import check_unit, share_of_run
from tfaccel.fit._layer_groups import by_depth, check_built, chosen_layers, opened, own_variables
from tfaccel.fit._optimizer import inner_optimizer
from tfaccel.fit._run import check_alone, updates_done, updates_per_epoch
from tfaccel.fit._session import Attachment, detach_leftovers
from tfaccel.fit.cluster_weights import ClusterWeights
from tfaccel.fit.prune_weights import PruneWeights
from tfaccel.keras_fixes.callback_siblings import siblings
from tfaccel.keras_fixes.inner_layers import inner_layers
from tfaccel.keras_fixes.variable_updates import (
    has_moments,
    late_start,
    scale_learning_rates,
    unknown_variables,
)
from tfaccel.selection import Selector, check_selector


class UnfreezeLayers(keras.callbacks.Callback):
    """Keeps layers frozen until their moment of the `fit` has come, the last layers first.

    Frozen means what it means in Keras: `layer.trainable = False`; batch normalization runs as in inference,
    the optimizer leaves the weights and its own state for them alone. Adam corrects the first updates of a
    layer that joins as it does those of a run. When the fit is over every layer is as trainable as it was
    before; behind an interrupted one that is so from the next `fit`, `evaluate` or `predict` on, or from
    `restore()` on, which goes before flags that you set yourself. A file that is saved meanwhile says of its
    layers what they are then.

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
            made for fewer weights or keeps a moving average of them, and beside `PruneWeights` or
            `ClusterWeights`.

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
        check_built(self.model)
        self._moments = self._find_moments()
        late = [layer.name for layer, epoch, _ in self._moments if epoch >= self.params["epochs"]]
        if late:
            allowed = f"moments before the last of the {self.params['epochs']} epochs begins"
            raise refuse("layers", self.layers, allowed, f"{', '.join(late)} would never be trained.")
        self._first = {id(v): epoch for _, epoch, variables in self._moments for v in variables}
        if all(self._first.get(id(variable), 0) for variable in self.model.trainable_variables):
            raise refuse("layers", self.layers, "some layer that trains at once", "Leave the last one out.")
        self.first_epochs = {layer.name: epoch for layer, epoch, _ in self._moments}
        self._prepare_optimizer()

    def _find_moments(self) -> list[tuple[keras.layers.Layer, int, list[keras.Variable]]]:
        """Layers with the epoch in which they begin to train; of two for one variable the later counts."""
        if isinstance(self.layers, dict):
            return [
                (layer, self._epoch(moment), layer.trainable_variables)
                for selector, moment in self.layers.items()
                for layer in chosen_layers(self.model, selector)
            ]
        groups = by_depth(self.model)[::-1]
        steps = max(len(groups) - 1, 1)
        return [
            (
                layer,
                self._epoch(self.layers * place / steps),
                own_variables(layer),
            )
            for place, group in enumerate(groups)
            for layer in group
        ]

    def _epoch(self, moment: float) -> int:
        """The first one that does not begin before a moment; a hair after it is not another epoch."""
        epochs = self.params["epochs"]
        return math.ceil(share_of_run(moment, self.unit, epochs) * epochs - 1e-6)

    def _prepare_optimizer(self) -> None:
        """Builds it with state for all variables, also those that are frozen at first."""
        optimizer = inner_optimizer(self.model.optimizer)
        if optimizer.use_ema:
            raise ValueError(
                "UnfreezeLayers can't run with use_ema=True: Keras would put the averages into other weights "
                "if the fit ended while layers are frozen. Allowed: no moving average. Leave use_ema out."
            )
        if not self.model.optimizer.built:
            with self.model.distribute_strategy.scope():
                self.model.optimizer.build(self.model.trainable_variables)
        several = hasattr(optimizer, "optimizers")
        unknown = [] if several else unknown_variables(optimizer, self.model.trainable_variables)
        if unknown:
            raise ValueError(
                f"The optimizer was made when {unknown[0].path} was frozen, and can't train it. Allowed: an "
                "optimizer for all weights. Call model.compile again with all layers trainable."
            )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Lets the layers join in whose epoch this is; a resumed run begins with another than 0."""
        if self._attachment is None:
            joined = sorted({first for first in self._first.values() if 0 < first <= epoch})
            if not joined and not any(first > epoch for first in self._first.values()):
                return
            self._freezing = _Freezing(self.model, self._first)
            # Of this fit: the callback may be in another one before it comes off.
            self._undo: list[Callable[[], None]] = [self._freezing.restore]
            for first in joined:
                self._correct_resumed(epoch, first)
            self._freezing.freeze(epoch)
            self._attachment = Attachment(self.model, undo_all(self._undo))
            return
        joining = [layer.name for layer, first, _ in self._moments if first == epoch]
        if epoch in self._first.values():
            self._correct([v for v in self.model.variables if self._first.get(id(v)) == epoch])
            self._freezing.freeze(epoch)
            self.model.make_train_function(force=True)
            if self.verbose:
                print(f"\nEpoch {epoch + 1}: {', '.join(joining)} trains from here on.", flush=True)

    def _correct(self, joining: list[keras.Variable]) -> None:
        """Lets Adam begin anew for variables that it has not updated yet."""
        optimizer = inner_optimizer(self.model.optimizer)
        if isinstance(optimizer, keras.optimizers.Adam):
            fresh = [variable for variable in joining if not has_moments(optimizer, variable)]
            self._start_at(updates_done(optimizer), fresh)

    def _correct_resumed(self, epoch: int, first: int) -> None:
        """The same where a run is resumed, for variables that joined before it was interrupted."""
        optimizer = inner_optimizer(self.model.optimizer)
        if not isinstance(optimizer, keras.optimizers.Adam):
            return
        per_epoch, done = updates_per_epoch(self), updates_done(optimizer)
        if done == round(epoch * per_epoch):  # else the optimizer is older than the run, and knew them
            joined = [v for v in self.model.variables if self._first.get(id(v)) == first]
            self._start_at(round(first * per_epoch), joined)

    def _start_at(self, update: int, variables: list[keras.Variable]) -> None:
        optimizer = inner_optimizer(self.model.optimizer)
        late = late_start(optimizer, update)
        self._undo.append(scale_learning_rates(optimizer, {id(v): late for v in variables}, False))

    def restore(self) -> None:
        """Leaves every layer as trainable as it was; of use behind a fit that was interrupted."""
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None

    def on_train_end(self, logs: dict | None = None) -> None:
        """Leaves every layer as trainable as it was."""
        self.restore()

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {"layers": self.layers, "unit": self.unit, "verbose": self.verbose}

    def __repr__(self) -> str:
        """The call that makes the same callback."""
        return f"UnfreezeLayers({self.layers!r}, unit={self.unit!r}, verbose={self.verbose})"


class _Freezing:
    """The flags of the layers that are frozen for a while.

    A layer with nothing inside of it is frozen by its own flag, which is what tells batch normalization. The
    flag of one with layers inside would freeze them all; so only the variables that it holds by itself are.

    Args:
        model: That is fitted.
        first: The epoch in which each variable begins to train, by its id.
    """

    def __init__(self, model: keras.Model, first: Mapping[int, int]):
        self._first = first
        self._norms = _norms_without_weights(model, first)
        layers = [
            layer
            for layer in inner_layers(model)
            if id(layer) in self._norms or any(id(v) in first for v in layer.variables)
        ]
        self._leaves = [layer for layer in layers if len(inner_layers(layer)) == 1]
        inside = {id(v) for layer in self._leaves for v in layer.variables}
        self._variables = [v for v in model.variables if id(v) in first and id(v) not in inside]
        held = [v for layer in self._leaves for v in layer.variables]
        # From layers to variables: setting the flag of a layer sets those of its variables.
        self._flags = [(each, each.trainable) for each in (*self._leaves, *held, *self._variables)]

    def freeze(self, epoch: int) -> None:
        """What trains later than in this epoch, and nothing else of it."""
        self.restore()
        for layer in self._leaves:
            firsts = [self._first.get(id(v), 0) for v in layer.variables]
            if max(self._norms.get(id(layer), 0), *firsts) > epoch:
                layer.trainable = False
        for variable in self._variables:
            if self._first[id(variable)] > epoch:
                variable.trainable = False

    def restore(self) -> None:
        """As they were."""
        for each, flag in self._flags:
            each.trainable = flag


def _norms_without_weights(model: keras.Model, first: Mapping[int, int]) -> dict[int, int]:
    """Epochs, by id, of batch normalizations with nothing to train: that of the layer before them."""
    epochs, last = {}, 0
    for layer in opened(model):
        if isinstance(layer, keras.Model):
            continue
        if layer.trainable_variables:
            last = max(first.get(id(v), 0) for v in layer.trainable_variables)
        elif hasattr(layer, "moving_variance"):
            epochs[id(layer)] = last
    return epochs
