"""A submitted job on its cluster: puts what came along in its place, and runs it as `muster run` or `muster resume` would.

Inputs get a place that depends on their content alone, so the job is the same job in every submission, and goes on where it stopped.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import typer

from launcher import bundle, runs
from launcher.cache import cache_folder
from launcher.verbs import NoPreflight, console, verb


def land(unpacked: Path = Path()) -> Path | None:
    """The folder of the job file, with the inputs beside it, after copying them there; None where no bundle was unpacked."""
    came = unpacked / bundle.FOLDER
    if not came.is_dir():
        return None
    place = cache_folder() / bundle.FOLDER
    inputs = place / bundle.INPUTS
    inputs.mkdir(parents=True, exist_ok=True)
    for folder in came.glob(f"{bundle.INPUTS}/*"):
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


site = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def run(
    file: Path,
    step: int | None = None,
    phase: str | None = None,
    accept_changes: bool = False,
    no_preflight: NoPreflight = False,
) -> int:
    """As `muster run`, or as `muster resume` if there is something to go back to or to accept."""
    from launcher import attempts, check, driver

    job = check.load(file, [], inline=False)
    rewind = {} if step is None else attempts.rewinding(runs.find(f"{job.storage}/{job.name}"), step, phase)
    return driver.run_job(
        job,
        inline=False,
        console=console(),
        go_on=attempts.GoOn(rewind=rewind, accept_changes=accept_changes),
        preflight=not no_preflight,
    )


verb(run, of=site)


def main() -> None:
    """Entry point of the job, in the folder where its bundle was unpacked."""
    from launcher import sealed

    sealed.open_environment()
    place = land()
    assert place is not None, "a submitted job comes in a bundle"
    descriptor, file = tempfile.mkstemp(dir=place, suffix=".yaml")
    with os.fdopen(descriptor, "wb") as out:
        out.write((Path(bundle.FOLDER) / bundle.JOB).read_bytes())
    try:
        site([file, *sys.argv[1:]])
    finally:
        os.unlink(file)


if __name__ == "__main__":
    main()
