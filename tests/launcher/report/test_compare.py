"""Two runs side by side: what both measured, whether chance explains it, what differs."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from launcher.cli.main import app
from launcher.jobfile import job as jobs
from launcher.report.compare import compare, lines, mcnemar, sign_flips
from launcher.runfolder.small_files import SmallFiles
from training.errors import InputError

CONFIG = Path(__file__).parents[3] / "configs" / "llama2-7b-sft.yaml"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """made(name, right=[...], overrides) -> a run that was evaluated at step 20, with these answers."""
    monkeypatch.chdir(tmp_path)

    def make(name, right=(), *overrides, samples=1, metrics=None):
        folder = tmp_path / "runs" / name
        (folder / "sft" / "answers").mkdir(parents=True)
        (folder / "job.yaml").write_text(
            jobs.dump(jobs.read(CONFIG, [f"name={name}", f"storage={tmp_path / 'runs'}", *overrides]))
        )
        for step in range(1, 21):
            SmallFiles().append(
                folder / "sft" / "metrics.jsonl",
                {"step": step, "loss": 2.0, "step_s": 1.5, "tokens": 1000, "workers": 2},
            )
        accuracy = sum(right) / len(right) if len(right) else 0.0
        found = {"eval_loss": 1.25, "eval_accuracy": accuracy, "eval_accuracy_low": 0.0} if metrics is None else metrics
        SmallFiles().append(folder / "sft" / "metrics.jsonl", {"step": 10, "eval_loss": 9.0})
        SmallFiles().append(folder / "sft" / "metrics.jsonl", {"step": 20, **found})
        with (folder / "sft" / "answers" / "step-00000020.jsonl").open("w") as file:
            for number, correct in enumerate(right):
                row = {"question": f"q{number // samples}", "sample": number % samples, "correct": bool(correct)}
                file.write(json.dumps(row) + "\n")
            file.write('{"question": "cut sh')  # a last line that was being written
        return folder

    return make


def test_answers_are_compared_in_pairs(made):
    """10 questions that only the second got right, 2 that only the first did: exact McNemar 0.0386."""
    made("before", [1] * 30 + [0] * 10 + [1] * 2 + [0] * 58)
    made("after", [1] * 30 + [1] * 10 + [0] * 2 + [0] * 58, "phases.sft.learning_rate=1.0e-6")
    found = compare("before", "after")
    paired = found["answers"]
    assert (paired["questions"], paired["better"], paired["worse"], paired["test"]) == (100, 10, 2, "McNemar, exact")
    assert paired["p"] == pytest.approx(0.03857421875)
    assert paired["difference"] == pytest.approx(0.08)
    assert paired["low"] < 0.08 < paired["high"]
    assert found["metrics"]["eval_accuracy"]["difference"] == pytest.approx(0.08)
    assert found["metrics"]["eval_loss"]["values"] == [1.25, 1.25]
    assert "eval_accuracy_low" not in found["metrics"]
    assert found["settings"] == {"learning_rate": [2e-5, 1e-6]}
    assert found["runs"][0]["training_s"] == 30.0


def test_losses_on_other_rows_are_not_subtracted(made, capsys):
    made("before", [1, 0])
    made("after", [1, 1], "phases.sft.data.eval=other.jsonl")
    found = compare("before", "after")
    assert found["metrics"]["eval_loss"] == {"values": [1.25, 1.25], "difference": None}
    assert found["metrics"]["eval_accuracy"]["difference"] == 0.5
    assert next(line for line in lines(found) if line.startswith("eval_loss")).endswith(
        "not comparable: different rows"
    )


def test_runs_of_one_name_are_told_apart_and_all_bad_names_told(made, tmp_path, muster):
    folder = made("before", [1, 0])
    shutil.copytree(folder, tmp_path / "elsewhere" / "before")
    found = compare("before", "elsewhere/before")
    assert [each["name"] for each in found["runs"]] == ["runs/before/sft", "elsewhere/before/sft"]
    assert len(muster("compare", "nobody", "nowhere").errors) == 2


def test_mcnemar_is_the_binomial():
    for better, worse in itertools.product(range(8), range(8)):
        count = better + worse
        tosses = list(itertools.product((0, 1), repeat=count))
        as_uneven = [toss for toss in tosses if abs(2 * sum(toss) - count) >= abs(better - worse)]
        assert mcnemar(better, worse) == pytest.approx(len(as_uneven) / len(tosses))


def test_sign_flips_are_all_flips_in_the_limit():
    values = [0.5, 0.25, -0.25, 1.0, 0.75, 0.5]
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in itertools.product((1, -1), repeat=6)
    ]
    exact = np.mean([each >= abs(sum(values)) for each in sums])
    assert sign_flips(values) == pytest.approx(exact, abs=0.01)  # 20,000 draws: a standard error of 0.002
    assert sign_flips([0.0, 0.0]) == 1.0


def test_several_samples_of_a_question_are_no_independent_trials(made):
    made("one", [1, 0, 0, 0] * 10, samples=4)
    made("two", [1, 1, 1, 0] * 10, samples=4)
    paired = compare("one", "two")["answers"]
    assert (paired["questions"], paired["test"]) == (10, "sign flips")
    assert paired["difference"] == pytest.approx(0.5)
    assert paired["p"] < 0.01


def test_the_step_that_the_phase_ended_with_counts(made):
    folder = made("best", metrics={"eval_loss": 3.0})
    SmallFiles().append(
        folder / "events.jsonl",
        {
            "time": "",
            "event": "phase_finished",
            "phase": "sft",
            "checkpoint": "runs/best/sft/checkpoints/step-00000010",
        },
    )
    made("last", metrics={"eval_loss": 3.0})
    found = compare("best/sft", "last")
    assert found["metrics"]["eval_loss"]["values"] == [9.0, 3.0]
    assert found["answers"] is None


def test_the_terminal(made, capsys):
    made("a", [1, 0] * 20)
    made("b", [1, 0] * 20)
    with pytest.raises(SystemExit) as ended:
        app(["compare", "a", "b"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "the difference is not statistically significant" in out
    assert "eval_accuracy" in out
    with pytest.raises(SystemExit):
        app(["compare", "a", "b", "--json"])
    assert json.loads(capsys.readouterr().out)["answers"]["p"] == 1.0


def test_what_cannot_be_compared(made):
    made("trained")
    made("other", metrics={"eval_margin": 1.0})
    silent = made("silent")
    (silent / "sft" / "metrics.jsonl").write_text("")
    for pair, told in (
        (("trained", "nowhere"), "no such run"),
        (("trained", "trained/ppo"), "no phase ppo"),
        (("trained", "silent"), "has no evaluations"),
        (("trained", "other"), "eval_margin"),
    ):
        if told == "eval_margin":
            (Path("runs/other/sft/metrics.jsonl")).write_text('{"step": 20, "eval_margin": 1.0}\n')
        with pytest.raises(InputError, match=told):
            compare(*pair)


def test_a_metric_is_compared_with_the_same_metric_under_its_old_name(made, muster):
    made("older", metrics={"eval_ended": 0.25})
    made("newer", metrics={"eval_eos_rate": 0.75, "eval_ended": 0.75})
    assert list(compare("older", "newer")["metrics"]) == ["eval_eos_rate"]
    found = json.loads(muster("compare", "older", "newer", "--json").out)["metrics"]
    assert found["eval_eos_rate"]["values"] == [0.25, 0.75]
    assert found["eval_ended"] == found["eval_eos_rate"]
