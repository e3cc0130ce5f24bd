"""What stands in for `model.train_function` and `model.test_function`: Keras's own, or a compiled loop."""

from __future__ import annotations

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfaccel.fast_kernels.agreement import same_step
from tfaccel.fast_kernels.chunks import CallLength, Chunk
from tfaccel.fast_kernels.resident import MEMORY_FRACTION, Pass, ResidentBatches
from tfaccel.fast_kernels.step_loop import Step, resident_loop, stream_loop
from tfaccel.fast_kernels.trial import Trial, Way, op_types
from tfaccel.free_memory import free_memory_bytes
from tfaccel.keras_fixes.input_clock import Reading

MOST_PROGRAMS = 8  # kept for one model


class LoopClock:
    """Counts what the loops of one `fit` ran; a `keras_fixes.input_clock.Clock`."""

    def __init__(self) -> None:
        self.skip = 0
        self.watchers: list[Callable[[int, float], None]] = []  # are told steps and seconds of each call
        self.reset()

    def reset(self) -> None:
        """Starts counting from zero."""
        self._reading = Reading(0.0, 0.0, 0.0, 0.0)

    def read(self) -> Reading:
        """What was counted since `reset()`."""
        return self._reading

    def note(self, batches: int, examples: int, waited_s: float, seconds: float) -> None:
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
        for watcher in self.watchers:
            watcher(batches, seconds)


class FastFunction:
    """A train or test function that takes chunks, and everything that Keras's own takes.

    Args:
        keras_function: Keras's, for batches that come as Python objects.
        step: The step for each way of compiling it.
        state: Gives the variables that a step may change, and those of them that are the optimizer's.
        ways: What to choose from; the first one is taken where there is only one, and a run begins with it.
        report: Is told what was found out.
        around: Makes a context in which programs are traced and run.
    """

    def __init__(
        self,
        keras_function: Any,
        step: Callable[[Way], Step],
        state: Callable[[], tuple[list[tf.Variable], list[tf.Variable]]],
        ways: Sequence[Way],
        report: Callable[[str], None],
        around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ):
        self._keras_function = keras_function
        self._step = step
        self._state = state
        self._ways = ways
        self._report = report
        self._around = around
        self._programs: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        self._trials: dict[Any, Trial] = {}
        self._agreed: set[Any] = set()  # keys of programs whose step was equal
        self._rejected: dict[Any, str] = {}  # why others are never run again
        self._steps_left = 0
        self._traced: set[Any] = set()  # keys of programs that ran
        self._of_fixed_size: set[Any] = set()  # those that can't be traced for an open number of rows
        self.length = CallLength(1, False)
        self.clock = LoopClock()
        self.before_tracing: Callable[[], None] = lambda: None  # once, when callbacks have begun

    def expect_steps(self, steps: int) -> None:
        """Says how many steps the run that begins will have; 0 where that is not known."""
        self._steps_left = steps
        for trial in self._trials.values():
            trial.steps_left = steps

    def __call__(self, iterator: Any) -> Any:
        """Runs what Keras's loop hands over; gives the logs of the last step."""
        if not isinstance(iterator, Chunk):
            return self._keras_function(iterator)
        with self._around():
            return self._run_chunk(iterator)

    def _run_chunk(self, chunk: Chunk) -> Any:
        source, first, count = chunk.source, chunk.first, chunk.count
        started = time.perf_counter()
        if not self._programs:
            self.before_tracing()
        if isinstance(source, Pass):
            logs, waited_s = self._run_resident(source, first, count), 0.0
            size, samples = source.batches.batch_size, source.batches.samples
            examples = min((first + count) * size, samples) - first * size
        else:
            way = self._ways[0]
            program = self._program("stream", lambda: stream_loop(self._step(way), way is Way.LOOP))
            logs, *counts = program(source, tf.constant(count))
            count, examples, waited_s = (tensor.numpy().item() for tensor in counts)
        if self.length.grows:
            _wait_for(logs)
        seconds = time.perf_counter() - started
        chunk.ran(count)
        self.length.took(count, seconds)
        self.clock.note(count, examples, waited_s, seconds)
        return logs

    def _run_resident(self, source: Pass, first: int, count: int) -> Any:
        batches = source.batches
        trial = self._trial(batches)
        full = min(count, batches.full_batches - first)
        logs = None
        while full > 0:
            now, way = full, trial.next_way(self._loop(Way.PLAIN, batches))
            if trial.decided is None and way is not Way.PLAIN and self._key(way, batches) not in self._agreed:
                now, logs = 1, self._try(way, trial, source, first)
            else:
                started = time.perf_counter()
                logs = self._run(way, source, first, now)
                if trial.decided is None:
                    _wait_for(logs)
                trial.note(way, now, time.perf_counter() - started)
            first, full, count = first + now, full - now, count - now
        if count > 0:  # the partial batch at the end
            logs = self._run(Way.PLAIN, source, first, count)
        return logs

    def _run(self, way: Way, source: Pass, first: int, count: int) -> Any:
        batches, arguments = source.batches, _arguments(source, first, count)
        key = self._key(way, batches)
        if way is not Way.PLAIN or key in self._traced or not _are_whole(batches):
            return self._loop(way, batches)(*arguments)
        try:
            logs = self._loop(way, batches)(*arguments)
            self._traced.add(key)
            return logs
        except tf.errors.OpError:
            raise  # it was traced, and has run
        # Whatever the user's code raises while it is traced: it may have asked how many rows a batch has, as
        # a loss with an identity matrix of that size does. Keras knows it where all batches are whole.
        except Exception:
            pass
        del self._programs[key]
        self._of_fixed_size.add(key)
        self._traced.add(self._key(way, batches))
        return self._loop(way, batches)(*arguments)

    def _try(self, way: Way, trial: Trial, source: Pass, first: int) -> Any:
        """Runs one step both ways from the same state; the state afterwards is that of one step."""
        arguments = _arguments(source, first, 1)
        plain, other = (self._loop(w, source.batches) for w in (Way.PLAIN, way))
        trial.steps_left -= 1
        variables, slots = self._variables(plain)
        reason = _why_not_twice(plain, variables)
        if reason:
            trial.reject(way, reason)
            return plain(*arguments)
        before = [variable.numpy() for variable in variables]
        logs = plain(*arguments)
        expected = [variable.numpy() for variable in variables]
        _assign(variables, before)
        reason = "it was interrupted"
        try:
            other(*arguments)
            got = [variable.numpy() for variable in variables]
            reason = same_step(variables, before, expected, got, slots)
        # XLA raises TypeError, ValueError and any of tf.errors while it compiles; none may end the fit.
        except Exception as error:
            reason = f"it can't compile the step ({(str(error) or repr(error)).splitlines()[0][:80]})"
        finally:
            if reason:
                _assign(variables, expected)
        key = self._key(way, source.batches)
        if reason:
            self._rejected[key] = reason
            del self._programs[key]
            trial.reject(way, reason)
        else:
            self._agreed.add(key)
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

    def _trial(self, batches: ResidentBatches) -> Trial:
        key = (self._key(Way.LOOP, batches), batches.samples)  # XLA compiles for one number of samples
        if key not in self._trials:
            while len(self._trials) >= MOST_PROGRAMS:
                del self._trials[next(iter(self._trials))]
            first, *others = self._ways
            trial = Trial(self._steps_left, self._report, others, None if others else first)
            for way in others:
                if self._key(way, batches) in self._rejected:
                    trial.reject(way, self._rejected[self._key(way, batches)])
            self._trials[key] = trial
        return self._trials[key]

    def _loop(self, way: Way, batches: ResidentBatches) -> Any:
        key = self._key(way, batches)
        make = functools.partial(resident_loop, form=batches.form, static_size=key[-1], xla=way is Way.LOOP)
        return self._program(key, lambda: make(self._step(way)))

    def _key(self, way: Way, batches: ResidentBatches) -> tuple:
        """What a program depends on; its last part is the number of rows, or None where that is left open."""
        key = way, batches.form.signature, None
        is_open = way is Way.PLAIN and not (key in self._of_fixed_size and _are_whole(batches))
        return key if is_open else (*key[:-1], batches.batch_size)

    def _program(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._programs:
            self._programs[key] = make()
            if len(self._programs) > MOST_PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return self._programs[key]


def _are_whole(batches: ResidentBatches) -> bool:
    return batches.samples % batches.batch_size == 0


def _why_not_twice(program: Any, variables: list[tf.Variable]) -> str:
    """Why a step can't be run twice from the same state; empty where it can."""
    copies = 3 * sum(variable.dtype.size * variable.shape.num_elements() for variable in variables)
    if copies > MEMORY_FRACTION * free_memory_bytes():
        return "the state of the model is too large to be kept twice for a trial"
    handles = {id(variable.handle) for variable in variables}
    if any(name in op for op in op_types(program) for name in ("PyFunc", "EagerPyFunc")):
        return "the step calls Python, which may count its calls"
    concrete = program._list_all_concrete_functions()[0]
    resources = [tensor for tensor in concrete.captured_inputs if tensor.dtype == tf.resource]
    if any(id(tensor) not in handles for tensor in resources):
        return "the step changes something that can't be set back for a trial"
    return ""


def _assign(variables: list[tf.Variable], values: list[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _wait_for(logs: Any) -> None:
    """Waits until the first number is there: a GPU computes on when a call has returned.

    Only where something is decided by how long a call took; else the host prepares the next one meanwhile.
    """
    for leaf in tf.nest.flatten(logs):
        if isinstance(leaf, tf.Tensor):
            leaf.numpy()
            return


def _arguments(source: Pass, first: int, count: int) -> tuple:
    numbers = (source.batches.batch_size, first, count)
    return source.batches.leaves, source.order, *(tf.constant(number, tf.int32) for number in numbers)
