"""Puts what came along with a submitted job (launcher/submit/bundle.py) in its place on a machine of the cluster.

Inputs get a place that depends on their content alone, so the job is the same job in every submission,
and goes on where it stopped.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from launcher.runfolder.cache import cache_folder

FOLDER, INPUTS, JOB = "submitted", "inputs", "job.yaml"
"""In a bundle."""


def land(unpacked: Path = Path()) -> Path | None:
    """The folder of the job file, with the inputs beside it, after copying them there;
    None where no bundle was unpacked."""
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
    """All or nothing, also when several workers of a machine do it at once."""
    if to.exists():
        return
    draft = Path(tempfile.mkdtemp(dir=to.parent, prefix="."))
    shutil.copytree(folder, draft, dirs_exist_ok=True)
    try:
        os.rename(draft, to)
    except OSError:  # another one was faster
        shutil.rmtree(draft)
