"""A submitted job on its cluster: runs it as `muster run` or `muster resume` would."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import typer

from launcher.cli.common import NoPreflight, console, verb
from launcher.driver import signals
from launcher.runfolder import run_folder
from launcher.workers import unpack_inputs

site = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def run(
    file: Path,
    step: int | None = None,
    phase: str | None = None,
    accept_changes: bool = False,
    no_preflight: NoPreflight = False,
) -> int:
    """As `muster run`, or as `muster resume` if there is something to go back to or to accept."""
    from launcher.driver import check, driver, open_run

    job = check.load(file, [], inline=False)
    rewind = {} if step is None else open_run.rewinding(run_folder.find(f"{job.storage}/{job.name}"), step, phase)
    return driver.run_job(
        job,
        inline=False,
        console=console(),
        resume_options=open_run.ResumeOptions(rewind=rewind, accept_changes=accept_changes),
        preflight=not no_preflight,
    )


verb(of=site)(run)


def main() -> None:
    """Entry point of the job, in the folder where its bundle was unpacked."""
    signals.exit_on_signals()
    from launcher.submit import sealed_env

    sealed_env.open_environment()
    place = unpack_inputs.land()
    assert place is not None, "a submitted job comes in a bundle"
    descriptor, file = tempfile.mkstemp(dir=place, suffix=".yaml")
    with os.fdopen(descriptor, "wb") as out:
        out.write((Path(unpack_inputs.FOLDER) / unpack_inputs.JOB).read_bytes())
    try:
        site([file, *sys.argv[1:]])
    finally:
        os.unlink(file)


if __name__ == "__main__":
    main()
