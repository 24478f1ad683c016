"""Data that another process prepares: what it tells, and what is told of it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest

from launcher.driver import driver
from launcher.jobfile import job as jobs
from launcher.workers.errors import Raised, WorkerDied
from tests.launcher.driver.test_run import finish, folder, losses, nothing_left, processes_of, start, wait_for
from training.errors import InputError, TrainingError

__all__ = ["folder", "nothing_left"]


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        (WorkerDied(-signal.SIGKILL, short_of_memory=True), "was killed by SIGKILL.*ran out of memory"),
        (WorkerDied(1, "its imports failed or took too long"), "ended with status 1.*its imports failed"),
        (
            Raised("ZeroDivisionError", "division by zero", "trace"),
            "raised: ZeroDivisionError: division by zero\ntrace",
        ),
    ],
    ids=["killed", "no imports", "a defect"],
)
def test_a_process_that_fails_is_told_of_in_words(place, monkeypatch, evidence, words):
    def fail(*_):
        raise evidence

    monkeypatch.setattr("launcher.workers.supervisor.has_fork_server", lambda: True)
    monkeypatch.setattr("launcher.workers.supervisor.apart", fail)
    with pytest.raises(TrainingError, match=f"the process that prepares the data {words}"):
        driver.prepare(jobs.load(place / "job.yaml"), apart=True)


def test_bad_rows_are_told_as_they_would_be_here(place, monkeypatch):
    job = jobs.load(place / "job.yaml")
    with (place / "data/train.jsonl").open("a") as rows:
        rows.write('{"prompt": 7, "completion": "x"}\n')
    with pytest.raises(InputError) as here:
        driver.prepare(job)
    from launcher.workers.supervisor import fork_server_here

    with fork_server_here("cpu"), pytest.raises(InputError) as there:
        driver.prepare(job, apart=True)
    assert str(there.value) == str(here.value)
    assert "train.jsonl:41" in str(there.value)


def curve(run: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (run / "sft/metrics.jsonl").read_text().splitlines())
    return [(row["step"], row.get("loss", row.get("eval_loss"))) for row in rows]


@pytest.mark.cpu
def test_turned_bits_in_the_token_cache_are_an_event_and_do_not_change_the_curve(place, muster, monkeypatch, caplog):
    cache = place / "cache"
    monkeypatch.setenv("MUSTER_CACHE", str(cache))
    assert muster("run", "job.yaml", "--inline", "name=whole").status == 0
    for tokens in cache.glob("*/tokens.bin"):
        content = bytearray(tokens.read_bytes())
        content[::64] = bytes(byte ^ 1 for byte in content[::64])
        tokens.write_bytes(content)
    assert muster("run", "job.yaml", "--inline", "name=damaged").status == 0
    assert "tokens.bin: the content has changed" in caplog.text
    assert curve(place / "runs/damaged") == curve(place / "runs/whole")
    assert [finding_of(event) for event in noted(place / "runs/damaged")] == ["tokens.bin: the content has changed"] * 2
    assert noted(place / "runs/whole") == []


def noted(run: Path) -> list[dict]:
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == "data_damaged"]


def finding_of(event: dict) -> str:
    """Of the damage of one file that was found when the run was prepared: without its folder and what comes after."""
    assert (event["phase"], event["rank"]) == ("sft", None)
    return event["finding"].rpartition("/")[2].partition(" since")[0]


def test_what_another_process_has_found_damaged_comes_back_with_the_data(place, monkeypatch):
    monkeypatch.setenv("MUSTER_CACHE", str(place / "cache"))
    job = jobs.load(place / "job.yaml")
    (folder, damage) = driver.prepare(job)["sft"]
    assert damage == []
    (folder / "targets.bin").write_bytes(b"1234")
    from launcher.workers.supervisor import fork_server_here

    with fork_server_here("cpu"):
        (again, damage) = driver.prepare(job, apart=True)["sft"]
    assert again == folder
    assert [finding.partition(":")[0] for finding in damage] == [f"{folder}/targets.bin"]


@pytest.mark.cpu
@pytest.mark.faults
@pytest.mark.parametrize("victim", ["fork server", "its fork"])
def test_a_process_that_is_killed_while_it_prepares_costs_its_time_alone(folder, nothing_left, victim):
    rows = (folder.parent / "many.jsonl").open("w")
    with rows:
        for number in range(60_000):
            print(json.dumps({"prompt": f"Q: {number} + 1 = ", "completion": str(number + 1)}), file=rows)
    process = start(folder, "run", "job.yaml", f"phases.sft.data.train={rows.name}", "phases.sft.max_steps=2")

    def server() -> psutil.Process | None:
        found = [psutil.Process(pid) for pid in processes_of(str(nothing_left))]
        servers = [
            each for each in found if "launcher.workers.fork_server" in each.cmdline() and each.ppid() == process.pid
        ]
        return next(iter(servers), None)

    wait_for(lambda: (its := server()) is not None and its.children(), "the process that prepares")
    its = server()
    (its if victim == "fork server" else its.children()[0]).kill()
    status, out = finish(process)
    assert status == 0, out
    assert losses(folder)[-1] > 0
