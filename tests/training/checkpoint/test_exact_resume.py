"""An interrupted run equals the uninterrupted one bit for bit, and no sample is trained twice or left out."""

from __future__ import annotations

import json
import os
import random
import signal
import threading

import pytest

from tests.support.fork_group import ForkGroup
from tests.support.recording_trainer import FOLDER
from tests.support.training_fixtures import Recorder, sft_phase
from training.checkpoint.format import Manifest, Reader
from training.checkpoint.repository import Checkpoints, step_of
from training.drivers import supervised
from training.errors import TrainingError
from training.storage import open_storage

pytestmark = pytest.mark.cpu

STEPS = 24
"""260 samples in batches of 16: an epoch ends in step 17, not with it."""


@pytest.fixture(autouse=True, scope="module")
def a_step_a_call():
    """So that a run can be stopped after any step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised, "_TARGET_CALL_S", 0.0)
        patch.setattr(supervised, "_SAVING_CALL_S", 0.0)
        yield


@pytest.fixture(scope="module")
def go(train, tiny):
    """go(workers, stage, dtype, folder=..., stop_after=...) -> Recorder;
    evaluates, keeps two checkpoints and the best."""

    def go(workers: int, stage: int, dtype: str = "fp32", folder=None, stop_after=None) -> Recorder:
        return train(
            workers, checkpoints=folder, stop_after=stop_after, stage=stage, dtype=dtype, max_steps=STEPS,
            data={"eval": str(tiny / "eval.jsonl")}, eval_every=6, schedule={"warmup": 4, "floor": 0.0},
            checkpoint={"every": 7, "keep": 2, "best": {"metric": "eval_loss", "mode": "max"}}, learning_rate=5e-3,
        )  # fmt: skip

    return go


@pytest.fixture(scope="module")
def whole(go):
    """Uninterrupted runs by (workers, stage, dtype)."""
    known: dict[tuple, Recorder] = {}

    def whole(*key) -> Recorder:
        if key not in known:
            known[key] = go(*key)
        return known[key]

    return whole


def curve(runs: list[Recorder]) -> list[dict]:
    """All rows of metrics without what tells the time."""
    drop = ("step_s", "data_s", "tokens_per_s", "memory_gib", "evaluation_s")
    return [{k: v for k, v in row.items() if k not in drop} for run in runs for row in run.rows]


def state(checkpoint) -> dict[str, bytes]:
    """Weights and both moments, by name, and how often the optimizer has stepped."""
    import numpy as np

    reader, found = Reader(checkpoint), {}
    for name, shape in reader.manifest.parameters.items():
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            values = np.empty(int(np.prod(shape)), np.float32)
            reader.read(kind, name, 0, values)
            found[f"{kind} of {name}"] = values.tobytes()
    return {**found, "optimizer_steps": reader.manifest.optimizer_steps}


def kept(run: Recorder) -> list[tuple[int, dict]]:
    folders = Checkpoints(run.checkpoints.root).folders()
    return [(step_of(folder), Manifest.read(folder).metrics) for folder in folders]


def assert_equal(runs: list[Recorder], whole: Recorder) -> None:
    assert curve(runs) == curve([whole])
    assert kept(runs[-1]) == kept(whole)
    assert state(runs[-1].last) == state(whole.last)


INTERRUPTED_AT = {
    "the first step": [1],
    "in the middle of an epoch": [10],
    "a step that is saved": [14],
    "a step that is evaluated": [18],
    "where an epoch ends": [17],
    "the last step but one": [23],
    "again and again": [3, 4, 11, 17, 21, 22],
}


def interrupted(go, folder, at, *key) -> list[Recorder]:
    runs = [go(*key, folder=folder, stop_after=step) for step in at]
    return [*runs, go(*key, folder=folder)]


CHECKED = {(1, 0, "fp32"), (2, 1, "fp32"), (2, 3, "fp32"), (1, 0, "bf16"), (2, 3, "bf16")}
"""What a check of a change has time for."""
PLACES = [
    pytest.param(*place, dtype, marks=[] if (*place, dtype) in CHECKED else pytest.mark.long)
    for place in ((1, 0), (2, 0), (2, 1), (2, 2), (2, 3), (3, 3))
    for dtype in ("fp32", "bf16")
]


@pytest.mark.parametrize("at", INTERRUPTED_AT.values(), ids=INTERRUPTED_AT)
def test_wherever_a_run_is_interrupted(go, whole, tmp_path, at):
    runs = interrupted(go, tmp_path, at, 2, 2)
    assert [run.first for run in runs] == [0, *at]
    assert_equal(runs, whole(2, 2, "fp32"))


@pytest.mark.parametrize(("workers", "stage", "dtype"), PLACES)
def test_at_every_stage_and_precision(go, whole, tmp_path, workers, stage, dtype):
    rng = random.Random(f"{workers} {stage} {dtype}")
    at = sorted(rng.sample(range(1, STEPS), 2))
    assert_equal(interrupted(go, tmp_path, at, workers, stage, dtype), whole(workers, stage, dtype))


def test_what_is_compared_is_not_trivial(go, whole):
    run = whole(2, 2, "fp32")
    evaluated = [row["eval_loss"] for row in run.rows if "eval_loss" in row]
    assert len(evaluated) == 7, "every 6 steps, and where a checkpoint may become the best"
    assert [step for step, _ in kept(run)] == [7, 21, 24], "the best by this metric is an early one; the newest two"


class OneSecondAStep(Recorder):
    """Its clock stands at the newest step, in seconds."""

    def clock(self) -> float:
        return float(max((row["step"] for row in self.rows), default=getattr(self, "first", 0)))


def test_saving_by_the_clock_changes_no_step(whole, train, tiny, tmp_path):
    common = {
        "stage": 2, "max_steps": STEPS, "data": {"eval": str(tiny / "eval.jsonl")}, "eval_every": 6,
        "learning_rate": 5e-3,
        "schedule": {"warmup": 4, "floor": 0.0}, "checkpoint": {"every": "5s", "keep": 9}, "hooks": OneSecondAStep,
    }  # fmt: skip
    runs = [train(2, checkpoints=tmp_path, stop_after=stop, **common) for stop in (13, None)]
    saved = [step for step, _ in kept(runs[1])]
    assert (saved[0], {13, STEPS} < set(saved), len(saved) > 4) == (5, True, True), "13 because of the interruption"
    assert [row["loss"] for run in runs for row in run.rows if "loss" in row] == whole(2, 2, "fp32").losses
    assert state(runs[1].last) == state(whole(2, 2, "fp32").checkpoints.at(STEPS))


# Which samples were trained on


def fed_by_step(folder) -> dict[int, dict[int, list[int]]]:
    """Samples by step and worker; of a step that was done twice those of the last time."""
    steps: dict[int, dict[int, list[int]]] = {}
    files = sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
    for row in (json.loads(line) for path in files for line in path.read_text().splitlines()):
        steps.setdefault(row["step"], {})[row["rank"]] = row["samples"]
    return steps


def test_every_sample_is_trained_once_an_epoch_whatever_happens(tiny, tmp_path, monkeypatch):
    records, checkpoints = tmp_path / "records", tmp_path / "checkpoints"
    fed: dict[int, list[int]] = {}

    def attempt(number: int, workers: int, stop_after: int | None = None, kill_after: int | None = None) -> Recorder:
        folder = records / str(number)
        folder.mkdir(parents=True)
        monkeypatch.setenv(FOLDER, str(folder))
        phase = sft_phase(tiny, workers=workers, stage=2, max_steps=STEPS, checkpoint={"every": 5})
        hooks = Recorder(checkpoints, stop_after)
        with ForkGroup(
            workers, "tests.support.recording_trainer:RecordingTrainer", phase, str(tiny / "cache")
        ) as group:
            if kill_after is not None:
                threading.Thread(target=kill, args=(group, hooks, kill_after), daemon=True).start()
            try:
                hooks.last = supervised.run(phase, {"trainer": group}, hooks)
            except TrainingError:
                assert kill_after is not None
        done = fed_by_step(folder)
        assert min(done) == hooks.first + 1
        assert all(len(by_rank) == workers for step, by_rank in done.items() if step < max(done))
        fed.update({step: [s for samples in by_rank.values() for s in samples] for step, by_rank in done.items()})
        return hooks

    def kill(group, hooks, step):
        while len(hooks.losses) < step - getattr(hooks, "first", 0):
            threading.Event().wait(0.005)
        for process in group.processes:
            os.kill(process.pid, signal.SIGKILL)

    assert attempt(1, 2, stop_after=5).last is None
    killed = attempt(2, 2, kill_after=11)
    newest = step_of(Checkpoints(open_storage(checkpoints)).folders()[-1])
    assert newest >= killed.first
    assert attempt(3, 3, stop_after=19).first == newest
    assert attempt(4, 1).last is not None

    assert sorted(fed) == list(range(1, STEPS + 1))
    trained = [sorted(fed[step]) for step in range(1, STEPS + 1)]
    undisturbed = expected_batches(tiny)
    assert trained == undisturbed
    in_order = [sample for batch in undisturbed for sample in batch]
    assert sorted(in_order[: 16 * 16]) == sorted(set(in_order[: 16 * 16])), "no sample twice within an epoch"


def expected_batches(tiny) -> list[list[int]]:
    from training.data.order import Order

    order = Order([260], seed=sft_phase(tiny).seed)
    return [sorted(order.samples(16 * step, 16 * (step + 1)).tolist()) for step in range(STEPS)]
