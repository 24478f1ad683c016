"""Models and data sets of the Hugging Face hub at a commit: a branch that moves does not change a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.jobfile import job as jobs
from launcher.runfolder.hub_revisions import Named, commit_of, look_up, with_commits
from tests.support.hub_server import Hub, Repository, files_of, hub_server, run_commands
from training.errors import InputError

OLD, NEW = "a" * 40, "b" * 40
HUB_JOB = """\
name: hub
model: {path: org/tiny, dtype: fp32, revision: v1}
resources: {workers: 1, gpus_per_worker: 0}
phases:
  sft:
    data: {train: [{path: org/sums, revision: old}, org/more@v2, mine.jsonl], eval: org/sums, max_length: 32}
    eval: {data: org/sums@test}
    max_steps: 1
    batch: 4
  again: {recipe: sft, from: sft, data: {train: mine.jsonl}, max_steps: 1, batch: 4}
"""


@pytest.fixture
def hub_job(place) -> Path:
    (place / "mine.jsonl").write_text((place / "data/train.jsonl").read_text())
    (place / "hub.yaml").write_text(HUB_JOB)
    return Path("hub.yaml")


def test_commits_take_the_place_of_branches(hub_job):
    commits = {
        "model org/tiny@v1": OLD,
        "dataset org/sums@old": OLD,
        "dataset org/more@v2": NEW,
        "dataset org/sums": NEW,
        "dataset org/sums@test": OLD,
    }
    job = jobs.load(hub_job)
    phase = with_commits(job.phases["sft"], commits)
    assert phase.model.revision == OLD
    first, second, third = phase.data.train
    assert (first.path, first.revision) == ("org/sums", OLD)
    assert second == f"org/more@{NEW}"
    assert third == str(hub_job.absolute().parent / "mine.jsonl")
    assert phase.data.eval == f"org/sums@{NEW}"
    assert phase.eval.data == f"org/sums@{OLD}"
    assert with_commits(job.phases["again"], commits).model.revision == OLD, "it starts from what the first one did"
    assert with_commits(job.phases["sft"], {}) == job.phases["sft"]


def test_what_is_recorded_or_a_commit_already_is_not_looked_up(hub_job, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr("launcher.runfolder.hub_revisions.commit_of", lambda named: asked.append(named.key))
    look_up(jobs.load(hub_job, [f"model.revision={OLD}"]), {"dataset org/sums": NEW})
    assert asked == ["dataset org/sums@old", "dataset org/more@v2", "dataset org/sums@test"]


def test_without_a_network_the_cache_of_the_library_tells(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert constants.HF_HUB_OFFLINE
    for named in (Named("model", "org/tiny", None), Named("dataset", "org/sums", "refs/pr/1")):
        assert commit_of(named) is None
        ref = tmp_path / f"{named.kind}s--{named.name.replace('/', '--')}/refs/{named.revision or 'main'}"
        ref.parent.mkdir(parents=True)
        ref.write_text(OLD)
        assert commit_of(named) == OLD


def test_the_hub_is_asked_and_says_what_it_has_not(monkeypatch):
    from huggingface_hub import constants

    with hub_server() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.hf_api.HF_HUB_OFFLINE", False, raising=False)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url, raising=False)
        repository = hub.repositories["models org/tiny"] = Repository()
        first = repository.commit({"config.json": b"1"})
        tagged = repository.commit({"config.json": b"2"}, "v1")
        assert commit_of(Named("model", "org/tiny", None)) == first
        assert commit_of(Named("model", "org/tiny", "v1")) == tagged
        with pytest.raises(InputError, match=r"org/tiny: the model on the hub has no branch, tag or commit v3"):
            commit_of(Named("model", "org/tiny", "v3"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.revision=main",
            "command line: model.revision: has no effect: PLACE/model is no model on the Hugging Face hub",
        ),
        (
            "model.tokenizer_revision=main",
            "command line: model.tokenizer_revision: has no effect: model.tokenizer is not set",
        ),
        (
            "phases.sft.data.train=[{path: data/train.jsonl, revision: v1}]",
            "`revision` has no effect: this is no data set on the Hugging Face hub",
        ),
        (
            "phases.sft.data.train=[{path: org/sums@v1, revision: v2}]",
            "the name says the revision v1, `revision` says v2; keep one",
        ),
    ],
)
def test_revisions_without_effect_are_refused(place, muster, override, message):
    answer = muster("check", "job.yaml", override)
    assert answer.status == 2
    assert message.replace("PLACE", str(place)) in answer.err


def test_a_job_without_revisions_is_the_job_that_it_was(place):
    listed = "phases.sft.data.train=[{path: data/train.jsonl}]"
    text = jobs.dump(jobs.load(Path("job.yaml"), [listed]))
    lines = [line for line in text.splitlines() if "revision: null" not in line]
    assert len(lines) < len(text.splitlines())
    (place / "old.yaml").write_text("\n".join(lines) + "\n")
    assert jobs.job_hash(jobs.load(Path("job.yaml"), [listed])) == jobs.job_hash(jobs.read(Path("old.yaml")))


JOB = """\
name: NAME
model: {path: org/tiny, dtype: fp32}
resources: {workers: 1, gpus_per_worker: 0}
sharding: {stage: 0}
phases:
  sft:
    data: {train: org/sums, template: none, max_length: 32}
    max_steps: 4
    batch: 4
    learning_rate: 1.0e-3
    checkpoint: {every: 2}
"""


def run(hub: Hub, folder: Path, *commands: list[str]) -> None:
    run_commands(folder, {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}, *commands)


def losses(folder: Path, name: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / f"runs/{name}/sft/metrics.jsonl").open()]


@pytest.mark.cpu
def test_a_branch_that_moves_does_not_change_a_run(place):
    from safetensors.numpy import load_file, save

    with hub_server() as hub:
        model = hub.repositories["models org/tiny"] = Repository()
        rows = hub.repositories["datasets org/sums"] = Repository()
        files = files_of(place / "model")
        first_model = model.commit(files)
        first_rows = rows.commit({"train.jsonl": (place / "data/train.jsonl").read_bytes()})
        for name in ("once", "pinned", "moved"):
            (place / f"{name}.yaml").write_text(JOB.replace("NAME", name))
        run(hub, place, ["run", "once.yaml", "--inline"])
        before = losses(place, "once")

        weights = {name: values * 1.5 for name, values in load_file(place / "model/model.safetensors").items()}
        model.commit({**files, "model.safetensors": save(weights, {"format": "pt"})})
        rows.commit({"train.jsonl": (place / "data/heldout.jsonl").read_bytes()})
        run(
            hub,
            place,
            ["resume", "runs/once", "--step", "2", "--inline"],
            ["run", "moved.yaml", "--inline"],
            [
                "run",
                "pinned.yaml",
                "--inline",
                f"model.revision={first_model}",
                f"phases.sft.data.train=org/sums@{first_rows}",
            ],
        )
    events = [json.loads(line) for line in (place / "runs/once/events.jsonl").open()]
    (recorded,) = [event["commits"] for event in events if event["event"] == "revisions"]
    assert recorded == {"model org/tiny": first_model, "dataset org/sums": first_rows}
    assert losses(place, "once") == before, "the same bits: nothing that it is made from has moved"
    assert losses(place, "pinned") == before
    assert losses(place, "moved")[0] != before[0]
