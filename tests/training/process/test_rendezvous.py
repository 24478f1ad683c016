"""The store through which workers meet: torch's operations, for those alone who have the key of the group."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
import time
from datetime import timedelta

import pytest

from tests.support.fork_group import in_a_process
from training.errors import TrainingError
from training.process import distributed, rendezvous_server
from training.process.authenticated_channel import (
    KEY_BYTES,
    NONCE_BYTES,
    TAG_BYTES,
    Connection,
    Frames,
    NotAuthentic,
    Session,
    pack,
    unpack,
)
from training.process.distributed import RankInfo, join, listen
from training.process.rendezvous_server import RendezvousServer

KEY = secrets.token_bytes(KEY_BYTES)
STRANGER = 65534


@pytest.fixture
def address():
    """Host and port of a server in this process, as arguments of `Connection`."""
    listener = listen("127.0.0.1")
    RendezvousServer(listener, KEY)
    return listener.getsockname()


@pytest.fixture
def connected(address):
    opened = []

    def connect():
        opened.append(Connection(*address, KEY, 10))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


# The channel.


def test_what_is_packed_is_unpacked():
    parts = [b"get", b"", b"\0" * 5000]
    assert unpack(pack(parts)) == parts
    assert unpack(b"") == []


@pytest.mark.parametrize("payload", [b"\0", b"\0\0\0\2x", pack([b"abc"])[:-1]])
def test_a_payload_that_is_cut_is_refused(payload):
    with pytest.raises(ValueError, match="ends within"):
        unpack(payload)


def test_both_ends_derive_the_same_and_nothing_from_another_key():
    ours, theirs = (Session(KEY, b"c" * NONCE_BYTES, b"n" * NONCE_BYTES) for _ in range(2))
    other = Session(secrets.token_bytes(KEY_BYTES), b"c" * NONCE_BYTES, b"n" * NONCE_BYTES)
    assert (ours.client_proof, ours.server_proof) == (theirs.client_proof, theirs.server_proof)
    assert len({ours.client_proof, ours.server_proof, other.client_proof, other.server_proof}) == 4
    with pytest.raises(ValueError, match="32 are needed"):
        Session(b"", b"c" * NONCE_BYTES, b"n" * NONCE_BYTES)


def test_frames_arrive_in_pieces():
    frame, received, reader = Frames(KEY).pack(b"value"), bytearray(), Frames(KEY)
    for byte in frame[:-1]:
        received.append(byte)
        assert reader.unpack(received) is None
    received.append(frame[-1])
    assert reader.unpack(received) == b"value"
    assert not received


@pytest.mark.parametrize("kind", ["changed", "repeated", "left out", "of the other direction", "too large"])
def test_a_frame_that_the_sender_did_not_send_there_is_refused(kind):
    writer, reader = Frames(KEY), Frames(KEY)
    frames = [writer.pack(b"first"), writer.pack(b"second")]
    received = {
        "changed": frames[0][:-1] + b"x",
        "repeated": frames[0] * 2,
        "left out": frames[1],
        "of the other direction": Frames(secrets.token_bytes(KEY_BYTES)).pack(b"first"),
        "too large": b"\xff" * len(frames[0]),
    }[kind]
    with pytest.raises(NotAuthentic):
        while reader.unpack(data := bytearray(received)) is not None:
            received = bytes(data)


# The server.


def test_a_wait_is_answered_when_the_last_key_is_there(connected):
    waiting, setting, answers = connected(), connected(), []
    thread = threading.Thread(target=lambda: answers.append(waiting.ask([b"get", b"a", b"b"], 10)))
    thread.start()
    setting.ask([b"set", b"b", b"2"], 10)
    setting.ask([b"add", b"a", b"40"], 10)
    thread.join(10)
    assert answers == [[b"40", b"2"]]


def test_a_key_that_was_deleted_before_the_others_came_is_waited_for_again(connected):
    waiting, setting, answers = connected(), connected(), []
    thread = threading.Thread(target=lambda: answers.append(waiting.ask([b"get", b"a", b"b"], 10)))
    thread.start()
    for request in ([b"set", b"a", b"1"], [b"delete_key", b"a"], [b"set", b"b", b"2"]):
        assert not answers
        setting.ask(request, 10)
    setting.ask([b"set", b"a", b"3"], 10)
    thread.join(10)
    assert answers == [[b"3", b"2"]]


def test_a_client_that_is_gone_leaves_nobody_waiting(connected):
    gone, other = connected(), connected()
    with pytest.raises(TimeoutError):
        gone.ask([b"get", b"a"], 0.05)
    gone.close()
    other.ask([b"set", b"a", b"1"], 10)
    assert other.ask([b"get", b"a"], 10) == [b"1"]


def test_values_larger_than_the_buffers_of_sockets_arrive(connected):
    value = os.urandom(8 << 20)
    first, second = connected(), connected()
    first.ask([b"set", b"a", value], 30)
    assert second.ask([b"get", b"a"], 30) == [value]


@pytest.mark.parametrize("request_", [[b"no such operation"], [b"set", b"a"], [b"add", b"a", b"one"], []])
def test_a_request_that_makes_no_sense_costs_its_sender_the_connection(connected, request_):
    with pytest.raises(ConnectionError):
        connected().ask(request_, 10)
    assert connected().ask([b"check", b"a"], 10) == [b"0"]


def answer_to(address, data):
    """All that a server sends to somebody who sends this."""
    with socket.socket() as stranger:
        stranger.settimeout(10)
        stranger.connect(address)
        stranger.sendall(data)
        answer = b""
        while more := stranger.recv(1 << 16):
            answer += more
        return answer


def test_who_does_not_have_the_key_gets_a_challenge_and_nothing_else(address, connected):
    request = Frames(KEY).pack(pack([b"set", b"a", b"1"]))
    assert len(answer_to(address, request + b"\0" * (NONCE_BYTES + TAG_BYTES))) == NONCE_BYTES
    assert connected().ask([b"check", b"a"], 10) == [b"0"]


def test_a_proof_is_good_for_one_connection(address):
    nonce = secrets.token_bytes(NONCE_BYTES)
    with socket.create_connection(address, 10) as first:
        proof = Session(KEY, first.recv(NONCE_BYTES), nonce).client_proof
        first.sendall(nonce + proof)
        assert len(first.recv(TAG_BYTES)) == TAG_BYTES
    assert len(answer_to(address, nonce + proof)) == NONCE_BYTES


def test_who_is_silent_is_closed_in_time_and_keeps_nobody_out(monkeypatch, address, connected):
    monkeypatch.setattr(rendezvous_server, "PROOF_S", 0.2)
    monkeypatch.setattr(rendezvous_server, "MOST_UNPROVEN", 3)
    silent = [socket.create_connection(address, 10) for _ in range(20)]
    assert connected().ask([b"num_keys"], 10) == [b"0"]
    for stranger in silent:  # with an end, or a reset where the server has not read what it sent
        assert stranger.recv(NONCE_BYTES + 1)
        assert stranger.recv(1) == b""
        stranger.close()


def test_a_server_without_the_key_is_sent_no_request():
    listener, received = listen("127.0.0.1"), []

    def pretend():
        connection, _ = listener.accept()
        connection.sendall(b"c" * NONCE_BYTES)
        received.append(connection.recv(1 << 16))
        connection.sendall(b"p" * TAG_BYTES)
        received.append(connection.recv(1 << 16))

    thread = threading.Thread(target=pretend)
    thread.start()
    with pytest.raises(NotAuthentic, match="the server does not have the key"):
        Connection(*listener.getsockname(), KEY, 10)
    thread.join(10)
    assert [len(data) for data in received] == [NONCE_BYTES + TAG_BYTES, 0]


# The store.


def store_at(address, key=KEY, timeout_s=10.0):
    from training.process.rendezvous_store import RendezvousStore

    return RendezvousStore(*address, key, timedelta(seconds=timeout_s))


OPERATIONS = [
    ("set", "a", "1"), ("get", "a"), ("set", "a", "\0ü"), ("get", "a"), ("add", "n", 5), ("add", "n", -7), ("get", "n"),
    ("add", "new", 0),
    ("get", "new"), ("check", ["a", "n"]), ("check", ["a", "missing"]), ("compare_set", "a", "other", "x"),
    ("compare_set", "a", "\0ü", "x"), ("get", "a"),
    ("compare_set", "missing", "expected", "x"), ("check", ["missing"]), ("compare_set", "missing", "", "x"),
    ("get", "missing"),
    ("append", "list", "one"), ("append", "list", ",two"), ("get", "list"), ("multi_set", ["p", "q"], ["1", "2"]),
    ("multi_get", ["q", "p"]),
    ("delete_key", "p"), ("delete_key", "p"), ("check", ["p"]), ("wait", ["q", "a"]),
    ("wait", ["q"], timedelta(seconds=1)),
]  # fmt: skip


@pytest.mark.cpu
@pytest.mark.parametrize("prefix", ["", "group"])
def test_the_store_answers_as_torchs_own(address, prefix):
    import torch.distributed as dist

    own: dist.Store = store_at(address)
    torchs: dist.Store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    kept = own
    if prefix:  # the way through C++, which process groups take
        own, torchs = dist.PrefixStore(prefix, own), dist.PrefixStore(prefix, torchs)
    for name, *arguments in OPERATIONS:
        assert getattr(own, name)(*arguments) == getattr(torchs, name)(*arguments), (name, arguments)
    assert own.num_keys() == kept.num_keys() > 5
    assert own.has_extended_api() is torchs.has_extended_api() is True


@pytest.mark.cpu
def test_a_wait_that_takes_too_long_says_for_what_and_the_store_works_after_it(address):
    import torch.distributed as dist

    store, other = store_at(address, timeout_s=0.1), store_at(address)
    for waits in (
        lambda: store.get("a"),
        lambda: store.wait(["a"]),
        lambda: store.wait(["a"], timedelta(seconds=0.05)),
    ):
        with pytest.raises(dist.DistStoreError, match=r"wait timeout after \d+ ms, keys: a"):
            waits()
    other.set("a", "1")
    assert store.get("a") == b"1"


@pytest.mark.cpu
def test_another_key_opens_no_store(address):
    import torch.distributed as dist

    with pytest.raises(dist.DistNetworkError, match="the workers' store on worker 0"):
        store_at(address, secrets.token_bytes(KEY_BYTES))


@pytest.fixture
def doomed():
    """Host and port of a server in a process of its own, and that process's id."""
    listener = listen("127.0.0.1")
    if (server := os.fork()) == 0:
        RendezvousServer(listener, KEY)
        time.sleep(60)
        os._exit(1)
    address = listener.getsockname()
    listener.close()
    yield address, server
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)


@pytest.mark.cpu
def test_whoever_waits_sees_the_end_of_worker_0_at_once(doomed):
    import torch.distributed as dist

    address, server = doomed
    store = store_at(address, timeout_s=60)
    threading.Timer(0.2, os.kill, (server, signal.SIGKILL)).start()
    with pytest.raises(dist.DistNetworkError, match="Connection closed by peer|Connection reset by peer"):
        store.get("never")
    with pytest.raises(dist.DistNetworkError, match="worker 0"):
        store.set("a", "1")


@pytest.mark.cpu
def test_a_worker_that_joins_sees_it_too(doomed):
    import torch.distributed as dist

    (_, port), server = doomed
    threading.Timer(1.0, os.kill, (server, signal.SIGKILL)).start()
    with pytest.raises(TrainingError, match="a worker failed") as caught:
        in_a_process(summed, 1, port, KEY)
    assert isinstance(caught.value.__cause__, dist.DistNetworkError)


# A group of two workers, and another user who knows where they meet.


def summed(rank, port, key, listener=None):
    """Whether this worker sees the stranger's key, and the sum over both workers."""
    import torch
    import torch.distributed as dist

    join(RankInfo(rank=rank, size=2, port=port, timeout_s=30), key, listener)
    seen = distributed._kept[0].check(["stranger"])  # before the sum: worker 0 serves until it has it
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    return seen, int(total)


def what_another_user_achieves(port):
    """What each try of another user, who knows host and port, comes to: the type of its error, or its result."""
    import torch.distributed as dist

    os.setgroups([])
    os.setgid(STRANGER)
    os.setuid(STRANGER)
    timeout, guessed = timedelta(seconds=2), secrets.token_bytes(KEY_BYTES)

    def by_torch(use):
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timeout)
        return use(store)

    tries = {
        "set": lambda: by_torch(lambda store: store.set("stranger", "1")),
        "overwrite": lambda: by_torch(lambda store: store.set("0//cpu//0/1", "1")),
        "get": lambda: by_torch(lambda store: store.get("0//cpu//0/0")),
        "delete": lambda: by_torch(lambda store: store.delete_key("0//cpu//0/0")),
        "guess": lambda: store_at(("127.0.0.1", port), guessed, 2),
        "join": lambda: join(RankInfo(rank=1, size=2, port=port, timeout_s=2), guessed),
        "speak": lambda: answer_to(("127.0.0.1", port), b"\0" * 4096)[NONCE_BYTES:],
    }
    return {name: _outcome(one) for name, one in tries.items()}


def _outcome(one):
    try:
        return one()
    except (RuntimeError, OSError) as error:
        return type(error).__name__


@pytest.mark.cpu
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as a second user")
def test_another_user_who_comes_before_worker_1_reads_sets_and_deletes_nothing_and_takes_no_rank():
    listener, key = listen("127.0.0.1"), secrets.token_bytes(KEY_BYTES)
    port, answers = listener.getsockname()[1], []
    first = threading.Thread(target=lambda: answers.append(in_a_process(summed, 0, port, key, listener)))
    first.start()
    achieved = in_a_process(what_another_user_achieves, port)
    assert first.is_alive(), "worker 0 has found a group without worker 1"
    answers.append(in_a_process(summed, 1, port, key))
    first.join(30)
    assert answers == [(False, 3)] * 2
    assert achieved.pop("speak") in (b"", "ConnectionResetError")
    assert set(achieved.values()) <= {"DistNetworkError", "DistStoreError"}, achieved
