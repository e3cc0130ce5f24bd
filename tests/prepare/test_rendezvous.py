"""Workers meet: in threads of one process, over real sockets."""

import concurrent.futures
import socket
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
        futures = [pool.submit(meet, *pair, timeout_s) for pair in zip(members, facts, strict=True)]
        return [future.exception() or future.result() for future in futures]


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


def test_every_meeting_has_another_seed():
    assert meetings(clusters(2))[0].seed != meetings(clusters(2))[0].seed


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
    errors = meetings([members[0], members[1], members[1]])
    assert isinstance(errors[0], ValueError)
    assert "Two processes say that they are worker 1 of 3" in str(errors[0])


def test_a_port_in_use_is_refused():
    members = clusters(2)
    with (
        socket.create_server(("", int(members[1].addresses[1].rpartition(":")[2]))),
        pytest.raises(ValueError, match=r"Port \d+ of this worker can't be had .*Allowed"),
    ):
        meet(members[1], FACTS, 1.0)


def test_strangers_are_not_taken_for_workers():
    members = clusters(2)
    host, _, port = members[0].chief.rpartition(":")

    def disturb():
        for _ in range(50):
            try:
                with socket.create_connection((host, int(port)), timeout=1) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    return
            except OSError:
                time.sleep(0.05)

    stranger = threading.Thread(target=disturb)
    stranger.start()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        chief = pool.submit(meet, members[0], FACTS, 10.0)
        stranger.join()
        other = pool.submit(meet, members[1], FACTS, 10.0)
        assert chief.result() == other.result()


def test_a_stranger_as_chief_is_recognised():
    members = clusters(2)
    port = int(members[0].chief.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(RuntimeError, match="does not answer as tfaccel does"):
            meet(members[1], FACTS, 5.0)
        thread.join()


def test_facts_name_versions_script_and_cluster():
    facts = facts_of_this_process(clusters(2)[0])
    assert set(facts) == {"tfaccel", "keras", "tensorflow", "python", "script", "cluster"}


@pytest.mark.parametrize("text", ["0", "-1", "soon", ""])
def test_a_bad_time_limit_is_refused(monkeypatch, text):
    monkeypatch.setenv(START_TIMEOUT, text)
    with pytest.raises(ValueError, match=f"{START_TIMEOUT}=.*Allowed: seconds above 0"):
        start_timeout_s()


def test_free_port_is_free():
    with socket.create_server(("", free_port())):
        pass
