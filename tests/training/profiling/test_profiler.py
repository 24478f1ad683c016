"""A profile of some steps: which steps, what it leaves, where it says that the time went,
and that nothing else changes."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from tests.support.training_fixtures import Recorder, phase_of
from training.config import Profile
from training.drivers.profiled_steps import Profiled
from training.profiling.breakdown import Span, Work, breakdown, summary, table
from training.profiling.trace import operators, read, seconds_of
from training.schedule import never_profiled
from training.storage import open_storage

NINES = "tests.support.some_rewards:nines"


# ── which steps ──


@pytest.mark.parametrize(
    ("steps", "first", "last"), [("10-12", 10, 12), ("7", 7, 7), (7, 7, 7), ("3-3", 3, 3), ("1-20", 1, 20)]
)
def test_steps_are_a_range_or_one(steps, first, last):
    profile = Profile(steps=steps)
    assert (profile.first, profile.last) == (first, last)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("12-10", 'got "12-10", expected a step such as 10'),
        ("0-3", 'got "0-3"'),
        ("10..12", 'got "10..12"'),
        ("-3", 'got "-3"'),
        ("1-", 'got "1-"'),
        ("", 'got ""'),
        ("1-21", "(21 steps), expected at most 20 steps"),
    ],
)
def test_other_steps_are_refused(steps, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Profile(steps=steps)


def test_steps_behind_the_end_are_told(tiny):
    phase = phase_of(tiny, "sft", max_steps=None, epochs=1, profile={"steps": "18-30"})
    assert never_profiled(phase, 18) == []
    (told,) = never_profiled(phase, 17)
    assert told == "profile.steps 18-30 comes after the last step, 17: nothing is profiled"


# ── where the time went ──


def test_every_moment_is_counted_once_and_computing_hides_communication():
    seconds = breakdown(
        Span("", 0, 100e6),
        [Span("trainer.train", 10e6, 90e6)],
        [Span("data", 10e6, 20e6), Span("forward", 20e6, 50e6), Span("backward", 50e6, 80e6)],
        sent=[Work(60e6, 85e6, 60e6)],
        computed=[Work(25e6, 45e6, 25e6), Work(55e6, 70e6, 55e6)],
        on_gpu=False,
    )
    train = "trainer.train"
    assert seconds == {
        (train, "forward"): 30, (train, "backward"): 20, ("", "waiting"): 20, (train, "communication"): 15,
        (train, "data"): 10,
        (train, "rest"): 5,
    }  # fmt: skip
    assert summary(seconds, count=1) == "forward 30%"


def test_on_a_gpu_kernels_belong_to_what_launched_them_and_gaps_are_idle():
    seconds = breakdown(
        Span("", 0, 50e6),
        [Span("trainer.train", 0, 50e6)],
        [Span("data", 0, 5e6), Span("forward", 5e6, 10e6), Span("backward", 10e6, 20e6)],
        sent=[Work(30e6, 45e6, 12e6)],
        computed=[Work(8e6, 20e6, 7e6), Work(20e6, 35e6, 11e6)],
        on_gpu=True,
    )
    assert {part: length for (_, part), length in seconds.items()} == {
        "data": 5, "forward": 12, "backward": 15, "communication": 10, "idle": 8,
    }  # fmt: skip


def written(path: Path, *events: dict) -> Path:
    """A trace as torch writes it."""
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": [{"ph": "M"}, *events]}))
    return path


def event(name: str, start: float, end: float, kind: str = "cpu_op", thread: int = 1, id: int = 0) -> dict:
    more = {"ph": "X", "cat": kind, "tid": thread, "args": {"External id": id}}
    return {**more, "name": name, "ts": start, "dur": end - start}


def note(name: str, start: float, end: float) -> dict:
    return event(name, start, end, kind="user_annotation")


def test_a_trace_of_a_gpu_is_understood(tmp_path):
    """Kernels know the operator that launched them, also one of the backward pass's own thread."""
    path = written(
        tmp_path / "trace.json",
        note("profiled steps", 0, 100), note("trainer.train", 0, 100), note("forward", 10, 20),
        note("backward", 30, 40),
        event("aten::linear", 11, 14, id=6), event("aten::mm", 12, 13, id=7), event("aten::mm", 31, 32, thread=2, id=8),
        event("cudaLaunchKernel", 12, 13, kind="cuda_runtime", id=7),
        event("forward", 15, 45, kind="gpu_user_annotation"),
        event("gemm", 15, 45, kind="kernel", thread=7, id=7), event("gemm", 45, 75, kind="kernel", thread=7, id=8),
        event("ncclDevKernel_AllReduce", 60, 90, kind="kernel", thread=8, id=9),
    )  # fmt: skip
    events = read(path)
    assert {part: round(length * 1e6) for (_, part), length in seconds_of(events).items()} == {
        "forward": 30, "backward": 30, "idle": 25, "communication": 15,
    }  # fmt: skip
    assert [(name, calls, round(s * 1e6)) for name, calls, s in operators(events)] == [
        ("aten::mm", 2, 60), ("aten::linear", 1, 0),
    ]  # fmt: skip


def test_the_time_of_an_operator_is_its_own(tmp_path):
    path = written(
        tmp_path / "trace.json",
        event("aten::linear", 0, 10, id=1), event("aten::mm", 2, 8, id=2), event("aten::view", 3, 4, id=3),
        event("aten::mm", 5, 9, thread=2, id=4),
    )  # fmt: skip
    assert [(name, calls, round(s * 1e6)) for name, calls, s in operators(read(path))] == [
        ("aten::mm", 2, 9), ("aten::linear", 1, 4), ("aten::view", 1, 1),
    ]  # fmt: skip


def test_the_table_has_a_line_for_each_part_of_each_call():
    seconds = {
        ("policy.roll_out", "generation"): 6.0, ("policy.improve", "backward"): 2.0, ("policy.improve", "data"): 0.1,
        ("", "waiting"): 1.899, ("policy.roll_out", "rest"): 0.001,
    }  # fmt: skip
    lines = [re.split(r"\s{2,}", line.strip()) for line in table(seconds, num_steps=2)]
    assert [line[0] for line in lines[1:5]] == ["policy.roll_out", "policy.improve", "policy.improve", "waiting"]
    assert not any(line[0].startswith("rest") for line in lines), "nothing to see, nothing to explain"
    assert ["policy.roll_out", "generation", "3.0000", "60.0%"] in lines
    assert ["waiting", "0.9495", "19.0%"] in lines
    assert ["all", "5.0000", "100.0%"] in lines


# ── asking the workers ──


class Asked:
    """A group that remembers what it was asked, and has nothing to say."""

    size = 2

    def __init__(self, asked: list[tuple], role: str):
        self.asked, self.role = asked, role

    def call(self, method, *args):
        self.asked.append((self.role, method, *args[2:]))
        return []


@pytest.fixture
def recording(tiny, tmp_path, monkeypatch):
    """(what was asked, the profile of a phase with these settings)."""
    asked: list[tuple] = []
    monkeypatch.setattr("training.drivers.profiled_steps.results", lambda futures, timeout_s: [None])

    def make(recipe: str, roles: tuple[str, ...], **settings):
        phase = phase_of(tiny, recipe, **settings)
        return asked, Profiled(phase, {role: Asked(asked, role) for role in roles}, Recorder(tmp_path / "checkpoints"))

    return make


def test_it_begins_before_the_first_step_and_ends_after_the_last(recording):
    asked, profiled = recording("sft", ("trainer",), profile={"steps": "3-5"})
    for step in range(1, 9):
        profiled.before(step)
        asked.append(step)
        profiled.after(step)
    profiled.end(8)
    assert asked == [1, 2, ("trainer", "begin_profile"), 3, 4, 5, ("trainer", "end_profile", "3-5", 3), 6, 7, 8]


def test_steps_that_were_done_before_are_not_profiled(recording):
    asked, profiled = recording("sft", ("trainer",), profile={"steps": "3-5"})
    profiled.before(5)
    profiled.after(5)
    assert asked[-1] == ("trainer", "end_profile", "5", 1)
    asked.clear()
    profiled.before(6)
    profiled.after(6)
    assert asked == []


def test_a_run_that_is_stopped_in_between_keeps_what_there_is(recording):
    asked, profiled = recording("sft", ("trainer",), profile={"steps": "3-5"})
    profiled.before(3)
    profiled.after(4)
    profiled.end(4)
    assert asked[-1] == ("trainer", "end_profile", "3-4", 2)


def test_nobody_is_asked_without_a_profile(recording):
    asked, profiled = recording("sft", ("trainer",))
    profiled.before(1)
    profiled.after(1)
    profiled.end(1)
    assert asked == []


def test_of_each_group_of_workers_one_role_is_asked(recording):
    groups = [
        {"roles": ["policy", "reference"], "workers": 2},
        {"roles": ["critic", "reward"], "workers": 1},
        {"roles": ["rollout"], "workers": 1},
    ]
    roles = ("policy", "reference", "critic", "reward", "rollout")
    asked, profiled = recording(
        "ppo", roles, reward=NINES, rollout_batch=16, batch=8, groups=groups, profile={"steps": 1}
    )
    profiled.before(1)
    profiled.end(1)
    assert asked[:3] == [("policy", "begin_profile"), ("critic", "begin_profile"), ("rollout", "begin_profile")]


# ── real workers ──


def left_by(hooks: Recorder) -> dict[str, tuple[dict, str, list[dict]]]:
    """By worker: the event, the table, and the events of the trace."""
    found = {}
    for kind, info in hooks.events:
        if kind == "profiled":
            trace = json.loads(gzip.decompress(Path(info["trace"]).read_bytes()))
            found[info["worker"]] = (info, Path(info["table"]).read_text(), trace["traceEvents"])
    return found


def counts(trace: list[dict], *names: str) -> dict[str, int]:
    return {name: sum(event.get("name") == name for event in trace) for name in names}


def shares(text: str) -> dict[str, float]:
    """Of the table, in percent; `trainer.train forward`, `waiting`."""
    rows = re.findall(r"^  (\S.*?) +[\d.]+ +([\d.]+)%$", text.partition("operator,")[0], re.MULTILINE)
    return {re.sub(" +", " ", name): float(share) for name, share in rows}


@pytest.mark.cpu
@pytest.mark.parametrize(("recipe", "workers", "stage"), [("sft", 2, 2), ("reward", 1, 0), ("pretrain", 2, 3)])
def test_a_profile_of_the_named_steps_and_the_same_losses(tiny, train, recipe, workers, stage):
    settings = {"recipe": recipe, "stage": stage, "max_steps": 6, "data": {"max_length": 64}}
    plain = train(workers, **settings)
    hooks = train(workers, **settings, profile={"steps": "3-4"})
    assert hooks.losses == plain.losses
    assert "profile_failed" not in dict(hooks.events), hooks.events
    (worker, (info, text, trace)), *others = left_by(hooks).items()
    assert (worker, others, info["steps"]) == ("trainer-0", [], "3-4")
    assert Path(info["table"]).name == "steps-3-4.trainer-0.txt"
    assert Path(info["table"]).parent.name == "profile"
    seen = counts(trace, "trainer.train", "data", "forward", "backward", "optimizer", "trainer.begin_save")
    assert 1 <= seen["trainer.train"] <= 2
    assert (seen["data"], seen["optimizer"], seen["trainer.begin_save"]) == (2, 2, 0)
    assert seen["forward"] == seen["backward"] >= 2
    found = shares(text)
    assert found.pop("all") == 100
    assert sum(found.values()) == pytest.approx(100, abs=0.5)
    expected = {"data", "forward", "backward", "optimizer", "rest", *(["communication"] if workers > 1 else [])}
    assert {f"trainer.train {part}" for part in expected} <= found.keys()
    assert info["summary"].count("%") == 4
    assert "aten::addmm" in text or "aten::mm" in text
    assert "GiB of memory" in text


@pytest.mark.cpu
def test_a_profile_of_an_iteration_of_ppo_has_all_roles_of_each_group(tiny, train):
    settings = {
        "recipe": "ppo", "reward": NINES, "critic": str(tiny / "model"), "rollout_batch": 8, "batch": 8,
        "response_tokens": 6,
        "max_steps": 2, "data": {"max_length": 64},
        "groups": [{"roles": ["policy", "reference"], "workers": 1}, {"roles": ["critic", "reward"], "workers": 1}],
    }  # fmt: skip
    plain = train(1, **settings)
    hooks = train(1, **settings, profile={"steps": 2})
    assert hooks.losses == plain.losses
    left = left_by(hooks)
    assert left.keys() == {"policy-0", "critic-0"}
    _, text, trace = left["policy-0"]
    names = ("policy.roll_out", "policy.computed", "reference.computed", "policy.improve", "critic.improve")
    assert counts(trace, *names) == dict(zip(names, (1, 1, 1, 2, 0), strict=True))
    assert {"policy.roll_out generation", "policy.improve backward", "waiting"} <= shares(text).keys()
    _, text, trace = left["critic-0"]
    assert counts(trace, "critic.improve", "reward.scores", "policy.roll_out") == {
        "critic.improve": 2, "reward.scores": 1, "policy.roll_out": 0,
    }  # fmt: skip
    assert {"critic.improve forward", "waiting"} <= shares(text).keys()


@pytest.mark.cpu
def test_a_profile_that_cannot_be_written_stops_nothing(train, tmp_path):
    (tmp_path / "profile").write_text("in the way")
    hooks = train(1, checkpoints=tmp_path, max_steps=3, profile={"steps": 2})
    assert [row["step"] for row in hooks.rows if "loss" in row] == [1, 2, 3]
    ((_, info),) = [event for event in hooks.events if event[0] == "profile_failed"]
    assert info["steps"] == "2"
    assert "profile" in info["error"]


@pytest.mark.cpu
def test_a_profile_goes_to_the_bucket_of_the_run(train, s3):
    hooks = train(1, checkpoints=f"{s3.url}/run", max_steps=2, profile={"steps": "1-2"})
    ((_, info),) = [event for event in hooks.events if event[0] == "profiled"]
    assert info["table"] == f"{s3.url}/run/profile/steps-1-2.trainer-0.txt"
    assert b"trainer.train" in open_storage(info["table"]).read()
    assert gzip.decompress(open_storage(info["trace"]).read()).lstrip().startswith(b"{")
