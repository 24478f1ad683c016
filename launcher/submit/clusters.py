"""Resolves clusters that the user names: a cluster file, the name of a running cluster, or the address of an existing
one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster import registry as homes
from cluster.dashboard import Dashboard
from cluster.errors import ClusterError, Refused
from cluster.providers import Finding, Provider, provider_of
from cluster.ray_node import PRICE, new_mark
from cluster.registry import ClusterRecord
from cluster.spec import SPECS, Cluster, Existing
from launcher.jobfile import yaml_with_lines
from launcher.jobfile.problem_collector import ProblemCollector
from launcher.jobfile.validation_messages import did_you_mean, listed, validated
from launcher.process import output
from launcher.submit import jobs as submit
from launcher.submit.jobs import Session
from training.errors import InputError
from training.io.paths import absolute
from training.storage import is_remote

Say = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """A running cluster."""

    spec: Cluster
    provider: Provider
    home: ClusterRecord | None
    """None: Muster did not start it."""

    def connection(self) -> AbstractContextManager[Dashboard]:
        return self.provider.connection(self.home)

    def jobs(self) -> AbstractContextManager[Session]:
        """Connect to the job service of the cluster."""
        if self.spec.provider == "slurm":
            from launcher.submit.slurm_jobs import SlurmSession

            return nullcontext(SlurmSession(self.provider))  # type: ignore[arg-type]  # the spec says which
        from launcher.submit.ray_jobs import opened

        return opened(self.connection, self.spec.stop_s)


def load(file: Path) -> Cluster:
    """Load the settings of a cluster file. Raises InputError with every problem."""
    document = yaml_with_lines.load(file)
    report = ProblemCollector(document)
    data = {"name": file.stem, **document.data}
    given = data.get("provider")
    if not isinstance(given, str) or given not in SPECS:
        meant = did_you_mean(given, SPECS) if isinstance(given, str) else ""
        report.add(("provider",), f"set it to {listed(SPECS)}{meant}")
        report.raise_any()
    spec = validated(SPECS[str(given)], data, report.add)
    if (
        spec is not None
        and spec.storage is not None
        and not os.path.isabs(spec.storage)
        and not is_remote(spec.storage)
    ):
        report.add(
            ("storage",),
            f"{spec.storage}: set a bucket, or the absolute path of a folder that every machine can access",
        )
    report.raise_any()
    assert spec is not None, "its problems were raised"
    return _from_anywhere(spec, file.absolute().parent)


def _from_anywhere(spec: Cluster, folder: Path) -> Cluster:
    """Return the settings with absolute local paths, since they are used from other folders later.
    Relative paths are relative to the file."""
    changes: dict[str, Any] = {}
    for name in ("key", "token_file"):
        if (path := getattr(spec, name, None)) is not None:
            changes[name] = absolute(path, folder)
    if files := getattr(spec, "files", None):
        changes["files"] = {there: absolute(here, folder) for there, here in files.items()}
    return spec.model_copy(update=changes)


def target(text: str) -> Target:
    """Return the cluster that `--on` names. Raises InputError if there is none, or it is not running."""
    if text.startswith(("http://", "https://")):
        return _existing(Existing(provider="existing", name="address", address=text.rstrip("/")))
    if text.endswith((".yaml", ".yml")) or os.path.isfile(text):
        spec = load(Path(text))
        return _up(spec.name) if spec.made_by_muster else _existing(spec)
    return _up(text)


def _existing(spec: Cluster) -> Target:
    return Target(spec, provider_of(spec), None)


def _up(name: str) -> Target:
    home = homes.find(name)
    if home is None:
        up = [known.name for known in homes.known()]
        meant = did_you_mean(name, up) or f"; running clusters: {', '.join(up) or 'none'}"
        raise InputError.of("--on", f"no cluster {name} is running{meant}; `muster cluster up FILE` starts one", name)
    spec = _recorded(home)
    return Target(spec, provider_of(spec), home)


def _recorded(home: ClusterRecord) -> Cluster:
    settings = home.record()["spec"]
    return SPECS[settings["provider"]].model_validate(settings)


def render(file: Path) -> str:
    return provider_of(load(file)).render()


@output.kept_going()  # machines that nobody takes back would cost money
def up(file: Path, say: Say) -> str:
    """Start a cluster; returns its name. After an error or Ctrl-C it ends or reports all that was started."""
    spec = load(file)
    provider = provider_of(spec)
    if not spec.made_by_muster:
        raise Refused(f"Muster does not start {spec.name} (provider: {spec.provider}); use it with --on {file}")
    started = datetime.now(UTC).isoformat(timespec="seconds")
    home = homes.claim(
        spec.name, {"spec": spec.model_dump(exclude_defaults=True), "mark": new_mark(), "started": started}
    )
    try:
        provider.up(home, say)
    except Refused:
        home.remove()
        raise
    except BaseException as error:
        say("starting the cluster failed; ending what was started")
        try:
            _end(home, provider, say)
        except ClusterError as left:
            raise ClusterError("\n".join(filter(None, (str(error), str(left))))) from None
        raise
    return spec.name


def down(name: str, say: Say, *, force: bool = False) -> None:
    """End a cluster. Raises Refused while jobs run on it and ClusterError if something remains, unless `force`."""
    found = _up(name)
    assert found.home is not None, "it is ours"
    running = [] if force else _running(found)
    if running:
        raise Refused(
            f"jobs are running on {name}: {', '.join(running)}; save and stop each with `muster stop ID --on {name}`, "
            "or end them with --force"
        )
    _end(found.home, found.provider, say, force=force)


def _end(home: ClusterRecord, provider: Provider, say: Say, *, force: bool = False) -> None:
    """`force`: remove the record of the cluster even if parts of it cannot be reached."""
    try:
        provider.down(home, say)
    except ClusterError as error:
        if force:
            say(f"{error}\nremaining parts of the cluster are left unchanged")
            home.remove()
            return
        raise ClusterError(
            f"{error}\nparts of {home.name} still exist; retry with `muster cluster down {home.name}`"
        ) from None
    home.remove()


def _running(found: Target) -> list[str]:
    try:
        return [job["id"] for job in submit.listing(found.jobs) if not submit.is_over(job)]
    except ClusterError:
        return []  # it does not answer: nothing of it can be saved


def status(name: str | None) -> list[dict[str, Any]]:
    """Return machines, GPUs and jobs of a cluster, or of all clusters that this machine has started."""
    found = [_up(name)] if name else [_up(home.name) for home in homes.known()]
    return [_status(one) for one in found]


def _status(found: Target) -> dict[str, Any]:
    assert found.home is not None, "it is ours"
    info: dict[str, Any] = {
        "name": found.spec.name,
        "provider": found.spec.provider,
        "started": found.home.record()["started"],
    }
    try:
        with found.connection() as connection:
            nodes = connection.nodes()
    except ClusterError as error:
        return {**info, "state": "silent", "problem": str(error), "nodes": [], "jobs": [], **_without_head(found)}
    prices = [float(node["labels"][PRICE]) for node in nodes if PRICE in node["labels"]]
    price = sum(prices) if prices else None
    return {
        **info,
        "state": "up",
        "nodes": nodes,
        "price_per_hour": price,
        "unpriced": len(nodes) - len(prices),
        "jobs": _running(found),
    }


def _without_head(found: Target) -> dict[str, Any]:
    """Return the cloud's list of machines of a cluster whose head does not answer; empty if it is not in a cloud."""
    from cluster.providers.cloud import CloudProvider

    if not isinstance(found.provider, CloudProvider) or found.home is None:
        return {}
    try:
        instances = found.provider.instances(found.home)
    except ClusterError as error:
        return {"cloud_problem": str(error)}
    running = [one for one in instances if not one.stopped]
    prices = [one.price for one in running if one.price is not None]
    return {
        "instances": [vars(one) for one in instances],
        "price_per_hour": sum(prices) if prices else None,
        "unpriced": len(running) - len(prices),
    }


def status_lines(clusters: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not clusters:
        yield "no clusters; start one with `muster cluster up FILE`"
    for info in clusters:
        nodes = info["nodes"]
        gpus = sum(node["gpus"] for node in nodes)
        price = _price(info) if nodes else ""
        yield (
            f"{info['name']}: {info['state']}, {info['provider']}, since {info['started']}, {len(nodes)} machines, "
            f"{gpus:g} GPUs{price}, jobs: {', '.join(info['jobs']) or 'none'}"
        )
        if "problem" in info:
            yield f"  {info['problem']}"
        for node in nodes:
            role = "head" if node["head"] else "worker"
            yield f"  {node['address']:<16} {role:<7} {node['cpus']:g} CPUs, {node['gpus']:g} GPUs"
        yield from _left_lines(info)


def _left_lines(info: Mapping[str, Any]) -> Iterator[str]:
    """Yield the remaining machines in the cloud of a cluster whose head does not answer."""
    if "cloud_problem" in info:
        yield f"  {info['cloud_problem']}"
    if (instances := info.get("instances")) is None:
        return
    down = f"`muster cluster down {info['name']}`"
    if not instances:
        yield f"  the cloud has no more machines of this cluster; {down} removes the other resources"
        return
    yield f"  the cloud still has {len(instances)} of its machines{_price(info)}; {down} ends them:"
    for one in instances:
        role = (
            "stopped, but its disk still exists"
            if one["stopped"]
            else "head"
            if one["head"]
            else f"worker of {one['kind']}"
        )
        yield f"  {one['id']:<20} {one['address']:<16} {role}"


def _price(info: Mapping[str, Any]) -> str:
    if info.get("price_per_hour") is None:
        return ""
    rest = f" and {info['unpriced']} machines without a price" if info["unpriced"] else ""
    return f", {info['price_per_hour']:.2f} an hour{rest}"


def doctor(file: Path) -> list[Finding]:
    return provider_of(load(file)).doctor()


def doctor_lines(findings: Sequence[Finding]) -> Iterator[str]:
    for finding in findings:
        yield f"{'ok' if finding.well else 'NOT WELL':<9} {finding.what}: {finding.found}"
        if finding.advice:
            yield f"          {finding.advice}"
