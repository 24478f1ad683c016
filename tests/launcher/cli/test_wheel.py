"""A wheel that is built from the checkout has every file, and works where only it
and the dependencies are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from launcher.submit.bundle import PACKAGES

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools leaves folders beside what it builds."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    _pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(built), str(source))
    (file,) = built.glob("muster_train-*.whl")
    return file


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    ended = subprocess.run(command, text=True, capture_output=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_wheel_has_every_file_of_the_packages(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(PACKAGES)}
    files = {
        path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()
    }
    assert packed == {file for file in files if "__pycache__" not in file}


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Path:
    """The programs of an environment with the wheel and, by a .pth file, the dependencies, but without the checkout."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    (packages,) = home.glob("lib/python*/site-packages")
    ours = [folder for folder in sys.path if Path(folder).name == "site-packages"]
    (packages / "dependencies.pth").write_text("\n".join(ours))
    _pip(
        "--python", str(home / "bin" / "python"), "install", "--no-deps", "--no-index", "--ignore-installed", str(wheel)
    )
    return home / "bin"


def test_the_installed_wheel_makes_a_folder_checks_trains_and_reports(installed, tmp_path):
    def output(*command: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        ended = subprocess.run(
            [installed / command[0], *command[1:]],
            cwd=tmp_path,
            env=environment,
            text=True,
            capture_output=True,
            timeout=200,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    listed = output(
        "python", "-c", f"import {', '.join(PACKAGES)}; print(*(m.__file__ for m in ({', '.join(PACKAGES)})))"
    )
    assert all(Path(file).is_relative_to(installed.parent) for file in listed.split())
    output("muster", "init", "work")
    few = ["resources.workers=1", "phases.sft.max_steps=2", "phases.sft.batch=4", "phases.sft.eval_every=2"]
    output("muster", "check", "work/sft.yaml", *few)
    output("muster", "run", "work/sft.yaml", "--inline", *few)
    assert (tmp_path / "work/runs/word-problems/sft/model/model.safetensors").is_file()
    output("muster", "report", "work/runs/word-problems")
    assert "word-problems" in (tmp_path / "report.html").read_text()
