"""The verbs: what they print, as text and as JSON, and the status they exit with."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from docs import generate_reference
from launcher.cli import main
from launcher.cli.common import GROUPS
from training import __version__
from training.errors import InputError, TrainingError

VERBS = generate_reference.verbs()
"""Every command, by the words that call it."""


@pytest.fixture
def run(place):
    """A run that has begun and is at rest."""
    from launcher.driver import open_run
    from launcher.jobfile import job as jobs

    opened = open_run.begin(jobs.load(Path("job.yaml")))
    opened.close()
    return opened


def test_every_verb_has_a_group_and_an_uncut_summary(muster, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert sorted(name for names in GROUPS.values() for name in names) == sorted({words.split()[0] for words in VERBS})
    lines = muster("--help").out.splitlines() + muster("cluster", "--help").out.splitlines()
    for words, command in VERBS.items():
        name, summary = words.split()[-1], command.help.partition("\n\n")[0]
        assert summary.endswith(".")
        assert any(line.split(maxsplit=1) == [name, summary] for line in lines), (words, summary)


def test_without_arguments_the_command_prints_its_help_and_fails(muster):
    answer, asked_for = muster(), muster("--help")
    assert (answer.status, answer.out) == (2, ""), "no verb is a wrong command line"
    assert answer.err.split() == asked_for.out.split()
    assert [line[:-1] for line in answer.err.splitlines() if line.rstrip(":") in GROUPS] == list(GROUPS)


@pytest.mark.parametrize("words", VERBS)
def test_every_verb_has_help_with_examples_that_parse(muster, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "80")
    answer = muster(*words.split(), "--help")
    assert answer.status == 0
    assert max(map(len, answer.out.splitlines())) <= 80
    head, _, shown = answer.out.partition("\nExamples:\n")
    assert f" {words} [OPTIONS]" in head.splitlines()[0]
    examples = VERBS[words].epilog.replace("\\\n", "").splitlines()
    assert len(examples) >= 1
    assert all(line.strip() in shown for line in VERBS[words].epilog.splitlines())
    for example in examples:
        program, *arguments = shlex.split(example)
        assert (program, parsed(arguments)) == ("muster", words)


def parsed(arguments: list[str]) -> str:
    """The words of the verb that the arguments call, after its parser has accepted them. The verb is not run."""
    name, command, context = "muster", typer.main.get_command(main.app), None
    while True:
        context = command.make_context(name, arguments, parent=context)
        if not hasattr(command, "commands"):
            return context.command_path.removeprefix("muster ")
        name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])


def test_version(muster):
    answer = muster("--version")
    assert (answer.status, answer.out) == (0, f"muster {__version__}\n")


@pytest.mark.parametrize(
    ("outcome", "status", "err"),
    [
        (None, 0, ""),
        (1, 1, ""),
        (130, 130, ""),
        (InputError.of("a.yaml:1", "no"), 2, "a.yaml:1: no\n"),
        (TrainingError("worker 1 died"), 1, "worker 1 died\n"),
        (OSError(28, "No space left on device", "runs/x"), 1, "[Errno 28] No space left on device: 'runs/x'\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=str,
)
def test_exit_status(muster, monkeypatch, outcome, status, err):
    from launcher.driver import check, driver

    def run_job(*_: object, **__: object) -> int | None:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(check, "load", lambda *_, **__: None)
    monkeypatch.setattr(driver, "run_job", run_job)
    answer = muster("run", "job.yaml")
    assert (answer.status, answer.err) == (status, err)


def test_an_error_in_the_program_keeps_its_stack_trace(muster, monkeypatch):
    from launcher.driver import check

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(check, "load", broken)
    with pytest.raises(ZeroDivisionError):
        muster("run", "job.yaml")


def test_check_counts_rows_and_tokens(muster, place):
    answer = muster("check", "job.yaml")
    assert answer.status == 0, answer
    lines = answer.out.splitlines()
    assert lines[0].startswith("sft: train: 40 samples of 40 rows, ")
    assert lines[1].startswith("sft: eval: 8 samples of 8 rows, ")
    assert lines[-1] == "sums: ok"
    assert not (place / "runs").exists()


def test_check_as_json_has_the_same_counts(muster, place):
    report = json.loads(muster("check", "job.yaml", "--json").out)
    assert report["name"] == "sums"
    train = report["phases"]["sft"]["train"]
    rows = [json.loads(line) for line in (place / "data" / "train.jsonl").read_text().splitlines()]
    characters = sum(len(row["prompt"]) + len(row["completion"]) for row in rows)
    assert train["tokens"] == characters + len(rows), "a token a byte, and an EOS a row"
    assert train["target_tokens"] == sum(len(row["completion"]) + 1 for row in rows)


def test_check_of_data_on_the_hub_says_that_it_has_not_read_it(muster, place):
    answer = muster("check", "job.yaml", "phases.sft.data.train=openai/gsm8k", "phases.sft.data.eval=null")
    assert answer.out.splitlines() == [
        "sft: openai/gsm8k is on the hub; its rows are read when the job runs",
        "sums: ok",
    ]


def test_list_and_status_of_a_run(muster, run):
    assert muster("list").out == f"{'sums':<24} {'lost':<12} sft 0/?\n"
    assert muster("status", "sums").out.splitlines()[1] == "  sft: not started"
    assert json.loads(muster("status", "sums", "--json").out)["state"] == "lost"
    assert [entry["name"] for entry in json.loads(muster("list", "--json").out)] == ["sums"]


def test_list_of_nothing(muster, place):
    assert muster("list").out == "no runs\n"
    assert json.loads(muster("list", "--json").out) == []


def test_a_damaged_checkpoint_is_exit_status_1(muster, run):
    assert muster("checkpoints", "sums").status == 0
    (run.phase("sft") / "checkpoints" / "step-00000002").mkdir(parents=True)
    answer = muster("checkpoints", "sums")
    assert answer.status == 1
    assert answer.out.splitlines()[0] == "sft step       2  DAMAGED"


@pytest.mark.parametrize(
    ("arguments", "err"),
    [
        (("export", "sums"), "runs/sums: has no checkpoints yet"),
        (("export", "sums", "--phase", "ppo"), "runs/sums: no phase ppo; there are: sft"),
        (
            ("export", "sums", "--phase", "sft", "--step", "3"),
            "runs/sums/sft/checkpoints: no checkpoint of step 3; there are: none",
        ),
        (("generate", "sums", "-p", "x"), "runs/sums: the run has no model and no checkpoint yet"),
        (("resume", "smus"), "smus: no such run: neither a run folder nor a name in runs/ (there: sums)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_a_young_run_does_not_have(muster, run, arguments, err):
    answer = muster(*arguments)
    assert (answer.status, answer.err) == (2, f"{err}\n")


@pytest.mark.parametrize(
    ("out", "message"),
    [("job.yaml", "is a file"), ("data", "the folder is not empty"), ("model", "the folder is not empty")],
)
def test_an_export_writes_over_nothing(muster, run, monkeypatch, out, message):
    from launcher.inference import export

    monkeypatch.setattr(export, "_checkpoint", lambda *_: Path("step-00000002"))
    answer = muster("export", "sums", "--phase", "sft", "--out", out)
    assert answer.status == 2
    assert answer.err.startswith(f"{out}: {message}; choose another --out")


@pytest.mark.parametrize(
    ("kill", "err"),
    [
        ("rank", "is not running (it is lost); chaos needs a running job"),
        ("all", "'all' is not one of 'rank', 'node', 'driver'"),
    ],
)
def test_a_drill_needs_a_run_at_work(muster, run, kill, err):
    answer = muster("chaos", "sums", "--kill", kill)
    assert answer.status == 2
    assert err in answer.err


def test_the_entry_point_is_the_app(monkeypatch):
    called = []
    monkeypatch.setattr(main, "app", lambda: called.append(True))
    main.main()
    assert called


@pytest.mark.parametrize("more", [(), ("--json",)], ids=["text", "json"])
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path, more):
    command = [sys.executable, "-m", "launcher", "list", *more]
    with subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--epochs", "Settings of a job are given as key=value: phases.NAME.epochs=..."),
        ("--per-device-train-batch-size", "the name here is phases.NAME.batch"),
        ("--resources.workers=2", "Settings of a job are given without dashes: resources.workers=..."),
        ("--inlin", "--inline"),
    ],
)
def test_an_option_that_is_a_setting_is_answered_with_the_setting(muster, option, told):
    answer = muster("run", "job.yaml", option)
    assert answer.status == 2
    assert told in " ".join(answer.err.split())


def test_options_that_would_have_no_effect_are_refused(muster):
    assert muster("resume", "first", "--phase", "sft").err.startswith("--phase: goes with --step")
    assert muster("resume", "first", "--on", "lab", "--inline").err == "command line: --on does not go with --inline\n"


def test_a_job_file_and_a_run_folder_that_were_confused_are_told(muster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/first").mkdir(parents=True)
    for file in ("job.yaml", "runs/first/job.yaml"):
        (tmp_path / file).write_text("phases: {sft: {}}\n")
    answer = muster("check", "runs/first")
    assert (answer.status, answer.err) == (
        2,
        "runs/first: is a folder; give a YAML file, such as runs/first/job.yaml\n",
    )
    answer = muster("resume", "job.yaml")
    assert answer.status == 2
    assert answer.err.startswith(
        "job.yaml: is a file, not a run; start or resume the run of a job file with `muster run job.yaml`"
    )
