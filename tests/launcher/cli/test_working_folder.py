"""The folder that a command runs in is not a library: nothing of Muster imports what lies there,
and a user's own modules are still found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.jobfile import job as jobs
from launcher.process.subprocesses import code_folders, with_own_code
from training.data.reward_signature import check
from training.errors import InputError
from training.rl.reward_functions import imported

HOSTILE = (
    "json.py",
    "uuid.py",
    "training/__init__.py",
    "launcher/__init__.py",
    "cluster/__init__.py",
    "ray/__init__.py",
)
PPO = """
model: {path: model}
phases:
  ppo:
    data: {train: data/train.jsonl}
    reward: REWARD
    critic: model
"""


def write_hostile(folder: Path) -> Path:
    """Modules in a folder that leave a file behind when they are imported, and fail; returns that file."""
    proof = folder / "was-imported"
    for name in HOSTILE:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"import os\nos.close(os.open({str(proof)!r}, os.O_CREAT))\nraise SystemExit(7)\n")
    return proof


@pytest.mark.cpu
@pytest.mark.faults
def test_a_run_imports_nothing_from_its_working_folder(place):
    proof = write_hostile(place)
    command = [str(Path(sys.executable).with_name("muster")), "run", "job.yaml"]
    ended = subprocess.run(command, cwd=place, text=True, capture_output=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert not proof.exists()
    assert (place / "runs/sums/sft/model/model.safetensors").is_file()


@pytest.mark.cpu
def test_a_model_is_examined_without_the_working_folder(place):
    proof = write_hostile(place)
    command = [str(Path(sys.executable).with_name("muster")), "check", "job.yaml"]
    ended = subprocess.run(
        command, cwd=place, text=True, capture_output=True, timeout=120,
        env={**os.environ, "MUSTER_CACHE": str(place / "cache")}
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert not proof.exists()


def test_the_code_that_travels_comes_before_what_is_installed_and_empty_entries_go():
    path = with_own_code({"PYTHONPATH": os.pathsep.join(["", "/mine", ""])})["PYTHONPATH"]
    assert path.split(os.pathsep) == [*code_folders(), "/mine"]
    found = subprocess.run(
        [sys.executable, "-P", "-c", "import launcher; print(launcher.__file__)"],
        env=with_own_code(os.environ), cwd="/", text=True, capture_output=True, check=True,
    )  # fmt: skip
    assert Path(found.stdout.strip()) == Path(jobs.__file__).parents[1] / "__init__.py"


# Reward functions


def make_package(folder: Path) -> None:
    """mypkg/rewards.py, which uses its own package, a module beside it,
    and a library whose name a file here has too."""
    (folder / "mypkg").mkdir()
    (folder / "mypkg/__init__.py").write_text("")
    (folder / "mypkg/parts.py").write_text("ONE = 1.0\n")
    (folder / "besides_mypkg.py").write_text("TWO = 2.0\n")
    (folder / "zipapp.py").write_text("raise RuntimeError('the file in the folder of the job was imported')\n")
    (folder / "mypkg/rewards.py").write_text(
        "import zipapp\nfrom besides_mypkg import TWO\nfrom mypkg.parts import ONE\n\n"
        "def score(prompts, completions):\n    return [ONE + TWO for _ in completions]\n"
    )


@pytest.fixture
def own_modules():
    """Forgets what a test imports."""
    before, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]
    assert sys.path == path


def reward_of(file: Path):
    return jobs.load(file).phases["ppo"].rewards[0]


@pytest.mark.usefixtures("own_modules")
def test_a_module_of_the_job_is_found_beside_its_file_from_any_folder(place, tmp_path, monkeypatch):
    make_package(place)
    (place / "ppo.yaml").write_text(PPO.replace("REWARD", "mypkg.rewards:score"))
    monkeypatch.chdir(tmp_path)
    source = reward_of(place / "ppo.yaml")
    assert source.folder == str(place)
    assert check(jobs.load(place / "ppo.yaml").phases["ppo"]) == []
    assert imported(source.path, source.folder)(["p"], ["c"]) == [3.0]
    with pytest.raises(InputError, match="No module named 'mypkg_elsewhere'"):
        imported("mypkg_elsewhere:score", source.folder)


def test_a_module_named_on_the_command_line_is_found_in_the_current_folder(place, tmp_path, monkeypatch):
    (place / "ppo.yaml").write_text(PPO.replace("REWARD", "other:score"))
    monkeypatch.chdir(tmp_path)
    phase = jobs.load(place / "ppo.yaml", ["phases.ppo.reward=mypkg.rewards:score"]).phases["ppo"]
    assert phase.rewards[0].folder == str(tmp_path)


def test_a_resolved_job_keeps_the_folder_and_an_older_one_means_the_current_folder(place, tmp_path, monkeypatch):
    (place / "ppo.yaml").write_text(PPO.replace("REWARD", "mypkg.rewards:score"))
    job = jobs.load(place / "ppo.yaml")
    resolved, older = tmp_path / "job.yaml", tmp_path / "older.yaml"
    resolved.write_text(jobs.dump(job))
    older.write_text(jobs.dump(job).replace(f"folder: {place}", "folder: null"))
    monkeypatch.chdir("/")
    assert reward_of(resolved).folder == str(place)
    assert reward_of(older).folder == "/"
    assert (
        len({jobs.job_hash(jobs.read(file)) for file in (resolved, older)}) == 1
    )  # where modules lie is not the curve


@pytest.mark.usefixtures("own_modules")
def test_a_reward_file_does_not_stand_in_for_a_library_of_its_name(tmp_path):
    file = tmp_path / "colorsys.py"
    file.write_text("import colorsys\n\ndef score(completions):\n    return [colorsys.rgb_to_hsv(0, 0, 1)[2]]\n")
    assert imported(f"{file}:score")(completions=["c"]) == [1]


def test_a_folder_for_what_is_no_function_is_refused(place):
    (place / "ppo.yaml").write_text(PPO.replace("REWARD", "[{path: model, folder: data}]"))
    with pytest.raises(InputError, match="`folder` has no effect"):
        jobs.load(place / "ppo.yaml")


@pytest.mark.parametrize(
    "verb",
    ["run job.yaml", "check job.yaml", "plan job.yaml", "list", "status sums", "cluster status here", "init new"],
)
def test_a_deleted_working_folder_is_refused(tmp_path, verb):
    gone = tmp_path / "gone"
    gone.mkdir()
    muster = Path(sys.executable).with_name("muster")
    command = ["sh", "-c", f"rmdir {gone} && exec {muster} {verb}"]
    ended = subprocess.run(command, cwd=gone, text=True, capture_output=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr == "working folder: it has been deleted; change to another folder and try again\n"
