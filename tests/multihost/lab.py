"""Machines that can be switched off and cut from the network: namespaces with addresses,
process tables and hostnames of their own.

    with Lab("abc") as lab:
        lab.start_ray(head="a")
        lab["a"].run("muster", ...)
        lab.cut("b"); lab.heal("b"); lab["c"].switch_off()

All of it lives in network namespaces that are named after this process and removed at the end;
nothing outside is touched.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

SUBNET = "10.77.0"
PORT = 6379
_BOOT = """
hostname {name}
mount -t tmpfs -o size=1g tmpfs /dev/shm
printf '127.0.0.1 localhost\\n{address} {name}\\n' > {folder}/hosts && mount --bind {folder}/hosts /etc/hosts
echo up
while :; do sleep 3600 & wait $!; done
"""
"""The first process of a machine: it reaps orphans, and everything on the machine ends with it."""


def _sh(*command: str) -> str:
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout


@cache
def why_not() -> str | None:
    """Why there can be no such machines here, if there cannot."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if missing := [tool for tool in ("ip", "unshare", "nsenter", "mount") if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)}"
    name = f"muster-{os.getpid()}-try"
    try:
        _sh("ip", "netns", "add", name)
        _sh("ip", "netns", "exec", name, "ip", "link", "add", "br0", "type", "bridge")
    except subprocess.CalledProcessError as error:
        return f"cannot make network namespaces: {error.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return None


class Machine:
    """One of them. `run` starts a command on it."""

    def __init__(self, name: str, address: str, folder: Path, environment: dict[str, str]):
        self.name, self.address, self.folder, self.environment = name, address, folder, environment
        self.space = f"muster-{os.getpid()}-{name}"
        self.processes: list[subprocess.Popen] = []
        self.folder.mkdir()

    def boot(self) -> None:
        script = _BOOT.format(name=self.name, address=self.address, folder=self.folder)
        self.outer = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                self.space,
                "unshare",
                "--pid",
                "--mount",
                "--uts",
                "--fork",
                "--kill-child=SIGKILL",
                "--mount-proc",
                "bash",
                "-c",
                script,
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.outer.stdout is not None
        assert self.outer.stdout.readline().strip() == "up"
        self.init = int(Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children").read_text().split()[0])

    def run(self, *command: str, log: Path, **environment: str) -> subprocess.Popen:
        """Start a command; its output goes to a file."""
        enter = ["nsenter", "-t", str(self.init), "-p", "-m", "-u", f"--net=/run/netns/{self.space}"]
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*enter, *command],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # signals to a group are for what is on the machine alone
                cwd=self.folder.parent,
                env={**os.environ, **self.environment, **environment},
            )
        self.processes.append(process)
        return process

    def processes_with(self, *words: str) -> list[int]:
        """Ids, as seen from outside, of the machine's processes whose command line has all the words."""
        space = os.readlink(f"/proc/{self.init}/ns/pid")
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if os.readlink(path / "ns/pid") == space and all(word in line for word in words):
                    found.append(int(path.name))
        return found

    def switch_off(self) -> None:
        """Every process of it is gone at once, as without power."""
        if self.outer.poll() is None:
            os.kill(self.init, signal.SIGKILL)
        self.outer.wait(60)
        for process in self.processes:
            process.wait(60)


class Lab:
    """Machines a, b, c ... on one switch."""

    def __init__(self, names: Sequence[str]):
        self.folder = Path(tempfile.mkdtemp(prefix="lab-"))
        self.switch = f"muster-{os.getpid()}-switch"
        environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # the tests' own Ray is told to stay on loopback by this
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        self.machines = {
            name: Machine(name, f"{SUBNET}.{11 + number}", self.folder / name, environment)
            for number, name in enumerate(names)
        }

    def __getitem__(self, name: str) -> Machine:
        return self.machines[name]

    @property
    def spaces(self) -> list[str]:
        return [self.switch, *(machine.space for machine in self.machines.values())]

    def __enter__(self) -> Lab:
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _build(self) -> None:
        _sh("ip", "netns", "add", self.switch)
        _sh("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge")
        _sh("ip", "-n", self.switch, "link", "set", "br0", "up")
        for machine in self.machines.values():
            name, space = machine.name, machine.space
            _sh("ip", "netns", "add", space)
            _sh(
                "ip",
                "-n",
                self.switch,
                "link",
                "add",
                f"to-{name}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                space,
            )
            _sh("ip", "-n", self.switch, "link", "set", f"to-{name}", "master", "br0", "up")
            _sh("ip", "-n", space, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _sh("ip", "-n", space, "link", "set", device, "up")
            machine.boot()

    def __exit__(self, *exc: object) -> None:
        for machine in self.machines.values():
            if hasattr(machine, "outer"):
                machine.switch_off()
        for space in self.spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def renew(self, name: str, cpus: int = 1) -> None:
        """Whatever was done to a machine: switch it off and on, and have it join the cluster."""
        self.heal(name)
        self.machines[name].switch_off()
        self.machines[name].boot()
        self.join(name, cpus)

    def cut(self, name: str) -> None:
        """Pull the cable: nobody is told."""
        _sh("ip", "-n", self.switch, "link", "set", f"to-{name}", "down")

    def heal(self, name: str) -> None:
        _sh("ip", "-n", self.switch, "link", "set", f"to-{name}", "up")

    @property
    def address(self) -> str:
        """Of the Ray cluster."""
        return f"{self.machines[self.head].address}:{PORT}"

    def start_ray(self, head: str, cpus: int = 2) -> None:
        """A Ray cluster of all machines. The head, where the driver runs, has no place for workers."""
        self.head = head
        self.join(head, 0)
        for name in self.machines:
            if name != head:
                self.join(name, cpus)

    def join(self, name: str, cpus: int = 2) -> None:
        """Start Ray on a machine, and wait until it is up."""
        machine = self.machines[name]
        log = self.folder / f"ray-{name}-{time.monotonic_ns()}.log"
        where = (
            ["--head", f"--port={PORT}", "--include-dashboard=false"]
            if name == self.head
            else [f"--address={self.address}"]
        )
        machine.run(
            "ray", "start", *where, f"--node-ip-address={machine.address}", f"--num-cpus={cpus}", "--block",
            f"--temp-dir={machine.folder}", "--object-store-memory=100000000", log=log,
        )  # fmt: skip
        deadline = time.monotonic() + 90
        while "--block" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            assert machine.processes[-1].poll() is None, log.read_text()
            time.sleep(0.2)
