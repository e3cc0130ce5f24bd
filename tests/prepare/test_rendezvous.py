"""Workers meet: in threads of one process, over real sockets."""

import concurrent.futures
import contextlib
import json
import socket
import sys
import threading
import time

import pytest

from tfaccel.cluster import START_TIMEOUT, Cluster
from tfaccel.launch.local import free_port, free_ports
from tfaccel.prepare.rendezvous import facts_of_this_process, meet, start_timeout_s

FACTS = {"keras": "3"}


def clusters(size, fixed=True):
    ports = free_ports(size)
    addresses = tuple(f"127.0.0.1:{port}" for port in ports)
    return [Cluster(size, index, addresses[0], "a test", addresses if fixed else ()) for index in range(size)]


def meetings(members, facts=None, timeout_s=10.0):
    """What each gets: a meeting or an exception."""
    facts = facts or [FACTS] * len(members)
    with concurrent.futures.ThreadPoolExecutor(len(members)) as pool:
        futures = [
            pool.submit(meet, member, own, {"from": member.index}, timeout_s)
            for member, own in zip(members, facts, strict=True)
        ]
        return [future.exception() or future.result() for future in futures]


def call(member, data=b""):
    """A connection to the chief, as soon as it listens, on which `data` was sent."""
    host, _, port = member.chief.rpartition(":")
    for _ in range(100):
        try:
            connection = socket.create_connection((host, int(port)), timeout=5)
        except OSError:
            time.sleep(0.05)
        else:
            connection.sendall(data)
            return connection
    raise AssertionError("the chief does not listen")


def hello(index, facts=FACTS, port=1):
    return json.dumps({"index": index, "port": port, "facts": facts}).encode() + b"\n"


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("fixed", [True, False])
def test_all_learn_the_same(size, fixed):
    members = clusters(size, fixed)
    met = meetings(members)
    assert all(one == met[0] for one in met)
    assert len(set(met[0].addresses)) == size
    if fixed:
        assert met[0].addresses == members[0].addresses
    else:
        assert all(address.startswith("127.0.0.1:") for address in met[0].addresses)


def test_the_chief_hands_round_what_it_has():
    assert [met.shared for met in meetings(clusters(3))] == [{"from": 0}] * 3


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_addresses_may_be_of_ipv6():
    addresses = tuple(f"[::1]:{port}" for port in free_ports(2))
    members = [Cluster(2, index, addresses[0], "a test", addresses) for index in range(2)]
    assert [met.addresses for met in meetings(members)] == [addresses] * 2


def test_a_missing_worker_is_named_to_all():
    members = clusters(3)
    first, second = meetings([members[0], members[2]], timeout_s=1.0)
    for error in (first, second):
        assert isinstance(error, RuntimeError)
        assert f"worker 1 ({members[0].addresses[1]}) of 3 did not start within 1 s" in str(error)


def test_a_missing_chief_is_named():
    (error,) = meetings(clusters(2)[1:], timeout_s=0.5)
    assert isinstance(error, RuntimeError)
    assert "worker 0 (127.0.0.1:" in str(error)


def test_a_difference_is_told_to_both():
    for error in meetings(clusters(2), [FACTS, {"keras": "4"}]):
        assert isinstance(error, ValueError)
        assert "differ in keras: 3 on worker 0, 4 on worker 1" in str(error)


def test_two_with_one_index_are_refused():
    members = clusters(3, fixed=False)
    for error in meetings([members[0], members[1], members[1]]):
        assert isinstance(error, ValueError)
        assert "Two processes say that they are worker 1 of 3" in str(error)


def test_a_port_in_use_is_refused():
    members = clusters(2)
    with (
        socket.create_server(("", int(members[1].addresses[1].rpartition(":")[2]))),
        pytest.raises(ValueError, match=r"Port \d+ of this worker can't be had .*Allowed"),
    ):
        meet(members[1], FACTS, timeout_s=1.0)


def with_chief(member, then, timeout_s=10.0):
    """What the chief gets while `then` runs beside it."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        chief = pool.submit(meet, member, FACTS, "a gift", timeout_s)
        then()
        return chief.exception() or chief.result()


@pytest.mark.parametrize(
    "noise",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x12\x04\n",
        b"5\n",
        b'["index", "port", "facts"]\n',
        b'{"index": "1", "port": 2, "facts": {}}\n',
        b'{"index": true, "port": 2, "facts": {}}\n',
        b'{"index": 1, "port": 2, "facts": null}\n',
        b"[" * 200_000 + b"\n",
        b"\xff\xfe\x00\n",
        hello(1, {**FACTS, "cluster": ["another job", 2]}),
    ],
    ids=lambda noise: str(noise[:20]),
)
def test_strangers_are_not_taken_for_workers(noise):
    members = clusters(2)
    own = {**FACTS, "cluster": ["a test", 2]}

    def run():
        with call(members[0], noise):
            assert meet(members[1], own).shared == "a gift"

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        chief = pool.submit(meet, members[0], own, "a gift", 10.0)
        run()
        assert chief.result().shared == "a gift"


def test_one_that_never_ends_its_line_holds_nobody_up():
    members = clusters(2)

    def drip():
        with call(members[0]) as connection, contextlib.suppress(ConnectionError):
            for _ in range(8):
                connection.sendall(b"x")
                time.sleep(0.1)

    begun = time.monotonic()
    assert isinstance(with_chief(members[0], drip, timeout_s=0.5), RuntimeError)
    assert time.monotonic() - begun < 5


def test_a_worker_that_ended_and_came_again_is_one_worker():
    members = clusters(3)  # the chief still waits for the third while the second comes again

    def run():
        call(members[0], hello(1)).close()
        assert [met.shared for met in meetings(members[1:])] == ["a gift"] * 2

    assert with_chief(members[0], run).shared == "a gift"


def test_a_worker_that_ended_for_good_is_missing():
    members = clusters(3)

    def run():
        call(members[0], hello(1)).close()
        time.sleep(0.2)
        with pytest.raises(RuntimeError, match="worker 1 "):
            meet(members[2], FACTS, timeout_s=5.0)

    error = with_chief(members[0], run, timeout_s=1.0)
    assert "worker 1 (127.0.0.1:" in str(error)


def test_a_late_worker_learns_what_is_wrong_with_another():
    members = clusters(3)

    def run():
        with call(members[0], hello(1, {"keras": "4"})):
            time.sleep(0.3)
            with pytest.raises(ValueError, match="differ in keras"):
                meet(members[2], FACTS)

    assert "differ in keras" in str(with_chief(members[0], run))


def test_a_chief_that_ended_and_came_again_is_met():
    members = clusters(2)
    host, _, port = members[0].chief.rpartition(":")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with socket.create_server((host, int(port))) as server:
            other = pool.submit(meet, members[1], FACTS, None, 10.0)
            connection, _ = server.accept()
            connection.recv(1000)
            connection.close()
        meet(members[0], FACTS, "a gift")
        assert other.result().shared == "a gift"


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"{}\n", b"\x00\x00\x12\x04\n"])
def test_a_stranger_as_chief_is_recognised(answer):
    members = clusters(2)
    host, _, port = members[0].chief.rpartition(":")
    with socket.create_server((host, int(port))) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(RuntimeError, match="does not answer as tfaccel does"):
            meet(members[1], FACTS, timeout_s=5.0)
        thread.join()


def test_facts_name_versions_script_and_cluster(monkeypatch):
    # Of a process of pytest-xdist the main module is no file.
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)
    facts = facts_of_this_process(clusters(2)[0])
    assert set(facts) == {"tfaccel", "keras", "tensorflow", "python", "script", "cluster"}


@pytest.mark.parametrize("text", ["0", "-1", "soon", "", "inf", "nan", "1e12"])
def test_a_bad_time_limit_is_refused(monkeypatch, text):
    monkeypatch.setenv(START_TIMEOUT, text)
    with pytest.raises(ValueError, match=f"{START_TIMEOUT}=.*Allowed: seconds above 0"):
        start_timeout_s()


def test_free_port_is_free():
    with socket.create_server(("", free_port())):
        pass
