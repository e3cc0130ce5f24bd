"""`sensitivity`: what each layer's weights can lose before the model does, to choose sparsities and bits by.

Reference: Han et al., 2015, "Learning both Weights and Connections for Efficient Neural Networks",
https://arxiv.org/abs/1506.02626, figure 6.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfaccel.errors import is_number, is_whole, refuse
from tfaccel.fit import _masks as masks
from tfaccel.fit._choice import Layers, check_finite, check_layers, choose_weights, weight_names
from tfaccel.fit._rounded_weights import on_grid
from tfaccel.plots import new_figure

SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
BITS = (8, 6, 4, 3, 2)


@dataclasses.dataclass(frozen=True)
class SensitivityRow:
    """One weight, with less in it.

    Args:
        weight: Its path.
        kind: `"sparsity"` or `"bits"`.
        amount: The share of zeros, or the bits of a value.
        score: What the model then scores.
    """

    weight: str
    kind: str
    amount: float
    score: float


@dataclasses.dataclass(frozen=True)
class SensitivityReport:
    """Scores of a model of which one weight at a time was made smaller.

    Args:
        score: Of the model as it is.
        monitor: The figure that the scores are.
        rows: One for each weight and amount.

    Example:
        >>> row = tfaccel.SensitivityRow("dense/kernel", "sparsity", 0.5, 0.88)
        >>> print(tfaccel.SensitivityReport(0.91, "accuracy", (row,)))
        accuracy, 0.9100 as it is
        sparsity         50%
        dense/kernel  0.8800
    """

    score: float
    monitor: str
    rows: tuple[SensitivityRow, ...]

    def __str__(self) -> str:
        """A table for a person, a line a weight."""
        lines = [f"{self.monitor}, {self.score:.4f} as it is"]
        wide = max([8, *(len(row.weight) for row in self.rows)])
        for kind in dict.fromkeys(row.kind for row in self.rows):
            mine = [row for row in self.rows if row.kind == kind]
            amounts = list(dict.fromkeys(row.amount for row in mine))
            heads = [f"{amount:.0%}" if kind == "sparsity" else f"{amount:g}" for amount in amounts]
            lines.append(f"{kind:<{wide}}" + "".join(f"  {head:>6}" for head in heads))
            for name in dict.fromkeys(row.weight for row in mine):
                scores = {row.amount: row.score for row in mine if row.weight == name}
                lines.append(f"{name:<{wide}}" + "".join(f"  {scores[each]:>6.4f}" for each in amounts))
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike) -> pathlib.Path:
        """Draws a line a weight, score against sparsity or bits, and gives the path back.

        Args:
            path: Of the picture, `.png` or what else matplotlib writes.

        Raises:
            ValueError: matplotlib is not installed.
        """
        kinds = list(dict.fromkeys(row.kind for row in self.rows))
        figure, panes = new_figure(10, 4.5, len(kinds))
        for axes, kind in zip(panes, kinds, strict=True):
            mine = [row for row in self.rows if row.kind == kind]
            for name in dict.fromkeys(row.weight for row in mine):
                points = [(row.amount, row.score) for row in mine if row.weight == name]
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
            axes.axhline(self.score, color="gray", linestyle=":", label="as it is")
            axes.set_xlabel("share of zeros" if kind == "sparsity" else "bits of a value")
            if kind == "bits":
                axes.invert_xaxis()
            axes.grid(alpha=0.3)
        panes[0].set_ylabel(self.monitor)
        panes[-1].legend(fontsize=7)
        figure.savefig(path, dpi=120)
        return pathlib.Path(path)


def sensitivity(
    model: keras.Model,
    data: Any,
    *,
    monitor: str | None = None,
    sparsities: Sequence[float] = SPARSITIES,
    bits: Sequence[int] = BITS,
    layers: Layers = None,
) -> SensitivityReport:
    """Measures how the model's score falls as one weight at a time gets zeros, or fewer bits.

    Use it before a training to choose `PruneWeights(layers={...})`: layers whose line falls early are to be
    left alone or pruned less. It costs one `model.evaluate` for each weight and amount, and no new trace. The
    weights are put back at the end, also after an error.

    Args:
        model: A compiled and built model with a metric.
        data: What `model.evaluate` takes: `(x, y)`, or a dataset. A thousand samples are enough.
        monitor: The figure to report. Default: the first metric, or else the loss.
        sparsities: Shares of zeros to try, smallest magnitudes first.
        bits: Bits of a value to try, from 2 to 16; symmetric, with one scale a weight.
        layers: Which layers, as for `PruneWeights`.

    Raises:
        ValueError: A bad argument, a model that isn't compiled, or a figure that it doesn't have.

    Example:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1, name="sum")])
        >>> model.compile("sgd", "mse")
        >>> x = np.random.rand(64, 8)
        >>> report = tfaccel.sensitivity(model, (x, x.sum(1)), sparsities=[0.5], bits=[8])
        >>> [row.kind for row in report.rows]
        ['sparsity', 'bits']

    Reference:
        Han et al., 2015, https://arxiv.org/abs/1506.02626, section 3.4.
    """
    _check(model, sparsities, bits)
    check_layers(layers)
    chosen = [each for each in choose_weights(model, layers, 1.0) if not each.skipped]
    check_finite(chosen)
    score, name = _evaluate(model, data, monitor)
    rows, names = [], weight_names(model)
    for each in chosen:
        before = keras.ops.convert_to_numpy(each.variable.value)
        try:
            for kind, amounts in (("sparsity", sparsities), ("bits", bits)):
                for amount in amounts:
                    each.variable.assign(_reduced(before, kind, amount))
                    found, _ = _evaluate(model, data, name)
                    rows.append(SensitivityRow(names[id(each.variable)], kind, float(amount), found))
        finally:
            each.variable.assign(before)
    return SensitivityReport(score, name, tuple(rows))


def _reduced(values: np.ndarray, kind: str, amount: float) -> np.ndarray:
    if kind == "bits":
        return on_grid(tf.convert_to_tensor(values), int(amount), axes=[]).numpy()
    scores = tf.abs(tf.cast(values, tf.float32))
    mask = masks.keep_largest([scores], masks.num_kept(values.size, amount))[0]
    return np.where(mask.numpy(), values, 0)


def _evaluate(model: keras.Model, data: Any, monitor: str | None) -> tuple[float, str]:
    arrays = data if isinstance(data, tuple) else (data,)
    figures = model.evaluate(*arrays, verbose=0, return_dict=True)
    # A model with several outputs has a loss for each.
    name = monitor or next(
        (name for name in figures if name != "loss" and not name.endswith("_loss")), "loss"
    )
    if name not in figures:
        raise refuse("monitor", name, ", ".join(figures), "Compile with that metric.")
    return float(figures[name]), name


def _check(model: keras.Model, sparsities: Sequence[float], bits: Sequence[int]) -> None:
    if not model.compiled:
        raise ValueError(
            f"{model.name!r} is not compiled, so it has no score. Allowed: a compiled model with a metric. "
            "Call model.compile(loss=..., metrics=[...])."
        )
    for value in sparsities:
        if not is_number(value, 0, 1):
            raise refuse("sparsities", value, "fractions, 0 ≤ sparsity < 1", "Half is 0.5.")
    for value in bits:
        if not is_whole(value, 2, 16):
            raise refuse("bits", value, "integers, 2 to 16", "Try [8, 4].")
