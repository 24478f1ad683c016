"""Whether workers fit this machine, told before anything starts."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.jobfile import job as jobs
from launcher.plan import local_capacity
from training.errors import InputError

GIB = 1 << 30


@pytest.fixture
def machine(place, monkeypatch):
    """machine(gpus, gib) pretends to be on such a machine."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def pretend(gpus: int, gib: float) -> None:
        monkeypatch.setattr(local_capacity, "num_gpus", lambda: gpus)
        monkeypatch.setattr(local_capacity.psutil, "virtual_memory", lambda: SimpleNamespace(available=int(gib * GIB)))

    return pretend


def job_of(workers: int, *overrides: str) -> jobs.Job:
    return jobs.load(Path("job.yaml"), [f"resources.workers={workers}", "phases.sft.batch=5000", *overrides])


def refusal(workers: int, *overrides: str, inline: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        local_capacity.check(job_of(workers, *overrides), inline=inline)
    return str(caught.value)


def test_workers_may_outnumber_the_cores_as_far_as_memory_reaches(machine):
    machine(gpus=0, gib=4.5)
    local_capacity.check(job_of(10), inline=False)
    told = refusal(1000, "sharding.stage=3")
    assert told.startswith(
        "job.yaml: phases.sft.resources.workers: needs at least 439.5 GiB of memory (workers 439.5, "
    )
    assert "this machine has 4.5 GiB free; use fewer workers, " in told


def test_a_model_counts_with_its_copy_for_saving_before_anything_starts(machine, monkeypatch):
    """What shows otherwise hours later or, on some machines, as a worker that the system kills."""
    monkeypatch.setattr(local_capacity, "_num_parameters", lambda _: GIB)
    machine(gpus=0, gib=4 * 0.44 + 12 + 8 + 4 * 4 + 0.1)  # workers, copy, moments, weights of four
    local_capacity.check(job_of(4, "sharding.stage=2"), inline=False)
    assert "copy for saving 12.0, weights 20.0, optimizer 8.0" in refusal(5, "sharding.stage=2")
    assert "copy for saving 12.0, weights 16.0, optimizer 32.0" in refusal(4, "sharding.stage=0")
    local_capacity.check(job_of(5, "sharding.stage=3"), inline=False)
    machine(gpus=0, gib=23)
    assert "at least 24.4 GiB" in refusal(1, "sharding.stage=3", inline=True)


@pytest.mark.parametrize(
    ("sharding", "needs"),
    [
        ("{stage: 3}", {"copy for saving": 12}),
        ("{stage: 2, offload: cpu}", {"copy for saving": 12, "optimizer": 12}),
        ("{stage: 3, offload: cpu}", {"copy for saving": 12, "weights": 2, "optimizer": 12}),
    ],
)
def test_beside_gpus_the_host_holds_the_copy_for_saving_and_what_is_offloaded(place, sharding, needs):
    phase = jobs.load(Path("job.yaml"), [f"sharding={sharding}", "model.dtype=bf16"]).phases["sft"]
    found = local_capacity.host_bytes(phase, 1000, on_gpus=True)
    assert found == {"workers": 450 << 20} | {what: count * 1000 for what, count in needs.items()}


def test_frozen_weights_are_neither_saved_nor_optimized(machine, monkeypatch):
    monkeypatch.setattr(local_capacity, "_num_parameters", lambda _: GIB)
    machine(gpus=0, gib=0.44 + 4 + 0.1)
    local_capacity.check(job_of(1, "model.lora={}"), inline=True)
    assert "(workers 0.4, copy for saving 12.0, weights 4.0, optimizer 8.0)" in refusal(1, inline=True)


def test_a_model_that_is_not_here_is_not_counted(machine):
    machine(gpus=0, gib=1)
    local_capacity.check(jobs.load(Path("job.yaml"), ["model.path=meta-llama/Llama-2-70b-hf"]), inline=False)


def test_on_gpus_a_worker_has_one_to_itself(machine):
    machine(gpus=2, gib=1000)
    local_capacity.check(
        jobs.load(Path("job.yaml"), ["resources.workers=2", "resources.gpus_per_worker=auto"]), inline=False
    )
    with pytest.raises(InputError, match="3 workers need a GPU each, but this machine has 2"):
        local_capacity.check(
            jobs.load(Path("job.yaml"), ["resources.workers=3", "resources.gpus_per_worker=auto"]), inline=False
        )


def test_a_cluster_that_is_joined_decides_for_itself(machine, monkeypatch):
    machine(gpus=0, gib=1)
    settings = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # the first that a server of Ray's protocol says

    def answer() -> None:
        with listener.accept()[0] as connection:
            connection.sendall(settings)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listener.getsockname()[1]}")
        local_capacity.check(job_of(1000), inline=False)


def test_inline_has_one_worker(machine):
    machine(gpus=8, gib=100)
    local_capacity.check(job_of(1), inline=True)
    assert refusal(2, inline=True).endswith("--inline has one worker, but the job requests 2; set resources.workers=1")
