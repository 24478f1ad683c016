"""A cluster of machines that are reached by SSH: real sshd, real Ray, from the command line of a fifth machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multihost.lab import Lab

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("sshd", path="/usr/sbin:/usr/bin") is None, reason="needs sshd (openssh-server)"),
]
HERE, HEAD, WORKERS, STRANGER = "a", "b", "cd", "e"
_PATIENCE_S = 240


class SshLab:
    """Machines with sshd: `a` gives the commands, `b` leads, `c` and `d` work,
    `e` is a stranger without a key or a token."""

    def __init__(self, lab: Lab, folder: Path):
        self.lab, self.folder = lab, folder
        self.home = folder / "home"
        self.home.mkdir()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
        for name in HEAD + WORKERS:
            self._start_sshd(name)
        self.options = [f"UserKnownHostsFile={folder}/known", "StrictHostKeyChecking=accept-new"]

    def _start_sshd(self, name: str) -> None:
        machine, folder = self.lab[name], self.lab[name].folder
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host")], check=True)
        # A login has the environment of nobody in particular; only where caches and homes are is the test's affair.
        lines = [
            f"HostKey {folder}/host", f"AuthorizedKeysFile {self.folder}/key.pub", "PasswordAuthentication no",
            "UsePAM no", "StrictModes no", f"PidFile {folder}/sshd.pid", "PermitRootLogin yes",
            f"SetEnv HOME={self.home} MUSTER_CACHE={folder}/cache TMPDIR={folder} OMP_NUM_THREADS=1",
        ]  # fmt: skip
        (folder / "sshd_config").write_text("\n".join(lines) + "\n")
        machine.run("mkdir", "-p", "/run/sshd", log=folder / "sshd.log").wait(60)
        machine.run("/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config"), log=folder / "sshd.log")

    def file(self, **changes: object) -> Path:
        """The cluster file."""
        spec = {
            "provider": "ssh",
            "name": "lab",
            "key": str(self.folder / "key"),
            "ssh_options": self.options,
            "python": str(Path(shutil.which("python", path=self.lab[HEAD].environment["PATH"]) or "")),
            "storage": str(self.folder / "runs"),  # every machine sees it: they share the disk
            "head": {"host": self.lab[HEAD].address},
            "pools": {"small": {"hosts": [self.lab[name].address for name in WORKERS], "cpus": 1}},
            **changes,
        }
        path = self.folder / "lab.yaml"
        path.write_text(json.dumps(spec))
        return path

    def muster(self, *words: str, machine: str = HERE, status: int | None = 0, **environment: str) -> str:
        """What a command prints on a machine, with its status checked."""
        log = self.folder / f"out-{time.monotonic_ns()}.log"
        own = {"HOME": str(self.home), "MUSTER_HOME": str(self.folder / "muster"), "RAY_AUTH_TOKEN": "", **environment}
        process = self.lab[machine].run("muster", *words, log=log, **own)
        code = process.wait(_PATIENCE_S)
        said = log.read_text()
        assert status is None or code == status, f"{words} exited with {code}:\n{said}"
        return said


@pytest.fixture(scope="module")
def ssh_lab() -> Iterator[SshLab]:
    # short names: Unix sockets live below
    with Lab(HERE + HEAD + WORKERS + STRANGER) as lab:
        yield SshLab(lab, lab.folder)


@pytest.fixture(scope="module")
def up(ssh_lab) -> Iterator[SshLab]:
    said = ssh_lab.muster("cluster", "up", str(ssh_lab.file()))
    assert "lab is up" in said
    yield ssh_lab
    ssh_lab.muster("cluster", "down", "lab", "--force")
    for machine in (ssh_lab.lab[name] for name in HEAD + WORKERS):
        if machine.outer.poll() is None:  # one was switched off in the last test
            assert machine.processes_with("raylet") == machine.processes_with("gcs_server") == []
    assert not (ssh_lab.folder / "muster/clusters/lab").exists()


@pytest.fixture
def job(up, place) -> Path:
    text = (place / "job.yaml").read_text().replace("workers: 1", "workers: 2")
    (place / "job.yaml").write_text(text)
    return place / "job.yaml"


def test_machines_that_cannot_be_reached_are_all_told_and_nothing_is_started(ssh_lab):
    gone = ["10.77.0.98", "10.77.0.99"]
    file = ssh_lab.file(pools={"x": {"hosts": gone}}, ssh_options=[*ssh_lab.options, "ConnectTimeout=2"])
    said = ssh_lab.muster("cluster", "up", str(file), status=2)
    assert all(f"{host}: cannot be reached" in said for host in gone)
    assert ssh_lab.lab[HEAD].processes_with("gcs_server") == []
    assert "no clusters" in ssh_lab.muster("cluster", "status")


def test_doctor_sees_what_is_missing(ssh_lab):
    assert "ok" in ssh_lab.muster("cluster", "doctor", str(ssh_lab.file()))
    said = ssh_lab.muster("cluster", "doctor", str(ssh_lab.file(python="/usr/bin/no-such-python")), status=1)
    assert said.count("NOT WELL") == 3


def test_a_job_trains_across_machines(up, job):
    said = up.muster("run", str(job), "--on", "lab")
    assert "sft: done; the model is in" in said
    events = [json.loads(line) for line in (up.folder / "runs/sums/events.jsonl").open()]
    (workers,) = [event["workers"] for event in events if event["event"] == "workers"]
    assert {worker["machine"] for worker in workers} == {up.lab[name].address for name in WORKERS}
    info = json.loads(up.muster("cluster", "status", "lab", "--json"))
    assert [(one["state"], len(one["nodes"])) for one in info] == [("up", 3)]


def test_the_token_is_in_no_file_but_its_own_and_in_no_command_line(up):
    home = up.folder / "muster/clusters/lab"
    token = (home / "token").read_text()
    assert (home / "token").stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700
    assert token not in (home / "cluster.json").read_text()
    assert token not in up.muster("cluster", "render", str(up.file()))
    assert all(up.lab[name].processes_with(token) == [] for name in HEAD + WORKERS)


def test_strangers_neither_submit_nor_read_nor_connect(up, job):
    """From another host, without a token and with a wrong one: the dashboard is on loopback,
    Ray's own door wants the token."""
    head = up.lab[HEAD].address
    said = up.muster("list", "--on", f"http://{head}:8265", machine=STRANGER, status=1)
    assert "does not answer" in said
    # Also on the head itself, where the dashboard listens, nobody is let in without the token.
    for token, answer in (("", "requires a token"), ("0" * 64, "rejects the token")):
        for verb in (("submit", str(job), "storage=s3://nowhere/runs"), ("list",), ("logs", "x"), ("stop", "x")):
            said = up.muster(*verb, "--on", "http://127.0.0.1:8265", machine=HEAD, status=2, RAY_AUTH_TOKEN=token)
            assert answer in said
    script = f"import ray; ray.init(address='{head}:6379', log_to_driver=False); print('let', 'in')"
    for settings in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        log = up.folder / f"stranger-{len(settings)}.log"
        process = up.lab[STRANGER].run("timeout", "90", "python", "-c", script, log=log, **settings)
        assert process.wait(120) != 0
        assert "let in" not in log.read_text()


def test_somebody_elses_cluster_is_reached_through_a_machine_that_sees_it(up):
    spec = {
        "provider": "existing", "address": "http://127.0.0.1:8265", "ssh": up.lab[HEAD].address,
        "key": str(up.folder / "key"),
        "ssh_options": up.options, "token_file": str(up.folder / "muster/clusters/lab/token"),
    }  # fmt: skip
    (up.folder / "theirs.yaml").write_text(json.dumps(spec))
    assert "3 machines are up" in up.muster("cluster", "doctor", str(up.folder / "theirs.yaml"))
    assert up.muster("list", "--on", str(up.folder / "theirs.yaml")) == up.muster("list", "--on", "lab")


def test_a_name_is_used_once(up):
    said = up.muster("cluster", "up", str(up.file()), status=2)
    assert "the cluster lab exists already" in said


@pytest.mark.faults
def test_following_survives_a_lost_connection(up, job):
    job.write_text(job.read_text().replace("name: sums", "name: followed").replace("max_steps: 4", "max_steps: 400"))
    log = up.folder / "followed.log"
    own = {"HOME": str(up.home), "MUSTER_HOME": str(up.folder / "muster"), "RAY_AUTH_TOKEN": ""}
    process = up.lab[HERE].run("muster", "run", str(job), "--on", "lab", log=log, **own)
    deadline = time.monotonic() + _PATIENCE_S
    while "sft  step" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    for tunnel in up.lab[HERE].processes_with("ssh", "-L"):
        os.kill(tunnel, 9)
    assert process.wait(_PATIENCE_S) == 0
    said = log.read_text()
    assert "the connection is lost" in said
    steps = [
        line.split()[2]
        for line in said.splitlines()
        if line.startswith("sft  step") and "loss" in line and "eval" not in line
    ]
    assert steps == [f"{step}/400" for step in range(1, 401)]


@pytest.mark.faults
def test_a_machine_is_lost_and_the_job_goes_on_with_the_other(up, job):
    """The last test: there is one machine less afterwards."""
    long = ("name=shrunk", "phases.sft.max_steps=400", "resources.min_workers=1", "resources.wait_for_machines=5")
    submitted = json.loads(up.muster("submit", str(job), *long, "--on", "lab", "--json"))
    metrics = up.folder / "runs/shrunk/sft/metrics.jsonl"
    deadline = time.monotonic() + _PATIENCE_S
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 20:
        assert time.monotonic() < deadline, up.muster("logs", submitted["id"], "--on", "lab")
        time.sleep(0.2)
    up.lab[WORKERS[1]].switch_off()
    said = up.muster("logs", "-f", submitted["id"], "--on", "lab")
    assert "continuing with 1 of 2 workers" in said
    assert "sft: done" in said
    assert "cannot be reached" in up.muster("cluster", "down", "lab", status=1)
    assert "lab" in up.muster("cluster", "status")
