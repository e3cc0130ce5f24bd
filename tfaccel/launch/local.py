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
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from tfaccel.cluster import tf_config
from tfaccel.errors import refuse
from tfaccel.launch.errors import WorkerError
from tfaccel.launch.signals import ends_with_parent, signal_name, signals_end

GRACE_S = 10.0  # between SIGTERM and SIGKILL
OUTPUT_S = 2.0  # for the last lines, when a worker has ended
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
        SystemExit: This process was told to end by SIGTERM or SIGHUP; the workers have ended.
    """
    for attempt in range(max_restarts + 1):
        try:
            with signals_end():
                _run_once(command, workers, environment, attempt)
            return
        except WorkerError as error:
            if attempt == max_restarts:
                raise
            report(f"{error}; starting all {workers} again ({attempt + 1} of {max_restarts})")


def _run_once(command: Sequence[str], workers: int, environment: Mapping[str, str], attempt: int) -> None:
    addresses = [f"{HOST}:{port}" for port in free_ports(workers)]
    shares = environment_shares(environment, workers)
    processes: list[subprocess.Popen] = []
    readers: list[threading.Thread] = []
    try:
        for index in range(workers):
            own = {**environment, **shares[index], "TF_CONFIG": tf_config(addresses, index)}
            process = subprocess.Popen(
                ends_with_parent(command, os.getpid()),
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
    except BaseException:
        _end(processes)
        raise
    finally:
        # A child of a worker may keep its output open for as long as it lives.
        deadline = time.monotonic() + OUTPUT_S
        for reader in readers:
            reader.join(max(0.0, deadline - time.monotonic()))


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
    end = f"exited with code {code}" if code > 0 else f"was ended by {signal_name(-code)}"
    states = {
        "is frozen (stopped by a signal)": [i for i, each in enumerate(processes) if _is_stopped(each.pid)],
        "had ended before, with code 0": [i for i, each in enumerate(processes) if each.returncode == 0],
    }
    others = [f"; worker {', '.join(map(str, who))} {state}" for state, who in states.items() if who]
    return f"worker {index} of {len(processes)} {end}{''.join(others)}"


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped, as by SIGSTOP; False where the system has no /proc."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in "tT"


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """SIGTERM, and SIGKILL for those that take too long or when there is a second reason to hurry."""
    try:
        for number in (signal.SIGTERM, signal.SIGCONT):  # a stopped process would not see the first
            _signal(processes, number)
        deadline = time.monotonic() + GRACE_S
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        _signal(processes, signal.SIGKILL)
        for process in processes:
            process.wait()


def _signal(processes: Sequence[subprocess.Popen], number: int) -> None:
    """To the workers and what they have started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
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
            text = f"[worker {index}] {line.decode(errors='replace').rstrip()}\n"
            encoding = getattr(output, "encoding", None) or "utf-8"
            with _writing:
                output.write(text.encode(encoding, "replace").decode(encoding))
                output.flush()


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

    Raises:
        ValueError: There are fewer GPUs than workers: two can't sum their gradients on one.
    """
    gpus = _gpus(environment)
    if 0 < len(gpus) < workers:
        raise refuse(
            "workers",
            workers,
            f"at most {len(gpus)}, one for each GPU",
            "Start fewer, or set CUDA_VISIBLE_DEVICES=-1 to train on the CPU.",
        )
    if gpus:
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
