"""A whole run on conversations whose turns end with a token that is not the tokenizer's EOS,
held against transformers alone.

SFT, a reward model and PPO; then the commands that ask the results. Prompts have their content in parts.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.runfolder.run_folder import RunFolder, json_rows
from tests.training.data.test_serving_tokens import tokenizer_of
from training.data.templates import TEMPLATES

pytestmark = [pytest.mark.cpu, pytest.mark.xdist_group("chat_run")]
SCORE = 1e-5
"""Relative, fp32: batches of other shapes add up in another order."""
QUESTIONS = [f"{n} + 1?" for n in range(8)]
JOB = """\
name: chats
seed: 3
model: {path: model, dtype: fp32}
resources: {workers: 1, threads: 1, gpus_per_worker: 0}
sharding: {stage: 0}
phases:
  sft:
    data: {train: sft.jsonl, max_length: 64}
    max_steps: 40
    batch: 8
    learning_rate: 1.0e-2
    eval: {data: questions.jsonl, max_new_tokens: 24}
  reward: {data: {train: pairs.jsonl, max_length: 64}, max_steps: 4, batch: 4, learning_rate: 1.0e-2}
  ppo:
    from: sft
    reward: reward
    data: {train: prompts.jsonl, max_length: 48}
    rollout_batch: 4
    batch: 4
    response_tokens: 12
    max_steps: 2
"""


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job, its rows and its model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("chats")
    tokenizer = tokenizer_of("chatml on a base model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "model/chat_template.jinja").write_text(TEMPLATES["chatml"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.1,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    rows = {
        "sft": [{"messages": [user(each), assistant("It is 4")]} for each in QUESTIONS],
        "questions": [{"question": each, "answer": "4"} for each in QUESTIONS[:4]],
        "pairs": [{"prompt": [user(each)], "chosen": "It is 4", "rejected": "48"} for each in QUESTIONS],
        "prompts": [{"prompt": [user([{"type": "text", "text": each}])]} for each in QUESTIONS],
    }
    for name, of_file in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_file))
    (folder / "chats.yaml").write_text(JOB)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """The folder of the run."""
    from typer.testing import CliRunner

    from launcher.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = CliRunner().invoke(main.app, ["run", "chats.yaml", "--inline"])
    assert done.exit_code == 0, done.output
    return folder / "runs/chats"


@pytest.fixture
def here(run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def score_of(model: Path, ids: list[int]) -> float:
    """By transformers alone."""
    import torch
    from transformers import AutoModelForSequenceClassification

    lm = AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.no_grad():
        return lm(input_ids=torch.tensor([ids])).logits.item()


def written(model: Path, question: str, answer: str, *, ended: bool = True) -> list[int]:
    """The conversation in the tokens of a model's own template; cut off, without the end of the answer's turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.apply_chat_template([user(question), assistant(answer)], return_dict=False)
    end = len(ids) - 1 - ids[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    return ids if ended else ids[:end]


def test_ppo_judges_the_sequences_that_the_reward_model_has_learned(run):
    rows = [json.loads(line) for line in (run / "ppo/samples.jsonl").read_text().splitlines()]
    model = run / "reward/model"
    assert rows
    assert any(row["ended"] for row in rows)
    for row in rows:
        question = row["row"]["prompt"][0]["content"][0]["text"]
        expected = score_of(model, written(model, question, row["response"], ended=row["ended"]))
        assert row["reward"] == pytest.approx(expected, rel=SCORE, abs=1e-6)


def test_the_reward_model_has_learned_the_sequence_that_transformers_writes(here, run):
    from training.data.phase_data import open_stores
    from training.data.render import sides_of

    store = open_stores(RunFolder(run).job().phases["reward"], here / "cache").train
    chosen, rejected = sides_of(*store[0])
    model = run / "reward/model"
    assert chosen.tolist() == written(model, QUESTIONS[0], "It is 4")
    assert rejected.tolist() == written(model, QUESTIONS[0], "48")


def test_what_is_generated_ends_where_an_answer_ended_in_training(here, run, muster):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = run / "sft/model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    lm = AutoModelForCausalLM.from_pretrained(model).eval()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end != tokenizer.eos_token_id
    assert end in lm.generation_config.eos_token_id
    asked = torch.tensor(
        [tokenizer.apply_chat_template([user(QUESTIONS[0])], add_generation_prompt=True, return_dict=False)]
    )
    theirs = lm.generate(asked, max_new_tokens=24, do_sample=False)[0, asked.shape[1] :].tolist()
    assert theirs[-1] == end
    for name in ("runs/chats/sft", str(model)):
        answer = muster("generate", name, "-p", QUESTIONS[0], "--max-new-tokens", "24", "--json")
        assert answer.status == 0, answer.err
        (ours,) = json.loads(answer.out)
        assert (ours["ended"], ours["response"]) == (True, tokenizer.decode(theirs[:-1]))
    measured = json.loads(muster("eval", "chats", "--data", "questions.jsonl", "--max-new-tokens", "24", "--json").out)
    assert measured["eos_rate"] == measured["ended"] == 1.0
    evaluated = [row for row in RunFolder(run).metrics("sft") if "eval_accuracy" in row][-1]
    assert evaluated["eval_eos_rate"] == 1.0
    written = [row for row in json_rows(run / "sft/metrics.jsonl") if "eval_accuracy" in row][-1]
    assert (written["eval_eos_rate"], written["eval_ended"]) == (1.0, 1.0)


def test_a_reward_model_of_another_make_is_asked_alike_by_ppo_and_by_eval(here, run, folder):
    """It has a chat template and no muster.json; the prompts are texts."""
    from tests.support.training_fixtures import phase_of
    from training.config import RewardSource
    from training.evaluation.evaluator import RewardScorer
    from training.process.distributed import RankInfo
    from training.rl.experience import Response
    from training.rl.rewards import opened

    foreign = folder / "foreign"
    shutil.copytree(run / "reward/model", foreign)
    (foreign / "muster.json").unlink()
    none = np.array([1], np.int64)
    responses = [
        Response(
            place=0,
            number=0,
            sample=0,
            prompt=none,
            tokens=none,
            ended=ended,
            row={"prompt": QUESTIONS[0]},
            text="It is 4",
        )
        for ended in (True, False)
    ]
    phase = phase_of(folder, "ppo", reward=str(foreign), batch=4)
    by_ppo = opened(RewardSource(path=str(foreign)), phase, RankInfo(rank=0, size=1))(responses)
    by_eval = RewardScorer(str(foreign)).rewards([QUESTIONS[0]] * 2, ["It is 4"] * 2, [True, False])
    alone = [score_of(foreign, written(foreign, QUESTIONS[0], "It is 4", ended=ended)) for ended in (True, False)]
    assert by_ppo == pytest.approx(alone, rel=SCORE, abs=1e-6)
    assert by_eval == pytest.approx(alone, rel=SCORE, abs=1e-6)
