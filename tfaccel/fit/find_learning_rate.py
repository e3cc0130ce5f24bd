"""`find_learning_rate`: one short run with a rising learning rate, and what it suggests.

When to use: before a run with a peak that is not known from a similar one. It takes some hundred steps; the
model, its optimizer and the random state are afterwards exactly what they were.

Reference: Smith, 2017, "Cyclical Learning Rates for Training Neural Networks",
https://arxiv.org/abs/1506.01186, section 3.3; valley, steep and minimum/10 are those that fastai names.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.errors import is_number, is_whole, refuse
from tfaccel.fit._calls import undo_all, wrap_method
from tfaccel.fit._optimizer import drive, inner_optimizer
from tfaccel.fit._run import updates_done
from tfaccel.fit._schedule import check_optimizer
from tfaccel.fit._session import Attachment
from tfaccel.fit._state import beside
from tfaccel.fit._training_state import training_state_kept
from tfaccel.fit.learning_rate_curve import LearningRateCurve, explodes, smooth
from tfaccel.keras_fixes.random_state import random_state_kept


def find_learning_rate(
    model: keras.Model,
    dataset: Any,
    *,
    batch_size: int | None = None,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 200,
) -> LearningRateCurve:
    """Trains for some steps with a learning rate that rises from step to step, and undoes it.

    It runs in the model's own `fit`, so under its strategy, precision, `steps_per_execution` and gradient
    accumulation. Weights, the optimizer's state, metrics, and the random state are afterwards exactly what
    they were. (A `tf.data` pipeline that shuffles is asked for one more order.) The run ends early once the
    loss rose four times as far as it had fallen, or is not finite.

    Args:
        model: Compiled and built.
        dataset: What `fit` takes: a dataset, a `keras.utils.PyDataset`, or arrays as `(x, y)`. It is read
            again where it has fewer than `steps` batches.
        batch_size: Of arrays. Default 32.
        lowest: The first learning rate, > 0. Default 1e-6.
        highest: The last one, > `lowest`. Default 1.
        steps: Optimizer updates, 10 or more. Default 200.

    Raises:
        ValueError: A bad argument, a model that is not compiled or built, an optimizer with a compiled-in
            schedule, or a `train_step` that does not call `compute_loss`.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> x = np.random.rand(64, 4)
        >>> curve = tfaccel.find_learning_rate(model, (x, x.sum(1)), steps=50)
        >>> callbacks = [tfaccel.OneCycle(curve.peak)]

    Reference:
        Smith, 2017, https://arxiv.org/abs/1506.01186, section 3.3.
    """
    _check(model, batch_size, lowest, highest, steps)
    finder = _Finder(lowest, highest, steps)
    arrays = isinstance(dataset, tuple)
    given = dict(zip(("x", "y", "sample_weight"), dataset, strict=False)) if arrays else {"x": dataset}
    # Keras warns where it is told, by its own default, to shuffle what it can't.
    shuffle = arrays or isinstance(dataset, keras.utils.PyDataset)
    with random_state_kept(), training_state_kept(model):
        model.fit(
            **given, batch_size=batch_size, epochs=1_000_000, shuffle=shuffle, verbose=0, callbacks=[finder]
        )
    return finder.curve()


class _Finder(keras.callbacks.Callback):
    """Raises the learning rate, and notes the loss of each update inside of the step."""

    def __init__(self, lowest: float, highest: float, steps: int):
        super().__init__()
        self._span, self._steps = (math.log(lowest), math.log(highest)), steps

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        check_optimizer(self)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._read_anything = False
        if epoch:
            return
        optimizer = inner_optimizer(self.model.optimizer)
        with self.model.distribute_strategy.scope():
            self._sums = beside(np.zeros(self._steps, "float32"), "mean")
            self._counts = beside(np.zeros(self._steps, "float32"), "mean")
        self._calls = optimizer.gradient_accumulation_steps or 1
        start = updates_done(optimizer)
        rate = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
        low, high = self._span

        def rising(step: Any) -> Any:
            return tf.exp(low + (high - low) * tf.minimum(step / (self._steps - 1), 1.0))

        strategy = self.model.distribute_strategy
        undo = [drive(optimizer, rising, None, start, rate, strategy), self._note_losses(start)]

        self._attachment = Attachment(self.model, undo_all(undo))

    def _note_losses(self, start: int) -> Any:
        optimizer = inner_optimizer(self.model.optimizer)
        replicas = float(self.model.distribute_strategy.num_replicas_in_sync)

        def compute_and_note(compute_loss: Any, *args: Any, **kwargs: Any) -> Any:
            loss = compute_loss(*args, **kwargs)
            step = tf.cast(optimizer.iterations, tf.int32) - start
            here = tf.one_hot(step, self._steps)
            # Keras divides what it gives the gradient by the number of replicas.
            self._sums.assign(self._sums + here * replicas * tf.reduce_mean(tf.cast(loss, tf.float32)))
            self._counts.assign(self._counts + here)
            return loss

        return wrap_method(self.model, "compute_loss", compute_and_note)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        losses = self._losses()
        done = len(losses)
        self._read_anything = True
        if not done or done >= self._steps or explodes(losses):
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if not self._read_anything:  # a generator that is exhausted would be asked for ever
            self.model.stop_training = True

    def on_train_end(self, logs: dict | None = None) -> None:
        self._attachment.detach()

    def _losses(self) -> np.ndarray:
        sums, counts = (keras.ops.convert_to_numpy(each) for each in (self._sums, self._counts))
        done = int((counts > 0).sum())
        if done > 1 and counts[done - 1] < self._calls:  # still adding up its micro-batches
            done -= 1
        return sums[:done] / counts[:done]

    def curve(self) -> LearningRateCurve:
        """What was found."""
        losses = self._losses()
        if not losses.size:
            raise ValueError(
                f"{self.model.name!r} was trained and no loss was seen: its train_step does not call "
                "compute_loss. Allowed: a train_step that does. Let it call self.compute_loss(x, y, y_pred)."
            )
        finite = np.isfinite(losses)
        kept = len(losses) if finite.all() else int(np.argmin(finite))
        if kept < 3:
            raise ValueError(
                f"The loss of {self.model.name!r} is not finite from step {kept} on, at a learning rate of "
                f"{math.exp(self._span[0]):g}. Allowed: a loss that begins finite. Look for NaN in the data, "
                "or pass a smaller lowest=."
            )
        low, high = self._span
        rates = np.exp(low + (high - low) * np.arange(self._steps) / (self._steps - 1))
        losses = losses[:kept]
        diverged = kept < len(finite) or explodes(losses)
        return LearningRateCurve(rates[:kept], losses, smooth(losses), diverged)


def _check(model: keras.Model, batch_size: int | None, lowest: float, highest: float, steps: int) -> None:
    if not (isinstance(model, keras.Model) and model.compiled and model.built):
        name = getattr(model, "name", model)
        raise refuse(
            "model",
            name,
            "a compiled and built keras.Model",
            "Compile it; a keras.Input builds it, or a call on one batch.",
        )
    if batch_size is not None and not is_whole(batch_size, 1):
        raise refuse("batch_size", batch_size, "an integer ≥ 1", "Leave it out for 32.")
    if not is_number(lowest, 0) or lowest == 0:
        raise refuse("lowest", lowest, "a number > 0", "1e-6 is below what trains anything.")
    if not is_number(highest, lowest) or highest == lowest:
        raise refuse("highest", highest, f"a finite number > lowest={lowest}", "Try 1.0.")
    if not is_whole(steps, 10):
        raise refuse("steps", steps, "an integer ≥ 10", "200 give a smooth curve.")
