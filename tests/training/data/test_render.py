"""Token ids and target masks, checked by decoding what is learnt."""

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from training.data.files import RowError
from training.data.formats import Chat, Example, Message, Pair, Parser, Prompt, PromptCompletion, Text
from training.data.render import Renderer, Sample, fitted, fitted_pair, load_tokenizer, sides_of
from training.data.templates import TEMPLATES
from training.errors import InputError

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["Natalia sold 48 clips. Answer: 48 clips in May", "User: What is 2 + 2? Assistant: It is 4, sir."] * 8


def byte_level(trim_offsets: bool = False, **options) -> PreTrainedTokenizerFast:
    """A BPE tokenizer like GPT-2's; ` 4` and ` clips` are single tokens with their space."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return wrapped(core, **options)


def sentence_piece(**options) -> PreTrainedTokenizerFast:
    """A BPE tokenizer like LLaMA-2's: a space before the first word, and a BOS that it adds by itself."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokens = [*SPECIAL, "<unk>", "\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=tokens, show_progress=False, max_token_length=6)
    core.train_from_iterator([word for line in CORPUS for word in line.split()], trainer)
    bos = core.token_to_id("<s>")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return wrapped(core, **options)


def wrapped(core: Tokenizer, **options) -> PreTrainedTokenizerFast:
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **options}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


TOKENIZER = byte_level()


def turns(*texts: str, tools=None) -> Chat:
    """user, assistant, user, ... from texts."""
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]
    return Chat(messages, tuple(range(1, len(texts), 2)), tools)


def samples(renderer: Renderer, *examples: Example) -> list[Sample]:
    results = renderer.render(examples)
    for result in results:
        if isinstance(result, RowError):
            raise result
    return [result for result in results if isinstance(result, Sample)]


def rendered(example: Example, tokenizer=TOKENIZER, template="auto", **options) -> Sample:
    return samples(Renderer(tokenizer, template, **options), example)[0]


def text(sample: Sample, tokenizer=TOKENIZER) -> str:
    return tokenizer.decode(sample.ids)


def learnt(sample: Sample, tokenizer=TOKENIZER) -> list[str]:
    """The text of every unbroken stretch of targets."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], sample.targets, [False]]).astype(int)))
    return [tokenizer.decode(sample.ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


# ── prompt and completion, text ──


def test_prompt_and_completion_stand_as_they_are_with_one_eos():
    sample = rendered(PromptCompletion("What is 2 + 2? ", "4 clips"))
    assert text(sample) == "What is 2 + 2? 4 clips</s>"
    assert learnt(sample) == ["4 clips</s>"]
    assert (sample.ids.dtype, sample.targets.dtype) == (np.uint32, np.bool_)


def test_an_eos_that_a_text_ends_with_is_not_doubled():
    renderer = Renderer(TOKENIZER, "none")
    with_eos, without, document = samples(
        renderer, PromptCompletion("2?", "4</s>"), PromptCompletion("2?", "4"), Text("It is 4</s>")
    )
    assert with_eos.ids.tolist() == without.ids.tolist()
    assert with_eos.targets.tolist() == without.targets.tolist()
    assert text(document) == "It is 4</s>"
    assert "some texts end with the tokenizer's EOS already; it is not doubled" in renderer.notes
    assert renderer.changes == {"eos"}


@pytest.mark.parametrize("tokenizer", [TOKENIZER, sentence_piece()], ids=["byte-level", "sentencepiece"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Answer:", " 48"),
        ("Answer: ", "48"),
        ("Answer: ", "clips"),
        ("a\n", "\nb"),
        ("cl", "ips"),
        ("", "clips"),
        ("é", "é"),
    ],
)
def test_the_tokens_of_the_prompt_are_those_of_the_prompt_alone(tokenizer, prompt, completion):
    sample = rendered(PromptCompletion(prompt, completion), tokenizer)
    alone = tokenizer.encode(prompt)
    assert sample.ids[: len(alone)].tolist() == alone
    assert sample.targets.tolist() == [place >= max(len(alone), 1) for place in range(len(sample.ids))]


def test_a_token_that_straddles_the_boundary_is_split():
    assert len(TOKENIZER.encode(" clips")) == 1
    sample = rendered(PromptCompletion("Answer: ", "clips"))
    assert text(sample) == "Answer: clips</s>"
    assert learnt(sample) == ["clips</s>"]


def test_a_completion_apart_gets_no_space_of_its_own():
    tokenizer = sentence_piece()
    sample = rendered(PromptCompletion("Answer: ", "clips"), tokenizer)
    assert str(tokenizer.decode(sample.ids, skip_special_tokens=True)).strip() == "Answer: clips"


def test_all_of_a_text_but_its_first_token_is_learnt():
    sample = rendered(Text("Natalia sold 48 clips"))
    assert text(sample) == "Natalia sold 48 clips</s>"
    assert sample.targets.tolist() == [False] + [True] * (len(sample.ids) - 1)


def test_plain_texts_begin_with_what_the_tokenizer_adds_and_bos_none_leaves_it_out():
    tokenizer = sentence_piece()
    assert tokenizer.encode("48")[0] == tokenizer.bos_token_id
    eos = tokenizer.eos_token_id
    for example in (Text("Answer: 48"), PromptCompletion("Answer:", " 48")):
        sample = rendered(example, tokenizer)
        assert sample.ids.tolist() == [*tokenizer.encode("Answer: 48"), eos]
        assert not sample.targets[0]
        old = rendered(example, tokenizer, bos="none")
        assert old.ids.tolist() == sample.ids[1:].tolist()
    (prompt,) = samples(Renderer(tokenizer), Prompt("48"))
    assert prompt.ids.tolist() == tokenizer.encode("48")


def test_bos_and_eos_that_a_tokenizer_adds_stand_once():
    core = sentence_piece().backend_tokenizer
    bos, eos = core.token_to_id("<s>"), core.token_to_id("</s>")
    core.post_processor = processors.TemplateProcessing(
        single="<s> <pad> $A </s>", special_tokens=[("<s>", bos), ("<pad>", core.token_to_id("<pad>")), ("</s>", eos)]
    )
    tokenizer = wrapped(core)
    sample = rendered(PromptCompletion("Answer:", " 48"), tokenizer)
    assert sample.ids.tolist() == tokenizer.encode("Answer: 48")
    # What stands before a text is given at inference, so it is not learnt; the first token of the completion is.
    given = len(tokenizer.encode("Answer:")) - 1
    assert sample.targets.tolist() == [False] * given + [True] * (len(sample.ids) - given)
    assert rendered(Text("Answer: 48"), tokenizer).targets.tolist() == [False] * 2 + [True] * (len(sample.ids) - 2)
    (prompt,) = samples(Renderer(tokenizer), Prompt("48"))
    assert prompt.ids.tolist() == tokenizer.encode("48")[:-1]


def test_a_bos_that_a_text_brings_along_is_not_doubled():
    tokenizer = sentence_piece()
    renderer = Renderer(tokenizer)
    (sample,) = samples(renderer, Text("<s>48"))
    assert sample.ids.tolist().count(tokenizer.bos_token_id) == 1
    assert any("is not doubled" in note for note in renderer.notes)


def test_only_the_first_piece_of_a_split_document_has_a_bos():
    tokenizer = sentence_piece()
    document = rendered(Text("once upon a time " * 5), tokenizer)
    pieces = fitted(document, 8, "split")
    assert [piece.ids.tolist().count(tokenizer.bos_token_id) for piece in pieces] == [1] + [0] * (len(pieces) - 1)


def test_a_batch_of_all_kinds_keeps_its_order():
    examples: list[Example] = [
        turns("2 + 2?", "4"),
        Text("once"),
        PromptCompletion("a", "b"),
        turns("3?", "3"),
        Text("twice"),
    ]
    renderer = Renderer(TOKENIZER)
    together, apart = samples(renderer, *examples), [samples(renderer, example)[0] for example in examples]
    assert [text(sample) for sample in together] == [text(sample) for sample in apart]
    assert renderer.render([]) == []


# ── chats ──

MULTI_TURN = turns("What is 2 + 2?", "It is 4", "And 48 clips?", "In May")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", ["It is 4</s>", "In May</s>"]),
        ("chatml", ["It is 4<|im_end|>", "In May<|im_end|>"]),
        ("llama2", [" It is 4 </s>", " In May </s>"]),
        ("alpaca", ["It is 4</s>", "In May</s>"]),
    ],
)
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_every_assistant_turn_is_learnt_with_its_end(template, expected, trim_offsets):
    tokenizer = byte_level(trim_offsets)
    assert learnt(rendered(MULTI_TURN, tokenizer, template), tokenizer) == expected


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_built_in_template_continues_its_own_prompt(template):
    renderer = Renderer(TOKENIZER, template)
    (sample,) = samples(renderer, turns("What is 2 + 2?", "It is 4"))
    prompt = TOKENIZER.apply_chat_template(
        MULTI_TURN.messages[:1], chat_template=renderer.chat_template(), add_generation_prompt=True, return_dict=False
    )
    assert sample.ids[: len(prompt)].tolist() == prompt
    assert sample.targets[len(prompt)]
    assert not sample.targets[: len(prompt)].any()


@pytest.mark.parametrize("template", ["plain", "llama2", "alpaca"])
def test_a_bos_is_written_by_the_template_and_never_twice(template):
    tokenizer = sentence_piece()
    sample = rendered(turns("2 + 2?", "4"), tokenizer, template)
    assert sample.ids[0] == tokenizer.bos_token_id
    assert (sample.ids == tokenizer.bos_token_id).sum() == 1


def test_a_template_does_without_a_bos_token():
    tokenizer = byte_level(bos_token=None)
    for template in TEMPLATES:
        assert learnt(rendered(turns("2 + 2?", "4"), tokenizer, template), tokenizer)


def test_llama2_writes_the_system_turn_into_the_first_question():
    chat = Chat([{"role": "system", "content": "Be brief."}, *MULTI_TURN.messages], (2, 4))
    assert text(rendered(chat, template="llama2")) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is 2 + 2? [/INST] It is 4 </s>"
        "<s>[INST] And 48 clips? [/INST] In May </s>"
    )


def test_only_the_turns_that_are_to_be_learnt_are():
    chat = Chat(MULTI_TURN.messages, loss_turns=(3,))
    assert learnt(rendered(chat, template="chatml")) == ["In May<|im_end|>"]


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_tool_calls_are_learnt_and_tool_results_are_not(template):
    function = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages: list[Message] = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "four"},
        {"role": "assistant", "content": "It is 4"},
    ]
    sample = rendered(Chat(messages, (1, 3), [{"type": "function", "function": function}]), template=template)
    first, second = learnt(sample)
    assert json.dumps(call["function"]) in first
    assert "four" not in first + second
    assert second.startswith("It is 4")
    assert json.dumps(function) in text(sample)


@pytest.mark.parametrize("template", ["llama2", "alpaca"])
def test_a_template_without_a_place_for_tools_refuses_them(template):
    with pytest.raises(RowError, match=r"the chat template refuses this conversation: .* no place for tools"):
        rendered(turns("2?", "2", tools=[{"type": "function", "function": {"name": "add"}}]), template=template)


def test_the_prompt_of_a_chat_keeps_its_tokens_where_a_token_would_straddle():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = byte_level(chat_template=template)
    sample = rendered(turns("What?", "clips in May", "And?", "clips"), tokenizer)
    assert learnt(sample, tokenizer) == ["clips in May", "clips"]
    assert text(sample, tokenizer) == "user: What?\nassistant: clips in May\nuser: And?\nassistant: clips\n"
    prompt = tokenizer.encode("user: What?\nassistant: ")
    assert sample.ids[: len(prompt)].tolist() == prompt


def test_generation_marks_of_the_template_are_obeyed():
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A:' }}{% generation %}{{ m.content }}{% "
        "endgeneration %}{{ eos_token }}{% else %}{{ 'U:' + m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = byte_level(chat_template=template)
    assert learnt(rendered(MULTI_TURN, tokenizer), tokenizer) == ["It is 4", "In May"]


def test_generation_marks_give_way_where_only_some_turns_are_to_be_learnt():
    template = "{% for m in messages %}{{ m.role + ':' }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    tokenizer = byte_level(chat_template=template)
    assert learnt(rendered(Chat(MULTI_TURN.messages, loss_turns=(3,)), tokenizer), tokenizer) == ["In May"]


def test_the_first_token_is_never_learnt():
    template = (
        "{% for m in messages if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    tokenizer = byte_level(chat_template=template)
    sample = rendered(turns("2?", "It is 4"), tokenizer)
    assert text(sample, tokenizer) == "It is 4"
    assert sample.targets.tolist() == [False] + [True] * (len(sample.ids) - 1)


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_lone_space_before_an_answer_is_not_learnt(trim_offsets):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = byte_level(trim_offsets, chat_template=template)
    assert learnt(rendered(turns("2?", "é"), tokenizer), tokenizer) == ["é"]


REWRITING = (
    "{% for m in messages %}{{ m.role + ':' + ('<think></think>' if loop.last and m.role == 'assistant' else '') }}"
    "{{ m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
"""Writes an answer with its thoughts only as long as nothing follows, as thinking models do."""


def every(renderer: Renderer, *examples: Example) -> list[list[Sample]]:
    results = renderer.samples(examples)
    assert not [result for result in results if isinstance(result, RowError)]
    return [result for result in results if not isinstance(result, RowError)]


def inference(tokenizer, chat: Chat, turn: int) -> tuple[list[int], list[int]]:
    """The tokens of the prompt of an answer and of both, as transformers writes them when the answer is given."""
    prompt = tokenizer.apply_chat_template(
        chat.messages[:turn], tools=chat.tools, add_generation_prompt=True, return_dict=False
    )
    whole = tokenizer.apply_chat_template(chat.messages[: turn + 1], tools=chat.tools, return_dict=False)
    return list(prompt), list(whole)


THREE_ANSWERS = turns("What is 2 + 2?", "It is 4", "And 48 clips?", "In May", "What?", "4, sir")


@pytest.mark.parametrize("setting", ["auto", "last"])
def test_of_a_template_that_rewrites_earlier_turns_the_last_answer_is_learned_and_the_others_counted(setting):
    tokenizer = byte_level(chat_template=REWRITING)
    ((sample,),) = every(Renderer(tokenizer, turns=setting), THREE_ANSWERS)
    assert learnt(sample, tokenizer) == ["<think></think>4, sir</s>"]
    assert sample.left_out == 2
    assert sample.ids.tolist() == inference(tokenizer, THREE_ANSWERS, 5)[1]


def test_with_turns_all_each_answer_is_learned_as_it_was_given():
    tokenizer = byte_level(chat_template=REWRITING)
    (parts,) = every(Renderer(tokenizer, turns="all"), THREE_ANSWERS)
    assert len(parts) == 3
    for turn, sample in zip((1, 3, 5), parts, strict=True):
        prompt, whole = inference(tokenizer, THREE_ANSWERS, turn)
        assert sample.ids.tolist() == whole
        assert sample.targets.tolist() == [place >= len(prompt) for place in range(len(whole))]
        assert sample.left_out == 0


def test_a_template_that_keeps_earlier_turns_learns_all_in_one_sequence():
    for setting in ("auto", "all"):
        (parts,) = every(Renderer(TOKENIZER, "chatml", turns=setting), THREE_ANSWERS)
        assert [learnt(sample) for sample in parts] == [["It is 4<|im_end|>", "In May<|im_end|>", "4, sir<|im_end|>"]]
    ((last,),) = every(Renderer(TOKENIZER, "chatml", turns="last"), THREE_ANSWERS)
    assert (learnt(last), last.left_out) == (["4, sir<|im_end|>"], 2)


def test_an_answer_that_is_followed_by_messages_which_are_not_learned_is_learned_as_it_was_given():
    tokenizer = byte_level(chat_template=REWRITING)
    for chat in (Chat(THREE_ANSWERS.messages[:5], (1, 3)), Chat(THREE_ANSWERS.messages, (3,))):
        sample = every(Renderer(tokenizer), chat)[0][0]
        assert sample.ids.tolist() == inference(tokenizer, THREE_ANSWERS, 3)[1]
        assert learnt(sample, tokenizer) == ["<think></think>In May</s>"]


def test_pairs_of_conversations_are_judged_at_their_last_answer_under_a_template_that_rewrites():
    tokenizer = byte_level(chat_template=REWRITING)
    other = Chat([*THREE_ANSWERS.messages[:-1], {"role": "assistant", "content": "48"}], (1, 3, 5))
    for setting in ("auto", "last", "all"):
        ((pair,),) = every(Renderer(tokenizer, turns=setting), Pair(THREE_ANSWERS, other))
        chosen, rejected = sides_of(pair.ids, pair.targets)
        assert chosen.tolist() == inference(tokenizer, THREE_ANSWERS, 5)[1]
        assert rejected.tolist() == inference(tokenizer, other, 5)[1]
        assert pair.left_out == 0


def test_an_answer_that_does_not_go_on_from_its_own_prompt_is_refused():
    template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    )
    with pytest.raises(RowError, match=r"messages\[1\] differently from its own generation prompt.*data.template"):
        rendered(turns("2?", "4"), byte_level(chat_template=template))


MARKED = (
    "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def test_marks_of_turns_that_are_not_to_be_learned_are_passed_over():
    tokenizer = byte_level(chat_template=MARKED)
    for chosen, expected in [((1, 5), ["It is 4</s>", "4, sir</s>"]), ((3,), ["In May</s>"])]:
        sample = every(Renderer(tokenizer), Chat(THREE_ANSWERS.messages, chosen))[0][0]
        assert learnt(sample, tokenizer) == expected


def test_a_mark_may_hold_less_than_the_answer_where_only_some_are_learned():
    template = MARKED.replace(
        "{{ m.content + eos_token }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}{{ eos_token }}"
    )
    tokenizer = byte_level(chat_template=template)
    sample = every(Renderer(tokenizer), Chat(THREE_ANSWERS.messages, (5,)))[0][0]
    assert learnt(sample, tokenizer) == ["4, sir"]


def test_marks_in_turns_that_the_template_rewrites_are_passed_over():
    marked = (
        "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ ('<think></think>' if loop.last else '') + m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer, plain = byte_level(chat_template=marked), byte_level(chat_template=REWRITING)
    for setting in ("auto", "all"):
        ours, theirs = (every(Renderer(each, turns=setting), THREE_ANSWERS)[0] for each in (tokenizer, plain))
        assert [learnt(sample, tokenizer) for sample in ours] == [learnt(sample, plain) for sample in theirs]


# ── forms of tool calls ──


def with_call(arguments: Any, content: str | None = None) -> Chat:
    """As the parser gives it."""
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    rows = {
        "messages": [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": content, "tool_calls": [call]},
            {"role": "tool", "content": "four"},
            {"role": "assistant", "content": "It is 4"},
        ],
        "tools": [{"name": "add", "parameters": {"type": "object"}}],
    }
    _, chat = Parser("messages", {}, ("messages",))(rows)
    assert isinstance(chat, Chat)
    return chat


CALLS = (
    "{% for m in messages %}{{ m.role + ':' }}{% if m.tool_calls %}{% for c in m.tool_calls %}{{ CALL }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
)


@pytest.mark.parametrize("call", ["c.function.name + c.function.arguments", "c.function.name ~ c.function.arguments"])
@pytest.mark.parametrize("arguments", ['{"a":  2}', {"a": 2}])
def test_arguments_are_text_where_the_template_wants_text(call, arguments):
    tokenizer = byte_level(chat_template=CALLS.replace("CALL", call))
    written = text(rendered(with_call(arguments), tokenizer), tokenizer)
    expected = arguments if isinstance(arguments, str) else json.dumps(arguments)
    assert f"assistant:add{expected}</s>" in written


@pytest.mark.parametrize("call", ["c.function.arguments.a | string", "c.function.arguments | tojson"])
def test_arguments_are_an_object_where_the_template_wants_an_object(call):
    tokenizer = byte_level(chat_template=CALLS.replace("CALL", call))
    written = text(rendered(with_call('{"a":  2}'), tokenizer), tokenizer)
    assert "assistant:2</s>" in written or 'assistant:{"a": 2}</s>' in written


def test_the_content_of_a_call_is_absent_where_the_template_refuses_an_empty_one():
    refusing = "{% if m.tool_calls and m.content is defined %}{{ raise_exception('content beside calls') }}{% endif %}"
    template = CALLS.replace("CALL", "c.function.name").replace("{{ m.role + ':' }}", refusing + "{{ m.role + ':' }}")
    tokenizer = byte_level(chat_template=template)
    assert "assistant:add</s>" in text(rendered(with_call({}), tokenizer), tokenizer)


def test_tools_have_no_wrapper_where_the_template_reads_their_name_at_once():
    tokenizer = byte_level(
        chat_template="{% for t in tools %}{{ 'tool ' ~ t.name }}{% endfor %}" + CALLS.replace("CALL", "'call'")
    )
    assert text(rendered(with_call({}), tokenizer), tokenizer).startswith("tool adduser:")


def test_a_template_that_can_write_no_form_speaks_of_the_form_of_the_row():
    template = CALLS.replace("CALL", "raise_exception('is text' if c.function.arguments is string else 'is an object')")
    tokenizer = byte_level(chat_template=template)
    for arguments, said in [('{"a": 2}', "is text"), ({"a": 2}, "is an object")]:
        with pytest.raises(RowError, match=f"the chat template refuses this conversation: {said}"):
            rendered(with_call(arguments), tokenizer)


def test_tools_and_thoughts_that_the_template_does_not_write_are_mentioned_once():
    renderer = Renderer(byte_level(chat_template=CALLS.replace("CALL", "'call'")))
    chat = with_call({})
    thoughtful = Chat(
        [*chat.messages[:-1], {**chat.messages[-1], "reasoning_content": "two and two"}], chat.loss_turns, chat.tools
    )
    assert all(isinstance(result, Sample) for result in renderer.render([thoughtful, thoughtful]))
    assert renderer.notes == [
        "the chat template does not write the tools of the rows, so the model does not see them",
        "the chat template does not write `reasoning_content` of messages, so these thoughts are not learned",
    ]


PICKY = (
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ m.role + ':' + m.content + eos_token }}{% endif "
    "%}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
"""Writes no other roles, and no calls."""


def test_messages_that_the_template_does_not_write_are_mentioned():
    for role in ("system", "developer", "tool"):
        renderer = Renderer(byte_level(chat_template=PICKY))
        unseen = {"role": role, "content": "Be brief."}
        for example in (
            Chat([unseen, *turns("2?", "4").messages], (2,)),
            Prompt(Chat([unseen, *turns("2?").messages], ())),
        ):
            (sample,) = samples(renderer, example)
            assert "brief" not in text(sample, renderer.tokenizer)
        assert [note for note in renderer.notes if "role" in note] == [
            (
                f"the chat template does not write messages of the role `{role}` in some conversations: the model does "
                "not see them"
            )
        ]


def test_a_template_that_begins_an_answer_behind_every_conversation_is_refused():
    always = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}{{ "
        "'<|im_start|>assistant' }}"
    )
    (refused,) = Renderer(byte_level(chat_template=always)).render([turns("2?", "4")])
    assert "begins an answer behind every conversation" in str(refused)
    never, closing = (always.replace("{{ '<|im_start|>assistant' }}", end) for end in ("", "{{ eos_token }}"))
    assert isinstance(Renderer(byte_level(chat_template=never)).render([turns("2?", "4")])[0], Sample)
    (result,) = Renderer(byte_level(chat_template=closing)).render([turns("2?", "4")])
    assert "begins an answer" not in str(result)


def test_several_templates_without_a_default_are_an_error():
    renderer = Renderer(byte_level(chat_template={"rag": PICKY, "tool_use": PICKY}))
    with pytest.raises(
        InputError, match=r"data.template: the tokenizer has chat templates of the names rag, tool_use and no default"
    ):
        renderer.render([turns("2?", "4")])


def test_a_template_that_trims_or_escapes_messages_is_not_accused():
    escaping = PICKY.replace("m.content", "(m.content | trim | tojson)")
    renderer = Renderer(byte_level(chat_template=escaping))
    samples(renderer, turns(' "2"\n', "4"))
    assert not any("does not write messages" in note for note in renderer.notes)


def test_an_answer_of_calls_that_the_template_does_not_write_is_refused_and_others_are_mentioned():
    renderer = Renderer(byte_level(chat_template=PICKY))
    for chat in (with_call({}), with_call('{"a": 2}')):
        (refused,) = renderer.render([chat])
        assert "does not write the tool calls of messages[1], so an empty answer would be learned" in str(refused)
    said = with_call({}, content="Let me see.")
    assert learnt(samples(renderer, said)[0], renderer.tokenizer) == ["Let me see.</s>", "It is 4</s>"]
    assert "the chat template does not write tool calls, so the model does not see them" in renderer.notes
    unlearned = Chat(with_call({}).messages, (3,))
    assert learnt(samples(renderer, unlearned)[0], renderer.tokenizer) == ["It is 4</s>"]


def test_text_beside_calls_that_the_template_does_not_write_is_mentioned():
    renderer = Renderer(byte_level(chat_template=CALLS.replace("CALL", "c.function.name")))
    samples(renderer, with_call({}, content="Let me see."))
    assert any("the text of messages that call tools" in note for note in renderer.notes)


def test_a_system_message_beside_texts_is_used_in_turns_and_mentioned_without():
    row = {"prompt": "2?", "completion": "4", "system": "Be brief."}
    _, example = Parser("auto", {}, ("prompt_completion",))(row)
    in_turns, plain = Renderer(TOKENIZER, "chatml"), Renderer(TOKENIZER, "none")
    system = {"role": "system", "content": "Be brief."}
    whole = Chat([system, *turns("2?", "4").messages], (2,))
    assert samples(in_turns, example)[0].ids.tolist() == samples(in_turns, whole)[0].ids.tolist()
    assert in_turns.changes == {"system"}
    asked = samples(in_turns, Prompt("2?", "Be brief."))[0]
    assert asked.ids.tolist() == samples(in_turns, Prompt(Chat(whole.messages[:2], ())))[0].ids.tolist()
    (judged,) = in_turns.judged([Prompt("2?", "Be brief.")], ["4"], [True])
    assert judged.ids.tolist() == samples(in_turns, whole)[0].ids.tolist()
    assert text(samples(plain, example)[0]) == "2?4</s>"
    assert any("column `system` is not read: plain texts have no place for it" in note for note in plain.notes)


# ── batches ──


def test_a_bad_row_does_not_spoil_its_batch():
    broken = Chat([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, MULTI_TURN.messages[1]], (2,))
    good, bad, also_good = Renderer(TOKENIZER, "llama2").render([MULTI_TURN, broken, MULTI_TURN])
    assert "turns must alternate" in str(bad)
    assert isinstance(good, Sample)
    assert isinstance(also_good, Sample)
    assert good.ids.tolist() == also_good.ids.tolist()


def test_pairs_of_texts_become_turns_under_a_named_template():
    sample = rendered(PromptCompletion("2 + 2?", "4"), template="chatml")
    assert text(sample) == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    assert learnt(sample) == ["4<|im_end|>"]


def test_pairs_of_texts_ignore_the_template_of_the_tokenizer():
    tokenizer = byte_level(chat_template=TEMPLATES["chatml"])
    assert text(rendered(PromptCompletion("2?", "4"), tokenizer), tokenizer) == "2?4</s>"
    assert text(rendered(turns("2?", "4"), tokenizer), tokenizer).startswith("<|im_start|>user")


def test_a_date_in_the_template_is_the_same_on_every_day():
    template = "{{ strftime_now('%d %b %Y') + '|' }}" + TEMPLATES["chatml"]
    tokenizer = byte_level(chat_template=template)
    renderer = Renderer(tokenizer)
    (sample,) = samples(renderer, turns("2?", "4"))
    assert text(sample, tokenizer).startswith("01 Jan 2024|<|im_start|>")
    assert any("fixed at 2024-01-01" in note for note in renderer.notes)


# ── notes and errors ──


def test_a_tokenizer_without_template_gets_plain_and_says_so_once():
    renderer = Renderer(TOKENIZER)
    assert renderer.render([PromptCompletion("a", "b")])
    assert renderer.notes == []
    (sample, _) = samples(renderer, turns("2?", "4"), turns("3?", "5"))
    assert text(sample) == "<s>User:\n2?\n\nAssistant:\n4</s>\n\n"
    assert renderer.notes == ["the tokenizer has no chat template; conversations are written with the template `plain`"]


def test_a_tokenizer_without_pad_or_with_pad_equal_to_eos_learns_the_same():
    expected = rendered(turns("2?", "4"), template="plain")
    for pad in (None, "</s>"):
        renderer = Renderer(byte_level(pad_token=pad), "plain")
        (sample,) = samples(renderer, turns("2?", "4"))
        assert sample.targets.tolist() == expected.targets.tolist()
        assert len(renderer.notes) == (pad is None)


def test_chatml_without_its_tokens_is_noted():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        special_tokens=["</s>", "<s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([], trainer)
    core.decoder = decoders.ByteLevel()
    for tokenizer, is_noted in ((wrapped(core), True), (TOKENIZER, False)):
        renderer = Renderer(tokenizer, "chatml")
        assert renderer.render([turns("2?", "4")])
        assert any("no token <|im_end|>" in note for note in renderer.notes) == is_noted


def test_plain_prompts_to_a_tokenizer_with_a_chat_template_name_the_setting_that_uses_it():
    tokenizer = byte_level(chat_template=TEMPLATES["chatml"])
    for template, is_noted in (("auto", True), ("none", False), ("tokenizer", False)):
        renderer = Renderer(tokenizer, template)
        assert renderer.render([PromptCompletion("2?", "4"), PromptCompletion("3?", "4")])
        assert ["data.template: tokenizer" in note for note in renderer.notes] == [True] * is_noted


def test_template_tokenizer_puts_texts_into_the_chat_template_of_the_tokenizer():
    tokenizer = byte_level(chat_template=TEMPLATES["chatml"])
    renderer = Renderer(tokenizer, "tokenizer")
    sample, chat, prompt, pair = samples(
        renderer,
        PromptCompletion("2?", "4"),
        turns("2?", "4"),
        Prompt("2?"),
        Pair(PromptCompletion("2?", "4"), PromptCompletion("2?", "5")),
    )
    assert sample.ids.tolist() == chat.ids.tolist() == sides_of(pair.ids, pair.targets)[0].tolist()
    messages = [{"role": "user", "content": "2?"}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt.ids.tolist() == asked == sample.ids[: len(asked)].tolist()
    with pytest.raises(InputError, match=r"data.template: the tokenizer has no chat template; name one"):
        Renderer(TOKENIZER, "tokenizer")


def test_a_judged_response_is_the_sequence_of_a_pair_and_a_cut_off_one_has_no_end():
    conversation = Chat([{"role": "user", "content": "2?"}], ())
    for renderer, prompt in ((Renderer(TOKENIZER, "chatml"), conversation), (Renderer(sentence_piece()), "2?")):
        whole = PromptCompletion("2?", "48") if isinstance(prompt, str) else turns("2?", "48")
        ended, cut = renderer.judged([Prompt(prompt)] * 2, ["48"] * 2, [True, False])
        (expected,) = samples(renderer, whole)
        assert ended.ids.tolist() == expected.ids.tolist()
        closing = 1 if isinstance(prompt, str) else 2
        assert cut.ids.tolist() == expected.ids[:-closing].tolist()


def test_template_none_refuses_conversations():
    with pytest.raises(InputError, match=r"data.template: none is for prompt_completion with plain texts"):
        Renderer(TOKENIZER, "none").render([turns("2?", "4")])


def test_an_unknown_template_is_refused_with_a_suggestion(tmp_path):
    with pytest.raises(
        InputError, match=r"data.template: no template and no file is called `chatlm`; did you mean chatml?"
    ):
        Renderer(TOKENIZER, "chatlm", base=tmp_path)


def test_a_template_file_is_read_beside_the_job_and_checked(tmp_path):
    (tmp_path / "mine.jinja").write_text(TEMPLATES["chatml"])
    chat = turns("2?", "4")
    sample = rendered(chat, template="mine.jinja", base=tmp_path)
    assert text(sample) == text(rendered(chat, template="chatml"))
    (tmp_path / "mine.jinja").write_text("{{ bos_token }}\n{% for m in %}")
    with pytest.raises(InputError, match=r"mine.jinja, line 2"):
        Renderer(TOKENIZER, "mine.jinja", base=tmp_path)


def test_a_tokenizer_is_loaded_from_its_folder(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).eos_token == "</s>"


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"needs tokenizer.json and tokenizer_config.json, it holds config.json"):
        load_tokenizer(str(tmp_path))


def test_a_broken_tokenizer_file_is_an_input_error(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"the tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(InputError, match="absent: no such folder"):
        load_tokenizer(str(tmp_path / "absent"))


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    byte_level(eos_token=None).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no EOS token.*set eos_token"):
        load_tokenizer(str(tmp_path))


def test_a_slow_tokenizer_is_refused(tmp_path, monkeypatch):
    import transformers

    class Slow:
        is_fast = False

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **options: Slow())
    with pytest.raises(InputError, match=r"only a slow tokenizer"):
        load_tokenizer("owner/name")


# ── length ──


def test_a_long_sample_is_dropped_or_cut_without_a_new_eos():
    sample = rendered(PromptCompletion("What is 2 + 2? ", "It is 4, sir."))
    length = len(sample.ids)
    assert fitted(sample, length, "drop") == [sample]
    assert fitted(sample, length - 1, "drop") == []
    (cut,) = fitted(sample, length - 2, "truncate")
    assert cut.ids.tolist() == sample.ids[:-2].tolist()
    assert TOKENIZER.eos_token_id not in cut.ids
    (none_left,) = fitted(sample, 3, "truncate")
    assert not none_left.targets.any()


@pytest.mark.parametrize("max_length", [2, 3, 7, 10, 11, 12, 50])
def test_a_long_document_is_split_such_that_every_token_but_the_first_is_learnt_once(max_length):
    document = rendered(Text("once upon a time there was a very small model " * 3))
    pieces = fitted(document, max_length, "split")
    assert all(2 <= len(piece.ids) <= max_length for piece in pieces)
    assert not any(piece.targets[0] for piece in pieces)
    learnt = [token for piece in pieces for token in piece.ids[piece.targets].tolist()]
    assert learnt == document.ids[1:].tolist()
    # Each piece sees the token before its first target.
    assert [piece.ids[0] for piece in pieces[1:]] == [piece.ids[-1] for piece in pieces[:-1]]


# ── pairs ──


def test_a_pair_is_both_whole_sequences_each_judged_at_its_last_token():
    pair = Pair(PromptCompletion("2 + 2 = ", "4"), PromptCompletion("2 + 2 = ", "five"), margin=0.5)
    sample = rendered(pair)
    chosen, rejected = sides_of(sample.ids, sample.targets)
    assert chosen.tolist() == rendered(pair.chosen).ids.tolist()
    assert rejected.tolist() == rendered(pair.rejected).ids.tolist()
    assert np.flatnonzero(sample.targets).tolist() == [len(chosen) - 1, len(sample.ids) - 1]
    assert sample.margin == 0.5


def test_a_pair_is_dropped_if_one_side_is_too_long():
    sample = rendered(Pair(Text("short"), Text("a good deal longer than that")))
    longest = max(map(len, sides_of(sample.ids, sample.targets)))
    assert fitted_pair(sample, longest) == [sample]
    assert fitted_pair(sample, longest - 1) == []


def test_pairs_of_the_same_tokens_are_refused():
    # Two ways to write one conversation.
    chats = [
        Chat([{"role": "user", "content": text}, {"role": "assistant", "content": "4"}], (1,)) for text in ("a", "a")
    ]
    (result,) = Renderer(TOKENIZER, "chatml").render([Pair(*chats)])
    assert "the same tokens" in str(result)


def test_rendering_is_batched(monkeypatch):
    renderer = Renderer(TOKENIZER, "chatml")
    calls = []
    encode = Renderer._encode

    def counting(self, texts):
        calls.append(len(texts))
        return encode(self, texts)

    monkeypatch.setattr(Renderer, "_encode", counting)
    renderer.render([MULTI_TURN] * 50)
    assert calls == [50, 2]  # and two answers, to find out how they end
