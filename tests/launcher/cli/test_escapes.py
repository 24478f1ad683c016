"""Whatever stands in files, folders, events, metrics and answers of servers: none of it controls the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.cli.common import console
from launcher.driver import open_run
from launcher.driver.progress import PhaseProgress
from launcher.jobfile import job as jobs
from launcher.runfolder.small_files import SmallFiles
from tests.support.teacher_server import TeacherServer

EVIL = "\x1b]0;owned\x07\x1b[2J\u202e"
"""Sets the window's title, clears the screen, writes from right to left."""


def harmless(text: str) -> None:
    assert text
    assert all(c.isprintable() or c in "\n\t" for c in text), repr(text)


@pytest.fixture
def run(place):
    opened = open_run.begin(jobs.load(Path("job.yaml")))
    opened.phase("sft").mkdir()
    yield opened
    opened.close()


def test_a_name_of_a_column(place, muster):
    (place / "data/train.jsonl").write_text(json.dumps({f"prompt{EVIL}": "a", "completion": "b"}) + "\n")
    answer = muster("check", "job.yaml")
    assert answer.status == 2
    assert "owned" in answer.err
    harmless(answer.err)


def test_events_metrics_and_names_of_runs(run, place, muster):
    run.event("training", phase="sft", step=0, total_steps=10)
    SmallFiles().append(
        run.phase("sft") / "metrics.jsonl", {"step": 1, "loss": 1.0, "step_s": 1.0, "tokens_per_s": 1.0}
    )
    SmallFiles().append(run.phase("sft") / "metrics.jsonl", {"step": 1, "eval_loss": 1.0, f"eval_{EVIL}": 1.0})
    run.event("warning", phase="sft", what=f"the disk {EVIL}")
    (place / "runs" / f"other{EVIL}").mkdir()
    (place / "runs" / f"other{EVIL}" / "job.yaml").write_text((place / "job.yaml").read_text())
    for command in (("status", "sums"), ("list",)):
        answer = muster(*command)
        assert answer.status == 0, answer.err
        assert "owned" in answer.out
        harmless(answer.out)
    harmless(muster("compare", "sums", f"other{EVIL}").err)


def test_what_workers_print_and_names_of_metrics_of_a_run_that_is_watched(capsys):
    progress = PhaseProgress("sft", console(), 1)
    progress.say(f"sft/trainer-0 | {EVIL}")
    progress.row({"step": 1, f"eval_{EVIL}": 1.0})
    out = capsys.readouterr().out
    assert out.count("owned") == 2
    harmless(out)


def test_what_a_server_says_of_an_error(place, muster):
    (place / "rows.jsonl").write_text(json.dumps({"question": "1 + 1?", "a": "2"}) + "\n")
    with TeacherServer(lambda number, body: (400, {}, f"no {EVIL}")) as server:
        answer = muster(
            "critique", "out.jsonl", "--data", "rows.jsonl", "--column", "a", "--teacher", server.url,
            "--teacher-model", "t"
        )  # fmt: skip
    assert answer.status == 2
    assert "owned" in answer.err
    harmless(answer.err)
