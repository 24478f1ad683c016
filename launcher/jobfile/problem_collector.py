"""Collects the problems of one document: each once, in the order of its lines, what came from the command line last."""

from __future__ import annotations

import math

from launcher.jobfile.yaml_with_lines import COMMAND_LINE, Document, KeyPath, dotted
from training.errors import InputError, Problem


class ProblemCollector:
    """The problems found so far. The same problem found through several phases counts once."""

    def __init__(self, document: Document):
        self._document = document
        self._lines: dict[Problem, float] = {}

    def add(self, path: KeyPath, message: str) -> None:
        problem = Problem(self._document.where(path), dotted(path), message)
        line = self._document.line(path)
        self._lines.setdefault(problem, math.inf if line == COMMAND_LINE else line or 0)

    def add_command_line(self, problem: Problem) -> None:
        self._lines[problem] = math.inf

    def raise_any(self) -> None:
        if self._lines:
            raise InputError(sorted(self._lines, key=self._lines.__getitem__))
