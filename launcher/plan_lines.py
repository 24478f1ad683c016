"""A plan as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.plan import FITS

GIB = 1 << 30
_STOPS_PAYING = 0.7
"""Of the speed that the first figure's GPUs have each."""


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    machine = report["machine"]
    what = f"{machine['gpus']} x {machine['gpu']} of {machine['memory_gib']:g} GiB" if machine["gpu"] else "CPUs"
    price = f", {machine['price']:.2f} an hour" if machine["price"] is not None else ""
    dated = f" (prices of {machine['prices_of']})" if machine["prices_of"] and machine["price"] is not None else ""
    yield f"{report['name']} on machines with {what}, {machine['host_gib']:,.0f} GiB of memory{price}{' on the spot market' if machine['spot'] else ''}{dated}"
    for name, phase in report["phases"].items():
        yield from _phase_lines(name, phase, machine)
    yield from _scaling_lines(report["scaling"])
    if report["total"] is not None and len(report["phases"]) > 1:
        yield f"all phases: {_money(report['total'])}"
    yield from (f"note: {note}" for note in report["notes"])
    if not machine["gpu"]:
        yield "note: this is for machines without a GPU; --gpu H100 or --on CLUSTER plans for others"


def _phase_lines(name: str, phase: Mapping[str, Any], machine: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"{name} ({phase['recipe']}, {phase['dtype']}, {phase['workers']} workers): {phase['verdict'].upper()}"
    for group in phase["groups"]:
        who = f"{', '.join(group['roles'])} on " if group["roles"] else ""
        offload = ", offloaded to the CPU" if group["offload"] == "cpu" else ""
        yield f"  {who}{group['workers']} workers, ZeRO-{group['stage']}{offload}: of each worker, in GiB"
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
        yield f"  {row['stage']:<7}{row['offload']:<9}{row['device_gib']:>10,.1f} {row['host_gib']:>10,.1f}   {row['verdict']}"
    for number, row in enumerate(phase["layouts"][:4]):
        yield f"  {'best layout' if not number else 'or':<12}{row['layout']}, ZeRO-{row['stage']}: {row['iteration_s']:,.0f} s an iteration, {row['gib']:,.1f} GiB, {row['verdict']}"
    yield from _time_lines(phase)


def _time_lines(phase: Mapping[str, Any]) -> Iterator[str]:
    time, checkpoint = phase["time"], phase["checkpoint"]
    low, high = time["range"]
    mfu = f", MFU {time['mfu']:.0%}" if time["mfu"] is not None else ""
    kind = "an iteration" if time["parts_s"] else "a step"
    yield f"  {kind}: {_seconds(time['step_s'])} ({_seconds(low)} to {_seconds(high)}), {time['tokens_per_s']:,.0f} tokens/s{mfu}"
    if time["parts_s"]:
        yield "    " + ", ".join(f"{part} {_seconds(seconds)}" for part, seconds in time["parts_s"].items() if seconds)
    if "hours" in time:
        yield f"  {time['steps']:,} steps: {_money(time)}"
    else:
        yield "  how many steps is not known: the data is not here, and max_steps is not set (--rows says how many)"
    size = checkpoint["bytes"] / 1e9
    notice = ""
    if checkpoint["notice_s"] is not None:
        fits = "it fits into" if checkpoint["within_notice"] else "it does NOT fit into"
        notice = f"; {fits} the {checkpoint['notice_s']:g} s before a spot machine is taken"
    yield f"  a checkpoint: {size:,.2f} GB in {_seconds(checkpoint['seconds'])}{notice}; storage for all that is kept: {checkpoint['disk_bytes'] / 1e9:,.2f} GB"


def _scaling_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What more GPUs bring; `each` is the speed of one of them against one of the fewest."""
    if not rows:
        return
    yield ""
    yield f"{'GPUs':>6} {'a step':>10} {'tokens/s':>12} {'each':>6}   hours and cost"
    first = _speed_of_one(rows[0])
    for row in rows:
        each = _speed_of_one(row) / first
        told = _money(row["total"]) if row["total"] is not None else ""
        verdict = "" if row["verdict"] == FITS else f"  {row['verdict']}"
        pays = "  no longer pays" if each < _STOPS_PAYING else ""
        yield f"{row['gpus']:>6} {_seconds(row['step_s']):>10} {row['tokens_per_s']:>12,.0f} {each:>6.0%}   {told}{verdict}{pays}"


def _speed_of_one(row: Mapping[str, Any]) -> float:
    """By the hours of the whole job, where they are known."""
    if row["total"] is not None:
        return 1 / (row["total"]["hours"][1] * row["gpus"])
    return row["tokens_per_s"] / row["gpus"]


def _money(time: Mapping[str, Any]) -> str:
    low, middle, high = time["hours"]
    told = f"{_hours(middle)} ({_hours(low)} to {_hours(high)})"
    if time["cost"] is not None:
        low, middle, high = time["cost"]
        told += f", ${middle:,.2f} (${low:,.2f} to ${high:,.2f})"
    return f"{told}, {time['kwh'][1]:,.1f} kWh"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.0f} min" if hours >= 1 / 60 else f"{hours * 3600:.0f} s"


def _number(gib: float) -> str:
    return f"{gib:,.1f}" if gib >= 10 else f"{gib:,.2f}" if gib >= 0.1 else f"{gib:,.4f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2f} s"
