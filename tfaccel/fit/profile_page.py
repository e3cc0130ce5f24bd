"""The report of a `Profile` as one web page, its plots inside."""

from __future__ import annotations

import base64
import html
import io
import os
import pathlib

from tfaccel.fit.profile_report import PARTS, ProfileReport
from tfaccel.plots import new_figure

COLOURS = dict(zip(PARTS, ("#4878d0", "#ee854a", "#d65f5f", "#956cb4", "#8c8c8c", "#6acc64"), strict=True))


def check_plots() -> None:
    """Raises where nothing could be drawn in the end.

    Raises:
        ValueError: matplotlib is not installed.
    """
    new_figure(1, 1)


def write_page(report: ProfileReport, name: str, path: pathlib.Path) -> None:
    """Writes it beside, and renames it.

    Args:
        report: Of a `fit`.
        name: Of the model.
        path: Of the page.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        beside.write_text(page(report, name), encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def page(report: ProfileReport, name: str) -> str:
    """The page's text.

    Args:
        report: Of a `fit`.
        name: Of the model.
    """
    title = f"Where the time of {html.escape(name)} went"
    text = html.escape(str(report))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>'
        '<body style="font-family: sans-serif; max-width: 60em; margin: 2em auto">'
        f"<h1>{title}</h1><p><strong>{html.escape(report.advice)}</strong></p>"
        f'<img alt="seconds of each epoch, by what they went to" src="data:image/png;base64,{_plot(report)}">'
        f"<pre>{text}</pre></body></html>\n"
    )


def _plot(report: ProfileReport) -> str:
    """Seconds of each epoch, stacked."""
    figure, (axes,) = new_figure(9, 4)
    epochs = range(1, len(report.rows) + 1)
    bottom = [0.0] * len(report.rows)
    for part in PARTS:
        heights = [getattr(row, part) for row in report.rows]
        if any(heights):
            label = f"{part} ({100 * report.share(part):.0f} %)"
            axes.bar(epochs, heights, bottom=bottom, color=COLOURS[part], label=label)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set(xlabel="epoch", ylabel="seconds")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return base64.b64encode(picture.getvalue()).decode()
