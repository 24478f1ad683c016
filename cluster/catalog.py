"""The catalog of GPUs and rented machines: memory, speed, links and prices, from the dated table beside this file.
A cluster file can add others."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import Refused

_PCIE_GB_S = 64
_UNMEASURED = 0.85
"""Of what its maker states, for a GPU of which no matrix product was measured."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU. Speeds are peaks: bf16 TFLOP/s, GB/s."""

    name: str
    memory_gib: float
    tflops: float
    """Dense, as its maker states it: what MFU is counted by."""
    matmul_tflops: float
    """What a matrix product reaches at most."""
    memory_gb_s: float
    link_gb_s: float
    """To its neighbours, both directions together."""
    watts: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One kind of machine with GPUs."""

    name: str
    gpu: Gpu
    gpus: int
    memory_gib: float
    network_gbit_s: float
    memory_assumed: bool = False
    """Whether nothing is known of `memory_gib`."""
    price: float | None = None
    """An hour, on demand."""
    spot_price: float | None = None
    notice_s: float | None = None
    """What the cloud gives before it takes a spot machine back."""
    dated: str = ""
    """Of when the prices are; empty for one's own."""


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "catalog.yaml").read_text(encoding="utf-8"))
    return table


def gpu(name: str, custom: Mapping[str, Any] | None = None) -> Gpu:
    """The GPU of that name, in any spelling, such as Ray's, the driver's or a cloud's.
    `custom`: rows by name that add to the table's.

    Raises Refused with near names if there is none.
    """
    rows = {**_table()["gpus"], **(custom or {})}
    names = {alias: key for key, row in rows.items() for alias in (key, *row.get("also", ()))}
    found = _match(name, names)
    if found is None:
        near = difflib.get_close_matches(name.upper(), [known.upper() for known in names], n=3, cutoff=0.4)
        known = [each for each in names if each.upper() in near]
        meant = f"did you mean {', '.join(known)}" if known else f"known: {', '.join(rows)}"
        raise Refused(
            f"{name or '(nothing)'}: no GPU of that name is in the catalog; {meant}. Define other GPUs and parts "
            "of GPUs (MIG) under `custom:` in a cluster file"
        )
    row = rows[names[found]]
    if (like := row.get("like")) is not None:
        return _scaled(names[found], gpu(like), row)
    return _gpu(names[found], row)


def machine(instance: str) -> Machine | None:
    """A cloud's machine by its name, if it is in the table."""
    row = _table()["instances"].get(instance)
    if row is None:
        return None
    cloud = _table()["clouds"][row["cloud"]]
    return Machine(
        name=instance, gpu=gpu(row["gpu"]), gpus=row["gpus"], memory_gib=row["memory_gib"],
        network_gbit_s=row["network_gbit_s"],
        price=row["price"], spot_price=row["spot_price"], notice_s=cloud["notice_s"], dated=str(cloud["prices_of"]),
    )  # fmt: skip


def default_machine(kind: Gpu, gpus: int | None = None) -> Machine:
    """A machine of which nothing but its GPUs is known; without a price,
    with the best network that the table has for that kind."""
    row, known = _table()["default_machine"], _machines_with(kind)
    count = gpus or row["gpus"]
    network = max((each["network_gbit_s"] for each in known.values()), default=row["network_gbit_s"])
    return Machine(
        name=f"{count} x {kind.name}", gpu=kind, gpus=count, memory_gib=row["memory_gib"] * count / row["gpus"],
        memory_assumed=True, network_gbit_s=network,
    )  # fmt: skip


def cheapest(kind: Gpu) -> Machine | None:
    """Of the machines with this kind of GPU the one whose GPUs cost least on demand."""
    priced = {name: row["price"] / row["gpus"] for name, row in _machines_with(kind).items() if row["price"]}
    return machine(min(priced, key=priced.__getitem__)) if priced else None


def _machines_with(kind: Gpu) -> dict[str, dict[str, Any]]:
    return {name: row for name, row in _table()["instances"].items() if row["gpu"] == kind.name}


def _match(name: str, names: Mapping[str, str]) -> str | None:
    """The known name that is meant: equal but for spelling, else the longest one
    that is part of it ("NVIDIA H100 80GB HBM3")."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    wanted = plain(name)
    if not wanted:
        return None
    exact = [known for known in names if plain(known) == wanted]
    if exact:
        return exact[0]
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    if any(word == "mig" or re.fullmatch(r"\d+g", word) for word in words):
        return None  # a part of one, which only `custom:` can describe
    parts = [known for known in names if set(re.findall(r"[a-z0-9]+", known.lower())) <= words]
    return max(parts, key=len, default=None)


def _gpu(name: str, row: Mapping[str, Any]) -> Gpu:
    return Gpu(
        name=name, memory_gib=row["memory_gib"], tflops=row["tflops"],
        matmul_tflops=row.get("matmul_tflops") or _UNMEASURED * row["tflops"], memory_gb_s=row["memory_gb_s"],
        link_gb_s=row.get("link_gb_s") or row.get("pcie_gb_s") or _PCIE_GB_S, watts=row.get("watts") or 300,
    )  # fmt: skip


def _scaled(name: str, whole: Gpu, row: Mapping[str, Any]) -> Gpu:
    """A part of a GPU (MIG), or one like another but for what is said of it."""
    share = row.get("share", 1.0)
    return Gpu(
        name=name, memory_gib=row.get("memory_gib") or whole.memory_gib * share,
        tflops=row.get("tflops") or whole.tflops * share,
        matmul_tflops=row.get("matmul_tflops") or row.get("tflops", 0) * _UNMEASURED or whole.matmul_tflops * share,
        memory_gb_s=row.get("memory_gb_s") or whole.memory_gb_s * share,
        link_gb_s=row.get("link_gb_s") or (whole.link_gb_s if share == 1 else _PCIE_GB_S),  # parts have no NVLink
        watts=row.get("watts") or whole.watts * share,
    )  # fmt: skip
