"""The search of `tune`: a candidate's model, its trials, and which of them go on."""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.accelerator import Accelerator
from tfaccel.errors import refuse
from tfaccel.keras_fixes.inner_layers import inner_layers
from tfaccel.prepare.candidates import HEADER, Candidate, TrialRow, precisions, ways_to_step
from tfaccel.prepare.devices import Devices
from tfaccel.prepare.trial_run import EpochClock, Sample, StopSlow
from tfaccel.tuned_options import TunedOptions

SEED = 1
TRIAL_S = 0.4  # what an epoch of a trial takes under plain Keras
FEWEST_STEPS, MOST_STEPS = 4, 1024
NOISE = 0.98
HOPELESS, CALL_S = 2.0, 0.02  # XLA alone being slower than both, it is not tried with anything else
KEPT = 4  # candidates that stay in memory
DEPARTURE = 4.0  # times as far as rounding and other random numbers brought the losses apart
TRIAL_EPOCHS, LOSS_EPOCHS = 4, 2
FAILURES = (ValueError, TypeError, NotImplementedError, RuntimeError, tf.errors.OpError)


class CandidateRun:
    """A candidate's model, and how its trials went."""

    def __init__(self, candidate: Candidate, search: Search, seed: int = SEED):
        self.candidate = candidate
        self.accelerator = Accelerator(search.strategy, **candidate.accelerator_options())
        keras.utils.set_random_seed(seed)
        with self.accelerator.scope():
            self.model = search.build_model(**self.accelerator.compile_options())
            _check_model(self.model)
            if not self.model.built:
                self.model(search.sample.inputs(candidate.batch_size))
        self._epoch_s: list[float] = []  # without the first of each fit
        self._first_fit_s: list[float] = []
        self.losses: list[float] = []
        self._data: tuple[int, dict[str, Any]] | None = None

    def _fit_arguments(self, batches: int, sample: Sample, baseline: bool) -> dict[str, Any]:
        if self._data is None or self._data[0] != batches:
            data, size = sample.first(batches, self.candidate.batch_size), self.candidate.batch_size
            if baseline and sample.arrays:
                names = ("x", "y", "sample_weight")
                given = {**dict(zip(names, data, strict=False)), "batch_size": size}
            elif sample.arrays:
                given = {"x": self.accelerator.dataset(data, batch_size=size, shuffle=False)}
            else:
                given = {"x": data if baseline else self.accelerator.dataset(data)}
            self._data = batches, given
        return self._data[1]

    def train(self, batches: int, sample: Sample, epochs: int, baseline: bool, *callbacks: Any) -> None:
        """Trains for some epochs of so many batches; the first one of a fit is not counted as steady."""
        clock = EpochClock()
        given = self._fit_arguments(batches, sample, baseline)
        self.model.fit(**given, epochs=epochs, shuffle=False, verbose=0, callbacks=[clock, *callbacks])
        seconds = clock.seconds()
        self._first_fit_s = self._first_fit_s or seconds
        self._epoch_s += seconds[1:] or seconds  # a trial that was stopped has no second one
        self.losses += clock.losses

    @property
    def epoch_s(self) -> float:
        """The least time of an epoch: other work on the machine can only add to it."""
        return min(self._epoch_s)

    @property
    def compile_s(self) -> float:
        """What the first fit took longer than that: XLA also compiles in the second epoch and the third."""
        return max(sum(self._first_fit_s) - len(self._first_fit_s) * self.epoch_s, 0.0)


class Search:
    """The trials of one `tune`."""

    def __init__(
        self,
        build_model: Callable[..., keras.Model],
        sample: Sample,
        strategy: Any,
        epochs: int,
        budget_s: float,
        verbose: int,
    ):
        self.build_model, self.sample, self.strategy = build_model, sample, strategy
        self.devices = Devices.find()
        self._epochs, self._budget_s, self._verbose = epochs, budget_s, verbose
        self._began = time.perf_counter()
        if verbose:
            print(HEADER, flush=True)
        self._costs: list[tuple[bool, float]] = []
        self._notes: dict[Candidate, str] = {}
        self._measured: dict[Candidate, TrialRow] = {}
        self._runs: list[CandidateRun] = []

    def begin(self, candidate: Candidate) -> None:
        """Builds what all others are compared with."""
        self.baseline = CandidateRun(candidate, self)
        if isinstance(self.baseline.accelerator.strategy, tf.distribute.MultiWorkerMirroredStrategy):
            raise refuse(
                "strategy", self.strategy, "one worker's", "Each would choose by its own clock: tune on one."
            )
        self._start = self.baseline.model.get_weights()

    def run(self, other_batch_sizes: Iterable[int | None]) -> None:
        """The whole search."""
        self._measure_baseline()
        has_loops = any(isinstance(each, keras.layers.RNN) for each in inner_layers(self.baseline.model))
        for candidate in ways_to_step(self.baseline.candidate, has_loops):
            hopeless = self._xla_is_hopeless() if candidate.jit is True else ""
            self._try(candidate, hopeless)
        for precision in precisions(self.devices):
            self._try(dataclasses.replace(self._leader(), precision=precision))
        self._train_leaders_on()
        for size in other_batch_sizes:
            self._try(dataclasses.replace(self._leader(), batch_size=size), same_losses=False)
        self._train_leaders_on()

    def _measure_baseline(self) -> None:
        begun = time.perf_counter()
        size = self.baseline.candidate.batch_size
        whole = self.sample.steps(size)
        probe = CandidateRun(self.baseline.candidate, self)
        if probe.model is self.baseline.model:
            raise ValueError(
                "build_model gave the same model twice. Allowed: a new one at each call, with its first "
                "weights. Make the model inside of build_model."
            )
        few = min(FEWEST_STEPS, whole)
        probe.train(few, self.sample, 2, True)
        step_s = max(probe.epoch_s / few, 1e-5)
        self.batches = int(min(max(TRIAL_S / step_s, few), MOST_STEPS, whole))
        self.baseline.train(self.batches, self.sample, TRIAL_EPOCHS, True)
        self._runs.append(self.baseline)
        # The same training from weights rounded to eight bits, with other random numbers.
        rounded = CandidateRun(self.baseline.candidate, self, SEED + 1)
        rounded.model.set_weights([_rounded(each) for each in self._start])
        rounded.train(self.batches, self.sample, LOSS_EPOCHS, True)
        mine = np.array(self.baseline.losses[:LOSS_EPOCHS])
        theirs = np.array(rounded.losses[:LOSS_EPOCHS])
        if not np.isfinite(mine).all():
            raise ValueError(
                f"The loss under plain Keras is {mine[-1]} after {LOSS_EPOCHS * self.batches} steps. "
                "Allowed: a finite one. Look for NaN in the data, or lower the learning rate."
            )
        self.allowed = DEPARTURE * float(np.abs(mine - theirs).max()) + 1e-3 * float(np.abs(mine).max())
        self._note(self.baseline, time.perf_counter() - begun)

    def _xla_is_hopeless(self) -> str:
        """Why XLA isn't worth another trial; empty where it is."""
        alone = dataclasses.replace(self.baseline.candidate, jit=True)
        note = self._notes.get(alone, "")
        return f"jit=True alone: {note}" if note.startswith(("slow", "failed")) else ""

    def _try(self, candidate: Candidate, why_not: str = "", same_losses: bool = True) -> None:
        """A first short trial; what it says is in `_measured` or `_notes`."""
        if candidate in self._measured or candidate in self._notes:
            return
        xla = candidate.jit is True
        cost = max((seconds for compiled, seconds in self._costs if compiled == xla), default=0.0)
        if not why_not and self._left() < cost:
            why_not = f"not tried: the {self._budget_s:g} s were spent"
        if why_not:
            self._reject(candidate, why_not)
            return
        begun = time.perf_counter()
        # Only where a call is one step can a trial be stopped.
        plain_step_s = self._step_s(self.baseline)
        stop = StopSlow(max(5 * plain_step_s, 2 * CALL_S)) if candidate.steps_per_execution == 1 else None
        try:
            run = CandidateRun(candidate, self)
            run.train(self._batches_of(run), self.sample, TRIAL_EPOCHS, False, *([stop] if stop else []))
        except FAILURES as error:
            if isinstance(error, tf.errors.ResourceExhaustedError):
                gc.collect()
            self._reject(candidate, f"failed: {type(error).__name__}: {_first_line(error)}")
            return
        finally:
            self._costs.append((xla, time.perf_counter() - begun))
        if stop is not None and stop.stopped_at_s is not None:
            self._reject(candidate, f"slow: {1e3 * stop.stopped_at_s:.3g} ms a step")
            return
        departed = self._departure(run) if same_losses else ""
        if departed:
            self._reject(candidate, departed)
            return
        self._runs.append(run)
        self._note(run, time.perf_counter() - begun)
        step_s = self._step_s(run)
        # Where calling the step is what takes so long, XLA may still win with many of them in a call.
        if candidate.steps_per_execution == 1 and step_s > max(HOPELESS * plain_step_s, CALL_S):
            self._reject(candidate, f"slow: {step_s / plain_step_s:.1f} × plain Keras")
        self._drop_laggards()

    def _departure(self, run: CandidateRun) -> str:
        """Why its losses aren't those of float32; empty where they are."""
        mine = np.array(run.losses[:LOSS_EPOCHS])
        if not np.isfinite(mine).all():
            return f"rejected: its loss is {mine[~np.isfinite(mine)][0]}"
        departed = float(np.abs(mine - np.array(self.baseline.losses[:LOSS_EPOCHS])).max())
        if departed <= self.allowed:
            return ""
        return f"rejected: its loss departs from float32's by {departed:.2g} (allowed: {self.allowed:.2g})"

    def _batches_of(self, run: CandidateRun) -> int:
        """As many samples as plain Keras's trial has."""
        size, plain_size = run.candidate.batch_size, self.baseline.candidate.batch_size
        return max(self.batches * (plain_size or 1) // (size or 1), 1)

    def _step_s(self, run: CandidateRun) -> float:
        return run.epoch_s / self._batches_of(run)

    def _note(self, run: CandidateRun, cost: float) -> None:
        step_s = self._step_s(run)
        steps = self._epochs * self.sample.steps(run.candidate.batch_size)
        row = TrialRow(run.candidate, 1e3 * step_s, run.compile_s, run.compile_s + steps * step_s)
        if run.candidate not in self._measured and self._verbose:
            print(f"{run.candidate}  {row.step_ms:.3g} ms a step (took {cost:.1f} s)", flush=True)
        self._measured[run.candidate] = row

    def _reject(self, candidate: Candidate, note: str) -> None:
        self._notes[candidate] = note
        if self._verbose:
            print(f"{candidate}  {note}", flush=True)

    def _leading(self) -> list[CandidateRun]:
        """The runs that are kept, the best first."""
        return sorted(self._runs, key=lambda run: self._measured[run.candidate].run_s or math.inf)

    def _leader(self) -> Candidate:
        return self._leading()[0].candidate

    def _drop_laggards(self) -> None:
        kept = self._leading()[:KEPT]
        self._runs = kept if self.baseline in kept else [*kept, self.baseline]

    def _train_leaders_on(self) -> None:
        """In turn, the better half each time, so that a noisy machine is noisy for all."""
        for count in (KEPT, KEPT, KEPT // 2, KEPT // 2):
            leading = self._leading()[:count]
            for run in [*leading, *([] if self.baseline in leading else [self.baseline])]:
                if self._left() < 3 * run.epoch_s:
                    return
                run.train(self._batches_of(run), self.sample, 3, run is self.baseline)
                self._note(run, 0.0)

    def _left(self) -> float:
        return self._budget_s - (time.perf_counter() - self._began)

    def outcome(self) -> TunedOptions:
        """The best of what was measured; plain Keras where nothing beats it."""
        rows = dict(self._measured)
        for candidate, note in self._notes.items():
            rows[candidate] = dataclasses.replace(rows.get(candidate, TrialRow(candidate)), note=note)
        best = plain_row = rows[self.baseline.candidate]
        for row in rows.values():
            # Within the noise of a trial plain Keras is as good, and simpler.
            limit = min(best.run_s or math.inf, NOISE * (plain_row.run_s or math.inf))
            if not row.note and (row.run_s or math.inf) < limit:
                best = row
        return TunedOptions(
            best.candidate,
            tuple(rows.values()),
            self._epochs,
            self.sample.steps(self.baseline.candidate.batch_size),
            time.perf_counter() - self._began,
            str(self.devices),
        )


def _rounded(weight: np.ndarray) -> np.ndarray:
    if weight.dtype.kind != "f":
        return weight
    return tf.cast(tf.cast(weight, tf.bfloat16), weight.dtype).numpy()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no text").splitlines()[0][:160]


def _check_model(model: Any) -> None:
    if not isinstance(model, keras.Model) or not model.compiled:
        raise ValueError(
            f"build_model gave {model!r}. Allowed: a compiled keras.Model. Let it call "
            "model.compile(..., **compile_options) and return the model."
        )
