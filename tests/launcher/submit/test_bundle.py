"""What goes along with a job to a cluster: what it names, nothing else, the same each time; secrets sealed."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest

from launcher.jobfile import job as jobs
from launcher.submit import bundle, sealed_env
from launcher.workers import unpack_inputs
from training.errors import InputError


def written(place: Path, shared: tuple[str, ...] = (), overrides: tuple[str, ...] = ()) -> dict[str, bytes]:
    """The files of the bundle of job.yaml, by name."""
    file = place / "bundle.zip"
    job = jobs.load(place / "job.yaml", overrides, elsewhere=shared)
    bundle.write(job, "s3://bucket/runs", shared, file)
    with zipfile.ZipFile(file) as packed:
        return {name: packed.read(name) for name in packed.namelist()}


def unpacked(place: Path, files: dict[str, bytes]) -> Path:
    folder = place / "unpacked"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_the_job_goes_along_with_what_it_names_and_muster_and_nothing_else(place):
    (place / "secret.txt").write_text("not for others")
    (place / "data" / "other.jsonl").write_text("{}")
    names = set(written(place))
    carried = {name for name in names if name.startswith("submitted/")}
    assert {Path(name).name for name in carried} == {
        "job.yaml", "train.jsonl", "heldout.jsonl", "config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    rest = names - carried
    assert {name.partition("/")[0] for name in rest} == {"launcher", "training", "cluster"}
    assert {
        "launcher/cli/cluster_entrypoint.py",
        "launcher/scaffold/templates/sft.yaml",
        "training/engine/engine.py",
    } <= rest
    assert not any("__pycache__" in name or name.endswith(".pyc") for name in rest)


def test_equal_inputs_are_an_equal_bundle_whenever_and_wherever_it_is_made(place):
    first = (place / "bundle.zip", written(place))[0].read_bytes()
    os.utime(place / "data" / "train.jsonl", (0, 0))
    written(place)
    assert (place / "bundle.zip").read_bytes() == first
    (place / "data" / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    written(place)
    assert (place / "bundle.zip").read_bytes() != first


def test_on_site_the_job_is_the_same_job_with_paths_that_depend_on_content(place, monkeypatch):
    monkeypatch.setenv("MUSTER_CACHE", str(place / "cache"))
    landed = unpack_inputs.land(unpacked(place, written(place)))
    assert landed is not None
    (landed / "job.yaml").write_bytes(written(place)["submitted/job.yaml"])
    there, here = jobs.load(landed / "job.yaml"), jobs.load(place / "job.yaml")
    assert there.storage == "s3://bucket/runs"
    told = {line.partition(":")[0] for line in jobs.differences(here, there)}
    assert told == {f"phases.sft.{key}" for key in ("data.train", "data.eval", "model.path")}
    train = Path(str(there.phases["sft"].data.train))
    assert train.read_bytes() == (place / "data/train.jsonl").read_bytes()
    assert train.is_relative_to(place / "cache")
    assert unpack_inputs.land(unpacked(place, written(place))) == landed  # once more changes nothing


def test_without_a_bundle_there_is_nothing_to_land(place):
    assert unpack_inputs.land() is None


def test_globs_folders_and_reward_functions_go_along(place):
    (place / "parts").mkdir()
    for number in range(2):
        (place / f"parts/{number}.jsonl").write_text((place / "data/train.jsonl").read_text())
    files = written(place, overrides=("phases.sft.data.train=parts/*.jsonl",))
    job = files["submitted/job.yaml"].decode()
    assert sorted(Path(name).name for name in files if "parts" in name or "0000" in name) == [
        "00000-0.jsonl",
        "00001-1.jsonl",
    ]
    assert "/files" in job
    files = written(place, overrides=("phases.sft.data.train=parts",))
    assert sum(name.endswith(("parts/0.jsonl", "parts/1.jsonl")) for name in files) == 2


SECRET = "not for others"


def refused_links(place: Path, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as refused:
        written(place, overrides=overrides)
    assert all("is a link to" in problem.message for problem in refused.value.problems)
    return [problem.where for problem in refused.value.problems]


def test_hidden_files_of_folders_stay_here_and_so_do_those_of_data_that_nobody_reads(place):
    rows = (place / "data/train.jsonl").read_text()
    for name in (
        "data/.env",
        "data/.git/config",
        "data/notes.md",
        "data/.train.jsonl",
        "model/.env",
        "model/.git/config",
    ):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(rows if name.endswith(".jsonl") else SECRET)
    files = written(place, overrides=("phases.sft.data.train=data",))
    assert not any(SECRET.encode() in content for content in files.values())
    names = sorted(Path(name).name for name in files if name.startswith("submitted/") and "/data/" in name)
    assert names == ["heldout.jsonl", "train.jsonl"]


def test_links_out_of_what_the_job_names_are_refused_by_name_and_nothing_is_written(place):
    (place / "id_rsa").write_text(SECRET)
    (place / "secrets").mkdir()
    (place / "secrets" / "key").write_text(SECRET)
    links = [place / "model" / "vocab.txt", place / "model" / "extra", place / "model" / "gone.txt"]
    for link, target in zip(links, ("../id_rsa", "../secrets", "../nowhere"), strict=True):
        link.symlink_to(target)
    (place / "parts").mkdir()
    (place / "parts" / "a.jsonl").write_text((place / "data/train.jsonl").read_text())
    (place / "parts" / "b.jsonl").symlink_to("../id_rsa")
    for source in ("parts", "parts/*.jsonl"):
        refused = refused_links(place, f"phases.sft.data.train={source}")
        assert sorted(refused) == sorted(map(str, [*links, place / "parts" / "b.jsonl"]))
    assert not (place / "bundle.zip").exists()


def test_links_inside_a_folder_and_those_of_a_snapshot_in_the_hubs_cache_are_followed(place):
    weights = (place / "model/model.safetensors").read_bytes()
    cached = place / "hub" / "models--some--model"
    snapshot = cached / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cached / "blobs").mkdir()
    for number, file in enumerate(sorted((place / "model").iterdir())):
        (cached / "blobs" / f"{number}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "copy.safetensors").symlink_to("model.safetensors")
    files = written(place, overrides=(f"model.path={snapshot}",))
    sent = {Path(name).name: content for name, content in files.items() if "/abc/" in name}
    assert sent["model.safetensors"] == sent["copy.safetensors"] == weights
    (place / "id_rsa").write_text(SECRET)
    (snapshot / "other").symlink_to(place / "id_rsa")
    assert refused_links(place, f"model.path={snapshot}") == [str(snapshot / "other")]


def test_a_data_set_that_save_to_disk_wrote_goes_along_with_what_describes_it(place):
    saved = place / "saved"
    saved.mkdir()
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "rows.arrow"}]}))
    (saved / "rows.arrow").write_bytes(b"rows")
    (saved / "cache-1.arrow").write_bytes(SECRET.encode())
    files = written(place, overrides=("phases.sft.data.train=saved",))
    assert sorted(Path(name).name for name in files if "/saved/" in name) == ["rows.arrow", "state.json"]


def test_what_every_machine_sees_stays_where_it_is(place):
    files = written(place, shared=(str(place / "data"), str(place / "model")))
    assert {name for name in files if name.startswith("submitted/")} == {"submitted/job.yaml"}
    assert str(place / "data/train.jsonl") in files["submitted/job.yaml"].decode()


def test_a_shared_folder_need_not_be_seen_from_here(place):
    away = ("phases.sft.data.train=/shared/train.jsonl", "model.path=/shared/model", "phases.sft.data.eval=null")
    job = written(place, shared=("/shared",), overrides=away)["submitted/job.yaml"].decode()
    assert "/shared/train.jsonl" in job
    with pytest.raises(InputError, match="no such file"):
        written(place, overrides=away)


def test_large_files_are_refused_by_name_with_advice(place, monkeypatch):
    monkeypatch.setattr(bundle, "LIMIT", 3000)
    with pytest.raises(InputError) as refused:
        written(place)
    (problem,) = refused.value.problems
    assert problem.where == str(place / "model")  # the data alone would do
    assert "upload it and set its address" in problem.message


TOKEN, OTHER = "a" * 64, "b" * 64


def test_secrets_are_sealed_with_the_clusters_token():
    text = sealed_env.seal({"HF_TOKEN": "hf_secret"}, TOKEN)
    assert "hf_secret" not in text
    assert "HF_TOKEN" not in text
    assert sealed_env.unseal(text, TOKEN) == {"HF_TOKEN": "hf_secret"}
    with pytest.raises(InputError, match="a different token"):
        sealed_env.unseal(text, OTHER)


def test_on_site_the_sealed_text_is_opened_and_gone(monkeypatch, tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv(sealed_env.VARIABLE, sealed_env.seal({"WANDB_API_KEY": "w"}, TOKEN))
    sealed_env.open_environment()
    assert os.environ["WANDB_API_KEY"] == "w"
    assert sealed_env.VARIABLE not in os.environ


def test_the_names_of_variables_are_in_the_job_and_their_values_are_not(place, monkeypatch):
    monkeypatch.setenv("SECRET_OF_MINE", "s3cr3t")
    files = written(place, overrides=("env=[SECRET_OF_MINE]",))
    assert "SECRET_OF_MINE" in files["submitted/job.yaml"].decode()
    assert not any(b"s3cr3t" in content for content in files.values())


def test_a_variable_that_is_not_set_is_told_with_its_line(place, muster):
    (place / "job.yaml").write_text("env: [NO_SUCH_VARIABLE, not-a-name]\n" + (place / "job.yaml").read_text())
    answer = muster("check", "job.yaml")
    assert answer.status == 2
    assert "job.yaml:1: env.1: " in answer.err
    (place / "job.yaml").write_text((place / "job.yaml").read_text().replace(", not-a-name", ""))
    answer = muster("check", "job.yaml")
    assert (answer.status, json.dumps(answer.err)) == (
        2,
        json.dumps(
            "job.yaml:1: env.0: NO_SUCH_VARIABLE is not set in the environment; `export NO_SUCH_VARIABLE=...`, or "
            "leave it out\n"
        ),
    )
