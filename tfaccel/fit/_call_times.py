"""How long calls into TensorFlow and the hooks of callbacks take in a running `fit`."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import keras

from tfaccel.fit._calls import wrap_method

HOOKS = ("on_epoch_begin", "on_epoch_end", "on_train_batch_begin", "on_train_batch_end")
HELD_UP_S = 0.2  # and five times a usual call: something came in between


class Call(NamedTuple):
    """A call of the train function.

    Args:
        steps: That it ran.
        seconds: That it took.
        traced: Whether the step was traced in it.
        waited_s: Seconds of it that waited for input, where `told_apart`; else 0.
    """

    steps: int
    seconds: float
    traced: bool
    waited_s: float = 0.0


def told_apart(traced: bool, seconds: float) -> bool:
    """Whether it pays to know how long this very call waited: what else it took may be compiling."""
    return traced or seconds > HELD_UP_S


@dataclasses.dataclass
class Calls:
    """The calls of an epoch."""

    rows: list[Call] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of all."""
        return sum(call.seconds for call in self.rows)

    @property
    def steps(self) -> int:
        """Of all."""
        return sum(call.steps for call in self.rows)

    def usual_step_s(self) -> float:
        """The median over the steps of calls in which nothing was traced; 0 where there was none."""
        steady = [call.seconds / call.steps for call in self.rows if call.steps and not call.traced]
        return statistics.median(steady) if steady else 0.0

    def compiling_s(self, step_s: float) -> float:
        """What calls that traced, or were held up, took longer than their steps and their input do.

        Args:
            step_s: Of a usual step; where 0, what was traced is not told apart from its steps.
        """
        return sum(
            max(call.seconds - call.waited_s - call.steps * step_s, 0.0)
            for call in self.rows
            if call.traced or self.held_up(call, step_s)
        )

    @staticmethod
    def held_up(call: Call, step_s: float) -> bool:
        """Whether a call took far longer than its steps."""
        return step_s > 0 and call.seconds > 5 * call.steps * step_s and call.seconds > HELD_UP_S


class TimedFunction:
    """A train function of Keras that notes how long each call took.

    Args:
        function: Keras's.
        steps: Of one call.
        note: Is told steps and seconds.
    """

    def __init__(self, function: Callable[[Any], Any], steps: int, note: Callable[[int, float], None]):
        self._function, self._steps, self._note = function, steps, note

    def __call__(self, iterator: Any) -> Any:
        """As Keras's."""
        begun = time.perf_counter()
        logs = self._function(iterator)
        self._note(self._steps, time.perf_counter() - begun)
        return logs


class CallbackTimes:
    """Seconds in the hooks of each callback.

    Args:
        callbacks: Of the running `fit`.
        but: Left out.
    """

    def __init__(self, callbacks: Iterable[keras.callbacks.Callback], but: keras.callbacks.Callback):
        self.seconds: dict[str, float] = {}
        self._undo: list[Callable[[], None]] = []
        for callback in callbacks:
            for hook in HOOKS:
                overridden = getattr(type(callback), hook) is not getattr(keras.callbacks.Callback, hook)
                if callback is not but and (overridden or hook in vars(callback)):
                    self._time(callback, hook)

    @property
    def total(self) -> float:
        """Of all of them."""
        return sum(self.seconds.values())

    def stop(self) -> None:
        """Takes the clocks off again."""
        while self._undo:
            self._undo.pop()()

    def _time(self, callback: keras.callbacks.Callback, hook: str) -> None:
        name = type(callback).__name__
        self.seconds.setdefault(name, 0.0)

        def timed(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - begun

        self._undo.append(wrap_method(callback, hook, timed))
