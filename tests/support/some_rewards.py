"""Reward functions for tests, as users write them: some are well, some are not."""

from __future__ import annotations

import time

NUMBER = 3


def nines(prompts, completions, **columns):
    """How many nines there are."""
    return [float(text.count("9")) for text in completions]


def length(prompts, completions, **columns):
    return [len(text) for text in completions]


def raises(prompts, completions, **columns):
    return [1 / 0 for _ in completions]


def gives_nan(prompts, completions, **columns):
    return [1.0, float("nan")]


def gives_text(prompts, completions, **columns):
    return ["good"] * len(completions)


def gives_too_few(prompts, completions, **columns):
    return [1.0]


def gives_nothing(prompts, completions, **columns):
    return None


def hangs(prompts, completions, **columns):
    time.sleep(2)
    return [0.0] * len(completions)
