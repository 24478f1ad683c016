"""Who is to blame when workers fail, and what a person reads of it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from launcher.failures import WorkerError, first_cause
from training.errors import InputError, TrainingError

LOG = Path("nowhere/rank-0.log")


def failure(rank: int, how: str = "raised", message: str = "ValueError: x") -> WorkerError:
    return WorkerError(rank, how, message, LOG)


CAUSES = {
    "a death before what survivors say": ([failure(0, message="ValueError: x"), failure(1, "died", "")], 1),
    "an own error before a lost connection": (
        [failure(0, message="RuntimeError: Connection closed by peer"), failure(1)],
        1,
    ),
    "an own error before one of the collectives": (
        [failure(0, message="DistBackendError: NCCL error"), failure(1, message="OutOfMemoryError: CUDA")],
        1,
    ),
    "a death before a lost connection": (
        [failure(0, message="RuntimeError: gloo: timed out"), failure(3, "died", "")],
        3,
    ),
    "the lowest rank among equals": ([failure(2), failure(1), failure(3)], 1),
    "a complaint of others if there is nothing else": ([failure(1, message="Broken pipe"), failure(0, message="gloo")], 0),
}  # fmt: skip


@pytest.mark.parametrize("case", CAUSES)
def test_the_first_cause_is(case):
    failures, rank = CAUSES[case]
    cause = first_cause(failures)
    assert isinstance(cause, WorkerError)
    assert cause.rank == rank
    assert cause.collateral == tuple(sorted(other.rank for other in failures if other.rank != rank))


@pytest.mark.parametrize("error", [TrainingError("the loss is nan"), InputError.of("a.jsonl:3", "no answer")])
def test_what_was_said_for_people_goes_before_all_else(error):
    assert first_cause([failure(1, "died", ""), error]) is error


def test_the_message_names_the_worker_the_collateral_and_the_end_of_the_traceback():
    trace = "\n".join(f"line {number}" for number in range(40))
    text = str(WorkerError(3, "raised", "ValueError: x", LOG, trace, [0, 1]))
    lines = text.splitlines()
    assert lines[:3] == [
        "worker 3 raised: ValueError: x",
        "workers 0, 1 failed because of it",
        "its traceback ends with:",
    ]
    assert lines[3:-1] == [f"  line {number}" for number in range(25, 40)]
    assert lines[-1] == f"whole log: {LOG}"


def test_without_a_traceback_the_end_of_the_log_is_shown(tmp_path):
    log = tmp_path / "rank-1.log"
    log.write_bytes(b"x" * 100_000 + b"\n" + b"\n".join(b"row %d" % n for n in range(30)) + b"\n\xff")
    lines = str(WorkerError(1, "died", "killed", log)).splitlines()
    assert lines[1] == "the end of its log:"
    assert lines[2:-1] == [*(f"  row {n}" for n in range(16, 30)), "  �"]


def test_a_missing_log_is_no_error():
    assert str(failure(1, "died", "killed")).splitlines() == ["worker 1 died: killed", f"whole log: {LOG}"]


def test_it_crosses_a_process_boundary_unchanged():
    error = WorkerError(3, "raised", "ValueError: x", LOG, "trace", [0, 1])
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert (copy.rank, copy.how, copy.log, copy.collateral) == (3, "raised", LOG, (0, 1))
