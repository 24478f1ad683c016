"""A trace of torch's profiler read again: where its time went, and which operators cost most. Free of torch.

A trace is a JSON file of events, of which a long one has millions: of each is kept what is needed
here, while it is read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from training.profiling.breakdown import PARTS, Key, Span, Work, breakdown

WINDOW = "profiled steps"
"""The annotation around all that is counted."""
_ON_GPU = frozenset(("kernel", "gpu_memcpy", "gpu_memset"))
_OPERATOR, _ANNOTATION = "cpu_op", "user_annotation"
"""Kinds of events, as the profiler calls them."""


class Event(NamedTuple):
    """Something that took a while. Times: microseconds."""

    kind: str
    name: str
    thread: int | str
    start: float
    end: float
    id: int
    """Of an operator its own; of what a GPU does that of the operator which launched it; 0: not known."""


class Operator(NamedTuple):
    """All calls of one operator together. Time of its own: that of others which it calls is left out."""

    name: str
    calls: int
    seconds: float


def read(path: Path) -> list[Event]:
    """The events of a trace."""
    whole = json.loads(path.read_bytes(), object_hook=_slim)
    return [event for event in whole["traceEvents"] if isinstance(event, Event)]


def _slim(fields: dict[str, Any]) -> dict[str, Any] | Event:
    """An event in a fraction of the memory; any other object as it is."""
    if fields.get("ph") != "X":
        return fields
    start, own_id = fields["ts"], fields.get("args", {}).get("External id", 0)
    kind, name = sys.intern(fields.get("cat", "")), sys.intern(fields["name"])
    return Event(kind, name, fields["tid"], start, start + fields.get("dur", 0.0), own_id)


def tells_of_gpu(events: Iterable[Event]) -> bool:
    """Whether the profiler has seen what a GPU did."""
    return any(event.kind in _ON_GPU for event in events)


def seconds_of(events: Sequence[Event]) -> dict[Key, float]:
    """Where the time of the window went. Of a GPU of which nothing is told: as the main thread saw it."""
    whole = next(event for event in events if event.name == WINDOW and event.kind == _ANNOTATION)
    mine = [event for event in events if event.thread == whole.thread]
    kernels = [event for event in events if event.kind in _ON_GPU]
    if kernels:
        launches = {event.id: event.start for event in events if event.kind == _OPERATOR}
        works = [(event.name, Work(event.start, event.end, launches.get(event.id, event.start))) for event in kernels]
        sent = [work for name, work in works if name.startswith("nccl")]
        computed = [work for name, work in works if not name.startswith("nccl")]
    else:
        sent = [Work(event.start, event.end, event.start) for event in events if event.name.startswith("gloo:")]
        computed = [Work(event.start, event.end, event.start) for event in mine if event.name.startswith("aten::")]
    notes = sorted((event for event in mine if event.kind == _ANNOTATION), key=lambda event: event.start)
    parts = [_span(event) for event in notes if event.name in PARTS]
    return breakdown(_span(whole), _calls(notes, whole), parts, sent, computed, on_gpu=bool(kernels))


def _span(event: Event) -> Span:
    return Span(event.name, event.start, event.end)


def _calls(notes: Iterable[Event], whole: Event) -> list[Span]:
    """The annotations within the window, in order, that lie in no other."""
    calls: list[Span] = []
    for event in notes:
        if event is not whole and event.start >= whole.start and (not calls or event.start >= calls[-1].end):
            calls.append(_span(event))
    return calls


def operators(events: Sequence[Event]) -> list[Operator]:
    """All operators, the most costly first: by their kernels where a GPU was seen,
    else by the threads that ran them."""
    ours = [event for event in events if event.kind == _OPERATOR]
    own_us = _of_kernels(events) if tells_of_gpu(events) else _of_threads(ours)
    calls: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for event in ours:
        calls[event.name] = calls.get(event.name, 0) + 1
        seconds[event.name] = seconds.get(event.name, 0.0) + own_us.get(event.id, 0.0) / 1e6
    ranked = sorted(seconds, key=lambda name: -seconds[name])
    return [Operator(name, calls[name], seconds[name]) for name in ranked]


def _of_kernels(events: Iterable[Event]) -> Mapping[int, float]:
    own: dict[int, float] = {}
    for event in events:
        if event.kind in _ON_GPU:
            own[event.id] = own.get(event.id, 0.0) + event.end - event.start
    return own


def _of_threads(ours: Iterable[Event]) -> Mapping[int, float]:
    """The time of each without what lies within it on the same thread."""
    own: dict[int, float] = {}
    around: list[Event] = []
    for event in sorted(ours, key=lambda event: (str(event.thread), event.start, -event.end)):
        while around and (around[-1].thread != event.thread or around[-1].end <= event.start):
            around.pop()
        if around:
            own[around[-1].id] -= event.end - event.start
        own[event.id] = event.end - event.start
        around.append(event)
    return own
