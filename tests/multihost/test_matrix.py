"""Every fault at every moment, and many at random: on real machines,
with the weights of a run that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from tests.multihost.conftest import DRIVER, LabRun
from tests.multihost.lab import Lab
from tests.support.disturbed import STEPS, Result, Run

HANG_AFTER_S = 4


def kill_worker(lab: Lab, run: LabRun, victim: str) -> None:
    _signal(lab, victim, signal.SIGKILL, run)


def stop_worker(lab: Lab, run: LabRun, victim: str) -> None:
    _signal(lab, victim, signal.SIGSTOP, run)


def _signal(lab: Lab, victim: str, number: signal.Signals, run: LabRun) -> None:
    pids = [
        worker["pid"] for worker in run.events("workers")[-1]["workers"] if worker["machine"] == lab[victim].address
    ]
    lab[victim].run("kill", f"-{number.value}", str(pids[0]), log=run.log).wait(60)


def kill_place(lab: Lab, run: LabRun, victim: str) -> None:
    _kill(lab[victim].processes_with("ray::"))


def kill_raylet(lab: Lab, run: LabRun, victim: str) -> None:
    _kill(lab[victim].processes_with("raylet/raylet"))


def _kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def switch_off(lab: Lab, run: LabRun, victim: str) -> None:
    lab[victim].switch_off()


def cut_off(lab: Lab, run: LabRun, victim: str) -> None:
    lab.cut(victim)


def kill_driver(lab: Lab, run: LabRun, victim: str) -> None:
    _kill(lab[DRIVER].processes_with("-m launcher "))
    _resume(run)


def stop_driver(lab: Lab, run: LabRun, victim: str) -> None:
    for group in {os.getpgid(pid) for pid in lab[DRIVER].processes_with("-m launcher ")}:
        os.killpg(group, signal.SIGTERM)
    _resume(run)


def _resume(run: LabRun) -> None:
    run.process.wait(60)
    run.start(*run.settings, verb="resume")


FAULTS: dict[str, Callable[[Lab, LabRun, str], None]] = {
    "worker killed": kill_worker,
    "worker stopped": stop_worker,
    "place killed": kill_place,
    "Ray of a machine killed": kill_raylet,
    "machine switched off": switch_off,
    "machine cut off": cut_off,
    "driver killed": kill_driver,
    "SIGTERM to the driver's group": stop_driver,
}
HURT_THE_MACHINE = (kill_place, kill_raylet, switch_off, cut_off)
"""After them its Ray has to be started again; after the others its places are free again by themselves."""
MOMENTS = {
    "training": ("phases.sft.checkpoint.every=20", 40),
    "saving": ("phases.sft.checkpoint.every=1", 40),
    "evaluating": ("phases.sft.eval_every=1", 40),
    "exporting": ("phases.sft.checkpoint.every=20", STEPS),
}
"""A setting, and the step after which the fault strikes. With a save, or an evaluation, after every step there is
always one under way; after the last step the model is saved, evaluated and exported, which the run may be done with
before the fault strikes."""


def start(run: LabRun, *settings: str) -> None:
    run.settings = (f"resources.hang_after={HANG_AFTER_S}", *settings)
    run.start(*run.settings)


KINDS: dict[str, tuple[str, str]] = {
    "sft": ("sft", "null"),
    "pretrain": ("pretrain", "null"),
    "cft": ("cft", "null"),
    "reward": ("reward", "null"),
    "sft, LoRA": ("sft", "{rank: 4, alpha: 8}"),
    "reward, LoRA": ("reward", "{rank: 4, alpha: 8}"),
}
"""Recipe and adapters. The phase is called sft whatever its recipe."""


def settings_of(tiny: Path, kind: str) -> tuple[str, ...]:
    recipe, lora = KINDS[kind]
    prefix = f"{tiny}/" if recipe == "sft" else f"{tiny}/{recipe}."
    data = (f"phases.sft.data.train={prefix}train.jsonl", f"phases.sft.data.eval={prefix}eval.jsonl")
    return (f"phases.sft.recipe={recipe}", f"model.lora={lora}", *data)


@pytest.fixture(scope="module")
def calm_of(tiny, tmp_path_factory) -> Callable[[str], Result]:
    """What a kind of run comes to when nobody disturbs it."""

    @cache
    def calm(kind: str) -> Result:
        run = Run(tiny, tmp_path_factory.mktemp("calm"))
        run.start(*settings_of(tiny, kind))
        run.finish()
        return run.result

    return calm


CHECKED = {("pretrain", "machine cut off", "evaluating"), ("reward, LoRA", "place killed", "saving")}
"""What a check of a change has time for, beside test_lost_machines.py and test_recovery.py,
which have every fault of SFT."""


def matrix() -> list[ParameterSet]:
    """Every fault of every kind of run at every moment: hours, by hand, but for a few."""
    return [
        pytest.param(*case, marks=[] if case in CHECKED else pytest.mark.long)
        for case in product(KINDS, FAULTS, MOMENTS)
    ]


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "fault", "moment"), matrix())
def test_the_run_comes_to_the_same_end(lab, run, tiny, calm_of, kind, fault, moment):
    undisturbed = calm_of(kind)
    setting, step = MOMENTS[moment]
    start(run, setting, *settings_of(tiny, kind))
    run.reach(step)
    victim = run.machine_of(1)
    FAULTS[fault](lab, run, victim)
    out = run.finish()
    assert len(run.events("started")) == 2 or moment == "exporting", out
    assert undisturbed.weights
    assert run.result == undisturbed
    if FAULTS[fault] in HURT_THE_MACHINE:
        lab.renew(victim)


SOAK_STEPS = int(os.environ.get("MUSTER_SOAK_STEPS", "400"))
"""About a tenth of a second each, and the faults: 7,000 are half an hour of them."""
SOAK = (f"phases.sft.max_steps={SOAK_STEPS}", "phases.sft.micro_batch=4", "phases.sft.eval_every=100")


@pytest.fixture
def calm(tiny, tmp_path_factory) -> Result:
    run = Run(tiny, tmp_path_factory.mktemp("calm"))
    run.start(*SOAK)
    run.process.wait(3600)
    return run.result


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_faults_at_random_lose_nothing(lab, run, calm):
    """A fault every 5 to 20 s until the run is done. A machine that was hurt is renewed before the next."""
    rng = random.Random(int(os.environ.get("MUSTER_SOAK_SEED", "1")))
    start(run, *SOAK)
    struck = []
    while _gets_on(run):
        time.sleep(rng.uniform(5, 20))
        if run.process.poll() is not None:
            break
        fault, victim = rng.choice(list(FAULTS)), run.machine_of(rng.choice((0, 1)))
        struck.append(fault)
        attempts = len(run.events("started"))
        FAULTS[fault](lab, run, victim)
        _wait_or_end(
            run, lambda n=attempts: len(run.events("started")) > n, 120
        )  # the last may come too late to matter
        lab.renew(victim)
    out = run.finish()
    assert [row["step"] for row in run.steps] == list(range(1, SOAK_STEPS + 1)), out
    assert run.result == calm
    print(f"{len(struck)} faults: {struck}")


def _gets_on(run: LabRun) -> bool:
    """Waits for a step more than there were. False if the run ends instead."""
    seen = len(run.steps)
    return _wait_or_end(run, lambda: len(run.steps) > seen, 300)


def _wait_or_end(run: LabRun, condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if run.process.poll() is not None:
            return False
        assert time.monotonic() < deadline, run.log.read_text()
        time.sleep(0.1)
    return True
