"""`muster check` names the form that it read; tables, saved data sets and dropped rows by the command line."""

from __future__ import annotations

import csv
import json

import pytest

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(12)]
CHECK = ("check", "job.yaml", "phases.sft.data.eval=null")


def write_csv(path, rows=ROWS):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_check_names_the_form_of_every_source(place, muster):
    write_csv(place / "data/rows.csv")
    (place / "data/alpaca.json").write_text(json.dumps([{"instruction": "1+1", "output": "2"}] * 3 + ROWS[:1]))
    answer = muster(
        "check",
        "job.yaml",
        "phases.sft.data.train=[data/rows.csv, data/alpaca.json]",
        "phases.sft.data.template=plain",
        "phases.sft.data.max_length=64",
    )
    assert answer.status == 0, answer
    lines = answer.out.splitlines()
    assert lines[0].startswith("sft: train: 16 samples of 16 rows, ")
    assert lines[1].startswith("sft: eval: 8 samples of 8 rows, ")
    assert lines[2:5] == [
        "sft: train: data/rows.csv: 12 rows of prompt_completion (CSV)",
        "sft: train: data/alpaca.json: 3 rows of alpaca and 1 row of prompt_completion (JSON)",
        "sft: eval: data/heldout.jsonl: 8 rows of prompt_completion (JSON lines)",
    ]
    report = json.loads(muster("check", "job.yaml", "phases.sft.data.train=data/rows.csv", "--json").out)
    assert report["phases"]["sft"]["train"]["sources"] == [
        {"path": "data/rows.csv", "kinds": ["CSV"], "formats": {"prompt_completion": 12}}
    ]


def test_a_csv_gives_the_tokens_of_the_same_rows_as_json(place, muster):
    write_csv(place / "data/rows.csv")
    (place / "data/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    counts = [
        json.loads(muster(*CHECK, f"phases.sft.data.train=data/rows.{kind}", "--json").out)["phases"]["sft"]["train"]
        for kind in ("csv", "jsonl")
    ]
    for one in counts:
        del one["sources"]
    assert counts[0] == counts[1]


def test_splits_of_a_saved_data_set_train_and_evaluate(place, muster):
    import datasets

    splits = {"train": datasets.Dataset.from_list(ROWS[:8]), "test": datasets.Dataset.from_list(ROWS[8:])}
    datasets.DatasetDict(splits).save_to_disk(str(place / "saved"))
    answer = muster(
        "check", "job.yaml", "phases.sft.data.train=saved", "phases.sft.data.eval={path: saved, split: test}"
    )
    assert answer.status == 0, answer
    assert "sft: train: saved: 8 rows of prompt_completion (Arrow)" in answer.out
    assert "sft: eval: saved: 4 rows of prompt_completion (Arrow)" in answer.out
    answer = muster("check", "job.yaml", "phases.sft.data.train=saved", "phases.sft.data.eval=saved")
    assert answer.status == 2
    (line,) = answer.errors
    assert "phases.sft.data.eval: " in line
    assert "the folder has several splits; there are train, test: name one" in line


def test_dropped_rows_are_shown_and_those_of_the_evaluation_refused(place, muster):
    rows = [json.dumps(row) for row in ROWS]
    (place / "data/some.jsonl").write_text("\n".join([*rows, "{", *rows]) + "\n")
    some, drop = "phases.sft.data.train=data/some.jsonl", "phases.sft.data.bad_rows={drop: 0.05}"
    assert muster(*CHECK, some).status == 2
    answer = muster(*CHECK, some, drop)
    assert answer.status == 0, answer
    assert "sft: 1 of 25 rows cannot be used and was dropped (data.bad_rows)" in answer.out
    assert "sft: dropped: data/some.jsonl:13: broken JSON" in answer.out
    answer = muster("check", "job.yaml", "phases.sft.data.eval=data/some.jsonl", drop)
    assert answer.status == 2
    assert answer.errors[0].startswith("data/some.jsonl:13: broken JSON")


@pytest.mark.cpu
def test_dropped_rows_are_listed_in_the_folder_of_the_phase(place, muster):
    (place / "data/some.jsonl").write_text("\n".join([*map(json.dumps, ROWS), '{"prompt": "1"}']) + "\n")
    changes = (
        "phases.sft.data.train=data/some.jsonl",
        "phases.sft.data.bad_rows={drop: 0.1}",
        "phases.sft.max_steps=1",
    )
    answer = muster("run", "job.yaml", "--inline", *changes)
    assert answer.status == 0, answer
    (bad,) = [json.loads(line) for line in (place / "runs/sums/sft/bad_rows.jsonl").open()]
    assert bad["row"] == "data/some.jsonl:13"
    assert bad["reason"].startswith("missing column `completion`")
    assert "sft: 1 of 13 rows cannot be used and was dropped (data.bad_rows)" in answer.out


def test_prompts_and_questions_may_be_tables(place):
    from launcher.inference.prompts import given
    from training.data.questions import read

    write_csv(place / "data/rows.csv")
    prompts = given((), place / "data/rows.csv", 2)
    assert [(one.where, one.content, one.beside) for one in prompts] == [
        ("data/rows.csv:2", "0 + 1 =", {"expected": " 1"}),
        ("data/rows.csv:3", "1 + 1 =", {"expected": " 2"}),
    ]
    (question,) = read("data/rows.csv", limit=1)
    assert (question.text, question.expected) == ("0 + 1 =", "1")


def test_a_job_that_refuses_bad_rows_is_the_same_job_as_before_there_was_a_choice(place):
    from pathlib import Path

    from launcher.jobfile import job as jobs

    without, refusing, dropping = (
        jobs.load(Path("job.yaml"), overrides)
        for overrides in ([], ["phases.sft.data.bad_rows=refuse"], ["phases.sft.data.bad_rows={drop: 0.01}"])
    )
    assert jobs.job_hash(without) == jobs.job_hash(refusing) != jobs.job_hash(dropping)
    assert jobs.differences(without, dropping) != []


def test_a_split_of_a_plain_file_is_told_to_change_nothing(place, muster):
    answer = muster(*CHECK, "phases.sft.data.train={path: data/train.jsonl, split: test, name: main}")
    assert answer.status == 0, answer
    assert "sft: data/train.jsonl: `split: test` changes nothing: these are files without splits" in answer.out
    assert "sft: data/train.jsonl: `name: main` changes nothing: it is for data sets on the hub" in answer.out


def test_one_source_needs_no_list(place):
    from pathlib import Path

    from launcher.jobfile import job as jobs

    one, listed = (
        jobs.load(Path("job.yaml"), [f"phases.sft.data.train={text}"])
        for text in ("{path: data/train.jsonl}", "[{path: data/train.jsonl}]")
    )
    assert jobs.differences(one, listed) == []
