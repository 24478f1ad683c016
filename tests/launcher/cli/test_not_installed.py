"""Machines and images bring the dependencies alone, as the docs ask: Muster's code travels
with a job and is not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path

import pytest

from launcher.submit.bundle import PACKAGES
from training import __version__

pytestmark = pytest.mark.cpu
CODE = Path(__file__).parents[3]
LISTED = "from importlib.metadata import distributions; print(*(each.metadata['Name'] for each in distributions()))"


@pytest.fixture
def python(tmp_path) -> str:
    """An environment with all packages of this one but Muster."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    (packages,) = home.glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "muster" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    return str(home / "bin" / "python")


@pytest.fixture
def code(tmp_path) -> Path:
    """Muster's packages as a job takes them along: without what tools leave beside them in a checkout."""
    for name in PACKAGES:
        shutil.copytree(CODE / name, tmp_path / "code" / name)
    return tmp_path / "code"


def test_a_run_saves_and_is_reported_where_muster_is_not_installed(place, python, code):
    environment = {**os.environ, "PYTHONPATH": str(code), "PATH": f"{Path(python).parent}:{os.environ['PATH']}"}

    def output(*command: str) -> str:
        ended = subprocess.run([python, *command], env=environment, text=True, capture_output=True, timeout=300)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    packages = set(output("-c", LISTED).split())
    assert {"ray", "torch"} < packages
    assert "muster-train" not in packages
    output("-m", "launcher", "run", "job.yaml")
    manifests = sorted(place.glob("runs/sums/sft/checkpoints/*/manifest.json"))
    assert [json.loads(file.read_text())["versions"]["muster-train"] for file in manifests] == [__version__] * 2
    output("-m", "launcher", "report", "runs/sums")
    assert (place / "report.html").is_file()


def test_the_version_is_that_of_the_distribution():
    assert __version__ == version("muster-train")
