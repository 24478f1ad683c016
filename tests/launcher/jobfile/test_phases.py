"""Several phases in one job, phases that start from elsewhere, and `muster eval`: by the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launcher.jobfile import job as jobs
from tests.launcher.cli.test_bad_input import refused

PHASES = """\
name: chain
model: {path: model, dtype: fp32}
resources: {workers: 1, threads: 1, gpus_per_worker: 0}
sharding: {stage: 0}
phases:
  sft:
    data: {train: data/train.jsonl, template: none, max_length: 32}
    max_steps: 2
    batch: 4
    learning_rate: 1.0e-3
  reward:
    data: {train: data/pairs.jsonl, template: none, max_length: 32}
    max_steps: 2
    batch: 4
  more:
    recipe: sft
    from: sft
    data: {train: data/train.jsonl, template: none, max_length: 32}
    max_steps: 2
    batch: 4
"""


@pytest.fixture
def chain(place) -> Path:
    (place / "chain.yaml").write_text(PHASES)
    rows = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": f" {n}"} for n in range(20)]
    (place / "data/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def edited(place: Path, *changes: tuple[str, str]) -> tuple[str, ...]:
    """The arguments that check the job file with some of its text replaced."""
    text = (place / "chain.yaml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (place / "edited.yaml").write_text(text)
    return ("check", "edited.yaml")


def ended(place: Path, run: str = "chain") -> list[str]:
    events = [json.loads(line) for line in (place / "runs" / run / "events.jsonl").open()]
    return [event["phase"] for event in events if event["event"] == "phase_finished"]


# ── starting from elsewhere ──


def test_a_phase_starts_from_what_it_names(chain):
    phases = jobs.load(Path("chain.yaml")).phases
    assert (phases["sft"].from_, phases["reward"].from_, phases["more"].from_) == (None, "sft", "sft")
    assert all(phase.starts_from_phase for name, phase in phases.items() if name != "sft")


def test_a_run_and_a_folder_to_start_from_are_found(chain, muster):
    assert muster("run", "job.yaml", "--inline").status == 0
    model = chain / "runs/sums/sft/model"
    for given in ("sums", "sums/sft", "runs/sums", "runs/sums/sft/model", str(model), str(chain / "runs/sums")):
        arguments = edited(chain, ("  sft:\n", f"  sft:\n    from: {given}\n"))
        assert muster(*arguments).status == 0
        job = jobs.load(Path("edited.yaml"))
        assert job.phases["sft"].model.path == str(model)
        again = chain / "resolved.yaml"
        again.write_text(jobs.dump(job))
        assert jobs.differences(job, jobs.read(again)) == []


def test_a_model_below_the_home_folder_is_found(chain, monkeypatch):
    from launcher.inference.model_lookup import model_folder

    monkeypatch.setenv("HOME", str(chain))
    assert model_folder("~/model") == str(chain / "model")


def test_what_cannot_be_started_from_is_refused(chain, muster):
    def lines(*changes):
        return refused(muster, chain, edited(chain, *changes))

    line = "edited.yaml:7: phases.sft.from: "
    (unknown,) = lines(("  sft:\n", "  sft:\n    from: nowhere\n"))
    assert unknown.startswith(f'{line}"nowhere" is no model folder and no run in the storage; name a folder')
    (later,) = lines(("  sft:\n", "  sft:\n    from: reward\n"))
    assert later.startswith(f'{line}"reward" is no phase before this one')
    (near,) = lines(("from: sft\n", "from: stf\n"))
    assert near.endswith('"stf" is no phase of this job; did you mean sft?')
    (classifier,) = lines(("    from: sft\n", ""))
    assert classifier.endswith(
        "`reward` ends with a reward model, sft needs a language model; start from another phase"
    )
    (chain / "runs/half/sft").mkdir(parents=True)
    shutil.copy(chain / "chain.yaml", chain / "runs/half/job.yaml")
    (unfinished,) = lines(("  sft:\n", "  sft:\n    from: half/sft\n"))
    assert f"{line}the phase sft of the run {chain}/runs/half is not finished: there is no " in unfinished
    (no_phase,) = lines(("  sft:\n", "  sft:\n    from: half/stf\n"))
    assert f"the run {chain}/runs/half has no phase stf; did you mean sft?" in no_phase


def test_a_classifier_is_no_language_model(chain, muster):
    config = json.loads((chain / "model/config.json").read_text())
    (chain / "model/config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]})
    )
    arguments = edited(chain)
    (line,) = refused(muster, chain, arguments)
    assert (
        "LlamaForSequenceClassification (a reward model, or another classifier) is not a causal language model" in line
    )


def test_adapters_of_two_phases_must_have_one_shape(chain, muster):
    arguments = edited(
        chain,
        ("model: {path: model, dtype: fp32}", "model: {path: model, dtype: fp32, lora: {rank: 4}}"),
        ("    from: sft\n", "    from: sft\n    model: {lora: {rank: 8}}\n"),
    )
    (line,) = refused(muster, chain, arguments)
    assert "phases.more.model.lora: `sft` ends with an adapter of rank 4 and alpha 32, which is trained on here" in line


def test_lora_targets_that_match_nothing_are_told_by_their_names(chain, muster):
    arguments = edited(chain, ("dtype: fp32}", "dtype: fp32, lora: {targets: [q_proj, v_prj]}}"))
    lines = refused(muster, chain, arguments)
    assert lines[0].startswith("edited.yaml:2: model.lora.targets: ")
    assert lines[0].endswith(
        "model.lora.targets: `v_prj` matches no linear layer of the model; there are v_proj, q_proj, o_proj"
    )


def test_four_bit_weights_need_a_gpu(chain, muster):
    arguments = edited(chain, ("dtype: fp32}", "dtype: fp32, lora: {bits: 4}}"))
    lines = refused(muster, chain, arguments)
    assert len(lines) == 3
    assert all("model.lora.bits: 4-bit weights need a GPU, and there is none for the workers" in line for line in lines)


def test_compiling_needs_a_compiler(chain, muster, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    lines = refused(muster, chain, edited(chain, ("dtype: fp32}", "dtype: fp32, compile: true}")))
    assert (
        "model.compile: this machine has no compiler (/nowhere/g++); install gcc and Python's headers there" in lines[0]
    )


def test_layers_are_not_compiled_at_stage_3(chain, muster):
    arguments = edited(chain, ("dtype: fp32}", "dtype: fp32, compile: true}"), ("stage: 0", "stage: 3"))
    assert (
        "model.compile: at ZeRO stage 3 weights are gathered before every module"
        in refused(muster, chain, arguments)[0]
    )


def test_four_bit_weights_are_not_compiled(chain, muster):
    arguments = edited(chain, ("dtype: fp32}", "dtype: fp32, compile: true, lora: {bits: 4}}"))
    assert (
        "model.compile: 4-bit weights are not compiled; leave one of the two out"
        in refused(muster, chain, arguments)[0]
    )


def test_ligers_kernels_need_a_gpu_and_are_not_compiled(chain, muster):
    arguments = edited(chain, ("dtype: fp32}", "dtype: fp32, kernels: liger}"))
    assert (
        "model.kernels: Liger's kernels need a GPU, and there is none for the workers"
        in refused(muster, chain, arguments)[0]
    )
    arguments = edited(chain, ("dtype: fp32}", "dtype: fp32, kernels: liger, compile: true}"))
    assert "model.kernels: compiled layers fuse the same operations" in refused(muster, chain, arguments)[0]


# ── the phases of a run ──


def test_phases_hand_on_their_models_and_are_not_run_again(chain, muster):
    answer = muster("run", "chain.yaml", "--inline", "--only", "reward")
    assert (answer.status, answer.errors) == (
        2,
        ["--only: reward starts from sft, which is not finished; run sft first"],
    )
    assert not (chain / "runs").exists()
    answer = muster("run", "chain.yaml", "--inline", "--only", "sft")
    assert answer.status == 0, answer
    assert "sft is finished; `muster resume" in answer.out
    assert "runs the remaining phases: reward, more" in answer.out
    assert ended(chain) == ["sft"]
    told = json.loads(muster("status", "chain", "--json").out)
    assert (told["state"], told["remaining"]) == ("partial", ["reward", "more"])
    assert muster("list").out.split()[:2] == ["chain", "partial"]
    assert "  `muster resume runs/chain` runs the remaining phases: reward, more" in muster("status", "chain").out
    assert json.loads(muster("report", "chain", "--json").out)["runs"][0]["state"] == "partial"
    answer = muster("run", "chain.yaml", "--inline", "--only", "more")
    assert answer.status == 0, answer
    assert ended(chain) == ["sft", "more"]
    answer = muster("run", "chain.yaml", "--inline", "--only", "sft")
    assert answer.errors == ["--only: sft is finished; rewind it with `muster resume RUN --step N --phase sft`"]
    answer = muster("run", "chain.yaml", "--inline", "--only", "rewrad")
    assert answer.errors == ["--only: there is no phase rewrad; did you mean reward?; the phases are sft, reward, more"]
    answer = muster("resume", "chain", "--inline")
    assert answer.status == 0, answer
    assert "finished phases: sft, more; to run: reward" in answer.out
    assert ended(chain) == ["sft", "more", "reward"]
    config = json.loads((chain / "runs/chain/reward/model/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert json.loads(muster("status", "chain", "--json").out)["state"] == "done"


def test_adapters_go_from_phase_to_phase_and_can_be_merged(chain, muster):
    arguments = ("model.lora={rank: 2, alpha: 4}",)
    answer = muster("run", "chain.yaml", "--inline", *arguments)
    assert answer.status == 0, answer
    for phase in ("sft", "reward", "more"):
        config = json.loads((chain / f"runs/chain/{phase}/model/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(chain / "model")
    answer = muster("export", "chain", "--phase", "more", "--merge", "--out", "whole")
    assert answer.status == 0, answer
    adapter, whole = (
        json.loads(muster("generate", folder, "-p", "1 + 1 =", "--max-new-tokens", "8", "--json").out)
        for folder in ("runs/chain/more/model", "whole")
    )
    assert adapter == whole
    answer = muster("run", "job.yaml", "--inline")
    assert answer.status == 0, answer
    assert muster("export", "sums", "--merge").errors == [
        "--merge: sft trained all weights; there is no adapter to merge"
    ]


# ── muster eval ──


@pytest.fixture
def asked(chain) -> str:
    rows = [{"question": f"{n} + 1 =", "answer": f"so it is #### {n + 1}"} for n in range(6)]
    (chain / "data/questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "data/questions.jsonl"


def test_eval_reports_accuracy_and_writes_every_response(chain, muster, asked):
    how = ("--data", asked, "--max-new-tokens", "4", "--samples", "2", "--temperature", "1")
    answer = muster("eval", "model", *how, "--out", "out/rows.jsonl", "--json")
    assert answer.status == 0, answer
    report = json.loads(answer.out)
    rows = [json.loads(line) for line in (chain / "out/rows.jsonl").open()]
    assert len(rows) == 12
    assert {row["expected"] for row in rows} == {str(n + 1) for n in range(6)}
    assert report["accuracy"] == sum(row["correct"] for row in rows) / 12
    assert {"accuracy_low", "accuracy_high", "pass@2", "tokens_per_s"} <= report.keys()
    lines = muster("eval", "model", *how).out.splitlines()
    assert lines[0].startswith(f"{asked}:1: ")
    assert lines[-1].startswith("accuracy ")


def test_eval_compares_two_models_before_a_judge(chain, muster, asked):
    assert muster("run", "chain.yaml", "--inline").status == 0
    how = ("--data", asked, "--max-new-tokens", "4", "--reward", "runs/chain/reward/model")
    against_itself = json.loads(muster("eval", "model", "--against", "model", *how, "--json").out)
    assert against_itself["win_rate"] == 0.5
    # The same model, by its run and phase, and by its folder.
    one = json.loads(muster("eval", "model", "--against", "runs/chain/sft", *how, "--json").out)
    other = json.loads(muster("eval", "runs/chain/sft/model", "--against", "model", *how, "--json").out)
    assert one["against"] == other["model"]
    assert one["win_rate"] == pytest.approx(1 - other["win_rate"])


def test_eval_refuses_what_it_cannot_use(chain, muster, asked):
    def line(*arguments):
        (only,) = refused(muster, chain, arguments)
        return only

    assert line("eval", "model", "--data", "data/nope.jsonl").startswith("data/nope.jsonl: no such file or folder")
    assert "neither a run nor a model folder" in line("eval", "data", "--data", asked)
    assert (
        line("eval", "model", "--data", asked, "--reward", "model")
        == "command line: --against and --reward must be given together"
    )
    answer = muster("eval", "model", "--data", asked, "--template", "loud")
    assert (answer.status, "'loud' is not one of 'auto', 'plain', 'chat'" in answer.err) == (2, True)
    assert line("eval", "model", "--data", asked, "--samples", "4").startswith(
        "--temperature: several samples at temperature 0"
    )
    assert "is no reward model" in line("eval", "model", "--data", asked, "--against", "model", "--reward", "model")
    no_answer = refused(muster, chain, ("eval", "model", "--data", "data/pairs.jsonl"))
    assert no_answer[0].startswith("data/pairs.jsonl:1: no answer: looked for answer, ")
    assert no_answer[-1] == "data/pairs.jsonl: later rows were not looked at"
    assert "the tokenizer has no chat template; ask it plainly" in line(
        "eval", "model", "--data", asked, "--template", "chat"
    )


def test_questions_of_a_job_without_answers_are_told_before_anything_starts(chain, muster):
    lines = refused(
        muster,
        chain,
        ("run", "job.yaml", "--inline", "phases.sft.eval={data: data/pairs.jsonl, verdicts: data/pairs.jsonl}"),
    )
    assert lines[0].startswith("data/pairs.jsonl:1: no answer: ")
    (missing,) = refused(muster, chain, ("check", "job.yaml", "phases.sft.eval.data=data/nope.jsonl"))
    assert "phases.sft.eval.data: " in missing
    assert "no such file" in missing


def test_rows_of_another_recipe(chain, muster):
    lines = refused(muster, chain, ("check", "job.yaml", "phases.sft.data.train=data/pairs.jsonl"))
    assert lines[0].startswith(
        "data/pairs.jsonl:1: these are columns of `preference`, which is for reward; this recipe reads rows where"
    )
