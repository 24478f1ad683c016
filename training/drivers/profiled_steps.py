"""The steps that a phase wants profiled: asks the workers to begin before the first of them
and to end after the last."""

from __future__ import annotations

from collections.abc import Mapping

from training.config import Phase
from training.drivers.hooks import Hooks
from training.group import Group, results

_PROFILE_S = 1800.0
"""Longest time for making a table of the trace and writing both."""


class Profiled:
    """The profile of a phase. Without one in its settings nothing is asked of anybody."""

    def __init__(self, phase: Phase, groups: Mapping[str, Group], hooks: Hooks):
        self.hooks = hooks
        self.steps = range(phase.profile.first, phase.profile.last + 1) if phase.profile is not None else range(0)
        self.placements = {
            (roles or tuple(groups))[0]: groups[(roles or tuple(groups))[0]] for roles, _ in phase.placements
        }
        """One role of each group of workers: a worker is profiled with all that it hosts."""
        self.began = 0
        """The first step that is profiled, 0 if none is under way."""

    def before(self, step: int) -> None:
        """Step `step` is next."""
        if step in self.steps and not self.began:
            self.began = step
            for role in self.placements:
                self._ask(role, _told(step, self.steps[-1]), "begin_profile")

    def after(self, step: int) -> None:
        """Step `step` is done."""
        if self.steps and step >= self.steps[-1]:
            self.end(step)

    def end(self, step: int) -> None:
        """No step comes after `step`."""
        if not self.began:
            return
        steps = _told(self.began, step)
        for role in self.placements:
            self._ask(role, steps, "end_profile", str(self.hooks.profiles), role, steps, step - self.began + 1)
        self.began = 0

    def _ask(self, role: str, steps: str, method: str, *args: object) -> None:
        """Only the first worker of a group answers, and only if it has something to say."""
        answer = results(self.placements[role].call(method, *args), _PROFILE_S)[0]
        if answer is not None and "error" in answer:
            self.hooks.event("profile_failed", steps=steps, error=answer["error"])
        elif answer is not None:
            self.hooks.event("profiled", steps=steps, **answer)


def _told(first: int, last: int) -> str:
    """As in the settings."""
    return str(first) if first == last else f"{first}-{last}"
