"""Small checkpoints for tests, made without training."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from training.checkpoint.format import OPTIMIZER, Manifest, write_shard
from training.checkpoint.repository import OpenCheckpoints, opened
from training.storage import StoragePath, open_storage

SIZE = 20


def values_of(step: int) -> np.ndarray:
    """Parameter `w` [4, 5], flattened, at a step; its moment `exp_avg` is the negative."""
    return np.arange(SIZE, dtype=np.float32) + step


def staged(
    checkpoints: OpenCheckpoints, step: int, *, world_size: int = 2, metrics: dict | None = None
) -> tuple[StoragePath, Manifest]:
    """The shards of a checkpoint, written by `world_size` workers, and the manifest that they would get."""
    values = values_of(step)
    folder = checkpoints.stage(step)
    files = [
        write_shard(folder / f"worker-{rank}{end}", [(f"{kind}/w@{a}", b - a)], sign * values[a:b])
        for rank, (a, b) in enumerate(pairwise(SIZE * rank // world_size for rank in range(world_size + 1)))
        for kind, end, sign in (("fp32", ".safetensors", 1), ("exp_avg", OPTIMIZER, -1))
    ]
    manifest = Manifest(
        phase="sft", step=step, samples=step * 8, optimizer_steps={"trainer": step}, attempt=checkpoints.attempt,
        world_size=world_size,
        zero_stage=2, dtype="float32", chats=False, job_hash="j", data_hash="d", metrics=metrics or {},
        parameters={"w": [4, 5]}, files=files, versions={}, created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    return folder, manifest


def save(checkpoints: OpenCheckpoints, step: int, **settings) -> StoragePath:
    """A committed checkpoint."""
    return checkpoints.commit(*staged(checkpoints, step, **settings))


def save_in(folder: StoragePath | Path | str, step: int, *, attempt: int = 1, **settings) -> StoragePath:
    """A committed checkpoint of an attempt that then ends."""
    checkpoints = opened(open_storage(str(folder)), attempt)
    try:
        return save(checkpoints, step, **settings)
    finally:
        checkpoints.close()
