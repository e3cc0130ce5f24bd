"""The sockets under the workers' meeting: lines of JSON, from whoever calls, and nobody can hold it up."""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
from collections.abc import Iterator
from typing import Any, cast

LONGEST_MESSAGE = 1 << 20
LINGER_S = 2.0  # what one call may take


def listen(port: int) -> socket.socket:
    """A socket that takes calls at a port of this machine, of either protocol; 0 finds one that is free.

    Raises:
        ValueError: Somebody has the port.
    """
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise ValueError(
            f"Port {port} of this worker can't be had ({error.strerror}). Allowed: a port that nobody uses. "
            "Take another one in the workers' addresses, or end the process that has it."
        ) from error


class Callers:
    """The connections to the chief: nobody can hold it up, and it notices who goes away.

    Args:
        listener: Where they come in.
    """

    def __init__(self, listener: socket.socket):
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._received: dict[socket.socket, bytes] = {}
        self.hosts: dict[socket.socket, str] = {}

    def poll(self, seconds: float) -> Iterator[tuple[socket.socket, Any]]:
        """What arrives within that time: connections with their message, or with None when they end."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                connection, address = self._listener.accept()
                connection.setblocking(False)
                self._selector.register(connection, selectors.EVENT_READ)
                self._received[connection] = b""
                self.hosts[connection] = address[0].removeprefix("::ffff:")
                continue
            connection = cast(socket.socket, key.fileobj)
            try:
                data = connection.recv(1 << 16)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            self._received[connection] += data
            whole, ended, _ = self._received[connection].partition(b"\n")
            if ended:
                self._received[connection] = b""
                yield connection, decode(whole)
            elif not data or len(whole) > LONGEST_MESSAGE:
                self.drop(connection)
                yield connection, None

    def tell(self, connection: socket.socket, message: dict) -> None:
        """Sends a message; who is gone already needs none."""
        with contextlib.suppress(OSError):
            connection.settimeout(LINGER_S)
            send(connection, message)

    def drop(self, connection: socket.socket) -> None:
        """Ends a connection."""
        if self._received.pop(connection, None) is not None:
            self._selector.unregister(connection)
            connection.close()

    def close(self) -> None:
        """Ends all."""
        for connection in list(self._received):
            self.drop(connection)
        self._selector.close()


def is_gone(connection: socket.socket) -> bool:
    """Whether the other side of a non-blocking connection has ended it."""
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def send(connection: socket.socket, message: dict) -> None:
    """Sends a line."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def read_line(connection: socket.socket) -> bytes:
    """Up to the end of a line; what there is where none comes."""
    received = b""
    while b"\n" not in received and len(received) <= LONGEST_MESSAGE:
        data = connection.recv(1 << 16)
        if not data:
            break
        received += data
    return received.partition(b"\n")[0]


def decode(line: bytes) -> Any:
    """JSON, or a word that nobody sends."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return "not JSON"
