"""Where the time of a `fit` goes, and what in it is not finite.

When to use: a run that is slower than it should be, or that gives NaN. It goes beyond `Throughput` in that it
looks at everything between two epochs: calls into TensorFlow, hooks of callbacks, validation, what traces the
step again; and holds the step's operations against what this machine reaches.

It costs two readings of a clock for each call into TensorFlow and each hook; and before the run an extra
trace of a step that was traced already, after the first epoch one more, with half a second for the probe of
the machine.
"""

from __future__ import annotations

import math
import os
import pathlib
import time
from typing import Any

import keras
import tensorflow as tf

from tfaccel.errors import refuse
from tfaccel.fit._call_times import Call, CallbackTimes, Calls, TimedFunction, told_apart
from tfaccel.fit._calls import undo_all, wrap_method
from tfaccel.fit._non_finite import NonFiniteWatch, check_loss_scale
from tfaccel.fit._session import Attachment
from tfaccel.fit._traces import Traces
from tfaccel.fit.profile_page import check_plots, write_page
from tfaccel.fit.profile_report import ProfileReport, ProfileRow
from tfaccel.fit.throughput import Throughput
from tfaccel.keras_fixes.callback_siblings import siblings
from tfaccel.keras_fixes.input_clock import Reading, data_source, running_epoch_iterator
from tfaccel.machine_speed import machine_speed
from tfaccel.step_graph import StepCost, step_cost

LOOKED_EVERY_S = 0.1  # for values that are not finite
MOST_HELD_UP = 5  # are told of


class Profile(Throughput):
    """Measures where a `fit` spends its time, and stops it where the loss is not finite.

    Adds to what `Throughput` writes into the logs, each a share of the epoch (0..1): `compute`, `callbacks`,
    `host` (Keras's Python), `compile`; and `mfu`, the share of this machine's own matrix product that the
    step reaches. After the run `report` has all of it, with one line of advice.

    On a GPU, under `kernels="plain"`, a call returns before the device is done, and what it still computes
    counts as `host`.

    Args:
        path: Where to write the report as a web page with plots, or None. It replaces what is there.
        watch: Whether a loss that is not finite ends the run, with the layer and the update it began at.
            Default True.
        verbose: 1 prints a line an epoch and the report in the end, 0 nothing. Default 1.

    Raises:
        ValueError: A bad argument; a `path` and no matplotlib.
        FloatingPointError: In `fit`: the loss is not finite, or the loss scale has decayed to nothing.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> model.compile("sgd", "mse")
        >>> profile = tfaccel.Profile(verbose=0)
        >>> history = model.fit(
        ...     np.ones((64, 4)), np.ones((64, 2)), epochs=2, verbose=0, callbacks=[profile]
        ... )
        >>> 0 <= profile.report.share("compute") <= 1
        True

    Reference:
        Chowdhery et al., 2022, https://arxiv.org/abs/2204.02311, appendix B (model FLOPs utilization).
    """

    def __init__(self, path: str | os.PathLike | None = None, *, watch: bool = True, verbose: int = 1):
        super().__init__(verbose)
        if path is not None and not isinstance(path, str | os.PathLike):
            raise refuse("path", path, "a file name, or None", 'Such as "report.html".')
        if not isinstance(watch, bool):
            raise refuse("watch", watch, "True or False", "Leave it out for True.")
        if path is not None:
            check_plots()
        self.path = None if path is None else pathlib.Path(path)
        self.watch = watch
        self._validation_s = 0.0
        self._report: ProfileReport | None = None

    @property
    def report(self) -> ProfileReport:
        """Of the last `fit` that came to its end.

        Raises:
            ValueError: There was none.
        """
        if self._report is None:
            raise ValueError("No fit has ended with this callback. Allowed: after one. Pass it to model.fit.")
        return self._report

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Puts the clocks in."""
        super().on_train_begin(logs)
        self._calls = Calls()
        self._rows: list[ProfileRow] = []
        self._held_up: list[str] = []
        self._traces = Traces()
        self._traced = False
        self._cost: StepCost | None = None
        self._looked_at = 0.0
        self._source = data_source(running_epoch_iterator())
        self._callback_times = CallbackTimes(siblings(self), self)
        self._attach()

    def _attach(self) -> None:
        self._watch = NonFiniteWatch(self.model) if self.watch else None
        undo = [self._callback_times.stop]
        if self._watch is not None:
            undo.append(self._watch.attach())
        self._train_step = self.model.train_step
        undo.append(wrap_method(self.model, "train_step", self._run_step))

        self._attachment = Attachment(self.model, undo_all(undo), made_anew=self._note_new_function)
        watchers = getattr(self._clock, "watchers", None)
        if watchers is not None:
            watchers.append(self._note_call)

    def _note_new_function(self) -> None:
        """Puts the clock round a train function of Keras's that was made anew; ours tell by themselves."""
        self._traces.step_changed()
        function = self.model.train_function
        if not hasattr(self._clock, "watchers") and not isinstance(function, TimedFunction | None):
            steps = self.model.steps_per_execution
            self.model.train_function = TimedFunction(function, steps, self._note_call)

    def _run_step(self, train_step: Any, data: Any) -> Any:
        """Runs as Python only where the step is traced."""
        if self._traces.note(data):
            self._traced = True
            self._waited_before = self._waited_s()
        if self._watch is None:
            return train_step(data)
        with self._watch.watching(data):
            return train_step(data)

    def _note_call(self, steps: int, seconds: float) -> None:
        waited_s = 0.0
        if told_apart(self._traced, seconds):
            total = self._waited_s()
            waited_s, self._waited_before = min(total - self._waited_before, seconds), total
        self._calls.rows.append(Call(steps, seconds, self._traced, waited_s))
        self._traced = False
        if time.perf_counter() - self._looked_at > LOOKED_EVERY_S:
            self._look()
            self._looked_at, self._waited_before = time.perf_counter(), self._waited_s()

    def _waited_s(self) -> float:
        """For input, since the epoch began."""
        if self._clock is None:
            return 0.0
        with tf.init_scope():  # it may be asked while a step is traced
            return self._clock.read().waited_s

    def _look(self) -> None:
        """Ends the run where the loss is not finite, unless loss scaling may still get over it."""
        if self._watch is None:
            return
        found = self._watch.found()
        if isinstance(self.model.optimizer, keras.optimizers.LossScaleOptimizer):
            check_loss_scale(self.model.optimizer, found)
        elif found:
            raise FloatingPointError(
                f"{found} Allowed: finite losses. Look for it in the batch, in a logarithm, a division or a "
                "root; lower the learning rate, or clip the gradients."
            )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Starts the epoch's count, and ends that of the one before with what came behind it."""
        self._end_epoch()
        super().on_epoch_begin(epoch, logs)
        self._calls, self._validation_s, self._own_s = Calls(), 0.0, 0.0
        self._callbacks_before = self._callback_times.total
        self._reading = Reading(0.0, 0.0, 0.0, 0.0)
        self._waited_before = 0.0
        self._began = time.perf_counter()

    def on_test_begin(self, logs: dict | None = None) -> None:
        """Validation begins."""
        super().on_test_begin(logs)
        self._test_began = time.perf_counter()

    def on_test_end(self, logs: dict | None = None) -> None:
        """Validation ends."""
        self._validation_s += time.perf_counter() - self._test_began

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes the shares into the logs; after the first epoch of the run counts the step's operations."""
        begun = time.perf_counter()
        self._look()
        if self._clock is not None:
            self._reading = self._clock.read()
        super().on_epoch_end(epoch, logs)
        row = self._row()
        if self._cost is None:
            self._cost = self._count_operations()
        if logs is not None:
            shares = {name: getattr(row, name) for name in ("compute", "callbacks", "host", "compile")}
            logs.update({name: value / row.seconds for name, value in shares.items()})
            used = self._make_report([row]).utilization
            if self._cost.flops:
                logs["mfu"] = math.nan if used is None else used
        self._own_s += time.perf_counter() - begun

    def _end_epoch(self) -> None:
        """Keeps the epoch, with what came behind its end."""
        if not self._calls.rows:
            return
        self._rows.append(self._row())
        step_s = self._calls.usual_step_s()
        for number, call in enumerate(self._calls.rows):
            if not call.traced and self._calls.held_up(call, step_s) and len(self._held_up) < MOST_HELD_UP:
                usual = f"{1e3 * call.steps * step_s:.3g} ms are usual"
                self._held_up.append(
                    f"call {number + 1} of epoch {len(self._rows)}: {call.seconds:.3g} s, where {usual}"
                )

    def _row(self) -> ProfileRow:
        """The epoch so far."""
        wall = time.perf_counter() - self._began - self._own_s
        step_s = self._calls.usual_step_s()
        called = self._calls.seconds
        waited = min(self._reading.waited_s, called)
        compiling = min(self._calls.compiling_s(step_s), called - waited)
        callbacks = self._callback_times.total - self._callbacks_before
        rest = wall - called - callbacks - self._validation_s
        return ProfileRow(
            called - waited - compiling,
            waited,
            callbacks,
            max(rest, 0.0),
            compiling,
            self._validation_s,
            self._reading.examples,
            self._calls.steps,
        )

    def _count_operations(self) -> StepCost:
        """Traces the step once more, for a batch of the size that was seen."""
        nothing = StepCost(0.0, 0)
        read = self._reading
        batch = self._traces.first_batch(math.ceil(read.examples / read.batches) if read.batches else None)
        if batch is None or self.model.distribute_strategy.num_replicas_in_sync > 1:
            return nothing
        try:
            return step_cost(self._train_step, batch)
        # A step that can't be traced on its own is still trained; its operations stay uncounted.
        except Exception:
            return nothing

    def on_train_end(self, logs: dict | None = None) -> None:
        """Takes the clocks out again and makes the report."""
        self._end_epoch()
        self._attachment.detach()
        self._report = self._make_report(self._rows)
        if self.path is not None:
            write_page(self._report, self.model.name, self.path)
        if self.verbose:
            print(self._report, flush=True)

    def _make_report(self, rows: list[ProfileRow]) -> ProfileReport:
        cost = self._cost or StepCost(0.0, 0)
        speed = machine_speed(self.model.compute_dtype) if cost.flops else None
        return ProfileReport(
            tuple(rows),
            tuple(self._traces.causes),
            tuple(self._held_up),
            {name: s for name, s in self._callback_times.seconds.items() if s},
            cost.flops,
            speed.flops_per_s if speed else 0.0,
            cost.moved_bytes,
            speed.bytes_per_s if speed else 0.0,
            self._source,
        )

    def __repr__(self) -> str:
        """The call that makes the same callback."""
        path = None if self.path is None else str(self.path)
        return f"Profile({path!r}, watch={self.watch}, verbose={self.verbose})"
