"""`TunedOptions`: what `tune` found, as a value that prints, applies and is kept in a file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from tfaccel.keras_fixes.inner_layers import inner_layers
from tfaccel.prepare.candidates import HEADER, Candidate, TrialRow
from tfaccel.prepare.devices import Devices

# A file of another version is of no use: what was measured may run otherwise there.
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class TunedOptions:
    """The fastest way to train that was found, and all that were tried.

    Args:
        chosen: The one to train with.
        rows: A trial each; the first one is plain Keras.
        epochs: Of the run that was planned.
        steps_per_epoch: Batches of an epoch, with the batch size of plain Keras.
        seconds: What the search took, s.
        machine: Where it was.

    Example:
        >>> from tfaccel.prepare.candidates import Candidate, TrialRow
        >>> fused = Candidate(kernels="fused", steps_per_execution="auto")
        >>> rows = (TrialRow(Candidate(), 1.2, 0.5, 12.5), TrialRow(fused, 0.3, 1.0, 4.0))
        >>> tuned = tfaccel.TunedOptions(fused, rows, 10, 1000, 5.0, "1 × CPU")
        >>> tuned.speedup
        4.0
        >>> accelerator = tfaccel.Accelerator("one_device", tuned=tuned)
    """

    chosen: Candidate
    rows: tuple[TrialRow, ...]
    epochs: int
    steps_per_epoch: int
    seconds: float
    machine: str

    @property
    def best(self) -> TrialRow:
        """The trial of the one that was chosen."""
        return next(row for row in self.rows if row.candidate == self.chosen)

    @property
    def speedup(self) -> float:
        """Samples a second, as a multiple of plain Keras's."""
        return faster(self.rows[0], self.best) or 1.0

    @property
    def reason(self) -> str:
        """One line, for `print(accelerator)`."""
        return f"tune measured it: {self.speedup:.2f} × the samples a second of plain Keras"

    @property
    def batch_size(self) -> int | None:
        """Samples a batch; None where the data came in batches."""
        return self.chosen.batch_size

    def arguments(self) -> str:
        """Those of `Accelerator`, as you would write them into a script."""
        options = self.chosen.accelerator_options().items()
        return ", ".join(f"{name}={value!r}" for name, value in options)

    def instead_of_auto(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `Accelerator`, with what was found wherever they are `"auto"`."""
        found = self.chosen.accelerator_options()
        return {name: found[name] if value == "auto" else value for name, value in given.items()}

    def __str__(self) -> str:
        """A table: time of a step, of compiling, of the run; against plain Keras; why not."""
        size = (
            f", batch_size {self.rows[0].candidate.batch_size}" if self.rows[0].candidate.batch_size else ""
        )
        lines = [
            f"tuned on {self.machine}{size}, for {self.epochs} epochs of {self.steps_per_epoch} steps, "
            f"in {self.seconds:.0f} s",
            f"  {'step':>9}  {'compile':>8}  {'run':>8}  {'× plain':>7}  {HEADER}",
        ]
        order = sorted(self.rows, key=lambda row: (bool(row.note), row.run_s or 0.0))
        for row in order:
            mark = ">" if row.candidate == self.chosen else " "
            ratio = faster(self.rows[0], row)
            figures = (
                f"{_shown(row.step_ms, ' ms'):>9}  {_shown(row.compile_s, ' s'):>8}  "
                f"{_shown(row.run_s, ' s'):>8}  {f'{ratio:.2f}' if ratio else '-':>7}"
            )
            note = row.note or ("plain Keras" if row is self.rows[0] else "")
            lines.append(f"{mark} {figures}  {row.candidate}  {note}".rstrip())
        return "\n".join(lines)

    def to_json(self) -> str:
        """As text, for a file."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str) -> TunedOptions:
        """The same back.

        Raises:
            ValueError: Another format, or no JSON.
        """
        values = json.loads(text)
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise ValueError("The file was not written by this version's tune. Allowed: one that was.")
        rows = tuple(
            TrialRow(**{**row, "candidate": Candidate(**row["candidate"])}) for row in values["rows"]
        )
        rest = {name: values[name] for name in ("epochs", "steps_per_epoch", "seconds", "machine")}
        return TunedOptions(Candidate(**values["chosen"]), rows, **rest)


def faster(plain: TrialRow, row: TrialRow) -> float | None:
    """How many times as many samples a second; None where one of them was not measured."""
    if not plain.step_ms or not row.step_ms:
        return None
    samples = (row.candidate.batch_size or 1) / (plain.candidate.batch_size or 1)
    return samples * plain.step_ms / row.step_ms


def _shown(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.3g}{unit}"


def signature(model: keras.Model, data: Any, devices: Devices, asked: Mapping[str, Any]) -> str:
    """What decides a search: the model, the data's form, the machine, the versions and the arguments.

    Args:
        model: Built and compiled.
        data: What the trials train on.
        devices: Of this machine.
        asked: Arguments of the search.
    """
    layers = [
        (type(layer).__name__, _settings(layer), [(tuple(w.shape), w.dtype) for w in layer.weights])
        for layer in inner_layers(model)
    ]
    if isinstance(data, tf.data.Dataset):
        form: Any = str(data.element_spec)
    else:
        leaves = keras.tree.flatten(data if isinstance(data, tuple) else data[0])
        form = [(tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves if hasattr(leaf, "shape")]
    parts = (
        layers,
        type(model.optimizer).__name__,
        [_described(loss) for loss in keras.tree.flatten(model.loss)],
        form,
        (str(devices), os.cpu_count()),
        (tf.__version__, keras.__version__, FORMAT),
        sorted(asked.items()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _settings(layer: keras.layers.Layer) -> Any:
    """Of a layer with none inside, whose names would be in it; they count up in a process."""
    if len(inner_layers(layer)) > 1:
        return None
    try:
        return {name: value for name, value in layer.get_config().items() if name != "name"}
    except NotImplementedError:
        return None


def _described(loss: Any) -> Any:
    """Without the address in memory that an object's `repr` has."""
    if isinstance(loss, keras.losses.Loss):
        return type(loss).__name__, loss.get_config()
    return getattr(loss, "__qualname__", loss)


def cache_file(key: str) -> pathlib.Path:
    """Where the outcome of a search is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base, "tfaccel", "tuned", f"{key}.json")


def read(key: str) -> TunedOptions | None:
    """The outcome of an earlier search; None where there is none that can be read."""
    try:
        return TunedOptions.from_json(cache_file(key).read_text())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(key: str, tuned: TunedOptions) -> None:
    """Keeps an outcome; a home that can't be written to only costs the next search its time."""
    path = cache_file(key)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(tuned.to_json())
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
