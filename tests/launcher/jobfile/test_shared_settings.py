"""Overrides at the top of a job: which phases they reach, in a user's file and in the job.yaml of a run,
and which have no effect."""

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.jobfile import job as jobs
from launcher.jobfile import yaml_with_lines
from training.errors import InputError

TWO = """
seed: 3
model: {path: org/model, lora: {rank: 4}}
resources: {workers: 4, hang_after: 60}
phases:
  sft:
    data: {train: rows.jsonl}
    resources: {workers: 2}
    deepspeed: {zero_optimization: {overlap_comm: true}}
  more:
    recipe: sft
    data: {train: rows.jsonl}
"""
PPO = """
model: {path: org/model}
phases:
  ppo:
    data: {train: rows.jsonl}
    reward: "rewards:score"
    groups:
      - {roles: [policy, reference], workers: 3, sharding: {stage: 3}}
      - {roles: [critic, reward], workers: 2}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1", "completion": "2"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str) -> jobs.Job:
    Path("job.yaml").write_text(text)
    return jobs.load(Path("job.yaml"), overrides)


def resolved(text: str, *overrides: str) -> str:
    """The job.yaml that a run of the job would have."""
    return jobs.dump(load(text, *overrides))


def errors(text: str, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


def without_record(text: str) -> str:
    """A resolved job as versions before `resolved` wrote it."""
    data = yaml_with_lines.parse(text, "").data
    del data["resolved"]
    return yaml_with_lines.dump(data)


OVERRIDES = (
    "resources.workers=1", "resources={workers: 1}", "resources.threads=2", "sharding.stage=0", "seed=5",
    "model.lora=null", "model.lora.rank=8", "model={path: org/other}",
    "deepspeed.zero_optimization.round_robin_gradients=true", "deepspeed={zero_optimization: {overlap_comm: false}}",
    "phases.more.seed=9", "phases.sft.resources.workers=1",
)  # fmt: skip


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_override_means_the_same_in_a_run_s_own_job_file(folder, override):
    first = load(TWO, override)
    again = load(resolved(TWO), override)
    assert again == replace(first, name="job")
    assert jobs.differences(first, again) == []


def test_a_setting_added_at_the_top_of_a_run_s_job_file_reaches_the_phases_that_do_not_set_it(folder):
    text = resolved(TWO).replace("phases:\n", "sharding:\n  stage: 1\nresources:\n  workers: 3\nphases:\n", 1)
    loaded = load(text)
    assert [phase.sharding.stage for phase in loaded.phases.values()] == [1, 1]
    assert [phase.resources.workers for phase in loaded.phases.values()] == [2, 3]


def test_the_weights_that_a_run_starts_from_can_be_overridden_in_its_job_file(folder):
    (folder / "other").mkdir()
    Path("other/config.json").write_text("{}")
    for override in ("phases.sft.from=./other", "model.path=./other", "phases.sft.model.path=./other"):
        Path("job.yaml").write_text(resolved(TWO))
        phases = jobs.read(Path("job.yaml"), [override]).phases
        assert {phase.model.path for phase in phases.values()} == {str(folder / "other")}


def test_what_the_command_line_gave_a_phase_is_not_taken_for_the_file_s(folder):
    text = resolved(TWO, "phases.more.resources.workers=3")
    assert load(text, "resources.workers=1").phases["more"].resources.workers == 1


def test_in_a_job_file_of_an_older_version_an_override_reaches_every_phase(folder):
    old = without_record(resolved(TWO))
    assert [phase.resources.workers for phase in load(old).phases.values()] == [2, 4]
    loaded = load(old, "resources.workers=1", "sharding.stage=0", "seed=8")
    assert [(p.resources.workers, p.sharding.stage, p.seed) for p in loaded.phases.values()] == [(1, 0, 8), (1, 0, 8)]


def test_the_record_changes_neither_the_hash_nor_the_job(folder):
    first = load(TWO)
    again, old = load(jobs.dump(first)), load(without_record(jobs.dump(first)))
    assert jobs.job_hash(first) == jobs.job_hash(again) == jobs.job_hash(old)
    assert jobs.differences(first, old) == []


def test_a_record_of_a_phase_that_was_renamed_is_refused(folder):
    text = resolved(TWO)
    lines = text.replace("  more:\n    recipe: sft", "  other:\n    recipe: sft")
    got = errors(lines)
    assert len(got) == 1
    assert got[0].endswith("resolved.more: there is no phase more; rename it here too, or remove it")


def test_a_phase_that_keeps_its_own_value_is_named_once(folder, capsys):
    loaded = load(TWO, "resources.workers=1")
    assert [phase.resources.workers for phase in loaded.phases.values()] == [2, 1]
    assert capsys.readouterr().err == (
        "resources.workers=1 does not reach the phase sft, which has a value of its own; use "
        "phases.sft.resources.workers=1\n"
    )


@pytest.mark.parametrize("text", [TWO, "resolved"])
def test_an_override_that_repeats_a_value_is_neither_told_nor_refused(folder, capsys, text):
    text = resolved(TWO) if text == "resolved" else text
    load(text, "resources.workers=2", "seed=3", "deepspeed.zero_optimization.overlap_comm=true", "model.path=org/model")
    assert capsys.readouterr().err == ""


ONE = """
model: {path: org/model, lora: null}
phases:
  sft:
    data: {train: rows.jsonl}
    seed: 2
    model: {lora: null, tokenizer: org/tokens}
    resources: {workers: 2}
    deepspeed: ds.json
"""


@pytest.mark.parametrize(
    ("override", "path", "use"),
    [
        ("resources.workers=1", "resources.workers", "phases.sft.resources.workers=1"),
        ("resources={workers: 1}", "resources.workers", "phases.sft.resources.workers=1"),
        ("seed=7", "seed", "phases.sft.seed=7"),
        ("model.lora.rank=8", "model.lora.rank", "phases.sft.model.lora.rank=8"),
        ("model.tokenizer=org/others", "model.tokenizer", "phases.sft.model.tokenizer=org/others"),
        (
            "deepspeed.zero_optimization.overlap_comm=false",
            "deepspeed.zero_optimization.overlap_comm",
            "phases.sft.deepspeed={zero_optimization: {overlap_comm: false}}",
        ),
        ("model={path: org/model, lora: {rank: 8}}", "model.lora.rank", "phases.sft.model.lora.rank=8"),
    ],
)
def test_an_override_that_no_phase_takes_over_is_refused_with_the_path_to_use(folder, override, path, use):
    Path("ds.json").write_text('{"zero_optimization": {"overlap_comm": true}}')
    assert errors(ONE, override) == [
        f"command line: {path}: has no effect: every phase has a value of its own; use {use}"
    ]


def test_the_weights_of_a_phase_that_starts_elsewhere_are_overridden_by_its_from(folder):
    (folder / "other").mkdir()
    text = "model: {path: org/m}\nphases: {sft: {from: ./other, data: {train: rows.jsonl}}}\n"
    Path("other/config.json").write_text("{}")
    told = "command line: model.path: has no effect: every phase has a value of its own; use phases.sft.from=org/new"
    assert told in errors(text, "model.path=org/new")


def test_groups_of_workers_are_named(folder, capsys):
    both = "phases.ppo.groups.0.workers=4 and phases.ppo.groups.1.workers=4"
    told = f"has no effect: every phase has a value of its own; use {both}"
    assert errors(PPO, "resources.workers=4") == [f"command line: resources.workers: {told}"]
    own_workers = PPO.replace("    groups:", "    resources: {workers: 1}\n    groups:")
    assert errors(own_workers, "resources.workers=4") == [f"command line: resources.workers: {told}"]
    told = f"has no effect: every group has a value of its own; use {both}"
    assert errors(PPO, "phases.ppo.resources.workers=4") == [f"command line: phases.ppo.resources.workers: {told}"]
    assert capsys.readouterr().err == ""
    assert load(PPO, "sharding.stage=0", "resources.hang_after=9").phases["ppo"].placements[1][1].sharding.stage == 0
    told = (
        "sharding.stage=0 does not reach the phase ppo, which has a value of its own; use "
        "phases.ppo.groups.0.sharding.stage=0\n"
    )
    assert capsys.readouterr().err == told


def test_an_override_is_not_lost_to_one_after_it(folder):
    told = "resources=... after it replaces the whole section; give it after that, or inside it"
    assert errors(TWO, "resources.threads=1", "resources={workers: 1}") == [
        f"command line: resources.threads: has no effect: {told}"
    ]
    assert load(TWO, "resources.threads=1", "resources={threads: 2}").phases["more"].resources.threads == 2
    loaded = load(TWO, "resources={workers: 1}", "resources.threads=1")
    assert (loaded.phases["more"].resources.workers, loaded.phases["more"].resources.threads) == (1, 1)


@pytest.mark.parametrize("override", ["phases.stf.epochs=2", "phases.SFT.epochs=2", "phases.stf=2"])
def test_an_override_makes_no_phase_by_a_slip(folder, override):
    name = override.split(".")[1].partition("=")[0]
    told = f"there is no phase {name}; did you mean sft? (`phases.{name}={{...}}` adds one)"
    assert errors(TWO, override) == [f"command line: {override.partition('=')[0]}: {told}"]


@pytest.mark.parametrize(
    ("override", "other", "told"),
    [
        (
            "phases.ppo.schedule={name: constant, floor: 0.5}",
            "phases.ppo.schedule.name=linear",
            "the schedule constant does not decay",
        ),
        ("phases.ppo.kl.horizon=5", "phases.ppo.kl.target=6", "beta follows no target"),
        ("phases.ppo.eval={data: rows.jsonl, top_p: 0.5}", "phases.ppo.eval.temperature=1", "at eval.temperature 0"),
    ],
)
def test_an_override_that_other_settings_leave_unused_is_refused(folder, override, other, told):
    text = PPO.replace("groups:\n", "").split("      - ")[0]
    (problem,) = errors(text, override)
    assert f"has no effect: {told}" in problem
    load(text, override, other)


def test_what_is_inside_of_a_section_that_is_absent_makes_it(folder):
    text = "model: {path: org/m, lora: null}\nphases: {sft: {data: {train: rows.jsonl}}}\n"
    for override in ("model.lora.rank=8", "phases.sft.model.lora.rank=8"):
        lora = load(text, override).phases["sft"].model.lora
        assert lora is not None
        assert lora.rank == 8
