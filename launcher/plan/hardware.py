"""The machines that a plan is for: those of a cluster file, of a kind of GPU, or this one."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from cluster import catalog
from cluster.catalog import Gpu, Machine
from cluster.errors import Refused
from cluster.spec import CloudPool, Cluster
from training.device import num_gpus
from training.errors import InputError

_DRIVER = Path("/proc/driver/nvidia/gpus")
_LOOPBACK_GB_S = 4.0
_ROWS, _COPIED, _TRIES = 768, 32 << 20, 6
"""Of the matrices that are multiplied, bytes that are copied, how often."""
_CPU_WATTS = 15.0
"""Of a core."""


class UnknownHardware(InputError):
    """What is known of some machines does not suffice for a plan."""


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """Where the workers of a job would be: machines of one kind."""

    machine: Machine
    on_gpu: bool
    most_gpus: int | None = None
    """Of all machines that the job's workers might get. None: not known."""
    head_price: float = 0.0
    """An hour, of the machine that leads."""
    spot: bool = False
    note: str = ""

    @property
    def price(self) -> float | None:
        """An hour of one machine."""
        return self.machine.spot_price if self.at_spot_price else self.machine.price

    @property
    def at_spot_price(self) -> bool:
        return self.spot and self.machine.spot_price is not None

    def for_workers(self, count: int) -> Machine:
        """The machine as `count` workers have it: processors without a GPU are shared."""
        if self.on_gpu:
            return self.machine
        gpu, share = self.machine.gpu, max(1, count)
        own = replace(
            gpu, tflops=gpu.tflops / share, matmul_tflops=gpu.matmul_tflops / share,
            memory_gb_s=gpu.memory_gb_s / share,
            watts=gpu.watts / share,
        )  # fmt: skip
        return replace(self.machine, gpu=own, gpus=share)


def of_gpu(name: str, gpus: int | None = None) -> HardwareProfile:
    """Machines with this kind of GPU, at the price of the cheapest that a cloud has.
    Raises UnknownSite if there is none of that name."""
    try:
        kind = catalog.gpu(name)
    except Refused as error:
        raise UnknownHardware.of("--gpu", str(error)) from None
    machine, rented = catalog.default_machine(kind, gpus), catalog.cheapest(kind)
    if rented is None or rented.price is None:
        return HardwareProfile(machine=machine, on_gpu=True)
    price = rented.price / rented.gpus * machine.gpus
    note = f"the price is that of {rented.name} (on demand, {rented.dated}); --price says another"
    return HardwareProfile(machine=replace(machine, price=price, dated=rented.dated), on_gpu=True, note=note)


def of_cluster(spec: Cluster, accelerator: str | None = None) -> HardwareProfile:
    """The machines for workers of a cluster: those of the GPUs that a job asks for,
    else of its first pool that has any.

    Raises UnknownSite if it has none, or a kind that is not known.
    """
    return all_of_cluster(spec, accelerator)[0]


def all_of_cluster(spec: Cluster, accelerator: str | None = None) -> list[HardwareProfile]:
    """Those of every pool that a job's workers might get."""
    if spec.provider == "local":
        return [here()]
    pools: Mapping[str, Any] = getattr(spec, "pools", {})
    with_gpus = {name: pool for name, pool in pools.items() if pool.gpus != 0}
    wanted = {name: pool for name, pool in with_gpus.items() if accelerator in (None, pool.gpu)}
    if with_gpus and not wanted:
        has = ", ".join(f"{name}: {pool.gpu or 'GPUs'}" for name, pool in with_gpus.items())
        raise UnknownHardware.of(spec.name, f"no pool has GPUs of type {accelerator} ({has})", "resources.accelerator")
    return [_of_pool(spec, name, pool, accelerator) for name, pool in wanted.items()] or [_without_gpus(spec, pools)]


def _of_pool(spec: Cluster, name: str, pool: Any, accelerator: str | None) -> HardwareProfile:
    known = catalog.machine(pool.instance) if isinstance(pool, CloudPool) else None
    if known is None and pool.gpu is None:
        raise UnknownHardware.of(
            spec.name, f"pools.{name} does not say which GPUs its machines have; say it as `gpu: H100`"
        )
    custom = {key: value.model_dump(exclude_none=True) for key, value in spec.custom.items()}
    try:
        machine = known or catalog.default_machine(catalog.gpu(pool.gpu, custom), pool.gpus)
        if known is not None and pool.gpu in custom:
            machine = replace(machine, gpu=catalog.gpu(pool.gpu, custom))
    except Refused as error:
        raise UnknownHardware.of(spec.name, str(error), f"pools.{name}.gpu") from None
    machine = replace(machine, gpus=pool.gpus or machine.gpus)
    if (memory := getattr(pool, "memory_gib", None)) is not None:
        machine = replace(machine, memory_gib=memory, memory_assumed=False)
    if pool.price is not None:
        machine = replace(machine, price=pool.price, spot_price=getattr(pool, "spot_price", None), dated="")
    head = getattr(spec, "head", None)
    return HardwareProfile(
        machine=machine, on_gpu=True, most_gpus=_most_gpus(spec, accelerator),
        head_price=getattr(head, "price", None) or 0.0, spot=getattr(pool, "market", "") in ("spot", "spot-first"),
        note=f"{spec.name}, pool {name}",
    )  # fmt: skip


def _most_gpus(spec: Cluster, accelerator: str | None) -> int | None:
    """In all pools together: workers of one job may sit in several."""
    places = sum(offer.places(on_gpus=True, gpu=accelerator) for offer in spec.offers)
    return int(places) if places and math.isfinite(places) else None


def described(spec: Cluster, gpu: str, gpus: int | None) -> HardwareProfile:
    """Machines of a cluster whose file does not say which GPUs they have. Raises UnknownSite."""
    return replace(of_gpu(gpu, gpus or getattr(spec, "gpus_per_node", None) or None), note=f"{spec.name}, with {gpu}")


def _without_gpus(spec: Cluster, pools: Mapping[str, Any]) -> HardwareProfile:
    if not pools:
        raise UnknownHardware.of(spec.name, "does not say which GPUs its machines have; say it with --gpu H100", "--on")
    name, pool = next(iter(pools.items()))
    own = here(gpus=False)
    return replace(
        own,
        machine=replace(own.machine, price=pool.price, name=f"pool {name}"),
        note=f"{spec.name}, pool {name}; speed taken as this machine's",
    )


def here(*, gpus: bool = True) -> HardwareProfile:
    """This machine, its GPUs if it has any. Raises UnknownSite for GPUs that the catalogue does not know."""
    memory = psutil.virtual_memory().available / 2**30
    if gpus and num_gpus():
        name = _driver_says()
        try:
            kind = catalog.gpu(name)
        except Refused as error:
            raise UnknownHardware.of("this machine", str(error)) from None
        machine = replace(
            catalog.default_machine(kind, num_gpus()),
            memory_gib=memory,
            memory_assumed=False,
            price=None,
            name="this machine",
        )
        return HardwareProfile(machine=machine, on_gpu=True, most_gpus=machine.gpus)
    speed, bandwidth = _processor_speed()
    cpu = Gpu(
        name="CPU", memory_gib=memory, tflops=speed, matmul_tflops=speed, memory_gb_s=bandwidth,
        link_gb_s=_LOOPBACK_GB_S,
        watts=_CPU_WATTS * (os.cpu_count() or 1),
    )  # fmt: skip
    machine = Machine(name="this machine", gpu=cpu, gpus=1, memory_gib=memory, network_gbit_s=10)
    return HardwareProfile(machine=machine, on_gpu=False)


def of_device(name: str, gpus: int) -> HardwareProfile:
    """Machines of which a worker has told its device (cpu, or a GPU's name) and how many workers are
    on one. Raises UnknownSite."""
    return here(gpus=False) if name == "cpu" else of_gpu(name, gpus)


def _driver_says() -> str:
    """What NVIDIA's driver calls the first GPU, without loading a CUDA library."""
    for folder in sorted(_DRIVER.glob("*")):
        if found := re.search(r"^Model:\s*(.+)$", (folder / "information").read_text(), re.MULTILINE):
            return found[1]
    return "unknown"


def _processor_speed() -> tuple[float, float]:
    """TFLOP/s of a product of matrices in fp32, and GB/s of a copy: measured, in about a tenth of a second."""
    import numpy as np

    # The best of several: others may be at work.
    a, block = np.ones((_ROWS, _ROWS), np.float32), np.ones(_COPIED // 4, np.float32)
    product = min(_timed(lambda: a @ a) for _ in range(_TRIES))
    copy = min(_timed(lambda: block.copy()) for _ in range(_TRIES))
    return 2 * _ROWS**3 / product / 1e12, 2 * block.nbytes / copy / 1e9


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
