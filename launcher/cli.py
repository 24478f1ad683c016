"""The `muster` command: parse, call, print. No logic, and nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from training.errors import InputError, MusterError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Fine-tunes language models on as many machines as you give it.",
)  # fmt: skip

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="Job file.", show_default=False)]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or its name under ./runs.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings laid over the file's.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Inline = Annotated[bool, typer.Option("--inline", help="One worker, in this process, without Ray.")]


def verb(function: Callable) -> Callable:
    """Register a verb; its errors become lines of text and an exit status: 2 wrong input, 1 failed, 130 interrupted."""

    @app.command()
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            status = function(*args, **kwargs)
        except InputError as error:
            _fail(error, 2)
        except (MusterError, OSError) as error:
            _fail(error, 1)
        except KeyboardInterrupt:
            status = 130
        raise SystemExit(status or 0)

    return run


def _fail(error: Exception, status: int) -> None:
    print(error, file=sys.stderr)
    raise SystemExit(status)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _console() -> Any:
    from rich.console import Console

    return Console()


@verb
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    seed: Annotated[int, typer.Option(help="Seed of the sample data and the model.")] = 17,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
) -> None:
    """Make a working folder: sample data, a tiny model, a job file for every recipe."""
    from launcher import scaffold

    for line in scaffold.write(folder, seed=seed, force=force):
        print(line)


@verb
def check(job: JobFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Validate the job file and every row of its data. Starts nothing."""
    from launcher import check as checks

    report = checks.check(job, overrides or [])
    if as_json:
        return _print_json(report)
    for line in checks.lines(report):
        print(line)
    return None


@verb
def run(job: JobFile, overrides: Overrides = None, inline: Inline = False) -> int:
    """Run a job here (or on the Ray cluster at RAY_ADDRESS). An interrupted run of the same job goes on."""
    from launcher import driver, job as jobs

    return driver.run_job(jobs.load(job, overrides or []), inline=inline, console=_console())


@verb
def resume(run: RunName, overrides: Overrides = None, inline: Inline = False) -> int:
    """Go on with a run from its last checkpoint."""
    from launcher import driver, job as jobs, runs

    folder = runs.find(run)
    job = jobs.load(folder.folder / runs.JOB, overrides or [])
    return driver.run_job(job, inline=inline, console=_console())


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
