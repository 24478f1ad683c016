"""What failed workers say -> who is to blame -> what is done. The tables below are meant to be read."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from launcher.driver.retry_policy import TRIES, Decision, Incident, decide, describe_decision
from launcher.workers.errors import Kind, Raised, WorkerDied, WorkerError, first_cause, kind_of, worker_error
from training.errors import (
    Diverged,
    InputError,
    MusterError,
    SaveError,
    ServiceError,
    StorageError,
    Superseded,
    TrainingError,
)

LOG = Path("nowhere/rank-0.log")

# What a worker's end or exception is.

EVIDENCE = {
    "killed from outside": (WorkerDied(-9), Kind.KILLED),
    "ended by SIGTERM": (WorkerDied(-15), Kind.KILLED),
    "killed by the kernel, which was short of memory": (WorkerDied(-9, short_of_memory=True), Kind.MEMORY),
    "a bad pointer": (WorkerDied(-11), Kind.CRASH),
    "an assertion of C++ code": (WorkerDied(-6), Kind.CRASH),
    "a library that calls exit": (WorkerDied(0), Kind.CRASH),
    "an exception": (Raised("NameError", "name 'lenght' is not defined", "trace"), Kind.PROGRAM),
    "whatever it says": (Raised("RuntimeError", "NCCL: Connection refused, gloo", "trace"), Kind.PROGRAM),
    "an exception of a kind": (Raised("RuntimeError", "m", "trace", Kind.CONNECTION), Kind.CONNECTION),
}  # fmt: skip


@pytest.mark.parametrize("case", EVIDENCE)
def test_what_a_worker_leaves_behind_is_of_the_kind(case):
    evidence, kind = EVIDENCE[case]
    assert worker_error(1, evidence, LOG, "10.0.0.1").kind is kind


OTHERS = {
    InputError.of("a.jsonl:3", "no answer"): Kind.INPUT,
    Diverged("step 3: the loss is nan"): Kind.DIVERGED,
    SaveError("no room"): Kind.STORAGE,
    StorageError("s3://b does not answer"): Kind.STORAGE,
    ServiceError("the reward http://h/score cannot be had"): Kind.CONNECTION,
    Superseded("attempt 2 has taken over"): Kind.SUPERSEDED,
    TrainingError("workers 1 have other data"): Kind.PROGRAM,
}


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_what_is_said_for_people_is_of_the_kind(error):
    assert kind_of(error) is OTHERS[error]


# Whom to blame.


def failure(rank: int, kind: Kind, message: str = "") -> WorkerError:
    return WorkerError(rank, kind, message, LOG)


CAUSES = {
    "a death, not what the survivors say": ([(0, Kind.CONNECTION), (1, Kind.KILLED)], 1),
    "a machine, not the workers that die with it": ([(0, Kind.KILLED), (1, Kind.CONNECTION), (2, Kind.MACHINE)], 2),
    "memory, not the peers": ([(0, Kind.CONNECTION), (3, Kind.MEMORY)], 3),
    "an error of its own, not a lost connection": ([(0, Kind.CONNECTION), (1, Kind.PROGRAM)], 1),
    "the lowest rank among equals": ([(2, Kind.PROGRAM), (1, Kind.PROGRAM)], 1),
    "a lost connection if there is nothing else": ([(1, Kind.CONNECTION), (0, Kind.CONNECTION)], 0),
}  # fmt: skip


@pytest.mark.parametrize("case", CAUSES)
def test_the_first_cause_is(case):
    failures, rank = CAUSES[case]
    cause = first_cause([failure(*one) for one in failures])
    assert isinstance(cause, WorkerError)
    assert cause.rank == rank
    assert cause.collateral == tuple(sorted(other for other, _ in failures if other != rank))


@pytest.mark.parametrize("error", [TrainingError("the loss is nan"), InputError.of("a.jsonl:3", "no answer")])
def test_what_was_said_for_people_goes_before_all_else(error):
    assert first_cause([failure(1, Kind.KILLED), error]) is error


# What to do: (kind, step in hand, newest checkpoint), earlier incidents of the same form -> goes on?

NODE = "10.0.0.2"


def incident(kind: Kind, step: int = 7, checkpoint: int = 5, message: str = "m", node: str | None = None) -> Incident:
    return Incident(kind, message, step, checkpoint, rank=1, node=node)


def killed(count: int, checkpoint: int = 5) -> list[Incident]:
    """So many kills, each at another step, after the same checkpoint."""
    return [incident(Kind.KILLED, step=100 + n, checkpoint=checkpoint) for n in range(count)]


DECISIONS: dict[str, tuple[Incident, list[Incident], bool]] = {
    "a killed worker": (incident(Kind.KILLED), [], True),
    "a lost machine": (incident(Kind.MACHINE), [], True),
    "a hang": (incident(Kind.HANG), [], True),
    "storage that is away": (incident(Kind.STORAGE), [], True),
    "a lost connection without a cause": (incident(Kind.CONNECTION), [], True),
    "a crash in a library, the first": (incident(Kind.CRASH), [], True),
    "memory, the first time": (incident(Kind.MEMORY), [], True),
    "an error in the program: at once": (incident(Kind.PROGRAM), [], False),
    "wrong input: at once": (incident(Kind.INPUT), [], False),
    "divergence: at once": (incident(Kind.DIVERGED), [], False),
    "another process has taken over: at once": (incident(Kind.SUPERSEDED), [], False),
    "the same crash at the same step": (incident(Kind.CRASH), [incident(Kind.CRASH)], False),
    "the same kill at the same step, whatever it looks like": (incident(Kind.KILLED), [incident(Kind.KILLED)], False),
    "the same but for an address": (
        incident(Kind.CRASH, message="at 0x7f"),
        [incident(Kind.CRASH, message="at 0x8a")],
        False,
    ),
    "another crash at that step": (incident(Kind.CRASH, message="a"), [incident(Kind.CRASH, message="b")], True),
    "the same at another step": (incident(Kind.CRASH, step=8), [incident(Kind.CRASH, step=7)], True),
    "twice before the first step: a start may fail twice": (
        incident(Kind.KILLED, step=5),
        [incident(Kind.KILLED, step=5)],
        True,
    ),
    "kills up to the budget": (incident(Kind.KILLED), killed(TRIES["infrastructure"] - 1), True),
    "kills beyond it": (incident(Kind.KILLED), killed(TRIES["infrastructure"]), False),
    "as many, with a checkpoint in between": (
        incident(Kind.KILLED),
        killed(TRIES["infrastructure"], checkpoint=4),
        True,
    ),
    "a crash is not charged for kills": (incident(Kind.CRASH), killed(7), True),
    "crashes beyond their budget": (
        incident(Kind.CRASH),
        [incident(Kind.CRASH, step=1), incident(Kind.MEMORY, step=2)],
        False,
    ),
    "a machine taken back: however often": (incident(Kind.PREEMPTED), [incident(Kind.PREEMPTED)] * 50, True),
    "machines taken back are not charged": (
        incident(Kind.KILLED),
        [incident(Kind.PREEMPTED, step=n) for n in range(50)],
        True,
    ),
}


@pytest.mark.parametrize("case", DECISIONS)
def test_it_is_tried_again(case):
    now, past, retry = DECISIONS[case]
    assert decide(now, past).retry is retry


def test_divergence_skips_the_batch_if_the_job_says_so():
    decision = decide(incident(Kind.DIVERGED, step=9), [], skip_diverged=True)
    assert (decision.retry, decision.skip) == (True, 9)


def test_waits_double_up_to_a_minute_and_the_first_is_none():
    waits = [decide(incident(Kind.KILLED), killed(n)).after_s for n in range(TRIES["infrastructure"])]
    assert waits == [0, 2, 4, 8, 16, 32, 60, 60]


def test_a_machine_is_avoided_after_two_failures_on_it():
    one = incident(Kind.KILLED, step=6, node=NODE)
    assert decide(incident(Kind.MACHINE, node="10.0.0.3"), [one]).avoid == frozenset()
    assert decide(incident(Kind.CRASH, node=NODE), [one]).avoid == {NODE}
    taken_back = incident(Kind.PREEMPTED, node=NODE)
    assert decide(incident(Kind.KILLED, node=NODE), [taken_back]).avoid == frozenset()


# What a person reads.


def test_an_incident_is_told_in_one_paragraph():
    error = WorkerError(1, Kind.KILLED, "was killed by SIGKILL", LOG, node=NODE, collateral=[0])
    now = incident(Kind.KILLED, step=58, checkpoint=54)
    assert describe_decision(error, now, decide(now, [])).splitlines() == [
        "killed: worker 1 on 10.0.0.2 was killed by SIGKILL",
        "workers 0 failed because of it",
        "full log: nowhere/rank-0.log",
        "retrying from the checkpoint of step 54 (repeating 3 steps); 7 retries left until the next checkpoint",
        "something outside Muster killed it",
    ]


def test_giving_up_says_why_and_what_to_change():
    now = incident(Kind.MEMORY)
    text = describe_decision(
        WorkerError(0, Kind.MEMORY, "raised: OutOfMemoryError: CUDA", LOG), now, decide(now, [now])
    )
    assert "not retrying: the same failure recurred at step 7" in text
    assert "set a smaller micro_tokens" in text


def test_the_message_has_the_end_of_the_traceback():
    trace = "\n".join(f"line {number}" for number in range(40))
    lines = str(WorkerError(3, Kind.PROGRAM, "raised: ValueError: x", LOG, trace=trace, collateral=[0, 1])).splitlines()
    assert lines[:3] == [
        "worker 3 raised: ValueError: x",
        "workers 0, 1 failed because of it",
        "end of its traceback:",
    ]
    assert lines[3:-1] == [f"  line {number}" for number in range(25, 40)]


def test_without_a_traceback_the_end_of_the_log_is_shown(tmp_path):
    log = tmp_path / "rank-1.log"
    log.write_bytes(b"x" * 100_000 + b"\n" + b"\n".join(b"row %d" % n for n in range(30)) + b"\n\xff")
    lines = str(WorkerError(1, Kind.KILLED, "was killed", log)).splitlines()
    assert lines[1] == "end of its log:"
    assert lines[2:-1] == [*(f"  row {n}" for n in range(16, 30)), "  �"]


@pytest.mark.parametrize(
    "error",
    [
        WorkerError(3, Kind.PROGRAM, "x", LOG, node=NODE, trace="trace", collateral=[0, 1]),
        WorkerDied(-9, "why", short_of_memory=True),
        Raised("ValueError", "x", "trace", Kind.MEMORY),
    ],
    ids=lambda error: type(error).__name__,
)
def test_it_crosses_a_process_boundary_unchanged(error: MusterError):
    copy = pickle.loads(pickle.dumps(error))
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)


def test_an_incident_is_written_down_and_read_back():
    import json

    now = incident(Kind.HANG, node=NODE)
    assert Incident.of(json.loads(json.dumps({**now.fields(), "retry": True}))) == now


def test_a_decision_to_stop_has_nothing_else():
    assert decide(incident(Kind.PROGRAM), []) == Decision(False, "a program error recurs on every attempt")
