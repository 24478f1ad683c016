"""`checkpoint_quota`: the oldest checkpoints of a run go, some never do,
and what cannot be kept is refused or noted once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.driver import checkpoint_quota as quota
from launcher.driver import open_run
from launcher.driver.checkpoint_quota import Stored, surplus
from launcher.jobfile import job as jobs
from tests.support.made_checkpoints import save
from training import storage
from training.checkpoint.format import Manifest
from training.checkpoint.repository import Checkpoints, opened, step_of
from training.errors import InputError
from training.storage import StoragePath


def stored(*sizes: int, protected: tuple[int, ...] = ()) -> list[Stored]:
    return [Stored(storage.open_storage(f"/c/{i}"), size, i in protected) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("found", "limit", "gone", "excess"),
    [
        (stored(10, 10, 10), 40, [], 0),
        (stored(10, 10, 10), 39, [0], 0),
        (stored(10, 10, 10, protected=(0, 2)), 30, [1], 0),
        (stored(10, 10, 10, protected=(0, 2)), 25, [1], 5),
        (stored(4, 10, 10), 21, [0, 1], 0),
        ([], 5, [], 5),
    ],
)
def test_the_oldest_go_until_another_one_fits(found, limit, gone, excess):
    assert surplus(found, limit, room=10) == ([found[i] for i in gone], excess)


@pytest.fixture(params=["folder", "bucket"])
def run(request, place, s3):
    """A run of two phases, of which the first has ended with step 20."""
    where = "runs" if request.param == "folder" else s3.url + "/runs"
    settings = "{recipe: sft, data: {train: data/train.jsonl}, max_steps: 40}"
    job = jobs.load(Path("job.yaml"), [f"phases.two={settings}", f"storage={where}", "track=[]"])
    opened_run = open_run.begin(job)
    opened_run.event("phase_finished", phase="sft", checkpoint="x/step-00000020", model="-")
    yield opened_run
    opened_run.close()


def saved(run, phase: str, *steps: int) -> dict[int, StoragePath]:
    checkpoints = opened(run.checkpoints(phase), 1)
    folders = {step: save(checkpoints, step) for step in steps}
    checkpoints.close()
    return folders


def steps(run) -> dict[str, list[int]]:
    return {phase: [step_of(f) for f in Checkpoints(run.checkpoints(phase)).folders()] for phase in ("sft", "two")}


def with_quota(run, size: int):
    return replace(run.job(), checkpoint_quota=f"{size / 10**6:.6f}MB")


def test_room_is_made_over_all_phases_but_not_by_what_a_run_needs(run):
    saved(run, "sft", 10, 20, 30)
    folders = saved(run, "two", 1, 2, 3)
    size = max(sum(file.size for file in Manifest.read(folder).files) for folder in folders.values())
    assert quota.make_room(run, with_quota(run, 7 * size), "two", None) == 0
    assert steps(run) == {"sft": [10, 20, 30], "two": [1, 2, 3]}
    assert quota.make_room(run, with_quota(run, 5 * size), "two", folders[1]) == 0
    assert steps(run) == {"sft": [20], "two": [1, 2, 3]}
    assert 0 < quota.make_room(run, with_quota(run, 3 * size), "two", folders[1]) <= size
    assert steps(run) == {"sft": [20], "two": [1, 3]}, "what sft has ended with, the best, the newest"


def test_nothing_goes_while_the_newest_is_not_whole(run):
    folders = saved(run, "two", 1, 2)
    (folders[2] / Manifest.read(folders[2]).files[0].name).remove()
    assert quota.make_room(run, with_quota(run, 1), "two", None) == 0
    assert steps(run)["two"] == [1, 2]


def test_a_quota_that_cannot_hold_two_checkpoints_is_refused_before_anything_starts(muster, place):
    answer = muster("run", "job.yaml", "--inline", "checkpoint_quota=0.1MB")
    assert answer.status == 2
    assert answer.errors[-1].startswith(
        "command line: checkpoint_quota: 0.1MB has no room for two checkpoints of sft: one stays"
    )
    assert not Path("runs/sums").exists()
    assert "checkpoint_quota: 0.1MB has no room" in muster("plan", "job.yaml", "checkpoint_quota=0.1MB").out
    jobs_with = jobs.load(Path("job.yaml"), ["checkpoint_quota=1TB"])
    quota.check(jobs_with)
    with pytest.raises(InputError, match="beside the last of every phase before"):
        two = "phases.two={recipe: sft, data: {train: data/train.jsonl}}"
        needed = 2 * quota._planned_bytes(jobs_with, "sft")
        quota.check(jobs.load(Path("job.yaml"), [f"checkpoint_quota={needed * 1.2 / 10**6:.6f}MB", two]))


def test_what_no_quota_can_be_is_told(muster, place):
    answer = muster("check", "job.yaml", "checkpoint_quota=200", "max_hours=-1")
    assert answer.status == 2
    assert {line.split(": ")[1] for line in answer.errors} == {"checkpoint_quota", "max_hours"}
    answer = muster("check", "job.yaml", "checkpoint_quota=0GB")
    assert answer.errors == ['command line: checkpoint_quota: got "0GB", expected a size such as 200GB, 1.5TB or 64GiB']


@pytest.mark.cpu
def test_a_run_stays_within_its_quota_and_says_once_when_it_cannot(muster, place):
    often = ("phases.sft.max_steps=6", "phases.sft.checkpoint={every: 1, keep: 9}")
    job = jobs.load(Path("job.yaml"))
    size = quota._planned_bytes(job, "sft")
    answer = muster("run", "job.yaml", "--inline", *often, f"checkpoint_quota={3.2 * size / 10**6:.6f}MB")
    assert answer.status == 0, answer.out
    run = Path("runs/sums")
    assert [step_of(f) for f in Checkpoints(place_of(run)).folders()] == [4, 5, 6]
    assert "quota_exceeded" not in (run / "events.jsonl").read_text()
    answer = muster("run", "job.yaml", "--inline", "--force", *often, "name=small", "checkpoint_quota=0.1MB")
    assert (answer.status, answer.out.count("checkpoint_quota 0.1MB is exceeded")) == (0, 1), answer.out
    assert [step_of(f) for f in Checkpoints(place_of(Path("runs/small"))).folders()] == [5, 6]


def place_of(run: Path) -> StoragePath:
    return storage.open_storage(run / "sft/checkpoints")


@pytest.mark.parametrize("quota", ["5", "five", "0GB", "true"])
def test_a_quota_that_is_no_size_is_told_what_one_looks_like(place, quota):
    with pytest.raises(InputError, match="checkpoint_quota: got .*, expected a size such as 200GB"):
        jobs.load(place / "job.yaml", [f"checkpoint_quota={quota}"])
