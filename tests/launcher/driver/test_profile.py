"""`profile: {steps: ...}` by the command line: wrong steps, what is told, and that it is no other job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launcher.cli.test_bad_input import refused

pytestmark = pytest.mark.cpu
LAST = "    checkpoint: {every: 2}\n"


def events(place: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (place / "runs/sums/events.jsonl").open()]
    return [row for row in rows if row["event"] == kind]


def losses(place: Path) -> list[float]:
    rows = [json.loads(line) for line in (place / "runs/sums/sft/metrics.jsonl").open()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "{steps: 4-2}",
            'phases.sft.profile.steps: got "4-2", expected a step such as 10, or the first and the last such as 10-12',
        ),
        (
            "{steps: 0}",
            'phases.sft.profile.steps: got "0", expected a step such as 10, or the first and the last such as 10-12',
        ),
        ("{steps: 5-6}", "phases.sft.profile.steps: 5-6 comes after the last step, 4 (max_steps)"),
        ("3-4", 'phases.sft.profile: got "3-4" (text), expected a mapping such as {steps: 10-12} or null'),
        ("{step: 3}", "phases.sft.profile.step: unknown key; did you mean steps?"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(place, muster, given, message):
    text = (place / "job.yaml").read_text()
    assert text.endswith(LAST)
    (place / "job.yaml").write_text(f"{text}    profile: {given}\n")
    line = text.count("\n") + 1
    assert f"job.yaml:{line}: {message}" in refused(muster, place, ("check", "job.yaml"))


def test_a_run_leaves_trace_and_table_and_says_so(place, muster):
    assert muster("run", "job.yaml", "--inline").status == 0
    plain = losses(place)
    answer = muster("resume", "sums", "--inline", "--step", "2", "phases.sft.profile={steps: 1-3}")
    assert answer.status == 0, answer
    assert losses(place) == plain
    (event,) = events(place, "profiled")
    assert (event["phase"], event["steps"], event["worker"]) == ("sft", "3", "trainer-0"), "1 and 2 were done before"
    table = place / "runs/sums/sft/profile/steps-3.trainer-0.txt"
    assert event["table"] == str(table)
    assert f"sft: profile {{steps: 3}} of trainer-0: {event['summary']}; {table}" in answer.out
    assert "trainer.train" in table.read_text()
    assert Path(event["trace"]).read_bytes()[:2] == b"\x1f\x8b"


def test_steps_that_never_come_are_told(place, muster):
    overrides = ("phases.sft.max_steps=null", "phases.sft.epochs=0.2", "phases.sft.profile={steps: 3-5}")
    answer = muster("run", "job.yaml", "--inline", *overrides)
    assert "sft: profile.steps 3-5 comes after the last step, 2: nothing is profiled" in answer.out
    assert not (place / "runs/sums/sft/profile").exists()
