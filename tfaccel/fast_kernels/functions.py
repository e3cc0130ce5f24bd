"""What stands in for `model.train_function` and `model.test_function`: Keras's own, or a compiled loop.

XLA is not taken on trust. It makes small dense and recurrent models several times faster and convolutions on
a CPU many times slower, and compiling takes seconds. So a run begins without it; when the steps that are left
are worth a compilation, one step is run both ways from the same weights and must agree, both are timed on
steps that count, and the faster one stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfaccel.fast_kernels.agreement import same_step
from tfaccel.fast_kernels.chunks import CallLength, Chunk
from tfaccel.fast_kernels.resident import MEMORY_FRACTION, Pass, ResidentBatches, free_memory_bytes
from tfaccel.fast_kernels.same_random import same_random_numbers
from tfaccel.fast_kernels.step_loop import resident_loop, stream_loop
from tfaccel.keras_fixes.input_clock import Reading

# XLA's convolutions on a CPU: 713 ms a step where TensorFlow's take 19 (benchmarks/step_time.py).
SLOW_IN_XLA_ON_CPU = ("Conv", "DepthwiseConv", "MaxPool", "AvgPool", "Resize")
NOT_IN_XLA = ("PyFunc", "EagerPyFunc", "Lookup", "String", "Unique", "Where")
COMPILE_SECONDS = 1.0  # to begin with
COMPILE_SECONDS_AN_OP = 4e-3
HOPED_GAIN = 0.5  # of the time that is left


class XlaTrial:
    """Decides between the two compilations of one loop, while it runs.

    Args:
        steps_left: How many steps the run still has.
        report: Is told the outcome, in words.
    """

    def __init__(self, steps_left: int, report: Callable[[str], None]):
        self.steps_left = steps_left
        self.report = report
        self.decided: bool | None = None
        self._step_s: dict[bool, list[float]] = {False: [], True: []}
        self._calls = 0

    def note(self, xla: bool, steps: int, seconds: float) -> None:
        """Takes the time of one call of either program; the first of each compiles and is left out."""
        self.steps_left -= steps
        self._step_s[xla].append(seconds / steps)
        times = self._step_s
        if self.decided is None and len(times[True]) >= 3 and len(times[False]) >= 3:
            plain, compiled = (float(np.median(times[xla][1:])) for xla in (False, True))
            self.decide(compiled < 0.95 * plain, f"{compiled / plain:.2f} × the time of a step without it")

    def decide(self, use: bool, reason: str) -> None:
        """Ends the trial."""
        self.decided = use
        self.report(f"XLA for the whole loop: {'used' if use else 'not used'}, {reason}")

    def next_is_xla(self, program: Any) -> bool:
        """Whether the next call should run the XLA program.

        Args:
            program: The one without XLA, which has run.
        """
        if self.decided is not None:
            return self.decided
        times = self._step_s
        if len(times[False]) < 3:
            return False
        if not times[True]:
            return self._is_worth_trying(program)
        return len(times[True]) < 3

    def _is_worth_trying(self, program: Any) -> bool:
        names = op_types(program)
        for prefix in SLOW_IN_XLA_ON_CPU:
            if any(name.startswith(prefix) for name in names):
                self.decide(False, f"it is slow for {prefix} on a CPU")
                return False
        if any(part in name for name in names for part in NOT_IN_XLA):
            self.decide(False, "it can't compile every op of the step")
            return False
        left = self.steps_left * float(np.median(self._step_s[False][1:]))
        return left * HOPED_GAIN > COMPILE_SECONDS + COMPILE_SECONDS_AN_OP * len(names)


def op_types(program: Any) -> list[str]:
    """The type of every op in a traced program, with those of the functions that it calls."""
    concrete = program._list_all_concrete_functions()[0]
    definition = concrete.graph.as_graph_def()
    inner = [node.op for function in definition.library.function for node in function.node_def]
    return [node.op for node in definition.node] + inner


class LoopClock:
    """Counts what the loops of one `fit` ran; a `keras_fixes.input_clock.Clock`."""

    def __init__(self) -> None:
        self.skip = 0
        self.reset()

    def reset(self) -> None:
        """Starts counting from zero."""
        self._reading = Reading(0.0, 0.0, 0.0, 0.0)

    def read(self) -> Reading:
        """What was counted since `reset()`."""
        return self._reading

    def note(self, batches: int, examples: int, waited_s: float) -> None:
        """Adds one call; the first of all traced and compiled, and is skipped by who computes rates."""
        now = self._reading
        first = now.batches == 0
        self.skip = batches if first else self.skip
        self._reading = Reading(
            now.waited_s + waited_s,
            now.examples + examples,
            now.batches + batches,
            time.time() if first else now.steady_at,
        )


class FastFunction:
    """A train or test function that takes chunks, and everything that Keras's own takes.

    Args:
        keras_function: Keras's, for batches that come as Python objects.
        step: From a batch to its logs.
        state: Gives every variable that a step may change.
        xla: True, False, or None to find out.
        report: Is told what was found out about XLA.
    """

    def __init__(
        self,
        keras_function: Any,
        step: Any,
        state: Callable[[], list[tf.Variable]],
        xla: bool | None,
        report: Callable[[str], None],
    ):
        self._keras_function = keras_function
        self._step = step
        self._state = state
        self._xla = xla
        self._report = report
        self._programs: dict[Any, Any] = {}
        self._trials: dict[Any, XlaTrial] = {}
        self._steps_left = 0
        self.length = CallLength(1, False)
        self.clock = LoopClock()

    def expect_steps(self, steps: int) -> None:
        """Says how many steps the run that begins will have; 0 where that is not known."""
        self._steps_left = steps
        for trial in self._trials.values():
            trial.steps_left = steps

    def __call__(self, iterator: Any) -> Any:
        """Runs what Keras's loop hands over; gives the logs of the last step."""
        if not isinstance(iterator, Chunk):
            return self._keras_function(iterator)
        source, first, count = iterator.source, iterator.first, iterator.count
        started = time.perf_counter()
        if isinstance(source, Pass):
            logs, waited_s = self._run_resident(source, first, count), 0.0
            size, samples = source.batches.batch_size, source.batches.samples
            examples = min((first + count) * size, samples) - first * size
        else:
            program = self._program("stream", lambda: stream_loop(self._step))
            logs, *counts = program(source, tf.constant(count))
            count, examples, waited_s = (tensor.numpy().item() for tensor in counts)
        iterator.ran(count)
        self.length.took(count, time.perf_counter() - started)
        self.clock.note(count, examples, waited_s)
        return logs

    def _run_resident(self, source: Pass, first: int, count: int) -> Any:
        batches = source.batches
        trial = self._trial(batches)
        plain = self._resident(batches, xla=False)
        full = min(count, batches.full_batches - first)
        logs = None
        while full > 0:
            xla = trial.next_is_xla(plain)
            now = full
            if xla and trial.decided is None and (batches.signature, True) not in self._programs:
                now = 1
                logs = self._try_xla(trial, source, first)
            else:
                started = time.perf_counter()
                logs = self._resident(batches, xla)(*_arguments(source, first, now))
                trial.note(xla, now, time.perf_counter() - started)
            first, full, count = first + now, full - now, count - now
        if count > 0:  # the partial batch at the end
            logs = plain(*_arguments(source, first, count))
        return logs

    def _try_xla(self, trial: XlaTrial, source: Pass, first: int) -> Any:
        """Runs one step both ways from the same state; the state afterwards is that of one step."""
        arguments = _arguments(source, first, 1)
        plain, compiled = (self._resident(source.batches, xla) for xla in (False, True))
        variables = self._state()
        copies = 3 * sum(variable.dtype.size * variable.shape.num_elements() for variable in variables)
        if copies > MEMORY_FRACTION * free_memory_bytes():
            trial.decide(False, "the state of the model is too large to be kept twice for a trial")
            return plain(*arguments)
        before = [variable.numpy() for variable in variables]
        logs = plain(*arguments)
        expected = [variable.numpy() for variable in variables]
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
        try:
            compiled(*arguments)
        except tf.errors.OpError as error:
            reason = f"it can't compile the step ({str(error).splitlines()[0][:80]})"
        else:
            reason = same_step(variables, before, expected, [variable.numpy() for variable in variables])
        if reason:
            trial.decide(False, reason)
            for variable, value in zip(variables, expected, strict=True):
                variable.assign(value)
        trial.steps_left -= 1
        return logs

    def _trial(self, batches: ResidentBatches) -> XlaTrial:
        if batches.signature not in self._trials:
            trial = self._trials[batches.signature] = XlaTrial(self._steps_left, self._report)
            trial.decided = self._xla
        return self._trials[batches.signature]

    def _resident(self, batches: ResidentBatches, xla: bool) -> Any:
        static = xla or batches.samples % batches.batch_size == 0
        step = self._xla_step if xla else self._step
        return self._program((batches.signature, xla), lambda: resident_loop(step, batches, static, xla))

    def _xla_step(self, data: Any) -> Any:
        with same_random_numbers():
            return self._step(data)

    def _program(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._programs:
            self._programs[key] = make()
        return self._programs[key]


def _arguments(source: Pass, first: int, count: int) -> tuple:
    return source.batches.leaves, source.order, tf.constant(first), tf.constant(count)
