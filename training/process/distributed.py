"""The place of one process in a process group: its rank, how it meets the others, and how long it waits for them."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil

from training.device import DeviceType, collective_backend, is_accelerator, set_device


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """All that a worker must know of the others. Equal on all workers but for rank and local_rank."""

    rank: int
    size: int
    local_rank: int = 0
    """Number of this worker among those of its node."""
    local_size: int = 1
    device: DeviceType = "cpu"
    threads: int = 1
    """CPU threads for the computation."""
    host: str = "127.0.0.1"
    """Address of worker 0's node, where the workers meet."""
    port: int = 0
    address: str = "127.0.0.1"
    """Address of this worker's own node: collectives use the interface that carries it."""
    timeout_s: float = 1800.0
    """Longest wait in one collective before it counts as an error."""


def listen(host: str) -> socket.socket:
    """A listening socket on a port that nobody else has; worker 0 opens it and tells the others `getsockname()[1]`.

    Bound to one address, never to all: it is for the workers alone.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(1024)
    return listener


def set_environment(rank_info: RankInfo) -> None:
    """What libraries read when they are imported. Call before torch is loaded."""
    os.environ.update(
        RANK=str(rank_info.rank),
        WORLD_SIZE=str(rank_info.size),
        LOCAL_RANK=str(rank_info.local_rank),
        LOCAL_WORLD_SIZE=str(rank_info.local_size),
        MASTER_ADDR=rank_info.host,
        MASTER_PORT=str(rank_info.port),
        OMP_NUM_THREADS=str(rank_info.threads),
        TOKENIZERS_PARALLELISM="false",
        DS_ACCELERATOR=rank_info.device,
    )
    # DeepSpeed imports torch's inductor, 1.4 s, for an optimizer that is not used here.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if rank_info.device == "cpu":
        # In bf16 oneDNN makes a primitive for every shape, of which packed rows have many. It and torch before it each
        # keep 1,024: a model of 2 M parameters grew by 1.6 GiB in 160 micro-batches, with 64 by 0.2, at the same speed.
        # (0 crashes torch.)
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(cache, "64")
    if (interface := _interface_of(rank_info.address)) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def _interface_of(address: str) -> str | None:
    """Name of the network interface with this address. Else gloo asks for the host's name,
    which Debian maps to 127.0.1.1."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return str(name)
    return None


def join(rank_info: RankInfo, key: bytes = b"", listener: socket.socket | None = None) -> None:
    """Make the default process group: NCCL on GPUs, gloo on CPUs. Worker 0 brings the socket it listens on.

    `key`: at least 32 secret bytes, the same for all workers of the group and for nobody else; a group of one needs
    none. Raises torch's DistNetworkError if worker 0 cannot be reached, is gone, or has another key; DistStoreError if
    workers do not come.
    """
    import torch
    import torch.distributed as dist

    torch.set_num_threads(rank_info.threads)
    timeout = timedelta(seconds=rank_info.timeout_s)
    if is_accelerator(rank_info.device):
        set_device(rank_info.local_rank)
    store = dist.HashStore() if rank_info.size == 1 else _shared_store(rank_info, key, listener)
    backend = collective_backend(rank_info.device)
    dist.init_process_group(backend, store=store, rank=rank_info.rank, world_size=rank_info.size, timeout=timeout)


_kept: list[Any] = []
"""The store of the process group: torch keeps its C++ half alone, which cannot work without the other."""


def _shared_store(rank_info: RankInfo, key: bytes, listener: socket.socket | None) -> Any:
    from training.process.rendezvous_server import RendezvousServer
    from training.process.rendezvous_store import RendezvousStore

    if listener is not None:
        RendezvousServer(listener, key)
    store = RendezvousStore(rank_info.host, rank_info.port, key, timedelta(seconds=rank_info.timeout_s))
    _kept.append(store)
    return store


def limit_waits(timeout_s: float) -> None:
    """Give every process group that exists the time limit: DeepSpeed makes groups
    that wait 30 minutes whatever it is told."""
    from torch.distributed import distributed_c10d as c10d

    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def leave() -> None:
    """Give the process group up, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    _kept.clear()
