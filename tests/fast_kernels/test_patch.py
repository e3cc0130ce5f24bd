"""A patch acts in the threads that asked for it, and comes off with the last of them."""

import threading

import pytest

from tfaccel.keras_fixes.patch import Patch


class Host:
    def greet(self):
        return "plain"


def wrap(original, setting):
    return lambda self: setting() or original(self)


def test_it_acts_while_the_block_lasts_and_may_be_nested():
    original, patch = Host.greet, Patch(Host, "greet", wrap)
    with patch.active("outer"):
        with patch.active("inner"):
            assert Host().greet() == "inner"
        assert Host().greet() == "outer"
    assert Host.greet is original


def test_it_comes_off_after_an_exception():
    original, patch = Host.greet, Patch(Host, "greet", wrap)
    with pytest.raises(RuntimeError), patch.active("on"):
        raise RuntimeError
    assert Host.greet is original


def test_threads_that_overlap_leave_nothing_behind():
    """The first thread leaves while the second one is still inside."""
    original, patch, seen = Host.greet, Patch(Host, "greet", wrap), {}
    second_is_in, first_is_out = threading.Event(), threading.Event()

    def second():
        with patch.active("second"):
            second_is_in.set()
            assert first_is_out.wait(30)
            seen["second"] = Host().greet()

    thread = threading.Thread(target=second)
    with patch.active("first"):
        thread.start()
        assert second_is_in.wait(30)
        seen["first"] = Host().greet()
    seen["outside"] = Host().greet()
    first_is_out.set()
    thread.join()
    assert seen == {"first": "first", "second": "second", "outside": "plain"}
    assert Host.greet is original
