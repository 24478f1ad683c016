"""`muster resume --step` and `--accept-changes` on a finished run of two phases, by the real command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.launcher.driver.test_run import events
from tests.support.forked_command import muster
from training.checkpoint.repository import opened
from training.storage import open_storage

pytestmark = pytest.mark.cpu

PHASES = ("first", "second")
PHASE = (
    "{recipe: sft, data: {train: train.jsonl, eval: train.jsonl}, eval_on_start: true, batch: 8, max_steps: 4, "
    "learning_rate: 3e-3, checkpoint: {every: 2}}"
)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(tiny / "train.jsonl", folder)
    phases = "".join(f"  {name}: {PHASE}\n" for name in PHASES)
    (folder / "job.yaml").write_text(f"model: {{path: {tiny / 'model'}, dtype: fp32}}\nphases:\n{phases}")
    status, out = muster(folder, "run", "job.yaml", "--inline")
    assert status == 0, out
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of the finished run. It reads its data where they were."""
    shutil.copytree(finished / "runs", tmp_path / "runs")
    return tmp_path


def rows(folder: Path, phase: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"runs/job/{phase}/metrics.jsonl").open()]


def curve(folder: Path, phase: str) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows(folder, phase) if "loss" in row]


def evaluations(folder: Path, phase: str) -> list[tuple[int, float]]:
    return [(row["step"], row["eval_loss"]) for row in rows(folder, phase) if "eval_loss" in row]


def attempts_of(folder: Path, phase: str) -> list[int]:
    """Which attempt trained each step."""
    return [row["attempt"] for row in rows(folder, phase) if "loss" in row]


def weights(folder: Path, phase: str) -> bytes:
    return (folder / f"runs/job/{phase}/model/model.safetensors").read_bytes()


def test_the_last_phase_is_trained_again_from_a_step_bit_for_bit(finished, folder):
    status, out = muster(folder, "resume", "job", "--step", "2", "--inline")
    assert status == 0, out
    assert attempts_of(folder, "first") == [1, 1, 1, 1]
    assert attempts_of(folder, "second") == [1, 1, 2, 2]
    assert curve(folder, "second") == curve(finished, "second")
    assert weights(folder, "second") == weights(finished, "second")
    assert muster(folder, "resume", "job", "--inline")[0] == 2, "the run is finished again"


def test_a_checkpoint_with_weights_alone_is_tried_and_exported_but_not_resumed(finished, folder):
    asked = ("generate", "job", "--step", "2", "-p", "Q: 1 + 1 = ", "--max-new-tokens", "4", "--json")
    before = muster(folder, *asked)
    assert muster(folder, "export", "job", "--step", "2", "--out", "before")[0] == 0
    checkpoints = opened(open_storage(folder / "runs/job/second/checkpoints"), 2)
    checkpoints.drop_optimizer(checkpoints.at(2))
    checkpoints.close()
    status, out = muster(folder, "resume", "job", "--step", "2", "--inline")
    assert (status, "second can be resumed at: 4" in out) == (2, True), out
    status, out = muster(folder, "checkpoints", "job", "--verify")
    assert (status, out.count("verified, weights only")) == (0, 1), out
    after = muster(folder, *asked)
    assert (after[0], after[1][after[1].rindex("\n[") :]) == (0, before[1][before[1].rindex("\n[") :])
    assert muster(folder, "export", "job", "--step", "2", "--out", "after")[0] == 0
    exported = [(folder / name / "model.safetensors").read_bytes() for name in ("before", "after")]
    assert exported[0] == exported[1]


def test_going_back_in_the_first_phase_trains_the_second_anew(finished, folder):
    status, out = muster(folder, "resume", "job", "--step", "2", "--phase", "first", "--inline")
    assert status == 0, out
    assert attempts_of(folder, "first") == [1, 1, 2, 2]
    assert attempts_of(folder, "second") == [2, 2, 2, 2]
    for phase in PHASES:
        assert curve(folder, phase) == curve(finished, phase)
        assert evaluations(folder, phase) == evaluations(finished, phase)
        assert [step for step, _ in evaluations(folder, phase)] == [0, 4]
        assert weights(folder, phase) == weights(finished, phase)


def test_another_job_and_other_data_are_refused_unless_they_are_accepted(finished, folder):
    back = ("resume", "job", "--step", "2", "--inline")
    before = events(folder)
    status, out = muster(folder, *back, "phases.second.learning_rate=1e-3")
    assert (status, events(folder)) == (2, before)
    assert "phases.second.learning_rate: 0.003 -> 0.001" in out

    more = folder / "train.jsonl"
    row = json.loads((finished / "train.jsonl").read_text().splitlines()[0])
    more.write_text((finished / "train.jsonl").read_text() + json.dumps(row) + "\n")
    shutil.copy(folder / "runs/job/job.yaml", folder / "old.yaml")
    job = (folder / "old.yaml").read_text().replace(str(finished / "train.jsonl"), str(more))
    (folder / "runs/job/job.yaml").write_text(job)  # as if the file itself had got a row
    status, out = muster(folder, *back)
    assert status == 2, out
    assert "it was trained on other data" in out
    assert "--accept-changes" in out
    assert curve(folder, "second") == curve(finished, "second"), "nothing is lost"

    status, out = muster(folder, *back, "--accept-changes", "phases.second.learning_rate=1e-3")
    assert status == 0, out
    assert attempts_of(folder, "second")[2:] == [3, 3]
    assert curve(folder, "second")[:2] == curve(finished, "second")[:2]
    assert curve(folder, "second")[2:] != curve(finished, "second")[2:]
    assert rows(folder, "second")[-2]["learning_rate"] == pytest.approx(1e-4), "the new rate's floor"


def test_settings_at_the_top_reach_the_phases_of_a_run_and_keep_its_curve(finished, folder):
    job = folder / "runs/job/job.yaml"
    job.write_text(job.read_text().replace("workers: 1\n", "workers: 2\n"))  # as a run on two workers would have it
    status, out = muster(folder, "resume", "job", "--step", "2", "--inline", "sharding.stage=0")
    assert (status, out.count("set resources.workers=1")) == (2, 2), out
    status, out = muster(folder, "resume", "job", "--step", "2", "--inline", "resources.workers=1", "sharding.stage=0")
    assert status == 0, out
    checkpoints = folder / "runs/job/second/checkpoints"
    stages = [json.loads(path.read_text())["zero_stage"] for path in sorted(checkpoints.glob("step-*/manifest.json"))]
    assert stages == [2, 0]
    for (step, loss), (same_step, reference) in zip(curve(folder, "second"), curve(finished, "second"), strict=True):
        assert (step, loss) == (same_step, pytest.approx(reference, rel=1e-5))  # fp32 sums in another order
