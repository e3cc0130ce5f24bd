"""Weight sharing inside `fit`: the weights of a layer take a few values only, which are trained.

When to use: to make a file smaller when it is zipped: 16 different values are 4 bits of information a weight,
where float32 has 32. It doesn't make a model faster. Cluster a trained model, in a few epochs at a small
learning rate; behind `PruneWeights`, whose zeros stay.

What it costs: a lookup and a sum over the weights each step (`benchmarks/compression_overhead.py`), and eight
bytes of memory a weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.errors import is_whole, refuse
from tfaccel.fit._choice import (
    Choice,
    Layers,
    check_finite,
    check_layers,
    check_some,
    choose_weights,
    skipped_weights,
)
from tfaccel.fit._clustered import Clustered, channel_size
from tfaccel.fit._clusters import INITIALIZATIONS
from tfaccel.fit._run import check_apart, check_begin_epoch, check_order, updates_per_epoch
from tfaccel.fit._session import detach_leftovers
from tfaccel.fit._weights import WeightUpdates
from tfaccel.fit.compression_report import CompressionReport, compression_report
from tfaccel.fit.prune_weights import PruneWeights
from tfaccel.keras_fixes.callback_siblings import siblings
from tfaccel.keras_fixes.whole_executions import check_whole_executions

REGROUPINGS = 100  # in a run


class ClusterWeights(keras.callbacks.Callback):
    """Lets the weights of each layer take `num_clusters` different values, and trains those values.

    A cluster's value is the mean of its members. Behind the scenes each member goes on moving by its own
    gradient, and now and then joins the cluster that it has come nearest to. It all happens in the compiled
    step, so it holds under `steps_per_execution`, XLA, gradient accumulation, mixed precision and every
    strategy. A constraint of the layer's own comes first: means may lie a little outside of it. Behind the
    last step the model is a plain one: nothing is to be stripped.

    Args:
        num_clusters: Different values a layer, from 2 to 65,536; zero is one of them where sparsity is
            preserved. Default 16, four bits. A dict in `layers` gives some layers another number.
        initialization: Where the clusters begin: `"kmeans++"` (default), `"linear"` or `"density"`.
        scope: `"layer"` (default), or `"channel"`: each output channel has clusters of its own.
        preserve_sparsity: Whether zeros stay zero. Default True.
        begin_epoch: The epoch at whose beginning the weights are clustered. Default 0.
        layers: Which layers, as for `PruneWeights`; a dict gives them another number of clusters, and 0
            leaves them alone.

    Raises:
        ValueError: A bad argument; or, when `fit` begins and before its first step, a layer that doesn't
            exist or is frozen, more clusters than weights, or weights that aren't finite.

    Example:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(32), keras.layers.Dense(1)])
        >>> model.compile(keras.optimizers.Adam(1e-4), "mse")
        >>> cluster = tfaccel.ClusterWeights(16)
        >>> history = model.fit(
        ...     np.random.rand(64, 8), np.random.rand(64, 1), verbose=0, callbacks=[cluster]
        ... )
        >>> len(np.unique(model.layers[0].get_weights()[0]))
        16

    Reference:
        Han et al., 2016, https://arxiv.org/abs/1510.00149, section 3; the start: Arthur and
        Vassilvitskii, 2007, https://dl.acm.org/doi/10.5555/1283383.1283494, section 2.2.
    """

    settles_weights = True  # when training ends: what exports them comes behind

    def __init__(
        self,
        num_clusters: int = 16,
        *,
        initialization: str = "kmeans++",
        scope: str = "layer",
        preserve_sparsity: bool = True,
        begin_epoch: int = 0,
        layers: Layers = None,
    ):
        super().__init__()
        check_layers(layers)
        asked = [num_clusters, *(number for number in _own_numbers(layers) if number != 0)]
        for number in asked:
            if not is_whole(number, 2, 2**16):
                raise refuse("num_clusters", number, "an integer, 2 to 65,536", "16 are four bits.")
        if initialization not in INITIALIZATIONS:
            allowed = ", ".join(map(repr, INITIALIZATIONS))
            raise refuse("initialization", initialization, allowed, "Take 'kmeans++'.")
        if scope not in ("layer", "channel"):
            raise refuse("scope", scope, "'layer' or 'channel'", "Take 'layer'.")
        if not is_whole(begin_epoch, 0):
            raise refuse("begin_epoch", begin_epoch, "an integer ≥ 0", "0 is the first epoch.")
        self.num_clusters, self.initialization, self.scope = num_clusters, initialization, scope
        self.preserve_sparsity, self.begin_epoch, self.layers = preserve_sparsity, begin_epoch, layers
        self.report: CompressionReport | None = None
        self._updates: WeightUpdates | None = None
        self.chosen: list[Choice] = []

    def set_model(self, model: keras.Model) -> None:
        """Takes off what an interrupted fit left on the model."""
        super().set_model(model)
        detach_leftovers(model)

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks, before the first step, that the model can be clustered as it was asked."""
        self._updates, self.report = None, None
        check_whole_executions(self)
        check_order(self)
        check_begin_epoch(self)
        self._reserves_zero = self._prunes_before()
        self.choices = [
            self._if_worth_it(each) for each in choose_weights(self.model, self.layers, self.num_clusters)
        ]
        self.chosen = [each for each in self.choices if not each.skipped and each.amount]
        check_some(self.model, self.choices, "cluster")
        check_apart(self)
        check_finite(self.chosen)
        for each in self.chosen:
            size = math.prod(each.variable.shape)
            if each.amount > size:
                allowed = f"at most the {size} weights of {each.variable.path}"
                raise refuse("num_clusters", each.amount, allowed, "Leave that layer out with layers=.")
            if self.begin_epoch == 0 and not bool(tf.reduce_any(each.variable.value != 0)):
                raise ValueError(
                    f"{each.variable.path} is all zero, and one value can't become several. Allowed: weights "
                    "that were trained. Train first, or pass a later begin_epoch."
                )

    @property
    def settled_epoch(self) -> int:
        """The first epoch at whose end weights share values."""
        return self.begin_epoch

    def shared_by_channels(self) -> list[keras.Variable]:
        """The weights that get one set of values for all their channels in the fit that has begun."""
        return [each.variable for each in self.chosen] if self.scope == "layer" else []

    def _if_worth_it(self, choice: Choice) -> Choice:
        """The choice, skipped where each of a channel's weights would be a cluster of its own.

        Raises:
            ValueError: It would, and was asked for.
        """
        if choice.skipped or not choice.amount or self.scope != "channel":
            return choice
        size = channel_size(choice)
        if size > choice.amount:
            return choice
        if choice.asked_for:
            allowed = f"less than the {size} weights of a channel of {choice.variable.path}"
            raise refuse("num_clusters", choice.amount, allowed, "Take scope='layer', or fewer.")
        return dataclasses.replace(choice, skipped=f"has {size} weights a channel")

    def _prunes_before(self) -> bool:
        """Whether the same fit prunes, so that there will be a cluster of zeros."""
        others = siblings(self)
        places = [place for place, other in enumerate(others) if isinstance(other, PruneWeights)]
        if places and places[-1] > others.index(self):
            raise ValueError(
                "ClusterWeights is listed before PruneWeights: it would share values that are then set to "
                "zero. Allowed: PruneWeights first. Exchange the two."
            )
        if places and not self.preserve_sparsity:
            raise refuse(
                "preserve_sparsity",
                False,
                "True in a fit that prunes: the zeros would become other values",
                "Leave it out, or cluster in a fit of its own.",
            )
        return bool(places)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Clusters the weights in the first epoch that is not before `begin_epoch`."""
        if self._updates is not None or not self.chosen or epoch < self.begin_epoch:
            return
        steps = updates_per_epoch(self) * (self.params["epochs"] - epoch)
        every = max(int(steps / REGROUPINGS), 1)
        with self.model.distribute_strategy.scope():
            self._weights = [Clustered(each, self, every, self._reserves_zero) for each in self.chosen]
        updates = [(each.variable, each.update) for each in self._weights]
        self._updates = WeightUpdates(self.model, updates)
        self._updates.attach()
        for weight in self._weights:
            weight.optimizer = self.model.optimizer

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes `clusters`, the most different values that a clustered weight has, into the logs."""
        if logs is not None and self._updates is not None:
            values = [keras.ops.convert_to_numpy(each.variable.value) for each in self.chosen]
            logs["clusters"] = float(max(len(np.unique(value)) for value in values))

    def on_train_end(self, logs: dict | None = None) -> None:
        """Makes the model a plain one."""
        if self._updates is not None:
            self._updates.detach()
            for weight in self._weights:
                weight.settle()
            self._updates, self._weights = None, []
        self.report = compression_report(self.model, skipped=skipped_weights(self.model, self.choices))

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        names = ("num_clusters", "initialization", "scope", "preserve_sparsity", "begin_epoch", "layers")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        """The call that makes the same callback."""
        return (
            f"ClusterWeights({', '.join(f'{name}={value!r}' for name, value in self.get_config().items())})"
        )


def _own_numbers(layers: Layers) -> list[Any]:
    return list(layers.values()) if isinstance(layers, Mapping) else []
