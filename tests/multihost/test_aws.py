"""A cluster on EC2: moto answers as AWS would, machines of namespaces are the instances, with a real sshd each.

Ray's cluster launcher, SSH, the token, the autoscaler on the head and the jobs are all real;
only who gives machines is not Amazon.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.submit.test_jobs_on_cluster import until
from tests.multihost.lab import Lab, Machine

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        any(shutil.which(name, path="/usr/sbin:/usr/bin") is None for name in ("sshd", "rsync")),
        reason="needs sshd and rsync",
    ),
]
HERE, BODIES = "a", "bcd"
PORT = 5000
_PATIENCE_S = 240
HEAD, WORKER = "m5.2xlarge", "p4d.24xlarge"


class Ec2Lab:
    """`a` gives the commands and answers for AWS; `b`, `c`, `d` become instances."""

    def __init__(self, lab: Lab):
        self.lab, self.folder = lab, lab.folder
        api = lab[HERE].address
        self.credentials = {
            "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-west-2",
            "AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": f"http://{api}:{PORT}", "MUSTER_CLOUD": "none",
        }  # fmt: skip
        self.state_file = self.folder / "ec2.json"
        subprocess.run(["ip", "-n", lab[HERE].space, "addr", "add", "172.31.255.254/16", "dev", "eth0"], check=True)
        root = Path(__file__).parents[2]
        self.api = lab[HERE].run(
            sys.executable, str(root / "tests/support/ec2.py"), api, str(PORT), str(self.state_file),
            log=self.folder / "ec2.log", PYTHONPATH=str(root), **self.credentials,
        )  # fmt: skip
        until(self.state_file.exists, lambda: (self.folder / "ec2.log").read_text())
        self.body_of: dict[str, str] = {}
        """Machine of an instance, by its id."""
        self.ended = threading.Event()
        self.giver = threading.Thread(target=self._give_bodies, daemon=True)
        self.giver.start()

    def close(self) -> None:
        self.ended.set()
        self.giver.join(20)
        self.api.send_signal(signal.SIGTERM)

    def state(self) -> dict[str, Any]:
        return json.loads(self.state_file.read_text())

    def instances(self, state: str = "running") -> list[dict[str, Any]]:
        return [one for one in self.state()["instances"] if one["state"] == state]

    def _give_bodies(self) -> None:
        while not self.ended.wait(0.2):
            running = {one["id"]: one for one in self.instances()}
            for instance, name in self.body_of.items():
                if (off := self.lab[name].folder / "off").exists():
                    off.unlink()
                    Path(f"{self.state_file}.off.{instance}").touch()
            for gone in self.body_of.keys() - running.keys():
                name = self.body_of.pop(gone)
                self.lab[name].switch_off()
                subprocess.run(
                    [
                        "ip",
                        "-n",
                        self.lab[name].space,
                        "addr",
                        "flush",
                        "dev",
                        "eth0",
                        "scope",
                        "global",
                        "to",
                        "172.31.0.0/16",
                    ],
                    check=True,
                )
                self.lab[name].boot()
            free = [name for name in BODIES if name not in self.body_of.values()]
            for one, name in zip(
                (one for one in running.values() if one["id"] not in self.body_of), free, strict=False
            ):
                self._give(name, one)
                self.body_of[one["id"]] = name

    def _give(self, name: str, instance: dict[str, Any]) -> None:
        """What the cloud does when an instance starts: an address,
        and the key of its user data for those who log in."""
        machine, folder = self.lab[name], self.lab[name].folder
        subprocess.run(
            ["ip", "-n", machine.space, "addr", "add", f"{instance['address']}/16", "dev", "eth0"], check=True
        )
        home = folder / "home"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        keys = re.search(r"ssh_authorized_keys: (\[.*\])", instance["user_data"])
        assert keys is not None
        (folder / "keys").write_text("\n".join(json.loads(keys[1])))
        if not (folder / "host").exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host")], check=True)
        self._have_shutdown(machine)
        variables = {"MUSTER_CACHE": folder / "cache", "OMP_NUM_THREADS": 1, **self.credentials}
        lines = [
            f"HostKey {folder}/host", f"AuthorizedKeysFile {folder}/keys", "PasswordAuthentication no", "UsePAM no",
            "StrictModes no", f"PidFile {folder}/sshd.pid", "PermitRootLogin yes",
            f"SetEnv {' '.join(f'{key}={value}' for key, value in variables.items())}",
        ]  # fmt: skip
        (folder / "sshd_config").write_text("\n".join(lines) + "\n")
        # ssh asks the system, not HOME, where ~ is
        (folder / "passwd").write_text(
            re.sub(r"(?m)^(root:.*):[^:]*:([^:]*)$", rf"\1:{home}:\2", Path("/etc/passwd").read_text())
        )
        (folder / "ray").mkdir(exist_ok=True)
        mounts = ((folder / "passwd", "/etc/passwd"), (folder / "ray", "/tmp/ray"))
        for command in (
            ("mkdir", "-p", "/run/sshd", "/tmp/ray"),
            *(("mount", "--bind", str(own), there) for own, there in mounts),
        ):
            assert machine.run(*command, log=folder / "sshd.log").wait(60) == 0
        machine.run("/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config"), log=folder / "sshd.log")

    def _have_shutdown(self, machine: Machine) -> None:
        """`shutdown` on it shuts nothing down but says so in a file; also by its own path,
        since that would be the one of the real machine."""
        program = machine.folder / "bin/shutdown"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ntouch {machine.folder}/off\n")
        program.chmod(0o755)
        (machine.folder / "home/.profile").write_text(f'export PATH="{program.parent}:$PATH"\n')
        if (real := shutil.which("shutdown", path="/usr/sbin:/sbin")) is not None:
            bind = machine.run("mount", "--bind", str(program), os.path.realpath(real), log=machine.folder / "sshd.log")
            assert bind.wait(60) == 0

    def machine_of(self, instance: dict[str, Any]) -> Machine:
        return self.lab[self.body_of[instance["id"]]]

    def file(self, name: str = "cloud", **changes: object) -> Path:
        """The cluster file."""
        python = str(Path(shutil.which("python", path=self.lab[HERE].environment["PATH"]) or ""))
        pool = {"instance": WORKER, "max": 2, "cpus": 1, "market": "spot-first", "spot_price": 11.5, "price": 22}
        spec = {
            "provider": "aws", "name": name, "region": "us-west-2", "image": "ami-03cf127a", "user": "root",
            "instance_profile": "trainer", "private": True, "python": python, "storage": str(self.folder / "runs"),
            "head": {"instance": HEAD, "price": 0.5}, "pools": {"big": pool}, "idle_minutes": 1, "shared": ["/"],
            "setup": ["touch ~/was-set-up"], **changes,
        }  # fmt: skip
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(spec))
        return path

    def command(self, *words: str, log: Path, **environment: str) -> subprocess.Popen:
        own = {
            "HOME": str(self.folder), "MUSTER_HOME": str(self.folder / "muster"), "RAY_AUTH_TOKEN": "",
            **self.credentials, **environment,
        }  # fmt: skip
        return self.lab[HERE].run("muster", *words, log=log, **own)

    def muster(self, *words: str, status: int = 0, **environment: str) -> str:
        log = self.folder / f"out-{time.monotonic_ns()}.log"
        code = self.command(*words, log=log, **environment).wait(_PATIENCE_S)
        said = log.read_text()
        assert code == status, f"{words} exited with {code}:\n{said}"
        return said


@pytest.fixture(scope="module")
def ec2_lab() -> Iterator[Ec2Lab]:
    with Lab(HERE + BODIES) as lab:
        made = Ec2Lab(lab)
        yield made
        made.close()


def test_no_credentials_are_told_before_anything_is_started(ec2_lab):
    nobody = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_SHARED_CREDENTIALS_FILE": "/nowhere"}
    said = ec2_lab.muster("cluster", "up", str(ec2_lab.file()), status=2, **nobody)
    assert "AWS: Unable to locate credentials; set AWS_PROFILE" in said
    assert ec2_lab.instances() == []
    assert "no clusters" in ec2_lab.muster("cluster", "status")


def test_doctor_asks_aws(ec2_lab):
    said = ec2_lab.muster("cluster", "doctor", str(ec2_lab.file()))
    assert f"{WORKER}: may be started" in said


def test_a_cluster_comes_up_grows_for_a_job_shrinks_and_leaves_nothing(ec2_lab, place):
    said = ec2_lab.muster("cluster", "up", str(ec2_lab.file()))
    assert "cloud is up" in said
    (head,) = ec2_lab.instances()
    assert (head["type"], head["spot"]) == (HEAD, False)
    home = ec2_lab.folder / "muster/clusters/cloud"
    token = (home / "token").read_text()
    assert token not in said + ec2_lab.muster("cluster", "render", str(ec2_lab.file())) + json.dumps(ec2_lab.state())
    machine = ec2_lab.machine_of(head)
    assert (machine.folder / "home/.muster/token").read_text() == token
    assert (machine.folder / "home/.muster/token").stat().st_mode & 0o777 == 0o600
    assert (machine.folder / "home/was-set-up").exists()

    # from outside: SSH, and nothing else
    (rules,) = [rules for name, rules in ec2_lab.state()["groups"].items() if "muster-cloud" in name]
    open_to_all = [rule for rule in rules if rule.get("IpRanges") or rule.get("Ipv6Ranges")]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in open_to_all] == [(22, 22)]

    said = ec2_lab.muster("run", str(place / "job.yaml"), "resources.workers=2", "--on", "cloud")
    assert "pending: 2 big-spot" in said
    assert "sft: done; the model is in" in said
    workers = [one for one in ec2_lab.instances() if one["type"] == WORKER]
    assert [one["spot"] for one in workers] == [True, True]
    assert ", 23.50 an hour, jobs: none" in ec2_lab.muster(
        "cluster", "status", "cloud"
    )  # the head, and two spot machines

    until(lambda: len(ec2_lab.instances()) == 1, ec2_lab.instances)  # idle for a minute
    Path(f"{ec2_lab.state_file}.no-spot").touch()
    said = ec2_lab.muster("run", str(place / "job.yaml"), "name=dear", "resources.workers=2", "--on", "cloud")
    assert "big-spot was refused: see monitor.log on the head; requesting on-demand machines" in said
    assert "sft: done; the model is in" in said
    assert [one["spot"] for one in ec2_lab.instances() if one["type"] == WORKER] == [False, False]
    assert "cloud is down" in ec2_lab.muster("cluster", "down", "cloud")
    assert ec2_lab.instances() == []
    assert not any("muster-cloud" in name for name in ec2_lab.state()["groups"])
    assert not home.exists()


def test_interrupted_in_the_middle_of_up_nothing_is_left(ec2_lab):
    log = ec2_lab.folder / "up.log"
    process = ec2_lab.command("cluster", "up", str(ec2_lab.file("halfway", setup=["sleep 600"])), log=log)
    until(lambda: "sleep 600" in log.read_text(), log.read_text)
    for pid in ec2_lab.lab[HERE].processes_with("launcher", "up") or ec2_lab.lab[HERE].processes_with("muster", "up"):
        subprocess.run(["kill", "-INT", str(pid)], check=False)
    process.wait(_PATIENCE_S)
    assert "ending what was started" in log.read_text()
    assert ec2_lab.instances() == []
    assert "no clusters" in ec2_lab.muster("cluster", "status")


def test_machines_whose_head_is_gone_end_themselves_and_nothing_is_left(ec2_lab):
    pool = {"instance": WORKER, "min": 2, "max": 2, "cpus": 1, "price": 22}
    ec2_lab.muster("cluster", "up", str(ec2_lab.file("lonely", pools={"big": pool}, orphan_minutes=1, idle_minutes=60)))
    until(lambda: len(ec2_lab.instances()) == 3, ec2_lab.state)
    head, *workers = sorted(ec2_lab.instances(), key=lambda one: one["type"] != HEAD)
    until(lambda: all(one["id"] in ec2_lab.body_of for one in workers), ec2_lab.state)
    machines = [ec2_lab.machine_of(one) for one in workers]
    logs = [machine.folder / "home/.muster/orphan_watch.log" for machine in machines]
    until(lambda: all(machine.processes_with("raylet") for machine in machines), ec2_lab.state)
    assert [log.read_text().count("watching the head") for log in logs] == [1, 1]

    (ec2_lab.machine_of(head).folder / "off").touch()
    until(lambda: head["id"] not in ec2_lab.body_of, ec2_lab.state)
    said = ec2_lab.muster("cluster", "status", "lonely")
    assert "the cloud still has 2 of its machines, 44.00 an hour" in said
    assert all(f"{one['id']}" in said for one in workers)
    until(lambda: ec2_lab.instances() == [], ec2_lab.state)
    assert {one["state"] for one in ec2_lab.state()["instances"]} == {"terminated"}
    assert all(
        "did not answer for 1 minutes; this machine ends itself: shutdown -h now" in log.read_text() for log in logs
    )
    assert "lonely is down" in ec2_lab.muster("cluster", "down", "lonely")
    assert not any("muster-lonely" in name for name in ec2_lab.state()["groups"])
