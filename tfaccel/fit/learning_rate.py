"""Learning-rate schedules as callbacks: fractions of the run, computed inside the compiled step.

When to use: `OneCycle` to train fast in few epochs with a large learning rate; `WarmupCosine` for long
runs, transformers and fine-tuning. Cost: a handful of scalar operations a step, no Python.

Why not `keras.optimizers.schedules`: those count absolute steps, which the user has to work out anew
for every batch size, data set and number of epochs; they hide the value from the logs; and under
gradient accumulation they are asked for micro-batches instead of updates.
"""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from tfaccel.fit._schedule import ScheduleCallback


def one_cycle(
    progress: Any, warmup: float, initial_fraction: float = 0.04, final_fraction: float = 1e-4
) -> Any:
    """The multiplier of the peak: cosine from `initial_fraction` up to 1, then down to `final_fraction`.

    Args:
        progress: Position in the run, 0..1 (scalar or tensor, float).
        warmup: Where the peak lies, 0..1.
        initial_fraction: Multiplier at progress 0.
        final_fraction: Multiplier at progress 1.

    Reference:
        Smith & Topin, 2018, "Super-Convergence", https://arxiv.org/abs/1708.07120; with cosine instead
        of linear legs, as fastai and PyTorch do.
    """
    up = _cosine_between(initial_fraction, 1.0, _position(progress, 0.0, warmup))
    down = _cosine_between(1.0, final_fraction, _position(progress, warmup, 1.0))
    return tf.where(progress < warmup, up, down)


def warmup_cosine(
    progress: Any, warmup: float, initial_fraction: float = 0.0, final_fraction: float = 0.0
) -> Any:
    """The multiplier of the peak: a straight line up to 1, then half a cosine to `final_fraction`.

    Args:
        progress: Position in the run, 0..1 (scalar or tensor, float).
        warmup: Where the peak lies, 0..1.
        initial_fraction: Multiplier at progress 0.
        final_fraction: Multiplier at progress 1.

    Reference:
        Loshchilov & Hutter, 2017, "SGDR", https://arxiv.org/abs/1608.03983, equation 5, one period;
        warmup: Goyal et al., 2017, https://arxiv.org/abs/1706.02677, section 2.2.
    """
    up = initial_fraction + (1.0 - initial_fraction) * _position(progress, 0.0, warmup)
    down = _cosine_between(1.0, final_fraction, _position(progress, warmup, 1.0))
    return tf.where(progress < warmup, up, down)


def _position(progress: Any, begin: float, end: float) -> Any:
    """Where `progress` lies between `begin` (0) and `end` (1), clipped; 1 where they coincide."""
    if end <= begin:
        return tf.ones_like(progress)
    return tf.clip_by_value((progress - begin) / (end - begin), 0.0, 1.0)


def _cosine_between(first: float, last: float, position: Any) -> Any:
    return last + (first - last) * 0.5 * (1.0 + tf.cos(math.pi * position))


class OneCycle(ScheduleCallback):
    """Trains with one rise and one fall of the learning rate over the whole `fit`.

    Use it to reach an accuracy in few epochs: a peak 3 to 10 times the constant rate you would take.
    Momentum (or `beta_1`) falls while the learning rate rises, and the reverse, where the optimizer has
    it as a number. The optimizer keeps its own learning rate and momentum once `fit` is over.

    Args:
        max_learning_rate: The peak; > 0.
        warmup: Where the peak lies, as a fraction of the run, 0..1. Default 0.3.
        warmup_epochs: The same in epochs, instead of `warmup`.
        initial_fraction: First learning rate as a fraction of the peak, 0..1. Default 0.04.
        final_fraction: Last learning rate as a fraction of the peak, 0..1. Default 1e-4.
        momentum_range: `(lowest, highest)` momentum, or None to leave it alone. Default (0.85, 0.95).
        steps_per_epoch: Batches an epoch; only for data of unknown length. Default: asked of `fit`.

    Raises:
        ValueError: At construction for a value out of range; when `fit` begins, where the number of
            steps can't be told, the optimizer has a compiled-in schedule, or another callback also
            sets the learning rate.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> model.compile(keras.optimizers.Adam(1e-3), "mse")
        >>> cycle = tfaccel.OneCycle(max_learning_rate=1e-2)
        >>> history = model.fit(np.ones((8, 4)), np.ones((8, 2)), epochs=3, verbose=0, callbacks=[cycle])
        >>> len(history.history["learning_rate"])
        3

    Reference:
        Smith & Topin, 2018, "Super-Convergence: Very Fast Training of Neural Networks Using Large
        Learning Rates", https://arxiv.org/abs/1708.07120, figure 1a.
    """

    def __init__(
        self,
        max_learning_rate: float,
        *,
        warmup: float | None = None,
        warmup_epochs: float | None = None,
        initial_fraction: float = 0.04,
        final_fraction: float = 1e-4,
        momentum_range: tuple[float, float] | None = (0.85, 0.95),
        steps_per_epoch: int | None = None,
    ):
        fractions = (initial_fraction, final_fraction)
        super().__init__(max_learning_rate, warmup, warmup_epochs, 0.3, fractions, steps_per_epoch)
        if momentum_range is not None:
            given = momentum_range if isinstance(momentum_range, tuple | list) else ()
            if len(given) != 2 or not 0 <= given[0] <= given[1] < 1:
                raise ValueError(
                    f"momentum_range={momentum_range!r} is not usable. Allowed: (lowest, highest) with "
                    "0 ≤ lowest ≤ highest < 1, or None. Take (0.85, 0.95)."
                )
        self.momentum_range = momentum_range

    def learning_rate_at(self, progress: Any, warmup: float) -> Any:
        """The learning rate at `progress` (0..1) of a run whose peak lies at `warmup`."""
        fractions = (self.initial_fraction, self.final_fraction)
        return self.max_learning_rate * one_cycle(progress, warmup, *fractions)

    def momentum_at(self, progress: Any, warmup: float) -> Any:
        """The momentum at `progress`: highest at both ends, lowest at the peak."""
        if self.momentum_range is None:
            return None
        lowest, highest = self.momentum_range
        return highest - (highest - lowest) * one_cycle(progress, warmup, 0.0, 0.0)

    def __repr__(self) -> str:
        """The call that makes the same schedule."""
        return (
            f"OneCycle({self.max_learning_rate!r}, warmup={self.warmup!r}, "
            f"warmup_epochs={self.warmup_epochs!r}, initial_fraction={self.initial_fraction!r}, "
            f"final_fraction={self.final_fraction!r}, momentum_range={self.momentum_range!r})"
        )


class WarmupCosine(ScheduleCallback):
    """Raises the learning rate in a straight line, then lets it fall along half a cosine.

    Use it for long runs, transformers and fine-tuning. The optimizer keeps its own learning rate once
    `fit` is over.

    Args:
        max_learning_rate: The peak; > 0.
        warmup: Where the peak lies, as a fraction of the run, 0..1. Default 0.1.
        warmup_epochs: The same in epochs, instead of `warmup`.
        initial_fraction: First learning rate as a fraction of the peak, 0..1. Default 0.
        final_fraction: Last learning rate as a fraction of the peak, 0..1. Default 0.
        steps_per_epoch: Batches an epoch; only for data of unknown length. Default: asked of `fit`.

    Raises:
        ValueError: At construction for a value out of range; when `fit` begins, where the number of
            steps can't be told, the optimizer has a compiled-in schedule, or another callback also
            sets the learning rate.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> model.compile(keras.optimizers.SGD(0.01), "mse")
        >>> schedule = tfaccel.WarmupCosine(0.1, warmup_epochs=1)
        >>> x, y = np.ones((8, 4)), np.ones((8, 2))
        >>> history = model.fit(x, y, batch_size=4, epochs=3, verbose=0, callbacks=[schedule])
        >>> round(history.history["learning_rate"][-1], 6)
        0.0

    Reference:
        Loshchilov & Hutter, 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts",
        https://arxiv.org/abs/1608.03983, equation 5.
    """

    def __init__(
        self,
        max_learning_rate: float,
        *,
        warmup: float | None = None,
        warmup_epochs: float | None = None,
        initial_fraction: float = 0.0,
        final_fraction: float = 0.0,
        steps_per_epoch: int | None = None,
    ):
        fractions = (initial_fraction, final_fraction)
        super().__init__(max_learning_rate, warmup, warmup_epochs, 0.1, fractions, steps_per_epoch)

    def learning_rate_at(self, progress: Any, warmup: float) -> Any:
        """The learning rate at `progress` (0..1) of a run whose peak lies at `warmup`."""
        fractions = (self.initial_fraction, self.final_fraction)
        return self.max_learning_rate * warmup_cosine(progress, warmup, *fractions)

    def __repr__(self) -> str:
        """The call that makes the same schedule."""
        return (
            f"WarmupCosine({self.max_learning_rate!r}, warmup={self.warmup!r}, "
            f"warmup_epochs={self.warmup_epochs!r}, initial_fraction={self.initial_fraction!r}, "
            f"final_fraction={self.final_fraction!r})"
        )
