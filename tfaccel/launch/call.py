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
from typing import Any

import cloudpickle


def pack(
    function: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> bytes:
    """The call as bytes.

    Raises:
        ValueError: Something in it can't be sent to another process.
    """
    try:
        return cloudpickle.dumps((function, tuple(args), dict(kwargs or {})))
    except (TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{getattr(function, '__name__', function)!r} can't be sent to the workers: {error}. Allowed: a "
            "function and arguments that can be pickled. Build models and data sets inside of the function."
        ) from error


def call(packed: bytes) -> bytes:
    """Runs a call that was packed; its result, packed."""
    function, args, kwargs = cloudpickle.loads(packed)
    return cloudpickle.dumps(function(*args, **kwargs))


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


def failure(folder: pathlib.Path) -> str:
    """What the worker that failed first said; empty where none could."""
    said = sorted(folder.glob("failure-*"), key=lambda path: path.stat().st_mtime_ns)
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
