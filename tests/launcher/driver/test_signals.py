"""A SIGTERM or Ctrl-C before training begins: the status says which it was, and nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launcher.process.exit_status import after_signal
from tests.launcher.driver.test_run import events, finish, folder, nothing_left, processes_of, start, wait_for

__all__ = ["folder", "nothing_left"]

Reached = Callable[[int, Path, Path], bool]
"""Whether a moment has come, by process id of the command, folder of the job, TMPDIR."""


def handles_sigterm(pid: int, folder: Path, temporary: Path) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16)
    return bool(caught & (1 << (signal.SIGTERM - 1)))


def has_started(what: str) -> Reached:
    def reached(pid: int, folder: Path, temporary: Path) -> bool:
        found = []
        for each in processes_of(str(temporary)):
            with suppress(psutil.Error):
                found.append(" ".join(psutil.Process(each).cmdline()))
        return any(what in command for command in found)

    return reached


def has_event(kind: str) -> Reached:
    def reached(pid: int, folder: Path, temporary: Path) -> bool:
        return (folder / "runs/job/events.jsonl").exists() and kind in events(folder)

    return reached


MOMENTS: dict[str, Reached] = {
    "entry": handles_sigterm,
    "preparing": has_started("launcher.workers.fork_server"),
    "gcs": has_started("gcs_server"),
    "raylet": has_started("raylet/raylet"),
    "begun": has_event("started"),
    "workers": has_event("workers"),
}


def test_only_ctrl_c_is_a_person():
    assert [after_signal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == [130, 75, 75]


@pytest.mark.cpu
@pytest.mark.faults
@pytest.mark.parametrize(
    ("moment", "number"),
    [*((moment, signal.SIGTERM) for moment in MOMENTS), ("preparing", signal.SIGINT)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_signal_before_training_ends_the_run_with_its_status(folder, nothing_left, moment, number):
    process = start(folder, "run", "job.yaml", "phases.sft.data.max_length=64")
    wait_for(lambda: MOMENTS[moment](process.pid, folder, nothing_left), moment)
    process.send_signal(number)
    status, out = finish(process)
    assert status == after_signal(number), out
    assert "Traceback" not in out
    assert [path.name for path in (folder / "cache").glob(".*")] == []


def sigterm_at(audited: str, name: str) -> None:
    """SIGTERM to this process when it first makes a path of this name, as one of Python's audit events says."""
    armed = [True]

    def hook(event: str, arguments: tuple) -> None:
        if not armed or event != audited:
            return
        *_, made = (path for path in arguments if isinstance(path, str | bytes))
        if Path(os.fsdecode(made)).name == name:
            armed.clear()
            signal.raise_signal(signal.SIGTERM)

    sys.addaudithook(hook)


@pytest.mark.cpu
@pytest.mark.parametrize("moment", ["the last save", "the export"])
def test_a_request_to_stop_does_not_wait_for_the_export_which_is_done_when_the_run_goes_on(place, muster, moment):
    steps = 3
    sigterm_at(*{"the last save": ("os.rename", f"step-{steps:08d}"), "the export": ("os.mkdir", ".tmp-model")}[moment])
    answer = muster("run", "job.yaml", "--inline", f"phases.sft.max_steps={steps}")
    assert answer.status == 75, answer.out + answer.err
    folder = Path("runs/sums/sft")
    assert list(folder.glob("*model")) == []
    answer = muster("resume", "runs/sums", "--inline")
    assert answer.status == 0, answer.out + answer.err
    assert (folder / "model/model.safetensors").exists()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["attempt"]) for row in rows if "loss" in row] == [(step, 1) for step in (1, 2, 3)]
