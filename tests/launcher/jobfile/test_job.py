"""Job files, good and bad: what they become, and the exact lines that a person reads about what is wrong."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.jobfile import job
from launcher.jobfile.raw_deepspeed import OWNED
from training.errors import InputError

HEAD = "model: {path: org/model}\nphases:\n  sft:\n    data: {train: a.jsonl}\n"
"""A whole job in four lines; what a test appends belongs to the phase when it is indented by four."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"prompt": "1+1", "completion": "2"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text, *overrides):
    Path("job.yaml").write_text(text)
    return job.load(Path("job.yaml"), overrides)


def errors(text, *overrides):
    with pytest.raises(InputError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


# Good jobs


def test_defaults_are_filled_in(folder):
    loaded = load(HEAD)
    sft = loaded.phases["sft"]
    assert (loaded.name, loaded.seed, loaded.storage) == ("job", 0, str(folder / "runs"))
    assert loaded.track == ["tensorboard"]
    assert (sft.recipe, sft.from_, sft.epochs, sft.resources.workers) == ("sft", None, 1.0, 1)
    assert sft.data.train == str(folder / "a.jsonl")


def test_a_phase_wins_key_by_key_over_the_top_of_the_job(folder):
    loaded = load(
        "seed: 3\nmodel: {path: org/model, dtype: bf16, attention: sdpa}\nresources: {workers: 2, threads: 1}\n"
        "sharding: {stage: 3}\ndeepspeed: {aio: {thread_count: 1, queue_depth: 2}}\n"
        "phases:\n  sft:\n    data: {train: a.jsonl}\n    model: {dtype: fp32}\n    resources: {workers: 4}\n"
        "    deepspeed: {aio: {queue_depth: 3}}\n    seed: 5\n"
        "  more: {recipe: sft, data: {train: a.jsonl}}\n"
    )
    sft, more = loaded.phases.values()
    assert (sft.model.dtype, sft.model.attention, sft.seed) == ("fp32", "sdpa", 5)
    assert (sft.resources.workers, sft.resources.threads, sft.sharding.stage) == (4, 1, 3)
    assert sft.deepspeed == {"aio": {"thread_count": 1, "queue_depth": 3}}
    assert (more.model.dtype, more.seed, more.resources.workers) == ("bf16", 3, 2)
    assert more.deepspeed == {"aio": {"thread_count": 1, "queue_depth": 2}}


def test_a_phase_starts_from_the_one_before_and_has_the_model_path_of_the_first(folder):
    loaded = load(
        "phases:\n"
        "  sft: {model: {path: org/model}, data: {train: a.jsonl}}\n"
        "  two: {recipe: sft, data: {train: a.jsonl}}\n"
        "  three: {recipe: sft, from: sft, data: {train: a.jsonl}}\n"
    )
    assert [phase.from_ for phase in loaded.phases.values()] == [None, "sft", "sft"]
    assert {phase.model.path for phase in loaded.phases.values()} == {"org/model"}


def test_relative_paths_start_at_the_job_file_and_on_the_command_line_at_the_current_folder(tmp_path, monkeypatch):
    project, here = tmp_path / "project", tmp_path / "here"
    for place in (project / "data", here):
        place.mkdir(parents=True)
        (place / "a.jsonl").write_text("{}\n")
    (project / "chat.jinja").write_text("{{ messages }}")
    (project / "job.yaml").write_text(
        "storage: out\nmodel: {path: org/model, tokenizer: org/tok}\nphases:\n  sft:\n    data:\n"
        "      train: [data/*.jsonl, data, {path: data/a.jsonl}, owner/set]\n      template: chat.jinja\n"
    )
    monkeypatch.chdir(here)
    loaded = job.load(Path("../project/job.yaml"), ["phases.sft.data.eval=a.jsonl"])
    data: Any = loaded.phases["sft"].data
    assert loaded.storage == str(project / "out")
    assert data.train[:2] == [str(project / "data/*.jsonl"), str(project / "data")]
    assert (data.train[2].path, data.train[3]) == (str(project / "data/a.jsonl"), "owner/set")
    assert (data.template, data.eval) == (str(project / "chat.jinja"), str(here / "a.jsonl"))


@pytest.mark.parametrize("template", ["auto", "none", "tokenizer", "chatml", "qwen3"])
def test_every_name_of_a_template_is_known_to_the_job_file(tmp_path, template):
    (tmp_path / "a.jsonl").write_text("{}\n")
    file = tmp_path / "job.yaml"
    file.write_text(
        f"model: {{path: org/model}}\nphases: {{sft: {{data: {{train: a.jsonl, template: {template}}}}}}}\n"
    )
    data: Any = job.load(file, []).phases["sft"].data
    assert data.template == template


def test_two_dots_behind_a_link_are_followed_as_the_system_does(tmp_path, monkeypatch):
    (tmp_path / "far/models").mkdir(parents=True)
    (tmp_path / "near").mkdir()
    (tmp_path / "near/link").symlink_to(tmp_path / "far/models")
    for name, content in (("a.jsonl", "{}"), ("t.jinja", ""), ("ds.json", '{"aio": {}}'), ("r.py", "")):
        (tmp_path / "far" / name).write_text(content)
    (tmp_path / "near/job.yaml").write_text(
        "model: {path: link/../m, tokenizer: ./link/../m}\nstorage: link/../runs\ndeepspeed: link/../ds.json\nphases:\n"
        "  sft: {data: {train: [link/../a.jsonl], eval: link/../*.jsonl, template: link/../t.jinja}}\n"
        "  ppo: {data: {train: link/../a.jsonl}, reward: 'link/../r.py:score'}\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded = job.read(Path("near/job.yaml"), ["phases.sft.eval={data: near/link/../a.jsonl}"])
    far = str(tmp_path / "far")
    sft, ppo = loaded.phases["sft"], loaded.phases["ppo"]
    assert (loaded.storage, sft.model.path, sft.model.tokenizer) == (f"{far}/runs", f"{far}/m", f"{far}/m")
    assert (sft.data.train, sft.data.eval, sft.data.template) == (
        [f"{far}/a.jsonl"],
        f"{far}/*.jsonl",
        f"{far}/t.jinja",
    )
    assert sft.eval is not None
    assert (sft.deepspeed, sft.eval.data) == ({"aio": {}}, f"{far}/a.jsonl")
    assert [source.path for source in ppo.rewards] == [f"{far}/r.py:score"]


def test_one_tracker_may_be_given_without_a_list(folder):
    assert load("track: wandb\n" + HEAD).track == ["wandb"]


def test_deepspeed_settings_may_lie_in_a_json_file(folder):
    Path("ds.json").write_text('{"zero_optimization": {"reduce_bucket_size": 1000}}')
    sft = load("deepspeed: ds.json\n" + HEAD + "    deepspeed: {zero_optimization: {overlap_comm: true}}\n").phases[
        "sft"
    ]
    assert sft.deepspeed == {"zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": True}}


def test_overrides_are_yaml_and_win(folder):
    loaded = load(
        HEAD,
        "phases.sft.learning_rate=1e-5",
        "phases.sft.clip=null",
        "phases.sft.optimizer.betas=[0.8, 0.9]",
        "resources={workers: 2}",
        "name=first",
        "name=second",
    )
    sft = loaded.phases["sft"]
    assert (sft.learning_rate, sft.clip, sft.optimizer.betas) == (1e-5, None, [0.8, 0.9])
    assert (sft.resources.workers, loaded.name) == (2, "second")


def test_a_number_that_is_repeated_in_another_way_makes_no_other_job(folder):
    text = HEAD + "    schedule: {warmup: 3}\n    clip: 1.0\n"
    again = load(text, "phases.sft.schedule.warmup=3.0", "phases.sft.clip=1")
    assert job.job_hash(again) == job.job_hash(load(text))


def test_an_override_picks_a_list_entry_by_its_number(folder):
    text = "model: {path: org/model}\nphases: {sft: {data: {train: [{path: x.jsonl, weight: 1}]}}}\n"
    train: Any = load(text, "phases.sft.data.train.0.path=a.jsonl").phases["sft"].data.train
    assert (train[0].path, train[0].weight) == (str(folder / "a.jsonl"), 1.0)


# Bad jobs: (text, lines about it)

BAD = {
    "unknown keys at every depth": (
        "sead: 1\nmodel: {path: org/m, dtyp: bf16}\nresources: {worker: 2}\nphases:\n  sft:\n    data:\n"
        "      train: [{path: a.jsonl, wait: 1}]\n      pak: true\n    learing_rate: 1e-5\n    schedule: {warm: 1}\n"
        "    workers: 4\n",
        [
            "job.yaml:1: sead: unknown key; did you mean seed?",
            "job.yaml:2: model.dtyp: unknown key; did you mean dtype?",
            "job.yaml:3: resources.worker: unknown key; did you mean workers?",
            "job.yaml:7: phases.sft.data.train.0.wait: unknown key; did you mean weight?",
            "job.yaml:8: phases.sft.data.pak: unknown key; did you mean pack?",
            "job.yaml:9: phases.sft.learing_rate: unknown key; did you mean learning_rate?",
            "job.yaml:10: phases.sft.schedule.warm: unknown key; did you mean warmup?",
            "job.yaml:11: phases.sft.workers: unknown key; did you mean resources.workers?",
        ],
    ),
    "wrong types": (
        HEAD + "    batch: eight\n    epochs: '2'\n    learning_rate: 1e-5x\n    clip: .inf\n    log_every: 2.5\n"
        "    eval_every: true\n    schedule: 5\n    optimizer: {betas: [0.9]}\n    checkpoint:\n",
        [
            'job.yaml:5: phases.sft.batch: got "eight" (text), expected a whole number > 0',
            'job.yaml:6: phases.sft.epochs: got "2" (text), expected a number > 0 or null',
            'job.yaml:7: phases.sft.learning_rate: got "1e-5x" (text), expected a number > 0',
            "job.yaml:8: phases.sft.clip: got infinity, expected a finite value: a number > 0 or null",
            "job.yaml:9: phases.sft.log_every: got 2.5, expected a whole number > 0",
            "job.yaml:10: phases.sft.eval_every: got true, expected a whole number > 0 or null",
            "job.yaml:11: phases.sft.schedule: got 5, expected a mapping of settings",
            (
                "job.yaml:12: phases.sft.optimizer.betas: got a list of 1, expected a list of 2 (each a number >= 0 "
                "and < 1)"
            ),
            "job.yaml:13: phases.sft.checkpoint: got nothing (null), expected a mapping of settings",
        ],
    ),
    "values out of range": (
        HEAD + "    batch: 0\n    resources: {workers: 0, threads: -1}\n    schedule: {warmup: -1, floor: 2}\n",
        [
            "job.yaml:5: phases.sft.batch: got 0, expected a whole number > 0",
            "job.yaml:6: phases.sft.resources.workers: got 0, expected a whole number > 0",
            "job.yaml:6: phases.sft.resources.threads: got -1, expected auto or a whole number > 0",
            "job.yaml:7: phases.sft.schedule.warmup: got -1, expected a number >= 0",
            "job.yaml:7: phases.sft.schedule.floor: got 2, expected a number >= 0 and <= 1",
        ],
    ),
    "choices": (
        HEAD + "    sharding: {stage: 4}\n    schedule: {name: cosin}\n    micro_tokens: fast\n",
        [
            "job.yaml:5: phases.sft.sharding.stage: got 4, expected 0, 1, 2 or 3",
            (
                'job.yaml:6: phases.sft.schedule.name: got "cosin", expected cosine, linear or constant; did you mean '
                "cosine?"
            ),
            'job.yaml:7: phases.sft.micro_tokens: got "fast", expected auto or a whole number > 0',
        ],
    ),
    "when to save": (
        HEAD + "    checkpoint: {every: 10min}\n",
        [
            (
                'job.yaml:5: phases.sft.checkpoint.every: got "10min", expected steps such as 200, or a time such as '
                "90s, 10m or 2h"
            )
        ],
    ),
    "a union is one problem": (
        "model: {path: org/m}\nphases:\n  sft:\n    data:\n      train: 5\n      eval: [5, {pth: x}]\n",
        [
            "job.yaml:5: phases.sft.data.train: got 5, expected text or a list "
            "(each text or a mapping such as {path: data/train.jsonl})",
            "job.yaml:6: phases.sft.data.eval.0: got 5, expected text or a mapping such as {path: data/train.jsonl}",
            "job.yaml:6: phases.sft.data.eval.1.path: this key is required; for example `path: data/train.jsonl`",
            "job.yaml:6: phases.sft.data.eval.1.pth: unknown key; did you mean path?",
        ],
    ),
    "missing keys": (
        "phases:\n  sft:\n    batch: 4\n  two:\n    recipe: sft\n    data:\n      pack: false\n",
        [
            "job.yaml:2: phases.sft.model: this key is required; for example `model: {path: meta-llama/Llama-2-7b-hf}`",
            "job.yaml:2: phases.sft.data: this key is required; for example `data: {train: data/train.jsonl}`",
            "job.yaml:6: phases.two.data.train: this key is required; for example `train: data/train.jsonl`",
        ],
    ),
    "a model without a path": (
        "model: {dtype: bf16}\nphases: {sft: {data: {train: a.jsonl}}}\n",
        ["job.yaml:1: model.path: this key is required; for example `path: meta-llama/Llama-2-7b-hf`"],
    ),
    "an inherited problem is told once": (
        "model: {path: 5, dtype: bf17}\nphases:\n"
        + "".join(f"  p{index}: {{recipe: sft, data: {{train: a.jsonl}}}}\n" for index in range(10)),
        [
            "job.yaml:1: model.path: got 5, expected text",
            'job.yaml:1: model.dtype: got "bf17", expected auto, bf16 or fp32; did you mean bf16?',
        ],
    ),
    "sections of the wrong shape": (
        "model: 5\nresources:\ndeepspeed: 5\ntrack: tensorbord\nseed: -1\nphases: []\n",
        [
            "job.yaml:1: model: got 5, expected a mapping",
            "job.yaml:2: resources: got nothing (null), expected a mapping",
            "job.yaml:3: deepspeed: got 5, expected text or a mapping",
            'job.yaml:4: track: got "tensorbord", expected tensorboard, wandb, mlflow or a list '
            "(each tensorboard, wandb or mlflow); did you mean tensorboard?",
            f"job.yaml:5: seed: got -1, expected a whole number >= 0 and < {2**63}",
            "job.yaml:6: phases: got an empty list, expected a mapping with at least 1 entry",
        ],
    ),
    "no phases": (
        "name: x\n",
        ["job.yaml: phases: this key is required; for example `phases: {sft: {data: {train: data/train.jsonl}}}`"],
    ),
    "top-level sections are checked without phases": (
        "model: {dtype: bf17}\nphases: {}\n",
        [
            'job.yaml:1: model.dtype: got "bf17", expected auto, bf16 or fp32; did you mean bf16?',
            "job.yaml:2: phases: got an empty mapping, expected a mapping with at least 1 entry",
        ],
    ),
    "a phase's setting at the top": (
        HEAD + "learning_rate: 1\n",
        ["job.yaml:5: learning_rate: this key belongs in a phase: phases.NAME.learning_rate"],
    ),
    "names": (
        "name: a/b\nmodel: {path: org/m}\nphases:\n  a.b: {recipe: sft, data: {train: a.jsonl}}\n",
        [
            'job.yaml:1: name: "a/b" cannot name a folder; use letters, digits and . _ - alone, beginning with a '
            "letter "
            "or digit, at most 100",
            (
                "job.yaml:4: phases.a.b: a phase's name has letters, digits, _ and - alone and begins with a letter or "
                "digit"
            ),
        ],
    ),
    "recipes": (
        "model: {path: org/m}\nphases:\n  stf: {data: {train: a.jsonl}, beta: 1}\n  x:\n    recipe: distil\n"
        "    data: {train: 5.5}\n  y:\n",
        [
            'job.yaml:3: phases.stf.recipe: there is no recipe "stf"; did you mean sft?',
            'job.yaml:5: phases.x.recipe: there is no recipe "distil"; recipes: pretrain, sft, cft, reward, ppo',
            "job.yaml:6: phases.x.data.train: got 5.5, expected text or a list "
            "(each text or a mapping such as {path: data/train.jsonl})",
            "job.yaml:7: phases.y: got nothing (null), expected a mapping",
        ],
    ),
    "a phase that starts from one of an unknown recipe": (
        "model: {path: org/m}\nphases:\n  stf: {data: {train: a.jsonl}}\n  sft: {data: {train: a.jsonl}}\n"
        "  ppo: {data: {train: a.jsonl}, reward: stf, async: 2}\n",
        [
            'job.yaml:3: phases.stf.recipe: there is no recipe "stf"; did you mean sft?',
            "job.yaml:5: phases.ppo.async: got 2, expected 0 or 1",
        ],
    ),
    "where a phase starts": (
        "model: {path: org/m}\nphases:\n  one: {recipe: sft, from: two, data: {train: a.jsonl}}\n"
        "  two: {recipe: sft, from: three, data: {train: a.jsonl}}\n"
        "  three: {recipe: sft, from: onee, data: {train: a.jsonl}, model: {path: org/other}}\n",
        [
            'job.yaml:3: phases.one.from: "two" is no phase before this one; name a folder or a finished run, or '
            "remove "
            "`from` and set model.path",
            'job.yaml:4: phases.two.from: "three" comes later; phases before this one: one',
            'job.yaml:5: phases.three.from: "onee" is no phase of this job; did you mean one?',
            "job.yaml:5: phases.three.model.path: this phase starts from the weights of `two`; remove model.path here",
        ],
    ),
    "impossible combinations": (
        HEAD + "    epochs: 1\n    max_steps: 5\n    batch: 2\n    resources: {workers: 4}\n    checkpoint:\n      "
        "best: {}\n",
        [
            "job.yaml:6: phases.sft.max_steps: epochs and max_steps exclude each other; keep one",
            "job.yaml:7: phases.sft.batch: a batch of 2 samples cannot be dealt to 4 workers; choose batch >= 4 or "
            "fewer workers",
            "job.yaml:10: phases.sft.checkpoint.best: checkpoint.best needs data.eval or eval to measure on",
        ],
    ),
    "model paths": (
        "phases:\n  sft: {model: {path: 'a b'}, data: {train: a.jsonl}}\n",
        [
            (
                'job.yaml:2: phases.sft.model.path: "a b" is neither a folder nor a name on the Hugging Face hub '
                "(owner/name)"
            )
        ],
    ),
    "raw DeepSpeed settings that Muster owns": (
        "deepspeed:\n  train_batch_size: 8\n  zero_optimization:\n    stage: 1\n    reduce_bucket_size: auto\n"
        + HEAD
        + "    deepspeed: {fp16: {enabled: auto}}\n",
        [
            "job.yaml:2: deepspeed.train_batch_size: Muster sets this itself; remove it and use batch",
            "job.yaml:4: deepspeed.zero_optimization.stage: Muster sets this itself; remove it and use sharding.stage",
            'job.yaml:5: deepspeed.zero_optimization.reduce_bucket_size: "auto" is filled in by the Hugging Face '
            "Trainer "
            "alone; remove the key or give a value",
            "job.yaml:10: phases.sft.deepspeed.fp16: Muster sets this itself; remove it and use model.dtype",
        ],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_all_that_is_wrong_is_told_with_its_line(folder, case):
    text, expected = BAD[case]
    assert errors(text) == expected


def test_wrong_overrides_are_told_after_the_file_s_own_problems(folder):
    got = errors(
        HEAD + "    batch: 0\n",
        "phases.sft.learing_rate=1",
        "phases.sft.epochs=",
        "phases.sft",
        "phases..x=1",
        "phases.sft.data.train.0=x",
        "phases.sft.clip=[1",
        "resources.workers=0",
        "seed=null",
    )
    assert got == [
        "job.yaml:5: phases.sft.batch: got 0, expected a whole number > 0",
        "command line: phases.sft.epochs: has no value; write null for none or '\"\"' for empty text",
        "command line: phases.sft: expected key=value, such as phases.sft.learning_rate=1e-5",
        "command line: phases..x=1: expected key=value, such as phases.sft.learning_rate=1e-5",
        'command line: phases.sft.data.train.0: phases.sft.data.train is "a.jsonl" and has no keys inside',
        "command line: phases.sft.clip: not valid YAML: a `,` or the closing `]` is missing (expected ',' or ']', but "
        "got '<stream end>', while parsing a flow sequence)",
        f"command line: seed: got nothing (null), expected a whole number >= 0 and < {2**63}",
        "command line: resources.workers: got 0, expected a whole number > 0",
        "command line: phases.sft.learing_rate: unknown key; did you mean learning_rate?",
    ]


def test_an_override_beyond_the_end_of_a_list_is_told(folder):
    text = "model: {path: org/m}\nphases: {sft: {data: {train: [a.jsonl]}}}\n"
    assert errors(text, "phases.sft.data.train.1=b.jsonl", "phases.sft.data.train.x=b") == [
        "command line: phases.sft.data.train.1: phases.sft.data.train is a list; its entries are 0 to 0",
        "command line: phases.sft.data.train.x: phases.sft.data.train is a list; its entries are 0 to 0",
    ]


def test_a_name_that_comes_from_the_file_must_be_safe_too(folder):
    Path("my job.yaml").write_text(HEAD)
    with pytest.raises(InputError, match=r'my job.yaml: name: "my job" \(the file\'s own name\) cannot name a folder'):
        job.load(Path("my job.yaml"))


def test_a_missing_job_file_is_told():
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such file"):
        job.load(Path("nowhere.yaml"))


def test_missing_files_of_all_phases_are_told_at_once(folder):
    Path("empty.jsonl").touch()
    got = errors(
        "model: {path: ./models/x, tokenizer: ./tok}\nphases:\n  sft:\n    data:\n      train: b.jsonl\n      eval:\n  "
        "      - a.jsonl\n        - empty.jsonl\n      template: missing.jinja\n  two: {recipe: sft, data: {train: "
        "no/*.jsonl}}\n"
    )
    assert got == [
        f"job.yaml:1: model.path: {folder}/models/x: no such folder",
        f"job.yaml:1: model.tokenizer: no tokenizer files (tokenizer.json or tokenizer.model) in {folder}/tok",
        f"job.yaml:5: phases.sft.data.train: {folder}/b.jsonl: no such file or folder; did you mean a.jsonl?",
        f"job.yaml:8: phases.sft.data.eval.1: {folder}/empty.jsonl: the file is empty (0 bytes)",
        f"job.yaml:9: phases.sft.data.template: no such file: {folder}/missing.jinja",
        f"job.yaml:10: phases.two.data.train: {folder}/no/*.jsonl: the glob holds no data file; known are "
        ".jsonl, .ndjson, .json, .csv, .tsv, .jsonl.gz, .ndjson.gz, .json.gz, .csv.gz, .tsv.gz, .parquet, .arrow, "
        ".feather",
    ]
    assert job.read(Path("job.yaml")).phases["two"].from_ == "sft"


@pytest.mark.parametrize("path", ["models/a/b", "../x", "/nowhere/x"])
def test_a_model_path_that_can_only_be_a_folder_is_a_missing_folder(folder, path):
    absolute = os.path.abspath(folder / path)
    assert errors(HEAD.replace("org/model", path)) == [f"job.yaml:1: model.path: {absolute}: no such folder"]


def test_an_existing_folder_is_taken_before_the_hub_and_looked_into(folder):
    (folder / "org/model").mkdir(parents=True)
    assert errors(HEAD)[0] == f"job.yaml:1: model.path: {folder}/org/model: has no config.json; the folder is empty"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{folder}/ds.json cannot be read: no such file or directory"),
        ("{", "{folder}/ds.json:1: not valid JSON: Expecting property name enclosed in double quotes"),
        ("[1]", "{folder}/ds.json: expected a JSON object of DeepSpeed settings, got a list of 1"),
        (
            '{"optimizer": {}}',
            "ds.json: optimizer: Muster sets this itself; remove it and use optimizer or learning_rate",
        ),
    ],
)
def test_a_bad_deepspeed_file_is_told(folder, content, message):
    if content is not None:
        Path("ds.json").write_text(content)
    assert errors("deepspeed: ds.json\n" + HEAD) == ["job.yaml:1: deepspeed: " + message.format(folder=folder)]


def test_settings_that_deepspeed_does_not_have_are_told_the_name_to_use(folder):
    text = (
        "deepspeed:\n  zero_stage: 2\n  zero_optimization:\n    reduce_bucket: 1000\n  warmup_steps: 5\n  nonsense: 1\n"
        + HEAD
    )
    found = errors(text)
    assert (
        "job.yaml:2: deepspeed.zero_stage: DeepSpeed has no such setting; the name here is sharding.stage" in found[0]
    )
    assert found[1] == (
        "job.yaml:4: deepspeed.zero_optimization.reduce_bucket: DeepSpeed has no such setting; did you mean "
        "reduce_bucket_size?"
    )
    assert "the name here is phases.NAME.schedule.warmup" in found[2]
    assert found[3:] == ["job.yaml:6: deepspeed.nonsense: DeepSpeed has no such setting"]


def test_a_run_that_began_with_settings_that_deepspeed_does_not_have_goes_on(folder):
    text = job.dump(load("deepspeed: {dump_state: true}\n" + HEAD))
    (folder / "run.yaml").write_text(text.replace("dump_state", "nonsense"))
    assert job.read(folder / "run.yaml").phases["sft"].deepspeed == {"nonsense": True}


def test_whole_numbers_of_warm_up_steps_are_one_job_however_they_are_written(folder):
    three, spelled = (load(f"{HEAD}    schedule: {{warmup: {steps}}}\n") for steps in ("3", "3.0"))
    assert job.differences(three, spelled) == []
    assert job.job_hash(three) == job.job_hash(spelled)
    assert job.job_hash(spelled, as_written=True) != job.job_hash(spelled), "checkpoints of older versions have it"
    assert job.job_hash(three, as_written=True) == job.job_hash(three)
    assert job.job_hash(load(f"{HEAD}    schedule: {{warmup: 0.3}}\n")) != job.job_hash(three)


def test_what_to_use_instead_of_owned_deepspeed_settings_exists(folder):
    settings = job.dump(load(HEAD))
    for instead in {name for names in OWNED.values() for name in names}:
        assert f"{instead.split('.')[-1]}:" in settings


# Round trip and comparison


def test_a_dumped_job_reads_back_equal_from_anywhere(folder, tmp_path_factory):
    loaded = load(
        "seed: 2\ntrack: [wandb, mlflow]\nstorage: /b/runs\ndeepspeed: {aio: {y: [1, 1e-9]}}\nmodel: {path: org/m}\n"
        "phases:\n  sft:\n    max_steps: 7\n    clip: null\n    learning_rate: 3e-7\n"
        "    data: {train: [{path: a.jsonl, weight: 0.1}], columns: {prompt: '1e5', completion: 'no'}}\n"
        "  two: {recipe: sft, data: {train: owner/set, eval: a.jsonl}}\n"
    )
    copy = tmp_path_factory.mktemp("run") / "resolved.yaml"
    copy.write_text(job.dump(loaded))
    again = job.load(copy)
    assert again == loaded
    assert job.differences(loaded, again) == []
    assert job.job_hash(loaded) == job.job_hash(again)


@pytest.mark.parametrize(
    "override",
    [
        "resources.workers=2",
        "sharding.stage=3",
        "phases.sft.micro_tokens=4096",
        "phases.sft.micro_batch=1",
        "phases.sft.log_every=5",
        "phases.sft.checkpoint={every: 10m, keep_weights: 2}",
        "checkpoint_quota=1TB",
        "phases.sft.data.pack=false",
        "model.gradient_checkpointing=true",
        "model.compile=true",
        "model.kernels=torch",
        "storage=elsewhere",
        "track=[]",
    ],
)
def test_what_does_not_change_the_curve_is_the_same_job(folder, override):
    old, new = load(HEAD), load(HEAD, override)
    assert old != new
    assert job.differences(old, new) == []
    assert job.job_hash(old) == job.job_hash(new)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("phases.sft.learning_rate=1e-5", "phases.sft.learning_rate: 2e-05 -> 1e-05"),
        ("phases.sft.clip=null", "phases.sft.clip: 1.0 -> null"),
        ("model.path=org/other", "phases.sft.model.path: org/model -> org/other"),
        ("phases.sft.deepspeed={dump_state: true}", "phases.sft.deepspeed.dump_state: not set -> true"),
        ("phases.two={recipe: sft, data: {train: a.jsonl}}", 'phases: ["sft"] -> ["sft", "two"]'),
    ],
)
def test_what_changes_the_curve_is_another_job(folder, override, line):
    old, new = load(HEAD), load(HEAD, override)
    assert job.differences(old, new) == [line]
    assert job.job_hash(old) != job.job_hash(new)


def test_loading_jobs_stays_light():
    code = (
        "import sys, launcher.jobfile.job\n"
        "print([name for name in ('torch', 'ray', 'deepspeed', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_setting_that_came_later_does_not_make_an_older_job_another(
    monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    before = job.job_hash(job.load(place / "job.yaml"))
    monkeypatch.setitem(job.ADDED, "phases.*.data.shuffle", False)
    assert job.job_hash(job.load(place / "job.yaml")) == before
    assert job.job_hash(job.load(place / "job.yaml", ["phases.sft.data.shuffle=false"])) != before
    sources = ["phases.sft.data.train=[{path: data/train.jsonl}]"]
    in_a_list = job.job_hash(job.load(place / "job.yaml", sources))
    monkeypatch.setitem(job.ADDED, "phases.*.data.train.*.split", "train")
    assert job.job_hash(job.load(place / "job.yaml", sources)) != in_a_list
