"""What a worker process runs for `tfaccel.launch.run`: `python -m tfaccel.launch.worker FOLDER`."""

from __future__ import annotations

import os
import pathlib
import signal
import sys
import threading
import time

from tfaccel.cluster import find_cluster
from tfaccel.launch.call import call, words

PARENT_POLL_S = 1.0


def main(folder: pathlib.Path) -> None:
    """Runs the call of a folder; the chief leaves its result there, a worker that fails the reason."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    cluster = find_cluster(os.environ)
    index = 0 if cluster is None else cluster.index
    try:
        result = call((folder / "call").read_bytes(), wanted=index == 0)
    except BaseException as error:
        attempt = os.environ.get("TFACCEL_RESTART", "0")
        _write(folder / f"failure-{attempt}-{index}", words(index, error).encode())
        raise
    if index == 0:
        _write(folder / "result", result)


def _write(path: pathlib.Path, data: bytes) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_bytes(data)
    unfinished.rename(path)


def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone: one that was killed can't end its workers."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
