"""A worker under torch's profiler for some steps: the trace, and a table of where the time went.

There is one profile at a time in a process, of all the roles that it hosts. `part` names what is being done; while no
profile is running it does nothing.
"""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import profile, record_function

from training.device import is_accelerator, peak_allocated_bytes, profiler_activities, synchronize
from training.io.owned_folders import temporary_folder
from training.process.distributed import RankInfo
from training.process.memory import peak_bytes
from training.profiling.breakdown import Key, summary, table
from training.profiling.trace import WINDOW, Event, Operator, operators, read, seconds_of, tells_of_gpu
from training.storage import Local, StoragePath, open_storage, upload_file

_NUM_OPERATORS = 20
_NOTHING = nullcontext()
_GIB = 1 << 30
_BLOCK_BYTES = 1 << 20


def part(name: str) -> AbstractContextManager[Any]:
    """For the length of a block the name of what is done in it. Parts do not lie within each other."""
    return _NOTHING if _running is None else record_function(name)


def begin_profile(rank_info: RankInfo) -> dict[str, str] | None:
    """Worker 0 begins to write down all that it does. Answers with the `error` if it cannot."""
    global _running
    if rank_info.rank == 0 and _running is None:
        try:
            _running = _Profile(rank_info)
        except RuntimeError as error:
            return {"error": str(error)}
    return None


def end_profile(rank_info: RankInfo, folder: str, role: str, steps: str, num_steps: int) -> dict[str, str] | None:
    """Worker 0 writes trace and table of `steps`, which name the files, into a folder.

    Answers with their addresses and a summary, or with the `error` that kept it from that: no reason to stop training.
    """
    global _running
    if rank_info.rank != 0 or _running is None:
        return None
    running, _running = _running, None
    try:
        return running.written(open_storage(folder), f"{role}-{rank_info.rank}", steps, num_steps)
    except Exception as error:
        return {"error": str(error) or repr(error)}


class _Profile:
    """From its making to `written`."""

    def __init__(self, rank_info: RankInfo):
        self.device = rank_info.device
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it writes a line for everything that it does
        self.profiler = profile(activities=profiler_activities(rank_info.device))
        synchronize(self.device)
        self.profiler.start()
        self.window = record_function(WINDOW)
        self.window.__enter__()

    def written(self, folder: StoragePath, worker: str, steps: str, num_steps: int) -> dict[str, str]:
        synchronize(self.device)
        self.window.__exit__(None, None, None)
        self.profiler.stop()
        name = f"steps-{steps}.{worker}"
        if isinstance(folder, Local):
            folder.path.mkdir(parents=True, exist_ok=True)
        trace, report = folder / f"{name}.trace.json.gz", folder / f"{name}.txt"
        with temporary_folder("muster-profile-") as here:
            local, packed = here / "trace.json", here / trace.name
            self.profiler.export_chrome_trace(str(local))
            # The profiler would compress it line by line, which takes ten times as long.
            with local.open("rb") as source, gzip.open(packed, "wb", compresslevel=5) as target:
                shutil.copyfileobj(source, target, _BLOCK_BYTES)
            upload_file(packed, trace)
            events = read(local)
        seconds = seconds_of(events)
        lines = self._report(f"{worker}, profile {{steps: {steps}}}", events, seconds, num_steps)
        report.write("\n".join(lines).encode() + b"\n")
        return {"worker": worker, "summary": summary(seconds), "table": str(report), "trace": str(trace)}

    def _report(self, head: str, events: Sequence[Event], seconds: dict[Key, float], num_steps: int) -> list[str]:
        total = sum(seconds.values())
        on_gpu = is_accelerator(self.device)
        most = peak_allocated_bytes() if on_gpu else peak_bytes()
        where = self.device if on_gpu else f"cpu with {torch.get_num_threads()} thread(s)"
        blind = on_gpu and not tells_of_gpu(events)
        return [
            (
                f"{head}: {total / num_steps:.3f} s a step under the profiler, on {where}; at most {most / _GIB:.2f} "
                "GiB of memory so far"
            ),
            *(["the GPU did not tell its times: these are the main thread's, which runs ahead of it"] if blind else []),
            "",
            *table(seconds, num_steps),
            "",
            *_costly(operators(events)[:_NUM_OPERATORS], total, num_steps),
        ]


def _costly(found: Iterable[Operator], total_s: float, num_steps: int) -> Iterator[str]:
    yield f"  {'operator, time of its own':<58}{'calls a step':>14}{'s a step':>10}{'share':>9}"
    for name, calls, seconds in found:
        figures = f"{calls / num_steps:>14,.1f}{seconds / num_steps:>10.4f}{seconds / total_s:>9.1%}"
        yield f"  {name[:57]:<58}{figures}"


_running: _Profile | None = None
