"""Whether workers fit this machine, told before anything starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher import capacity
from launcher import job as jobs
from training.errors import InputError

GIB = 1 << 30


@pytest.fixture
def machine(place, monkeypatch):
    """machine(gpus, gib) pretends to be on such a machine."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def pretend(gpus: int, gib: float) -> None:
        monkeypatch.setattr(capacity, "num_gpus", lambda: gpus)
        monkeypatch.setattr(capacity.psutil, "virtual_memory", lambda: SimpleNamespace(available=int(gib * GIB)))

    return pretend


def job_of(workers: int) -> jobs.Job:
    return jobs.load(Path("job.yaml"), [f"resources.workers={workers}", "phases.sft.batch=5000"])


def refusal(workers: int, inline: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        capacity.check(job_of(workers), inline=inline)
    return str(caught.value)


def test_workers_may_outnumber_the_cores_as_far_as_memory_reaches(machine):
    machine(gpus=0, gib=4.5)
    capacity.check(job_of(10), inline=False)
    assert refusal(1000) == (
        "job.yaml: phases.sft.resources.workers: 1000 workers need 439 GiB before they load a model, this machine has 4 GiB free; "
        "at most 10 fit"
    )


def test_on_gpus_a_worker_has_one_to_itself(machine):
    machine(gpus=2, gib=1000)
    capacity.check(jobs.load(Path("job.yaml"), ["resources.workers=2", "resources.gpus_per_worker=auto"]), inline=False)
    with pytest.raises(InputError, match="3 workers need a GPU each, this machine has 2"):
        capacity.check(
            jobs.load(Path("job.yaml"), ["resources.workers=3", "resources.gpus_per_worker=auto"]), inline=False
        )


def test_a_cluster_that_is_joined_decides_for_itself(machine, monkeypatch):
    machine(gpus=0, gib=1)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    capacity.check(job_of(1000), inline=False)


def test_inline_has_one_worker(machine):
    machine(gpus=8, gib=100)
    capacity.check(job_of(1), inline=True)
    assert refusal(2, inline=True).endswith("--inline has one worker, the job asks for 2; say resources.workers=1")


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,3", 2), ("GPU-1a, GPU-2b", 2)])
def test_visible_gpus_are_counted_without_a_cuda_library(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert capacity.num_gpus() == count
