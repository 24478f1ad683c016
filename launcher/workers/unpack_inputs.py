"""Unpacks the files of a submitted job (launcher/submit/bundle.py) on a machine of the cluster.

The path of an input depends only on its content, so the job is the same in every submission and resumes where it
stopped.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from launcher.runfolder.cache import cache_folder

FOLDER, INPUTS, JOB = "submitted", "inputs", "job.yaml"
"""Names in a bundle."""


def land(unpacked: Path = Path()) -> Path | None:
    """Copy the inputs and return the folder of the job file; None if no bundle was unpacked."""
    came = unpacked / FOLDER
    if not came.is_dir():
        return None
    place = cache_folder() / FOLDER
    inputs = place / INPUTS
    inputs.mkdir(parents=True, exist_ok=True)
    for folder in came.glob(f"{INPUTS}/*"):
        _copy(folder, inputs / folder.name)
    return place


def _copy(folder: Path, to: Path) -> None:
    """Copy a folder atomically; several workers of a machine may do it at the same time."""
    if to.exists():
        return
    draft = Path(tempfile.mkdtemp(dir=to.parent, prefix="."))
    shutil.copytree(folder, draft, dirs_exist_ok=True)
    try:
        os.rename(draft, to)
    except OSError:  # another one was faster
        shutil.rmtree(draft)
