"""`muster report`: what it finds in runs, also in those that are cut off, at work or of another version."""

from __future__ import annotations

import json
import os
from datetime import timedelta

import pytest

from launcher.report import charts, report
from launcher.report import html as page
from launcher.report.timeline import LOADING, RECOVERING, REDONE, TRAINING, WAITING, timeline
from tests.support.made_runs import BEGAN, QUESTIONS, MadeRun, finetuned, rewarded
from training.errors import InputError


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def append(path, text):
    with path.open("a") as file:
        file.write(text)


# The timeline


def events_of(run: MadeRun):
    return [json.loads(line) for line in (run.folder / "events.jsonl").open()]


def test_a_timeline_tells_what_was_lost_apart_from_what_was_kept(place):
    found = timeline(events_of(finetuned(place, "one")))
    told = [(each.kind, round(each.end - each.begin)) for each in found.stretches]
    assert told == [
        (WAITING, 20), (LOADING, 10),
        (TRAINING, 3 + 100 + 3), (REDONE, 57 + 2), (RECOVERING, 5),
        (WAITING, 20), (LOADING, 10), (TRAINING, 3 * 103),
    ]  # fmt: skip
    assert found.active == found.end == sum(seconds for _, seconds in told)
    moments = [(moment.kind, moment.text) for moment in found.moments if moment.kind in ("failure", "resize")]
    assert moments == [
        ("failure", "killed: worker 1 on 10.0.0.2 was killed by SIGKILL (step 157); recovered automatically"),
        ("resize", "continues with 3 workers instead of 4"),
    ]


def test_pauses_between_two_starts_by_a_person_do_not_count(place):
    run = MadeRun(place, "paused", {"sft": {}})
    run.start("sft")
    run.steps("sft", 1, 10)
    run.save("sft", 10)
    run.event("interrupted")
    run.wait(86_400)
    run.start("sft", step=10)
    run.steps("sft", 11, 20)
    run.finish("sft", 20)
    found = timeline(events_of(run))
    assert found.active == 30 + 10 + 30 + 10
    assert found.end == found.active + 86_400


def test_a_driver_that_vanished_is_known_up_to_its_last_word(place):
    run = MadeRun(place, "vanished", {"sft": {}})
    run.start("sft")
    run.wait(100)
    run.save("sft", 100)
    run.wait(50)  # and then the machine was switched off
    run.wait(1000)
    run.start("sft", step=100)
    run.finish("sft", 100)
    assert timeline(events_of(run)).active == 30 + 100 + 30


def test_what_a_vanished_driver_had_done_is_lost_once_it_is_done_again(place):
    run = MadeRun(place, "vanished", {"sft": {}})
    run.start("sft")
    run.steps("sft", 1, 20)
    run.save("sft", 20)
    run.wait(500)
    run.start("sft", step=20, redone_s=18.0)
    run.finish("sft", 20)
    found = timeline(events_of(run))
    assert found.seconds("sft", REDONE) == 18
    assert found.active == 30 + 20 + 18 + 30
    assert [moment.kind for moment in found.moments if moment.at == 50] == ["checkpoint", "failure"]
    (told,) = report.report(["vanished"])["runs"]
    assert (told["incident_count"], told["recovered"], told["lost_s"]) == (1, False, 18)


def test_a_driver_that_is_gone_is_a_failure_and_its_steps_count(place):
    run = MadeRun(place, "gone", {"sft": {}})
    run.start("sft")
    run.steps("sft", 1, 38)
    (told,) = report.report(["gone"])["runs"]
    assert (told["state"], told["incident_count"]) == ("lost", 1)
    (phase,) = told["phases"]
    assert phase["time"]["steps"] == pytest.approx(38 * 0.9)
    assert sum(phase["time"].values()) == pytest.approx(told["seconds"])


@pytest.mark.parametrize("ending", ["partial", "interrupted"], ids=["partial", "before 0.2"])
def test_phases_one_at_a_time_are_not_stopped_by_anybody(place, ending):
    run = MadeRun(place, "only", {"sft": {}, "reward": {}})
    run.start("sft")
    run.event("phase_finished", phase="sft", checkpoint="x/step-00000400")
    run.event(ending)
    assert "stopped" not in [moment.kind for moment in timeline(events_of(run)).moments]


def test_a_run_at_work_lasts_until_now(place):
    run = MadeRun(place, "working", {"sft": {}})
    run.start("sft")
    found = timeline(events_of(run), until=BEGAN + timedelta(seconds=90))
    assert found.seconds("sft", TRAINING) == 60


def test_work_since_the_last_checkpoint_is_lost_when_a_person_stops_at_once(place):
    run = MadeRun(place, "cut", {"sft": {}})
    run.start("sft")
    run.wait(40)
    run.event("interrupted", orderly=False)
    found = timeline(events_of(run))
    assert found.seconds("sft", REDONE) == 40
    assert found.seconds("sft", TRAINING) == 0


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"event": "started"},
        {"time": "soon", "event": "started"},
        {"time": "2026-03-01T12:00:00+00:00", "event": "sneezed"},
    ],
)
def test_events_of_another_version_are_passed_over(place, odd):
    run = finetuned(place, "one")
    events = events_of(run)
    assert timeline([odd, *events]).stretches == timeline(events).stretches


# Curves


def test_one_chart_holds_one_metric_of_recipes_for_which_it_means_the_same():
    rows = [{"step": 1, "loss": 2.0, "eval_accuracy": 0.5, "tokens_per_s": 9.0}]
    recipes = ("pretrain", "sft", "cft", "reward", "ppo")
    found = charts.charts([charts.Source(recipe, recipe, rows) for recipe in recipes])
    told = {(chart["title"], chart["section"]): [curve["of"] for curve in chart["curves"]] for chart in found}
    assert told[("Loss (pretrain, sft, cft)", "learning")] == ["pretrain", "sft", "cft"]
    assert told[("Loss (reward)", "learning")] == ["reward"]
    assert told[("Policy loss", "rest")] == ["ppo"]
    assert told[("Answer accuracy", "learning")] == ["pretrain", "sft", "cft", "ppo"]
    assert told[("Pair accuracy, held out", "learning")] == ["reward"]
    assert [chart["section"] for chart in found] == sorted(
        (chart["section"] for chart in found), key=charts._SECTIONS.index
    )


def test_a_metric_that_nobody_knows_is_drawn_under_its_name():
    (chart,) = charts.charts([charts.Source("a", "sft", [{"step": 3, "cosmic_rays": 2}])])
    assert (chart["title"], chart["section"], chart["curves"][0]["value"]) == ("Cosmic rays", "rest", [2.0])


def test_curves_go_over_steps_tokens_and_hours_and_leave_out_what_is_no_number():
    rows = [
        {"step": 1, "loss": 4.0, "tokens": 100, "step_s": 1800},
        {"step": 1, "eval_accuracy": 0.5, "eval_accuracy_low": 0.4, "eval_accuracy_high": 0.6},
        {"step": 2, "loss": float("nan"), "tokens": 100, "step_s": 1800},
        {"step": 3, "loss": "low", "tokens": 100},
        {"step": 4, "loss": 3.0, "tokens": 100, "step_s": 1800},
    ]
    found = {chart["metric"]: chart["curves"][0] for chart in charts.charts([charts.Source("a", "sft", rows)])}
    assert {name: found["loss"][name] for name in ("step", "tokens", "hours", "value")} == {
        "step": [1, 4], "tokens": [100, 400], "hours": [0.5, 1.5], "value": [4.0, 3.0],
    }  # fmt: skip
    assert (found["eval_accuracy"]["low"], found["eval_accuracy"]["high"]) == ([0.4], [0.6])


def test_a_long_curve_keeps_its_ends_and_its_spikes():
    values = [1.0] * 100_000
    values[77_777], values[3] = 50.0, -50.0
    kept = charts.thinned(values, 1200)
    assert len(kept) <= 1200
    assert {0, 3, 77_777, 99_999} <= set(kept)
    assert kept == sorted(kept)
    assert charts.thinned([1.0, 2.0], 1200) == [0, 1]


# The report


def test_what_came_of_runs(place):
    finetuned(place, "sft")
    finetuned(place, "cft", "cft", 0.98)
    rewarded(place)
    found = report.report(["sft", "cft", "rewarded"])
    sft, cft, ppo = found["runs"]
    assert (sft["state"], sft["attempts"], sft["incident_count"], sft["recovered"]) == ("done", 2, 1, True)
    assert sft["lost_s"] == 59 + 5
    assert sft["machines"] == ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"]
    assert sft["versions"] == {"torch": "2.13.0"}
    (phase,) = sft["phases"]
    accuracy = next(each for each in phase["results"] if each["metric"] == "eval_accuracy")
    assert (accuracy["before_step"], accuracy["after_step"]) == (0, 400)
    assert accuracy["before"] < 0.3 < 0.7 < accuracy["low"] < accuracy["after"] < accuracy["high"] <= 1
    assert phase["time"]["steps"] == pytest.approx(0.9 * 400)
    assert sum(phase["time"].values()) == pytest.approx(sft["seconds"], abs=0.01)
    counts = phase["before_after"]["counts"]
    assert sum(counts.values()) == len(QUESTIONS)
    assert counts["became right"] > counts["became wrong"]
    assert cft["phases"][0]["recipe"] == "cft"
    (pair,) = found["pairs"]
    assert (pair["first"], pair["second"], pair["questions"]) == ("sft/sft", "cft/cft", len(QUESTIONS))
    assert found["side_by_side"]["columns"] == ["sft/sft", "cft/cft"]
    disagreed = [len({answer["correct"] for answer in row["answers"]}) == 2 for row in found["side_by_side"]["rows"]]
    assert disagreed == sorted(disagreed, reverse=True)
    (policy,) = ppo["phases"]
    assert set(policy["time"]) >= {"generate", "score", "learn"}
    best, worst = policy["responses"]["best"], policy["responses"]["worst"]
    assert [each["reward"] for each in best] == [2 + step / 100 for step in range(60, 55, -1)]
    assert [each["reward"] for each in worst] == [-1 + step / 100 for step in range(49, 54)]
    assert best[0]["prompt"] == "60+1="
    assert {each["step"] for each in policy["responses"]["first"]} == {1}


def test_the_weights_that_count_are_those_of_the_best_checkpoint(place):
    run = finetuned(place, "best")
    lines = (run.folder / "events.jsonl").read_text().replace("x/step-00000400", "x/step-00000200")
    (run.folder / "events.jsonl").write_text(lines)
    (phase,) = report.report(["best"])["runs"][0]["phases"]
    assert phase["chosen_step"] == 200
    assert [row["step"] for row in phase["evaluations"]["rows"] if row["chosen"]] == [200]
    assert phase["before_after"]["last_step"] == 200


def test_a_long_table_of_evaluations_keeps_the_first_the_last_and_the_one_that_counts(place):
    run = MadeRun(place, "long", {"sft": {}})
    run.start("sft")
    for step in range(1, 41):
        run.metrics("sft", {"step": step, "eval_loss": 1.0})
    run.finish("sft", 23)
    (phase,) = report.report(["long"])["runs"][0]["phases"]
    steps = [row["step"] for row in phase["evaluations"]["rows"]]
    assert (steps[0], steps[-1], steps) == (1, 40, sorted(steps))
    assert [row["step"] for row in phase["evaluations"]["rows"] if row["chosen"]] == [23]
    assert (len(steps) <= 13, phase["evaluations"]["of"]) == (True, 40)


def test_a_run_that_an_older_version_began_has_one_curve_of_a_renamed_metric(place):
    run = MadeRun(place, "begun", {"ppo": {"reward": "rules.py:score"}})
    run.start("ppo", total=4)
    run.steps("ppo", 1, 2, ended=lambda step: step / 8)
    run.start("ppo", total=4, step=2)
    run.steps("ppo", 3, 4, eos_rate=lambda step: step / 8, ended=lambda step: step / 8)
    charts_of_rates = [chart for chart in report.report(["begun"])["charts"] if chart["fraction"]]
    assert [chart["metric"] for chart in charts_of_rates] == ["eos_rate"]
    assert charts_of_rates[0]["curves"][0]["value"] == [0.125, 0.25, 0.375, 0.5]


def test_one_phase_alone_and_a_run_that_is_named_twice(place):
    run = finetuned(place, "one")
    assert [p["name"] for p in report.report(["one/sft"])["runs"][0]["phases"]] == ["sft"]
    assert len(report.report(["one", "one/sft", str(run.folder)])["runs"]) == 1


def test_runs_of_one_name_are_told_apart_by_their_folders(place):
    finetuned(place, "one")
    finetuned(place.parent / "other", "one")
    found = report.report(["one", "other/one"])
    assert [run["name"] for run in found["runs"]] == ["runs/one", "other/one"]
    assert [run["phases"][0]["key"] for run in found["runs"]] == ["runs/one/sft", "other/one/sft"]


def test_half_written_and_odd_lines_are_left_out(place):
    run = finetuned(place, "one")
    whole = report.report(["one"])
    append(run.folder / "sft/metrics.jsonl", '{"step": 401, "loss": ' + "9" * 400 + "}\n" + "[" * 200_000 + "\n")
    end = '{"time": "2026-03-01T12:08:59+00:00", "phase": "sft", "event": '
    for odd in (
        '"phase_finished"',
        '"rewound"',
        '"rewound", "to": [1]',
        '"workers", "workers": 5',
        '"x", "attempt": "y"',
    ):
        append(
            run.folder / "events.jsonl",
            f"{end}{odd}}}\n".replace('"phase": "sft", ', "" if "finished" in odd else '"phase": "ppo", '),
        )
    for file in ("events.jsonl", "sft/metrics.jsonl", "sft/answers/step-00000400.jsonl", "sft/samples.jsonl"):
        append(
            run.folder / file,
            '[1]\n"two"\n\xff\n{"odd": NaN}\n{"event": 5}\n{"event": "x", "phase": []}\n{"step": 401, "loss": 0.',
        )
    found = report.report(["one"])
    assert found["charts"] == whole["charts"]
    assert found["runs"][0]["phases"] == whole["runs"][0]["phases"]


def test_a_run_of_another_version_is_shown_as_far_as_it_is_understood(place):
    run = finetuned(place, "one")
    job = run.folder / "job.yaml"
    job.write_text(job.read_text().replace("max_steps", "warp_factor"))
    append(
        run.folder / "events.jsonl",
        '{"time": "2027-01-01T00:00:00+00:00", "event": "incident"}\n{"event": "workers"}\n',
    )
    append(run.folder / "sft/metrics.jsonl", '{"step": "many", "eval_loss": 1.0}\n{"eval_loss": null, "step": 401}\n')
    found = report.report(["one"])
    assert "warp_factor" in found["runs"][0]["problems"][0]
    assert found["runs"][0]["phases"][0]["results"]
    assert "warp_factor" in page.render(found)


@pytest.mark.parametrize("job", [b"phases: [1, 2]", b"\xff\xfe\x00 : {", b""])
def test_phases_of_a_job_that_cannot_be_read_are_those_that_have_metrics(place, job):
    run = finetuned(place, "one")
    (run.folder / "job.yaml").write_bytes(job)
    (told,) = report.report(["one"])["runs"]
    assert [(phase["name"], phase["recipe"], phase["state"]) for phase in told["phases"]] == [
        ("sft", "sft", "finished")
    ]
    assert told["problems"]


def test_a_run_at_work_and_phases_that_have_not_begun(place):
    run = MadeRun(place, "young", {"sft": {}, "reward": {"from": "sft"}})
    run.start("sft")
    run.steps("sft", 1, 3)
    (told,) = report.report(["young"])["runs"]
    assert told["state"] == "lost"  # nobody holds its lock
    assert [phase["state"] for phase in told["phases"]] == ["begun", "not begun"]
    assert "not started" in page.render(report.report(["young"]))


def test_secrets_in_addresses_are_not_shown(place):
    run = finetuned(place, "one")
    job = run.folder / "job.yaml"
    job.write_text(job.read_text().replace("/data/train.jsonl", "https://me:hunter2@data.example/rows.jsonl"))
    assert "hunter2" not in page.render(report.report(["one"]))


# The page


def test_what_a_model_says_stays_text(place, muster):
    run = finetuned(place, "one")
    file = run.folder / "sft/answers/step-00000400.jsonl"
    attack = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
    file.write_text(file.read_text().replace("so it is 7", attack + "\\u001b[2J"))
    html = page.render(report.report(["one"]))
    assert attack not in html
    assert "\x1b" not in html
    assert "&lt;/script&gt;" in html


def test_the_command_writes_a_page_replaces_its_own_and_nothing_else(place, muster):
    finetuned(place, "one")
    assert muster("report", "one", "--out", "a.html").out.strip() == "a.html"
    assert muster("report", "one", "--out", "a.html").status == 0
    (place.parent / "letter.html").write_text("Dear Mia")
    refused = muster("report", "one", "--out", "letter.html")
    assert (refused.status, refused.errors) == (
        2,
        ["letter.html: --out: exists and is not a report; choose a different file"],
    )
    assert (place.parent / "letter.html").read_text() == "Dear Mia"
    assert "is not a file" in muster("report", "one", "--out", str(place)).err
    assert "cannot be written" in muster("report", "one", "--out", "no/such/place.html").err
    os.mkfifo("pipe")
    for no_file in ("pipe", "/dev/full"):  # neither waited for nor read
        assert "is not a file" in muster("report", "one", "--out", no_file).err
    (place.parent / "empty.html").touch()
    (place.parent / "link.html").symlink_to("empty.html")
    assert muster("report", "one", "--out", "link.html").status == 0
    assert (place.parent / "link.html").is_symlink()
    assert page.MARK in (place.parent / "empty.html").read_text()
    assert [file.name for file in place.parent.glob(".*")] == []
    assert muster("report", "one", "--json", "--out", "b.html").status == 2
    assert json.loads(muster("report", "one", "--json").out)["runs"][0]["name"] == "one"


def test_all_runs_that_are_not_there_are_named_at_once(place, muster):
    finetuned(place, "one")
    answer = muster("report", "one", "none", "one/rlhf", "nowhere/at/all")
    assert answer.status == 2
    assert len(answer.errors) == 3
    assert "there is no" in answer.err or "no such run" in answer.err
    assert "no phase rlhf; there are: sft" in answer.err
    assert not (place.parent / "report.html").exists()


def test_a_run_without_metrics(place, muster):
    MadeRun(place, "empty", {"sft": {}})
    answer = muster("report", "empty")
    assert (answer.status, answer.errors) == (
        2, ["runs/empty: nothing was trained yet (no metrics); use `muster run` or `muster resume` first"],
    )  # fmt: skip
    finetuned(place, "one")
    assert muster("report", "empty", "one").status == 0


def test_a_report_is_about_a_run_that_can_be_found(place):
    with pytest.raises(InputError, match="no such run"):
        report.report(["nothing"])
