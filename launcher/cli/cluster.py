"""The verbs that speak to clusters: parse, call, print."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli.common import Force, JobFile, Json, NoPreflight, On, Overrides, cluster_verb, show, verb
from launcher.driver import signals
from launcher.process.exit_status import ExitStatus
from launcher.process.terminal import printable
from training.errors import InputError

JobId = Annotated[str, typer.Argument(metavar="ID", help="The id of a job on the cluster.", show_default=False)]
ClusterFile = Annotated[Path, typer.Argument(metavar="FILE", help="The cluster file.", show_default=False)]
ClusterName = Annotated[
    str, typer.Argument(metavar="NAME", help="The name of a cluster that is up.", show_default=False)
]


def _write(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def _note(text: str) -> None:
    print(printable(text), file=sys.stderr)


def _wanted(on: str | None) -> str:
    if on is None:
        raise InputError.of("command line", "name the cluster with --on")
    return on


@verb("muster submit sft.yaml --on lab", "muster submit sft.yaml max_hours=8 --on clusters/aws.yaml")
def submit(
    job: JobFile,
    overrides: Overrides = None,
    on: On = None,
    force: Force = False,
    no_preflight: NoPreflight = False,
    as_json: Json = False,
) -> None:
    """Submit a job to a cluster and print its id there.

    An interrupted run of the same job is resumed.
    """
    from launcher.submit import submission

    words = words_for(no_preflight)
    show(submission.submit(job, overrides or [], _wanted(on), words, force=force), submission.submitted_lines, as_json)


def words_for(
    no_preflight: bool, step: int | None = None, phase: str | None = None, accept_changes: bool = False
) -> list[str]:
    """The same options for the driver on the cluster (launcher/cli/cluster_entrypoint.py)."""
    words = ["--step", str(step)] if step is not None else []
    words += ["--phase", phase] if phase is not None else []
    words += ["--no-preflight"] if no_preflight else []
    return words + (["--accept-changes"] if accept_changes else [])


def run_on(job: Path, overrides: Sequence[str], on: str, words: Sequence[str], *, force: bool) -> int:
    from launcher.submit import submission

    info = submission.submit(job, overrides, on, words, force=force)
    for line in submission.submitted_lines(info):
        print(line)
    return _follow(info["id"], on)


def resume_on(job: str, overrides: Sequence[str], on: str, words: Sequence[str], *, force: bool) -> None:
    from launcher.submit import submission

    for line in submission.submitted_lines(submission.resume(job, overrides, on, words, force=force)):
        print(line)


def _follow(name: str, on: str) -> int:
    from launcher.submit import clusters
    from launcher.submit import jobs as submit

    try:
        info = submit.follow(clusters.target(on).jobs, name, _write, _note)
    except KeyboardInterrupt:
        _note(
            f"the job goes on; `muster logs -f {name} --on {on}` follows it again, `muster stop {name} --on {on}` ends "
            "it"
        )
        return signals.status()
    if info["state"] == "stopped":
        return ExitStatus.INTERRUPTED
    return ExitStatus.DONE if info["state"] == "succeeded" else info["exit_status"] or ExitStatus.FAILED


@verb("muster logs word-problems-1 --on lab", "muster logs -f word-problems-1 --on lab")
def logs(
    job: JobId,
    on: On = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Follow the output until the job ends, and exit with the job's status."),
    ] = False,
) -> int:
    """Print the output of a job of a cluster."""
    from launcher.submit import clusters
    from launcher.submit import jobs as jobs

    if follow:
        return _follow(job, _wanted(on))
    _write(jobs.logs(clusters.target(_wanted(on)).jobs, job))
    return ExitStatus.DONE


@verb("muster stop word-problems-1 --on lab")
def stop(job: JobId, on: On = None, as_json: Json = False) -> None:
    """Save a checkpoint of a job of a cluster, and stop the job.

    Submitting the job again resumes it from that checkpoint.
    """
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


@cluster_verb("muster cluster render configs/clusters/aws.yaml")
def render(file: ClusterFile) -> None:
    """Print what `muster cluster up` would do."""
    from launcher.submit import clusters

    print(clusters.render(file), end="")


@cluster_verb("muster cluster up configs/clusters/aws.yaml")
def up(file: ClusterFile) -> None:
    """Start a cluster."""
    from launcher.submit import clusters

    name = clusters.up(file, print)
    print(f"{name} is up; `muster submit JOB --on {name}` hands a job over, `muster cluster down {name}` ends it")


@cluster_verb("muster cluster down lab")
def down(
    name: ClusterName,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Shut down even if jobs run (they save no checkpoint) or machines cannot be reached."
        ),
    ] = False,
) -> None:
    """Shut down a cluster."""
    from launcher.submit import clusters

    clusters.down(name, print, force=force)
    print(f"{name} is down")


@cluster_verb("muster cluster status lab")
def status_(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The name of a cluster. Default: all.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the machines, GPUs and jobs of clusters that are up."""
    from launcher.submit import clusters

    show(clusters.status(name), clusters.status_lines, as_json)


@cluster_verb("muster cluster doctor configs/clusters/aws.yaml")
def doctor(file: ClusterFile, as_json: Json = False) -> int:
    """Check what a cluster needs before it is started.

    Exit status 1 means that a check has failed.
    """
    from launcher.submit import clusters

    findings = clusters.doctor(file)
    shown: Any = [vars(finding) for finding in findings] if as_json else findings
    show(shown, clusters.doctor_lines, as_json)
    return ExitStatus.DONE if all(finding.well for finding in findings) else ExitStatus.FAILED
