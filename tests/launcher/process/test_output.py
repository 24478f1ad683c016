"""A terminal that is closed, a reader that is gone, a full disk behind standard output: none of that ends a run."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from launcher.process import output
from tests.launcher.driver.test_run import wait_for
from tests.support.disturbed import cache_in

COMMAND = [sys.executable, "-m", "launcher", "run", "job.yaml", "--inline"]


class Disk(io.StringIO):
    """Of a log: a file that takes nothing more while it is full."""

    def __init__(self, file: TextIO):
        super().__init__()
        self.file, self.full = file, False

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)

    def fileno(self) -> int:
        return self.file.fileno()


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    with (tmp_path / "log").open("w") as file:
        yield Disk(file)


def test_what_a_full_disk_did_not_take_is_missing_and_the_gap_is_marked(disk):
    failures: list[OSError] = []
    stream = output.Output(disk, failures.append)
    print("first", file=stream)
    disk.full = True
    for text in ("second", "third"):
        print(text, file=stream)
    disk.full = False
    print("fourth", file=stream)
    assert disk.getvalue() == f"first\n{output._MISSING}fourth\n"
    assert [error.errno for error in failures] == [errno.ENOSPC]


def test_a_pipe_without_a_reader_is_left_for_good():
    reader, writer = os.pipe()
    os.close(reader)
    failures: list[OSError] = []
    with os.fdopen(writer, "w", buffering=1) as pipe:
        stream = output.Output(pipe, failures.append)
        for text in ("first", "second"):
            print(text, file=stream)
        assert os.path.samestat(os.fstat(writer), os.stat(os.devnull))
    assert [error.errno for error in failures] == [errno.EPIPE]


def test_failures_from_before_there_was_somebody_to_tell_are_told_later(monkeypatch, disk):
    disk.full = True
    monkeypatch.setattr(sys, "stdout", disk)
    told: list[tuple[str, str]] = []
    with output.kept_going() as outputs:
        print("lost")
        assert told == []
        outputs.report_to(lambda *failure: told.append(failure))
    assert told == [("stdout", "[Errno 28] No space left on device")]
    assert sys.stdout is disk


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "MUSTER_CACHE": str(cache_in(Path.cwd())),
        "PYTHONPATH": str(Path(output.__file__).parents[2]),
    }


def rows(file: str) -> list[dict]:
    path = Path("runs/sums") / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def failed_outputs() -> set[str]:
    return {event["stream"] for event in rows("events.jsonl") if event["event"] == "output_failed"}


@pytest.mark.cpu
@pytest.mark.faults
@pytest.mark.usefixtures("place")
def test_a_run_goes_on_when_nobody_reads_what_it_prints():
    """As `muster run ... 2>&1 | head -1`, and then a SIGTERM whose answer cannot be written either."""
    steps = "phases.sft.max_steps=100000"
    process = subprocess.Popen([*COMMAND, steps], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    wait_for(lambda: len(rows("sft/metrics.jsonl")) > 20, "steps")
    assert "stdout" in failed_outputs()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert rows("events.jsonl")[-1]["event"] == "interrupted"
    saved = [event["step"] for event in rows("events.jsonl") if event["event"] == "checkpoint"][-1]
    assert saved == [row["step"] for row in rows("sft/metrics.jsonl") if "loss" in row][-1]


@pytest.mark.cpu
@pytest.mark.faults
@pytest.mark.usefixtures("place")
def test_a_full_disk_behind_the_output_changes_nothing():
    with open("/dev/full", "w") as full:
        ended = subprocess.run(COMMAND, env=environment(), stdout=full, stderr=full, timeout=120)
    assert ended.returncode == 0
    assert failed_outputs() == {"stdout"}
    assert rows("events.jsonl")[-1]["event"] == "done"


@pytest.mark.cpu
@pytest.mark.faults
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("before", "steps", "status"), [([], 100000, 75), (["nohup"], 60, 0)], ids=["hangup", "nohup"])
def test_a_closed_terminal_saves_and_ends_the_run_unless_it_shall_not_hear_of_it(before, steps, status):
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*before, *COMMAND, f"phases.sft.max_steps={steps}"],
        env=environment(), stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    wait_for(lambda: len(rows("sft/metrics.jsonl")) >= 3, "steps")
    os.close(master)
    assert process.wait(120) == status
    events = [event["event"] for event in rows("events.jsonl")]
    assert events[-1] == ("interrupted" if status else "done")
    done = [row["step"] for row in rows("sft/metrics.jsonl") if "loss" in row]
    assert done == list(range(1, len(done) + 1))
    assert [event["step"] for event in rows("events.jsonl") if event["event"] == "checkpoint"][-1] == done[-1]
