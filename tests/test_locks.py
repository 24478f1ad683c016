"""The lock files hold what pyproject.toml asks for, each file by its hash,
and are what this environment was built from."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCKS = ("cpu", "cuda", "dev", "audit", "site")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins(lock):
    """Versions by name, of what is installed on Linux. Every requirement must have a hash."""
    found = {}
    for block in re.split(r"\n(?=\S)", (ROOT / f".ci/{lock}.lock").read_text()):
        line, *hashes = block.replace("\\\n", "\n").strip().splitlines()
        if not line.startswith("#"):
            requirement = Requirement(line)
            assert hashes, f"{line} has no hash"
            assert all(re.fullmatch(r"\s*--hash=sha256:[0-9a-f]{64}\s*", each) for each in hashes), line
            if requirement.marker is None or "==" in str(requirement.marker):
                found[requirement.name] = str(requirement.specifier).removeprefix("==")
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_every_file_has_a_hash(lock):
    assert len(pins(lock)) > 20


@pytest.mark.parametrize("lock", ["cpu", "cuda"])
def test_what_the_project_needs_is_in_the_lock(lock):
    pinned = pins(lock)
    for line in [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["s3"]]:
        need = Requirement(line)
        assert need.specifier.contains(pinned[need.name.lower()].partition("+")[0]), line


def test_what_the_tests_need_is_in_a_lock():
    pinned = pins("cpu") | pins("dev")
    for line in PROJECT["project"]["optional-dependencies"]["dev"]:
        assert Requirement(line).name.lower() in pinned, line


def test_cpu_and_cuda_differ_in_torch_alone():
    cpu, cuda = pins("cpu"), pins("cuda")
    more = cuda.keys() - cpu.keys()
    assert all(name.startswith(("nvidia-", "cuda-", "triton")) for name in more), more
    assert {name for name in cpu if cpu[name] != cuda[name]} == {"torch"}
    assert cpu["torch"] == cuda["torch"] + "+cpu"


def test_nothing_makes_ray_slow_to_import():
    """jsonschema, which Ray imports in every process, builds a grammar of URLs
    if it finds this package: seconds each time."""
    assert "rfc3987-syntax" not in pins("cpu") | pins("dev")


def test_the_build_backend_is_the_pinned_one():
    assert PROJECT["build-system"]["requires"] == [f"setuptools=={pins('dev')['setuptools']}"]


def test_this_environment_has_the_pinned_versions():
    lock = "cpu" if "+cpu" in version("torch") else "cuda"
    wanted = pins(lock) | pins("dev")
    here = {name: version(name) for name in wanted}
    wanted["torch"] = here["torch"] if here["torch"].partition("+")[0] == pins("cuda")["torch"] else wanted["torch"]
    assert here == wanted


def test_the_lock_that_fits_the_torch_of_this_machine():
    said = subprocess.run([sys.executable, ROOT / ".ci/which_lock.py"], capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip() == ("cpu" if "+cpu" in version("torch") else "cuda")
    assert "torch: torch-" in said.stderr


def test_the_audit_tells_what_it_found_and_what_it_has_no_answer_for():
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci/audit.py")
    audit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(audit)
    packages = [
        {"name": "a", "version": "1", "vulns": []},
        {
            "name": "b",
            "version": "2",
            "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}, {"id": "CVE-2", "fix_versions": []}],
        },
        {"name": "c", "skip_reason": "not found"},
    ]
    assert audit.vulnerable(packages) == ["b 2: CVE-1, mended in 2.1", "b 2: CVE-2, mended in no version"]
    assert audit.unanswered(packages) == {"c"}
