"""Runs, checkpoints, token stores and cluster records of earlier commits go on working.
`make.py` tells how the archives were made."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import registry as homes
from launcher.jobfile import job
from launcher.runfolder.run_folder import RunFolder
from launcher.submit import clusters

pytestmark = [pytest.mark.cpu, pytest.mark.xdist_group("old_runs")]
ROUNDING = 1e-5
"""Relative: other processors add up in another order."""


@pytest.fixture(scope="module", params=["3f9f597"])
def unpacked(request: pytest.FixtureRequest) -> Iterator[Path]:
    """What an archive holds, in the folder where it was made: the paths of a run's inputs are
    part of its job's hash."""
    folder = Path(f"/tmp/muster-{request.param}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    with tarfile.open(Path(__file__).with_name(f"{request.param}.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def old(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as the current folder, with its cache and its clusters."""
    monkeypatch.chdir(unpacked)
    monkeypatch.setenv("MUSTER_CACHE", str(unpacked / "cache"))
    monkeypatch.setenv("MUSTER_HOME", str(unpacked / "home"))
    return unpacked


def run_of(name: str) -> RunFolder:
    return RunFolder(Path("runs") / name)


def stores_in(old: Path) -> list[Path]:
    return sorted((old / "cache").glob("*/meta.json"))


def last_row(run: RunFolder, phase: str, key: str) -> dict[str, float]:
    """The last row of metrics that is one of a training step."""
    return [row for row in run.metrics(phase) if key in row][-1]


def test_a_job_of_then_has_the_hash_that_it_had(old):
    hashes = json.loads((old / "hashes.json").read_text())
    assert {name: job.job_hash(job.read(old / name)) for name in hashes} == hashes


@pytest.mark.parametrize("name", ["plain", "chats"])
def test_a_token_store_of_then_is_found_again(old, name):
    from training.data.phase_data import open_stores

    before = stores_in(old)
    for phase, settings in run_of(name).job().phases.items():
        manifest = json.loads(next(old.glob(f"runs/{name}/{phase}/checkpoints/*/manifest.json")).read_text())
        assert open_stores(settings, old / "cache").train.folder.name == manifest["data_hash"], phase
    assert stores_in(old) == before


@pytest.mark.parametrize(
    ("phase", "step", "keys"), [("sft", 2, ["loss", "grad_norm"]), ("ppo", 1, ["reward", "policy_loss"])]
)
def test_a_run_of_then_goes_on_from_its_checkpoint(old, muster, phase, step, keys):
    run = run_of("plain")
    before = last_row(run, phase, keys[0])
    answer = muster("resume", "plain", "--step", str(step), "--phase", phase, "--inline")
    assert answer.status == 0, answer.err
    after = last_row(run, phase, keys[0])
    assert after["attempt"] > before["attempt"]
    assert [after[key] for key in keys] == pytest.approx([before[key] for key in keys], rel=ROUNDING)


def test_adapters_of_two_workers_go_on_with_one(old, muster):
    run = run_of("chats")
    before = last_row(run, "sft", "loss")
    settings = [
        f"phases.{phase}.{key}" for phase in ("sft", "cft") for key in ("resources.workers=1", "sharding.stage=0")
    ]
    answer = muster("resume", "chats", "--step", "2", "--phase", "sft", "--inline", *settings)
    assert answer.status == 0, answer.err
    after = last_row(run, "sft", "loss")
    assert (before["workers"], after["workers"]) == (2, 1)
    assert after["loss"] == pytest.approx(before["loss"], rel=ROUNDING)


@pytest.mark.parametrize("verb", ["list", "status", "checkpoints"])
def test_a_run_of_then_is_shown(old, muster, verb):
    named = () if verb == "list" else ("chats",)
    answer = muster(verb, *named, "--json")
    assert answer.status == 0, answer.err
    assert "chats" in answer.out


def test_models_of_then_are_asked_exported_and_reported(old, muster, tmp_path):
    for path in ("plain/sft", "chats/cft"):
        answer = muster("generate", f"runs/{path}", "-p", "3 + 1 =", "--max-new-tokens", "3", "--json")
        assert answer.status == 0, answer.err
    assert muster("export", "chats", "--merge", "--out", str(tmp_path / "merged")).status == 0
    assert (tmp_path / "merged/model.safetensors").exists()
    assert muster("report", "plain", "chats", "--out", str(tmp_path / "report.html")).status == 0


def test_records_of_clusters_of_then_are_read(old, muster):
    names = sorted(folder.name for folder in (old / "home/clusters").iterdir())
    assert [clusters.target(name).spec.name for name in names] == names
    assert {clusters.target(name).spec.provider for name in names} >= {
        "local",
        "aws",
        "gcp",
        "azure",
        "kubernetes",
        "ssh",
    }
    assert muster("cluster", "down", "here").status == 0  # its processes ended long ago
    assert homes.find("here") is None
