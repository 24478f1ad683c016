"""Shows the progress of a phase: a live line on a terminal, one aligned line per step in a file or pipe."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


_UNSHOWN = ("_low", "_high", "_eos_rate", "_tokens", "_per_s")
"""Ends of the names of evaluation metrics that would make the line too long; metrics.jsonl has them."""


_PARTS = ("sync", "generate", "score", "learn")
"""Of an iteration of PPO; their seconds are metrics."""


def _of_step(row: Mapping[str, Any]) -> str:
    values = f"loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  norm {row['grad_norm']:.2f}"
    return f"{values}  {row['tokens_per_s']:>8,.0f} tokens/s"


def _of_iteration(row: Mapping[str, Any]) -> str:
    parts = "  ".join(f"{part} {row[f'{part}_s']:.1f} s" for part in _PARTS if f"{part}_s" in row)
    return f"reward {row['reward']:.3f}  kl {row['kl']:.3f}  {row['response_tokens']:.0f} tokens  {parts}"


class PhaseProgress:
    """The progress of one phase. `say` prints a line above it."""

    def __init__(self, phase: str, console: Console, log_every: int):
        self.phase = phase
        self.console = console
        self.log_every = log_every
        self.total = 0
        self.bar: Progress | None = None

    def start(self, total: int, done: int) -> None:
        self.total, self.first, self.began = total, done, time.monotonic()
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn(self.phase), BarColumn(20), TextColumn("{task.fields[line]}"), console=self.console
            )
            self.task = self.bar.add_task("", total=total, completed=done, line="")
            self.bar.start()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def row(self, row: Mapping[str, Any]) -> None:
        """Show one row of metrics."""
        if "skipped" in row:
            return self.say(f"{self.phase}  step {row['step']:>6}/{self.total}  skipped")
        if "loss" not in row:
            shown = [key for key in row if key.startswith("eval_") and not key.endswith(_UNSHOWN)]
            values = "  ".join(f"{key} {row[key]:.4f}" for key in shown)
            return self.say(f"{self.phase}  step {row['step']:>6}/{self.total}  {values}")
        line = self._line(row)
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], line=line)
        elif row["step"] % self.log_every == 0 or row["step"] == self.total:
            self.say(f"{self.phase}  {line}")
        return None

    def _line(self, row: Mapping[str, Any]) -> str:
        step = row["step"]
        left = (time.monotonic() - self.began) / max(1, step - self.first) * (self.total - step)
        shown = _of_iteration(row) if "reward" in row else _of_step(row)
        return f"step {step:>6}/{self.total}  {shown}  {row['memory_gib']:.2f} GiB  left {duration(left)}"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
