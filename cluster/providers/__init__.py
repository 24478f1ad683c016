"""Where machines come from: one module a provider, loaded when it is needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any, Protocol

from cluster.dashboard import Dashboard
from cluster.errors import ClusterError, Refused
from cluster.registry import ClusterRecord
from cluster.remote_shell import on_all
from cluster.spec import Cluster

Say = Callable[[str], None]
_CLOCK_S = 30.0
"""Clocks that are further apart confuse whoever reads the logs, and signed requests to clouds fail."""


@dataclass(frozen=True)
class Finding:
    """What `doctor` saw."""

    what: str
    well: bool
    found: str
    advice: str = ""
    """What to do, if it is not well."""


@dataclass(frozen=True)
class Instance:
    """A machine of a cluster, by what the cloud says of it."""

    id: str
    head: bool
    kind: str
    """`head`, or its pool; a pool's spot machines have a name of their own."""
    address: str
    price: float | None
    """An hour, by the cluster file."""
    stopped: bool = False
    """It was shut down: what is left of it is a disk."""


class Provider(Protocol):
    """How clusters of one kind are made and ended. `home` is the record of one that is up."""

    def render(self) -> str:
        """Exactly what `up` would do, for a person to read."""
        ...

    def up(self, home: ClusterRecord, say: Say) -> None:
        """Start it and write down what `down` needs, before it is needed. Raises ClusterError;
        what was started is ended then."""
        ...

    def down(self, home: ClusterRecord, say: Say) -> None:
        """End all there is of it. Raises ClusterError with what could not be ended."""
        ...

    def connection(self, home: ClusterRecord | None) -> AbstractContextManager[Dashboard]:
        """Its dashboard as seen from here, for the length of a `with` block."""
        ...

    def doctor(self) -> list[Finding]:
        """What keeps it from being used, or would."""
        ...


def provider_of(spec: Cluster) -> Provider:
    module = import_module(f"cluster.providers.{spec.provider}")
    provider: Provider = module.PROVIDER(spec)
    return provider


# What several providers have in common


def environment(spec: Cluster) -> dict[str, str]:
    """Of Ray on the machines of a cluster that Muster makes."""
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(spec.stop_s), **NO_METRICS_PORTS}


NO_METRICS_PORTS = {
    "RAY_enable_metrics_collection": "0",
    "DASHBOARD_METRIC_PORT": "-1",  # a port that there is not: Ray says so in its log and goes on
    "AUTOSCALER_METRIC_PORT": "-1",
}
"""Ray's figures for Prometheus would be served to everybody who reaches the machine: these ports
listen everywhere and know no token."""


def findings_of(looks: Mapping[str, Callable[[], dict[str, Any]]]) -> list[Finding]:
    """What is seen on machines: whether they answer, and have what a node needs in the versions that are here."""
    here = version("ray")
    findings, first = [], ""
    for name, info in on_all(looks).items():
        if isinstance(info, ClusterError):
            findings.append(
                Finding(name, False, str(info).removeprefix(f"{name} "), "mend this first: the rest cannot be seen")
            )
            continue
        ray = info["versions"]["ray"]
        python = ".".join(info["python"].split(".")[:2])
        first = first or python
        seen = f"Python {info['python']}, Ray {ray or 'is missing'}, {info['cores']} cores"
        missing = [package for package, found in info["versions"].items() if found is None]
        apart = abs(info["time"] - time.time())
        if missing:
            findings.append(Finding(name, False, seen, f"install {', '.join(missing)} for {info['executable']}"))
        elif ray != here:
            findings.append(Finding(name, False, seen, f"install Ray {here} there: it is the version here"))
        elif python != first:
            findings.append(
                Finding(
                    name, False, seen, f"install Python {first} there, as on the first machine: Ray wants one for all"
                )
            )
        elif apart > _CLOCK_S:
            findings.append(Finding(name, False, f"its clock is {apart:.0f} s off ours", "let it follow a time server"))
        else:
            findings.append(Finding(name, True, seen))
    return findings


def refuse(findings: Sequence[Finding]) -> None:
    """Raises Refused with everything that is not well."""
    wrong = [f"{finding.what}: {finding.found}; {finding.advice}" for finding in findings if not finding.well]
    if wrong:
        raise Refused("\n".join(wrong))
