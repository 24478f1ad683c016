"""What list, status and checkpoints say of runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.driver import open_run
from launcher.jobfile import job as jobs
from launcher.report import status
from launcher.runfolder.small_files import SmallFiles
from tests.support.made_checkpoints import save_in


@pytest.fixture
def run(place):
    opened = open_run.begin(jobs.load(Path("job.yaml")))
    opened.phase("sft").mkdir()
    yield opened
    opened.close()


def trained(run: open_run.OpenRun, steps: int) -> None:
    run.event("training", phase="sft", step=0, total_steps=10)
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 3.0 / step, "tokens_per_s": 1000.0, "step_s": 2.0}
        SmallFiles().append(run.phase("sft") / "metrics.jsonl", row)
    SmallFiles().append(run.phase("sft") / "metrics.jsonl", {"step": steps, "eval_loss": 1.25})


def saved(run: open_run.OpenRun, step: int, **metrics: float) -> Path:
    folder = save_in(run.checkpoints("sft"), step, metrics=metrics)
    return Path(str(folder))


def test_a_run_that_has_just_begun(run):
    info = status.status(run)
    assert (info["state"], info["attempts"], info["problems"]) == ("running", 1, [])
    assert info["phases"]["sft"]["step"] == 0
    assert list(status.status_lines(info))[1:] == ["  sft: not started"]


def test_status_tells_step_loss_evaluation_time_left_and_checkpoints(run):
    trained(run, 4)
    saved(run, 2)
    saved(run, 4)
    phase = status.status(run)["phases"]["sft"]
    assert (phase["step"], phase["total_steps"], phase["loss"]) == (4, 10, 0.75)
    assert phase["left_s"] == 12.0, "6 steps of 2 seconds"
    assert phase["evaluation"] == {"eval_loss": 1.25}
    line = list(status.status_lines(status.status(run)))[1]
    assert line == "  sft: step 4/10  loss 0.7500  eval_loss 1.2500  0:12 left  checkpoints 2, 4"


def test_a_finished_phase_has_no_time_left_and_names_its_model(run):
    trained(run, 10)
    (run.phase("sft") / "model").mkdir()
    (run.phase("sft") / "model" / "config.json").touch()
    run.event("phase_finished", phase="sft")
    run.event("done")
    info = status.status(run)
    assert info["state"] == "done"
    assert info["phases"]["sft"]["left_s"] is None
    assert list(status.status_lines(info))[-1] == f"  sft: model in {run.model('sft')}"


def test_status_repeats_the_last_three_problems(run):
    for number in range(5):
        run.event("failed", error=f"error {number}")
    run.event("checkpoint_damaged", finding="a hole")
    assert status.status(run)["problems"] == ["error 3", "error 4", "a hole"]
    assert list(status.status_lines(status.status(run)))[-1] == "  a hole"


def test_a_listing_has_a_line_a_run_and_one_that_cannot_be_read_hides_no_other(run):
    trained(run, 4)
    broken = Path("runs/broken")
    broken.mkdir()
    (broken / "job.yaml").write_text("{")
    listing = {entry["name"]: entry for entry in status.listing("runs")}
    assert (listing["sums"]["state"], listing["broken"]["state"]) == ("running", "unreadable")
    lines = list(status.listing_lines(list(listing.values())))
    assert f"{'sums':<24} {'running':<12} sft 4/10" in lines
    assert any(line.startswith("  runs/broken/job.yaml:1: not valid YAML") for line in lines)


def test_a_default_storage_that_is_not_there_yet_has_no_runs(place):
    assert list(status.listing_lines(status.listing("runs"))) == ["no runs"]


def test_a_whole_checkpoint_is_told_with_its_size_and_makers(run):
    saved(run, 2, eval_loss=1.5)
    (entry,) = status.checkpoints(run, deep=True)
    assert (entry["phase"], entry["step"], entry["whole"], entry["world_size"]) == ("sft", 2, True, 2)
    (line,) = status.checkpoint_lines([entry])
    assert line.startswith("sft step       2  verified  0.0 MiB  2 workers, ZeRO-2")
    assert line.endswith("eval_loss 1.5000")


def test_a_changed_byte_is_found_by_reading_and_a_cut_file_by_its_size(run):
    shard = saved(run, 2) / "worker-0.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (entry,) = status.checkpoints(run, deep=False)
    assert entry["whole"]
    assert next(status.checkpoint_lines([entry])).startswith("sft step       2  complete  0.0 MiB")
    (entry,) = status.checkpoints(run, deep=True)
    assert not entry["whole"]
    assert "the content has changed" in entry["problems"][0]
    shard.write_bytes(content[:-1])
    (entry,) = status.checkpoints(run, deep=False)
    assert next(status.checkpoint_lines([entry])) == "sft step       2  DAMAGED"


def test_a_checkpoint_without_a_manifest_is_damaged(run):
    (saved(run, 2) / "manifest.json").write_text('{"form')
    (entry,) = status.checkpoints(run, deep=True)
    assert not entry["whole"]
    assert "not a readable manifest" in entry["problems"][0]


def test_no_checkpoints(run):
    assert list(status.checkpoint_lines(status.checkpoints(run, deep=True))) == ["no checkpoints"]
