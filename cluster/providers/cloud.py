"""What the clouds have in common: Ray's cluster launcher starts a head,
whose autoscaler starts and ends the machines for workers.

Ray's own defaults open the dashboard to everybody, use one key for all clusters and know no token. Here every cluster
has a key and a token of its own, copied to its machines over SSH, and its dashboard listens on the head's loopback.
"""

from __future__ import annotations

import os
import shlex
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import yaml

from cluster import orphan_watch
from cluster.dashboard import Dashboard
from cluster.errors import ClusterError
from cluster.providers import Finding, Instance, Say, environment, ray_launcher_compat, refuse
from cluster.ray_node import PRICE, head_arguments, of_type, price_label
from cluster.registry import ClusterRecord
from cluster.remote_shell import HERE, Login
from cluster.spec import Cloud, CloudHead, CloudPool
from cluster.tunnel import tunnel

Spec = TypeVar("Spec", bound=Cloud)
_PORT, _DASHBOARD_PORT = 6379, 8265
_TOKEN = "~/.muster/token"
_ORPHAN_WATCH, _ORPHAN_LOG = "~/.muster/orphan_watch.py", "~/.muster/orphan_watch.log"
_HEAD = "head"
_STOPPED_S, _EVERY_S = 300.0, 2.0
"""For machines that were shut down to be removed, and between looks at them."""


class CloudProvider(ABC, Generic[Spec]):
    packages: ClassVar[dict[str, str]]
    """That Ray's launcher wants for this cloud, here and on the head: {module: package}."""

    def __init__(self, spec: Spec):
        self.spec = spec

    # What differs

    @abstractmethod
    def where(self) -> dict[str, Any]:
        """Ray's `provider` section, without its type."""

    @abstractmethod
    def machine(self, kind: CloudHead | CloudPool, *, spot: bool, public_key: str) -> dict[str, Any]:
        """A `node_config` that lets the key in."""

    @abstractmethod
    def account(self) -> list[Finding]:
        """What there is to say of credentials, rights and quotas; the packages are there."""

    @abstractmethod
    def stopped(self, nodes: Any) -> list[str]:
        """Ids of the cluster's machines that were shut down and are still there. `nodes` is Ray's node provider."""

    def end_command(self) -> list[str]:
        """What ends a machine, run on it."""
        return [*([] if self.spec.user == "root" else ["sudo", "-n"]), "shutdown", "-h", "now"]

    def tidy(self, cluster_name: str, say: Say) -> None:
        """Remove what is left when all machines are gone. Raises ClusterError."""
        return

    # What all providers can do

    def render(self) -> str:
        text = yaml.dump(
            self._config("MARK", Path("~/.muster/clusters") / self.spec.name, "PUBLIC KEY"), sort_keys=False, width=1000
        )
        return f"# for Ray's cluster launcher; MARK and PUBLIC KEY are made anew for every cluster\n{text}"

    def up(self, home: ClusterRecord, say: Say) -> None:
        refuse(self.doctor())
        key = home.folder / "key"
        HERE.run(
            shlex.join(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"muster {home.name}", "-f", str(key)])
        )
        say(f"starting the head, a {self.spec.head.instance}; Ray's cluster launcher says:")
        from ray.autoscaler import sdk

        config = self._recorded(home)
        with _launcher("the head was not started"), _host_keys_kept(home):
            sdk.create_or_update_cluster(config)
            address = sdk.get_head_node_ip(config)
        home.write({**home.record(), "head": address})

    def down(self, home: ClusterRecord, say: Say) -> None:
        say("ending all machines; Ray's cluster launcher says:")
        from ray.autoscaler import sdk

        if not (home.folder / "key.pub").exists():
            return  # it did not come so far that there could be machines
        config = self._recorded(home)
        with _launcher("machines may be left"), _host_keys_kept(home):
            sdk.teardown_cluster(config)  # by the tags of machines: the head need not be there
            self._remove_stopped(config)
            self.tidy(config["cluster_name"], say)

    def _remove_stopped(self, config: dict[str, Any]) -> None:
        nodes, deadline = ray_launcher_compat.node_provider(config), time.monotonic() + _STOPPED_S
        while stopped := self.stopped(nodes):
            if time.monotonic() > deadline:
                raise ClusterError(f"machines that were shut down are left: {', '.join(stopped)}")
            nodes.terminate_nodes(stopped)
            time.sleep(_EVERY_S)

    def instances(self, home: ClusterRecord) -> list[Instance]:
        """The cluster's machines by what the cloud says, without its head.
        Raises ClusterError if the cloud does not say it."""
        if not (home.folder / "key.pub").exists():
            return []
        config = self._recorded(home)
        with _launcher("the cloud does not say which machines there are"):
            nodes = ray_launcher_compat.node_provider(config)
            running, stopped = nodes.non_terminated_nodes({}), self.stopped(nodes)
            return [_instance(nodes, each, config, each not in running) for each in dict.fromkeys([*running, *stopped])]

    @contextmanager
    def connection(self, home: ClusterRecord | None) -> Iterator[Dashboard]:
        assert home is not None, "a cluster that Muster made has a record"
        if (head := home.record().get("head")) is None:
            raise ClusterError(
                f"the cluster {home.name} has no head; `muster cluster down {home.name}` removes what there is of it"
            )
        options = [f"{name}={value}" for name, value in _known_hosts(home).items()]
        login = Login(self.spec.user, key=str(home.folder / "key"), options=options)
        with tunnel(head, login, "127.0.0.1", _DASHBOARD_PORT) as port:
            yield Dashboard(f"http://127.0.0.1:{port}", home.token(), f"the cluster {home.name}")

    def doctor(self) -> list[Finding]:
        findings = [_command(name) for name in ("ssh", "ssh-keygen", "rsync")]
        missing = [package for module, package in self.packages.items() if not _is_there(module)]
        if missing:
            advice = f"pip install {' '.join(missing)}"
            return [*findings, Finding("Python packages", False, f"{', '.join(missing)} missing", advice)]
        missing_files = [path for path in self.spec.files.values() if not os.path.exists(path)]
        if missing_files:
            findings.append(
                Finding("files", False, f"{', '.join(missing_files)} missing", "correct `files` in the cluster file")
            )
        return [*findings, *self.account()]

    # The file for Ray's launcher

    def _recorded(self, home: ClusterRecord) -> dict[str, Any]:
        return self._config(home.record()["mark"], home.folder, (home.folder / "key.pub").read_text().strip())

    def _config(self, cluster_id: str, folder: Path, public_key: str) -> dict[str, Any]:
        spec = self.spec
        return {
            "cluster_name": f"muster-{spec.name}-{cluster_id}",
            "provider": {"type": spec.provider, **self.where()},
            "auth": {"ssh_user": spec.user, **self.keys(folder)},
            "max_workers": sum(pool.max for pool in spec.pools.values()),
            # A gang starts whole or not at all: no reason to start its machines little by little.
            "upscaling_speed": 1000,
            "idle_timeout_minutes": spec.idle_minutes,
            "file_mounts": {_TOKEN: str(folder / "token"), **self._orphan_watch_file(), **spec.files},
            "initialization_commands": [],
            "setup_commands": [],
            "head_setup_commands": list(spec.setup),
            # Setup can take long and may make the `python` of the cluster: the head can be lost meanwhile.
            "worker_setup_commands": [*self._orphan_watch("python3"), *spec.setup],
            "head_start_ray_commands": [self._start(self._head_arguments())],
            "worker_start_ray_commands": [
                self._start([f"--address=$RAY_HEAD_IP:{_PORT}"], self._orphan_watch("python"))
            ],
            "head_node_type": _HEAD,
            "available_node_types": {
                _HEAD: {
                    "resources": {"CPU": 0, "GPU": 0},
                    "labels": price_label(spec.head.price),
                    "min_workers": 0,
                    "max_workers": 0,
                    "node_config": self.machine(spec.head, spot=False, public_key=public_key),
                },
                **dict(kind for name, pool in spec.pools.items() for kind in self._kinds(name, pool, public_key)),
            },
        }

    def keys(self, folder: Path) -> dict[str, str]:
        return {"ssh_private_key": str(folder / "key")}

    def _kinds(self, name: str, pool: CloudPool, public_key: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """One kind of machines, two where the one is there for want of the other."""
        markets = {"on-demand": (False,), "spot": (True,), "spot-first": (True, False)}[pool.market]
        for spot in markets:
            price = pool.spot_price if spot else pool.price
            market = {"ray.io/market-type": "spot" if spot else "on-demand"}
            kind = {
                "resources": {"CPU": pool.cpus, "GPU": pool.gpus, **of_type(pool.gpu)},
                "labels": {**pool.labels, **market, **price_label(price)},
                "min_workers": 0 if spot and len(markets) > 1 else pool.min,
                "max_workers": pool.max,
                "priority": int(spot),
                "node_config": self.machine(pool, spot=spot, public_key=public_key),
            }
            yield f"{name}-spot" if spot else name, kind

    def _head_arguments(self) -> list[str]:
        # Where the address of a machine is known to the machine alone, Ray finds it.
        own = [argument for argument in head_arguments("", _PORT, _DASHBOARD_PORT) if "node-ip-address" not in argument]
        return [*own, "--num-cpus=0", "--num-gpus=0", "--autoscaling-config=~/ray_bootstrap_config.yaml"]

    def _orphan_watch_file(self) -> dict[str, str]:
        return {_ORPHAN_WATCH: orphan_watch.__file__} if self.spec.orphan_minutes else {}

    def _orphan_watch(self, python: str) -> list[str]:
        """Bash that has a machine look after its head. Started twice it runs once."""
        if not self.spec.orphan_minutes:
            return []
        end = shlex.join(self.end_command())
        watch = f'{_ORPHAN_WATCH} "$RAY_HEAD_IP:{_PORT}" --minutes {self.spec.orphan_minutes} -- {end}'
        return [f"(setsid nohup {python} {watch} >> {_ORPHAN_LOG} 2>&1 < /dev/null &)"]

    def _start(self, arguments: list[str], before: Sequence[str] = ()) -> str:
        variables = {"RAY_AUTH_MODE": "token", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", **environment(self.spec)}
        steps = [
            "ulimit -n 65536",
            f"chmod 600 {_TOKEN}",
            "unset RAY_AUTH_TOKEN",
            f"export {' '.join(f'{name}={shlex.quote(value)}' for name, value in variables.items())}",
            'export RAY_AUTH_TOKEN_PATH="$HOME/.muster/token"',
            # `ray`, and `python` in jobs, are those beside the Python that was named
            f'export PATH="$(dirname "$({self.spec.python} -c "import sys; print(sys.executable)")"):$PATH"',
            *before,
            f"ray start {' '.join(arguments)} --disable-usage-stats",
        ]
        return "; ".join(steps)


def _instance(nodes: Any, node: str, config: dict[str, Any], stopped: bool) -> Instance:
    tags = {} if stopped else nodes.node_tags(node)
    kind = tags.get("ray-user-node-type", "")
    price = config["available_node_types"].get(kind, {}).get("labels", {}).get(PRICE)
    return Instance(
        id=node, head=tags.get("ray-node-type") == _HEAD, kind=kind,
        address="" if stopped else nodes.internal_ip(node) or "",
        price=None if price is None else float(price), stopped=stopped,
    )  # fmt: skip


@contextmanager
def _launcher(failed: str) -> Iterator[None]:
    """Errors of Ray's launcher and the clouds' libraries, which have nothing in common, as ClusterError."""
    os.environ.setdefault("RAY_UP_enable_autoscaler_v2", "1")
    try:
        yield
    except ClusterError:
        raise
    except (Exception, SystemExit) as error:
        raise ClusterError(f"{failed}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _known_hosts(home: ClusterRecord) -> dict[str, str]:
    """For ssh: the head's key is that of the first connection, or it is not the head."""
    return {"StrictHostKeyChecking": "accept-new", "UserKnownHostsFile": str(home.folder / "known_hosts")}


@contextmanager
def _host_keys_kept(home: ClusterRecord) -> Iterator[None]:
    """Have Ray's launcher look at host keys, which it switches off: it copies the token."""
    with ray_launcher_compat.ssh_options(_known_hosts(home)):
        yield


def _command(name: str) -> Finding:
    found = shutil.which(name)
    return Finding(name, found is not None, found or "is missing", "" if found else f"install {name} here")


def _is_there(module: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
