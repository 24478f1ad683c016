"""PPO over groups of workers on several machines, of which one is lost: it ends
with the weights of the undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher.driver.test_ppo_recovery import PPORun
from tests.multihost.conftest import LabRun
from tests.support import some_rewards

pytestmark = pytest.mark.faults
THREE = "      - {roles: [critic, reward], workers: 1}\n      - {roles: [rollout], workers: 1}\n"
TWO = "      - {roles: [critic, reward, rollout], workers: 1}\n"


class PPOLabRun(LabRun):
    """Policy and reference on one machine, the others on a second; a third is free."""

    result, steps = PPORun.result, PPORun.steps

    def __init__(self, lab, tiny, folder):
        super().__init__(lab, tiny, folder)
        rewards = Path(some_rewards.__file__)
        PPORun.write_job(tiny, folder, (THREE, TWO), ("tests.support.some_rewards:nines", f"{rewards}:nines"))


@pytest.fixture
def run(lab, tiny, tmp_path):
    run = PPOLabRun(lab, tiny, tmp_path)
    yield run
    run.close()


@pytest.fixture(scope="module")
def whole(lab, tiny, tmp_path_factory):
    run = PPOLabRun(lab, tiny, tmp_path_factory.mktemp("whole"))
    run.start()
    run.finish()
    assert {run.machine_of(0), run.machine_of(1)} < {"b", "c", "d"}
    return run.result


@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_is_switched_off_is_replaced(lab, run, whole, rank):
    run.start()
    run.reach(5)
    victim = run.machine_of(rank)
    lab[victim].switch_off()
    run.finish()
    lab.renew(victim)
    assert (run.incident["class"], run.incident["node"]) == ("lost machine", lab[victim].address)
    assert run.result == whole
