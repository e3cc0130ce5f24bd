"""A call as bytes, the way it reaches a worker, and its result as bytes on the way back.

`cloudpickle` packs functions of notebooks and scripts by value, as Ray and Spark do.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pickle import PicklingError
from typing import Any

import cloudpickle
import tensorflow as tf


def pack(
    function: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> bytes:
    """The call as bytes, with the folders that Python looks for modules in.

    Raises:
        ValueError: Something in it can't be sent to another process.
    """
    inner = _dump((function, tuple(args), dict(kwargs or {})), _name(function), "sent to the workers")
    return cloudpickle.dumps((sys.path, inner))


def call(packed: bytes, wanted: bool) -> bytes:
    """Runs a call that was packed.

    Args:
        packed: From `pack`.
        wanted: Whether the result is; only the chief's goes back.

    Returns:
        The result, packed; or nothing.

    Raises:
        ValueError: The result can't be sent back.
    """
    path, inner = cloudpickle.loads(packed)
    sys.path.extend(folder for folder in path if folder not in sys.path)
    function, args, kwargs = cloudpickle.loads(inner)
    result = function(*args, **kwargs)
    return _dump(result, f"what {_name(function)} returned", "sent back") if wanted else b""


def _dump(value: Any, name: str, where: str) -> bytes:
    try:
        return cloudpickle.dumps(value)
    except (TypeError, AttributeError, ValueError, RecursionError, PicklingError, tf.errors.OpError) as error:
        raise ValueError(
            f"{name} can't be {where}: {error}. Allowed: what can be pickled, such as numbers, arrays and "
            "Keras models. Make data sets, locks and files inside of the function."
        ) from error


def _name(function: Callable) -> str:
    return repr(getattr(function, "__name__", function))


def unpack(result: bytes) -> Any:
    """What `call` packed."""
    return cloudpickle.loads(result)


def worker_command(folder: pathlib.Path, packed: bytes) -> list[str]:
    """Writes a call into a folder, and gives the command of a worker that runs it."""
    (folder / "call").write_bytes(packed)
    return [sys.executable, "-m", "tfaccel.launch.worker", str(folder)]


def words(index: int, error: BaseException) -> str:
    """What became of a worker, in a line for whoever started it."""
    return f"worker {index} raised {type(error).__name__}: {error}"


def failure(folder: pathlib.Path, attempt: int) -> str:
    """What the worker that failed first said; empty where none could.

    Args:
        folder: Of the call.
        attempt: The number of restarts before.
    """
    said = sorted(folder.glob(f"failure-{attempt}-*"), key=lambda path: path.stat().st_mtime_ns)
    return said[0].read_text() if said else ""


def pack_script(path: str, arguments: Sequence[str]) -> bytes:
    """A script as a call: its text goes to the workers, who need not have the file.

    Raises:
        ValueError: There is no such file.
    """
    return pack(_execute, (str(path), read_script(path), list(arguments)))


def read_script(path: str) -> str:
    """The text of a Python script.

    Raises:
        ValueError: There is none that can be read.
    """
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"script={path!r} can't be read ({error}). Allowed: a Python file. Give its path, then its "
            "arguments."
        ) from error


def _execute(path: str, text: str, arguments: list[str]) -> None:
    module = types.ModuleType("__main__")
    module.__file__ = path
    before = sys.argv
    sys.argv = [path, *arguments]
    try:
        exec(compile(text, path, "exec"), vars(module))
    finally:
        sys.argv = before


@contextlib.contextmanager
def prefixed(index: int) -> Iterator[None]:
    """Puts the worker's number before every line that Python prints while the block lasts."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Prefixed(stream, f"[worker {index}] ") for stream in streams)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams


class _Prefixed(io.TextIOBase):
    """Writes whole lines to another stream, each with a prefix."""

    def __init__(self, stream: Any, prefix: str):
        self._stream = stream
        self._prefix = prefix
        self._begun = ""

    def write(self, text: str) -> int:
        *whole, self._begun = (self._begun + text).split("\n")
        for line in whole:
            self._stream.write(f"{self._prefix}{line}\n")
        return len(text)

    def flush(self) -> None:
        if self._begun:
            self._stream.write(f"{self._prefix}{self._begun}\n")
            self._begun = ""
        self._stream.flush()
