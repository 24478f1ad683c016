"""Where a stretch of a worker's time went: every moment is counted once, for a call and a part of it. Free of torch.

A moment in which something is computed belongs to the part that has launched it. One in which nothing is computed
belongs to the communication that is under way, if there is any, else to what the worker's main thread was at. Times:
microseconds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

DATA, FORWARD, BACKWARD, OPTIMIZER, GENERATION = "data", "forward", "backward", "optimizer", "generation"
PARTS = (DATA, FORWARD, BACKWARD, OPTIMIZER, GENERATION)
"""What the training names by itself."""
COMMUNICATION, IDLE, REST, WAITING = "communication", "idle", "rest", "waiting"
MEANINGS = {
    COMMUNICATION: "sending, and waiting for workers that are behind, while nothing is computed",
    IDLE: "the GPU has nothing to do: Python and the launching of kernels do not keep up",
    REST: "of the call what is none of its parts",
    WAITING: "nothing was asked of this worker: other groups are at work, or the process that drives the run",
}
_LEAST_SHARE = 0.0005
Key = tuple[str, str]
"""A call, such as `trainer.train`, and a part."""


class Span(NamedTuple):
    """A stretch of the main thread with a name."""

    name: str
    start: float
    end: float


class Work(NamedTuple):
    """Something that was computed, or sent."""

    start: float
    end: float
    launched: float
    """When the main thread was at what it belongs to."""


def breakdown(
    window: Span, calls: Sequence[Span], parts: Sequence[Span], sent: Sequence[Work], computed: Sequence[Work], *,
    on_gpu: bool
) -> dict[Key, float]:  # fmt: skip
    """Seconds by call and part, which add up to those of the window; the longest first.

    `calls` do not overlap, nor do `parts`. `on_gpu`: it computes beside the main thread.
    """

    def key(moment: float, part: str | None = None) -> Key:
        call = _at(calls, moment)
        return (call, part or _at(parts, moment) or REST) if call else ("", WAITING)

    layers = [
        [(window.start, window.end, ("", WAITING))],
        [(call.start, call.end, (call.name, IDLE if on_gpu else REST)) for call in calls],
        [(part.start, part.end, key(part.start)) for part in parts if part.name == DATA or not on_gpu],
        [(work.start, work.end, key(work.launched, COMMUNICATION)) for work in sent],
        [(work.start, work.end, key(work.launched)) for work in computed],
    ]
    seconds = _painted(window, [interval for layer in layers for interval in layer])
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _at(spans: Sequence[Span], moment: float) -> str:
    """The name of the span around a moment, of those that are in order; empty if there is none."""
    index = bisect_right(spans, moment, key=lambda span: span.start) - 1
    return spans[index].name if index >= 0 and moment < spans[index].end else ""


def _painted(window: Span, intervals: Sequence[tuple[float, float, Key]]) -> dict[Key, float]:
    """Seconds of the window that each key is seen for when later intervals are painted over earlier ones."""
    keys = list(dict.fromkeys(key for *_, key in intervals))
    number = {key: index for index, key in enumerate(keys)}
    bounds = np.clip([(start, end) for start, end, _ in intervals], window.start, window.end)
    times = np.unique(bounds)
    seen = np.zeros(len(times) - 1, np.int64)
    for (first, last), (*_, key) in zip(np.searchsorted(times, bounds).tolist(), intervals, strict=True):
        seen[first:last] = number[key]
    lengths = np.bincount(seen, np.diff(times), minlength=len(keys)) / 1e6
    return {key: float(length) for key, length in zip(keys, lengths, strict=True) if length > 0}


def summary(seconds: Mapping[Key, float], count: int = 4) -> str:
    """The largest parts over all calls, in words: `backward 55 %, forward 29 %`."""
    total = sum(seconds.values())
    parts: dict[str, float] = {}
    for (_, part), length in seconds.items():
        parts[part] = parts.get(part, 0.0) + length
    largest = sorted(parts.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{part} {length / total:.0%}" for part, length in largest)


def table(seconds: Mapping[Key, float], num_steps: int) -> list[str]:
    """One line a part, call by call, with its seconds a step and its share; the calls that took longest first.

    Parts that would show as 0.0% are left out.
    """
    total = sum(seconds.values())
    of_calls: dict[str, float] = {}
    for (call, _), length in seconds.items():
        of_calls[call] = of_calls.get(call, 0.0) + length
    lines, shown = [_row("where the time went", "s a step", "share")], set()
    for (call, part), length in sorted(seconds.items(), key=lambda item: (-of_calls[item[0][0]], -item[1])):
        if length >= _LEAST_SHARE * total:
            name = f"{call:<20}  {part}" if call else part
            lines.append(_row(name, f"{length / num_steps:.4f}", f"{length / total:.1%}"))
            shown.add(part)
    lines += [_row("all", f"{total / num_steps:.4f}", "100.0%"), ""]
    return lines + [f"{part}: {meaning}" for part, meaning in MEANINGS.items() if part in shown]


def _row(name: str, seconds: str, share: str) -> str:
    return f"  {name:<40}{seconds:>12}{share:>9}"
