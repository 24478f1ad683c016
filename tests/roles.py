"""Roles for tests of groups: they know their seat, and fail as they are told."""

from __future__ import annotations

import os
import signal
import time

from training.distributed import Seat
from training.errors import InputError, TrainingError


class Probe:
    def __init__(self, seat: Seat):
        self.seat = seat

    def who(self) -> Seat:
        return self.seat

    def environment(self, *names: str) -> dict[str, str | None]:
        return {name: os.environ.get(name) for name in names}

    def threads(self) -> int:
        import torch

        return torch.get_num_threads()

    def add_up(self, value: int) -> int:
        """Sum over all workers, through the process group."""
        import torch
        import torch.distributed as dist

        total = torch.tensor(value)
        dist.all_reduce(total)
        return int(total)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def fail(self, rank: int) -> None:
        if self.seat.rank == rank:
            raise ValueError(f"row 7 of data.jsonl made worker {rank} fail")

    def refuse(self, rank: int) -> None:
        if self.seat.rank == rank:
            raise TrainingError("step 3: the loss is nan")

    def refuse_input(self) -> None:
        raise InputError.of("data.jsonl:4", "no answer")

    def die_while_others_wait(self, rank: int) -> None:
        if self.seat.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        self.add_up(1)

    def sleep(self, rank: int, seconds: float) -> int:
        if self.seat.rank == rank:
            time.sleep(seconds)
        return self.seat.rank
