"""Workers as processes of this machine: their output with a prefix, and an end for all when one fails.

When a worker dies TensorFlow's others wait for it: 8 to 9 seconds until its heartbeat is missed, or for
ever. The launcher sees the end of a process at once, and ends the others.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

from tfaccel.cluster import tf_config
from tfaccel.launch.errors import WorkerError

GRACE_S = 10.0  # between SIGTERM and SIGKILL
POLL_S = 0.05
HOST = "127.0.0.1"


def run_processes(
    command: Sequence[str],
    workers: int,
    *,
    environment: Mapping[str, str],
    max_restarts: int = 0,
    report: Callable[[str], None] = lambda text: None,
) -> None:
    """Runs one command in several processes, each with a `TF_CONFIG` of its own, until all have ended.

    Args:
        command: The program and its arguments.
        workers: How many processes.
        environment: Of every process; `TF_CONFIG` is added.
        max_restarts: How often all of them are started again after one has failed.
        report: Is told what happens.

    Raises:
        WorkerError: A worker failed, and there was no restart left.
        SystemExit: This process was told to end by SIGTERM; the workers have ended.
    """
    for attempt in range(max_restarts + 1):
        try:
            with _sigterm_ends():
                _run_once(command, workers, environment, attempt)
            return
        except WorkerError as error:
            if attempt == max_restarts:
                raise
            report(f"{error}; starting all {workers} again ({attempt + 1} of {max_restarts})")


def _run_once(command: Sequence[str], workers: int, environment: Mapping[str, str], attempt: int) -> None:
    addresses = [f"{HOST}:{port}" for port in free_ports(workers)]
    shares = environment_shares(environment, workers)
    processes, readers = [], []
    try:
        for index in range(workers):
            own = {**environment, **shares[index], "TF_CONFIG": tf_config(addresses, index)}
            process = subprocess.Popen(
                command,
                env={**own, "TFACCEL_RESTART": str(attempt), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C comes to the launcher, which ends them in order
            )
            processes.append(process)
            for stream, output in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                reader = threading.Thread(target=copy_output, args=(stream, output, index), daemon=True)
                reader.start()
                readers.append(reader)
        _wait(processes)
    finally:
        _end(processes)
        for reader in readers:
            reader.join(timeout=GRACE_S)


def _wait(processes: Sequence[subprocess.Popen]) -> None:
    """Until all have ended well; raises as soon as one has not."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [i for i, code in enumerate(codes) if code]
        if failed:
            # A process that was killed is the cause; errors of the others come from its absence.
            first = min(failed, key=lambda i: (codes[i] or 0) > 0)
            code = codes[first] or 0
            raise WorkerError(_what_happened(first, code, processes), code if code > 0 else 128 - code)
        if all(code == 0 for code in codes):
            return
        time.sleep(POLL_S)


def _what_happened(index: int, code: int, processes: Sequence[subprocess.Popen]) -> str:
    end = f"exited with code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    frozen = [str(i) for i, process in enumerate(processes) if _is_stopped(process.pid)]
    why = f"; worker {', '.join(frozen)} is frozen (stopped by a signal)" if frozen else ""
    return f"worker {index} of {len(processes)} {end}{why}"


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped, as by SIGSTOP; False where the system has no /proc."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in "tT"


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """SIGTERM, and SIGKILL for those that take too long."""
    for process in processes:
        _signal(process, signal.SIGTERM)
        _signal(process, signal.SIGCONT)  # a stopped process would not see it
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen, number: int) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


_writing = threading.Lock()


def copy_output(stream: IO[bytes] | None, output: IO[str], index: int) -> None:
    """Copies whole lines with the worker's number before each, so that those of two never mix.

    Args:
        stream: Of the worker, until it ends.
        output: Where they go.
        index: The worker's number.
    """
    with stream or contextlib.nullcontext(()) as lines:
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r\n")
            with _writing:
                output.write(f"[worker {index}] {text}\n")
                output.flush()


@contextlib.contextmanager
def _sigterm_ends() -> Iterator[None]:
    """Turns SIGTERM into an exception while the block lasts, so that the workers are ended too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody used a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]


def environment_shares(environment: Mapping[str, str], workers: int) -> list[dict[str, str]]:
    """What each worker gets of the machine: its part of the GPUs, or of the cores.

    Args:
        environment: What is set there by the user is left alone.
        workers: How many share the machine.
    """
    gpus = _gpus(environment)
    if len(gpus) >= workers:
        each = len(gpus) // workers
        parts = [gpus[i * each : (i + 1) * each] for i in range(workers)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]
    # Each process would start a thread for every core, and they would wait for one another.
    threads = str(max(1, _cores() // workers))
    names = ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")
    return [{name: threads for name in names if name not in environment}] * workers


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus(environment: Mapping[str, str]) -> list[str]:
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [each for each in visible.split(",") if each.strip() and each.strip() != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(i) for i, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU")]
