"""What goes over a pipe arrives as it was; large arrays are read where they were written."""

from __future__ import annotations

import os
import socket
import threading

import numpy as np
import pytest

from launcher.workers.ipc import Pipe

LARGE = 1 << 19
"""Numbers of four bytes: 2 MiB."""


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Pipe(ours), Pipe(theirs)


def sent(ends, value):
    """The value at the other end."""
    thread = threading.Thread(target=ends[0].send, args=(value,), daemon=True)
    thread.start()
    out = ends[1].recv()
    thread.join(10)
    return out


def test_objects_arrive_as_they_were(ends):
    values = [None, ("call", {"a": [1, 2.5, "ä"]}), b"x" * (3 << 20), {"loss": float("inf")}]
    assert [sent(ends, value) for value in values] == values


@pytest.mark.parametrize(
    "made",
    [
        lambda: np.arange(LARGE, dtype=np.float32),
        lambda: np.asfortranarray(np.arange(LARGE, dtype=np.int32).reshape(1024, -1)),
        lambda: np.arange(4 * LARGE, dtype=np.int16)[::2],
        lambda: np.frombuffer(os.urandom(4 * LARGE), np.uint8),
        lambda: np.arange(3, dtype=np.int64),
        lambda: np.empty(0, np.float32),
    ],
    ids=["large", "by columns", "every second", "read-only", "small", "empty"],
)
def test_arrays_arrive_as_they_were(ends, made):
    array = made()
    out = sent(ends, {"a": (array, "float32"), "b": array})
    assert out["a"][1] == "float32"
    for got in (out["a"][0], out["b"]):
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)


def test_large_arrays_lie_in_memory_of_their_own_and_leave_nothing_behind(ends):
    before = len(os.listdir("/proc/self/fd"))
    first, second = sent(ends, [np.ones(LARGE, np.float32), np.full(2 * LARGE, 2, np.float32)])
    assert not first.flags.owndata
    first[:] = 5  # nobody else reads it any more
    assert (first.sum(), second.sum()) == (5 * LARGE, 4 * LARGE)
    del first, second
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_cannot_be_sent_leaves_the_pipe_as_it_was(ends):
    with pytest.raises((AttributeError, TypeError)):
        ends[0].send((np.ones(LARGE, np.float32), threading.Lock()))
    assert sent(ends, "next") == "next"


def test_an_end_that_is_gone_is_told(ends):
    ends[0].end.close()
    assert ends[1].poll()
    with pytest.raises(EOFError):
        ends[1].recv()


def test_nothing_to_receive_yet(ends):
    assert not ends[1].poll()
    ends[0].send(1)
    assert ends[1].poll()
