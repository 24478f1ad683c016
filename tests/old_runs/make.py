"""Makes what test_old_runs.py reads: run it with the Muster of the commit that the archive is named after.

    git worktree add build/old COMMIT && cd build/old && make setup
    .venv/bin/python ../../tests/old_runs/make.py COMMIT ../../tests/old_runs

The paths of a run's inputs are part of its job's hash, so everything lies in a folder of a fixed name, where the test
unpacks it again. Needs the Muster of one commit only: nothing here imports the tests of another.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

COMMIT, OUT = sys.argv[1], Path(sys.argv[2]).resolve()
ROOT = Path(f"/tmp/muster-{COMMIT}")
PLAIN = """\
name: plain
seed: 7
model: {path: model, dtype: fp32}
resources: {workers: 1, gpus_per_worker: 0}
sharding: {stage: 0}
phases:
  pretrain:
    data: {train: data/text.jsonl, max_length: 48}
    max_steps: 2
    batch: 4
    learning_rate: 1.0e-2
    checkpoint: {every: 1}
  sft:
    data: {train: data/rows.jsonl, eval: data/heldout.jsonl, max_length: 48}
    max_steps: 3
    batch: 4
    learning_rate: 1.0e-2
    checkpoint: {every: 1}
  reward:
    data: {train: data/pairs.jsonl, max_length: 48}
    max_steps: 2
    batch: 4
    learning_rate: 1.0e-2
    checkpoint: {every: 1}
  ppo:
    from: sft
    reward: reward
    data: {train: data/prompts.jsonl, max_length: 24}
    rollout_batch: 4
    batch: 4
    response_tokens: 6
    max_steps: 2
    learning_rate: 1.0e-2
    checkpoint: {every: 1}
"""
CHATS = """\
name: chats
seed: 7
model: {path: model, dtype: fp32, lora: {rank: 2, alpha: 4}}
resources: {workers: 2, gpus_per_worker: 0}
sharding: {stage: 2}
phases:
  sft:
    data:
      train: [{path: data/chats.jsonl, weight: 2}, {path: data/alpaca.jsonl, weight: 1}]
      template: plain
      max_length: 64
    max_steps: 3
    batch: 4
    learning_rate: 1.0e-2
    checkpoint: {every: 1}
  cft:
    data: {train: data/critiques.jsonl, template: plain, max_length: 200}
    max_steps: 2
    batch: 4
    learning_rate: 1.0e-2
    checkpoint: {every: 1}
"""
BEGINS = """\
name: begins
seed: 7
model: {path: model-bos, dtype: fp32}
resources: {workers: 1, gpus_per_worker: 0}
sharding: {stage: 0}
phases:
  sft:
    data: {train: data/rows.jsonl, max_length: 48}
    max_steps: 2
    batch: 4
    learning_rate: 1.0e-2
    checkpoint: {every: 1}
"""


def main() -> None:
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir()
    (ROOT / "plain.yaml").write_text(PLAIN)
    (ROOT / "chats.yaml").write_text(CHATS)
    (ROOT / "begins.yaml").write_text(BEGINS)
    write_data(ROOT / "data")
    write_model(ROOT / "model")
    write_model(ROOT / "model-bos", bos=True)
    shutil.copytree("configs", ROOT / "configs")
    muster("run", "plain.yaml", "--inline")
    muster("run", "chats.yaml")
    muster("run", "begins.yaml", "--inline")
    note_hashes()
    make_clusters()
    keep_what_is_read()
    with tarfile.open(OUT / f"{COMMIT}.tar.xz", "w:xz") as archive:
        archive.add(ROOT, arcname=".", filter=anonymous)
    shutil.rmtree(ROOT)


def muster(*words: str) -> str:
    environment = {**os.environ, "MUSTER_CACHE": f"{ROOT}/cache", "MUSTER_HOME": f"{ROOT}/home", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.getcwd()
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli.main", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def write_data(folder: Path) -> None:
    folder.mkdir()
    numbers = range(16)
    question = [f"{n} + 1 =" for n in numbers]
    user, assistant = ({"role": role} for role in ("user", "assistant"))
    rows = {
        "text": [{"text": f"{n} and 1 is {n + 1}."} for n in numbers],
        "rows": [{"prompt": question[n], "completion": f" {n + 1}"} for n in numbers],
        "heldout": [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(20, 24)],
        "pairs": [{"prompt": question[n], "chosen": f" {n + 1}", "rejected": f" {n}"} for n in numbers],
        "prompts": [{"prompt": question[n], "answer": str(n + 1)} for n in numbers],
        "chats": [
            {"messages": [{**user, "content": question[n]}, {**assistant, "content": f"{n + 1}"}]} for n in numbers
        ],
        "alpaca": [{"instruction": "Add 1.", "input": str(n), "output": str(n + 1)} for n in numbers],
        "critiques": [
            {"question": question[n], "answer": str(n), "critique": f"No, {n + 1}. Conclusion: wrong [END]"}
            for n in numbers
        ],
    }
    for name, given in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))


def write_model(folder: Path, *, bos: bool = False) -> None:
    """A LLaMA of a thousand weights whose tokens are the printable characters.
    `bos`: its tokenizer puts <s> before every text."""
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    folder.mkdir()
    marks = [chr(code) for code in range(33, 127)]
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *marks, "Ġ", "Ċ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        special = [("<s>", vocabulary["<s>"])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=special
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    size, hidden, inner = len(vocabulary), 4, 8
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": size, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
        "head_dim": hidden,
        "max_position_embeddings": 256, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (hidden, hidden))
    shapes = {f"self_attn.{name}": shape for name, shape in square.items()}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    shapes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    names = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}
    names |= {"model.embed_tokens.weight": (size, hidden), "model.norm.weight": (hidden,)}
    draw = np.random.default_rng(0)
    weights = {
        name: draw.normal(1.0 if "norm" in name else 0.0, 0.3, shape).astype(np.float32)
        for name, shape in names.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def note_hashes() -> None:
    """By job file what its hash is: of the jobs here, of their resolved forms,
    and of every configuration that came with the commit."""
    from launcher.jobfile import job

    files = [*sorted(ROOT.glob("*.yaml")), *sorted(ROOT.glob("runs/*/job.yaml")), *sorted(ROOT.glob("configs/*.yaml"))]
    hashes = {str(file.relative_to(ROOT)): job.job_hash(job.read(file)) for file in files}
    (ROOT / "hashes.json").write_text(json.dumps(hashes, indent=1))


def make_clusters() -> None:
    """The record of a cluster on this machine, which is ended again,
    and those of clusters elsewhere before machines are asked for."""
    from cluster import registry as homes
    from launcher.submit import clusters

    (ROOT / "here.yaml").write_text("provider: local\nname: here\ncpus: 2\n")
    muster("cluster", "up", "here.yaml")
    kept = ROOT / "home/clusters/here"
    shutil.copytree(kept, ROOT / "kept")
    muster("cluster", "down", "here")
    shutil.move(ROOT / "kept", kept)
    os.environ["MUSTER_HOME"] = str(ROOT / "home")
    for file in sorted((ROOT / "configs/clusters").glob("*.yaml")):
        spec = clusters.load(file)
        if spec.made_by_muster and spec.provider != "local":
            homes.claim(
                spec.name,
                {
                    "spec": spec.model_dump(exclude_defaults=True),
                    "mark": f"muster-{spec.name}",
                    "started": "2026-11-22T23:17:00+00:00",
                },
            )
    for token in (ROOT / "home/clusters").glob("*/token"):
        token.write_text("0" * 64)


def keep_what_is_read() -> None:
    """Without logs, traces and TensorBoard's files; of every checkpoint, store and model everything."""
    for name in ("logs", "tensorboard", "profile"):
        for folder in [*ROOT.glob(f"runs/*/*/{name}")]:
            shutil.rmtree(folder)
    for folder in ROOT.glob("cache/*"):
        if not (folder / "meta.json").exists():
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    main()
