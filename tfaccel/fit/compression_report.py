"""`compression_report`: how small a model's weights are, one by one, and what they take once they are zipped.

Reference: the size of the zipped file is how tensorflow-model-optimization reports its results,
https://www.tensorflow.org/model_optimization/guide/pruning/pruning_with_keras.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import zlib
from collections.abc import Mapping

import keras
import numpy as np

from tfaccel.fit._choice import weight_names
from tfaccel.plots import new_figure

MOST_CLUSTERS = 2**16  # different values; above it they are told by their number type


@dataclasses.dataclass(frozen=True)
class CompressionRow:
    """One weight of a report.

    Args:
        weight: Its path.
        shape: Its shape.
        sparsity: The share of zeros in it, 0..1.
        clusters: How many different values it has, zero among them.
        bits: What one of its values needs: the logarithm of `clusters`, rounded up; at least 1.
        size_bytes: As it is.
        compressed_bytes: Deflated, as in a zip file.
        skipped: Why a technique left it alone, or an empty text.
    """

    weight: str
    shape: tuple[int, ...]
    sparsity: float
    clusters: int
    bits: int
    size_bytes: int
    compressed_bytes: int
    skipped: str = ""


@dataclasses.dataclass(frozen=True)
class CompressionReport:
    """The weights of a model, in its own order.

    Args:
        rows: One for each weight.

    Example:
        >>> row = tfaccel.CompressionRow("dense/kernel", (8, 4), 0.5, 17, 5, 128, 91)
        >>> print(tfaccel.CompressionReport((row,)))
        weight        shape  zeros  values  bits  bytes  zipped  left alone
        dense/kernel  8×4    50.0%      17     5    128      91
        all                  50.0%                  128      91  1.4 times smaller zipped
    """

    rows: tuple[CompressionRow, ...]

    @property
    def size_bytes(self) -> int:
        """Of all weights as they are."""
        return sum(row.size_bytes for row in self.rows)

    @property
    def compressed_bytes(self) -> int:
        """Of all weights, deflated."""
        return sum(row.compressed_bytes for row in self.rows)

    @property
    def sparsity(self) -> float:
        """The share of zeros in all weights, 0..1."""
        sizes = [math.prod(row.shape) for row in self.rows]
        return float(np.average([row.sparsity for row in self.rows], weights=sizes)) if sum(sizes) else 0.0

    def __str__(self) -> str:
        """A table for a person."""
        shapes = ["×".join(map(str, row.shape)) for row in self.rows]
        wide = [max([6, *(len(row.weight) for row in self.rows)]), max([5, *map(len, shapes)])]
        wide += [max(6, len(f"{self.size_bytes:,}")), max(6, len(f"{self.compressed_bytes:,}"))]
        head = ("weight", "shape", "zeros", "values", "bits", "bytes", "zipped", "left alone")
        lines = [_line(head, wide)]
        for row, shape in zip(self.rows, shapes, strict=True):
            values = f"{row.clusters:,}" if row.clusters <= MOST_CLUSTERS else "many"
            figures = (f"{row.sparsity:.1%}", values, row.bits)
            sizes = (f"{row.size_bytes:,}", f"{row.compressed_bytes:,}")
            lines.append(_line((row.weight, shape, *figures, *sizes, row.skipped), wide))
        times = f"{self.size_bytes / max(self.compressed_bytes, 1):.1f} times smaller zipped"
        sizes = (f"{self.size_bytes:,}", f"{self.compressed_bytes:,}")
        lines.append(_line(("all", "", f"{self.sparsity:.1%}", "", "", *sizes, times), wide))
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike) -> pathlib.Path:
        """Draws each weight's bytes, as they are and zipped, and gives the path back.

        Args:
            path: Of the picture, `.png` or what else matplotlib writes.

        Raises:
            ValueError: matplotlib is not installed.
        """
        rows = [row for row in self.rows if len(row.shape) > 1][::-1]
        figure, (axes,) = new_figure(8, 1.4 + 0.28 * len(rows))
        names = [row.weight for row in rows]
        axes.barh(names, [row.size_bytes / 1024 for row in rows], color="lightgray", label="as it is")
        axes.barh(names, [row.compressed_bytes / 1024 for row in rows], color="tab:blue", label="zipped")
        for place, row in enumerate(rows):
            text = f" {row.sparsity:.0%} zeros" if row.sparsity > 0.005 else f" {row.skipped}"
            axes.text(row.size_bytes / 1024, place, text, va="center", fontsize=8)
        axes.margins(x=0.18)
        axes.set_xlabel("KiB")
        axes.set_title(f"{self.size_bytes / max(self.compressed_bytes, 1):.1f} times smaller zipped")
        axes.legend(loc="best")
        figure.savefig(path, dpi=120)
        return pathlib.Path(path)


def compression_report(model: keras.Model, *, skipped: Mapping[str, str] | None = None) -> CompressionReport:
    """Counts zeros, different values and bytes in every weight of a model.

    It costs a sort and a compression of each weight: about a second for ten million.

    Args:
        model: A built model.
        skipped: Why weights were left alone, by their path; techniques fill this in.

    Raises:
        ValueError: The model has no weights yet.

    Example:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
        >>> _ = model.layers[0].kernel.assign(np.eye(8, 3))
        >>> tfaccel.compression_report(model).rows[0].sparsity
        0.875

    Reference:
        https://www.tensorflow.org/model_optimization/guide/pruning/pruning_with_keras
    """
    if not model.weights:
        raise ValueError(
            f"{model.name!r} has no weights yet. Allowed: a built model. Give it a keras.Input, or call it "
            "on one batch first."
        )
    names = weight_names(model)
    rows = (_row(weight, names[id(weight)], skipped or {}) for weight in model.weights)
    return CompressionReport(tuple(rows))


def _row(weight: keras.Variable, name: str, skipped: Mapping[str, str]) -> CompressionRow:
    values = keras.ops.convert_to_numpy(weight.value)
    whole = values.dtype.itemsize * 8
    clusters = len(np.unique(values)) if values.size else 0
    bits = math.ceil(math.log2(clusters)) if 1 < clusters <= MOST_CLUSTERS else min(clusters, whole)
    return CompressionRow(
        weight=name,
        shape=tuple(values.shape),
        sparsity=float(np.mean(values == 0)) if values.size else 0.0,
        clusters=clusters,
        bits=min(bits, whole),
        size_bytes=values.nbytes,
        compressed_bytes=len(zlib.compress(np.ascontiguousarray(values).tobytes(), 6)),
        skipped=skipped.get(name, ""),
    )


def _line(cells: tuple, wide: list[int]) -> str:
    weight, shape, zeros, values, bits, size, zipped, note = cells
    text = f"{weight:<{wide[0]}}  {shape:<{wide[1]}}  {zeros:>5}  {values:>6}  {bits:>4}  "
    return f"{text}{size:>{wide[2]}}  {zipped:>{wide[3]}}  {note}".rstrip()
