"""A run on several machines of which some are lost, cut off, drained or come back: it goes on by itself, on the same curve."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import lab as labs
from tests.cluster.lab import Lab
from tests.launcher.test_run import STEPS, make_folder, whole

__all__ = ["whole"]
pytestmark = pytest.mark.skipif(labs.why_not() is not None, reason=str(labs.why_not()))

DRIVER, WORKING = "a", "bcd"
SETTINGS = ("resources.threads=1", "phases.sft.checkpoint.every=20", "resources.gpus_per_worker=0")
LIMIT_S = 180


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A machine for the driver, and three with a place for one worker each."""
    with Lab(DRIVER + WORKING) as lab:
        lab.start_ray(DRIVER, cpus=1)
        yield lab


class Run:
    """`muster run` on the driver's machine, for as long as a test lasts."""

    def __init__(self, lab: Lab, folder: Path):
        self.lab, self.folder, self.log = lab, folder, folder / "out.txt"

    def start(self, *settings: str) -> None:
        self.process = self.lab[DRIVER].run(
            sys.executable, "-m", "launcher.cli", "run", str(self.folder / "job.yaml"), f"storage={self.folder}/runs",
            *SETTINGS, *settings, log=self.log, RAY_ADDRESS=self.lab.address, MUSTER_CACHE=str(self.folder / "cache"),
        )  # fmt: skip

    def rows(self, file: str) -> list[dict]:
        path = self.folder / "runs/job" / file
        return [json.loads(line) for line in path.open()] if path.exists() else []

    def events(self, kind: str) -> list[dict]:
        return [row for row in self.rows("events.jsonl") if row["event"] == kind]

    @property
    def steps(self) -> list[dict]:
        return [row for row in self.rows("sft/metrics.jsonl") if "loss" in row]

    def wait_for(self, condition, what: str, limit_s: float = LIMIT_S) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come:\n{self.log.read_text()}"
            assert self.process.poll() is None, f"it ended before {what}:\n{self.log.read_text()}"
            time.sleep(0.2)

    def reach(self, step: int) -> None:
        self.wait_for(lambda: self.steps and self.steps[-1]["step"] >= step, f"step {step}")

    def machine_of(self, rank: int) -> str:
        """Name of the machine of a worker."""
        address = self.events("workers")[-1]["workers"][rank]["machine"]
        return next(name for name, machine in self.lab.machines.items() if machine.address == address)

    def finish(self) -> str:
        """What it printed, once it has ended well."""
        status = self.process.wait(LIMIT_S)
        out = self.log.read_text()
        assert status == 0, out
        return out

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.steps]

    @property
    def weights(self) -> bytes:
        return (self.folder / "runs/job/sft/model/model.safetensors").read_bytes()


@pytest.fixture
def run(lab, tiny, tmp_path) -> Iterator[Run]:
    run = Run(lab, make_folder(tiny, tmp_path))
    yield run
    if run.process.poll() is None:
        lab[DRIVER].run("pkill", "-9", "-f", "launcher.cli", log=run.log).wait(10)


def undisturbed(whole) -> tuple[list[float], bytes]:
    folder, _ = whole
    rows = map(json.loads, (folder / "runs/job/sft/metrics.jsonl").open())
    return [row["loss"] for row in rows if "loss" in row], (
        folder / "runs/job/sft/model/model.safetensors"
    ).read_bytes()


def test_a_machine_that_is_switched_off_is_replaced(lab, run, whole):
    run.start("resources.workers=2")
    run.reach(25)
    lost = run.machine_of(1)
    began = time.monotonic()
    lab[lost].switch_off()
    run.wait_for(lambda: run.events("incident"), "the loss", 15)
    noticed = time.monotonic() - began
    out = run.finish()
    print(f"noticed after {noticed:.1f} s")
    (incident,) = run.events("incident")
    assert (incident["class"], incident["node"]) == ("lost machine", lab[lost].address), out
    assert len(run.events("started")) == 2
    assert (run.losses, run.weights) == undisturbed(whole)
    lab[lost].boot()
    lab.join(lost, cpus=1)


def test_a_machine_that_is_cut_off_is_replaced_and_cannot_commit_when_it_is_back(lab, run, whole):
    run.start("resources.workers=2")
    run.reach(25)
    lost = run.machine_of(1)
    lab.cut(lost)
    run.wait_for(lambda: run.events("incident"), "the loss", 15)
    run.wait_for(lambda: run.events("restored"), "the second attempt")
    lab.heal(lost)
    run.finish()
    (incident,) = run.events("incident")
    assert (incident["class"], incident["node"]) == ("lost machine", lab[lost].address)
    assert (run.losses, run.weights) == undisturbed(whole)
    wait_until(lambda: not lab[lost].processes_with("launcher.nursery"), "the cut-off worker lives on")
    rejoin(lab, lost)


def wait_until(condition, what: str, limit_s: float = 90) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def rejoin(lab: Lab, name: str) -> None:
    """Start Ray anew on a machine that the cluster has given up."""
    subprocess.run(["kill", "-9", *map(str, lab[name].processes_with("raylet"))], check=False, capture_output=True)
    wait_until(lambda: not lab[name].processes_with("ray start"), "ray start is still there")
    lab.join(name, cpus=1)


def test_fewer_machines_go_on_and_the_run_grows_again_when_they_are_back(lab, run, whole):
    run.start("resources.workers=3", "resources.min_workers=2", "resources.wait_for_machines=5")
    run.reach(25)
    lost = run.machine_of(2)
    lab[lost].switch_off()
    run.wait_for(lambda: len(run.events("restored")) == 1, "going on with two")
    run.reach(45)
    assert run.steps[-1]["workers"] == 2
    lab[lost].boot()
    lab.join(lost, cpus=1)
    run.wait_for(lambda: run.events("moved"), "growing")
    run.finish()
    assert run.steps[-1]["workers"] == 3
    losses, _ = undisturbed(whole)
    assert run.losses == pytest.approx(losses, rel=1e-4)  # the sums of two, three and two workers round differently
    assert len(run.losses) == STEPS


def test_a_machine_that_is_drained_is_left_before_it_goes(lab, run, whole):
    run.start("resources.workers=2")
    run.reach(25)
    leaving = run.machine_of(1)
    node = next(n for n in nodes(run) if n["address"] == lab[leaving].address)["id"]
    lab[DRIVER].run(
        "ray", "drain-node", "--address", lab.address, "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message", "spot", "--deadline-remaining-seconds", "60", log=run.folder / "drain.txt",
    ).wait(60)  # fmt: skip
    run.wait_for(lambda: run.events("moved"), "the move")
    run.finish()
    assert not run.events("incident")
    assert leaving not in {run.machine_of(0), run.machine_of(1)}
    assert (run.losses, run.weights) == undisturbed(whole)


def nodes(run: Run) -> list[dict]:
    """Machines of the cluster: id and address."""
    code = (
        "import ray, json; ray.init(logging_level='ERROR', log_to_driver=False); "
        "print(json.dumps([{'id': n['NodeID'], 'address': n['NodeManagerAddress']} for n in ray.nodes() if n['Alive']]))"
    )
    log = run.folder / "nodes.txt"
    run.lab[DRIVER].run(sys.executable, "-c", code, log=log, RAY_ADDRESS=run.lab.address).wait(60)
    return json.loads(log.read_text().splitlines()[-1])
