"""An exception is judged by its type and by the code that raised it, not by its words."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from launcher.workers.errors import Kind
from launcher.workers.exception_kinds import kind_of

PEER = """
import datetime, os, sys, time
import torch, torch.distributed as dist
from launcher.workers.exception_kinds import kind_of

rank, case = int(sys.argv[1]), sys.argv[2]
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
store = dist.FileStore(sys.argv[3], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=20))
ones = torch.ones(8)
dist.all_reduce(ones)
if rank == 1:
    os._exit(9)
try:
    if case == "in one call":
        dist.all_reduce(ones)
    elif case == "in the background":
        dist.all_reduce(ones, async_op=True).wait()
    elif case == "of another type":
        dist.all_gather([ones.int()] * 2, ones)
except Exception as error:
    print(kind_of(error))
"""


def caught(call, *arguments) -> Exception:
    try:
        call(*arguments)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def refused() -> None:
    """As a reward function or a model's code might."""
    socket.create_connection(("127.0.0.1", 1), timeout=5).close()


def says(words: str) -> None:
    raise RuntimeError(words)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (refused, Kind.PROGRAM),
        (lambda: says("NCCL error: Connection closed by peer, gloo, Broken pipe"), Kind.PROGRAM),
        (lambda: says("can't allocate memory"), Kind.PROGRAM),
        (lambda: bytearray(1 << 60), Kind.MEMORY),
    ],
    ids=["a refused connection", "words of a lost peer", "words of no memory", "no memory"],
)
def test_an_exception_is_of_the_kind(call, kind):
    assert kind_of(caught(call)) is kind


@pytest.mark.cpu
def test_types_of_torch_are_of_the_kind():
    import torch
    import torch.distributed as dist

    assert kind_of(caught(torch.empty, 1 << 50)) is Kind.MEMORY
    assert kind_of(torch.OutOfMemoryError("CUDA out of memory")) is Kind.MEMORY
    assert kind_of(dist.DistBackendError("NCCL error")) is Kind.CONNECTION
    assert kind_of(caught(torch.ones(2).add, torch.ones(3))) is Kind.PROGRAM


@pytest.mark.cpu
def test_workers_that_do_not_find_each_other_have_lost_the_connection():
    from training.process.distributed import RankInfo, join

    assert kind_of(caught(join, RankInfo(rank=1, size=2, port=1, timeout_s=1))) is Kind.CONNECTION


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("in one call", Kind.CONNECTION),
        ("in the background", Kind.CONNECTION),
        ("of another type", Kind.PROGRAM),
    ],
)
def test_what_a_worker_meets_whose_peer_is_gone_is_of_the_kind(tmp_path, case, kind):
    command = [sys.executable, "-c", PEER]
    store = str(tmp_path / "store")
    peers = [subprocess.Popen([*command, str(rank), case, store], stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    said, _ = peers[0].communicate(timeout=100)
    assert peers[1].wait(60) == 9
    assert said.strip() == kind
