"""What training sees is what serving sees: the tokens of a prompt, and the token that a response ends with,
for twelve kinds of models.

The tokenizers are of the kinds that the families have, trained on a few lines;
the templates are written after what they document.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from tests.training.data.documented_templates import DOCUMENTED
from training.checkpoint.export import _write_generation_config
from training.config import SFT
from training.data.formats import Chat, Prompt, PromptCompletion
from training.data.render import Renderer, Sample
from training.data.templates import TEMPLATES
from training.data.turn_end import stop_tokens

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "What is 2 + 2? It is 4, sir. And 48 clips? In May.", "user assistant system model User: Assistant:",
    "Natalia sold 48 clips to her friends. How many did she sell?",
] * 4  # fmt: skip
QUESTION = "What is 2 + 2?"
PROMPTS = [QUESTION, " What is 2 + 2?", "Tom has 3 cards.\n\nHow many?\n", "Grüße, 東京 \U0001f600", "Answer:"]
COMPLETIONS = [" It is 4", "\nIt is 4, sir.", " In May", " 48 é"]


@dataclass(frozen=True)
class Kind:
    """A family's tokenizer: how it cuts texts, what it puts around them, and its template."""

    eos: str
    end: str
    """What its template ends an answer with."""
    bos: str | None = None
    adds: str = "$A"
    """What `tokenizer(text)` makes of a text."""
    pieces: str = ""
    """Of the SentencePiece kind: how a text begins. Empty: bytes, as GPT-2 has them;
    space: with a space before each piece of text."""
    template: str | None = None
    setting: str = "auto"
    """Of `data.template`."""
    special: tuple[str, ...] = ()


CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
KINDS = {
    "llama-2": Kind("</s>", "</s>", "<s>", "<s> $A", "prepend", TEMPLATES["llama2"]),
    "llama-3": Kind(
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|begin_of_text|>",
        "<|begin_of_text|> $A",
        template=DOCUMENTED["llama3"],
        special=LLAMA3,
    ),
    "mistral": Kind("</s>", "</s>", "<s>", "<s> $A", "metaspace", DOCUMENTED["mistral"], special=("[INST]", "[/INST]")),
    "qwen2.5 base": Kind("<|endoftext|>", "<|im_end|>", template=DOCUMENTED["qwen2.5"], special=CHATML),
    "qwen3": Kind("<|im_end|>", "<|im_end|>", template=DOCUMENTED["qwen3"], special=("<|im_start|>", "<|endoftext|>")),
    "gemma": Kind(
        "<eos>",
        "<end_of_turn>",
        "<bos>",
        "<bos> $A",
        "nothing",
        DOCUMENTED["gemma"],
        special=("<start_of_turn>", "<end_of_turn>"),
    ),
    "phi": Kind(
        "<|endoftext|>", "<|im_end|>", template=DOCUMENTED["phi4"], special=("<|im_start|>", "<|im_sep|>", "<|im_end|>")
    ),
    "smollm2": Kind("<|im_end|>", "<|im_end|>", "<|im_start|>", template=SMOLLM2, special=("<|endoftext|>",)),
    "gpt-2": Kind("<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "gpt-neox": Kind("<|endoftext|>", "<|endoftext|>", "<|endoftext|>", special=("<|padding|>",)),
    "deepseek": Kind(
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜> $A",
        template=DOCUMENTED["deepseek"],
        special=("<｜User｜>", "<｜Assistant｜>"),
    ),
    "chatml on a base model": Kind("</s>", "<|im_end|>", "<s>", "<s> $A", "prepend", setting="chatml", special=CHATML),
    "one that adds EOS": Kind("</s>", "</s>", "<s>", "<s> $A </s>", "metaspace", TEMPLATES["llama2"]),
    "one that adds a space": Kind("</s>", "<|im_end|>", "<s>", pieces="space", setting="chatml", special=CHATML),
    "one that adds two tokens": Kind("<eop>", "<eop>", "<sop>", "[gMASK] <sop> $A", special=("[gMASK]",)),
}


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    kind = KINDS[name]
    special = list(dict.fromkeys(each for each in ("<unk>", kind.bos, kind.eos, kind.end, *kind.special) if each))
    is_bytes = kind.pieces in ("", "space")
    core = _bytes(special, kind.pieces == "space") if is_bytes else _pieces(kind.pieces, special)
    if kind.adds != "$A":
        named = [(each, core.token_to_id(each)) for each in kind.adds.split() if each != "$A"]
        core.post_processor = processors.TemplateProcessing(single=kind.adds, special_tokens=named)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=kind.bos, eos_token=kind.eos, unk_token="<unk>", chat_template=kind.template
    )


def _bytes(special: list[str], adds_space: bool) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds_space)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return core


def _pieces(begins: str, special: list[str]) -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if begins == "metaspace":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        first = [normalizers.Prepend("▁")] if begins == "prepend" else []
        core.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False, max_token_length=8)
    core.train_from_iterator([word for line in CORPUS for word in line.split()], trainer)
    learned = json.loads(core.to_str())["model"]
    tokens = dict.fromkeys([*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *learned["vocab"]])
    core.model = models.BPE(
        {token: number for number, token in enumerate(tokens)}, [tuple(merge) for merge in learned["merges"]],
        unk_token="<unk>", byte_fallback=True, fuse_unk=True,
    )  # fmt: skip
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(special)
    return core


def turns(question: str, answer: str) -> Chat:
    return Chat([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], (1,))


def rendered(renderer: Renderer, *examples) -> list[Sample]:
    results = renderer.render(examples)
    assert all(isinstance(each, Sample) for each in results), results
    return [each for each in results if isinstance(each, Sample)]


@pytest.mark.parametrize("name", KINDS)
def test_a_plain_prompt_has_the_tokens_of_the_tokenizer_and_a_sample_those_of_its_text_with_one_eos(name):
    tokenizer = tokenizer_of(name)
    renderer, eos = Renderer(tokenizer, "none"), tokenizer.eos_token_id
    for prompt in PROMPTS:
        inference = [*tokenizer(prompt).input_ids]
        inference = inference[:-1] if inference[-1] == eos else inference
        assert rendered(renderer, Prompt(prompt))[0].ids.tolist() == inference
        for completion in COMPLETIONS:
            (sample,) = rendered(renderer, PromptCompletion(prompt, completion))
            whole = [*tokenizer(prompt + completion).input_ids]
            ids = sample.ids.tolist()
            assert ids[: len(inference)] == inference
            assert targets_of(sample) == list(range(max(len(inference), 1), len(ids)))
            if whole[: len(inference)] == inference:  # no token lies across the end of the prompt
                assert ids == whole if whole[-1] == eos else ids == [*whole, eos]


def targets_of(sample: Sample) -> list[int]:
    return [place for place, is_target in enumerate(sample.targets) if is_target]


CHATS = [name for name, kind in KINDS.items() if kind.template or kind.setting != "auto"]


@pytest.mark.parametrize("name", CHATS)
def test_a_conversation_has_the_tokens_of_the_template_and_no_second_bos(name):
    tokenizer, kind = tokenizer_of(name), KINDS[name]
    renderer = Renderer(tokenizer, kind.setting)
    template = renderer.chat_template()
    for question in PROMPTS:
        chat = turns(question, "It is 4, sir.")
        how = {"chat_template": template, "return_dict": False}
        inference = tokenizer.apply_chat_template(chat.messages[:1], add_generation_prompt=True, **how)
        prompt, sample = rendered(renderer, Prompt(Chat(chat.messages[:1], ())), chat)
        assert prompt.ids.tolist() == inference
        assert sample.ids[: len(inference)].tolist() == inference
        whole = tokenizer.apply_chat_template(chat.messages, **how)
        if whole[: len(inference)] == inference:
            assert sample.ids.tolist() == whole
        if kind.bos and kind.bos not in kind.special and kind.bos != "<|im_start|>":
            assert sample.ids.tolist().count(tokenizer.bos_token_id) <= 1
        in_turns = Renderer(tokenizer, kind.setting if kind.setting != "auto" else "tokenizer")
        assert rendered(in_turns, PromptCompletion(question, "It is 4, sir."))[0].ids.tolist() == sample.ids.tolist()


@pytest.mark.parametrize("name", KINDS)
def test_generation_and_the_exported_settings_stop_where_the_target_ended(name, tmp_path):
    tokenizer, kind = tokenizer_of(name), KINDS[name]
    chats = name in CHATS
    renderer = Renderer(tokenizer, kind.setting)
    example = turns(QUESTION, "It is 4") if chats else PromptCompletion(QUESTION, " It is 4")
    (sample,) = rendered(renderer, example)
    learned_end = sample.ids[targets_of(sample)[-1]]
    assert learned_end == tokenizer.convert_tokens_to_ids(kind.end)
    assert set(stop_tokens(renderer, chats=chats)) == {learned_end, tokenizer.eos_token_id}
    base, out = tmp_path / "base", tmp_path / "out"
    LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(base)
    phase = SFT.model_validate(
        {"recipe": "sft", "data": {"train": "rows.jsonl"}, "model": {"path": str(base)}, "batch": 1}
    )
    stops = _write_generation_config(out, phase, str(base), renderer, chats=chats)
    saved = GenerationConfig.from_pretrained(out).eos_token_id
    assert (saved if isinstance(saved, list) else [saved]) == stops
    assert set(stops) == {learned_end, tokenizer.eos_token_id}
    assert not any("generation cannot stop" in note for note in renderer.notes)


def test_generation_stops_where_a_turn_that_calls_tools_ends():
    tokenizer = tokenizer_of("llama-3")
    template = (
        "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
        "{{ '<|end_of_text|>' if m.tool_calls else '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}"
    )
    other = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|begin_of_text|>", chat_template=template
    )
    renderer = Renderer(other)
    names = ["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"]
    assert stop_tokens(renderer, chats=True) == other.convert_tokens_to_ids(names)
    assert not any("tool" in note for note in renderer.notes), "looking for the end leaves no note"


def test_generation_stops_at_the_end_of_a_turn_whose_prompt_begins_thoughts():
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' "
        "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    core = tokenizer_of("qwen2.5 base").backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", chat_template=template)
    renderer = Renderer(tokenizer)
    rendered(renderer, turns(QUESTION, "<think>Two and two.</think>It is 4"))
    assert stop_tokens(renderer, chats=True) == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert not any("where an answer ends" in note for note in renderer.notes)
