"""How Muster starts Python processes of its own: they import the code that started them,
and nothing from the working folder."""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Mapping
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def module_command(module: str, *arguments: str) -> list[str]:
    """Runs a module of Muster. -P: `-m` alone would put the working folder before the standard library."""
    return [sys.executable, "-P", "-m", module, *arguments]


def with_own_code(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of such a process: PYTHONPATH begins with the folder of Muster's packages,
    where it needs to be named.

    Empty entries are left out: to Python they are the working folder.
    """
    given = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    entries = dict.fromkeys([*code_folders(), *given])
    return {**environment, "PYTHONPATH": os.pathsep.join(entries)} if entries else _without_python_path(environment)


def code_folders() -> list[str]:
    """The folder of Muster's packages. Empty where they are installed: before the standard library,
    site-packages would hide parts of it."""
    installed = {Path(folder).resolve() for folder in (*site.getsitepackages(), site.getusersitepackages())}
    return [] if _ROOT in installed else [str(_ROOT)]


def _without_python_path(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name != "PYTHONPATH"}
