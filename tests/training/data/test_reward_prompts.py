"""Reward models of PPO are held against its prompts before anything runs."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.support.training_fixtures import phase_of
from tests.training.data.test_serving_tokens import tokenizer_of
from training.data import reward_prompts
from training.data.phase_data import open_stores
from training.errors import InputError

pytestmark = pytest.mark.cpu
USER = {"role": "user", "content": "2 + 2?"}
REFUSES_SYSTEM = (
    "{% for m in messages %}{{ raise_exception('no system role here') if m.role == 'system' }}{{ m.role + m.content + "
    "eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)


@pytest.fixture
def checked(tiny, tmp_path):
    """checked(chat template of the reward model, prompts, settings) -> what is to be said."""

    def check(template, *prompts, own_tokens=True, **settings):
        folder = tmp_path / "reward"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny / "model", folder)
        if not own_tokens:
            tokenizer_of("gpt-2").save_pretrained(folder)
        if template:
            (folder / "chat_template.jinja").write_text(template)
        rows = tmp_path / "prompts.jsonl"
        rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        phase = phase_of(tiny, "ppo", reward=str(folder), batch=4, data={"train": str(rows)}, **settings)
        return reward_prompts.check(phase, open_stores(phase, tmp_path / "cache").train, tmp_path / "cache")

    return check


def test_prompts_that_the_reward_models_template_refuses_are_errors(checked):
    system = {"role": "system", "content": "Be brief."}
    assert checked(REFUSES_SYSTEM, [USER]) == []
    for _ in range(2):  # found out, and remembered
        with pytest.raises(
            InputError, match=r"prompts.jsonl:2: the reward model .* cannot be given this prompt: .*no system role here"
        ):
            checked(REFUSES_SYSTEM, [USER], [system, USER])


def test_a_reward_model_without_a_template_that_is_given_conversations_is_mentioned(checked):
    (note,) = checked(None, [USER])
    assert note.endswith("the tokenizer has no chat template; conversations are written with the template `plain`")
    assert checked(None, "2 + 2?") == []


def test_prompts_that_are_too_long_for_a_reward_model_are_errors_or_mentioned(checked):
    long = [{"role": "user", "content": "\t" * 200}]
    template = "{{ 'x' * 40 }}" + REFUSES_SYSTEM
    with pytest.raises(
        InputError, match=r"response_tokens: the reward model .* was made for 256 positions; .* come to about 2\d\d"
    ):
        checked(template, long, response_tokens=16)


def test_a_critic_that_would_start_from_a_reward_model_of_another_tokenizer_is_refused(checked, tiny):
    with pytest.raises(
        InputError, match=r"critic: the critic starts from the reward model .*, whose tokenizer is not the policy's"
    ):
        checked(None, "2 + 2?", own_tokens=False)
    assert checked(None, "2 + 2?", own_tokens=False, critic=str(tiny / "model")) == []


def test_a_phase_of_the_job_is_not_taken_for_a_folder_of_its_name(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward").mkdir()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "2 + 2?"}\n')
    phase = phase_of(tiny, "ppo", reward="reward", batch=4, data={"train": str(tmp_path / "prompts.jsonl")})
    assert reward_prompts.check(phase, open_stores(phase, tmp_path / "cache").train, tmp_path / "cache") == []
