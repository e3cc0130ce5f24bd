"""Where the time of a `fit` went, as a value that prints itself and gives one line of advice."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

PARTS = ("compute", "input", "callbacks", "host", "compile", "validation")
WORTH_SAYING = 0.15  # of the time of the run
GOOD_UTILIZATION = 0.3  # of what a large matrix product, or a large copy, reaches
INPUT_REMEDIES = {
    "arrays": "accelerator.dataset(x, y) keeps them where the step gathers its batches",
    "tf.data": "cache() behind the slow map, num_parallel_calls=tf.data.AUTOTUNE, and prefetch() at the end",
    "python": "more workers in the PyDataset, or a tf.data pipeline, whose stages run beside the step",
    "resident": "a larger batch gathers more at once",
}


@dataclasses.dataclass(frozen=True)
class ProfileRow:
    """One epoch, in seconds.

    Args:
        compute: In steps that were compiled already.
        input: That the steps waited for their batches.
        callbacks: In hooks of callbacks.
        host: In Keras's own Python, and what is left.
        compile: Tracing, compiling, and calls that something held up.
        validation: In validation.
        examples: Samples that were trained on; 0 where that can't be counted.
        steps: Of training.
    """

    compute: float
    input: float
    callbacks: float
    host: float
    compile: float
    validation: float
    examples: float
    steps: int

    @property
    def seconds(self) -> float:
        """The whole epoch."""
        return sum(getattr(self, part) for part in PARTS)


@dataclasses.dataclass(frozen=True)
class ProfileReport:
    """Where the time of a `fit` went.

    Args:
        rows: One for each epoch.
        traces: Why the step was traced, once for each time.
        held_up: Calls that took far longer than others in which nothing was traced, as sentences.
        callbacks: Seconds in the hooks of each callback, by its class.
        flops: Floating point operations of a step; 0 where they could not be counted.
        peak_flops_per_s: Of this machine's matrix product, measured.
        bytes_moved: That a step's operations read and write, if none were fused.
        peak_bytes_per_s: That this machine moves, measured.
        source: The kind of data: `"arrays"`, `"tf.data"`, `"python"` or `"resident"`.

    Example:
        >>> from tfaccel.fit.profile_report import ProfileRow
        >>> row = ProfileRow(3.0, 6.0, 0.5, 0.5, 0.0, 0.0, 32_000, 1000)
        >>> report = tfaccel.ProfileReport((row,), ("first step",), source="tf.data")
        >>> report.share("input")
        0.6
        >>> report.advice
        '60 % of the time the step waits for its input (6 s of 10): cache() behind the slow map, ...'
    """

    rows: tuple[ProfileRow, ...]
    traces: tuple[str, ...]
    held_up: tuple[str, ...] = ()
    callbacks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    flops: float = 0.0
    peak_flops_per_s: float = 0.0
    bytes_moved: float = 0.0
    peak_bytes_per_s: float = 0.0
    source: str = "tf.data"

    @property
    def seconds(self) -> float:
        """Of all epochs."""
        return sum(row.seconds for row in self.rows)

    def share(self, part: str) -> float:
        """Of the whole time, 0..1: of `"compute"` or another field of `ProfileRow`."""
        return sum(getattr(row, part) for row in self.rows) / self.seconds if self.seconds else 0.0

    @property
    def step_s(self) -> float:
        """Seconds of a step's computation, without waiting."""
        steps = sum(row.steps for row in self.rows)
        return sum(row.compute for row in self.rows) / steps if steps else 0.0

    @property
    def utilization(self) -> float | None:
        """Model FLOPs utilization, 0..1: of what this machine's matrix product reaches; None if unknown."""
        if not (self.flops and self.peak_flops_per_s and self.step_s):
            return None
        return self.flops / self.step_s / self.peak_flops_per_s

    @property
    def bandwidth(self) -> float | None:
        """Of the memory bandwidth, if no operation were fused; can be above 1 where values stay in caches."""
        if not (self.bytes_moved and self.peak_bytes_per_s and self.step_s):
            return None
        return self.bytes_moved / self.step_s / self.peak_bytes_per_s

    @property
    def advice(self) -> str:
        """The one change that promises most."""
        shares = {part: self.share(part) for part in PARTS if part not in ("compute", "validation")}
        part = max(shares, key=lambda name: shares[name])
        if shares[part] < WORTH_SAYING:
            return self._advice_on_computing()
        seconds = sum(getattr(row, part) for row in self.rows)
        share, of_all = f"{100 * shares[part]:.0f} %", f"{seconds:.3g} s of {self.seconds:.3g}"
        if part == "input":
            return (
                f"{share} of the time the step waits for its input ({of_all}): {INPUT_REMEDIES[self.source]}."
            )
        if part == "callbacks":
            slowest = max(self.callbacks, key=lambda name: self.callbacks[name])
            return f"{share} of the time goes to callbacks ({of_all}), mostly {slowest}: call it less often."
        if part == "compile":
            cause = self.traces[-1] if len(self.traces) > 1 else (self.held_up or ("the first step",))[-1]
            times = f"traced {self._times()}, " if self.traces else ""
            return (
                f"{share} of the time is tracing and compiling ({of_all}; {times}last for {cause}): a longer "
                "run makes up for it, and so may jit=False where XLA compiles."
            )
        remedy = (
            "build and compile the model in an Accelerator's scope, or pass steps_per_execution to compile"
        )
        return f"{share} of the time is Python between the steps ({of_all}): {remedy}."

    def _advice_on_computing(self) -> str:
        share = f"{100 * self.share('compute'):.0f} % of the time computes"
        if self.utilization is None or self.utilization > GOOD_UTILIZATION:
            return f"{share}: nothing stands out."
        used = f"at {100 * self.utilization:.2g} % of what this machine multiplies"
        if (self.bandwidth or 0.0) > GOOD_UTILIZATION:
            remedy = "it waits for memory: fused kernels, XLA and half precision move less, tune() tries them"
        else:
            remedy = "its operations are small: find_batch_size() and tune() look for what fills the machine"
        return f"{share}, {used}: {remedy}."

    def __str__(self) -> str:
        """The parts as a table, the figures of a step, and the advice."""
        width = 30
        lines = [f"{self.seconds:.3g} s in {len(self.rows)} epochs"]
        for part in PARTS:
            share = self.share(part)
            if share:
                bar = "█" * round(width * share) or "▏"
                lines.append(f"  {part:<10} {100 * share:5.1f} %  {bar}")
        if self.callbacks and self.share("callbacks") >= WORTH_SAYING:
            slowest = sorted(self.callbacks.items(), key=lambda item: -item[1])[:3]
            lines.append("  callbacks: " + ", ".join(f"{name} {seconds:.3g} s" for name, seconds in slowest))
        lines.append(f"  a step: {self._step()}")
        if self.traces:  # none where the model runs eagerly, or was traced by an earlier fit
            lines.append(f"  traced {self._times()}: " + "; ".join(self.traces))
        lines += [f"  held up: {each}" for each in self.held_up]
        return "\n".join([*lines, self.advice])

    def _times(self) -> str:
        return "once" if len(self.traces) == 1 else f"{len(self.traces)} times"

    def _step(self) -> str:
        parts = [f"{1e3 * self.step_s:.3g} ms"]
        if self.utilization is not None:
            reached, best = self.flops / self.step_s / 1e9, self.peak_flops_per_s / 1e9
            parts.append(
                f"{self.flops / 1e9:.3g} GFLOP at {reached:.3g} GFLOP/s, {100 * self.utilization:.2g} % of "
                f"the {best:.3g} that a matrix product reaches here"
            )
        if self.bandwidth is not None:
            share = f"{100 * self.bandwidth:.2g} % of the bandwidth"
            parts.append(f"{self.bytes_moved / 1e6:.3g} MB read and written, {share}")
        return "; ".join(parts)
