"""All workers meet before TensorFlow's own start, which waits without end and ignores every signal.

`MultiWorkerMirroredStrategy` blocks in its constructor until all peers are there: over 600 s were seen with
one missing, in C++, where neither Ctrl-C nor SIGTERM arrives. So the workers meet first, in Python and with a
time limit: the chief listens, the others connect and say who they are; it compares, and answers all of them
at once with what they have in common. A worker that is missing, differs in script or versions, or has no free
port becomes an error with its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import pathlib
import platform
import socket
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from tfaccel.cluster import LONGEST_START_S, START_TIMEOUT, START_TIMEOUT_S, Cluster
from tfaccel.errors import refuse
from tfaccel.prepare.callers import LINGER_S, Callers, decode, is_gone, listen, read_line, send


@dataclasses.dataclass(frozen=True)
class Meeting:
    """What the workers have in common after they met.

    Args:
        addresses: "host:port" of all, chief first, each port free a moment ago.
        shared: What the chief handed round.
    """

    addresses: tuple[str, ...]
    shared: Any


def meet(
    cluster: Cluster, facts: dict[str, Any], shared: Any = None, timeout_s: float = START_TIMEOUT_S
) -> Meeting:
    """Waits for all workers of the cluster; every one of them calls this.

    Args:
        cluster: Of this worker.
        facts: What must be equal for all, by name.
        shared: What all are to get if this is the chief; of JSON's types.
        timeout_s: How long to wait for the others, in seconds.

    Raises:
        ValueError: A port is in use, or the workers differ.
        RuntimeError: A worker did not come in time.
    """
    deadline = time.monotonic() + timeout_s
    port = int(cluster.addresses[cluster.index].rpartition(":")[2]) if cluster.addresses else 0
    with contextlib.ExitStack() as stack:
        if cluster.index == 0:
            listener = stack.enter_context(listen(int(cluster.chief.rpartition(":")[2])))
            own = listener if cluster.addresses else stack.enter_context(listen(0))
            callers = stack.enter_context(contextlib.closing(Callers(listener)))
            desk = _Desk(cluster, facts, own.getsockname()[1])
            _gather(desk, callers, deadline, timeout_s)
            return _agreed(_answer(desk, callers, shared))
        own = stack.enter_context(listen(port))
        hello = {"index": cluster.index, "port": own.getsockname()[1], "facts": facts}
        return _introduce(cluster, hello, deadline, timeout_s)


def facts_of_this_process(cluster: Cluster) -> dict[str, Any]:
    """What all workers must have in common: versions, script, and the cluster itself."""
    facts: dict[str, Any] = {name: metadata.version(name) for name in ("tfaccel", "keras", "tensorflow")}
    script = getattr(sys.modules["__main__"], "__file__", None)
    with contextlib.suppress(OSError, TypeError):
        digest = hashlib.sha256(pathlib.Path(script).read_bytes()).hexdigest()[:12]  # type: ignore[arg-type]
        facts["script"] = f"{pathlib.Path(script).name} ({digest})"  # type: ignore[arg-type]
    facts["python"] = ".".join(platform.python_version_tuple()[:2])
    return facts | {"cluster": [cluster.source, cluster.size, *cluster.addresses]}


def start_timeout_s() -> float:
    """The time limit that the launcher asked for, or the default.

    Raises:
        ValueError: It is no number of seconds.
    """
    text = os.environ.get(START_TIMEOUT, str(START_TIMEOUT_S))
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= LONGEST_START_S and math.isfinite(float(text)):
            return float(text)
    raise refuse(START_TIMEOUT, text, "seconds above 0, at most a day", "Correct or unset the variable.")


@dataclasses.dataclass
class _Desk:
    """What the chief knows: who is there, and what is wrong."""

    cluster: Cluster
    facts: dict[str, Any]
    port: int
    present: dict[int, tuple[socket.socket, int]] = dataclasses.field(default_factory=dict)
    greeted: list[socket.socket] = dataclasses.field(default_factory=list)
    problem: str = ""

    def missing(self) -> list[int]:
        return sorted(set(range(1, self.cluster.size)) - set(self.present))

    def hear(self, connection: socket.socket, message: Any) -> bool:
        """Takes a caller's message, or its end; False for one who is no worker of this job."""
        if message is None:
            here = {
                index: (who, port) for index, (who, port) in self.present.items() if who is not connection
            }
            self.present = here
            return True
        if not _is_hello(message):
            return False
        index, job = message["index"], message["facts"].get("cluster")
        ours = self.facts.get("cluster")
        if job and ours and job[0] != ours[0]:
            return False  # of another job, at a port that both have
        if index in self.present and is_gone(self.present[index][0]):
            del self.present[index]  # it ended, and was started again
        self.problem = self.problem or self._difference(message)
        self.present[index] = (connection, message["port"])
        self.greeted.append(connection)
        return True

    def _difference(self, hello: dict) -> str:
        index, size = hello["index"], self.cluster.size
        if index in self.present or not 0 < index < size:
            return (
                f"Two processes say that they are worker {index} of {size}. Allowed: one process for each "
                "task. Give each its own index."
            )
        for name in sorted({*self.facts, *hello["facts"]}):
            ours, theirs = self.facts.get(name), hello["facts"].get(name)
            if ours != theirs:
                return (
                    f"The workers differ in {name}: {ours} on worker 0, {theirs} on worker {index}. Allowed: "
                    "the same script and versions everywhere. Bring them to one state."
                )
        return ""


def _gather(desk: _Desk, callers: Callers, deadline: float, timeout_s: float) -> None:
    """Hears callers until all are there, or something is wrong; then a little longer: all are to learn it."""
    for left in _until(deadline):
        for connection, message in callers.poll(left):
            if not desk.hear(connection, message):
                callers.drop(connection)
        if desk.problem:
            deadline = min(deadline, time.monotonic() + LINGER_S)
            for left in _until(deadline):
                for connection, message in callers.poll(left):
                    desk.hear(connection, message)
            return
        if not desk.missing():
            for connection, message in callers.poll(0):  # somebody may have gone meanwhile
                desk.hear(connection, message)
        if not desk.missing():
            return
    desk.problem = _did_not_start(desk.cluster, desk.missing(), timeout_s)


def _answer(desk: _Desk, callers: Callers, shared: Any) -> dict:
    """Tells all who are there what was found, and gives it back."""
    chief = desk.cluster.chief.rpartition(":")[0]
    addresses = list(desk.cluster.addresses) or [f"{chief}:{desk.port}"]
    for index in range(len(addresses), desk.cluster.size):
        connection, port = desk.present.get(index, (None, 0))
        host = callers.hosts[connection] if connection else ""
        # On the chief's machine a worker comes from an address that the others can't reach.
        host = chief if host == "::1" or host.startswith("127.") else host
        addresses.append(f"[{host}]:{port}" if ":" in host.strip("[]") else f"{host}:{port}")
    answer = {"problem": desk.problem, "addresses": addresses, "shared": shared}
    for connection in desk.greeted:
        callers.tell(connection, answer)
    return answer


def _introduce(cluster: Cluster, hello: dict, deadline: float, timeout_s: float) -> Meeting:
    """The part of a worker that is not the chief."""
    problem = _did_not_start(cluster, [0], timeout_s)
    host, _, port = cluster.chief.rpartition(":")
    for left in _until(deadline):
        try:
            with socket.create_connection(
                (host.strip("[]"), int(port)), timeout=min(left, 2.0)
            ) as connection:
                # The chief may have begun to wait just now.
                connection.settimeout(timeout_s + 2 * LINGER_S)
                send(connection, hello)
                line = read_line(connection)
        except OSError:
            line = b""
        if not line:  # not there yet, gone, or about to start anew; a name may not resolve yet either
            time.sleep(max(0.0, min(0.1, deadline - time.monotonic())))
            continue
        answer = decode(line)
        if isinstance(answer, dict) and {"problem", "addresses", "shared"} <= set(answer):
            return _agreed(answer)
        problem = (
            f"{cluster.chief}, the address of worker 0, does not answer as tfaccel does: another program has "
            "the port, or worker 0 makes no Accelerator."
        )
        break
    raise RuntimeError(problem)


def _did_not_start(cluster: Cluster, missing: list[int], timeout_s: float) -> str:
    names = [f"{i} ({cluster.addresses[i]})" if cluster.addresses else str(i) for i in missing]
    who = f"worker {names[0]}" if len(names) == 1 else f"workers {', '.join(names)}"
    return (
        f"{who} of {cluster.size} did not start within {timeout_s:g} s, or ended again. Look at its output, "
        f"and whether worker 0 can be reached at {cluster.chief}. More time: --start-timeout of `tfaccel "
        f"launch`, or {START_TIMEOUT}."
    )


def _agreed(answer: dict) -> Meeting:
    problem = answer["problem"]
    if problem:
        raise (RuntimeError if "did not start" in problem else ValueError)(problem)
    return Meeting(tuple(answer["addresses"]), answer["shared"])


def _is_hello(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    numbers = [message.get("index"), message.get("port")]
    return all(type(each) is int for each in numbers) and isinstance(message.get("facts"), dict)


def _until(deadline: float) -> Iterator[float]:
    """The seconds that are left, as long as there are some."""
    while (left := deadline - time.monotonic()) > 0:
        yield left
