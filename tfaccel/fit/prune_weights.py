"""Magnitude pruning inside `fit`: the weights that matter least become zero, and stay so.

When to use: to make a file smaller when it is zipped (zeros cost next to nothing there), and faster where the
interpreter or the hardware uses zeros (XNNPACK's sparse kernels, 2:4 on some GPUs). Without such kernels a
zero costs as much time as another weight.

What it costs: one selection of each weight a step, and 30 passes over the weights each time that masks are
made, a hundred times a run (`benchmarks/compression_overhead.py`); one byte of memory a weight.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfaccel.errors import is_number, refuse
from tfaccel.fit._choice import (
    Choice,
    Layers,
    check_finite,
    check_layers,
    check_some,
    choose_weights,
    skipped_weights,
)
from tfaccel.fit._pruning import Masks, Pattern, Pruned, parse_pattern
from tfaccel.fit._run import (
    check_apart,
    check_early_stopping,
    check_order,
    check_updates,
    updates_done,
    updates_per_epoch,
)
from tfaccel.fit._session import detach_leftovers
from tfaccel.fit._weights import WeightUpdates
from tfaccel.fit.compression_report import CompressionReport, compression_report
from tfaccel.fit.sparsity_schedule import KINDS, PruningSchedule, plan
from tfaccel.keras_fixes.whole_executions import check_whole_executions

IMPORTANCES = ("magnitude", "movement", "gradient")


class PruneWeights(keras.callbacks.Callback):
    """Sets the least important weights to zero while the model trains, until a share of them is zero.

    The masks are held by the compiled step itself, so they hold under `steps_per_execution`, XLA, gradient
    accumulation, mixed precision and every strategy. Behind the last step the model is a plain one: nothing
    is to be stripped. List it behind callbacks that put other weights back at the end, such as
    `EarlyStopping(restore_best_weights=True)`, and before those that write logs, such as `TensorBoard`.

    Args:
        sparsity: The share of zeros in the end, 0 ≤ sparsity < 1. 0 leaves plain Keras. With `m:n` it is
            m / n and left out; with a schedule of `tensorflow_model_optimization`, that says it.
        threshold: Instead of `sparsity`: weights with a magnitude below it become zero.
        schedule: `"polynomial"` (default), `"constant"`, `"one_shot"`, a `PruningSchedule`, or a schedule
            object of `tensorflow_model_optimization`.
        pattern: `"unstructured"` (default); `"2:4"` and other m:n, m zeros in each n inputs of an output;
            `"4x1"` and the like, blocks of inputs × outputs.
        scope: `"layer"` (default) gives each layer the same sparsity; `"global"` compares the weights of all
            layers with one another, so that layers with many unimportant weights lose more.
        importance: `"magnitude"` (default); `"movement"`, the sum of update × weight: weights that move
            towards zero go; `"gradient"`, the sum of (update × weight)²: weights that the loss depends on
            little go. An update is what the optimizer makes of a gradient; with SGD, learning rate × it.
        layers: Which layers: names, classes, or functions of a layer, one or a list; or a dict of them to
            another sparsity, such as `{"head": 0.5, keras.layers.Conv1D: 0.0}`. Default: all kernels but
            those of depthwise and embedding layers and of a small first and last layer.

    Raises:
        ValueError: A bad argument; or, when `fit` begins and before its first step, a layer that doesn't
            exist or is frozen, weights that aren't finite, or a schedule that ends behind the run.

    Example:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(32), keras.layers.Dense(1)])
        >>> model.compile("adam", "mse")
        >>> prune = tfaccel.PruneWeights(0.75)
        >>> history = model.fit(
        ...     np.random.rand(256, 8), np.random.rand(256, 1), epochs=3, verbose=0, callbacks=[prune]
        ... )
        >>> float(np.mean(model.layers[0].get_weights()[0] == 0))
        0.75

    Reference:
        Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878, section 3; movement: Sanh et al., 2020,
        https://arxiv.org/abs/2005.07683, equation 4; gradient: Molchanov et al., 2019,
        https://arxiv.org/abs/1906.10771, equation 8.
    """

    settles_weights = True  # when training ends: what exports them comes behind

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        threshold: float | None = None,
        schedule: Any = "polynomial",
        pattern: str = "unstructured",
        scope: str = "layer",
        importance: str = "magnitude",
        layers: Layers = None,
    ):
        super().__init__()
        self.sparsity, self.threshold = sparsity, threshold
        self.schedule = PruningSchedule(schedule) if schedule in KINDS else schedule
        self.pattern, self.scope, self.importance, self.layers = pattern, scope, importance, layers
        self._group, block = parse_pattern(pattern)
        self._pattern = Pattern(self._group, block, threshold, scope == "global")
        self._check()
        self.report: CompressionReport | None = None
        self.settled_epoch = 0  # the first at whose end the weights are as sparse as they will be
        self._updates: WeightUpdates | None = None
        self._updates_before: int | None = None  # the first epoch of this fit

    def _check(self) -> None:
        check_layers(self.layers)
        own_target = not isinstance(self.schedule, PruningSchedule)
        if own_target and not callable(self.schedule):
            raise refuse(
                "schedule",
                self.schedule,
                f"{', '.join(map(repr, KINDS))} or a schedule",
                "Take 'polynomial'.",
            )
        if self.scope not in ("layer", "global"):
            raise refuse("scope", self.scope, "'layer' or 'global'", "Take 'layer'.")
        if self.importance not in IMPORTANCES:
            raise refuse(
                "importance", self.importance, ", ".join(map(repr, IMPORTANCES)), "Take 'magnitude'."
            )
        said = [self.sparsity is not None, self.threshold is not None, own_target, self._group is not None]
        if sum(said) != 1:
            raise refuse(
                "sparsity",
                self.sparsity,
                "one of sparsity=, threshold=, an m:n pattern, or a schedule object that has a sparsity",
                "PruneWeights(0.8) sets four fifths to zero; PruneWeights(pattern='2:4') a half.",
            )
        for value in (self.sparsity, *(self.layers.values() if isinstance(self.layers, Mapping) else ())):
            if value is not None and not is_number(value, 0, 1):
                raise refuse("sparsity", value, "a fraction, 0 ≤ sparsity < 1", "Four fifths are 0.8.")
        if self.threshold is not None and not is_number(self.threshold, 0):
            raise refuse("threshold", self.threshold, "a number ≥ 0", "Try 1e-3.")
        self._check_importance()
        alone = {"threshold": self.threshold is not None, "an m:n pattern": self._group is not None}
        for name, given in alone.items():
            if given and self.scope == "global":
                raise refuse(
                    "scope", self.scope, f"'layer' with {name}", "It leaves no choice between layers."
                )
        if isinstance(self.layers, Mapping) and (self.scope == "global" or self.sparsity is None):
            raise refuse(
                "layers",
                self.layers,
                "a list of layers here: sparsities of single layers need sparsity= and scope='layer'",
                "Pass a list, or leave scope out.",
            )

    def _check_importance(self) -> None:
        if self.threshold is not None and self.importance != "magnitude":
            raise refuse(
                "importance", self.importance, "'magnitude' with a threshold", "A threshold is one of |w|."
            )
        schedule = self.schedule
        if not isinstance(schedule, PruningSchedule):
            return
        if schedule.kind == "one_shot" and schedule.begin == 0 and self.importance != "magnitude":
            raise refuse(
                "schedule",
                schedule,
                f"one_shot with a later begin for importance={self.importance!r}, which is summed over steps",
                "Try PruningSchedule('one_shot', begin=0.2).",
            )
        if self.sparsity is not None and (schedule.initial_sparsity or 0) > self.sparsity:
            raise refuse(
                "initial_sparsity",
                schedule.initial_sparsity,
                f"at most sparsity={self.sparsity}",
                "Leave it out.",
            )

    def set_model(self, model: keras.Model) -> None:
        """Takes off what an interrupted fit left on the model."""
        super().set_model(model)
        detach_leftovers(model)

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks, before the first step, that the model can be pruned as it was asked."""
        self._updates, self.report = None, None
        check_whole_executions(self)
        check_order(self)
        self._plan_from(0)
        check_early_stopping(self, self.settled_epoch)
        self.choices = choose_weights(self.model, self.layers, self._target())
        self.choices = [self._pattern.fit(each, asked_for=self.layers is not None) for each in self.choices]
        self.chosen = [each for each in self.choices if not each.skipped and self._touches(each)]
        check_some(self.model, self.choices, "prune")
        if not self.chosen:
            return
        check_apart(self)
        check_finite(self.chosen)

    def _plan_from(self, epoch: int) -> None:
        """Lays the schedule out over the epochs from `epoch` on."""
        per_epoch = updates_per_epoch(self)
        self._plan = plan(self.schedule, per_epoch, self.params["epochs"] - epoch)
        self.settled_epoch = epoch + max(math.ceil(self._plan.end / per_epoch) - 1, 0)

    def _target(self) -> float:
        return self.sparsity or (self._group[0] / self._group[1] if self._group else 0.0)

    def _touches(self, choice: Choice) -> bool:
        """Whether a weight is masked at all."""
        own_target = not isinstance(self.schedule, PruningSchedule)
        return bool(choice.amount or self.threshold or own_target)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Attaches in the first epoch, whose number is not 0 where a run is resumed."""
        if self._updates is not None or not self.chosen:
            return
        done = round(updates_per_epoch(self) * epoch)
        if done and not self._is_resumed(done):  # `fit(initial_epoch=)` alone begins a run
            self._plan_from(epoch)
            done = 0
        with self.model.distribute_strategy.scope():
            weights = [Pruned(each, self.importance, self._initial(each, done)) for each in self.chosen]
        self._updates_before = updates_done(self.model.optimizer)
        start = self._updates_before - done
        self._masks = Masks(self.model, weights, self._pattern, self._plan, start)
        self._masks.begin(done)
        self._updates = WeightUpdates(self.model, self._masks.updates())
        self._updates.attach()
        self._masks.in_steps = True

    def _is_resumed(self, done: int) -> bool:
        """Whether the weights are those of a run that has pruned until a step: they have its zeros."""
        last = self._plan.last_due(done)
        if last < 0 or self._plan.progress is None:
            return True
        expected = self._target() * float(self._plan.progress(last))
        return share_of_zeros(self.chosen) >= expected / 2

    def _initial(self, choice: Choice, done: int) -> float:
        """The sparsity that a weight began with: its own share of zeros, or that of all together.

        A resumed run doesn't know it any more; it follows from the zeros that there are now.
        """
        given = getattr(self.schedule, "initial_sparsity", None)
        if given is not None:
            return float(given)
        share = share_of_zeros(self.chosen if self.scope == "global" else [choice])
        last = self._plan.last_due(done) if done else -1
        if self._plan.progress is None or last < 0:
            return share if share < 1 else 0.0
        progress = float(self._plan.progress(last))
        if progress == 1 or abs(share - choice.amount * progress) < 1e-3:
            return 0.0
        return min(max((share - choice.amount * progress) / (1 - progress), 0.0), 0.999)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes `sparsity`, the share of zeros (0..1) in the weights that are pruned, into the logs."""
        if self._updates_before is not None:
            check_updates(self, self._updates_before)
            self._updates_before = None
        if logs is not None and self.chosen:
            logs["sparsity"] = share_of_zeros(self.chosen)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Holds the masks once more, for weights that were put back, and makes the model a plain one."""
        if self._updates is not None:
            self._warn_if_cut_short()
            self._masks.in_steps = False
            self._updates.reapply()
            self._updates.detach()
            self._updates = None
        self.report = compression_report(self.model, skipped=skipped_weights(self.model, self.choices))

    def _warn_if_cut_short(self) -> None:
        done = updates_done(self.model.optimizer) - self._masks.start
        if done < self._plan.end:
            warnings.warn(
                f"The training ended after {done} updates, before the schedule of PruneWeights did, at "
                f"{self._plan.end}: {share_of_zeros(self.chosen):.0%} of the weights are zero. Pass "
                f"start_from_epoch={self.settled_epoch} to EarlyStopping, or a schedule with an earlier end.",
                stacklevel=2,
            )

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        names = ("sparsity", "threshold", "schedule", "pattern", "scope", "importance", "layers")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        """The call that makes the same callback."""
        fresh = {"schedule": PruningSchedule(), "pattern": "unstructured", "scope": "layer"}
        given = [
            f"{name}={value!r}"
            for name, value in self.get_config().items()
            if value is not None and value != fresh.get(name) and (name, value) != ("importance", "magnitude")
        ]
        return f"PruneWeights({', '.join(given)})"


def share_of_zeros(choices: Sequence[Choice]) -> float:
    """The share of zeros in some weights, 0..1."""
    nonzero = sum(int(tf.math.count_nonzero(each.variable.value)) for each in choices)
    return 1 - nonzero / sum(math.prod(each.variable.shape) for each in choices)
