"""`recipe="auto"`: the smallest or the fastest file whose score holds, found by measuring.

Whole-file recipes come first. Where the cheapest of them loses too much, each layer's share in that is
measured (the file with only this layer in the cheap recipe), and as many layers as the score allows keep it,
those with the least noise for what they save first. Every candidate is run in the real interpreter.

Reference: mixed precision by layer sensitivity, Dong et al., 2019, "HAWQ", https://arxiv.org/abs/1905.03696,
with measured noise in the place of curvature.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator

from tfaccel.errors import refuse
from tfaccel.export.benchmark import time_runner
from tfaccel.export.errors import ExportError
from tfaccel.export.interpreter import TFLiteRunner
from tfaccel.export.recipes import RECIPES
from tfaccel.export.scoring import is_within
from tfaccel.export.selection import recipes_by_operation
from tfaccel.export.trials import Trial, TrialLog
from tfaccel.export.workbench import Candidate, Workbench

OBJECTIVES = ("size", "latency")
WHOLE = ("float32", "float16", "weight_only_int8", "dynamic_int8", "int8", "int4_weights")
# What a layer gets that the cheap recipe hurts too much, by that recipe.
SPARED = {"int4_weights": "dynamic_int8", "int8": "float32", "dynamic_int8": "float32"}
SENSITIVITY_SAMPLES = 128
TIMED_RUNS = 50

Report = Callable[[str, Trial], None]


@dataclasses.dataclass(frozen=True)
class SearchReport:
    """What a search tried.

    Args:
        trials: In the order in which they were measured.
        chosen: The one that was exported.
        minimize: `"size"` or `"latency"`.
        max_drop: How much the score was allowed to fall.
    """

    trials: tuple[Trial, ...]
    chosen: Trial
    minimize: str
    max_drop: float

    def pareto(self) -> tuple[Trial, ...]:
        """The trials that no other one beats in size, latency and score at once, the smallest first."""
        best = [
            one
            for one in self.trials
            if not any(other.beats(one) for other in self.trials if other is not one)
        ]
        return tuple(sorted(best, key=lambda trial: trial.size_bytes))

    def __str__(self) -> str:
        """A table for a person; * marks what no other beats, → what was chosen."""
        front = set(self.pareto())
        lines = [f"   {'bytes':>11}  {'ms':>7}  {'drop':>8}  SQNR dB  recipe"]
        for trial in sorted(self.trials, key=lambda each: each.size_bytes):
            mark = "→" if trial == self.chosen else " "
            if trial.problem:
                lines.append(f"   {'none':>11}  {trial.title}: {trial.problem}")
                continue
            star = "*" if trial in front else " "
            lines.append(
                f"{mark}{star} {trial.size_bytes:>11,}  {trial.latency_ms:>7.3f}  {trial.drop:>8.4f}  "
                f"{trial.sqnr_db:>7.1f}  {trial.title}"
            )
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class AutoRecipe:
    """How `export_tflite` is to search for a recipe; `recipe="auto"` is all defaults.

    Args:
        minimize: `"size"` (default) or `"latency"` of one sample on one thread.
        budget_s: Seconds after which no mix of recipes is tried any more; whole files always are. Default
            None, no limit.
        resume_from: A file in which trials are kept; a search that was cut off goes on from it.
        report: A function that is told of each trial: `report(minimize, trial)`.

    Raises:
        ValueError: A bad argument.

    Example:
        >>> tfaccel.AutoRecipe("latency", budget_s=60).minimize
        'latency'
    """

    minimize: str = "size"
    budget_s: float | None = None
    resume_from: str | os.PathLike | None = None
    report: Report | None = None

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if self.minimize not in OBJECTIVES:
            raise refuse("minimize", self.minimize, " or ".join(map(repr, OBJECTIVES)), "Start with 'size'.")
        if self.budget_s is not None and not self.budget_s > 0:
            raise refuse("budget_s", self.budget_s, "seconds above 0, or None for no limit", "Try 120.")
        log = None if self.resume_from is None else pathlib.Path(self.resume_from)
        if log is not None and (log.is_dir() or not log.parent.is_dir()):
            raise refuse("resume_from", str(log), "a file in a folder that exists", "Make the folder first.")


class Search:
    """Measures recipes and mixes of them.

    Args:
        bench: The model and its data, with something to score on.
        max_drop: How much the score may fall.
        options: What to look for, and for how long.
    """

    def __init__(self, bench: Workbench, max_drop: float, options: AutoRecipe):
        self._bench = bench
        self._max_drop = max_drop
        self._minimize = options.minimize
        self._deadline = None if options.budget_s is None else time.monotonic() + options.budget_s
        self._log = TrialLog(options.resume_from, bench)
        self._report = options.report
        self.trials: list[Trial] = []

    def run(self) -> tuple[Candidate, SearchReport]:
        """The best file.

        Raises:
            ExportError: Not even a float32 file holds the score, or there is none.
        """
        names = [
            name for name in WHOLE if not (RECIPES[name].needs_calibration and self._bench.samples.made_up)
        ]
        for name in names:
            self._try(name, {})
        cheap = [trial for trial in self.trials if trial.recipe in SPARED and not trial.problem]
        for trial in sorted(cheap, key=self._cost):
            best = self._best()
            if best is not None and self._cost(best) <= self._cost(trial):
                break  # nothing that is cheaper is left to be mended
            self._mend(trial.recipe)
        while (chosen := self._best()) is not None:
            candidate = self._measure(chosen.recipe, dict(chosen.layers))
            if candidate.score is None or is_within(candidate.score.drop, self._max_drop):
                found = SearchReport(tuple(self.trials), chosen, self._minimize, self._max_drop)
                return candidate, found
            self.trials.remove(chosen)  # of a log, and not so any more
        usable = [trial for trial in self.trials if not trial.problem]
        if not usable:
            raise ExportError(f"No recipe gave a file. Nothing was written. {self.trials[0].problem}")
        raise ExportError(
            f"No file holds the score within max_drop={self._max_drop}; the nearest falls by "
            f"{min(trial.drop for trial in usable):.4f}. Nothing was written."
        )

    def _mend(self, recipe: str) -> None:
        """As many layers as the score allows keep the cheap recipe; the others are spared."""
        order = [name for name, _ in sorted(self._sensitivities(recipe), key=lambda pair: -pair[1])]
        low, high = 0, len(order)  # so many are spared: too few, enough
        while high - low > 1 and not self._is_over():
            middle = (low + high) // 2
            trial = self._try(recipe, dict.fromkeys(order[:middle], SPARED[recipe]))
            low, high = (low, middle) if self._holds(trial) else (middle, high)

    def _sensitivities(self, recipe: str) -> Iterator[tuple[str, float]]:
        """Layers with the noise that they alone bring, for each byte that they save."""
        spared = SPARED[recipe]
        weights: dict[str, int] = {}
        for each in self._bench.converted(RECIPES[recipe].needs_calibration).operations:
            if each.layer is not None and each.weights > 1:
                weights[each.layer.name] = weights.get(each.layer.name, 0) + each.weights
        for name in weights:
            if self._is_over():
                return
            others = dict.fromkeys([other for other in weights if other != name], spared)
            try:
                runner = TFLiteRunner(self._build(recipe, others))
            except ExportError:
                yield name, math.inf
                continue
            sqnr_db = self._bench.parity(runner, SENSITIVITY_SAMPLES).sqnr_db
            yield name, 10 ** (-sqnr_db / 10) / weights[name]

    def _try(self, recipe: str, layers: dict[str, str]) -> Trial:
        known = self._log.find(recipe, layers)
        if known is None:
            known = self._log.add(self._trial(recipe, layers))
        self.trials.append(known)
        if self._report is not None:
            self._report(self._minimize, known)
        return known

    def _trial(self, recipe: str, layers: dict[str, str]) -> Trial:
        mix = tuple(sorted(layers.items()))
        try:
            candidate = self._measure(recipe, layers)
        except ExportError as error:
            return Trial(recipe, mix, 0, 0.0, 0.0, math.inf, 0.0, str(error).split("Nothing was written")[0])
        runner = TFLiteRunner(candidate.content)
        score = candidate.score
        return Trial(
            recipe,
            mix,
            len(candidate.content),
            time_runner(runner, TIMED_RUNS).median_ms,
            score.file if score else 0.0,
            score.drop if score else 0.0,
            candidate.parity.sqnr_db,
        )

    def _build(self, recipe: str, layers: dict[str, str]) -> bytes:
        chosen = RECIPES[recipe]
        operations = self._bench.converted(chosen.needs_calibration).operations
        return self._bench.build(chosen, recipes_by_operation(layers, operations, self._bench.model))

    def _measure(self, recipe: str, layers: dict[str, str]) -> Candidate:
        candidate = self._bench.measure(RECIPES[recipe], self._build(recipe, layers))
        return dataclasses.replace(candidate, layers=layers)

    def _best(self) -> Trial | None:
        return min((trial for trial in self.trials if self._holds(trial)), key=self._cost, default=None)

    def _holds(self, trial: Trial) -> bool:
        return not trial.problem and is_within(trial.drop, self._max_drop)

    def _cost(self, trial: Trial) -> float:
        return trial.size_bytes if self._minimize == "size" else trial.latency_ms

    def _is_over(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline
