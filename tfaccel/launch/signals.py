"""A launcher that is told to end ends its workers first."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

# SIGHUP comes when the terminal goes away; the workers have sessions of their own and would not get it.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

# Runs a program that Linux kills when the launcher is gone, however that came about.
_STUB = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


@contextlib.contextmanager
def signals_end() -> Iterator[None]:
    """Turns the signals that end a process into `SystemExit` for this block; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ends_with_parent(command: Sequence[str], parent: int) -> list[str]:
    """The command of a process that does not outlive this one.

    Args:
        command: The program and its arguments.
        parent: This process's number.
    """
    return [sys.executable, "-c", _STUB, str(parent), *command]


def signal_name(number: int) -> str:
    """Such as "SIGKILL"; real-time signals have numbers only."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
