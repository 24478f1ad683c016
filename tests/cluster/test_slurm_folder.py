"""The folder of Ray in a Slurm job: one name on all nodes, which nobody can guess, made for its owner alone.
With stand-ins for Slurm and Ray."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cluster.providers.slurm import SlurmProvider
from cluster.spec import Slurm

STANDINS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "ray": (
        'echo "$@" >> "$STARTED"; for word; do case "$word" in --temp-dir=*) stat -c "%a" "$(dirname "${word#*=}")" >> '
        '"$MODES";; esac; done; echo --block; exec sleep 60'
    ),
    "python": 'case "$*" in *sys.executable*) echo "$0";; *zipfile*) mkdir "$4";; *) echo "python $*" >> "$STARTED";; '
    "esac",
    "hostname": "echo 127.0.0.1",
}


@pytest.fixture
def batch(tmp_path):
    """batch(**stand-ins) runs the script of a job on two nodes; returns its exit status."""
    spec = Slurm(
        provider="slurm",
        name="s",
        folder=str(tmp_path / "jobs"),
        workers_per_node=1,
        python=str(tmp_path / "bin/python"),
    )
    job = tmp_path / "jobs" / "one"
    job.mkdir(parents=True)

    def run(**more: str) -> int:
        (tmp_path / "bin").mkdir(exist_ok=True)
        for name, text in {**STANDINS, **more}.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        (job / "batch.sh").write_text(SlurmProvider(spec).batch_script("one", workers=2, names=()))
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1",
            "SLURMD_NODENAME": "n1",
            "STARTED": str(tmp_path / "started"), "MODES": str(tmp_path / "modes"), "HOME": str(tmp_path),
        }  # fmt: skip
        return subprocess.run(["bash", str(job / "batch.sh")], env=environment, timeout=60, check=False).returncode

    return run


def words(tmp_path: Path) -> list[str]:
    return (tmp_path / "started").read_text().split()


def test_the_folder_is_made_for_its_owner_with_a_name_from_the_token_and_is_gone_afterwards(batch, tmp_path):
    assert batch() == 0
    (folder,) = {Path(word.partition("=")[2]).parent for word in words(tmp_path) if word.startswith("--temp-dir=")}
    assert (tmp_path / "modes").read_text().split() == ["700"]
    assert "-P" in words(tmp_path), "the working folder is not searched by the job's Python"
    assert not folder.exists()
    assert batch() == 0
    folders = {Path(word.partition("=")[2]).parent for word in words(tmp_path) if word.startswith("--temp-dir=")}
    assert len(folders) == 2, "another token is another name"
    assert not any(each.name.rpartition("-")[2] == "7" for each in folders)


def test_a_folder_that_is_there_already_ends_the_job_before_ray_starts(batch, tmp_path):
    taken = "0123456789abcdef"
    folder = Path(f"/tmp/muster-{taken}")
    folder.mkdir(exist_ok=True)
    try:
        assert batch(sha256sum=f"echo {taken}") == 1
        assert not (tmp_path / "started").exists()
    finally:
        folder.rmdir()
