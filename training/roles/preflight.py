"""The role `preflight`: what a worker finds out about its machine, its device,
the storage and its neighbours before any training."""

from __future__ import annotations

import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training.device import (
    ACCELERATOR,
    device_name,
    empty_cache,
    free_and_total_bytes,
    is_accelerator,
    library_versions,
    synchronize,
)
from training.engine.engine import device_of
from training.io.versions import versions_of
from training.process.distributed import RankInfo
from training.storage import Local, open_storage, why_not_writable

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "ray")
_PRODUCT = {"cpu": 512, ACCELERATOR: 4096}
"""Rows of the matrices that are multiplied."""
_PRODUCTS, _ROWS_CHECKED = 5, 16
_WRITTEN = 4 << 20
"""Bytes written to storage, and read back."""
_SENT = {"cpu": 4 << 20, ACCELERATOR: 64 << 20}
"""Bytes that every worker sends to the next."""
_ROUNDS = 3


class Preflight:
    """One worker's findings."""

    def __init__(self, rank_info: RankInfo):
        self.rank_info = rank_info
        self.device = device_of(rank_info)

    def look(self, storage: str) -> dict[str, Any]:
        """Versions, memory, disks, the device, and how storage below an address takes a few megabytes."""
        shared = Path("/dev/shm")
        free, total = free_and_total_bytes(self.device)
        return {
            "versions": _versions(self.rank_info.device),
            "device": device_name(self.device),
            "device_free": free,
            "device_total": total,
            "shared_memory": shutil.disk_usage(shared).total if shared.is_dir() else 0,
            **self._storage(storage),
            **self._product(),
        }

    def _storage(self, address: str) -> dict[str, Any]:
        folder = open_storage(address)
        name = f".preflight-{os.getpid()}-{self.rank_info.rank}"
        free = shutil.disk_usage(_existing(folder.path)).free if isinstance(folder, Local) else None
        found: dict[str, Any] = {"storage_free": free, "storage_s": None, "storage_mb_s": None}
        if (why := why_not_writable(folder, name)) is not None:
            return found | {"storage_problem": why}
        data = bytes(range(256)) * (_WRITTEN // 256)
        began = time.perf_counter()
        try:
            (folder / name).write(data)
            same = (folder / name).read() == data
        finally:
            (folder / name).remove()
        seconds = time.perf_counter() - began
        problem = "" if same else "what was written reads back otherwise"
        return found | {"storage_problem": problem, "storage_s": seconds, "storage_mb_s": _WRITTEN / seconds / 1e6}

    def _product(self) -> dict[str, Any]:
        """Whether a product of matrices of small whole numbers, which every precision holds,
        is right; and how fast it comes."""
        size = _PRODUCT[self.rank_info.device]
        dtype = torch.bfloat16 if is_accelerator(self.rank_info.device) else torch.float32
        generator = torch.Generator().manual_seed(7)
        # A row of A has at most 8 ones: sums stay below 256, up to which bf16 has every whole number.
        a = torch.zeros(size, size).scatter_(1, torch.randint(0, size, (size, 8), generator=generator), 1.0)
        b = torch.randint(-8, 8, (size, size), generator=generator).float()
        expected = torch.stack([b[a[row].bool()].sum(0) for row in range(_ROWS_CHECKED)])
        left, right = a.to(self.device, dtype), b.to(self.device, dtype)
        found = (left @ right)[:_ROWS_CHECKED].float().cpu()
        synchronize(self.device)
        began = time.perf_counter()
        for _ in range(_PRODUCTS):
            left @ right
        synchronize(self.device)
        seconds = time.perf_counter() - began
        empty_cache(self.device)
        return {"product_right": bool((found == expected).all()), "tflops": _PRODUCTS * 2 * size**3 / seconds / 1e12}

    def links(self) -> dict[str, Any]:
        """Megabytes a second to the next worker, all sending at once as in a ring;
        and the clock, at the same moment everywhere."""
        dist.barrier()
        now = time.time()
        if self.rank_info.size == 1:
            return {"clock": now, "sent_mb_s": None}
        size = _SENT[self.rank_info.device]
        out = torch.zeros(size, dtype=torch.uint8, device=self.device)
        into = torch.empty_like(out)
        nearest = (self.rank_info.rank + 1) % self.rank_info.size, (self.rank_info.rank - 1) % self.rank_info.size
        best = float("inf")
        for _ in range(_ROUNDS):
            dist.barrier()
            synchronize(self.device)
            began = time.perf_counter()
            work = dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, out, nearest[0]), dist.P2POp(dist.irecv, into, nearest[1])]
            )
            for each in work:
                each.wait()
            synchronize(self.device)
            best = min(best, time.perf_counter() - began)
        del out, into
        empty_cache(self.device)
        return {"clock": now, "sent_mb_s": size / best / 1e6}


def _versions(device: str) -> dict[str, str]:
    """Of what must be alike everywhere."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    found |= dict.fromkeys(PACKAGES, "missing") | versions_of(PACKAGES)
    if is_accelerator(device):
        found |= library_versions()
    return found


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return path if path.exists() or path == path.parent else _existing(path.parent)
