"""Recognising rows and turning them into examples."""

import json

import pytest

from training.data.files import RowError
from training.data.formats import FORMATS, Chat, Pair, Parser, Prompt, PromptCompletion, Text
from training.errors import InputError

ALL = tuple(key for key in FORMATS if key != "prompts")
"""No recipe reads prompts beside rows that have answers."""
SFT = ("prompt_completion", "alpaca", "sharegpt", "messages")
USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def parse(row, format="auto", columns=None, allowed=ALL):
    return Parser(format, columns or {}, allowed)(row)


def error(row, **options) -> str:
    with pytest.raises(RowError) as caught:
        parse(row, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"prompt": "2 + 2 = ", "answer": "4"}, Prompt("2 + 2 = ")),
        ({"prompt": [USER]}, Prompt(Chat([USER], ()))),
        ({"prompt": [USER, ANSWER, USER], "tools": []}, Prompt(Chat([USER, ANSWER, USER], ()))),
    ],
)
def test_prompts_are_asked_as_they_stand(row, example):
    assert parse(row, allowed=("prompts",)) == ("prompts", example)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": " "}, "column `prompt` is empty"),
        ({"prompt": []}, "column `prompt`: the last turn is not one that an assistant answers"),
        ({"prompt": [USER, ANSWER]}, "column `prompt`: the last turn is not one that an assistant answers"),
        ({"question": "2 + 2?"}, "Did you mean `columns: {prompt: question}`?"),
        ({"messages": [USER]}, "Did you mean `columns: {prompt: messages}`?"),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused(row, message):
    assert message in error(row, allowed=("prompts",))


@pytest.mark.parametrize(
    ("row", "format", "example"),
    [
        ({"text": "once"}, "text", Text("once")),
        ({"prompt": "2 + 2 = ", "completion": "4"}, "prompt_completion", PromptCompletion("2 + 2 = ", "4")),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt_completion", Chat([USER, ANSWER], (1,))),
        ({"instruction": "2 + 2?", "output": "4"}, "alpaca", Chat([USER, ANSWER], (1,))),
        ({"instruction": "2 + 2?", "input": "", "output": "4"}, "alpaca", Chat([USER, ANSWER], (1,))),
        ({"messages": [USER, ANSWER]}, "messages", Chat([USER, ANSWER], (1,))),
        (
            {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
            "sharegpt",
            Chat([USER, ANSWER], (1,)),
        ),
    ],
)
def test_a_row_is_recognised_by_its_columns(row, format, example):
    assert parse(row) == (format, example)
    assert parse(row, format=format) == (format, example)
    assert parse({**row, "id": 7, "meta": None}) == (format, example)


def test_the_input_of_an_alpaca_row_follows_the_instruction():
    _, chat = parse({"instruction": "Add.", "input": "2, 2", "output": "4"})
    assert chat.messages[0]["content"] == "Add.\n2, 2"


def test_columns_give_the_data_names():
    row = {"question": "2 + 2 = ", "answer": "4"}
    columns = {"prompt": "question", "completion": "answer"}
    assert parse(row, columns=columns)[1] == PromptCompletion("2 + 2 = ", "4")
    assert error({"question": "q", "answer": None}, columns=columns) == "column `answer` is null"


def test_absent_columns_that_parquet_fills_with_null_do_not_count():
    row = {"prompt": None, "completion": None, "messages": [{**USER, "tool_calls": None}, {**ANSWER, "name": None}]}
    assert parse(row) == ("messages", Chat([USER, ANSWER], (1,)))


def test_sharegpt_with_system_and_tools():
    turns = [("human", "2 + 2?"), ("function_call", '{"name": "add", "arguments": {"a": 2}}')]
    turns += [("observation", "4"), ("gpt", "It is 4.")]
    row = {
        "system": "Be brief.",
        "tools": json.dumps([TOOL["function"]]),
        "conversations": [{"from": sender, "value": value} for sender, value in turns],
    }
    _, chat = parse(row)
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert chat.messages[2] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert (chat.loss_turns, chat.tools) == ((2, 4), [TOOL])


def test_openai_messages_with_tools_and_parts():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]
    asked, called = {"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "1", "content": "4"}
    _, chat = parse({"messages": [asked, called, result, ANSWER], "tools": [TOOL]})
    assert chat.messages[0] == USER
    assert chat.messages[1]["tool_calls"] == [{"id": "1", **CALL}]
    assert chat.messages[2] == result
    assert chat.loss_turns == (1, 3)


def test_only_the_completion_of_message_lists_is_learnt():
    _, chat = parse({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert chat.loss_turns == (3,)


def test_a_turn_of_weight_zero_and_one_that_opens_are_not_learnt():
    _, chat = parse({"messages": [ANSWER, USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]})
    assert chat.loss_turns == (4,)
    assert chat.messages[2] == ANSWER


def sharegpt(*turns: tuple[str, str, dict]) -> dict:
    return {"conversations": [{"from": sender, "value": value, **more} for sender, value, more in turns]}


@pytest.mark.parametrize("flag", [{"train": False}, {"loss": False}, {"weight": 0}, {"weight": 0.0}, {"train": 0}])
@pytest.mark.parametrize("sender", ["gpt", "assistant", "model"])
def test_a_message_that_is_marked_is_not_learned(flag, sender):
    openai = {"messages": [USER, {**ANSWER, **flag}, USER, {**ANSWER, "train": True, "weight": 1}]}
    ours = sharegpt(("human", "2 + 2?", {}), (sender, "4", flag), ("user", "2 + 2?", {}), (sender, "4", {"loss": True}))
    split = {"prompt": [USER], "completion": [{**ANSWER, **flag}, USER, ANSWER]}
    for row in (openai, ours, split):
        assert parse(row)[1] == Chat([USER, ANSWER, USER, ANSWER], (3,))


@pytest.mark.parametrize(
    ("message", "error_text"),
    [
        ({"weight": 0.5}, "messages[1].weight: expected 0 or 1, got a number (0.5)"),
        ({"weight": "1"}, "messages[1].weight: expected 0 or 1, got text"),
        ({"train": "no"}, "messages[1].train: expected true or false, got text"),
        ({"loss": 0.3}, "messages[1].loss: expected true or false, got a number (0.3)"),
        ({"weight": 1, "train": False}, "messages[1]: `weight` and `train` contradict each other"),
        ({"train": True, "loss": False}, "messages[1]: `train` and `loss` contradict each other"),
    ],
)
def test_flags_that_mean_nothing_or_contradict_each_other_are_refused(message, error_text):
    assert error({"messages": [USER, {**ANSWER, **message}]}) == error_text


def remarks(*rows, allowed=ALL, **options) -> list[str]:
    parser = Parser("auto", {}, allowed)
    for row in rows:
        parser(row, **options)
    return parser.remarks.notes


def test_an_answer_that_opens_a_conversation_is_mentioned():
    (note,) = remarks({"messages": [ANSWER, USER, ANSWER]})
    assert note == "assistant messages that open a conversation are not learned: nothing asks for them"
    assert remarks({"messages": [{**ANSWER, "weight": 0}, USER, ANSWER]}) == []


def test_flags_without_effect_are_mentioned():
    (note,) = remarks({"messages": [{**USER, "train": True}, ANSWER]})
    assert note.startswith("`train` in messages that are not the assistant's has no effect")
    (note,) = remarks({"prompt": [USER, {**ANSWER, "weight": 1}, USER], "completion": [ANSWER]})
    assert "belong to the prompt are not learned" in note


def test_the_answer_to_judge_cannot_be_one_that_is_not_learned():
    row = {"prompt": [USER], "chosen": [{**ANSWER, "train": False}], "rejected": [{**ANSWER, "content": "5"}]}
    assert "column `chosen`: the last message has weight 0 (or train, loss: false)" in error(row)
    earlier = [USER, {**ANSWER, "weight": 0}, USER]
    row = {"chosen": [*earlier, ANSWER], "rejected": [*earlier, {**ANSWER, "content": "5"}]}
    assert parse(row)[1].chosen.loss_turns == (3,)


def test_system_and_history_of_an_alpaca_row_come_first_and_the_answers_of_the_history_are_learned():
    row = {
        "system": "Be brief.",
        "history": [["2 + 2?", "4"], ["2 + 2?", "4"]],
        "instruction": "2 +",
        "input": "2?",
        "output": "4",
    }
    _, chat = parse(row)
    asked = {"role": "user", "content": "2 +\n2?"}
    assert chat == Chat(
        [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER, ANSWER, asked, ANSWER], (2, 4, 6)
    )
    assert parse({"system": "", "history": None, "instruction": "2 + 2?", "output": "4"})[1] == Chat(
        [USER, ANSWER], (1,)
    )


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ("2 + 2? 4", "column `history`: expected a list, got text"),
        ([["2 + 2?"]], "column `history`[0]: expected a question and its answer, [text, text], got 1 of them"),
        ([["2 + 2?", 4]], "column `history`[0]: expected text, got a number (4)"),
        ([["2 + 2?", " "]], "column `history`[0]: the answer is empty"),
    ],
)
def test_a_history_that_holds_no_pairs_is_refused(history, message):
    assert error({"instruction": "2 + 2?", "output": "4", "history": history}) == message


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("first", [[], [SYSTEM]])
def test_a_system_column_beside_messages_stands_there_once(first):
    _, chat = parse({"system": "Be brief.", "messages": [*first, USER, ANSWER]})
    assert chat == Chat([SYSTEM, USER, ANSWER], (2,))
    turns = [("system", "Be brief.", {})] if first else []
    _, chat = parse({"system": "Be brief.", **sharegpt(*turns, ("human", "2 + 2?", {}), ("gpt", "4", {}))})
    assert chat == Chat([SYSTEM, USER, ANSWER], (2,))


def test_two_different_system_messages_are_refused():
    row = {"system": "Be long.", "messages": [SYSTEM, USER, ANSWER]}
    assert error(row) == "column `system` and the first message are two different system messages; give one of them"


# ── what is not read ──

PLAIN_ROW = {"prompt": "2 + 2 = ", "completion": "4"}


@pytest.mark.parametrize(
    ("row", "note"),
    [
        (
            {"messages": [USER, ANSWER], "system_prompt": "Be brief."},
            "column `system_prompt` is not read: set data.columns to {system: system_prompt}",
        ),
        (
            {"instruction": "2?", "output": "2", "chat_history": [["a", "b"]]},
            "set data.columns to {history: chat_history}",
        ),
        (
            {"messages": [USER, ANSWER], "history": [["a", "b"]]},
            "column `history` is not read: messages has no column `history`",
        ),
        (
            {"messages": [USER, ANSWER], "mask": [0, 1]},
            "column `mask` is not read: parts are left out of the loss by `weight: 0`",
        ),
        ({"messages": [USER, {**ANSWER, "masked": True}]}, "key `masked` in `messages` is not read"),
        (
            sharegpt(("human", "a", {}), ("gpt", "b", {"train_on_turn": False})),
            "key `train_on_turn` in `conversations` is not read",
        ),
        ({**PLAIN_ROW, "weight": 0.5}, "column `weight` is not read: sources are weighted"),
        (
            {**PLAIN_ROW, "reasoning": "two and two"},
            "column `reasoning` is not read: thoughts are learned where they stand in the answer",
        ),
        ({**PLAIN_ROW, "label": False}, "column `label` is not read"),
        ({**PLAIN_ROW, "context": "Sums."}, "column `context` is not read: it is no part of the prompt"),
        ({"question": "2 + 2?", "chosen": "4", "rejected": "5"}, "set data.columns to {prompt: question}"),
        (
            {"prompt": "2 + 2?", "input": "a", "chosen": "4", "rejected": "5"},
            "column `input` is not read: the question stands in the prompt",
        ),
        (
            {**PLAIN_ROW, "messages": [USER, ANSWER]},
            "column `messages` is not read: the row holds two forms; set data.format to choose",
        ),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, "column `images` is not read: only text is learned"),
    ],
)
def test_columns_and_keys_that_look_meant_are_mentioned_once(row, note):
    (told,) = remarks(row, row)
    assert note in told


@pytest.mark.parametrize(
    "row",
    [
        {**PLAIN_ROW, "id": 7, "source": "web", "loss": 0.53, "label": "sums", "question": "2 + 2", "weight": None},
        {"messages": [USER, {**ANSWER, "name": "bot", "id": 3}], "tools": [], "score": 0.5, "system": None},
        {"text": "once", "label": True, "images": ["a.png"]},
        {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5", "question": "2 + 2", "score_chosen": 0.5},
    ],
)
def test_metadata_is_not_mentioned(row):
    assert remarks(row) == []


def test_columns_beside_prompts_go_to_reward_functions_and_are_not_mentioned():
    assert remarks({"prompt": [USER], "label": True, "weight": 2, "history": ["a"]}, allowed=("prompts",)) == []


# ── nulls of Parquet ──

FULL_TOOL = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": None}}}


def test_nulls_that_arrow_fills_in_are_removed_at_every_depth_and_those_of_json_stay():
    call = {"function": {"name": "add", "arguments": {"a": {"x": 1, "y": None}, "b": None}}}
    row = {
        "messages": [{**USER, "tool_calls": None}, {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": [FULL_TOOL],
    }
    _, from_json = parse(row)
    assert from_json.tools[0]["function"] == FULL_TOOL
    assert from_json.messages[1]["tool_calls"][0]["function"]["arguments"] == call["function"]["arguments"]
    parser = Parser("auto", {}, ALL)
    _, from_parquet = parser(row, from_arrow=True)
    assert from_parquet.tools[0]["function"]["parameters"]["properties"] == {"a": {"type": "number"}}
    assert from_parquet.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": {"x": 1}}
    assert "nested_nulls" in parser.remarks.changes
    assert row["tools"] == [FULL_TOOL]


def test_nulls_in_lists_and_in_json_that_is_text_stay():
    schema = {"name": "add", "parameters": {"enum": [None, "a"]}}
    row = {"messages": [USER, ANSWER], "tools": [schema, json.dumps({**schema, "parameters": {"default": None}})]}
    _, chat = parse({**row, "tools": [schema]}, allowed=ALL)
    assert chat.tools[0]["function"] == schema
    _, chat = Parser("auto", {}, ALL)({**row, "tools": json.dumps([FULL_TOOL])}, from_arrow=True)
    assert chat.tools[0]["function"] == FULL_TOOL


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": None}, "column `completion` is null"),
        ({"prompt": "a", "completion": 12}, "column `completion`: expected text, got a number (12)"),
        ({"prompt": "a", "completion": True}, "column `completion`: expected text, got true"),
        ({"prompt": "a", "completion": " \n"}, "column `completion` is empty"),
        ({"prompt": "a", "completion": [USER]}, "no assistant turn to learn: there is none"),
        ({"prompt": "a \ud83d", "completion": "b"}, "half of a surrogate pair"),
        ({"instruction": "a", "output": ""}, "column `output` is empty"),
        ({"messages": "hello"}, "column `messages`: expected a list, got text"),
        ({"messages": ["hello"]}, "messages[0]: expected an object, got text"),
        ({"messages": []}, "no assistant turn to learn: there is none"),
        ({"messages": [ANSWER]}, "no assistant turn to learn: all open the conversation"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "assistant turn is empty (messages[1])"),
        ({"messages": [USER, {"role": "bot", "content": "4"}]}, "messages[1]: unknown role 'bot'; known are system"),
        ({"messages": [USER, {"content": "4"}]}, "messages[1]: missing key `role`"),
        ({"messages": [{"role": "user"}, ANSWER]}, "messages[0]: missing `content`"),
        ({"messages": [{"role": "user", "content": 2}, ANSWER]}, "messages[0].content: expected text, got a number"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
            "messages[0].content[0]: only parts",
        ),
        ({"messages": [USER, {**ANSWER, "tool_calls": 3}]}, "messages[1].tool_calls: expected a list"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, "messages[1].tool_calls[0]: missing key `name`"),
        ({"messages": [USER, ANSWER], "tools": "[{]"}, "column `tools`: broken JSON"),
        ({"messages": [USER, ANSWER], "tools": [3]}, "column `tools`[0]: expected an object"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "no assistant turn to learn"),
        ({"conversations": [{"from": "gpt4", "value": "a"}]}, "unknown role 'gpt4'; known are system, human"),
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, "conversations[0].from: expected text, got a list"),
        ({"conversations": [USER, ANSWER]}, "missing key `from`; it has role, content; these are OpenAI messages"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]},
            "assistant turn is empty",
        ),
        ({"conversations": [{"from": "function_call", "value": "add 2 2"}]}, "conversations[0].value: broken JSON"),
    ],
)
def test_a_row_that_means_nothing_says_why(row, message):
    assert message in error(row)


def test_a_missing_column_is_named_with_those_that_are_there():
    assert error({"prompt": "a", "id": 1}, format="prompt_completion") == (
        "missing column `completion`; the row has prompt, id"
    )
    assert "missing column `completion`; the row has prompt, id; prompt_completion needs" in error(
        {"prompt": "a", "id": 1}
    )


def test_unknown_columns_come_with_a_mapping_to_try():
    message = error({"question": "a", "answer": "b"}, allowed=SFT)
    assert "no format fits the columns question, answer" in message
    assert "alpaca needs instruction and output" in message
    assert message.endswith("Did you mean `columns: {prompt: question, completion: answer}`?")
    assert "{completion: response}" in error({"prompt": "a", "response": "b"}, allowed=SFT)


def test_a_mapped_column_that_is_absent_gets_a_suggestion():
    message = error({"question": "a", "answer": "b"}, columns={"prompt": "questoin", "completion": "answer"})
    assert message.startswith("missing column `questoin` (data.columns: prompt)")
    assert message.endswith("did you mean question?")


def test_a_row_for_another_recipe_says_so():
    assert "columns of `text`, which is for pretrain; this recipe reads" in error({"text": "once"}, allowed=SFT)


def test_settings_that_no_row_can_meet_are_refused_at_once():
    with pytest.raises(InputError) as caught:
        Parser("text", {"promt": "question"}, SFT)
    assert "data.format: this recipe does not read `text`; it reads prompt_completion" in str(caught.value)
    with pytest.raises(InputError, match="`promt` is no column of a format; did you mean prompt"):
        Parser("auto", {"promt": "question"}, SFT)


# ── critiques ──

CRITIQUE = {
    "question": "2 + 2?",
    "answer": "5",
    "critique": "Critique: no. Conclusion: wrong [END]",
    "verdict": "wrong",
}
REQUEST = (
    "Please critique whether the following solution to the question is correct.\nQuestion:\n2 + 2?\n\nSolution:\n5"
)


def test_a_critique_is_asked_for_in_the_published_form():
    turns = [{"role": "user", "content": REQUEST}, {"role": "assistant", "content": CRITIQUE["critique"]}]
    assert parse(CRITIQUE) == ("critique", Chat(turns, (1,)))
    published = {
        "instruction": REQUEST.partition("\n")[0], "input": REQUEST.partition("\n")[2], "output": CRITIQUE["critique"]
    }  # fmt: skip
    assert parse(published, allowed=("critique", "alpaca")) == ("alpaca", Chat(turns, (1,)))


@pytest.mark.parametrize("said", ["wrong", "Incorrect", False])
def test_a_verdict_may_be_said_in_several_ways(said):
    assert parse({**CRITIQUE, "verdict": said})[0] == "critique"


def test_a_verdict_that_is_none_or_contradicts_the_critique_is_refused():
    assert "expected right or wrong, got text" in error({**CRITIQUE, "verdict": "perhaps"})
    assert error({**CRITIQUE, "verdict": "right"}) == "the critique concludes wrong, column `verdict` says right"


# ── preferences ──

HH = "\n\nHuman: 2 + 2?\n\nAssistant: {}"
PAIR_OF_CHATS = Pair(Chat([USER, ANSWER], (1,)), Chat([USER, {"role": "assistant", "content": "5"}], (1,)))


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        (
            {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5", "margin": 0.5},
            Pair(PromptCompletion("2 + 2 = ", "4"), PromptCompletion("2 + 2 = ", "5"), 0.5),
        ),
        ({"chosen": HH.format("4"), "rejected": HH.format("5")}, PAIR_OF_CHATS),
        ({"chosen": HH.format("4").lstrip(), "rejected": HH.format("5")}, PAIR_OF_CHATS),
        ({"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "5"}]}, PAIR_OF_CHATS),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "5"}]}, PAIR_OF_CHATS),
        (
            {"prompt": "2 + 2?", "chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "5"}]},
            PAIR_OF_CHATS,
        ),
        (
            {
                "conversations": [{"from": "human", "value": "2 + 2?"}],
                "chosen": {"from": "gpt", "value": "4"},
                "rejected": {"from": "gpt", "value": "5"},
            },
            PAIR_OF_CHATS,
        ),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}], "chosen": "4", "rejected": "5"}, PAIR_OF_CHATS),
        ({"chosen": "a good text", "rejected": "a bad one"}, Pair(Text("a good text"), Text("a bad one"))),
    ],
)
def test_preferences(row, pair):
    assert parse(row, allowed=("sharegpt_preference", "preference"))[1] == pair


FIVE = {"role": "assistant", "content": "5"}
ASKED = HH.format("").rstrip()


def pair_of(chosen, rejected) -> Pair:
    return Pair(Chat(chosen, (len(chosen) - 1,)), Chat(rejected, (len(rejected) - 1,)))


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, FIVE]}, PAIR_OF_CHATS),
        (
            {"prompt": [SYSTEM, USER], "chosen": [USER, ANSWER], "rejected": [USER, FIVE]},
            pair_of([SYSTEM, USER, ANSWER], [SYSTEM, USER, FIVE]),
        ),
        (
            {"prompt": [USER], "chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, FIVE]},
            pair_of([SYSTEM, USER, ANSWER], [SYSTEM, USER, FIVE]),
        ),
        (
            {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, FIVE]},
            pair_of([SYSTEM, USER, ANSWER], [SYSTEM, USER, FIVE]),
        ),
        (
            {"prompt": ASKED, "chosen": ASKED + " 4", "rejected": ASKED + " 5"},
            Pair(PromptCompletion(ASKED, " 4"), PromptCompletion(ASKED, " 5")),
        ),
        (
            {"prompt": ASKED + " ", "chosen": ASKED.lstrip() + " 4", "rejected": ASKED + " 5"},
            Pair(PromptCompletion(ASKED + " ", "4"), PromptCompletion(ASKED + " ", "5")),
        ),
        ({"prompt": "2 + 2?", "chosen": HH.format("4"), "rejected": HH.format("5")}, PAIR_OF_CHATS),
        (
            {"prompt": "2 + 2 =", "chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"},
            Pair(PromptCompletion("2 + 2 =", " 4"), PromptCompletion("2 + 2 =", " 5")),
        ),
        (
            {
                "conversations": [{"from": "human", "value": "2 + 2?"}],
                "chosen": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}],
                "rejected": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "5"}],
            },
            PAIR_OF_CHATS,
        ),
    ],
)
def test_a_prompt_that_the_answers_repeat_stands_once(row, pair):
    parser = Parser("auto", {}, ("sharegpt_preference", "preference"))
    assert parser(row)[1] == pair
    assert parser.remarks.notes == ["the answers of some rows begin with their prompt, which is written once"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [FIVE]},
        {"prompt": "2 + 2?", "chosen": [USER, ANSWER], "rejected": [FIVE]},
        {"prompt": ASKED, "chosen": ASKED + " 4", "rejected": " 5"},
    ],
)
def test_a_prompt_that_one_answer_alone_repeats_is_refused(row):
    assert (
        error(row)
        == "column `chosen` begins with the prompt, column `rejected` does not; give both with it or both without"
    )


def test_answers_without_the_prompt_follow_a_prompt_that_is_a_text():
    assert parse({"prompt": "2 + 2?", "chosen": [ANSWER], "rejected": [FIVE]})[1] == PAIR_OF_CHATS


def test_a_single_word_that_prompt_and_answer_share_is_chance():
    row = {"prompt": "The", "chosen": "The cat", "rejected": "Their cat"}
    assert parse(row)[1] == Pair(PromptCompletion("The", "The cat"), PromptCompletion("The", "Their cat"))


def test_a_completion_of_messages_that_repeats_its_prompt_is_learned_once():
    row = {"prompt": [SYSTEM, USER, ANSWER, USER], "completion": [USER, ANSWER, USER, ANSWER]}
    assert parse(row)[1] == Chat([SYSTEM, USER, ANSWER, USER, ANSWER], (4,))
    assert "which stands there twice" in remarks({"prompt": "2 + 2 =", "completion": "2 + 2 = 4"})[0]


def test_different_system_messages_in_prompt_and_answer_are_refused():
    other = {"role": "system", "content": "Be long."}
    row = {"prompt": [SYSTEM, USER], "completion": [other, USER, ANSWER]}
    assert "begin with different system messages" in error(row)


def test_a_transcript_of_several_turns_is_judged_at_its_end():
    text = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: 2 + 2?\n\nAssistant: 4"
    chosen = parse({"chosen": text, "rejected": text + "0"})[1].chosen
    assert [turn["role"] for turn in chosen.messages] == ["user", "assistant", "user", "assistant"]
    assert chosen.loss_turns == (3,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected": "4"}, "columns `chosen` and `rejected` are the same: nothing is preferred"),
        ({"margin": -1}, "column `margin`: expected a number of at least 0, got a number (-1)"),
        ({"margin": "much"}, "column `margin`: expected a number of at least 0, got text"),
        ({"chosen": " "}, "column `chosen` is empty"),
        ({"rejected": None}, "column `rejected` is null"),
        (
            {"prompt": None, "chosen": HH.format("4") + "\n\nHuman: thanks"},
            "does not end with an answer of the assistant",
        ),
        ({"prompt": [USER], "chosen": [USER]}, "the last turn is not the assistant's"),
    ],
)
def test_pairs_that_teach_nothing_are_refused(changes, message):
    assert message in error({"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5", **changes})


def test_a_row_of_another_recipe_says_whose_it_is():
    told = error(CRITIQUE, allowed=SFT)
    assert told.startswith("these are columns of `critique`, which is for cft; this recipe reads rows where")
    assert "which is for sft" in error({"prompt": "a", "completion": "b"}, allowed=("text",))
    assert "which is for reward" in error({"chosen": "a", "rejected": "b"}, allowed=("text",))


@pytest.mark.parametrize(
    ("row", "same_as"),
    [
        ({"messages": json.dumps([USER, ANSWER]), "tools": ""}, {"messages": [USER, ANSWER]}),
        ({"messages": [USER, ANSWER], "tools": json.dumps([TOOL])}, {"messages": [USER, ANSWER], "tools": [TOOL]}),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "0.5"},
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5},
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": ""},
            {"prompt": "a", "chosen": "b", "rejected": "c"},
        ),
        (
            {"question": "a", "answer": "b", "critique": "c", "verdict": ""},
            {"question": "a", "answer": "b", "critique": "c"},
        ),
        ({"instruction": "a", "input": "", "output": "b"}, {"instruction": "a", "output": "b"}),
    ],
)
def test_cells_of_a_table_mean_what_they_would_in_json(row, same_as):
    assert parse(row) == parse(same_as)


def test_a_cell_that_begins_as_a_list_and_is_none_is_told():
    assert "column `messages`: broken JSON in the text" in error({"messages": "[{"}, allowed=SFT)


@pytest.mark.parametrize(
    ("row", "same_as"),
    [
        ({"prompt": [USER], "completion": "4"}, {"prompt": [USER], "completion": [ANSWER]}),
        ({"prompt": "2 + 2?", "completion": [ANSWER]}, {"prompt": [USER], "completion": [ANSWER]}),
        ({"prompt": "2 + 2?", "completion": ANSWER}, {"prompt": [USER], "completion": [ANSWER]}),
        (
            {"prompt": [USER], "chosen": "4", "rejected": "5"},
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "5"}]},
        ),
        (
            {"prompt": "2 + 2?", "chosen": ANSWER, "rejected": {**ANSWER, "content": "5"}},
            {"prompt": [USER], "chosen": "4", "rejected": "5"},
        ),
        (
            {"instruction": "a", "output": "b", "history": '[["c", "d"]]'},
            {"instruction": "a", "output": "b", "history": [["c", "d"]]},
        ),
        ({"instruction": "", "input": "a", "output": "b"}, {"instruction": "a", "output": "b"}),
        ({"instruction": "2 + 2?", "chosen": "4", "rejected": "5"}, {"prompt": [USER], "chosen": "4", "rejected": "5"}),
        (
            {
                "instruction": "Add.",
                "input": "2",
                "history": [["a", "b"]],
                "system": "S",
                "chosen": "4",
                "rejected": "5",
            },
            {
                "prompt": [{**USER, "content": "a"}, {**ANSWER, "content": "b"}, {**USER, "content": "Add.\n2"}],
                "system": "S",
                "chosen": "4",
                "rejected": "5",
            },
        ),
        ({"messages": [USER, ANSWER], "tools": "null"}, {"messages": [USER, ANSWER]}),
        (
            {"prompt": json.dumps([USER]), "chosen": "4", "rejected": "5"},
            {"prompt": [USER], "chosen": "4", "rejected": "5"},
        ),
        (
            {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},
            {"prompt": [USER], "completion": [ANSWER]},
        ),
        ({"messages": {"role": ["user", "assistant"], "content": ["2 + 2?", "4"]}}, {"messages": [USER, ANSWER]}),
        (
            {
                "messages": [
                    USER,
                    {"role": "tool_call", "content": json.dumps(CALL["function"])},
                    {"role": "tool_response", "content": "4"},
                    ANSWER,
                ]
            },
            {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}, ANSWER]},
        ),
        (
            {"messages": [USER, {**ANSWER, "function_call": {"name": "add", "arguments": '{"a": 2}'}}]},
            {"messages": [USER, {**ANSWER, "tool_calls": [CALL]}]},
        ),
    ],
)
def test_other_tools_ways_to_write_a_row_mean_the_same(row, same_as):
    assert parse(row) == parse(same_as)


@pytest.mark.parametrize("role", ["function", "ipython"])
def test_roles_of_tool_results_reach_the_template_as_they_are(role):
    _, chat = parse({"messages": [USER, {"role": role, "name": "add", "content": "4"}, ANSWER]})
    assert chat.messages[1] == {"role": role, "name": "add", "content": "4"}


def test_arguments_that_are_no_json_stay_the_text_that_they_are():
    parser = Parser("messages", {}, ("messages",))
    for given in ("2 and 2", "[2, 2]"):
        call = {"name": "add", "arguments": given}
        _, chat = parser({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
        assert chat.messages[1]["tool_calls"][0]["function"] == call
    assert parser.remarks.notes == [
        "arguments of some tool calls are no JSON objects; they are written as the text that they are"
    ]


def test_a_system_message_beside_texts_is_kept_for_those_who_put_them_into_turns():
    _, pair = parse({"prompt": "a", "chosen": "b", "rejected": "c", "system": "Be brief."})
    assert pair == Pair(PromptCompletion("a", "b", "Be brief."), PromptCompletion("a", "c", "Be brief."))
    assert parse({"prompt": "a", "system": "Be brief."}, allowed=("prompts",))[1] == Prompt("a", "Be brief.")
    system = {"role": "system", "content": "Be brief."}
    _, chat = parse({"prompt": [USER], "system": "Be brief."}, allowed=("prompts",))
    assert chat == Prompt(Chat([system, USER], ()))
    _, chat = parse({"prompt": [USER], "completion": [ANSWER], "system": "Be brief."})
    assert chat == Chat([system, USER, ANSWER], (2,))
    _, pair = parse({"prompt": "2 + 2?", "chosen": [ANSWER], "rejected": "5", "system": "Be brief."})
    assert pair.chosen == Chat([system, USER, ANSWER], (2,))


@pytest.mark.parametrize(
    ("row", "note"),
    [
        (
            {"prompt": "a", "completion": "b", "tools": [TOOL]},
            "column `tools` is not read beside plain texts; give the rows as messages",
        ),
        (
            {"chosen": "b", "rejected": "c", "system": "S"},
            "column `system` is not read beside answers without a prompt",
        ),
    ],
)
def test_columns_that_texts_have_no_place_for_are_mentioned(row, note):
    parser = Parser("auto", {}, ALL)
    parser(row)
    assert parser.remarks.notes == [note]


def test_pairs_of_different_questions_are_mentioned():
    parser = Parser("auto", {}, ALL)
    other = {"role": "user", "content": "3 + 3?"}
    parser({"chosen": [USER, ANSWER], "rejected": [other, ANSWER]})
    assert parser.remarks.notes == [
        "columns `chosen` and `rejected` answer different questions in some rows, so they cannot be compared"
    ]


def test_a_conversation_beside_answers_that_are_texts_is_mentioned():
    parser = Parser("auto", {}, ("sharegpt_preference", "preference"))
    parser({"messages": [USER], "chosen": "4", "rejected": "5"})
    whole = {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "5"}], "messages": [USER, ANSWER]}
    parser(whole)
    assert parser.remarks.notes == [
        "column `messages` is not read: set data.columns to {prompt: messages} if it is the question"
    ]
