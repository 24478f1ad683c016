"""What a new user gets wrong: each mistake has one clear message, exit status 2, no stack trace,
and nothing is left behind."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from launcher.jobfile import job as jobs

RUN = ("run", "job.yaml", "--inline")
TRAIN = "phases.sft.data.train="


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(muster, place: Path, arguments: tuple[str, ...]) -> list[str]:
    """The lines of the message; the command must have changed nothing in the folder."""
    before = contents(place)
    answer = muster(*arguments)
    assert answer.status == 2, answer
    assert contents(place) == before
    assert answer.out == ""
    return answer.errors


SETTINGS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "missing job file": (("run", "nope.yaml"), ["nope.yaml: no such file"]),
    "a folder as job file": (("check", "data"), ["data: is a folder; give a YAML file"]),
    "no workers": (
        (*RUN, "resources.workers=0"),
        ["command line: resources.workers: got 0, expected a whole number > 0"],
    ),
    "batch not possible with the workers": (
        ("run", "job.yaml", "resources.workers=8"),
        [
            (
                "job.yaml:9: phases.sft.batch: a batch of 4 samples cannot be dealt to 8 workers; choose batch >= 8 or "
                "fewer workers"
            )
        ],
    ),
    "inline with several workers": (
        (*RUN, "resources.workers=2"),
        [
            (
                "job.yaml: phases.sft.resources.workers: --inline has one worker, but the job requests 2; set "
                "resources.workers=1"
            )
        ],
    ),
    "missing data file": (
        (*RUN, f"{TRAIN}data/trian.jsonl"),
        [
            (
                "command line: phases.sft.data.train: PLACE/data/trian.jsonl: no such file or folder; did you mean "
                "data/train.jsonl?"
            )
        ],
    ),
    "all overrides that are wrong, at once": (
        (*RUN, "phases.sft.learning_rate", "phases.sft.batch=", "phases.sft.learing_rate=1", "phases.sft.epochs=many"),
        [
            "command line: phases.sft.learning_rate: expected key=value, such as phases.sft.learning_rate=1e-5",
            "command line: phases.sft.batch: has no value; write null for none or '\"\"' for empty text",
            'command line: phases.sft.epochs: got "many" (text), expected a number > 0 or null',
            "command line: phases.sft.learing_rate: unknown key; did you mean learning_rate?",
        ],
    ),
    "micro-batch too small for the longest sample": (
        (*RUN, "phases.sft.micro_tokens=10"),
        [
            "command line: phases.sft.micro_tokens: micro_tokens 10 is smaller than data.max_length 32: the longest "
            "sample would not fit; choose micro_tokens >= 32"
        ],
    ),
    "a name that leads out of the storage": (
        (*RUN, "name=../evil"),
        [
            'command line: name: "../evil" cannot name a folder; use letters, digits and . _ - alone, beginning with a '
            "letter or "
            "digit, at most 100"
        ],
    ),
    "an unknown tracker": (
        (*RUN, "track=wandbb"),
        [
            'command line: track: got "wandbb", expected tensorboard, wandb, mlflow or a list (each tensorboard, wandb '
            "or mlflow); "
            "did you mean wandb?"
        ],
    ),
    "no model folder": (
        (*RUN, "model.path=./nope"),
        ["command line: model.path: PLACE/nope: no such folder"],
    ),
    "no tokenizer folder": (
        (*RUN, "model.tokenizer=data"),
        ["command line: model.tokenizer: no tokenizer files (tokenizer.json or tokenizer.model) in PLACE/data"],
    ),
    "resume of nothing": (
        ("resume", "nope"),
        ["nope: no such run: neither a run folder nor a name in runs/ (there: none)"],
    ),
    "resume of a folder that is no run": (
        ("resume", "data"),
        ["data: no such run: neither a run folder nor a name in runs/ (there: none)"],
    ),
    "status of nothing": (
        ("status", "nope"),
        ["nope: no such run: neither a run folder nor a name in runs/ (there: none)"],
    ),
    "list of no folder": (("list", "--storage", "nope"), ["nope: no such folder"]),
    "list of a file": (("list", "--storage", "job.yaml"), ["job.yaml: is a file; give a folder of runs"]),
    "generate without a prompt": (
        ("generate", "model"),
        [
            (
                "command line: no prompt: the standard input is empty; write lines to it, or use --prompt TEXT or "
                "--file FILE"
            )
        ],
    ),
    "generate with an empty prompt": (
        ("generate", "model", "-p", ""),
        ["command line: --prompt: a prompt is empty; give it some text"],
    ),
    "generate from a file that is not there": (("generate", "model", "--file", "q.jsonl"), ["q.jsonl: no such file"]),
    "generate from a folder without prompts": (
        ("generate", "model", "--file", "runs-of-mine"),
        ["runs-of-mine: no such file"],
    ),
    "generate with a folder that is no model": (
        ("generate", "data", "-p", "x"),
        ["data: neither a run nor a model folder (no job.yaml, no config.json, no adapter_config.json)"],
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_wrong_arguments(muster, place, case):
    arguments, expected = SETTINGS[case]
    assert refused(muster, place, arguments) == [line.replace("PLACE", str(place)) for line in expected]


FILES: dict[str, tuple[str, list[str]]] = {
    "broken YAML": (
        "name: [a,\nphases: }\n",
        ["job.yaml:2: not valid YAML: expected the node content, but found '}', while parsing a flow node"],
    ),
    "a key given twice": (
        "name: a\nseed: 1\nname: b\n",
        ["job.yaml:3: name: this key is given twice, first in line 1; keep one"],
    ),
    "unknown keys at any depth, all at once": (
        "nmae: a\nmodel: {path: model, dtyp: fp32}\nphases:\n  sft:\n    data: {train: data/train.jsonl, tempalte: "
        "none}\n    schedule:\n      warmpu: 3\n",
        [
            "job.yaml:1: nmae: unknown key; did you mean name?",
            "job.yaml:2: model.dtyp: unknown key; did you mean dtype?",
            "job.yaml:5: phases.sft.data.tempalte: unknown key; did you mean template?",
            "job.yaml:7: phases.sft.schedule.warmpu: unknown key; did you mean warmup?",
        ],
    ),
    "an empty file": ("", ["job.yaml: the file is empty"]),
    "a storage that is no folder": (
        "storage: no-such://bucket/runs\nmodel: {path: model}\nphases: {sft: {data: {train: data/train.jsonl, "
        "template: none}}}\n",
        [
            (
                "job.yaml:1: storage: no-such://bucket/runs: no-such:// cannot be used (Protocol not known: no-such); "
                "use a folder, s3:// or gs://"
            )
        ],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_wrong_job_files(muster, place, case):
    text, expected = FILES[case]
    (place / "job.yaml").write_text(text)
    assert refused(muster, place, RUN) == expected


def test_a_thousand_workers_do_not_fit_this_machine(muster, place, monkeypatch):
    from launcher.plan import local_capacity

    monkeypatch.setattr(local_capacity, "num_gpus", lambda: 0)
    (line,) = refused(muster, place, ("run", "job.yaml", "resources.workers=100000", "phases.sft.batch=100000"))
    assert line.startswith("job.yaml: phases.sft.resources.workers: needs at least 43,9")
    assert "this machine has" in line
    assert "use fewer workers" in line


def test_a_tracker_that_is_not_installed_is_told_before_anything_else(muster, place, monkeypatch):
    from launcher.driver import trackers

    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert refused(muster, place, ("check", "job.yaml", "track=mlflow")) == [
        "job.yaml: track: mlflow is not installed: pip install 'muster-train[mlflow]'"
    ]


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "without weights": (
        lambda place: (place / "model" / "model.safetensors").unlink(),
        "PLACE/model: has no weights: no model.safetensors; the folder holds config.json, tokenizer.json, "
        "tokenizer_config.json",
    ),
    "with truncated weights": (
        lambda place: _truncate(place / "model" / "model.safetensors", 20000),
        "PLACE/model/model.safetensors: header promises SIZE bytes, the file has 20,000: copy it again",
    ),
    "of another architecture": (
        lambda place: edit_config(place, architectures=["BertForMaskedLM"], model_type="bert"),
        "PLACE/model/config.json: BertForMaskedLM is not a causal language model; expected an architecture such as "
        "LlamaForCausalLM",
    ),
    "with the configuration of another model": (
        lambda place: edit_config(place, num_hidden_layers=3),
        "PLACE/model: its weights lack 1 of 3 layers: 2; copy them again or correct config.json",
    ),
    "with pickled weights": (
        lambda place: (place / "model" / "model.safetensors").rename(place / "model" / "pytorch_model.bin"),
        "PLACE/model: has its weights in pytorch_model.bin, a pickle, which can run code when it is loaded; convert "
        "it where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes "
        "safetensors",
    ),
    "without a tokenizer": (
        lambda place: (place / "model" / "tokenizer.json").unlink(),
        "PLACE/model: has no tokenizer (tokenizer.json or tokenizer.model); copy it here or set model.tokenizer",
    ),
}


def _truncate(file: Path, size: int) -> None:
    with file.open("rb+") as stream:
        stream.truncate(size)


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("verb", ["run", "generate"])
def test_wrong_models(muster, place, case, verb):
    spoil, expected = MODELS[case]
    size = (place / "model" / "model.safetensors").stat().st_size
    spoil(place)
    folder = place if verb == "run" else Path()
    line = expected.replace("PLACE/", "" if verb == "generate" else f"{folder}/").replace("SIZE", f"{size:,}")
    arguments, where = (RUN, "job.yaml:2: model.path: ") if verb == "run" else (("generate", "model", "-p", "x"), "")
    assert refused(muster, place, arguments) == [f"{where}{line}"]


ROWS = [
    ('{"prompt": "1+1="', "broken JSON"),
    ('{"prompt": "1+1="}', "missing column `completion`; the row has prompt"),
    ('{"prompt": "1+1=", "completion": 2}', "column `completion`: expected text, got a number (2)"),
    ('{"prompt": "1+1=", "completion": ""}', "column `completion` is empty"),
    ('{"prompt": null, "completion": "2"}', "column `prompt` is null"),
    ('["1+1=", "2"]', "expected an object of columns, got a list"),
    (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}',
        "assistant turn is empty",
    ),
    ('{"q": "1+1="}', "no format fits the columns q"),
]


@pytest.mark.parametrize("arguments", [RUN, ("check", "job.yaml")], ids=["run", "check"])
def test_bad_rows_are_told_all_at_once_with_their_lines(muster, place, arguments):
    good = '{"prompt": "1+1=", "completion": "2"}'
    (place / "data" / "bad.jsonl").write_text("\n".join([good, *(row for row, _ in ROWS)]) + "\n")
    lines = refused(muster, place, (*arguments, f"{TRAIN}data/bad.jsonl", "phases.sft.data.eval=null"))
    assert len(lines) == len(ROWS)
    for number, (line, (_, message)) in enumerate(zip(lines, ROWS, strict=True), start=2):
        assert line.startswith(f"data/bad.jsonl:{number}: {message}")


def test_of_many_bad_rows_twenty_are_shown_and_the_others_counted(muster, place):
    (place / "data" / "bad.jsonl").write_text('{"prompt": "a"}\n' * 300)
    lines = refused(muster, place, ("check", "job.yaml", f"{TRAIN}data/bad.jsonl"))
    assert len(lines) == 21
    assert lines[-1] == "and 280 more bad rows (of 300 rows)"


def test_data_without_rows(muster, place):
    (place / "data" / "empty.jsonl").write_text("")
    (place / "data" / "blank.jsonl").write_text("\n\n")
    (line,) = refused(muster, place, (*RUN, f"{TRAIN}data/empty.jsonl"))
    assert line.endswith("data/empty.jsonl: the file is empty (0 bytes)")
    assert refused(muster, place, (*RUN, f"{TRAIN}data/blank.jsonl")) == ["data/blank.jsonl: holds no rows"]


def test_overlong_samples_are_dropped_or_cut_counted_and_told(muster, place):
    row = {"prompt": "x" * 20, "completion": "y" * 30}
    with (place / "data" / "train.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    dropped = muster("check", "job.yaml")
    assert (dropped.status, dropped.err) == (0, "")
    assert "train: 40 samples of 41 rows" in dropped.out
    assert "1 of 41 samples are longer than 32 tokens and were dropped" in dropped.out
    cut = muster("check", "job.yaml", "phases.sft.data.overlong=truncate")
    assert "train: 41 samples of 41 rows" in cut.out
    assert "1 of 41 samples are longer than 32 tokens and were cut" in cut.out


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_when_all_samples_are_too_long_nothing_starts(muster, place, overlong):
    lines = refused(muster, place, (*RUN, "phases.sft.data.max_length=2", f"phases.sft.data.overlong={overlong}"))
    assert "no sample is left: 40 of 40 samples" in lines[0]
    assert "set data.max_length to " in lines[0]


def test_a_tokenizer_without_chat_template_or_pad_token_is_good_enough(muster, place):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (place / "data" / "train.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    arguments = ("phases.sft.data.template=auto", "phases.sft.data.eval=null", "phases.sft.data.max_length=64")
    answer = muster("check", "job.yaml", *arguments)
    assert answer.status == 0, answer
    assert "the tokenizer has no chat template; conversations are written with the template `plain`" in answer.out


def test_a_tokenizer_without_an_eos_token_is_refused(muster, place):
    file = place / "model" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["eos_token"]
    file.write_text(json.dumps(settings))
    (line,) = refused(muster, place, RUN)
    assert line == (
        f"{place}/model: the tokenizer has no EOS token, so nothing would teach the model to stop; "
        "set eos_token in tokenizer_config.json"
    )


def test_prompts_of_a_file_that_cannot_be_used(muster, place):
    bad = ['{"promt": "x"}', "not json", '{"prompt": 5}', '{"prompt": ""}', '["x"]']
    (place / "q.jsonl").write_text("\n".join(['{"prompt": "1+1="}', *bad]) + "\n")
    message = "expected a row with a text `prompt` that is not empty, or a list of messages"
    assert refused(muster, place, ("generate", "model", "--file", "q.jsonl")) == [
        f"q.jsonl:2: {message}",
        "q.jsonl:3: broken JSON: Expecting value (column 1); a row is one object on one line",
        f"q.jsonl:4: {message}",
        f"q.jsonl:5: {message}",
        "q.jsonl:6: expected an object of columns, got a list",
    ]
    binary = "model/model.safetensors"
    assert refused(muster, place, ("generate", "model", "--file", binary))[0].startswith(f"{binary}:1: not UTF-8")


def test_a_run_folder_that_holds_something_else_stays_as_it_is(muster, place):
    (place / "runs" / "sums").mkdir(parents=True)
    (place / "runs" / "sums" / "notes.txt").write_text("mine")
    assert refused(muster, place, RUN) == [
        f"{place}/runs/sums: not a run folder, and not empty (it holds notes.txt); choose a different name or storage"
    ]


def test_quantized_weights_are_not_trained(muster, place):
    edit_config(place, quantization_config={"quant_method": "gptq", "bits": 4})
    (line,) = refused(muster, place, ("check", "job.yaml"))
    assert line.startswith(f"job.yaml:2: model.path: {place}/model: the weights are quantized (gptq")
    assert "train from the same model without quantization" in line
    edit_config(place, quantization_config={"quant_method": "mxfp4"})
    (line,) = refused(muster, place, ("check", "job.yaml"))
    assert "quantization_config=Mxfp4Config(dequantize=True)" in line
    edit_config(place, quantization_config={"quant_method": "bitsandbytes"})
    read = jobs.load(place / "job.yaml", ["model.lora={rank: 4, bits: 4}"])
    assert read.phases["sft"].model.lora.bits == 4, "they are in the very form that is asked for"


@pytest.mark.parametrize(
    ("missing", "changes", "message"),
    [
        (["lm_head.weight"], {}, "lm_head.weight is not in the weights; copy the model again or correct config.json"),
        (
            ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"],
            {},
            "model.layers.1.mlp.up_proj.weight, model.norm.weight are not in the weights",
        ),
        (
            [],
            {"intermediate_size": 40},
            "model.layers.0.mlp.gate_proj.weight, model.layers.0.mlp.up_proj.weight, "
            "model.layers.0.mlp.down_proj.weight and 3 more are of another shape than config.json says",
        ),
    ],
)
def test_weights_of_which_a_part_is_missing(muster, place, missing, changes, message):
    file = place / "model" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if name not in missing}
    save_file(kept, file, metadata={"format": "pt"})
    edit_config(place, **changes)
    (line,) = refused(muster, place, ("check", "job.yaml"))
    assert line.startswith(f"job.yaml:2: model.path: {place}/model: {message}")


def test_a_storage_that_is_a_file(muster, place):
    for arguments in (RUN, ("check", "job.yaml")):
        for storage in ("job.yaml", "job.yaml/runs"):
            (line,) = refused(muster, place, (*arguments, f"storage={storage}"))
            assert line == f"command line: storage: {place}/job.yaml is a file; name a folder"


def test_a_storage_on_a_disk_that_cannot_be_written(muster, place):
    """/sys takes no folders, from root neither; a chmod would not stop root."""
    (line,) = refused(muster, place, (*RUN, "storage=/sys/kernel"))
    assert line.startswith("/sys/kernel/sums: cannot use the run folder: ")
    assert "choose a different `storage`" in line


@pytest.mark.parametrize(
    "arguments",
    [("check", "nope.yaml"), ("run", "job.yaml", "phases.sft.btach=3"), ("status", "nope"), ("chekc", "job.yaml")],
    ids=" ".join,
)
def test_the_real_command_says_it_on_stderr_and_exits_with_2(place, arguments):
    done = subprocess.run([sys.executable, "-m", "launcher", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "runs").exists()


@pytest.mark.cpu
@pytest.mark.faults
def test_a_full_disk_ends_the_run_keeps_earlier_checkpoints_and_the_run_goes_on_when_there_is_room(muster, place):
    """After the first checkpoint the process may write no file of more than 60 KB: to it the disk is full."""
    long = ("phases.sft.max_steps=60", "phases.sft.checkpoint.every=1", "track=[]")
    command = [sys.executable, "-m", "launcher"]
    process = subprocess.Popen([*command, *RUN, *long], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and not list(place.glob("runs/sums/sft/checkpoints/step-*")):
        time.sleep(0.01)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60 << 10, resource.RLIM_INFINITY))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1, out
    assert "File too large" in out
    assert "resume with `muster resume " in out
    assert "Traceback" not in out
    assert muster("checkpoints", "sums").status == 0, "one is damaged"
    assert not list(place.glob("runs/sums/sft/checkpoints/.*"))
    kept = max(entry["step"] for entry in json.loads(muster("checkpoints", "sums", "--json").out))
    again = subprocess.run([*command, "resume", "sums", "--inline"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again
    assert f"sft: resuming after step {kept}\n" in again.stdout
    rows = [json.loads(line) for line in (place / "runs/sums/sft/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 61))
