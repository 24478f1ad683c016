"""Jobs through a real Slurm: munged, slurmctld and slurmd on this machine, on loopback, of the test's own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.remote_shell import free_port
from tests.launcher.submit.test_jobs_on_cluster import Commands, until

_PATH = f"/usr/sbin:{os.environ['PATH']}"
_MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=_PATH) is None]
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(_MISSING) or os.geteuid() != 0, reason=f"needs root and {', '.join(_MISSING)}"),
]
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=30
MinJobAge=10
SchedulerParameters=batch_sched_delay=0,requeue_delay=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A cluster of one node with two cores."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("munge", "state", "spool"):
            (folder / name).mkdir(mode=0o700)
        (folder / "munge/key").write_bytes(os.urandom(1024))
        (folder / "munge/key").chmod(0o400)
        ports = (free_port(), free_port())
        (folder / "slurm.conf").write_text(
            CONFIG.format(host=socket.gethostname().split(".")[0], folder=folder, ports=ports)
        )
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        munge = folder / "munge"
        self.started = [
            self._start(
                "munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/sock",
                f"--pid-file={munge}/pid",
                f"--log-file={munge}/log", f"--seed-file={munge}/seed",
            )
        ]  # fmt: skip
        until((munge / "sock").exists, lambda: "no munged")
        self.started += [self._start("slurmctld", "-D"), self._start("slurmd", "-D")]
        until(lambda: "idle" in self("sinfo", "--noheader"), lambda: (folder / "slurmctld.log").read_text())

    def _start(self, *command: str) -> subprocess.Popen:
        with (self.folder / "daemons.log").open("ab") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def __call__(self, *command: str) -> str:
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        ).stdout

    def close(self) -> None:
        self("scancel", "--me", "--signal=KILL")
        self("scancel", "--me")
        until(lambda: not self("squeue", "--noheader"), lambda: self("squeue"))
        for process in reversed(self.started):
            process.send_signal(signal.SIGTERM)
            process.wait(30)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    yield slurm
    slurm.close()


@pytest.fixture
def muster(slurm, place) -> Commands:
    """`muster` where sbatch is; jobs go to slurm.yaml in the current folder."""
    commands = Commands(slurm.folder)
    commands.environment |= {"PATH": _PATH, "SLURM_CONF": str(slurm.folder / "slurm.conf")}
    spec = {
        "provider": "slurm", "folder": str(slurm.folder / "jobs"), "workers_per_node": 1,
        "storage": str(place / "runs"),
        "python": shutil.which("python"), "shared": [str(place)], "stop_s": 60,
        "setup": [
            f"export MUSTER_CACHE={slurm.folder}/cache OMP_NUM_THREADS=1 RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0",
            "hostname() { echo 127.0.0.1; }",  # the test stays on loopback
        ],
    }  # fmt: skip
    (place / "slurm.yaml").write_text(json.dumps(spec))
    return commands


ON = ("--on", "slurm.yaml")
FOREVER = ("phases.sft.max_steps=1000000", "phases.sft.checkpoint.every=500000")


def info_of(muster: Commands, name: str) -> dict:
    return json.loads(muster("status", name, *ON, "--json"))[0]


def submitted(muster: Commands, *overrides: str) -> str:
    return json.loads(muster("submit", "job.yaml", *overrides, *ON, "--json"))["id"]


def test_doctor_sees_slurm_and_the_folder(muster):
    said = muster("cluster", "doctor", "slurm.yaml")
    assert said.count("ok") == 3
    assert "main* 1 nodes up" in said


def test_a_job_gets_an_allocation_trains_and_is_followed_to_its_end(muster, slurm, place):
    (place / "data/train.jsonl").rename(place / "data/rows.jsonl")
    (place / "job.yaml").write_text(
        "env: [MY_SECRET]\n" + (place / "job.yaml").read_text().replace("train.jsonl", "rows.jsonl")
    )
    said = muster("run", "job.yaml", *ON, MY_SECRET="hush-hush-9")
    assert "sft: done; the model is in" in said
    assert (place / "runs/sums/sft/model/model.safetensors").exists()
    (info,) = json.loads(muster("list", *ON, "--json"))
    assert (info["state"], info["exit_status"], info["run"]) == ("succeeded", 0, str(place / "runs/sums"))
    found = subprocess.run(
        ["grep", "-rlaF", "hush-hush-9", str(slurm.folder / "jobs"), str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == ""


def test_bad_rows_are_told_and_the_job_fails_with_their_status(muster, place):
    (place / "data/train.jsonl").write_text('{"prompt": "a"}\n')
    said = muster("run", "job.yaml", "name=bad", *ON, status=2)
    assert "train.jsonl:1" in said


def test_a_job_that_is_taken_back_saves_is_queued_again_and_goes_on(muster, slurm, place):
    name = submitted(muster, "name=taken", *FOREVER)
    metrics = place / "runs/taken/sft/metrics.jsonl"
    until(lambda: metrics.exists() and metrics.stat().st_size, lambda: muster("logs", name, *ON))
    number = (slurm.folder / "jobs" / name / "number").read_text().strip()
    saved = json.loads(muster("save", name, *ON, "--json"))
    assert (Path(saved["checkpoint"]) / "manifest.json").exists()
    # As at the end of the allocation's time, or from a scheduler that wants the node: SIGTERM to the batch script.
    slurm("scancel", "--batch", "--signal=TERM", number)
    until(lambda: "resuming after step" in muster("logs", name, *ON), lambda: muster("logs", name, *ON))
    events = [json.loads(line) for line in (place / "runs/taken/events.jsonl").open()]
    assert [event["attempt"] for event in events if event["event"] == "started"] == [1, 2]
    assert "checkpoint" in [event["event"] for event in events]
    assert info_of(muster, name)["state"] == "running"
    waiting = submitted(muster, "name=waiting", "resources.workers=1", *FOREVER)
    second = submitted(muster, "name=second", *FOREVER)  # two cores: one of the two has to wait
    until(
        lambda: {"running", "pending"} == {info_of(muster, one)["state"] for one in (waiting, second)},
        lambda: slurm("squeue"),
    )
    (pending,) = [one for one in (waiting, second) if info_of(muster, one)["state"] == "pending"]
    assert info_of(muster, pending)["message"] == "waits: Resources"
    for one in (pending, name, *({waiting, second} - {pending})):
        assert "stopped" in muster("stop", one, *ON)
    assert info_of(muster, name)["state"] == "stopped"
    assert not slurm("squeue", "--noheader").strip() or "CG" in slurm("squeue", "--noheader")


def test_what_slurm_refuses_is_told(muster, place):
    text = (place / "slurm.yaml").read_text().replace('"stop_s"', '"partition": "nowhere", "stop_s"')
    (place / "slurm.yaml").write_text(text)
    said = muster("submit", "job.yaml", *ON, status=2)
    assert "Slurm rejects the job" in said
    assert "invalid partition" in said
