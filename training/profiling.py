"""A worker under torch's profiler for some steps: the trace, and a table of where the time went.

There is one profile at a time in a process, of all the roles that it hosts. `part` names what is being done; while no
profile is running it does nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from training.breakdown import PARTS, Key, Span, Work, breakdown, summary, table
from training.distributed import Seat
from training.memory import peak_bytes
from training.storage import Local, Place, place, upload_file

_WINDOW = "profiled steps"
_NUM_OPERATORS = 20
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
"""What Kineto calls that which a GPU does."""
_NOTHING = nullcontext()
_GIB = 1 << 30


def part(name: str) -> AbstractContextManager[Any]:
    """For the length of a block the name of what is done in it. Parts do not lie within each other."""
    return _NOTHING if _running is None else record_function(name)


def begin_profile(seat: Seat) -> dict[str, str] | None:
    """Worker 0 begins to write down all that it does. Answers with the `error` if it cannot."""
    global _running
    if seat.rank == 0 and _running is None:
        try:
            _running = _Profile(seat)
        except RuntimeError as error:
            return {"error": str(error)}
    return None


def end_profile(seat: Seat, folder: str, role: str, steps: str, num_steps: int) -> dict[str, str] | None:
    """Worker 0 writes trace and table of `steps`, which name the files, into a folder.

    Answers with their addresses and a summary, or with the `error` that kept it from that: no reason to stop training.
    """
    global _running
    if seat.rank != 0 or _running is None:
        return None
    running, _running = _running, None
    try:
        return running.written(place(folder), f"{role}-{seat.rank}", steps, num_steps)
    except Exception as error:
        return {"error": str(error) or repr(error)}


class _Profile:
    """From its making to `written`."""

    def __init__(self, seat: Seat):
        self.device = seat.device
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it writes a line for everything that it does
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if seat.device == "cuda" else [])]
        self.profiler = profile(activities=activities)
        self._finish_on_device()
        self.profiler.start()
        self.window = record_function(_WINDOW)
        self.window.__enter__()

    def _finish_on_device(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def written(self, folder: Place, worker: str, steps: str, num_steps: int) -> dict[str, str]:
        self._finish_on_device()
        self.window.__exit__(None, None, None)
        self.profiler.stop()
        name = f"steps-{steps}.{worker}"
        if isinstance(folder, Local):
            folder.path.mkdir(parents=True, exist_ok=True)
        trace, report = folder / f"{name}.trace.json.gz", folder / f"{name}.txt"
        with tempfile.TemporaryDirectory(prefix="muster-profile-") as here:
            local = Path(here) / trace.name
            self.profiler.export_chrome_trace(str(local))
            upload_file(local, trace)
        seconds = seconds_of(self.profiler.events())
        head = f"{worker}, profile {{steps: {steps}}}: {sum(seconds.values()) / num_steps:.3f} s a step"
        lines = self._report(head, seconds, num_steps)
        report.write("\n".join(lines).encode() + b"\n")
        return {"worker": worker, "summary": summary(seconds), "table": str(report), "trace": str(trace)}

    def _report(self, head: str, seconds: dict[Key, float], num_steps: int) -> list[str]:
        most = torch.cuda.max_memory_allocated() if self.device == "cuda" else peak_bytes()
        threads = "" if self.device == "cuda" else f" with {torch.get_num_threads()} thread(s)"
        blind = self.device == "cuda" and not any(event.activity_type in _ON_GPU for event in self.profiler.events())
        return [
            f"{head} under the profiler, on {self.device}{threads}; at most {most / _GIB:.2f} GiB of memory so far",
            *(["the GPU did not tell its times: these are the main thread's, which runs ahead of it"] if blind else []),
            "",
            *table(seconds, num_steps),
            "",
            *self._operators(sum(seconds.values()), num_steps),
        ]

    def _operators(self, total_s: float, num_steps: int) -> Iterator[str]:
        """The most costly operators by the time of their own, that of others which they call left out."""
        averages = [each for each in self.profiler.key_averages() if each.device_type == DeviceType.CPU]
        own = (
            "self_device_time_total" if any(each.self_device_time_total for each in averages) else "self_cpu_time_total"
        )
        ranked = sorted(
            (each for each in averages if not each.is_user_annotation), key=lambda each: -getattr(each, own)
        )
        yield f"  {'operator, time of its own':<58}{'calls a step':>14}{'s a step':>10}{'share':>9}"
        for each in ranked[:_NUM_OPERATORS]:
            own_s = getattr(each, own) / 1e6
            calls, seconds, share = each.count / num_steps, own_s / num_steps, own_s / total_s
            yield f"  {each.key[:57]:<58}{calls:>14,.1f}{seconds:>10.4f}{share:>9.1%}"


def seconds_of(events: Sequence[Any]) -> dict[Key, float]:
    """Where the time went, from torch's FunctionEvents. If they know nothing of a GPU, that is as the main thread saw it."""
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    whole = next(event for event in on_cpu if event.name == _WINDOW)
    mine = [event for event in on_cpu if event.thread == whole.thread and not event.is_async]
    kernels = [event for event in events if event.activity_type in _ON_GPU]
    if kernels:
        launches = {event.id: event.time_range.start for event in on_cpu if not event.linked_correlation_id}
        works = [(event.name, _work(event, launches.get(event.linked_correlation_id))) for event in kernels]
        sent = [work for name, work in works if name.startswith("nccl")]
        computed = [work for name, work in works if not name.startswith("nccl")]
    else:
        sent = [_work(event) for event in on_cpu if event.is_async and event.name.startswith("gloo:")]
        computed = [_work(event) for event in mine if event.name.startswith("aten::")]
    calls = _spans(event for event in mine if event.cpu_parent is whole and event.is_user_annotation)
    parts = _spans(event for event in mine if event.name in PARTS)
    return breakdown(_span(whole), calls, parts, sent, computed, on_gpu=bool(kernels))


def _span(event: Any) -> Span:
    return Span(event.name, event.time_range.start, event.time_range.end)


def _spans(events: Iterable[Any]) -> list[Span]:
    return sorted(map(_span, events), key=lambda span: span.start)


def _work(event: Any, launched: float | None = None) -> Work:
    start, end = event.time_range.start, event.time_range.end
    return Work(start, end, start if launched is None else launched)


_running: _Profile | None = None
