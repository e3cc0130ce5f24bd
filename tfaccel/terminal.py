"""What a person sees: the plan, the demo's progress and its table. Progress goes to stderr."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from tfaccel.accelerator import Accelerator
from tfaccel.demo.run import DemoResult
from tfaccel.export.trials import Trial
from tfaccel.scaling import Scaled


def print_plan(accelerator: Accelerator) -> None:
    """Every choice with its reason, as a table that wraps to the terminal."""
    console = Console()
    console.print(f"[bold]{accelerator.devices}[/bold]")
    table = Table("choice", "value", "reason", box=None, pad_edge=False)
    for name, choice in accelerator.choices().items():
        shown = accelerator.show(name)
        table.add_row(name, f"[bold]{shown}[/bold]", choice.reason)
    console.print(table)


def print_scaling(step_ms: float, size_bytes: float, rows: Sequence[Scaled]) -> None:
    """Step time and efficiency by number of workers."""
    console = Console()
    console.print(
        f"[bold]{step_ms:.3g} ms a step on one worker, {size_bytes / 1e6:.3g} MB of gradients[/bold]"
    )
    table = Table(box=None, pad_edge=False)
    for title in ("workers", "step ms", "all-reduce ms", "efficiency", "speedup"):
        table.add_column(title, justify="right")
    for row in rows:
        figures = (
            f"{row.step_ms:.3g}",
            f"{row.all_reduce_ms:.3g}",
            f"{row.efficiency:.2f}",
            f"{row.speedup:.3g}",
        )
        table.add_row(str(row.workers), *figures)
    console.print(table)
    console.print("A prediction: each worker keeps its batch, one ring over the workers, nothing overlaps.")


class ExportProgress:
    """What an export is doing and how long already, on stderr; a line for each trial of a search."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._status = self._console.status("converting, running, comparing")

    def __enter__(self) -> ExportProgress:
        self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._status.stop()

    def report(self, minimize: str, trial: Trial) -> None:
        """Tells of one trial."""
        figure = f"{trial.size_bytes:,} bytes" if minimize == "size" else f"{trial.latency_ms:.3f} ms"
        self._console.print(f"{trial.title}: {figure}, score {trial.score:.4f}, {trial.drop:.4f} lower")


class DemoProgress:
    """One bar per stage of the demo, on stderr."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.fields[text]:<28}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> DemoProgress:
        self._progress.start()
        for stage in ("plain Keras", "accelerated", "export"):
            self._tasks[stage] = self._progress.add_task(stage, total=1.0, text="", start=False)
        self._begin("plain Keras")
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def _begin(self, stage: str) -> None:
        self._progress.start_task(self._tasks[stage])

    def report(self, stage: str, text: str, done: float) -> None:
        """Shows what `stage` is doing and how far it is (0..1)."""
        self._progress.update(self._tasks[stage], completed=done, text=text)
        if done >= 1.0:
            self._progress.stop_task(self._tasks[stage])
        following = {"plain Keras": "accelerated", "accelerated": "export"}.get(stage)
        if done >= 1.0 and following:
            self._begin(following)


def print_demo(result: DemoResult, output: str | os.PathLike) -> None:
    """The table of the demo; what was not reached is a dash."""
    console = Console()
    if result.plan:
        console.print("\n[bold]What was chosen, and why[/bold]")
        console.print(result.plan, highlight=False, soft_wrap=True)
    console.print()
    console.print(training_table(result))
    console.print(file_table(result))
    if not result.finished:
        console.print("[yellow]Interrupted: what was not reached is left out.[/yellow]")
    else:
        console.print(f"Model and files: {output}")


def training_table(result: DemoResult) -> Table:
    """Time to the highest accuracy that both runs reached, speed, and what each came to."""
    figures = result.figures
    table = Table("training", "plain Keras", "accelerated", "ratio", title_justify="left")
    target = figures["target_accuracy"]
    aim = "accuracy" if target is None else f"{target:.1%} accuracy"
    table.add_row(
        f"seconds to {aim}",
        _number(figures["plain_seconds"], ".1f"),
        _number(figures["accelerated_seconds"], ".1f"),
        _number(figures["speedup"], ".1f", " × faster", "[bold green]{}[/bold green]"),
    )
    plain, fast = (result.examples_per_s.get(name) for name in ("plain", "accelerated"))
    ratio = fast / plain if plain and fast else None
    table.add_row(
        "images a second",
        _number(plain, ",.0f"),
        _number(fast, ",.0f"),
        _number(ratio, ".2f", " ×"),
    )
    table.add_row(
        "accuracy (plain: best epoch)",
        _number(figures["plain_accuracy"], ".1%"),
        _number(figures["accelerated_accuracy"], ".1%"),
        "",
    )
    return table


def file_table(result: DemoResult) -> Table:
    """The model in Keras against the int8 file in LiteRT."""
    figures = result.figures
    table = Table("one sample", "Keras / float32", "LiteRT / int8", "ratio")
    keras_ms, tflite_ms = figures["keras_latency_ms"], figures["tflite_latency_ms"]
    faster = keras_ms / tflite_ms if keras_ms and tflite_ms else None
    table.add_row(
        "latency, predict → LiteRT",
        _number(keras_ms, ".1f", " ms"),
        _number(tflite_ms, ".3f", " ms"),
        _number(faster, ",.0f", " × faster", "[bold green]{}[/bold green]"),
    )
    large, small = figures["float_bytes"], figures["tflite_bytes"]
    ratio = large / small if large and small else None
    table.add_row(
        "file",
        _number(large, ",", " bytes"),
        _number(small, ",", " bytes"),
        _number(ratio, ".1f", " × smaller", "[bold green]{}[/bold green]"),
    )
    table.add_row(
        "accuracy",
        _number(figures["accelerated_accuracy"], ".1%"),
        _number(figures["tflite_accuracy"], ".1%"),
        _number(figures["top1_agreement"], ".1%", " same answer"),
    )
    return table


def _number(value: float | None, form: str, unit: str = "", style: str = "{}") -> str:
    return "–" if value is None else style.format(f"{value:{form}}{unit}")
