"""What all verbs share: registration, help, the end of the process, common arguments. Imports nothing heavy."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec

import typer
from typer.core import TyperCommand, TyperGroup

from cluster.errors import ClusterError, Refused
from launcher.driver import signals
from launcher.process.exit_status import ExitStatus
from launcher.process.terminal import printable
from training import __version__
from training.errors import InputError, MusterError
from training.metric_schema import with_old_names

Arguments = ParamSpec("Arguments")

GROUPS = {
    "Begin and control runs": ("init", "check", "plan", "run", "resume", "save"),
    "Look at runs": ("list", "status", "logs", "report", "compare", "checkpoints"),
    "Use models": ("generate", "eval", "export", "critique"),
    "Use clusters": ("cluster", "submit", "stop"),
    "Test recovery": ("chaos",),
}
"""The verbs in the order in which the help lists them, under their headings."""


class _Verbs(TyperGroup):
    """All verbs; its help lists them by GROUPS."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for names in GROUPS.values() for name in names]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(map(len, self.commands))
        for heading, names in GROUPS.items():
            with formatter.section(heading):
                formatter.write_dl([(f"{name:<{width}}", self.commands[name].get_short_help_str()) for name in names])


app = typer.Typer(
    cls=_Verbs, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Fine-tune language models on one machine or a cluster, with Ray and DeepSpeed.",
    epilog="`muster COMMAND --help` shows the options of a command, and examples.",
)  # fmt: skip
clusters = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Start, inspect and shut down clusters.",
)  # fmt: skip
app.add_typer(clusters, name="cluster")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"muster {__version__}")
        raise typer.Exit


@app.callback()
def _top_level(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before a verb."""


JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="The job file.", show_default=False)]
RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run folder, the name of one in ./runs, or its address (s3://...).", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that override the job file.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Inline = Annotated[bool, typer.Option("--inline", help="Use a single worker, in this process, without Ray.")]
Force = Annotated[bool, typer.Option("--force", help="Run even if the plan predicts out-of-memory.")]
NoPreflight = Annotated[
    bool, typer.Option("--no-preflight", help="Skip the check of the machines before the first step.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model. The setting in a run's job file has no effect here.",
    ),
]
On = Annotated[
    str | None,
    typer.Option(
        "--on", metavar="CLUSTER", help="The name of a cluster that is up, a cluster file, or http://HOST:PORT."
    ),
]


_USAGE_ERROR: Any = typer.BadParameter.__base__
"""Typer has its own copy of click, whose exceptions it does not export."""


class _Command(TyperCommand):
    """A verb: its help ends with examples; its error for an unknown option suggests a setting that may be meant."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if examples := (self.epilog or "").splitlines():
            with formatter.section("Examples"):
                for example in examples:
                    formatter.write(f"  {example}\n")

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


def verb(
    *examples: str, of: typer.Typer = app
) -> Callable[[Callable[Arguments, int | None]], Callable[Arguments, None]]:
    """Register a function as a verb; its errors become lines of text, and like signals an exit status (exit_status.py).

    The first paragraph of its docstring is the summary in the list of verbs; `examples` are commands for the end of its
    help.
    """

    def register(function: Callable[Arguments, int | None]) -> Callable[Arguments, None]:
        @of.command(
            function.__name__.rstrip("_"), cls=_Command, short_help=_summary(function), epilog="\n".join(examples)
        )
        @wraps(function)
        def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
            try:
                with signals.raised():
                    _require_working_folder()
                    status = function(*args, **kwargs)
            except (InputError, Refused) as error:
                fail(error, ExitStatus.INVALID_INPUT)
            except (MusterError, ClusterError, OSError) as error:
                fail(error, ExitStatus.FAILED)
            except KeyboardInterrupt:
                status = signals.status()
            raise SystemExit(status or ExitStatus.DONE)

        return run

    return register


def _summary(function: Callable[..., object]) -> str:
    return " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())


cluster_verb = partial(verb, of=clusters)


def _require_working_folder() -> None:
    """Raises InputError if the working folder has been deleted: no path could be made absolute."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError.of("working folder", "it has been deleted; change to another folder and try again") from None


def fail(error: Exception, status: ExitStatus) -> NoReturn:
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


def show_metrics(value: Any, as_lines: Callable[[Any], Iterable[str]], as_json: bool) -> None:
    """Like `show`. In JSON, renamed metrics have their old names, too."""
    show(with_old_names(value) if as_json else value, as_lines, as_json)


def console() -> Any:
    """Where a run says what it does. Names of columns, metrics and files, and what workers print, may hold anything."""
    from rich.console import Console

    class SafeConsole(Console):
        def print(self, *texts: Any, **how: Any) -> None:
            super().print(*(printable(text) if isinstance(text, str) else text for text in texts), **how)

    return SafeConsole()
