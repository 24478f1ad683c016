"""Verbs beside `run` under what happens to commands: signals to the group, output that nobody takes, a full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from launcher.process.exit_status import ExitStatus
from tests.launcher.driver.test_run import MUSTER, finish, folder, muster, nothing_left, processes_of, start, wait_for

__all__ = ["folder", "nothing_left"]
pytestmark = [pytest.mark.cpu, pytest.mark.faults]
QUESTIONS = 400


@pytest.fixture
def work(folder: Path, tiny) -> Path:
    """A folder with a model, questions, and a run of two steps."""
    (folder / "model").symlink_to(tiny / "model")
    lines = [json.dumps({"question": f"Q: {number} + 1 = ", "answer": str(number + 1)}) for number in range(QUESTIONS)]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    prompts = [json.dumps({"prompt": f"Q: {number} + 1 = "}) for number in range(QUESTIONS)]
    (folder / "prompts.jsonl").write_text("\n".join(prompts))
    return folder


@pytest.fixture
def trained(work: Path) -> Path:
    status, out = muster(work, "run", "job.yaml", "--inline", "resources.workers=1", "phases.sft.max_steps=2")
    assert status == ExitStatus.DONE, out
    return work


def started(work: Path, verb: str) -> subprocess.Popen:
    """The command, once it is at its work."""
    arguments, at_work = INTERRUPTED[verb]
    process = start(work, *arguments)
    wait_for(lambda: process.poll() is not None or at_work(work, process.pid), f"the work of {verb}")
    assert process.poll() is None, finish(process)
    return process


def has_rows(file: str):
    return lambda work, pid: any(path.stat().st_size for path in work.rglob(file))


def computes(work: Path, pid: int) -> bool:
    """Whether a process of the command has torch."""
    temporary = os.environ["TMPDIR"]
    return any("libtorch_cpu" in Path(f"/proc/{each}/maps").read_text() for each in processes_of(temporary))


INTERRUPTED = {
    "generate": (
        ["generate", "model", "--file", "prompts.jsonl", "--max-new-tokens", "64", "--out", "o.jsonl"],
        has_rows("o.jsonl"),
    ),
    "critique": (
        [
            "critique",
            "c.jsonl",
            "--data",
            "questions.jsonl",
            "--teacher",
            "model",
            "--sample",
            "model",
            "--max-new-tokens",
            "64",
        ],
        has_rows("answers.jsonl"),
    ),
    "eval": (["eval", "model", "--data", "questions.jsonl"], computes),
    "export": (["export", "runs/job", "--out", "exported"], computes),
    "cluster up": (["cluster", "up", "local.yaml"], lambda work, pid: _has_started("gcs_server")),
}


def _has_started(what: str) -> bool:
    commands = [Path(f"/proc/{pid}/cmdline") for pid in processes_of(os.environ["TMPDIR"])]
    return any(what in command.read_text() for command in commands if command.exists())


@pytest.mark.parametrize("verb", ["critique", "eval", "cluster up"])
def test_a_sigterm_to_the_group_ends_a_verb_in_order(work, nothing_left, verb, monkeypatch):
    monkeypatch.setenv("MUSTER_HOME", str(work / "home"))
    (work / "local.yaml").write_text("provider: local\n")
    process = started(work, verb)
    os.killpg(process.pid, signal.SIGTERM)
    status, out = finish(process)
    assert status == ExitStatus.TRY_AGAIN, out
    assert "Traceback" not in out


def test_an_interrupted_file_of_answers_ends_as_one_that_was_not(work, nothing_left):
    process = started(work, "generate")
    os.killpg(process.pid, signal.SIGTERM)
    finish(process)
    arguments, _ = INTERRUPTED["generate"]
    before = (work / "o.jsonl").read_bytes()
    assert before
    assert muster(work, *arguments)[0] == ExitStatus.DONE
    whole = (work / "o.jsonl").read_bytes()
    assert whole.startswith(before)
    assert muster(work, *arguments[:-1], "again.jsonl")[0] == ExitStatus.DONE
    assert (work / "again.jsonl").read_bytes() == whole


def test_an_interrupted_export_leaves_no_half_of_a_model(trained, nothing_left):
    process = started(trained, "export")
    os.killpg(process.pid, signal.SIGTERM)
    status, out = finish(process)
    assert status == ExitStatus.TRY_AGAIN or (
        status == ExitStatus.DONE and (trained / "exported/model.safetensors").exists()
    ), out
    assert "Traceback" not in out
    if status == ExitStatus.TRY_AGAIN:
        assert [path.name for path in trained.iterdir() if "exported" in path.name] == []


def test_an_export_to_a_full_disk_says_so_and_leaves_nothing(trained, nothing_left):
    disk = trained / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        status, out = muster(trained, "export", "runs/job", "--out", "disk/model")
        assert status == ExitStatus.FAILED
        assert "the model cannot be written" in out
        assert "No space left on device" in out
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["eval", "--help"],
        ["eval", "model", "--data", "questions.jsonl", "--limit", "2", "--max-new-tokens", "2"],
    ],
    ids=["help", "help of a verb", "result"],
)
def test_a_result_that_cannot_be_printed_is_a_failure_in_words(work, arguments):
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*MUSTER, *arguments], cwd=work, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert ended.returncode == ExitStatus.FAILED
    assert "No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr
