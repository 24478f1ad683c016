"""`muster run` as a person uses it: the real command, real workers on a real Ray, and everything gone afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support import forked_command
from tests.support.disturbed import cache_in

pytestmark = pytest.mark.cpu

MUSTER = [sys.executable, "-m", "launcher"]
LIMIT_S = 480
STEPS = 120
JOB = """
model: {path: MODEL, dtype: fp32}
resources: {workers: 2, threads: 1}
sharding: {stage: 2}
seed: 3
phases:
  sft:
    data: {train: TRAIN, eval: EVAL}
    batch: 16
    max_steps: STEPS
    learning_rate: 3e-3
    eval_every: 40
    checkpoint: {every: 40}
"""


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch) -> Path:
    """A folder to run in, with a job file; the storage is in it too."""
    return make_folder(tiny, tmp_path)


def make_folder(tiny: Path, path: Path, steps: int = STEPS) -> Path:
    text = JOB.replace("MODEL", str(tiny / "model")).replace("TRAIN", str(tiny / "train.jsonl"))
    (path / "job.yaml").write_text(text.replace("EVAL", str(tiny / "eval.jsonl")).replace("STEPS", str(steps)))
    return path


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    env = {**os.environ, "MUSTER_CACHE": str(cache_in(folder)), **environment}
    return subprocess.Popen(
        [*MUSTER, *arguments], cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def ctrl_c(process: subprocess.Popen) -> None:
    """As a terminal does it: to every process of the command's group."""
    os.killpg(process.pid, signal.SIGINT)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    try:
        out, _ = process.communicate(timeout=LIMIT_S)
    finally:
        if process.poll() is None:
            process.kill()
    return process.returncode, out


def muster(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    return finish(start(folder, *arguments, **environment))


def metrics(folder: Path, run: str = "job") -> list[dict]:
    return [json.loads(line) for line in (folder / "runs" / run / "sft" / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path, run: str = "job") -> list[float]:
    return [row["loss"] for row in metrics(folder, run) if "loss" in row]


def events(folder: Path, run: str = "job") -> list[str]:
    return [json.loads(line)["event"] for line in (folder / "runs" / run / "events.jsonl").read_text().splitlines()]


def wait_for(condition, what: str, limit_s: float = 120) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"{what} did not come within {limit_s} s"
        time.sleep(0.1)


def steps_done(folder: Path, run: str = "job") -> int:
    path = folder / "runs" / run / "sft" / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def processes_of(temporary: str) -> set[int]:
    """Processes that were started with this folder for temporary files."""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("TMPDIR") == temporary:
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


SHARED_MEMORY = Path("/dev/shm")


def unheld(files: set[Path]) -> set[Path]:
    """Those that no process has open or mapped: tests beside this one use shared memory too."""
    held: set[Path] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            maps = (process / "maps").read_text()
            held |= {file for file in files if str(file) in maps}
            held |= {Path(os.readlink(number)) for number in (process / "fd").iterdir()} & files
    return files - held


@pytest.fixture
def nothing_left(monkeypatch):
    """Asserts after the test that no process, no temporary file and no shared memory stayed behind."""
    temporary = tempfile.mkdtemp(prefix="mt-", dir="/tmp")
    monkeypatch.setenv("TMPDIR", temporary)
    before = set(SHARED_MEMORY.iterdir())
    yield Path(temporary)
    wait_for(lambda: not processes_of(temporary), "the end of all processes", 30)
    left = list(Path(temporary).iterdir())
    shutil.rmtree(temporary)
    assert left == []
    wait_for(lambda: not unheld(set(SHARED_MEMORY.iterdir()) - before), "the end of all shared memory", 30)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """An undisturbed run: its folder and what it printed."""
    folder = make_folder(tiny, tmp_path_factory.mktemp("whole"))
    status, out = muster(folder, "run", "job.yaml")
    assert status == 0, out
    return folder, out


def test_a_run_leaves_what_the_design_promises(whole):
    folder, out = whole
    run = folder / "runs" / "job"
    assert [row["step"] for row in metrics(folder) if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in metrics(folder) if "eval_loss" in row] == [40, 80, 120]
    assert all(row["attempt"] == 1 for row in metrics(folder))
    assert {path.name for path in (run / "sft" / "checkpoints").iterdir()} == {
        "step-00000040",
        "step-00000080",
        "step-00000120",
    }
    assert list((run / "sft" / "tensorboard").glob("events*"))
    for rank in (0, 1):
        assert (run / "sft" / "logs" / "attempt-1" / f"rank-{rank}.log").exists()
    assert events(folder)[0] == "started"
    assert events(folder)[-2:] == ["phase_finished", "done"]
    assert re.search(r"sft  step +120/120  loss \d\.\d+  lr .*tokens/s .*GiB  left 0:00", out)


def test_the_model_loads_in_transformers_and_has_learnt(whole):
    from transformers import AutoModelForCausalLM

    folder, _ = whole
    model = AutoModelForCausalLM.from_pretrained(folder / "runs/job/sft/model")
    assert model.num_parameters() > 50_000
    assert losses(folder)[-1] < 0.8 * losses(folder)[0]


def test_the_resolved_job_runs_as_it_stands(whole):
    from launcher.jobfile import job as jobs

    folder, _ = whole
    assert jobs.differences(jobs.load(folder / "job.yaml"), jobs.load(folder / "runs/job/job.yaml")) == []


def test_a_finished_run_is_not_run_again(whole):
    folder, _ = whole
    status, out = forked_command.muster(folder, "run", "job.yaml")
    assert status == 2
    assert "this run is finished" in out


def test_inline_gives_the_same_curve_in_this_process(whole, tiny, tmp_path):
    folder = make_folder(tiny, tmp_path)
    status, out = forked_command.muster(folder, "run", "job.yaml", "resources.workers=1", "--inline")
    assert status == 0, out
    assert losses(folder) == pytest.approx(losses(whole[0]), rel=1e-5)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.faults
def test_ctrl_c_finishes_the_step_saves_and_goes_on_later_bit_for_bit(whole, folder):
    process = start(folder, "run", "job.yaml")
    wait_for(lambda: steps_done(folder) >= 3, "step 3")
    ctrl_c(process)
    status, out = finish(process)
    assert status == 130, out
    assert "muster resume" in out
    assert events(folder)[-1] == "interrupted"
    done = steps_done(folder)
    assert done < STEPS
    status, out = muster(folder, "resume", "job")
    assert status == 0, out
    assert f"resuming after step {done}" in out
    assert losses(folder) == losses(whole[0])
    assert [row["step"] for row in metrics(folder) if "loss" in row] == list(range(1, STEPS + 1))


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.faults
def test_ctrl_c_twice_stops_at_once(folder):
    process = start(folder, "run", "job.yaml", "phases.sft.max_steps=100000")
    wait_for(lambda: steps_done(folder) >= 1, "step 1")
    for _ in range(3):
        ctrl_c(process)
        time.sleep(0.2)
    status, out = finish(process)
    assert status == 130, out
    assert "Traceback" not in out


@pytest.mark.faults
def test_a_killed_driver_takes_its_workers_with_it(folder, nothing_left):
    process = start(folder, "run", "job.yaml", "phases.sft.max_steps=100000")
    wait_for(lambda: steps_done(folder) >= 1, "step 1")
    assert len(processes_of(str(nothing_left))) > 5
    process.kill()
    finish(process)
    wait_for(lambda: not processes_of(str(nothing_left)), "the end of the workers", 60)
    for leftover in nothing_left.glob("muster-*"):  # Ray's log files, which nobody was left to remove
        shutil.rmtree(leftover)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.long
def test_two_jobs_side_by_side_do_not_disturb_each_other(whole, folder):
    processes = [start(folder, "run", "job.yaml", f"name={name}") for name in ("one", "two")]
    for process in processes:
        status, out = finish(process)
        assert status == 0, out
    assert losses(folder, "one") == losses(folder, "two") == losses(whole[0])


def test_phases_of_one_job_follow_each_other_inline_too(tiny, tmp_path):
    phase = (
        "{recipe: sft, data: {train: TRAIN}, batch: 16, max_steps: 3, learning_rate: 3e-3, sharding: {stage: STAGE}}"
    )
    phase = phase.replace("TRAIN", str(tiny / "train.jsonl"))
    (tmp_path / "job.yaml").write_text(
        f"model: {{path: {tiny / 'model'}, dtype: fp32}}\nphases:\n"
        f"  first: {phase.replace('STAGE', '3')}\n  second: {phase.replace('STAGE', '1')}\n"
    )
    status, out = forked_command.muster(tmp_path, "run", "job.yaml", "--inline")
    assert status == 0, out
    first, second = (
        [json.loads(line)["loss"] for line in (tmp_path / f"runs/job/{name}/metrics.jsonl").open()]
        for name in ("first", "second")
    )
    assert second[0] < first[-1], "the second phase does not start where the first ended"
