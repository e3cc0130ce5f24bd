"""How long the running `fit` is, counted in optimizer updates."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfaccel.errors import refuse
from tfaccel.fit._optimizer import inner_optimizer
from tfaccel.keras_fixes.callback_siblings import changer_behind, siblings


def updates_per_epoch(callback: keras.callbacks.Callback, steps_per_epoch: int | None = None) -> float:
    """Optimizer updates in an epoch; a fraction where accumulation spans the epoch's end.

    Args:
        callback: Of the running `fit`.
        steps_per_epoch: Batches an epoch where the user has said so; None asks `fit`.

    Raises:
        ValueError: The data has no known length.
    """
    batches = steps_per_epoch or callback.params.get("steps")
    if not batches:
        own = " or to the callback" if hasattr(callback, "steps_per_epoch") else ""
        raise ValueError(
            f"{type(callback).__name__} can't tell how long this fit will be: the data has no known "
            "length. Allowed: arrays, a PyDataset, a dataset of known cardinality. Pass "
            f"steps_per_epoch to fit(){own}, or apply "
            "tf.data.experimental.assert_cardinality(batches) to the dataset."
        )
    return batches / (inner_optimizer(callback.model.optimizer).gradient_accumulation_steps or 1)


def check_order(callback: keras.callbacks.Callback) -> None:
    """Raises ValueError where a callback behind this one puts other weights back when training ends."""
    other = changer_behind(callback)
    if other is not None:
        name = type(callback).__name__
        raise ValueError(
            f"{name} is listed before {type(other).__name__}, which changes the weights when training ends: "
            f"they would not be those that {name} made. Allowed: {name} behind it. Exchange them."
        )


def check_begin_epoch(callback: Any) -> None:
    """Raises ValueError where `begin_epoch` is not in the running fit, or a best epoch may be before it."""
    check_early_stopping(callback, callback.begin_epoch)
    if callback.begin_epoch >= callback.params["epochs"]:
        allowed = f"an epoch of this fit, 0 to {callback.params['epochs'] - 1}"
        raise refuse("begin_epoch", callback.begin_epoch, allowed, "Train longer, or begin earlier.")


def check_early_stopping(callback: keras.callbacks.Callback, epoch: int) -> None:
    """Raises ValueError where the best weights could be those of an epoch before `epoch`.

    Args:
        callback: That reaches its aim by then.
        epoch: The first whose weights are as they should be; 0 is the first of all.
    """
    for other in siblings(callback):
        if (
            isinstance(other, keras.callbacks.EarlyStopping)
            and other.restore_best_weights
            and other.start_from_epoch < epoch
        ):
            raise ValueError(
                f"EarlyStopping could put back weights from before epoch {epoch}, when "
                f"{type(callback).__name__} is not done yet. Allowed: start_from_epoch ≥ {epoch}. Pass "
                f"EarlyStopping(..., start_from_epoch={epoch})."
            )


def updates_done(optimizer: keras.optimizers.Optimizer) -> int:
    """Updates that an optimizer has made so far; Python's number, for use outside of a step."""
    return int(keras.ops.convert_to_numpy(inner_optimizer(optimizer).iterations))


def check_updates(callback: keras.callbacks.Callback, before: int) -> None:
    """Raises ValueError at the end of an epoch in which `model.optimizer` made no update.

    A GAN's `train_step` applies optimizers of its own. Keras still gives the model one, which then does
    nothing, and whatever follows its updates would do nothing too, without a word.

    Args:
        callback: Of the running `fit`.
        before: Updates that had been made when the epoch began.
    """
    model, optimizer = callback.model, callback.model.optimizer
    if type(model).train_step is keras.Model.train_step or model.stop_training:
        return
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        scale = getattr(optimizer, "dynamic_scale", optimizer.initial_scale)  # once it is built
        if float(keras.ops.convert_to_numpy(scale)) != optimizer.initial_scale:
            return  # it was applied, and skipped steps that overflow
        optimizer = optimizer.inner_optimizer
    micro_batches = optimizer.gradient_accumulation_steps or 1
    if updates_done(optimizer) == before and (callback.params.get("steps") or 1) >= micro_batches:
        raise ValueError(
            f"{type(callback).__name__} follows the updates of model.optimizer, "
            f"a {type(optimizer).__name__}, which made none in an epoch: the train_step of "
            f"{model.name!r} applies others. Allowed: a train_step that calls self.optimizer.apply. "
            "Leave the callback out; for a schedule, give each of your optimizers one of "
            "keras.optimizers.schedules."
        )


def updates_with_this_one(optimizer: keras.optimizers.Optimizer) -> tuple[Any, Any]:
    """Inside of `apply`, behind the update: how many there are now, and whether this call was one.

    With accumulation most calls only add a gradient. Keras counts a call once it is over, and
    `optimizer.iterations` divides that count, so the count itself is asked.

    Returns:
        int64 and bool tensors.
    """
    inner = inner_optimizer(optimizer)
    calls = tf.cast(next(v for v in inner.variables if v.name == "iteration").value, tf.int64) + 1
    each = inner.gradient_accumulation_steps or 1
    return calls // each, tf.equal(calls % each, 0)


def check_apart(callback: Any) -> None:
    """Raises ValueError where another of the class, listed before, has chosen one of the same weights."""
    others = siblings(callback)
    mine = {id(each.variable): each.variable.path for each in callback.chosen}
    for other in others[: others.index(callback)]:
        if type(other) is type(callback):
            both = [mine[id(each.variable)] for each in other.chosen if id(each.variable) in mine]
            if both:
                name = type(callback).__name__
                raise ValueError(
                    f"Two {name} of this fit have chosen {both[0]}. Allowed: each weight once. Name other "
                    "layers in each with layers=, or put what both say into one."
                )


def check_alone(callback: keras.callbacks.Callback) -> None:
    """Raises ValueError where two callbacks of the same class run in a fit."""
    if sum(type(other) is type(callback) for other in siblings(callback)) > 1:
        name = type(callback).__name__
        raise ValueError(f"Two {name} run in this fit. Allowed: one. Put what both say into one dict.")
