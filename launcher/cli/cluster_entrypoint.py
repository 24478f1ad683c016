"""A submitted job on its cluster: runs it as `muster run` or `muster resume` would."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import typer

from launcher import interrupts, landing, runs
from launcher.verbs import NoPreflight, console, verb

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
    interrupts.exit_on_signals()
    from launcher import sealed

    sealed.open_environment()
    place = landing.land()
    assert place is not None, "a submitted job comes in a bundle"
    descriptor, file = tempfile.mkstemp(dir=place, suffix=".yaml")
    with os.fdopen(descriptor, "wb") as out:
        out.write((Path(landing.FOLDER) / landing.JOB).read_bytes())
    try:
        site([file, *sys.argv[1:]])
    finally:
        os.unlink(file)


if __name__ == "__main__":
    main()
