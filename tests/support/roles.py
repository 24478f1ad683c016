"""Roles for tests of groups: they know their seat, and fail as they are told."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

from training.errors import InputError, TrainingError
from training.process.distributed import RankInfo


class Probe:
    def __init__(self, rank_info: RankInfo):
        self.rank_info = rank_info

    def who(self) -> RankInfo:
        return self.rank_info

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

    def differences(self, values: dict[str, str]) -> list[str]:
        import torch

        from training.process.agreement import differences

        return differences(values, torch.device("cpu"))

    def say(self, text: str) -> None:
        print(text, flush=True)

    def fail(self, rank: int) -> None:
        if self.rank_info.rank == rank:
            raise ValueError(f"row 7 of data.jsonl made worker {rank} fail")

    def refuse(self, rank: int) -> None:
        if self.rank_info.rank == rank:
            raise TrainingError("step 3: the loss is nan")

    def refuse_input(self) -> None:
        raise InputError.of("data.jsonl:4", "no answer")

    def die_while_others_wait(self, rank: int) -> None:
        if self.rank_info.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        self.add_up(1)

    def train(self, absent: int) -> None:
        """A step in which one worker never comes to the collective."""
        from training.process import heartbeat

        heartbeat.progressed(step=7)
        if self.rank_info.rank == absent:
            time.sleep(600)
        heartbeat.progressed()
        self.add_up(1)

    def take_memory(self, count: int) -> int:
        return len(bytearray(b"x") * count)

    def connect(self, port: int) -> None:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()

    def leave(self, status: int) -> None:
        os._exit(status)

    def progress(self, step: int) -> None:
        from training.process import heartbeat

        heartbeat.progressed(step)

    def something_that_cannot_be_pickled(self):
        return lambda: None

    def sleep(self, rank: int, seconds: float) -> int:
        if self.rank_info.rank == rank:
            time.sleep(seconds)
        return self.rank_info.rank


class LoadProbe:
    """Loads a model as training does, and watches the memory that is this process's own (mapped files do not count)."""

    def __init__(self, rank_info: RankInfo):
        self.rank_info = rank_info

    def load(self, path: str, stage: int) -> int:
        """Bytes by which memory grew at most while the model was loaded."""
        from training.config import SFT
        from training.engine import engine
        from training.models.loading import TokenLoss, load

        phase = SFT.model_validate(
            {"recipe": "sft", "model": {"path": path}, "data": {"train": "-"}, "sharding": {"stage": stage}}
        )
        engine._start_deepspeed(self.rank_info)

        def build(dtype):
            return TokenLoss(load(phase, dtype, "cpu"))

        with Peak() as peak:
            if stage == 3:
                self.module = engine._built_sharded(
                    build, torch_float32(), engine.derive_config(phase, self.rank_info, torch_float32())
                )
            else:
                self.module = build(torch_float32())
                for parameter in self.module.parameters():  # from the mapped file into memory, as the first step does
                    parameter.data = parameter.data.clone()
        return peak.bytes


def torch_float32():
    import torch

    return torch.float32


class Peak:
    """Peak growth of a process's anonymous memory within a block, looked at every 2 ms."""

    def __enter__(self):
        self.before = self.bytes = _anonymous_bytes()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.ended.wait(0.002):
            self.bytes = max(self.bytes, _anonymous_bytes())

    def __exit__(self, *exc):
        self.ended.set()
        self.thread.join()
        self.bytes -= self.before


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


class Memory:
    """What tensors of this process take, over a stretch of training."""

    def __init__(self, rank_info: RankInfo, *args: object):
        self.states = 0

    def begin(self) -> None:
        import torch
        from deepspeed.runtime.engine import DeepSpeedEngine

        original = DeepSpeedEngine.step

        def step(engine, *args, **kwargs):
            looks = [_live_bytes()]
            time.sleep(0.2)  # threads of collectives may still hold what they have sent
            looks.append(_live_bytes())
            self.states = max(self.states, min(looks))
            return original(engine, *args, **kwargs)

        DeepSpeedEngine.step = step
        self.before = _live_bytes()
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()

    def end(self) -> tuple[int, int]:
        """The most bytes that live tensors had before the optimizer stepped, and the most that there was at any time:
        what was live at the beginning, and what was allocated since.

        The second counts every allocation by torch, as a GPU's `max_memory_allocated` does; it misses what another
        thread frees, as collectives of several workers do.
        """
        self.profile.__exit__(None, None, None)
        events = [event for event in self.profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = most = self.before
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return self.states, most


def _live_bytes() -> int:
    import gc

    import torch

    gc.collect()  # rings of objects that nobody holds any more may have tensors in them
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return sum(storages.values())
