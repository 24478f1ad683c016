"""Ray on one machine, as bash: look at what is there, start it, end it and everything that came of it.

All processes of a cluster on a machine, also the jobs' own, carry a mark in their environment: that is how they are
found again, whatever became of their parents, and how nothing else is touched. The token, the log and Ray's own files
are in one folder in TMPDIR or /tmp, for the sake of Unix sockets, whose names must be short; Ray opens its own part of
it to everyone, so that lies inside a folder that is its owner's alone.
"""

from __future__ import annotations

import json
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import ClusterError
from cluster.remote_shell import Machine

PRICE = "muster/price"
"""Label of a machine: what an hour costs."""
_MARK = "MUSTER_CLUSTER"
_LOOK_S, _START_S, _END_S = 60.0, 240.0, 60.0
_LONGEST = 40
"""Characters of the folder: names of Ray's sockets begin with it and must fit in 107."""
_ORDERLY_S = 3
"""For Ray and its jobs to end by themselves before they are killed."""
_LOOK = """
import importlib.metadata, json, os, platform, socket, sys, time
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
def address():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: asks which way out there is
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostbyname(socket.gethostname())
packages = ("ray", "torch", "deepspeed", "transformers", "peft", "datasets")
print(json.dumps({
    "python": platform.python_version(), "executable": sys.executable, "cores": os.cpu_count(), "time": time.time(),
    "address": address(), "versions": {name: version(name) for name in packages},
}))
"""


def new_mark() -> str:
    """Of a cluster that is about to be made; nobody else's."""
    return secrets.token_hex(4)


def head_arguments(address: str, port: int, dashboard_port: int) -> list[str]:
    """For `ray start`: a head whose dashboard listens on loopback alone."""
    return [
        "--head", f"--node-ip-address={address}", f"--port={port}",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}",
    ]  # fmt: skip


def places(cpus: int | None, gpus: int | None, gpu: str | None = None, labels: Mapping[str, str] = {}) -> list[str]:
    """For `ray start`: what a machine offers, if it is not to be all that Ray finds; the type of its GPUs."""
    arguments = [] if cpus is None else [f"--num-cpus={cpus}"]
    arguments += [] if gpus is None else [f"--num-gpus={gpus}"]
    arguments += [f"--resources={json.dumps(resources)}"] if (resources := of_type(gpu)) else []
    return arguments + ([f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}"] if labels else [])


def of_type(gpu: str | None) -> dict[str, int]:
    """The resource by which Ray finds machines with GPUs of a type."""
    return {f"accelerator_type:{gpu}": 1} if gpu else {}


def price_label(price: float | None) -> dict[str, str]:
    """How a machine says what it costs, to whoever can look at the cluster."""
    return {} if price is None else {PRICE: f"{price:g}"}


@dataclass(frozen=True)
class Node:
    """Ray of a cluster on a machine."""

    machine: Machine
    python: str
    """With Muster's dependencies; may begin with ~/."""
    cluster_id: str = ""

    def look(self) -> dict[str, Any]:
        """Versions, clock, cores, address. Raises ClusterError if the machine does not answer or has no such Python."""
        said = self.machine.run(f"{_path(self.python)} - <<'END'\n{_LOOK}\nEND", timeout_s=_LOOK_S)
        try:
            info: dict[str, Any] = json.loads(said.splitlines()[-1])
        except (ValueError, IndexError):
            raise ClusterError(f"{self.machine.name}: {self.python} answers {said.strip()[:200]!r}") from None
        return info

    def start(self, script: str, token: str) -> None:
        """Run a `script`: Ray is up when it has ended. The token goes through standard input into
        a file of mode 600."""
        self.machine.run(script, given=token, timeout_s=_START_S)

    def script(
        self, arguments: Sequence[str], *, setup: Sequence[str] = (), environment: Mapping[str, str] = {}
    ) -> str:
        """Bash that starts Ray and waits until it is up; it wants the token on its standard input."""
        variables = {
            _MARK: self.cluster_id, "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", **environment,
        }  # fmt: skip
        start = shlex.join(["ray", "start", *arguments, "--disable-usage-stats", "--block"])
        lines = [
            "set -e -o pipefail",
            self._folder,
            '(umask 077; mkdir "$folder"; cat > "$folder/token"); cd "$folder"',
            "unset RAY_AUTH_TOKEN RAY_ADDRESS",
            *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
            'export RAY_AUTH_TOKEN_PATH="$folder/token"',
            # `ray`, and `python` in jobs, are those beside the Python that was named
            f'export PATH="$(dirname "$({_path(self.python)} -c "import sys; print(sys.executable)")"):$PATH"',
            *setup,
            f'setsid nohup {start} --temp-dir="$folder/r" > ray.log 2>&1 < /dev/null &',
            "ray=$!",
            "while ! grep -q -e --block ray.log; do",
            '  kill -0 $ray 2> /dev/null || { echo "Ray did not start:" >&2; tail -n 12 ray.log >&2; exit 1; }',
            "  sleep 0.2",
            "done",
        ]
        return "\n".join(lines)

    def end(self) -> None:
        """End Ray, its jobs and their workers, and remove the folder. If nothing is there, that is well too."""
        lines = [
            f"marked() {{ grep -lszx '{_MARK}={self.cluster_id}' /proc/[0-9]*/environ | cut -d/ -f3; }}",
            'first="$(marked)"',
            '[ -n "$first" ] && kill -TERM $first 2> /dev/null',
            f'for _ in $(seq {_ORDERLY_S * 5}); do [ -z "$(marked)" ] && break; sleep 0.2; done',
            'rest="$(marked)"',
            '[ -n "$rest" ] && kill -KILL $rest 2> /dev/null',
            self._folder,
            'rm -rf "$folder"',
        ]
        self.machine.run("\n".join(lines), timeout_s=_END_S)

    @property
    def _folder(self) -> str:
        return (
            f'folder="${{TMPDIR:-/tmp}}/muster-{self.cluster_id}"; [ ${{#folder}} -le {_LONGEST} ] || '
            f"folder=/tmp/muster-{self.cluster_id}"
        )


def _path(path: str) -> str:
    """Quoted for bash, except for a leading ~/."""
    return f"~/{shlex.quote(path[2:])}" if path.startswith("~/") else shlex.quote(path)
