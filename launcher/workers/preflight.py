"""Preflight: checks within seconds before the first step that the machines are alike, healthy, fast enough and can
write checkpoints.

Workers send reports (training/roles/preflight.py); `judge` is pure: reports in, findings out. An unfit machine is
named and avoided, if there are others. A problem of all machines, such as full storage, ends the run at its start.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.workers.errors import Kind, WorkerError
from training.errors import TrainingError
from training.group import results

if TYPE_CHECKING:
    from launcher.workers.worker_group import WorkerGroup

TARGET = "training.roles.preflight:Preflight"
TIMEOUT_S = 120.0
_CLOCK_S = 60.0
"""With a larger difference, storage rejects signatures and times in logs are misleading."""
_SLOW_DEVICE = 0.5
"""Fraction of the median. CPUs are often shared, so a slow CPU is a warning, not an error."""
_SLOW_LINK = 0.25
_SLOW_STORAGE_MB_S = 10.0
_SHARED_MEMORY = 64 << 20
"""The default of containers; NCCL and data loaders between processes of a machine need more."""
_BUSY = 0.1
"""Fraction of a GPU's memory in use by other processes."""
_FEW = 3
"""Smallest number of workers among which a slow one can be identified."""


@dataclass(frozen=True)
class Finding:
    """A problem that the checks found."""

    message: str
    rank: int | None = None
    """The worker whose machine has the problem; None: all of them."""
    fatal: bool = False


def check(workers: WorkerGroup, storage: str, room: int, warn: Callable[[str], None]) -> dict[str, Any]:
    """Run the checks on all workers. `room`: bytes that checkpoints need. Returns figures for the event.

    Raises WorkerError for an unfit machine, TrainingError for a problem that other machines would have too.
    """
    began = time.monotonic()
    group = workers.build("preflight", TARGET)
    seen = results(group.call("look", storage), TIMEOUT_S)
    linked = results(group.call("links"), TIMEOUT_S)
    reports = [
        {**look, **link, "machine": workers.node_of(rank)}
        for rank, (look, link) in enumerate(zip(seen, linked, strict=True))
    ]
    findings = judge(reports, room)
    for finding in findings:
        if not finding.fatal:
            warn(_placed(finding, reports))
    fatal = [finding for finding in findings if finding.fatal]
    of_machines = [finding for finding in fatal if finding.rank is not None]
    if of_machines:
        first = of_machines[0]
        assert first.rank is not None
        raise WorkerError(
            first.rank, Kind.UNFIT, first.message, workers.log_of(first.rank), node=workers.node_of(first.rank)
        )
    if fatal:
        raise TrainingError("\n".join(finding.message for finding in fatal))
    return {"seconds": round(time.monotonic() - began, 2), "findings": len(findings), **_figures(reports)}


def judge(reports: Sequence[Mapping[str, Any]], room: int) -> list[Finding]:
    """Return the problems that the reports of all workers, in rank order, show."""
    return [
        *_versions(reports), *_devices(reports), *_storage(reports, room), *_links(reports), *_clocks(reports),
        *_memory(reports),
    ]  # fmt: skip


def _versions(reports: Sequence[Mapping[str, Any]]) -> list[Finding]:
    findings = []
    for name in reports[0]["versions"]:
        found = Counter(report["versions"].get(name, "missing") for report in reports)
        if len(found) > 1:
            (usual, _), *_ = found.most_common(1)
            odd = [rank for rank, report in enumerate(reports) if report["versions"].get(name) != usual]
            has = reports[odd[0]]["versions"].get(name, "missing")
            message = f"has {name} {has}, the others have {usual}; install the same packages on all machines"
            # A driver may differ, as long as it serves the same CUDA.
            findings.append(Finding(message, odd[0], fatal=name != "driver"))
    return findings


def _devices(reports: Sequence[Mapping[str, Any]]) -> list[Finding]:
    findings = []
    for rank, report in enumerate(reports):
        if not report["product_right"]:
            findings.append(Finding("computes a wrong product of two matrices: its device is faulty", rank, fatal=True))
        used = report["device_total"] - report["device_free"]
        if report["device_total"] and used > _BUSY * report["device_total"]:
            findings.append(Finding(f"has {used / 2**30:.1f} GiB of its GPU in use by another process", rank))
    on_gpus = all(report["device"] != "cpu" for report in reports)
    for rank, times in _slower(reports, "tflops", _SLOW_DEVICE):
        findings.append(
            Finding(f"computes {times:.1f} times slower than the others, which would wait for it", rank, fatal=on_gpus)
        )
    return findings


def _links(reports: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Compare links within machines with each other, and links between machines with each other."""
    size = len(reports)
    findings = []
    for inside in (True, False):
        kind = [
            rank
            for rank in range(size)
            if reports[rank]["sent_mb_s"] is not None
            and (reports[rank]["machine"] == reports[(rank + 1) % size]["machine"]) == inside
        ]
        slow = dict(_slower([reports[rank] for rank in kind], "sent_mb_s", _SLOW_LINK))
        for index, times in slow.items():
            rank, to = kind[index], (kind[index] + 1) % size
            speed, where = reports[rank]["sent_mb_s"], reports[to]["machine"]
            # Slow to the next and from the one before: it is this machine's.
            own = inside or (index - 1) % len(kind) in slow
            message = f"sends {speed:,.0f} MB/s to {where}, {times:.1f} times slower than other links"
            findings.append(Finding(message, rank, fatal=own and reports[rank]["device"] != "cpu"))
    return findings


def _slower(reports: Sequence[Mapping[str, Any]], what: str, limit: float) -> list[tuple[int, float]]:
    """Return (index, how many times slower than the median) of the reports below `limit` times the median."""
    if len(reports) < _FEW:
        return []
    median = statistics.median(report[what] for report in reports)
    return [(index, median / report[what]) for index, report in enumerate(reports) if report[what] < limit * median]


def _storage(reports: Sequence[Mapping[str, Any]], room: int) -> list[Finding]:
    broken = [(rank, report["storage_problem"]) for rank, report in enumerate(reports) if report["storage_problem"]]
    if broken:
        (rank, problem), everywhere = broken[0], len(broken) == len(reports)
        message = f"the storage cannot be used: {problem}"
        return [
            Finding(
                message if everywhere else f"cannot use the storage, but other machines can: {problem}",
                None if everywhere else rank,
                fatal=True,
            )
        ]
    findings = []
    free = min((report["storage_free"] for report in reports if report["storage_free"] is not None), default=None)
    if free is not None and free < room:
        message = (
            f"the storage has {free / 1e9:,.1f} GB free, but two checkpoints need {room / 1e9:,.1f} GB; free some "
            "space, or set a different `storage`"
        )
        findings.append(Finding(message, fatal=True))
    slow = [
        (report["storage_mb_s"], rank)
        for rank, report in enumerate(reports)
        if report["storage_mb_s"] < _SLOW_STORAGE_MB_S
    ]
    if slow:
        speed, rank = min(slow)
        findings.append(Finding(f"reads and writes the storage at {speed:.1f} MB/s: checkpoints will be slow", rank))
    return findings


def _clocks(reports: Sequence[Mapping[str, Any]]) -> list[Finding]:
    median = statistics.median(report["clock"] for report in reports)
    apart = [(abs(report["clock"] - median), rank) for rank, report in enumerate(reports)]
    worst, rank = max(apart)
    return (
        [Finding(f"has a clock that is off by {worst:,.0f} s; synchronize it (chrony, ntpd)", rank)]
        if worst > _CLOCK_S
        else []
    )


def _memory(reports: Sequence[Mapping[str, Any]]) -> list[Finding]:
    mates = Counter(report["machine"] for report in reports)
    small = [
        rank
        for rank, report in enumerate(reports)
        if mates[report["machine"]] > 1 and report["shared_memory"] <= _SHARED_MEMORY
    ]
    if not small:
        return []
    size = reports[small[0]]["shared_memory"] >> 20
    return [
        Finding(
            f"has {size} MiB of shared memory (/dev/shm); raise its container's limit (--shm-size, emptyDir in memory)",
            small[0],
        )
    ]


def _figures(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the minimum and the median of each measurement."""
    measured = {}
    for name in ("tflops", "storage_mb_s", "sent_mb_s"):
        values = [report[name] for report in reports if report.get(name) is not None]
        if values:
            measured[name] = {"least": round(min(values), 3), "median": round(statistics.median(values), 3)}
    return measured


def _placed(finding: Finding, reports: Sequence[Mapping[str, Any]]) -> str:
    return (
        finding.message
        if finding.rank is None
        else f"worker {finding.rank} on {reports[finding.rank]['machine']} {finding.message}"
    )
