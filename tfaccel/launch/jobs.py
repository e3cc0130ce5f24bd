"""One function or one script on all workers of an engine."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tfaccel.cluster import LONGEST_START_S, START_TIMEOUT
from tfaccel.errors import refuse
from tfaccel.launch.call import failure, pack, pack_script, read_script, unpack, worker_command
from tfaccel.launch.errors import WorkerError
from tfaccel.launch.local import run_processes
from tfaccel.launch.slurm import run_step

ENGINES = ("local", "ray", "spark", "slurm")


def run(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    workers: int,
    engine: str = "local",
    max_restarts: int = 0,
    start_timeout_s: float | None = None,
) -> Any:
    """Runs a function on several workers at once, and returns what it returned on the first, the chief.

    Make the `Accelerator`, the model and the data inside of the function: each worker is a process of its
    own, with `TF_CONFIG` set, and `Accelerator()` then trains all of them as one. Starting costs what
    importing TensorFlow costs, once more for every worker of this machine.

    Args:
        function: With its closure it must be picklable by `cloudpickle`; functions of a notebook are.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        workers: How many processes, 1 or more.
        engine: `"local"` (processes of this machine), `"ray"`, `"spark"` or `"slurm"`. Default `"local"`.
        max_restarts: How often all workers are started again after one has failed. With
            `keras.callbacks.BackupAndRestore` they go on from the last epoch. Default 0.
        start_timeout_s: How long workers wait for one another, in seconds. Default: what the variable
            `TFACCEL_START_TIMEOUT_S` says, or 30.

    Returns:
        The chief's result.

    Raises:
        ValueError: An unknown engine, a number out of range, a function that can't be sent, or an engine that
            is not installed.
        WorkerError: A worker failed, with its words; the others were ended.

    Example:
        >>> tfaccel.launch.run(max, [3, 5], workers=2)
        5

    Reference:
        `torchrun` (PyTorch, 2022) and `TorchDistributor` (Spark, 2023) do the same for PyTorch.
    """
    _check(workers, engine, max_restarts, start_timeout_s)
    report, environment = _reporter(), _start_timeout(start_timeout_s)
    packed = pack(function, args, kwargs)
    return unpack(_run_packed(packed, workers, engine, max_restarts, environment, report))


def run_script(
    path: str,
    arguments: Sequence[str] = (),
    *,
    workers: int,
    engine: str = "local",
    max_restarts: int = 0,
    start_timeout_s: float | None = None,
) -> None:
    """Runs a script on several workers at once: `tfaccel launch` does this.

    Args:
        path: Of the script, which need not know that it is launched.
        arguments: Its command line.
        workers: How many processes, 1 or more.
        engine: As for `run`.
        max_restarts: As for `run`.
        start_timeout_s: As for `run`.

    Raises:
        ValueError: As for `run`, or there is no such script.
        WorkerError: A worker failed; the others were ended.

    Example:
        >>> import pathlib
        >>> size = pathlib.Path("hello.py").write_text("print(1)")
        >>> tfaccel.launch.run_script("hello.py", workers=1)
        [worker 0] 1

    Reference:
        As for `run`.
    """
    _check(workers, engine, max_restarts, start_timeout_s)
    report, environment = _reporter(), _start_timeout(start_timeout_s)
    if engine in ("ray", "spark"):
        _run_packed(pack_script(path, arguments), workers, engine, max_restarts, environment, report)
        return
    read_script(path)
    run_command = run_processes if engine == "local" else run_step
    command = [sys.executable, path, *arguments]
    whole = {**os.environ, **environment}
    run_command(command, workers, environment=whole, max_restarts=max_restarts, report=report)


def _run_packed(
    packed: bytes,
    workers: int,
    engine: str,
    max_restarts: int,
    environment: Mapping[str, str],
    report: Callable[[str], None],
) -> bytes:
    if engine == "ray":
        from tfaccel.launch.ray import run_on_ray

        return run_on_ray(packed, workers, environment=environment, max_restarts=max_restarts)
    options: dict[str, Any] = {"max_restarts": max_restarts, "report": report}
    if engine == "spark":
        from tfaccel.launch.spark import run_on_spark

        return run_on_spark(packed, workers, environment=environment, **options)
    run_command = run_processes if engine == "local" else run_step
    with _folder(engine) as folder:
        command = worker_command(folder, packed)
        try:
            run_command(command, workers, environment={**os.environ, **environment}, **options)
        except WorkerError as error:
            raise WorkerError(failure(folder, max_restarts) or str(error), error.exit_code) from error
        if not (folder / "result").exists():
            raise WorkerError("worker 0 ended without a result: its function left the process")
        return (folder / "result").read_bytes()


@contextlib.contextmanager
def _folder(engine: str) -> Iterator[pathlib.Path]:
    """Where call and result lie: under the working directory, which the nodes of a Slurm cluster share."""
    with tempfile.TemporaryDirectory(prefix=".tfaccel-", dir="." if engine == "slurm" else None) as name:
        yield pathlib.Path(name).absolute()


def _check(workers: int, engine: str, max_restarts: int, start_timeout_s: float | None) -> None:
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise refuse("workers", workers, "a whole number, 1 or more", "Say how many processes are to train.")
    if engine not in ENGINES:
        raise refuse("engine", engine, ", ".join(map(repr, ENGINES)), "Choose one of them.")
    if not isinstance(max_restarts, int) or max_restarts < 0:
        raise refuse("max_restarts", max_restarts, "a whole number, 0 or more", "Leave it out for none.")
    if start_timeout_s is not None and not 0 < start_timeout_s <= LONGEST_START_S:
        raise refuse(
            "start_timeout_s", start_timeout_s, "seconds above 0, at most a day", "Leave it out for 30."
        )


def _start_timeout(seconds: float | None) -> dict[str, str]:
    """The variable that tells workers; they may be on other machines, without this one's environment."""
    text = os.environ.get(START_TIMEOUT) if seconds is None else f"{seconds:g}"
    return {} if text is None else {START_TIMEOUT: text}


def _reporter() -> Callable[[str], None]:
    return lambda text: print(f"tfaccel launch: {text}", file=sys.stderr, flush=True)
