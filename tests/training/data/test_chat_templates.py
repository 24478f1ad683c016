"""The marked templates of model families: what they render, and what is learned of it."""

import itertools

import pytest

from tests.training.data.documented_templates import DEEPSEEK_R1, DOCUMENTED, MISTRAL, PHI3, QWEN3, QWQ
from tests.training.data.test_render import byte_level, every, inference, learnt, text
from training.data.conversations import GENERATION
from training.data.formats import Chat, Parser
from training.data.render import Renderer, Sample
from training.data.templates import TEMPLATES, without_marks

SYSTEM = {"role": "system", "content": " Be brief."}
TWO_ANSWERS = [
    {"role": "user", "content": " What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4 "},
    {"role": "user", "content": "And 48 clips?"},
    {"role": "assistant", "content": "In May"},
]
WITH_TOOLS = ("llama3.1", "qwen2.5", "qwen3", "mistral", "deepseek")
CALLS = {
    "messages": [
        SYSTEM,
        {"role": "user", "content": "2 + 2?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}},
            ],
        },
        {"role": "tool", "content": "four", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "It is 4"},
        {"role": "user", "content": "Thanks!"},
        {"role": "assistant", "content": "You are welcome"},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": "It.",
                "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
            },
        }
        for name in ("add", "weather")
    ],
}


def conversations(name: str) -> list[Chat]:
    with_system = Chat([SYSTEM, *TWO_ANSWERS], (2, 4))
    plain = [Chat(TWO_ANSWERS, (1, 3)), Chat(TWO_ANSWERS[:2], (1,)), Chat(TWO_ANSWERS[:3], (1,)), with_system]
    if name not in WITH_TOOLS:
        return plain
    _, chat = Parser("messages", {}, ("messages",))(CALLS)
    assert isinstance(chat, Chat)
    return [*plain, chat]


def rendered_by(template: str, chat: Chat, prompt: bool) -> str:
    """In the form of tool calls that the template takes."""
    renderer = Renderer(byte_level(chat_template=template))
    return renderer._write(chat, template, len(chat.messages), prompt)


@pytest.mark.parametrize("name", DOCUMENTED)
@pytest.mark.parametrize("prompt", [False, True])
def test_a_template_renders_what_the_family_documents(name, prompt):
    for chat in conversations(name):
        for count in range(1, len(chat.messages) + 1):
            part = Chat(chat.messages[:count], (), chat.tools)
            if (name == "mistral" and part.messages[-1]["role"] == "system") or (chat.tools and count < 2):
                continue  # neither has a question to put the tools or the system message into
            assert rendered_by(TEMPLATES[name], part, prompt) == rendered_by(DOCUMENTED[name], part, prompt)


@pytest.mark.parametrize("name", DOCUMENTED)
@pytest.mark.parametrize("setting", ["auto", "last", "all"])
def test_what_is_learned_with_marks_is_what_inference_sees_and_the_same_as_without_them(name, setting):
    marked, documented = (byte_level(chat_template=each[name]) for each in (TEMPLATES, DOCUMENTED))
    for chat in conversations(name):
        with_marks, without = (every(Renderer(each, turns=setting), chat)[0] for each in (marked, documented))
        assert [learnt(each, marked) for each in with_marks] == [
            [said.removesuffix("\n</s>") for said in learnt(each, documented)] for each in without
        ]
        assert [each.ids.tolist() for each in with_marks] == [each.ids.tolist() for each in without]
        assert [each.left_out for each in with_marks] == [each.left_out for each in without]
        for sample in with_marks:
            starts = [
                place for place in range(1, len(sample.ids)) if sample.targets[place] and not sample.targets[place - 1]
            ]
            prompts = [inference(marked, chat, turn)[0] for turn in chat.loss_turns] if not chat.tools else []
            assert not prompts or all(sample.ids[:start].tolist() in prompts for start in starts)


def test_every_answer_is_learned_once_with_turns_all():
    for name, chat in itertools.product(DOCUMENTED, [Chat(TWO_ANSWERS, (1, 3)), Chat([SYSTEM, *TWO_ANSWERS], (2, 4))]):
        tokenizer = byte_level(chat_template=TEMPLATES[name])
        said = [
            part for sample in every(Renderer(tokenizer, turns="all"), chat)[0] for part in learnt(sample, tokenizer)
        ]
        assert len(said) == 2
        assert "It is 4" in said[0]
        assert "In May" in said[1]


def test_the_marked_templates_are_marked():
    assert all(GENERATION.search(TEMPLATES[name]) for name in DOCUMENTED)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_template_without_its_marks_renders_the_same(name):
    template = without_marks(TEMPLATES[name])
    assert not GENERATION.search(template)
    for chat in conversations(name):
        assert rendered_by(template, chat, False) == rendered_by(TEMPLATES[name], chat, False)


# ── thoughts ──

THOUGHTFUL = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "<think>\ntwo and two\n</think>\n\nIt is 4"},
    {"role": "user", "content": "And 48?"},
    {"role": "assistant", "content": "<think>\nso many\n</think>\n\nclips"},
]


@pytest.mark.parametrize("template", [QWEN3, TEMPLATES["qwen3"]])
def test_qwen3_learns_the_thoughts_of_an_answer_as_they_are_given_and_no_answer_without(template):
    tokenizer = byte_level(chat_template=template)
    chat = Chat(THOUGHTFUL, (1, 3))
    ((last,),) = every(Renderer(tokenizer), chat)
    assert (learnt(last, tokenizer), last.left_out) == ([THOUGHTFUL[3]["content"] + "<|im_end|>"], 1)
    (both,) = every(Renderer(tokenizer, turns="all"), chat)
    assert [learnt(each, tokenizer) for each in both] == [[THOUGHTFUL[n]["content"] + "<|im_end|>"] for n in (1, 3)]
    for turn, each in zip((1, 3), both, strict=True):
        assert each.ids.tolist() == inference(tokenizer, chat, turn)[1]


@pytest.mark.parametrize(
    ("template", "end"), [(DEEPSEEK_R1, "<｜end▁of▁sentence｜>"), (QWQ, "<|im_end|>")], ids=["r1", "qwq"]
)
@pytest.mark.parametrize("setting", ["auto", "all"])
def test_thoughts_that_a_prompt_opens_and_a_template_takes_out_are_learned_behind_the_prompt(template, end, setting):
    tokenizer = byte_level(chat_template=template)
    chat = Chat(THOUGHTFUL, (1, 3))
    renderer = Renderer(tokenizer, turns=setting)
    (parts,) = every(renderer, chat)
    turns = (1, 3) if setting == "all" else (3,)
    for turn, sample in zip(turns, parts, strict=True):
        prompt, _ = inference(tokenizer, chat, turn)
        assert sample.ids[: len(prompt)].tolist() == prompt
        assert text(sample, tokenizer).endswith(
            "<think>\n" + THOUGHTFUL[turn]["content"].removeprefix("<think>\n") + end
        )
        assert learnt(sample, tokenizer) == [THOUGHTFUL[turn]["content"].removeprefix("<think>\n") + end]
    assert any("behind their own prompt" in note for note in renderer.notes)


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "two and two\n</think>\n\nIt is 4"},
        {"content": "It is 4", "reasoning_content": "two and two"},
        {"content": "It is 4", "thinking": "two and two\n"},
    ],
)
def test_thoughts_may_stand_apart_or_go_on_from_the_prompt(answer):
    tokenizer = byte_level(chat_template=DEEPSEEK_R1)
    chat = Chat([THOUGHTFUL[0], {"role": "assistant", **answer}], (1,))
    ((sample,),) = every(Renderer(tokenizer), chat)
    assert learnt(sample, tokenizer) == ["two and two\n</think>\n\nIt is 4<｜end▁of▁sentence｜>"]


def test_an_answer_without_the_thoughts_that_its_prompt_opens_is_refused():
    chat = Chat(TWO_ANSWERS[:2], (1,))
    (result,) = Renderer(byte_level(chat_template=DEEPSEEK_R1)).render([chat])
    assert "begins the answer with <think>: give answers with their thoughts" in str(result)


# ── templates that write something into prompts, or behind texts, alone ──


@pytest.mark.parametrize("template", [MISTRAL, TEMPLATES["mistral"]])
def test_a_system_message_that_mistral_writes_into_prompts_alone_is_learned_from(template):
    tokenizer = byte_level(chat_template=template)
    chat = Chat([SYSTEM, *TWO_ANSWERS], (2, 4))
    ((sample,),) = every(Renderer(tokenizer), chat)
    assert text(sample, tokenizer).endswith("[INST]  Be brief.\n\nAnd 48 clips?[/INST] In May</s>")
    assert (learnt(sample, tokenizer), sample.left_out) == ([" In May</s>"], 1)


def test_an_eos_behind_every_text_does_not_count_as_rewriting():
    tokenizer = byte_level(chat_template=PHI3)
    ((sample,),) = every(Renderer(tokenizer), Chat(TWO_ANSWERS, (1, 3)))
    assert isinstance(sample, Sample)
    assert learnt(sample, tokenizer) == ["It is 4 <|end|>", "In May<|end|>\n</s>"]
    assert sample.left_out == 0


def test_an_eos_behind_the_last_answer_alone_counts_as_rewriting():
    template = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}{% if loop.last and m.role == 'assistant' %}{{ eos_token "
        "}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = byte_level(chat_template=template)
    ((sample,),) = every(Renderer(tokenizer), Chat(TWO_ANSWERS, (1, 3)))
    assert (learnt(sample, tokenizer), sample.left_out) == (["In May</s>"], 1)
