"""The command in a process of its own that is forked from one which has imported everything: a
tenth of a second instead of ten."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.support.fork_group import in_a_process


def muster(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit status, and what it printed, of `muster ARGUMENTS` in a folder.

    Not for what a library reads from the environment when it is imported, nor for signals.
    """
    return in_a_process(_command, folder, arguments, {**os.environ, **environment})


def _command(folder: Path, arguments: tuple[str, ...], environment: Mapping[str, str]) -> tuple[int, str]:
    from launcher.cli import main

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with tempfile.TemporaryFile() as out:
        for number in (1, 2):
            os.dup2(out.fileno(), number)
        sys.argv = ["muster", *arguments]
        status = 0
        try:
            main.main()
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
        out.seek(0)
        return status, out.read().decode()
