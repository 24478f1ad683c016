"""The run folder: who may work in it, what is written down, and what survives a crash or a full disk."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.driver import open_run
from launcher.jobfile import job as jobs
from launcher.runfolder import run_folder
from launcher.runfolder.small_files import SmallFiles
from tests.support.made_checkpoints import save_in
from training.errors import InputError


@pytest.fixture
def job(place) -> jobs.Job:
    return jobs.load(Path("job.yaml"))


def changed(*overrides: str) -> jobs.Job:
    return jobs.load(Path("job.yaml"), overrides)


def folder_of(job: jobs.Job) -> Path:
    return Path(job.storage) / job.name


def test_a_new_run_holds_the_job_as_resolved_and_one_event(job):
    with_run = open_run.begin(job)
    assert (with_run.folder, with_run.attempt) == (folder_of(job), 1)
    assert jobs.differences(with_run.job(), job) == []
    (event,) = with_run.events()
    assert (event["event"], event["attempt"], event["pid"]) == ("started", 1, os.getpid())
    assert sorted(path.name for path in with_run.folder.iterdir()) == [".lock", "events.jsonl", "job.yaml"]
    with_run.close()


def test_every_start_is_a_new_attempt(job):
    for attempt in (1, 2, 3):
        run = open_run.begin(job)
        assert run.attempt == attempt
        run.close()


def test_two_processes_cannot_work_on_one_run(job):
    run = open_run.begin(job)
    with pytest.raises(InputError, match=f"this run is in use by process {os.getpid()} on "):
        open_run.begin(job)
    assert run.attempts() == 1
    run.close()
    open_run.begin(job).close()


def test_a_folder_that_holds_another_job_is_refused_with_what_differs(job):
    open_run.begin(job).close()
    before = (folder_of(job) / "job.yaml").read_bytes()
    with pytest.raises(InputError) as caught:
        open_run.begin(changed("phases.sft.learning_rate=2e-3", "phases.sft.log_every=5"))
    first, *differences = str(caught.value).splitlines()
    assert first.startswith(f"{folder_of(job)}: this run folder belongs to a different job; choose a different `name:`")
    assert differences == ["  phases.sft.learning_rate: 0.001 -> 0.002"]
    assert (folder_of(job) / "job.yaml").read_bytes() == before


def test_a_run_may_go_on_with_other_machines_and_the_new_values_are_kept(job):
    open_run.begin(job).close()
    run = open_run.begin(changed("resources.workers=2", "sharding.stage=3", "phases.sft.checkpoint.every=1"))
    assert run.job().phases["sft"].resources.workers == 2
    run.close()


def test_a_finished_run_is_refused(job):
    run = open_run.begin(job)
    run.event("phase_finished", phase="sft")
    run.close()
    with pytest.raises(InputError, match="this run is finished"):
        open_run.begin(job)


def test_a_folder_of_something_else_is_refused_and_stays_as_it_is(job):
    folder_of(job).mkdir(parents=True)
    (folder_of(job) / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"not a run folder, and not empty \(it holds thesis.tex\)"):
        open_run.begin(job)
    assert [path.name for path in folder_of(job).iterdir()] == ["thesis.tex"]


def test_a_check_writes_nothing(job):
    open_run.check(job)
    assert not Path(job.storage).exists()


def test_a_storage_that_is_no_folder_is_refused_and_nothing_is_made_of_its_name(job):
    for storage in ("s3://", "no-such://bucket/x", "file:///tmp/x"):
        with pytest.raises(InputError, match=storage):
            changed(f"storage={storage}")
    assert not Path("s3:").exists()


def test_a_full_disk_at_the_start_leaves_the_run_as_it_was(job, monkeypatch):
    open_run.begin(job).close()
    before = (folder_of(job) / "job.yaml").read_text()

    def full(path: Path, text: str, **_: object) -> int:
        with path.open("w") as file:
            file.write(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="cannot use the run folder: No space left on device; free some space"):
        open_run.begin(job)
    monkeypatch.undo()
    assert (folder_of(job) / "job.yaml").read_text() == before
    open_run.begin(job).close()


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "new"),
        (["started"], "lost"),
        (["started", "done"], "done"),
        (["started", "failed"], "failed"),
        (["started", "interrupted"], "interrupted"),
        (["started", "phase_finished", "partial"], "partial"),
        (["started", "phase_finished", "partial", "started"], "lost"),
        (["started", "phase_finished", "interrupted"], "interrupted"),
        (["started", "failed", "started"], "lost"),
        (["started", "checkpoint", "phase_finished"], "lost"),
    ],
    ids=" ".join,
)
def test_the_state_is_what_the_last_attempt_came_to(tmp_path, events, state):
    for event in events:
        SmallFiles().append(tmp_path / "events.jsonl", {"event": event})
    assert run_folder.RunFolder(tmp_path).state() == state


def test_a_run_is_running_while_its_process_holds_the_lock(job):
    run = open_run.begin(job)
    assert run_folder.RunFolder(run.folder).state() == "running"
    run.close()
    assert run_folder.RunFolder(run.folder).state() == "lost"


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "text": "ä\n"}]
    for row in rows:
        SmallFiles().append(tmp_path / "m.jsonl", row)
    assert list(run_folder.json_rows(tmp_path / "m.jsonl")) == rows
    assert list(run_folder.json_rows(tmp_path / "none.jsonl")) == []


def test_a_torn_row_costs_itself_alone(tmp_path):
    path = tmp_path / "m.jsonl"
    SmallFiles().append(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')  # what a full disk or a power cut leaves
    assert list(run_folder.json_rows(path)) == [{"step": 1}]
    SmallFiles().append(path, {"step": 2})
    assert list(run_folder.json_rows(path)) == [{"step": 1}, {"step": 2}]


def test_a_run_is_found_by_folder_or_by_name_under_the_storage(job):
    open_run.begin(job).close()
    assert run_folder.find(str(folder_of(job))).folder == folder_of(job)
    assert run_folder.find("sums").folder == Path("runs/sums")
    with pytest.raises(InputError, match=r"no such run: .* \(there: sums\)"):
        run_folder.find("smus")


def test_a_run_is_found_from_inside(job, monkeypatch):
    open_run.begin(job).close()
    folder = folder_of(job)
    (folder / "sft").mkdir()
    Path("link").symlink_to(folder / "sft")
    assert [run_folder.find(text).folder for text in ("link/..", f"{folder}/sft/..")] == [folder, folder]
    monkeypatch.chdir(folder)
    assert run_folder.find(".").name == job.name


def test_runs_are_listed_in_the_order_in_which_they_began(job):
    for name, time in (("b", 10), ("a", 20), ("c", 5)):
        open_run.begin(changed(f"name={name}")).close()
        os.utime(Path("runs") / name / "job.yaml", (time, time))
    (Path("runs") / "no-run").mkdir()
    assert [run.name for run in run_folder.runs_in("runs")] == ["c", "b", "a"]


def test_finished_phases_and_metrics_are_read_from_the_files(job):
    run = open_run.begin(job)
    run.event("phase_finished", phase="sft")
    run.phase("sft").mkdir()
    SmallFiles().append(run.phase("sft") / "metrics.jsonl", {"step": 1, "loss": 2.0})
    assert run.finished_phases() == {"sft"}
    assert run.metrics("sft") == [{"step": 1, "loss": 2.0}]
    assert json.loads((run.folder / "events.jsonl").read_text().splitlines()[0])["event"] == "started"
    run.close()


# Going back


TWO = """\
name: two
model: {path: model, dtype: fp32}
resources: {gpus_per_worker: 0}
phases:
  first: {recipe: sft, data: {train: data/train.jsonl, max_length: 32}, max_steps: 4}
  second: {recipe: sft, data: {train: data/train.jsonl, max_length: 32}, max_steps: 4}
"""


@pytest.fixture
def finished(place):
    """A run of two phases that is done, with checkpoints of steps 2 and 4 of both."""
    Path("two.yaml").write_text(TWO)
    run = open_run.begin(jobs.load(Path("two.yaml")))
    for phase in ("first", "second"):
        run.event("training", phase=phase, step=0)
        for step in (2, 4):
            save_in(run.checkpoints(phase), step)
        run.event("phase_finished", phase=phase)
    run.event("done")
    run.close()
    return run_folder.find("two")


def rewound(run: run_folder.RunFolder, step: int, phase: str | None = None) -> open_run.OpenRun:
    return open_run.begin(run.job_here(), open_run.ResumeOptions(rewind=open_run.rewinding(run, step, phase)))


def test_going_back_in_the_last_phase_leaves_the_earlier_ones_finished(finished):
    assert open_run.rewinding(finished, 2) == {"second": 2}
    rewound(finished, 2).close()
    assert finished.finished_phases() == {"first"}
    assert finished.rewound_to() == {"second": 2}


def test_going_back_in_an_earlier_phase_does_the_later_ones_again_from_their_beginning(finished):
    assert open_run.rewinding(finished, 4, "first") == {"first": 4, "second": 0}
    rewound(finished, 4, "first").close()
    assert finished.finished_phases() == set()
    assert finished.rewound_to() == {"first": 4, "second": 0}


def test_a_phase_that_has_gone_on_is_no_longer_taken_back_and_one_that_has_not_still_is(finished):
    """The attempt that went back may be lost between two phases; the next goes on with what is left to do."""
    run = rewound(finished, 2, "first")
    run.event("training", phase="first", step=2)
    run.close()
    assert finished.rewound_to() == {"second": 0}
    open_run.begin(finished.job_here()).close()
    assert finished.rewound_to() == {"second": 0}


def test_a_step_or_phase_that_is_not_there_is_refused_with_what_is(finished):
    before = finished.events()
    with pytest.raises(InputError, match=r"step 3.*\b2, 4"):
        open_run.rewinding(finished, 3)
    with pytest.raises(InputError, match="no phase third; there are: first, second"):
        open_run.rewinding(finished, 2, "third")
    assert finished.events() == before


def test_accepting_changes_keeps_the_new_job_and_writes_down_what_was_another(job):
    open_run.begin(job).close()
    run = open_run.begin(changed("phases.sft.learning_rate=2e-3"), open_run.ResumeOptions(accept_changes=True))
    assert run.job().phases["sft"].learning_rate == 2e-3
    assert run.events()[-1]["changes"] == ["phases.sft.learning_rate: 0.001 -> 0.002"]
    assert run.accepted_before() == 2
    run.close()
    assert open_run.begin(changed("phases.sft.learning_rate=2e-3")).accepted_before() == 2


def test_settings_of_a_finished_phase_are_refused_unless_it_is_done_again(finished):
    back = open_run.ResumeOptions(rewind={"second": 2})
    of_first, of_second, of_both = (
        finished.job_here([f"{where}resources.threads=1"]) for where in ("phases.first.", "phases.second.", "")
    )
    told = "command line: phases.first.resources.threads: has no effect: the phase first is finished; "
    with pytest.raises(InputError) as caught:
        open_run.check(of_first, back)
    assert str(caught.value) == f"{told}rewind it with `muster resume RUN --step N --phase first`"
    open_run.check(of_first, open_run.ResumeOptions(rewind={"first": 2, "second": 0}))
    open_run.check(of_second, back)
    open_run.check(of_both, back)
    open_run.check(finished.job_here(["phases.first.resources.gpus_per_worker=0"]), back)  # as it is
    own = {"second": ["resources.threads"]}
    (finished.folder / "job.yaml").write_text(jobs.dump(replace(finished.job(), own_settings=own)))
    with pytest.raises(InputError, match=r"^command line: resources\.threads: has no effect: the phase first is"):
        open_run.check(finished.job_here(["resources.threads=1"]), back)


def test_a_run_goes_on_with_overrides_at_the_top_for_all_phases(finished):
    overridden = finished.job_here(["resources.workers=3", "sharding.stage=0"])
    open_run.begin(overridden, open_run.ResumeOptions(rewind={"second": 2})).close()
    assert [(p.resources.workers, p.sharding.stage) for p in finished.job().phases.values()] == [(3, 0), (3, 0)]


@pytest.mark.parametrize("override", ["name=x", "storage=x", " name =x"])
def test_a_run_keeps_its_folder(finished, override):
    with pytest.raises(InputError, match="a run cannot change its folder"):
        finished.job_here([override])
