"""What a search measured, kept in a file so that one that was cut off can go on."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata as packages
import json
import os
import pathlib

import keras
import numpy as np

from tfaccel.errors import refuse
from tfaccel.export.workbench import Workbench


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate of a search.

    Args:
        recipe: Of the file.
        layers: Pairs of a layer's name and its own recipe.
        size_bytes: Of the file.
        latency_ms: Of one sample on one thread, median.
        score: On the labelled data, higher is better.
        drop: How much lower that is than the model's.
        sqnr_db: Against the model's outputs.
        problem: Why there is no such file, or an empty text; then the other figures mean nothing.
    """

    recipe: str
    layers: tuple[tuple[str, str], ...]
    size_bytes: int
    latency_ms: float
    score: float
    drop: float
    sqnr_db: float
    problem: str = ""

    @property
    def title(self) -> str:
        """The recipe, and how many layers have another one."""
        others = sorted({name for _, name in self.layers})
        return self.recipe + (f", {len(self.layers)} layers {' and '.join(others)}" if self.layers else "")

    def beats(self, other: Trial) -> bool:
        """Whether it is nowhere worse in size, latency and score, and somewhere better."""
        if self.problem or other.problem:
            return not self.problem
        mine = (self.size_bytes, self.latency_ms, self.drop)
        theirs = (other.size_bytes, other.latency_ms, other.drop)
        return all(a <= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs


class TrialLog:
    """Trials of one model on one set of data, in a file of lines of JSON or in memory only.

    Args:
        path: The file; it is made where there is none. None keeps nothing.
        bench: Whose trials they are: those of another model, samples, labels or versions are passed over.

    Raises:
        ValueError: The file holds something else.
    """

    def __init__(self, path: str | os.PathLike | None, bench: Workbench):
        self._path = None if path is None else pathlib.Path(path)
        self._key = _fingerprint(bench) if self._path is not None else ""
        self._trials: list[Trial] = []
        if self._path is not None and self._path.exists():
            self._trials = list(self._read(self._path.read_text()))

    def _read(self, text: str) -> list[Trial]:
        trials = []
        lines = text.split("\n")
        for line in lines:
            if not line.strip():
                continue
            try:
                facts = json.loads(line)
                key, layers = facts.pop("of"), tuple(tuple(pair) for pair in facts.pop("layers"))
                trial = Trial(layers=layers, **facts)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                if lines[0].startswith('{"') and not line.endswith("}"):
                    continue  # the line that was being written when a search was cut off
                raise refuse(
                    "resume_from", str(self._path), "a file that a search wrote", "Take another path."
                ) from error
            if key == self._key:
                trials.append(trial)
        return trials

    def find(self, recipe: str, layers: dict[str, str]) -> Trial | None:
        """The trial of a mix, if there was one."""
        wanted = tuple(sorted(layers.items()))
        return next((t for t in self._trials if (t.recipe, t.layers) == (recipe, wanted)), None)

    def add(self, trial: Trial) -> Trial:
        """Keeps a trial, and gives it back."""
        self._trials.append(trial)
        if self._path is not None:
            whole = not self._path.exists() or self._path.read_text()[-1:] in ("", "\n")
            with self._path.open("a") as file:
                file.write("" if whole else "\n")
                file.write(json.dumps(dataclasses.asdict(trial) | {"of": self._key}) + "\n")
        return trial


def _fingerprint(bench: Workbench) -> str:
    """Of all that a trial's figures depend on: the model and what it answers, the data, the versions.

    A function that scores is known by the score that it gives the model.
    """
    versions = [packages.version(name) for name in ("tfaccel", "tensorflow", "ai-edge-litert")]
    digest = hashlib.sha256(json.dumps([*versions, bench.score_of_model]).encode())
    for weight in bench.model.weights:
        digest.update(keras.ops.convert_to_numpy(weight).tobytes())
    scored = bench.scored
    data = () if scored is None else (*scored.inputs, scored.labels)
    for array in (*bench.samples.inputs, *bench.reference.values(), *data):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
