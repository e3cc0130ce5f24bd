"""A matplotlib figure that needs no display and leaves pyplot's state alone."""

from __future__ import annotations

from typing import Any


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes.

    Args:
        width: In inches.
        height: In inches.

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
    return figure, figure.add_subplot()
