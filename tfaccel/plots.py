"""A matplotlib figure that needs no display and leaves pyplot's state alone."""

from __future__ import annotations

from typing import Any


def new_figure(width: float, height: float, panes: int = 1) -> tuple[Any, list[Any]]:
    """A figure and the axes of each of its panes, side by side with one scale of their heights.

    Args:
        width: In inches.
        height: In inches.
        panes: How many.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "Plots need matplotlib, which is not installed. Allowed: pip install 'tfaccel[plot]'. print() "
            "shows the same as a table."
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panes, sharey=True, squeeze=False)[0])
