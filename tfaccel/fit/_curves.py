"""Curves of a learning rate over a run: numbers or tensors in, multiples of the peak out.

Progress is 0 at the first update of the run and 1 at its last.
"""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf


def one_cycle(
    progress: Any, warmup: float, initial_fraction: float = 0.04, final_fraction: float = 1e-4
) -> Any:
    """The multiplier of the peak: cosine from `initial_fraction` up to 1, then down to `final_fraction`.

    Args:
        progress: Position in the run, 0..1 (scalar or tensor, float).
        warmup: Where the peak lies, 0..1.
        initial_fraction: Multiplier at progress 0.
        final_fraction: Multiplier at progress 1.

    Reference:
        Smith & Topin, 2018, "Super-Convergence", https://arxiv.org/abs/1708.07120; with cosine instead
        of linear legs, as fastai and PyTorch do.
    """
    up = cosine_between(initial_fraction, 1.0, position(progress, 0.0, warmup))
    down = cosine_between(1.0, final_fraction, position(progress, warmup, 1.0))
    return tf.where(progress < warmup, up, down)


def warmup_cosine(
    progress: Any, warmup: float, initial_fraction: float = 0.0, final_fraction: float = 0.0
) -> Any:
    """The multiplier of the peak: a straight line up to 1, then half a cosine to `final_fraction`.

    Args:
        progress: Position in the run, 0..1 (scalar or tensor, float).
        warmup: Where the peak lies, 0..1.
        initial_fraction: Multiplier at progress 0.
        final_fraction: Multiplier at progress 1.

    Reference:
        Loshchilov & Hutter, 2017, "SGDR", https://arxiv.org/abs/1608.03983, equation 5, one period;
        warmup: Goyal et al., 2017, https://arxiv.org/abs/1706.02677, section 2.2.
    """
    up = initial_fraction + (1.0 - initial_fraction) * position(progress, 0.0, warmup)
    down = cosine_between(1.0, final_fraction, position(progress, warmup, 1.0))
    return tf.where(progress < warmup, up, down)


def position(progress: Any, begin: float, end: float) -> Any:
    """Where `progress` lies between `begin` (0) and `end` (1), clipped; 1 where they coincide."""
    if end <= begin:
        return tf.ones_like(progress)
    return tf.clip_by_value((progress - begin) / (end - begin), 0.0, 1.0)


def cosine_between(first: float, last: float, where: Any) -> Any:
    """Half a cosine from `first` at 0 to `last` at 1."""
    return last + (first - last) * 0.5 * (1.0 + tf.cos(math.pi * where))
