"""What a person sees of a phase: aligned lines in a file or pipe, a live line on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from launcher.driver.progress import PhaseProgress, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")]
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def row(step: int, **values: float) -> dict[str, float]:
    return {
        "step": step, "loss": 1.5, "learning_rate": 2e-5, "grad_norm": 0.25, "tokens_per_s": 12345.6, "memory_gib": 1.5,
        **values,
    }  # fmt: skip


def progress(log_every: int = 1, terminal: bool = False) -> tuple[PhaseProgress, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    return PhaseProgress("sft", console, log_every), out


def test_in_a_pipe_every_logged_step_is_one_line(monkeypatch):
    shown, out = progress()
    clock = iter([100.0, 104.0])
    monkeypatch.setattr("launcher.driver.progress.time.monotonic", lambda: next(clock))
    shown.start(total=10, done=0)
    shown.row(row(4))
    assert out.getvalue() == (
        "sft  step      4/10  loss 1.5000  lr 2.00e-05  norm 0.25    12,346 tokens/s  1.50 GiB  left 0:06\n"
    )


def test_an_iteration_of_ppo_shows_the_reward_and_where_the_time_goes():
    shown, out = progress()
    shown.start(total=10, done=0)
    shown.row(row(10, reward=1.25, kl=0.5, response_tokens=21.4, generate_s=0.52, score_s=0.61, learn_s=2.0))
    assert out.getvalue() == (
        "sft  step     10/10  reward 1.250  kl 0.500  21 tokens  generate 0.5 s  score 0.6 s  learn 2.0 s  1.50 GiB  "
        "left 0:00\n"
    )


def test_time_left_counts_the_steps_of_this_attempt_alone(monkeypatch):
    shown, out = progress()
    clock = iter([0.0, 10.0])
    monkeypatch.setattr("launcher.driver.progress.time.monotonic", lambda: next(clock))
    shown.start(total=100, done=90)
    shown.row(row(95))
    assert out.getvalue().endswith("left 0:10\n")


def test_lines_align_and_only_every_nth_step_and_the_last_are_shown():
    shown, out = progress(log_every=10)
    shown.start(total=25, done=0)
    for step in range(1, 26):
        shown.row(row(step))
    lines = out.getvalue().splitlines()
    assert [line.split()[2].split("/")[0] for line in lines] == ["10", "20", "25"]
    assert len({line.index("loss") for line in lines}) == 1


def test_an_evaluation_is_shown_whatever_its_step():
    shown, out = progress(log_every=100)
    shown.start(total=25, done=0)
    shown.row({"step": 7, "eval_loss": 1.23456, "attempt": 1})
    assert out.getvalue() == "sft  step      7/25  eval_loss 1.2346\n"


def test_text_is_printed_as_it_is():
    shown, out = progress()
    shown.say("[bold]data[0].jsonl[/bold] " + "x" * 200)
    assert out.getvalue() == "[bold]data[0].jsonl[/bold] " + "x" * 200 + "\n"


def test_a_terminal_has_a_live_line_that_ends_with_the_phase():
    shown, out = progress(terminal=True)
    shown.start(total=2, done=0)
    for step in (1, 2):
        shown.row(row(step))
    shown.close()
    shown.close()
    assert shown.bar is None
    assert "loss 1.5000" in out.getvalue()
