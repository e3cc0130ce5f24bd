"""Learning-rate schedules as callbacks: fractions of the run, computed inside the compiled step.

When to use: `OneCycle` to train fast in few epochs with a large learning rate; `WarmupCosine` for long
runs, transformers and fine-tuning; `LearningRate` for every other shape (`tfaccel.schedules`). Cost: a
handful of scalar operations a step, no Python.

Why not `keras.optimizers.schedules`: those count absolute steps, which the user has to work out anew
for every batch size, data set and number of epochs; they hide the value from the logs; and under
gradient accumulation they are asked for micro-batches instead of updates.
"""

from __future__ import annotations

from typing import Any

from tfaccel.errors import is_number, refuse
from tfaccel.fit._curves import one_cycle, warmup_cosine
from tfaccel.fit._schedule import ScheduleCallback
from tfaccel.fit.plateau import Plateau, PlateauState
from tfaccel.fit.schedules import Schedule, cosine


class _Peaked(ScheduleCallback):
    """What the two schedules with a peak share."""

    def __init__(
        self,
        max_learning_rate: float,
        warmup: float | None,
        warmup_epochs: float | None,
        default_warmup: float,
        fractions: tuple[float, float],
        steps_per_epoch: int | None,
    ):
        super().__init__(max_learning_rate, steps_per_epoch)
        if warmup is not None and warmup_epochs is not None:
            raise refuse("warmup", warmup, "warmup or warmup_epochs, not both", "Leave one of them out.")
        if warmup is not None and not (is_number(warmup, 0) and warmup <= 1):
            raise refuse("warmup", warmup, "a fraction of the run, 0..1", "For epochs use warmup_epochs.")
        if warmup_epochs is not None and not is_number(warmup_epochs, 0):
            raise refuse("warmup_epochs", warmup_epochs, "a finite number ≥ 0", "Use 0 for no warmup.")
        for name, value in zip(("initial_fraction", "final_fraction"), fractions, strict=True):
            if not (is_number(value, 0) and value <= 1):
                allowed = "a fraction of max_learning_rate, 0..1"
                raise refuse(name, value, allowed, "1 keeps it constant.")
        if warmup is None and warmup_epochs is None:
            warmup = default_warmup
        self.warmup, self.warmup_epochs = warmup, warmup_epochs
        self.initial_fraction, self.final_fraction = fractions

    def peak(self, epochs: float) -> float:
        """Where the peak lies in a run of so many epochs, 0..1."""
        if self.warmup_epochs is not None:
            return min(self.warmup_epochs / epochs, 1.0)
        return self.warmup if self.warmup is not None else 0.0


class OneCycle(_Peaked):
    """Trains with one rise and one fall of the learning rate over the whole `fit`.

    Use it to reach an accuracy in few epochs: a peak 3 to 10 times the constant rate you would take.
    `beta_1`, or the momentum of SGD, falls while the learning rate rises, and the reverse, where it is a
    number; other optimizers keep theirs. The optimizer keeps its own learning rate and momentum once `fit`
    is over.

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

    def learning_rate_at(self, progress: Any, epochs: float) -> Any:
        """The learning rate at `progress` (0..1) of a run of so many epochs."""
        fractions = (self.initial_fraction, self.final_fraction)
        return self.max_learning_rate * one_cycle(progress, self.peak(epochs), *fractions)

    def momentum_at(self, progress: Any, epochs: float) -> Any:
        """The momentum at `progress`: highest at both ends, lowest at the peak."""
        if self.momentum_range is None:
            return None
        lowest, highest = self.momentum_range
        return highest - (highest - lowest) * one_cycle(progress, self.peak(epochs), 0.0, 0.0)

    def __repr__(self) -> str:
        """The call that makes the same schedule."""
        return (
            f"OneCycle({self.max_learning_rate!r}, warmup={self.warmup!r}, "
            f"warmup_epochs={self.warmup_epochs!r}, initial_fraction={self.initial_fraction!r}, "
            f"final_fraction={self.final_fraction!r}, momentum_range={self.momentum_range!r})"
        )


class WarmupCosine(_Peaked):
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

    def learning_rate_at(self, progress: Any, epochs: float) -> Any:
        """The learning rate at `progress` (0..1) of a run of so many epochs."""
        fractions = (self.initial_fraction, self.final_fraction)
        return self.max_learning_rate * warmup_cosine(progress, self.peak(epochs), *fractions)

    def __repr__(self) -> str:
        """The call that makes the same schedule."""
        return (
            f"WarmupCosine({self.max_learning_rate!r}, warmup={self.warmup!r}, "
            f"warmup_epochs={self.warmup_epochs!r}, initial_fraction={self.initial_fraction!r}, "
            f"final_fraction={self.final_fraction!r})"
        )


class LearningRate(ScheduleCallback):
    """Moves the learning rate along a shape of `tfaccel.schedules`, over the whole `fit`.

    The optimizer keeps its own learning rate once `fit` is over.

    Args:
        max_learning_rate: What the shape's 1 stands for; > 0.
        schedule: From `tfaccel.schedules`. Default: `cosine()`.
        plateau: When it falls besides, because a figure has stopped getting better; or None. Where
            `BackupAndRestore` resumes the run, it goes on where it was.
        steps_per_epoch: Batches an epoch; only for data of unknown length. Default: asked of `fit`.

    Raises:
        ValueError: At construction for a bad argument; when `fit` begins, where a warmup or a joined part is
            longer than the run, the number of steps can't be told, the optimizer has a compiled-in schedule,
            or another callback also sets the learning rate; after an epoch, where the plateau's figure is
            not in the logs.

    Example:
        >>> from tfaccel import schedules
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> model.compile(keras.optimizers.SGD(0.01), "mse")
        >>> rate = tfaccel.LearningRate(0.1, schedules.step((3,), unit="epochs"))
        >>> history = model.fit(np.ones((8, 4)), np.ones((8, 2)), epochs=5, verbose=0, callbacks=[rate])
        >>> [round(value, 3) for value in history.history["learning_rate"]]
        [0.1, 0.1, 0.1, 0.01, 0.01]

    Reference:
        `tfaccel.schedules` names one for each shape.
    """

    def __init__(
        self,
        max_learning_rate: float,
        schedule: Schedule | None = None,
        *,
        plateau: Plateau | None = None,
        steps_per_epoch: int | None = None,
    ):
        super().__init__(max_learning_rate, steps_per_epoch)
        if plateau is not None and not isinstance(plateau, Plateau):
            raise refuse("plateau", plateau, "a tfaccel.Plateau, or None", "Try tfaccel.Plateau().")
        if schedule is not None and not isinstance(schedule, Schedule):
            raise refuse("schedule", schedule, "what tfaccel.schedules makes", "Try schedules.cosine().")
        self.schedule = cosine() if schedule is None else schedule
        self.plateau = plateau
        self._plateau_state: PlateauState | None = None

    def learning_rate_at(self, progress: Any, epochs: float) -> Any:
        """The learning rate at `progress` (0..1) of a run of so many epochs."""
        rate = self.max_learning_rate * self.schedule(progress, epochs)
        return rate if self._plateau_state is None else rate * self._plateau_state.factor.value

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks, before the first step, that the schedule can be followed to the end."""
        self._plateau_state = None
        super().on_train_begin(logs)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Attaches in the first epoch, whose number is not 0 where a run is resumed."""
        if self.plateau is not None and self._plateau_state is None:
            self._plateau_state = PlateauState(self.plateau, self, epoch)
        if self._plateau_state is not None:
            self._plateau_state.begin_epoch()
        super().on_epoch_begin(epoch, logs)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes `learning_rate`, that of the last update, into the logs; sees to the plateau."""
        super().on_epoch_end(epoch, logs)
        if self._plateau_state is not None:
            self._plateau_state.see(epoch, logs or {})

    def on_train_end(self, logs: dict | None = None) -> None:
        """Gives the optimizer its own learning rate and momentum back."""
        super().on_train_end(logs)
        if self._plateau_state is not None:
            self._plateau_state.forget()
            self._plateau_state = None

    def __repr__(self) -> str:
        """The call that makes the same schedule."""
        more = "" if self.plateau is None else f", plateau={self.plateau!r}"
        return f"LearningRate({self.max_learning_rate!r}, {self.schedule!r}{more})"
