"""What `tune` tries, in which order, and what a trial said.

The order is a guess at what pays, so that a small budget is spent on it. Precisions are crossed with the best
way to run a step only: the two decide about different things, what is computed and how it is called.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tfaccel.prepare.devices import Devices

MANY_STEPS = 32  # in one call, as by hand
HEADER = f"{'precision':<14}  {'kernels':<7}  {'jit':<5}  {'steps':>5}  {'batch':>5}"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to train: the arguments of `Accelerator`, and the size of a batch.

    Args:
        precision: Name of a dtype policy.
        jit: Whether XLA compiles the step; `"auto"` as `Accelerator` has it.
        kernels: `"plain"` or `"fused"`.
        steps_per_execution: Steps a call, or `"auto"`.
        batch_size: Samples a batch, for arrays; None for data that comes in batches.
    """

    precision: str = "float32"
    jit: bool | str = False
    kernels: str = "plain"
    steps_per_execution: int | str = 1
    batch_size: int | None = None

    def accelerator_options(self) -> dict[str, Any]:
        """Keyword arguments for `Accelerator`."""
        names = ("precision", "jit", "kernels", "steps_per_execution")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        """The cells of a table's row, with `HEADER` for a head."""
        size = "" if self.batch_size is None else str(self.batch_size)
        steps = str(self.steps_per_execution)
        return f"{self.precision:<14}  {self.kernels:<7}  {self.jit!s:<5}  {steps:>5}  {size:>5}"


@dataclasses.dataclass(frozen=True)
class TrialRow:
    """What a trial of one candidate said.

    Args:
        candidate: What was tried.
        step_ms: Least time of a step, over an epoch, ms; None where it could not be measured.
        compile_s: What the first fit took longer than that: tracing, compiling, proving; s.
        run_s: The whole planned run, as these two foretell it; s.
        note: Why it was left out; empty where it may be chosen.
    """

    candidate: Candidate
    step_ms: float | None = None
    compile_s: float | None = None
    run_s: float | None = None
    note: str = ""


def plain(devices: Devices, batch_size: int | None) -> Candidate:
    """What `compile` and `fit` do without tfaccel."""
    return Candidate(jit=False if devices.kind == "cpu" else "auto", batch_size=batch_size)


def ways_to_step(start: Candidate, has_loops: bool) -> list[Candidate]:
    """Other ways to run the same step, the most hopeful first; those that XLA compiles last.

    Args:
        start: Plain Keras.
        has_loops: Whether the model has recurrent layers, for which `jit="auto"` knows one way more.
    """
    fused = dataclasses.replace(start, kernels="fused", steps_per_execution="auto")
    steps = [
        dataclasses.replace(fused, jit=False),
        *([dataclasses.replace(fused, jit="auto")] if has_loops else []),
        dataclasses.replace(start, jit=False, steps_per_execution=MANY_STEPS),
        dataclasses.replace(start, jit=True),
        dataclasses.replace(fused, jit=True),
        dataclasses.replace(start, jit=True, steps_per_execution=MANY_STEPS),
    ]
    return [each for each in steps if each != start]


def precisions(devices: Devices) -> list[str]:
    """Half precisions that the hardware multiplies itself, the one without loss scaling first."""
    known = {"mixed_bfloat16": devices.bfloat16, "mixed_float16": devices.float16}
    return [name for name, present in known.items() if present]
