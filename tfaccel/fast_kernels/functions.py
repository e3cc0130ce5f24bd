"""What stands in for `model.train_function` and `model.test_function`: Keras's own, or a compiled loop.

XLA is not taken on trust. It makes small dense and recurrent models several times faster and convolutions on
a CPU many times slower, and compiling takes seconds. So a run begins without it; when the steps that are left
are worth a compilation, one step is run both ways from the same weights and must agree, both are timed on
steps that count, and the faster one stays.
"""

from __future__ import annotations

import collections
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

# 30 times slower on a CPU: step_time.py --models cnn_bn --batches 32 --contenders tf_plain tf_xla
SLOW_IN_XLA_ON_CPU = ("Conv", "DepthwiseConv", "MaxPool", "AvgPool", "Resize")
NOT_IN_XLA = ("PyFunc", "EagerPyFunc", "Lookup", "String", "Unique", "Where")
MOST_PROGRAMS = 8  # kept for one model
COMPILE_SECONDS = 1.0  # to begin with
COMPILE_SECONDS_AN_OP = 4e-3
HOPED_GAIN = 0.5  # of the time that is left


class XlaTrial:
    """Decides between the two compilations of one loop, while it runs.

    Args:
        steps_left: How many steps the run still has.
        report: Is told the outcome, in words.
        decided: True or False where there is nothing to find out.
    """

    def __init__(self, steps_left: int, report: Callable[[str], None], decided: bool | None = None):
        self.steps_left = steps_left
        self.report = report
        self.decided = decided
        self._step_s: dict[bool, list[float]] = {False: [], True: []}
        self._ops: list[str] = []

    def note(self, xla: bool, steps: int, seconds: float) -> None:
        """Takes the time of one call of either program; the first of each compiles and is left out."""
        self.steps_left -= steps
        if self.decided is not None:
            return
        times = self._step_s
        times[xla].append(seconds / steps)
        if len(times[True]) >= 3 and len(times[False]) >= 3:
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
        if not self._ops:
            self._ops = op_types(program)
            slow = next((p for p in SLOW_IN_XLA_ON_CPU for op in self._ops if op.startswith(p)), None)
            if slow:
                self.decide(False, f"it is slow for {slow} on a CPU")
            elif any(part in op for op in self._ops for part in NOT_IN_XLA):
                self.decide(False, "it can't compile every op of the step")
        if self.decided is not None:
            return self.decided
        left = self.steps_left * float(np.median(self._step_s[False][1:]))
        return left * HOPED_GAIN > COMPILE_SECONDS + COMPILE_SECONDS_AN_OP * len(self._ops)


def op_types(program: Any) -> list[str]:
    """The type of every op in a traced program, with those of the functions that it calls."""
    definition = program._list_all_concrete_functions()[0].graph.as_graph_def()
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
        state: Gives the variables that a step may change, and those of them that are the optimizer's.
        xla: True, False, or None to find out.
        report: Is told what was found out about XLA.
    """

    def __init__(
        self,
        keras_function: Any,
        step: Any,
        state: Callable[[], tuple[list[tf.Variable], list[tf.Variable]]],
        xla: bool | None,
        report: Callable[[str], None],
    ):
        self._keras_function = keras_function
        self._step = step
        self._state = state
        self._xla = xla
        self._report = report
        self._programs: collections.OrderedDict[Any, Any] = collections.OrderedDict()
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
            xla = self._xla is True
            program = self._program("stream", lambda: stream_loop(self._xla_step if xla else self._step, xla))
            logs, *counts = program(source, tf.constant(count))
            count, examples, waited_s = (tensor.numpy().item() for tensor in counts)
        iterator.ran(count)
        self.length.took(count, time.perf_counter() - started)
        self.clock.note(count, examples, waited_s)
        return logs

    def _run_resident(self, source: Pass, first: int, count: int) -> Any:
        batches = source.batches
        trial, plain = self._trial(batches), self._plain(batches)
        full = min(count, batches.full_batches - first)
        logs = None
        while full > 0:
            now, xla = full, trial.next_is_xla(plain)
            if xla and trial.decided is None and self._xla_key(batches) not in self._programs:
                now, logs = 1, self._try_xla(trial, source, first)
            else:
                started = time.perf_counter()
                program = self._compiled(batches) if xla else plain
                logs = program(*_arguments(source, first, now))
                trial.note(xla, now, time.perf_counter() - started)
            first, full, count = first + now, full - now, count - now
        if count > 0:  # the partial batch at the end
            logs = plain(*_arguments(source, first, count))
        return logs

    def _try_xla(self, trial: XlaTrial, source: Pass, first: int) -> Any:
        """Runs one step both ways from the same state; the state afterwards is that of one step."""
        arguments = _arguments(source, first, 1)
        plain, compiled = self._plain(source.batches), self._compiled(source.batches)
        trial.steps_left -= 1
        variables, slots = self._variables(plain)
        reason = _why_not_twice(plain, variables)
        if reason:
            trial.decide(False, reason)
            return plain(*arguments)
        before = [variable.numpy() for variable in variables]
        logs = plain(*arguments)
        expected = [variable.numpy() for variable in variables]
        _assign(variables, before)
        try:
            compiled(*arguments)
        except tf.errors.OpError as error:
            reason = f"it can't compile the step ({str(error).splitlines()[0][:80]})"
        else:
            got = [variable.numpy() for variable in variables]
            reason = same_step(variables, before, expected, got, slots)
        if reason:
            trial.decide(False, reason)
            _assign(variables, expected)
        return logs

    def _variables(self, program: Any) -> tuple[list[tf.Variable], set[int]]:
        """Every variable of a traced program, and the `id`s of those that are the optimizer's.

        The program's own list lacks what the fused op updates; the model's lacks what Keras doesn't track,
        such as a second optimizer.
        """
        known, slots = self._state()
        traced = program._list_all_concrete_functions()[0].graph.variables
        variables = {id(variable): variable for variable in (*known, *traced)}
        return list(variables.values()), {id(slot) for slot in slots}

    def _trial(self, batches: ResidentBatches) -> XlaTrial:
        key = (self._xla_key(batches), batches.samples)  # XLA compiles for one number of samples
        if key not in self._trials:
            while len(self._trials) >= MOST_PROGRAMS:
                del self._trials[next(iter(self._trials))]
            self._trials[key] = XlaTrial(self._steps_left, self._report, self._xla)
        return self._trials[key]

    def _plain(self, batches: ResidentBatches) -> Any:
        form = batches.form
        return self._program(form.signature, lambda: resident_loop(self._step, form, None))

    def _compiled(self, batches: ResidentBatches) -> Any:
        form, size = batches.form, batches.batch_size
        return self._program(self._xla_key(batches), lambda: resident_loop(self._xla_step, form, size))

    def _xla_key(self, batches: ResidentBatches) -> tuple:
        return "xla", batches.form.signature, batches.batch_size

    def _xla_step(self, data: Any) -> Any:
        with same_random_numbers():
            return self._step(data)

    def _program(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._programs:
            self._programs[key] = make()
            if len(self._programs) > MOST_PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return self._programs[key]


def _why_not_twice(program: Any, variables: list[tf.Variable]) -> str:
    """Why a step can't be run twice from the same state; empty where it can."""
    copies = 3 * sum(variable.dtype.size * variable.shape.num_elements() for variable in variables)
    if copies > MEMORY_FRACTION * free_memory_bytes():
        return "the state of the model is too large to be kept twice for a trial"
    handles = {id(variable.handle) for variable in variables}
    concrete = program._list_all_concrete_functions()[0]
    resources = [tensor for tensor in concrete.captured_inputs if tensor.dtype == tf.resource]
    if any(id(tensor) not in handles for tensor in resources):
        return "the step changes something that can't be set back for a trial"
    return ""


def _assign(variables: list[tf.Variable], values: list[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _arguments(source: Pass, first: int, count: int) -> tuple:
    numbers = (source.batches.batch_size, first, count)
    return source.batches.leaves, source.order, *(tf.constant(number, tf.int32) for number in numbers)
