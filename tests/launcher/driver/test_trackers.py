"""Where metrics go beside metrics.jsonl. W&B and MLflow are stood in for: they are not needed to test Muster."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from launcher.driver import trackers
from training.errors import InputError


def test_tensorboard_writes_what_it_is_given(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = trackers.open_all(["tensorboard"], "run", "sft", tmp_path, {}, print)
    tracker.log(1, {"loss": 2.5, "tokens": 100})
    tracker.log(2, {"loss": 1.5})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors("loss")] == [(1, 2.5), (2, 1.5)]


def test_a_package_that_is_missing_is_told_with_the_command_that_brings_it(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name in ("wandb", "mlflow") else object())
    trackers.check(["tensorboard"])
    with pytest.raises(InputError) as caught:
        trackers.check(["wandb", "tensorboard", "mlflow"], where="job.yaml")
    assert str(caught.value).splitlines() == [
        "job.yaml: track: wandb is not installed: pip install 'muster-train[wandb]'",
        "job.yaml: track: mlflow is not installed: pip install 'muster-train[mlflow]'",
    ]


def test_wandb_goes_on_in_the_same_run_after_a_resume(monkeypatch, tmp_path):
    calls = []
    run = SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: calls.append(settings) or run))
    (tracker,) = trackers.open_all(["wandb"], "sums", "sft", tmp_path, {"batch": 4}, print)
    tracker.log(3, {"loss": 1.0})
    tracker.close()
    settings, *rest = calls
    assert (settings["name"], settings["resume"], settings["config"]) == ("sums/sft", "allow", {"batch": 4})
    assert rest == [(3, {"loss": 1.0}), "end"]
    trackers.open_all(["wandb"], "sums", "sft", tmp_path, {"batch": 4}, print)
    assert calls[-1]["id"] == settings["id"], "a resumed run goes on in the same history"
    (tmp_path / "other").mkdir()
    trackers.open_all(["wandb"], "sums", "sft", tmp_path / "other", {"batch": 4}, print)
    assert calls[-1]["id"] != settings["id"], "another run of the same name has a history of its own"


class FakeMLflow:
    def __init__(self, earlier):
        self.earlier = earlier
        self.calls = []

    def search_runs(self, **_):
        return self.earlier

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


@pytest.mark.parametrize("resumed", [False, True])
def test_mlflow_has_one_run_a_phase(monkeypatch, tmp_path, resumed):
    earlier = [SimpleNamespace(info=SimpleNamespace(run_id="r1"))] if resumed else []
    mlflow = FakeMLflow(earlier)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    (tracker,) = trackers.open_all(["mlflow"], "sums", "sft", tmp_path, {"text": "x" * 900}, print)
    tracker.log(3, {"loss": 1.0})
    tracker.close()
    names = [name for name, _, _ in mlflow.calls]
    assert ("log_params" in names) is not resumed
    assert mlflow.calls[0][1] == ("sums",)
    started = next(kwargs for name, _, kwargs in mlflow.calls if name == "start_run")
    assert started == ({"run_id": "r1", "run_name": None} if resumed else {"run_id": None, "run_name": "sft"})
    assert names[-2:] == ["log_metrics", "end_run"]


class Failing:
    def __init__(self, *_):
        self.calls = 0

    def log(self, step, values):
        self.calls += 1
        raise ConnectionError("the server is gone")

    def close(self):
        raise ConnectionError("the server is gone")


def test_a_tracker_whose_service_fails_is_told_once_and_left(tmp_path, monkeypatch):
    said = []
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Failing)
    (tracker,) = trackers.open_all(["mlflow"], "run", "sft", tmp_path, {}, said.append)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert tracker.tracker.calls == 1
    assert said == ["mlflow failed and gets no more metrics (the server is gone); metrics.jsonl has them all"]


def test_a_tracker_that_cannot_be_set_up_is_wrong_input(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no API key")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", refuse)
    with pytest.raises(InputError, match="wandb: track: cannot be set up: no API key"):
        trackers.open_all(["tensorboard", "wandb"], "run", "sft", tmp_path, {}, print)
