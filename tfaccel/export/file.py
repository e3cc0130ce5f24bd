"""A TFLite file that was proven: what is known of it, written into the file and read back."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Sized
from importlib import metadata as packages
from typing import Any

import numpy as np

from tfaccel.export.compare import Parity
from tfaccel.export.errors import ExportError
from tfaccel.export.interpreter import TFLiteRunner
from tfaccel.export.metadata import read_metadata, with_metadata
from tfaccel.export.recipes import Recipe
from tfaccel.export.scoring import Score
from tfaccel.export.search import SearchReport
from tfaccel.export.workbench import Candidate, Workbench


@dataclasses.dataclass(frozen=True)
class TFLiteFile:
    """A file that was run and agreed with its model.

    Args:
        path: Where it lies.
        recipe: The name of its recipe.
        size_bytes: Its size.
        parity: How far its outputs are from the model's; None where `allow_select_ops` let operations in that
            no interpreter here has, so that it could not be run.
        score: Scores of model and file on the labelled data, or None where none was given.
        samples: How many samples the parity was measured on.
        on_real_data: False where no data was given and random numbers stood in.
        batch_size: How many samples the file takes a call, where loops or states force that; None where the
            batch stayed open.
        float_operations: What computes in floats though the recipe is for integers, as "KIND of layer".
        metadata: What the user wrote into it.
        tfaccel: The version that wrote it.
        layers: Layers with a recipe of their own, by name.
        search: What `recipe="auto"` tried; not kept in the file.
    """

    path: pathlib.Path
    recipe: str
    size_bytes: int
    parity: Parity | None
    score: Score | None
    samples: int
    on_real_data: bool
    batch_size: int | None = None
    float_operations: tuple[str, ...] = ()
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    tfaccel: str = ""
    layers: dict[str, str] = dataclasses.field(default_factory=dict)
    search: SearchReport | None = dataclasses.field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        """A line or two for a person."""
        rows = "samples" if self.on_real_data else "random samples (pass calibration= for real ones)"
        mixed = f" ({_count(self.layers, 'layer')} otherwise)" if self.layers else ""
        text = f"{self.path}: {self.recipe}{mixed}, {self.size_bytes:,} bytes; "
        if self.parity is None:
            return text + "NOT RUN: it needs TensorFlow's operations (Flex), which no interpreter here has"
        text += f"{self.parity} on {self.samples} {rows}"
        if self.batch_size is not None:
            text += f"; takes {self.batch_size} sample{'s' * (self.batch_size > 1)} a call"
        text += "" if self.score is None else f"; {self.score}"
        if self.float_operations:
            some = ", ".join(self.float_operations[:3]) + ", …" * (len(self.float_operations) > 3)
            text += f"; in floats: {_count(self.float_operations, 'operation')} ({some})"
        return text

    @classmethod
    def load(cls, path: str | os.PathLike) -> TFLiteFile:
        """Reads back what `export_tflite` knew of a file.

        Args:
            path: The file.

        Raises:
            ExportError: It is damaged, or tfaccel did not write it.
            FileNotFoundError: There is no such file.

        Example:
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
            >>> _ = tfaccel.export_tflite(model, "labelled.tflite", metadata={"labels": ["cat", "dog"]})
            >>> tfaccel.TFLiteFile.load("labelled.tflite").metadata
            {'labels': ['cat', 'dog']}
        """
        content = pathlib.Path(path).read_bytes()
        facts = read_metadata(content, str(path))
        try:
            figures = facts.pop("parity")
            figures = None if figures is None else _parity_of(figures)
            score = facts.pop("score")
            left = tuple(facts.pop("float_operations"))
            return cls(
                pathlib.Path(path),
                size_bytes=len(content),
                parity=figures,
                score=None if score is None else Score(**score),
                float_operations=left,
                **facts,
            )
        except (KeyError, TypeError) as error:
            raise ExportError(
                f"{path} was written by another version of tfaccel: {error} is not known."
            ) from error


def write_candidate(
    target: pathlib.Path,
    candidate: Candidate,
    bench: Workbench,
    metadata: dict[str, Any] | None,
    search: SearchReport | None = None,
) -> TFLiteFile:
    """Puts what is known into the file, runs it once more, and writes it."""
    facts = _facts(bench, candidate.recipe, candidate.batch_size, metadata) | {
        "parity": dataclasses.asdict(candidate.parity),
        "score": None if candidate.score is None else dataclasses.asdict(candidate.score),
        "float_operations": list(candidate.float_operations),
        "layers": dict(candidate.layers),
    }
    content = with_metadata(candidate.content, facts)
    _check_unchanged(content, candidate.content, bench)
    write_beside(target, content)
    known: dict[str, Any] = facts | {
        "parity": candidate.parity,
        "score": candidate.score,
        "float_operations": candidate.float_operations,
        "search": search,
    }
    return TFLiteFile(target, size_bytes=len(content), **known)


def write_unproven(
    target: pathlib.Path, bench: Workbench, recipe: Recipe, metadata: dict[str, Any] | None, judged: bool
) -> TFLiteFile:
    """Writes a float file with TensorFlow's own operations, which can't be run here.

    Args:
        target: Where it goes.
        bench: The model.
        recipe: That was asked for.
        metadata: Of the user.
        judged: Whether the file was to be scored, or to have other recipes by layer.

    Raises:
        ExportError: Another recipe was asked for, or figures that only a run gives.
    """
    if judged:
        raise ExportError(
            "The file needs TensorFlow's operations (Flex), which no interpreter here runs, so neither "
            "max_drop nor layers can be held. Nothing was written. Leave them out, or replace those layers."
        )
    if recipe.weight_bits != 32:
        raise ExportError(
            f"A {recipe.name} file with TensorFlow's operations (Flex) can't be proven: no interpreter here "
            "runs them. Nothing was written. Take 'float32', or replace those layers."
        )
    converted = bench.converted(fixed_ranges=False)
    facts = _facts(bench, recipe, converted.batch_size, metadata) | {"parity": None, "score": None}
    content = with_metadata(converted.content, facts | {"float_operations": []})
    write_beside(target, content)
    return TFLiteFile(target, size_bytes=len(content), **facts)


def _facts(
    bench: Workbench, recipe: Recipe, batch_size: int | None, metadata: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "recipe": recipe.name,
        "samples": len(bench.samples),
        "on_real_data": not bench.samples.made_up,
        "batch_size": batch_size,
        "metadata": json.loads(json.dumps(metadata or {})),  # as it will be read back
        "tfaccel": packages.version("tfaccel"),
    }


def _check_unchanged(content: bytes, measured: bytes, bench: Workbench) -> None:
    """Nothing is given away unseen: with the metadata in it the file computes what was measured."""
    rows = next(bench.samples.batches(bench.serving.batch_size or 1))
    rows = tuple(array[:1] for array in rows) if bench.serving.batch_size is None else rows
    names = [spec.name for spec in bench.serving.specs]
    first, second = (
        TFLiteRunner(each).run(dict(zip(names, rows, strict=True))) for each in (measured, content)
    )
    for name, values in first.items():
        if not np.array_equal(values, second[name], equal_nan=True):
            raise ExportError(f"Writing metadata changed output {name!r}. Nothing was written. Report it.")


def write_beside(target: pathlib.Path, content: bytes) -> None:
    """Writes the whole file under another name, then gives it its own."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _count(things: Sized, name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _parity_of(facts: dict[str, Any]) -> Parity:
    outputs = {name: _parity_of(each) for name, each in facts.pop("outputs").items()}
    return Parity(**facts, outputs=outputs)
