"""What all verbs share: how one is registered and how it ends, the arguments that many take. Nothing heavy is imported here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from cluster.errors import ClusterError, Refused
from launcher.driver import signals
from launcher.process.exit_status import DONE, FAILED, INPUT_WRONG
from launcher.process.terminal import printable
from training.errors import InputError, MusterError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Fine-tunes language models on as many machines as you give it.",
)  # fmt: skip
clusters = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Make clusters, look at them, end them.",
)  # fmt: skip
app.add_typer(clusters, name="cluster")

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="Job file.", show_default=False)]
RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="Run folder, its name under ./runs, or its address (s3://...).", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings laid over the file's.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Inline = Annotated[bool, typer.Option("--inline", help="One worker, in this process, without Ray.")]
Force = Annotated[bool, typer.Option("--force", help="Also what by the plan cannot fit into memory.")]
NoPreflight = Annotated[bool, typer.Option("--no-preflight", help="Do not look at the machines before the first step.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model. The job file of a run does not allow it here.",
    ),
]
On = Annotated[
    str | None,
    typer.Option("--on", metavar="CLUSTER", help="Name of a cluster that is up, cluster file, or http://HOST:PORT."),
]


_USAGE_ERROR: Any = typer.BadParameter.__base__
"""Typer has its own copy of click, whose exceptions it does not export."""


class _Command(TyperCommand):
    """A verb whose error for an unknown option has the setting of a job that was perhaps meant: those are key=value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except _USAGE_ERROR as error:
            takes_settings = any(parameter.name == "overrides" for parameter in self.params)
            if (
                takes_settings and hasattr(error, "possibilities") and not error.possibilities
            ):  # of options, and none is near
                ctx.fail(f"{error}. {_as_setting(error.option_name)}")
            raise


def _as_setting(option: str) -> str:
    from launcher.jobfile.job import settings_named
    from launcher.jobfile.other_tools import name_here
    from launcher.jobfile.validation_messages import listed

    key = option.lstrip("-").replace("-", "_")
    if "." in option:
        return f"Settings of a job are given without dashes: {option.lstrip('-')}=..."
    meant = name_here(key) or listed(f"{path}=..." for path in settings_named(key) or ["phases.NAME.learning_rate"])
    return f"Settings of a job are given as key=value: {meant}"


def verb(function: Callable, of: typer.Typer = app) -> Callable:
    """Register a verb; its errors become lines of text, and like signals an exit status (exit_status.py)."""

    @of.command(function.__name__.rstrip("_"), cls=_Command)
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with signals.raised():
                _require_working_folder()
                status = function(*args, **kwargs)
        except (InputError, Refused) as error:
            fail(error, INPUT_WRONG)
        except (MusterError, ClusterError, OSError) as error:
            fail(error, FAILED)
        except KeyboardInterrupt:
            status = signals.status()
        raise SystemExit(status or DONE)

    return run


cluster_verb = partial(verb, of=clusters)


def _require_working_folder() -> None:
    """Raises InputError if the folder that the command was started in has been deleted: no path could be made absolute."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError.of("working folder", "it has been deleted; change to another folder and try again") from None


def fail(error: Exception, status: int) -> NoReturn:
    """End the command with a line of text."""
    with suppress(OSError):  # whoever would have read it may be gone
        print(printable(str(error)), file=sys.stderr)
    raise SystemExit(status)


def show(value: Any, as_lines: Callable[[Any], Iterable[str]], as_json: bool) -> None:
    try:
        for line in [json.dumps(value, indent=1)] if as_json else as_lines(value):
            print(printable(line))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console() -> Any:
    """Where a run says what it does. Names of columns, metrics and files, and what workers print, may hold anything."""
    from rich.console import Console

    class SafeConsole(Console):
        def print(self, *texts: Any, **how: Any) -> None:
            super().print(*(printable(text) if isinstance(text, str) else text for text in texts), **how)

    return SafeConsole()
