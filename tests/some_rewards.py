"""Reward functions for tests, as users write them."""

from __future__ import annotations


def nines(prompts, completions, **columns):
    """How many nines there are."""
    return [float(text.count("9")) for text in completions]
