"""Formats a plan for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.plan.phase_plan import FITS, TIGHT

GIB = 1 << 30
_STOPS_PAYING = 0.7
"""Share of the best speed per GPU below which more GPUs are called inefficient."""


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    machine = report["machine"]
    what = f"{machine['gpus']} x {machine['gpu']} of {machine['memory_gib']:g} GiB" if machine["gpu"] else "CPUs"
    host = f"{machine['host_gib']:,.0f} GiB of memory{' (assumed)' if machine['host_assumed'] else ''}"
    price = ""
    if machine["price"] is not None:
        market = " on the spot market" if machine["spot"] else ""
        dated = f" (prices of {machine['prices_of']})" if machine["prices_of"] else ""
        price = f", ${machine['price']:,.2f} an hour each{market}{dated}"
    yield f"{report['name']} on machines with {what}, {host}{price}"
    for name, phase in report["phases"].items():
        yield from _phase_lines(name, phase, machine)
    yield from _scaling_lines(report["scaling"], len(report["phases"]))
    if report["total"] is not None and len(report["phases"]) > 1:
        yield f"all phases: {_money(report['total'])}"
    yield from report["limits"]
    yield from (f"note: {note}" for note in report["notes"])
    if not machine["gpu"]:
        yield (
            "note: this plan is for machines without a GPU at the measured speed of this one; use --gpu H100 or "
            "--on CLUSTER to plan for others"
        )


def _phase_lines(name: str, phase: Mapping[str, Any], machine: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    near = ": above 92 % of the memory, including fragmentation" if phase["verdict"] == TIGHT else ""
    what = f"{phase['recipe']}, {phase['dtype']}, {_workers(phase['workers'])}"
    yield f"{name} ({what}): {phase['verdict'].upper()}{near}"
    for group in phase["groups"]:
        who = f"{', '.join(group['roles'])} on " if group["roles"] else ""
        offload = ", offloaded to the CPU" if group["offload"] == "cpu" else ""
        again = ", activations recomputed" if group["recomputes"] else ""
        yield f"  {who}{_workers(group['workers'])}, ZeRO-{group['stage']}{offload}{again}: of each worker, in GiB"
        for where, limit in (("device", machine["memory_gib"]), ("host", None)):
            if parts := group[where]:
                label = "GPU" if where == "device" else "memory of its machine"
                of = f" of {limit:g}" if limit else ""
                yield f"    {label:<22}{_number(sum(parts.values()) / GIB):>8}{of}"
                for what, size in sorted(parts.items(), key=lambda part: -part[1]):
                    if size >= 0.005 * sum(parts.values()):
                        yield f"      {what:<28}{_number(size / GIB):>8}"
    yield from (f"  {why}" for why in phase["why"])
    if phase["changes"]:
        yield f"  would fit with: {phase['changes'][0]}"
        yield from (f"              or: {change}" for change in phase["changes"][1:])
    if not machine["gpu"]:
        yield "  stage   worker GiB"
    else:
        yield "  stage  offload   worker GiB   host GiB"
    for row in phase["alternatives"]:
        if not machine["gpu"]:
            yield f"  {row['stage']:<7}{_number(row['host_gib']):>11}   {row['verdict']}"
            continue
        yield (
            f"  {row['stage']:<7}{row['offload']:<9}{row['device_gib']:>10,.1f} {row['host_gib']:>10,.1f}   "
            f"{row['verdict']}"
        )
    for number, row in enumerate(phase["layouts"][:4]):
        yield (
            f"  {'best layout' if not number else 'or':<12}{row['layout']}, ZeRO-{row['stage']}: "
            f"{_seconds(row['iteration_s'])} an iteration, {row['gib']:,.1f} GiB, {row['verdict']}"
        )
    yield from _time_lines(phase)


def _time_lines(phase: Mapping[str, Any]) -> Iterator[str]:
    time, checkpoint = phase["time"], phase["checkpoint"]
    low, high = time["range"]
    mfu = f", MFU {time['mfu']:.0%}" if time["mfu"] is not None else ""
    kind = "an iteration" if time["parts_s"] else "a step"
    yield (
        f"  {kind}: {_seconds(time['step_s'])} ({_seconds(low)} to {_seconds(high)}), "
        f"{_speed(time['tokens_per_s'])}{mfu}"
    )
    if time["parts_s"]:
        yield "    " + ", ".join(f"{part} {_seconds(seconds)}" for part, seconds in time["parts_s"].items() if seconds)
    if "hours" in time:
        more = f", answers to questions {_seconds(time['evaluations_s'])}" if time["evaluations_s"] else ""
        yield f"  {time['steps']:,} steps and the start ({_seconds(time['start_s'])}){more}: {_money(time)}"
    else:
        yield "  the number of steps is unknown: the data is not here and max_steps is not set; use --rows"
    size = checkpoint["bytes"] / 1e9
    notice = ""
    if checkpoint["notice_s"] is not None:
        fits = "fits into" if checkpoint["within_notice"] else "does NOT fit into"
        hand = "iteration" if time["parts_s"] else "step"
        notice = (
            f"; together with the current {hand} it {fits} the {checkpoint['notice_s']:g} s before a spot machine "
            "is preempted"
        )
    yield (
        f"  a checkpoint: {size:,.2f} GB in {_seconds(checkpoint['seconds'])}{notice}; storage for all "
        f"kept checkpoints: {checkpoint['disk_bytes'] / 1e9:,.2f} GB"
    )


def _scaling_lines(rows: Sequence[Mapping[str, Any]], phases: int) -> Iterator[str]:
    """Yield the scaling table; `each` is the speed per GPU relative to the best row."""
    if not rows:
        return
    yield ""
    of_first = "" if phases > 1 else f" {'a step':>10} {'tokens/s':>10}"
    yield f"{'GPUs':>6}{of_first} {'each':>6}   hours and cost{' of all phases' if phases > 1 else ''}"
    usable = [row for row in rows if row["verdict"] in (FITS, TIGHT)] or rows
    best = max(map(_speed_of_one, usable))
    for row in rows:
        each = _speed_of_one(row) / best
        told = _money(row["total"]) if row["total"] is not None else "unknown: give the number of rows with --rows"
        of_first = "" if phases > 1 else f" {_seconds(row['step_s']):>10} {row['tokens_per_s']:>10,.0f}"
        verdict = "" if row["verdict"] == FITS else f"  {row['verdict']}"
        more = row["gpus"] > min(usable, key=_slowness)["gpus"]
        pays = "  inefficient" if each < _STOPS_PAYING and more and row in usable else ""
        yield f"{row['gpus']:>6}{of_first} {each:>6.0%}   {told}{verdict}{pays}"


def _slowness(row: Mapping[str, Any]) -> float:
    return -_speed_of_one(row)


def _speed_of_one(row: Mapping[str, Any]) -> float:
    """Return the speed per GPU, from the hours of the whole job if they are known."""
    if row["total"] is not None:
        return float(1 / (row["total"]["hours"][1] * row["gpus"]))
    return float(row["tokens_per_s"] / row["gpus"])


def _money(time: Mapping[str, Any]) -> str:
    low, middle, high = time["hours"]
    told = f"{_hours(middle)} ({_hours(low)} to {_hours(high)})"
    if time["cost"] is not None:
        low, middle, high = time["cost"]
        told += f", ${middle:,.2f} (${low:,.2f} to ${high:,.2f})"
    return told + (f", {time['kwh'][1]:,.1f} kWh" if time["kwh"][1] >= 0.1 else "")


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.0f} min" if hours >= 1 / 60 else f"{hours * 3600:.0f} s"


def _number(gib: float) -> str:
    return f"{gib:,.1f}" if gib >= 10 else f"{gib:,.2f}" if gib >= 0.1 else f"{gib:,.4f}"


def _workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"


def _speed(tokens: float) -> str:
    return f"{tokens:,.0f} tokens/s" if tokens >= 10 else f"{tokens:.2g} tokens/s"


def _seconds(seconds: float) -> str:
    if seconds >= 600:
        return _hours(seconds / 3600)
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds:.1g} s"
