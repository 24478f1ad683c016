"""The verbs that speak to clusters: parse, call, print."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli.common import Force, JobFile, Json, NoPreflight, On, Overrides, cluster_verb, show, verb
from launcher.driver import signals
from launcher.process.exit_status import INTERRUPTED
from launcher.process.terminal import printable
from training.errors import InputError

JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of a job on the cluster.", show_default=False)]
ClusterFile = Annotated[Path, typer.Argument(metavar="FILE", help="Cluster file.", show_default=False)]
ClusterName = Annotated[str, typer.Argument(metavar="NAME", help="Name of a cluster that is up.", show_default=False)]


def _write(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def _note(text: str) -> None:
    print(printable(text), file=sys.stderr)


def _wanted(on: str | None) -> str:
    if on is None:
        raise InputError.of("command line", "name the cluster with --on")
    return on


@verb
def submit(
    job: JobFile,
    overrides: Overrides = None,
    on: On = None,
    force: Force = False,
    no_preflight: NoPreflight = False,
    as_json: Json = False,
) -> None:
    """Hand a job over to a cluster and print its id there. A run of the same job that was interrupted goes on."""
    from launcher.submit import submission

    words = words_for(no_preflight)
    show(submission.submit(job, overrides or [], _wanted(on), words, force=force), submission.submitted_lines, as_json)


def words_for(no_preflight: bool) -> list[str]:
    """For the driver on the cluster (launcher/cli/cluster_entrypoint.py)."""
    return ["--no-preflight"] if no_preflight else []


def run_on(job: Path, overrides: Sequence[str], on: str, words: Sequence[str], *, force: bool) -> int:
    from launcher.submit import submission

    facts = submission.submit(job, overrides, on, words, force=force)
    for line in submission.submitted_lines(facts):
        print(line)
    return _follow(facts["id"], on)


def resume_on(job: str, overrides: Sequence[str], on: str, words: Sequence[str], *, force: bool) -> None:
    from launcher.submit import submission

    for line in submission.submitted_lines(submission.resume(job, overrides, on, words, force=force)):
        print(line)


def _follow(name: str, on: str) -> int:
    from launcher.submit import clusters
    from launcher.submit import jobs as submit

    try:
        facts = submit.follow(clusters.target(on).jobs, name, _write, _note)
    except KeyboardInterrupt:
        _note(
            f"the job goes on; `muster logs -f {name} --on {on}` follows it again, `muster stop {name} --on {on}` ends it"
        )
        return signals.status()
    if facts["state"] == "stopped":
        return INTERRUPTED
    return 0 if facts["state"] == "succeeded" else facts["exit_status"] or 1


@verb
def logs(
    job: JobId,
    on: On = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Until the job is over. Exits with its status.")
    ] = False,
) -> int:
    """What a job of a cluster has printed."""
    from launcher.submit import clusters
    from launcher.submit import jobs as jobs

    if follow:
        return _follow(job, _wanted(on))
    _write(jobs.logs(clusters.target(_wanted(on)).jobs, job))
    return 0


@verb
def stop(job: JobId, on: On = None, as_json: Json = False) -> None:
    """Have a job of a cluster save a checkpoint and end. Submitting it again goes on from there."""
    from launcher.submit import clusters, submission
    from launcher.submit import jobs as jobs

    found = clusters.target(_wanted(on))
    show([jobs.stop(found.jobs, job, found.spec.stop_s + 60)], submission.job_lines, as_json)


def save_on(job: str, on: str, as_json: bool) -> None:
    from launcher.runfolder import save_request
    from launcher.submit import clusters
    from launcher.submit import jobs as jobs

    show(jobs.save(clusters.target(on).jobs, job), save_request.lines, as_json)


def list_on(on: str, as_json: bool) -> None:
    from launcher.submit import clusters, submission
    from launcher.submit import jobs as jobs

    show(jobs.listing(clusters.target(on).jobs), submission.job_lines, as_json)


def status_on(job: str, on: str, as_json: bool) -> None:
    from launcher.submit import clusters, submission
    from launcher.submit import jobs as jobs

    show([jobs.status(clusters.target(on).jobs, job)], submission.job_lines, as_json)


@cluster_verb
def render(file: ClusterFile) -> None:
    """Print what `up` would do."""
    from launcher.submit import clusters

    print(clusters.render(file), end="")


@cluster_verb
def up(file: ClusterFile) -> None:
    """Start a cluster."""
    from launcher.submit import clusters

    name = clusters.up(file, print)
    print(f"{name} is up; `muster submit JOB --on {name}` hands a job over, `muster cluster down {name}` ends it")


@cluster_verb
def down(
    name: ClusterName,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="End jobs that run too, without a checkpoint; leave machines that cannot be reached."
        ),
    ] = False,
) -> None:
    """End a cluster."""
    from launcher.submit import clusters

    clusters.down(name, print, force=force)
    print(f"{name} is down")


@cluster_verb
def status_(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Default: all.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Machines, GPUs and jobs of the clusters that are up."""
    from launcher.submit import clusters

    show(clusters.status(name), clusters.status_lines, as_json)


@cluster_verb
def doctor(file: ClusterFile, as_json: Json = False) -> int:
    """What a cluster lacks, before it is started. Exit status 1 if something is not well."""
    from launcher.submit import clusters

    findings = clusters.doctor(file)
    shown: Any = [vars(finding) for finding in findings] if as_json else findings
    show(shown, clusters.doctor_lines, as_json)
    return int(not all(finding.well for finding in findings))
