"""What all tests share: an environment of their own, a folder to work in, the command in this process, one Ray."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import grouping

_HOME = tempfile.mkdtemp(prefix="muster-tests-")
os.environ.update(  # before Ray or a Hugging Face library is imported
    HOME=_HOME,
    HF_HUB_OFFLINE="1",
    MUSTER_CACHE=f"{_HOME}/muster-cache",
    OMP_NUM_THREADS="1",
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(32),
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
)
for _variable in ("RAY_ADDRESS", "HF_HOME", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
    os.environ.pop(_variable, None)

pytest_plugins = [
    "tests.support.training_fixtures",
    "tests.support.s3_server",
    "tests.support.disturbed",
    "tests.support.skips",
]

MARKED_FOLDERS = {"multihost": "cluster", "gpu": "gpu"}
"""The mark of the tests in a folder."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for folder, mark in MARKED_FOLDERS.items():
            if Path(__file__).parent / folder in item.path.parents:
                item.add_marker(mark)
    if config.getoption("loadgroup", False):  # of a process beside others
        grouping.arrange(items)


def pytest_unconfigure() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)


@dataclass(frozen=True)
class Answer:
    """What a command came to."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return self.err.splitlines()


@pytest.fixture
def muster() -> Callable[..., Answer]:
    """muster("check", "job.yaml") runs the verb in this process."""
    from typer.testing import CliRunner

    from launcher.cli import main

    def run(*arguments: str) -> Answer:
        result = CliRunner().invoke(main.app, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Answer(result.exit_code, result.stdout, result.stderr)

    return run


JOB = """\
name: sums
model: {path: model, dtype: fp32}
resources: {workers: 1, threads: 1, gpus_per_worker: 0}
sharding: {stage: 0}
phases:
  sft:
    data: {train: data/train.jsonl, eval: data/heldout.jsonl, template: none, max_length: 32}
    max_steps: 4
    batch: 4
    learning_rate: 1.0e-3
    checkpoint: {every: 2}
"""


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with job.yaml, data/ and model/ (a LLaMA of a few thousand weights), made without loading torch."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "job.yaml").write_text(JOB)
    (folder / "data").mkdir()
    for name, first, count in (("train", 0, 40), ("heldout", 40, 8)):
        rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(first, first + count)]
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _write_model(folder / "model")
    return folder


@pytest.fixture
def place(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template, which is the current folder."""
    folder = tmp_path / "place"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    return folder


def _write_model(folder: Path, vocabulary: int = 260, hidden: int = 16, layers: int = 2) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": hidden // 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "eos_token_id": 0,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    square, wide = (hidden, hidden), (2 * hidden, hidden)
    shapes = {
        "self_attn.q_proj": square,
        "self_attn.k_proj": square,
        "self_attn.v_proj": square,
        "self_attn.o_proj": square,
        "mlp.gate_proj": wide,
        "mlp.up_proj": wide,
        "mlp.down_proj": wide[::-1],
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    names = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in shapes.items()}
    names |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, hidden))
    names |= {"model.norm.weight": (hidden,)}
    random = np.random.default_rng(0)
    weights = {
        name: random.normal(1.0 if "norm" in name else 0.0, 0.1, shape).astype(np.float32)
        for name, shape in names.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    """One token a byte, and an EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of the tests' own, with four places for workers."""
    from launcher.workers.ray_session import own_fork_server, ray_session

    with own_fork_server(), ray_session(4):
        yield
