"""A run on several machines of which some are lost, cut off, drained or come back: it goes on
by itself, on the same curve."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.multihost.conftest import DRIVER, LabRun

pytestmark = pytest.mark.faults


@pytest.fixture
def victim(lab, run) -> Iterator[str]:
    """A machine with a worker, once the run trains; as good as new after the test."""
    run.start()
    run.reach(20)
    name = run.machine_of(1)
    yield name
    lab.renew(name)


def test_a_machine_that_is_switched_off_is_replaced(lab, run, victim, undisturbed):
    lab[victim].switch_off()
    run.wait_for(lambda: run.events("incident"), "the loss", 60)
    out = run.finish()
    assert (run.incident["class"], run.incident["node"]) == ("lost machine", lab[victim].address), out
    assert len(run.events("started")) == 2
    assert run.result == undisturbed


def test_a_machine_whose_ray_is_killed_is_replaced(lab, run, victim, undisturbed):
    for pid in lab[victim].processes_with("raylet/raylet"):
        os.kill(pid, signal.SIGKILL)
    run.wait_for(lambda: run.events("incident"), "the loss", 60)
    run.finish()
    assert (run.incident["class"], run.incident["node"]) == ("lost machine", lab[victim].address)
    assert run.result == undisturbed


def test_a_machine_that_is_cut_off_is_replaced_and_its_worker_does_not_stay(lab, run, victim, undisturbed):
    lab.cut(victim)
    run.wait_for(lambda: run.events("incident"), "the loss", 60)
    run.wait_for(lambda: len(run.events("training")) == 2, "the second attempt")
    lab.heal(victim)
    run.finish()
    assert (run.incident["class"], run.incident["node"]) == ("lost machine", lab[victim].address)
    assert run.result == undisturbed
    wait_until(
        lambda: not lab[victim].processes_with("launcher.workers.fork_server"), "the worker that was cut off lives on"
    )


def test_a_machine_that_is_drained_is_left_before_it_goes(lab, run, victim, undisturbed):
    node = next(node for node in nodes(run) if node["address"] == lab[victim].address)["id"]
    lab[DRIVER].run(
        "ray", "drain-node", "--address", lab.address, "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message", "spot", "--deadline-remaining-seconds", "60", log=run.folder / "drain.txt",
    ).wait(60)  # fmt: skip
    run.wait_for(lambda: run.events("moved"), "the move")
    run.finish()
    assert run.events("incident") == []
    assert victim not in {run.machine_of(0), run.machine_of(1)}
    assert run.result == undisturbed


def test_fewer_machines_go_on_and_the_run_grows_again_when_they_are_back(lab, run, undisturbed):
    slow = "phases.sft.micro_batch=4"
    run.start("resources.workers=3", "resources.min_workers=2", "resources.wait_for_machines=5", slow)
    run.reach(20)
    lost = run.machine_of(2)
    lab[lost].switch_off()
    run.wait_for(lambda: len(run.events("training")) == 2, "going on with two")
    lab.renew(lost)
    run.wait_for(lambda: run.events("moved"), "growing")
    run.finish()
    assert [len(event["workers"]) for event in run.events("workers")] == [3, 2, 3]
    assert run.result.losses == pytest.approx(
        undisturbed.losses, rel=1e-4
    )  # sums of two and three workers round differently


def test_a_machine_with_other_packages_is_found_before_the_first_step_and_avoided(lab, run, undisturbed):
    """As Python sees them there: an entry of its own in PYTHONPATH stands before what is installed."""
    other = run.folder / "other" / "peft-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n")
    lab["b"].environment = {**lab["b"].environment, "PYTHONPATH": str(other.parent)}
    lab.renew("b")
    try:
        run.start("resources.workers=3", "resources.min_workers=2", "resources.wait_for_machines=5")
        out = run.finish()
    finally:
        lab["b"].environment = {name: value for name, value in lab["b"].environment.items() if name != "PYTHONPATH"}
        lab.renew("b")
    assert (run.incident["class"], run.incident["node"]) == ("unfit machine", lab["b"].address), out
    assert "has peft 0.0.1, the others" in run.incident["message"]
    assert [len(event["workers"]) for event in run.events("workers")] == [3, 2]
    assert run.events("training")[0]["attempt"] == 2
    assert run.result == undisturbed


def test_a_machine_on_which_two_workers_died_is_avoided(lab, run, victim, undisturbed):
    for attempt in (1, 2):
        run.wait_for(lambda attempt=attempt: len(run.events("training")) == attempt, f"attempt {attempt}")
        rank = next(rank for rank in (0, 1) if run.machine_of(rank) == victim)
        run.reach(20 * attempt)
        lab[victim].run("kill", "-9", str(run.worker(rank)["pid"]), log=run.log).wait(60)
        run.wait_for(lambda attempt=attempt: len(run.events("incident")) == attempt, f"incident {attempt}")
    out = run.finish()
    assert f"excluded from now on: {lab[victim].address}" in out
    assert victim not in {run.machine_of(0), run.machine_of(1)}
    assert run.result == undisturbed


METADATA = """
from http.server import BaseHTTPRequestHandler, HTTPServer
class Taken(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"TRUE")
HTTPServer(("127.0.0.1", 8123), Taken).serve_forever()
"""


def test_a_spot_machine_is_left_when_its_cloud_says_so(lab, run, undisturbed, monkeypatch):
    """The metadata service of one machine says that it is preempted; those of the others do not answer."""
    monkeypatch.setenv("MUSTER_CLOUD", "gcp")
    monkeypatch.setenv("MUSTER_METADATA_URL", "http://127.0.0.1:8123")
    run.start("phases.sft.micro_batch=4")
    run.reach(8)
    victim = run.machine_of(1)
    service = lab[victim].run(sys.executable, "-c", METADATA, log=run.folder / "metadata.txt")
    run.wait_for(lambda: run.events("moved"), "the move")
    run.finish()
    service.kill()
    lab.renew(victim)
    (moved,) = run.events("moved")  # not back to it, though its place was free again
    assert "(GCP preempts it)" in moved["why"]
    assert run.result.losses == pytest.approx(undisturbed.losses, rel=1e-5)


def test_when_all_is_lost_but_the_storage_the_run_resumes_on_another_cluster(lab, run, undisturbed):
    run.start("phases.sft.micro_batch=4")
    run.wait_for(lambda: run.events("checkpoint"), "a checkpoint")
    for machine in lab.machines.values():
        machine.switch_off()
    for machine in lab.machines.values():
        machine.boot()
    lab.start_ray(DRIVER, cpus=1)
    run.start(verb="resume")
    run.finish()
    assert run.events("restored")
    assert run.result.losses == pytest.approx(undisturbed.losses, rel=1e-5)


def wait_until(condition: Callable[[], object], what: str, limit_s: float = 90) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def nodes(run: LabRun) -> list[dict]:
    """Machines of the cluster: id and address."""
    code = (
        "import ray, json; ray.init(logging_level='ERROR', log_to_driver=False); "
        "print(json.dumps([{'id': n['NodeID'], 'address': n['NodeManagerAddress']} for n in ray.nodes() if "
        "n['Alive']]))"
    )
    log = run.folder / "nodes.txt"
    run.lab[DRIVER].run(sys.executable, "-c", code, log=log, RAY_ADDRESS=run.lab.address).wait(60)
    return json.loads(log.read_text().splitlines()[-1])
