"""Which way a loop is compiled, found out while it runs.

XLA is not taken on trust. It makes small dense models several times faster and convolutions on a CPU many
times slower, and compiling takes seconds. So a run begins without it; where the steps that are left are worth
a compilation, one step is run both ways from the same state and must agree (`functions.FastFunction` does
that), each way is timed on steps that count, and the fastest one stays.
"""

from __future__ import annotations

import collections
import enum
from collections.abc import Callable, Sequence
from typing import Any

from tfaccel.fast_kernels.placement import on_gpu

# 30 times slower on a CPU: step_time.py --models cnn_bn --batches 32 --contenders tf_plain tf_xla
SLOW_IN_XLA_ON_CPU = ("Conv", "DepthwiseConv", "MaxPool", "AvgPool", "Resize")
NOT_IN_XLA = ("PyFunc", "EagerPyFunc", "Lookup", "String", "Unique", "Where")
COMPILE_SECONDS = 1.0  # to begin with
COMPILE_SECONDS_AN_OP = 4e-3
HOPED_GAIN = 0.5  # of the time that is left
CALLS = 3  # timed of each way, after a first one that compiles
REMEMBERED = 15  # calls
FASTER = 0.95  # of the time without XLA: less gain is noise


class Way(enum.Enum):
    """How the steps of a loop are compiled."""

    PLAIN = "without XLA"
    RECURRENT = "XLA for each recurrent layer, on every core"
    LOOP = "XLA for the whole loop"


class Trial:
    """Decides between the ways of one loop.

    Args:
        steps_left: How many steps the run still has.
        report: Is told the outcome, in words.
        candidates: What may be tried; none where the way is decided.
        decided: The way where there is nothing to find out.
    """

    def __init__(
        self,
        steps_left: int,
        report: Callable[[str], None],
        candidates: Sequence[Way] = (Way.LOOP,),
        decided: Way | None = None,
    ):
        self.steps_left = steps_left
        self.report = report
        self.decided = decided
        self._step_s: dict[Way, collections.deque[float]] = {
            way: collections.deque(maxlen=REMEMBERED) for way in (Way.PLAIN, *candidates)
        }
        self._has_run: set[Way] = set()
        self._reasons: dict[Way, str] = {}
        self._ops: list[str] = []

    def note(self, way: Way, steps: int, seconds: float) -> None:
        """Takes the time of one call."""
        self.steps_left -= steps
        if self.decided is not None:
            return
        times = self._step_s[way]
        if way in self._has_run:
            times.append(seconds / steps)
        self._has_run.add(way)
        if way is not Way.PLAIN and len(times) == CALLS:
            ratio = self._best(way) / self._best(Way.PLAIN)
            self._reasons[way] = f"{ratio:.2f} × the time of a step without it"
            self._conclude()

    def reject(self, way: Way, reason: str) -> None:
        """Gives up a candidate."""
        self._reasons[way] = reason
        del self._step_s[way]
        self._conclude()

    def next_way(self, program: Any) -> Way:
        """How the next call should run.

        Args:
            program: The one without XLA, which has run.
        """
        if self.decided is not None:
            return self.decided
        if len(self._step_s[Way.PLAIN]) < CALLS:
            return Way.PLAIN
        for way in [way for way in self._step_s if way is not Way.PLAIN and way not in self._reasons]:
            if way is Way.LOOP and way not in self._has_run:
                self._ask_ops(program)
            if way in self._step_s and (way in self._has_run or self._pays(way)):
                return way
        return self.decided or self._fastest()

    def _ask_ops(self, program: Any) -> None:
        self._ops = self._ops or op_types(program)
        bad = () if on_gpu() else SLOW_IN_XLA_ON_CPU
        slow = next((p for p in bad for op in self._ops if op.startswith(p)), None)
        if slow:
            self.reject(Way.LOOP, f"it is slow for {slow} on a CPU")
        elif any(part in op for op in self._ops for part in NOT_IN_XLA):
            self.reject(Way.LOOP, "it can't compile every op of the step")

    def _pays(self, way: Way) -> bool:
        """Whether the steps that are left are worth a compilation."""
        ops = len(self._ops) if way is Way.LOOP else 0
        left = self.steps_left * self._best(self._fastest())
        return left * HOPED_GAIN > COMPILE_SECONDS + COMPILE_SECONDS_AN_OP * ops

    def _fastest(self) -> Way:
        """Of those that were timed; without XLA unless another one is clearly faster."""
        timed = [way for way, times in self._step_s.items() if len(times) >= CALLS and way is not Way.PLAIN]
        best = min(timed, key=self._best, default=Way.PLAIN)
        return best if self._best(best) < FASTER * self._best(Way.PLAIN) else Way.PLAIN

    def _best(self, way: Way) -> float:
        """Of a step: other work only adds to a time, and what XLA compiled needs some calls to be warm."""
        return min(self._step_s[way])

    def _conclude(self) -> None:
        """Ends the trial when nothing is left to try; says what is known."""
        timed = len(self._step_s[Way.PLAIN]) >= CALLS
        best = self._fastest() if timed else Way.PLAIN
        if not set(self._step_s) - {Way.PLAIN} - set(self._reasons):
            self.decided = best
        self.report(
            "; ".join(
                f"{way.value}: {'used' if way is best else 'not used'}, {reason}"
                for way, reason in self._reasons.items()
            )
        )


def op_types(program: Any) -> list[str]:
    """The type of every op in a traced program, with those of the functions that it calls."""
    definition = program._list_all_concrete_functions()[0].graph.as_graph_def()
    inner = [node.op for function in definition.library.function for node in function.node_def]
    return [node.op for node in definition.node] + inner
