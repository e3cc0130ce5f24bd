"""All workers meet before TensorFlow's own start, which waits without end and ignores every signal.

`MultiWorkerMirroredStrategy` blocks in its constructor until all peers are there: over 600 s were seen with
one missing, in C++, where neither Ctrl-C nor SIGTERM arrives. So the workers meet first, in Python and with a
time limit: the chief listens, the others connect and say who they are; it compares, and answers all of them
with what they have in common. A worker that is missing, differs in script or versions, or has no free port
becomes an error with its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from tfaccel.cluster import START_TIMEOUT, START_TIMEOUT_S, Cluster

LONGEST_MESSAGE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Meeting:
    """What the workers have in common after they met.

    Args:
        addresses: "host:port" of all, chief first, each port free a moment ago.
        seed: A random number, the same for all.
    """

    addresses: tuple[str, ...]
    seed: int


def meet(cluster: Cluster, facts: dict[str, Any], timeout_s: float = START_TIMEOUT_S) -> Meeting:
    """Waits for all workers of the cluster; every one of them calls this.

    Args:
        cluster: Of this worker.
        facts: What must be equal for all, by name.
        timeout_s: How long to wait for the others, in seconds.

    Raises:
        ValueError: A port is in use, or the workers differ.
        RuntimeError: A worker did not come in time.
    """
    deadline = time.monotonic() + timeout_s
    port = int(cluster.addresses[cluster.index].rpartition(":")[2]) if cluster.addresses else 0
    chief_port = int(cluster.chief.rpartition(":")[2])
    with contextlib.ExitStack() as stack:
        if cluster.index == 0:
            listener = stack.enter_context(_listen(chief_port))
            own = listener if cluster.addresses else stack.enter_context(_listen(0))
            return _receive(cluster, facts, listener, own.getsockname()[1], deadline, timeout_s)
        own = stack.enter_context(_listen(port))
        hello = {"index": cluster.index, "port": own.getsockname()[1], "facts": facts}
        return _introduce(cluster, hello, deadline, timeout_s)


def facts_of_this_process(cluster: Cluster) -> dict[str, Any]:
    """What all workers must have in common: versions, script, and the cluster itself."""
    versions = {name: metadata.version(name) for name in ("tfaccel", "keras", "tensorflow")}
    script = getattr(sys.modules["__main__"], "__file__", None)
    with contextlib.suppress(OSError, TypeError):
        digest = hashlib.sha256(pathlib.Path(script).read_bytes()).hexdigest()[:12]  # type: ignore[arg-type]
        versions["script"] = f"{pathlib.Path(script).name} ({digest})"  # type: ignore[arg-type]
    python = ".".join(platform.python_version_tuple()[:2])
    return versions | {"python": python, "cluster": [cluster.size, *cluster.addresses]}


def start_timeout_s() -> float:
    """The time limit that the launcher asked for, or the default.

    Raises:
        ValueError: It is no positive number.
    """
    text = os.environ.get(START_TIMEOUT, str(START_TIMEOUT_S))
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise ValueError(
        f"{START_TIMEOUT}={text!r} is not usable. Allowed: seconds above 0. Correct or unset it."
    )


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server(("", port))
    except OSError as error:
        raise ValueError(
            f"Port {port} of this worker can't be had ({error.strerror}). Allowed: a port that nobody uses. "
            "Take another one in the workers' addresses, or end the process that has it."
        ) from error


def _receive(
    cluster: Cluster, facts: dict, listener: socket.socket, port: int, deadline: float, timeout_s: float
) -> Meeting:
    """The chief's part: collects all, compares, and answers."""
    addresses = {0: f"{cluster.chief.rpartition(':')[0]}:{port}"}
    problem = ""
    with contextlib.ExitStack() as stack:
        connections = []
        while len(addresses) < cluster.size and not problem:
            arrived = _accept(listener, deadline)
            if arrived is None:
                missing = sorted(set(range(cluster.size)) - set(addresses))
                problem = _did_not_start(cluster, missing, timeout_s)
                break
            connection, hello, host = arrived
            connections.append(stack.enter_context(connection))
            index = hello["index"]
            problem = _difference(cluster, facts, hello, index in addresses)
            # On the chief's machine a worker comes from an address that the others can't reach.
            host = addresses[0].rpartition(":")[0] if host.startswith(("127.", "::1")) else host
            addresses[index] = f"{host}:{hello['port']}"
        ordered = cluster.addresses or [addresses.get(i, "") for i in range(cluster.size)]
        answer = {"problem": problem, "addresses": ordered, "seed": secrets.randbelow(2**31)}
        for connection in connections:
            with contextlib.suppress(OSError):  # its own error says why it is gone
                _send(connection, answer)
    return _agreed(answer)


def _accept(listener: socket.socket, deadline: float) -> tuple[socket.socket, dict, str] | None:
    """The next worker that says hello as we do; None when time is up."""
    for left in _until(deadline):
        listener.settimeout(left)
        try:
            connection, address = listener.accept()
        except TimeoutError:
            return None
        connection.settimeout(min(left, 2.0))
        try:
            hello = _read(connection)
            if {"index", "port", "facts"} <= set(hello):
                return connection, hello, address[0]
        except (OSError, ValueError):
            pass  # somebody else: a port scanner, a health check
        connection.close()
    return None


def _difference(cluster: Cluster, facts: dict, hello: dict, twice: bool) -> str:
    index = hello["index"]
    if twice or not 0 < index < cluster.size:
        return (
            f"Two processes say that they are worker {index} of {cluster.size}. Allowed: one process for "
            "each task. Give each its own index."
        )
    for name in sorted({*facts, *hello["facts"]}):
        ours, theirs = facts.get(name), hello["facts"].get(name)
        if ours != theirs:
            return (
                f"The workers differ in {name}: {ours} on worker 0, {theirs} on worker {index}. Allowed: the "
                "same script and versions everywhere. Bring them to one state."
            )
    return ""


def _introduce(cluster: Cluster, hello: dict, deadline: float, timeout_s: float) -> Meeting:
    """The part of a worker that is not the chief."""
    for left in _until(deadline):
        host, _, port = cluster.chief.rpartition(":")
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 2.0))
        except OSError:
            time.sleep(min(left, 0.1))  # not there yet; a name may not resolve yet either
            continue
        with connection:
            # The chief may have begun to wait just now.
            connection.settimeout(timeout_s + 5)
            try:
                _send(connection, hello)
                return _agreed(_read(connection))
            except OSError as error:
                raise RuntimeError(
                    f"Worker 0 ({cluster.chief}) went away while the workers met. Its own output says why."
                ) from error
            except json.JSONDecodeError as error:
                raise RuntimeError(
                    f"{cluster.chief}, the address of worker 0, does not answer as tfaccel does: all workers "
                    "have to make the same Accelerator."
                ) from error
    raise RuntimeError(_did_not_start(cluster, [0], timeout_s))


def _did_not_start(cluster: Cluster, missing: list[int], timeout_s: float) -> str:
    names = [f"{i} ({cluster.addresses[i]})" if cluster.addresses else str(i) for i in missing]
    who = f"worker {names[0]}" if len(names) == 1 else f"workers {', '.join(names)}"
    return (
        f"{who} of {cluster.size} did not start within {timeout_s:g} s. Look at its output, and whether "
        f"worker 0 can be reached at {cluster.chief}; {START_TIMEOUT} allows more time."
    )


def _agreed(answer: dict) -> Meeting:
    problem = answer["problem"]
    if problem:
        raise (RuntimeError if "did not start" in problem else ValueError)(problem)
    return Meeting(tuple(answer["addresses"]), answer["seed"])


def _until(deadline: float) -> Iterator[float]:
    """The seconds that are left, as long as there are some."""
    while (left := deadline - time.monotonic()) > 0:
        yield left


def _send(connection: socket.socket, message: dict) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket) -> dict:
    with connection.makefile("rb") as lines:
        return json.loads(lines.readline(LONGEST_MESSAGE))
