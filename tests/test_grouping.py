"""Tests side by side: those of a group stay together, and with CI=true nothing is left out for a missing tool."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = """
import os
import pytest

@pytest.fixture(scope="session")
def ray_cluster():
    pass

@pytest.mark.parametrize("number", range(6))
def test_of_the_file(number):
    print("FILE", os.getpid())

@pytest.mark.parametrize("number", range(6))
def test_of_the_fixture(ray_cluster, number):
    print("FIXTURE", os.getpid())

@pytest.mark.parametrize("number", [pytest.param(n, marks=pytest.mark.xdist_group(f"part {n % 2}")) for n in range(12)])
def test_of_the_mark(number):
    print("MARK", number % 2, os.getpid())

def test_without_a_gpu():
    pytest.skip("this machine has no GPU")

def test_without_a_tool():
    pytest.skip("needs a hammer")
"""
CONFTEST = """
from pathlib import Path
from tests.support import grouping
pytest_plugins = ["tests.support.skips"]
grouping.TESTS = Path(__file__).parent

def pytest_collection_modifyitems(config, items):
    if config.getoption("loadgroup", False):
        grouping.arrange(items)
"""


def run(folder: Path, ci: str, *words: str) -> str:
    (folder / "test_parts.py").write_text(TESTS)
    (folder / "conftest.py").write_text(CONFTEST)
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-rA",
            "--rootdir",
            str(folder),
            str(folder),
            *words,
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": root, "CI": ci},
    )
    return done.stdout + done.stderr


def test_the_tests_of_a_group_run_in_one_process(tmp_path):
    out = run(tmp_path, "", "-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder")
    lines = [line for line in out.splitlines() if line.startswith(("FILE", "FIXTURE", "MARK"))]
    assert len(lines) == 24, out
    assert len(set(lines)) == 4, "a group was divided"
    assert len({line.split()[-1] for line in lines}) == 2, "one process had nothing to do"


def test_with_ci_a_missing_tool_is_a_failure_and_a_missing_gpu_is_not(tmp_path):
    out = run(tmp_path, "true", "-k", "without")
    assert "1 failed, 1 skipped" in out.splitlines()[-1], out
    assert "With CI=true this test must not be skipped: needs a hammer" in out
    assert "1 passed" not in out
    assert "2 skipped" in run(tmp_path, "", "-k", "without").splitlines()[-1]
