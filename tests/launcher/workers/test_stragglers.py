"""Which worker holds the others up."""

from __future__ import annotations

from launcher.workers.stragglers import Stragglers

EVEN = [1.0, 1.1, 0.9, 1.0]
ONE_SLOW = [1.0, 1.1, 0.9, 2.0]


def looks(*paces: list[float]) -> list[dict[int, float]]:
    stragglers = Stragglers()
    return [stragglers.look(one) for one in paces]


def test_a_worker_that_is_slow_again_and_again_is_named_once():
    found = looks(*[ONE_SLOW] * 7)
    assert [list(one) for one in found] == [[], [], [], [], [3], [], []]
    assert found[4][3] == 2.0 / 1.05


def test_slow_moments_and_changing_workers_are_not():
    moved = [[2.0, 1.0, 1.0, 1.0], [1.0, 2.0, 1.0, 1.0]]
    assert not any(looks(*[ONE_SLOW] * 4, EVEN, *[ONE_SLOW] * 4))
    assert not any(looks(*moved * 5))


def test_one_worker_has_nobody_to_be_compared_with():
    assert not any(looks(*[[5.0]] * 9))


def test_no_work_is_no_pace():
    assert not any(looks(*[[0.0, 0.0, 1.0]] * 9))


class WorkerSet:
    def members(self):
        return [{"rank": rank, "machine": f"10.0.0.{rank}", "pid": 1} for rank in range(3)]


def test_a_gpu_that_is_nearly_full_is_told_once(monkeypatch):
    from launcher.driver.phase_run import PhaseRun

    told: list[str] = []
    run = PhaseRun.__new__(PhaseRun)
    run.worker_set, run.told_full = WorkerSet(), set()
    monkeypatch.setattr(run, "warn", told.append, raising=False)
    for fractions in ([0.0, 0.9, 0.5], [0.0, 0.97, 0.5], [0.0, 0.99, 0.5]):
        run.gpus_full(fractions)
    assert len(told) == 1
    assert told[0].startswith("worker 1 on 10.0.0.1 uses 97% of its GPU's memory")
