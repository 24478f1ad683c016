"""What is written down of a benchmark: figures with their spread, and the conditions under which they came about."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from training.io.versions import versions_of

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("muster-train", "torch", "deepspeed", "transformers", "ray")


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, smallest and largest. Raises ValueError if there are no values."""
    if not values:
        raise ValueError("no values to summarise")
    return {name: round(of(values), digits) for name, of in (("median", median), ("min", min), ("max", max))}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Spread of ours[i] / theirs[i]: each round against its neighbour, so that a change of the machine's load cancels.

    Raises ValueError unless there are as many of one as of the other.
    """
    return spread([mine / other for mine, other in zip(ours, theirs, strict=True)])


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """max |ours[i] - theirs[i]|. Raises ValueError unless there are as many of one as of the other."""
    return max(abs(mine - other) for mine, other in zip(ours, theirs, strict=True))


def machine() -> str:
    """A short name of the kind of machine, such as `2-core-xeon-amx` or `16-core-xeon-amx-h100`."""
    cpu = _cpu_info()
    return machine_name(
        os.cpu_count() or 1, cpu.get("model name", platform.machine()), cpu.get("flags", ""), gpu_name()
    )


def machine_name(cores: int, cpu: str, flags: str, gpu: str | None) -> str:
    families = ("xeon", "epyc", "ryzen", "core", "neoverse", "apple")
    words = re.findall(r"[a-z0-9]+", cpu.lower())
    family = next((name for name in families if name in words), words[0] if words else "cpu")
    unit = next((name for name in ("amx", "avx512") if name in flags), None)
    model = re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia").strip()).strip("-") if gpu else None
    return "-".join(part for part in (str(cores), "core", family, unit, model) if part)


def _cpu_info() -> dict[str, str]:
    """The first processor's entries in /proc/cpuinfo; nothing where there is no such file."""
    try:
        first, *_ = Path("/proc/cpuinfo").read_text().split("\n\n")
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def gpu_name() -> str | None:
    """The driver's name of the first GPU; None if there is none."""
    return (_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").partition("\n")[0] or None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def conditions() -> dict[str, Any]:
    """Date, machine, load and versions, as they are before a benchmark starts."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "commit": _output("git", "describe", "--always", "--dirty"),
        "versions": versions_of(_PACKAGES),
    }


def keep(row: dict[str, Any], results: Path = RESULTS) -> Path:
    """Append a row to the results of its machine; returns the file."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{row['machine']}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return path
