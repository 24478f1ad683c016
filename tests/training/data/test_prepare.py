"""From files to a store in one pass, and the store found again."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from training.config import Data
from training.data import prepare as prepare_module
from training.data.files import expand
from training.data.prepare import check_rows, prepare
from training.data.render import Renderer
from training.data.token_store import TokenStore
from training.errors import InputError

SFT = ("prompt_completion", "alpaca", "sharegpt", "messages")
ROWS = [{"prompt": f"{n} + {n} = ", "completion": str(2 * n)} for n in range(30)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """A folder with a tokenizer of single bytes, so that lengths are plain to see."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False)
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
    return str(folder)


def write(path: Path, rows: list) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def run(folder: Path, tokenizer: str, train="a.jsonl", **settings) -> TokenStore:
    data = Data(train=train, **settings)
    return prepare(expand(data.train, folder), data, SFT, tokenizer, folder / "cache", base=folder)


def check(folder: Path, train="a.jsonl", **settings):
    data = Data(train=train, **settings)
    return check_rows(expand(data.train, folder), data, SFT, base=folder)


def refused(call, *arguments, **settings) -> list[str]:
    with pytest.raises(InputError) as caught:
        call(*arguments, **settings)
    return str(caught.value).splitlines()


def content(store: TokenStore) -> list[tuple[list[int], list[bool]]]:
    return [(ids.tolist(), targets.tolist()) for ids, targets in store]


def stores(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("*/meta.json"))


def test_every_row_becomes_a_sample(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ROWS)
    store = run(tmp_path, tokenizer)
    meta = store.meta
    assert (meta.rows, meta.kept, meta.formats, meta.notes) == (30, 30, {"prompt_completion": 30}, [])
    assert (meta.shortest, meta.longest) == (len("0 + 0 = 0") + 1, len("29 + 29 = 58") + 1)
    assert meta.tokens == sum(len(row["prompt"] + row["completion"]) + 1 for row in ROWS) == store.lengths.sum()
    assert meta.target_tokens == sum(len(row["completion"]) + 1 for row in ROWS) == store.target_counts.sum()
    assert store.where(11) == "a.jsonl:12"


def test_batches_make_no_difference(tmp_path, tokenizer, monkeypatch):
    write(tmp_path / "a.jsonl", ROWS)
    whole = [ids.tolist() for ids, _ in run(tmp_path, tokenizer)]
    monkeypatch.setattr(prepare_module, "BATCH_ROWS", 7)
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 40)
    assert [ids.tolist() for ids, _ in run(tmp_path, tokenizer, max_length=99)] == whole


def test_sources_lie_one_after_the_other(tmp_path, tokenizer):
    (tmp_path / "b").mkdir()
    write(tmp_path / "a.jsonl", ROWS[:3])
    write(tmp_path / "b/1.jsonl", ROWS[:2])
    write(tmp_path / "b/2.jsonl", ROWS[:4])
    store = run(tmp_path, tokenizer, train=["b", "a.jsonl"])
    assert store.source_sizes == [6, 3]
    assert [store.where(index) for index in (0, 2, 5, 6)] == ["b/1.jsonl:1", "b/2.jsonl:1", "b/2.jsonl:4", "a.jsonl:1"]


def test_formats_may_mix_in_one_file(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", [ROWS[0], {"instruction": "2 + 2?", "output": "4"}])
    store = run(tmp_path, tokenizer)
    assert store.meta.formats == {"prompt_completion": 1, "alpaca": 1}
    assert "written with the template `plain`" in store.meta.notes[0]


# ── the cache ──


def test_a_store_is_found_again_without_tokenizing(tmp_path, tokenizer, monkeypatch):
    write(tmp_path / "a.jsonl", ROWS)
    first = run(tmp_path, tokenizer)
    monkeypatch.setattr(Renderer, "render", lambda self, examples: pytest.fail("tokenized again"))
    assert run(tmp_path, tokenizer).folder == first.folder


def test_a_copy_of_the_job_folder_finds_the_same_store(tmp_path, tokenizer):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.jsonl", ROWS)
    assert run(tmp_path / "here", tokenizer).folder.name == run(tmp_path / "there", tokenizer).folder.name


def test_other_content_of_equal_size_and_time_makes_another_store(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", ROWS)
    stat = path.stat()
    first = run(tmp_path, tokenizer)
    write(path, [*ROWS[:-1], {"prompt": "29 + 29 = ", "completion": "59"}])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = run(tmp_path, tokenizer)
    assert second[29][0].tolist() != first[29][0].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 99},
        {"overlong": "truncate"},
        {"template": "plain"},
        {"template": "mine"},
        {"format": "prompt_completion"},
    ],
)
def test_other_settings_make_another_store(tmp_path, tokenizer, settings):
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "mine").write_text(
        "{{ messages[0].content }}{% if not add_generation_prompt %}{{ messages[1].content }}{% endif %}"
    )
    assert run(tmp_path, tokenizer, **settings).folder != run(tmp_path, tokenizer).folder


def test_the_text_of_a_template_file_counts(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ROWS)
    text = "{{ messages[0].content }}{% if not add_generation_prompt %}{{ messages[1].content }}{% endif %}"
    (tmp_path / "mine").write_text(text)
    first = run(tmp_path, tokenizer, template="mine")
    (tmp_path / "mine").write_text("Q: " + text)
    assert run(tmp_path, tokenizer, template="mine").lengths[0] == first.lengths[0] + 3


def test_settings_that_leave_the_tokens_alone_keep_the_store(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ROWS)
    assert run(tmp_path, tokenizer, shuffle=False, pack=False).folder == run(tmp_path, tokenizer).folder


def test_a_damaged_store_is_built_anew(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ROWS)
    store = run(tmp_path, tokenizer)
    (store.folder / "tokens.bin").write_bytes(b"1234")
    assert run(tmp_path, tokenizer)[0][0].tolist() == [*TokenStore.open(store.folder)[0][0]]
    assert len(stores(tmp_path)) == 1


def test_a_cache_that_cannot_be_written_is_told(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "cache").write_text("a file")
    assert "cannot read the data or write the token cache" in refused(run, tmp_path, tokenizer)[0]


# ── length ──


def test_long_samples_are_dropped_counted_and_told(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ROWS)
    store = run(tmp_path, tokenizer, max_length=12)
    short = [row for row in ROWS if len(row["prompt"] + row["completion"]) + 1 <= 12]
    assert (store.meta.kept, store.meta.dropped_overlong) == (len(short), 30 - len(short))
    assert store.meta.notes == [f"{30 - len(short)} of 30 samples are longer than 12 tokens and were dropped"]
    assert store.lengths.max() == 12 - 1 + (max(len(row["prompt"] + row["completion"]) for row in short) == 11)


def test_long_samples_are_cut_counted_and_told(tmp_path, tokenizer):
    rows = [*ROWS, {"prompt": "much too long a prompt", "completion": "4"}]
    write(tmp_path / "a.jsonl", rows)
    store = run(tmp_path, tokenizer, max_length=12, overlong="truncate")
    cut = sum(len(row["prompt"] + row["completion"]) + 1 > 12 for row in ROWS)
    meta = store.meta
    assert (meta.kept, meta.truncated, meta.dropped_without_target, meta.longest) == (30, cut, 1, 24)
    assert store.lengths.max() == 12
    assert meta.notes == [
        f"{cut} of 31 samples are longer than 12 tokens and were cut",
        "1 of 31 samples have nothing to learn within 12 tokens and were dropped",
    ]


def test_a_source_without_a_sample_left_is_an_error_with_advice(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}])
    (line,) = refused(run, tmp_path, tokenizer, train=["a.jsonl", "b.jsonl"], max_length=5)
    assert line.startswith("a.jsonl: no sample is left: 30 of 31 samples are longer than 5 tokens and were dropped")
    assert line.endswith("set data.max_length to 13 or data.overlong to truncate")
    assert stores(tmp_path) == []


# ── bad rows ──


def test_every_bad_row_is_told_and_nothing_is_kept(tmp_path, tokenizer):
    bad = ['{"prompt": "a"', {"prompt": "a"}, {"prompt": "a", "completion": 3}, {"prompt": "a", "completion": ""}]
    write(tmp_path / "a.jsonl", [ROWS[0], *bad, ROWS[1]])
    expected = [
        "a.jsonl:2: broken JSON",
        "a.jsonl:3: missing column `completion`",
        "a.jsonl:4: column",
        "a.jsonl:5: column",
    ]
    for lines in (refused(check, tmp_path), refused(run, tmp_path, tokenizer)):
        assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))
    assert stores(tmp_path) == []
    assert [path for path in (tmp_path / "cache").iterdir() if path.name != "digests"] == []


def test_the_first_twenty_bad_rows_are_shown_and_the_others_counted(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", [*ROWS, *[{"prompt": "a", "completion": None}] * 33])
    for lines in (refused(check, tmp_path), refused(run, tmp_path, tokenizer)):
        assert lines[0] == "a.jsonl:31: column `completion` is null"
        assert len(lines) == 21
        assert lines[-1] == "and 13 more bad rows (of 63 rows)"


def test_a_row_that_the_template_refuses_is_a_bad_row(tmp_path, tokenizer):
    turn = {"role": "user", "content": "2 + 2?"}
    write(tmp_path / "a.jsonl", [{"messages": [turn, turn, {"role": "assistant", "content": "4"}]}])
    (line,) = refused(run, tmp_path, tokenizer, template="llama2")
    assert line.startswith("a.jsonl:1: the chat template refuses this conversation: turns must alternate")
    assert check(tmp_path, template="llama2").rows == 1


def test_a_file_without_rows_is_told(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").write_text("\n\n")
    for lines in (
        refused(check, tmp_path, train=["a.jsonl", "b.jsonl"]),
        refused(run, tmp_path, tokenizer, train=["a.jsonl", "b.jsonl"]),
    ):
        assert lines == ["b.jsonl: holds no rows"]


def test_checking_counts_rows_by_format(tmp_path):
    write(tmp_path / "a.jsonl", ROWS)
    findings = check(tmp_path)
    assert (findings.rows, dict(findings.formats)) == (30, {"prompt_completion": 30})


def test_checking_finds_wrong_settings_before_reading(tmp_path):
    write(tmp_path / "a.jsonl", ["broken"])
    assert "data.template" in refused(check, tmp_path, template="chatlm")[0]
    assert "data.columns" in refused(check, tmp_path, columns={"promt": "q"})[0]
    assert "data.format" in refused(check, tmp_path, format="text")[0]


# ── rows that are left out ──

GOOD = [*ROWS[:24], {"prompt": "x", "completion": " "}, *ROWS[24:]]
"""31 rows, of which number 25 has no answer."""


def test_bad_rows_may_be_left_out_up_to_a_limit(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", GOOD)
    store = run(tmp_path, tokenizer, bad_rows={"drop": 0.04})
    assert len(store) == 30
    assert (store.meta.rows, store.meta.dropped_bad) == (31, 1)
    assert store.bad_rows() == [{"row": "a.jsonl:25", "reason": "column `completion` is empty"}]
    assert store.meta.notes[0] == "1 of 31 rows cannot be used and was dropped (data.bad_rows)"
    write(tmp_path / "good.jsonl", ROWS)
    assert [ids.tolist() for ids, _ in store] == [ids.tolist() for ids, _ in run(tmp_path, tokenizer, "good.jsonl")]


def test_more_bad_rows_than_the_limit_are_refused_with_all_of_them(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", [*GOOD, "{"])
    for call in (
        lambda **settings: run(tmp_path, tokenizer, **settings),
        lambda **settings: check(tmp_path, **settings),
    ):
        assert refused(call, bad_rows={"drop": 0.04}) == [
            "a.jsonl:25: column `completion` is empty",
            (
                "a.jsonl:32: broken JSON: Expecting property name enclosed in double quotes (column 1); a row is one "
                "object on one line"
            ),
            "data.bad_rows: 2 of 32 rows are bad (6.25%), more than the 4.00% that may be dropped",
        ]
    assert stores(tmp_path) == []
    assert run(tmp_path, tokenizer, bad_rows={"drop": 0.0625}).meta.dropped_bad == 2


def test_a_row_that_the_template_refuses_may_be_left_out(tmp_path, tokenizer):
    chats = [
        {"messages": [{"role": role, "content": "1"}, {"role": "assistant", "content": "2"}]}
        for role in ("user", "system")
    ]
    write(tmp_path / "a.jsonl", [*chats[:1] * 9, chats[1]])
    (tmp_path / "strict.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    store = run(tmp_path, tokenizer, template=str(tmp_path / "strict.jinja"), bad_rows={"drop": 0.1})
    assert [bad["row"] for bad in store.bad_rows()] == ["a.jsonl:10"]
    assert "refuses this conversation: no system" in store.bad_rows()[0]["reason"]


def test_a_file_that_cannot_be_read_on_is_no_bad_row(tmp_path, tokenizer):
    import gzip

    lines = "".join(json.dumps(row) + "\n" for row in ROWS * 40).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-40])
    (problem,) = refused(run, tmp_path, tokenizer, "a.jsonl.gz", bad_rows={"drop": 0.9})
    assert "the gzip stream ends here, too early" in problem
    assert stores(tmp_path) == []


def test_a_source_of_bad_rows_alone_is_told(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.jsonl", GOOD[24:25])
    (problem,) = refused(run, tmp_path, tokenizer, ["a.jsonl", "b.jsonl"], bad_rows={"drop": 0.5})
    assert problem == (
        "b.jsonl: no sample is left, all its rows cannot be used: 1 of 31 rows cannot be used and was dropped "
        "(data.bad_rows)"
    )


def test_leaving_rows_out_makes_another_store_and_refusing_the_same(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ROWS)
    stores_made = [
        run(tmp_path, tokenizer, **settings).folder
        for settings in ({}, {"bad_rows": "refuse"}, {"bad_rows": {"drop": 0.1}})
    ]
    assert stores_made[0] == stores_made[1] != stores_made[2]


def test_rows_are_counted_by_format_and_source(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ROWS[:2])
    write(tmp_path / "b.jsonl", [*ROWS[:1], {"instruction": "a", "output": "b"}])
    store = run(tmp_path, tokenizer, ["a.jsonl", "b.jsonl"])
    assert store.meta.source_formats == [{"prompt_completion": 2}, {"prompt_completion": 1, "alpaca": 1}]


# ── conversations ──

REWRITING = (
    "{% for m in messages %}{{ m.role[0] + ':' + ('<>' if loop.last and m.role == 'assistant' else '') + m.content + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
"""Writes an answer with its thoughts only as long as nothing follows."""


def conversation(*texts: str, **columns) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)], **columns}


def test_with_turns_all_a_row_gives_a_sample_for_each_answer(tmp_path, tokenizer):
    (tmp_path / "mine").write_text(REWRITING)
    write(tmp_path / "a.jsonl", [conversation("1?", "1", "2?", "2"), conversation("3?", "3")])
    by_setting = {turns: run(tmp_path, tokenizer, template="mine", turns=turns) for turns in ("auto", "last", "all")}
    assert {turns: (store.meta.kept, store.meta.left_out_answers) for turns, store in by_setting.items()} == {
        "auto": (2, 1),
        "last": (2, 1),
        "all": (3, 0),
    }
    assert [by_setting["all"].where(n) for n in range(3)] == ["a.jsonl:1", "a.jsonl:1", "a.jsonl:2"]
    assert (
        by_setting["auto"]
        .meta.notes[-1]
        .startswith("the chat template rewrites earlier answers of a conversation: 1 are not learned; data.turns: all")
    )
    assert by_setting["last"].meta.notes[-1] == "1 earlier answers are not learned (data.turns: last)"
    assert "2 rows became 3 samples" in by_setting["all"].meta.notes[-1]


def test_a_setting_of_turns_without_conversations_is_mentioned(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ROWS)
    (note,) = run(tmp_path, tokenizer, turns="last").meta.notes
    assert note.startswith("data.turns: last changes nothing")


def test_a_setting_of_turns_is_mentioned_where_pairs_are_judged(tmp_path, tokenizer):
    sides = [conversation("1?", answer)["messages"] for answer in ("1", "2")]
    write(tmp_path / "a.jsonl", [{"chosen": sides[0], "rejected": sides[1]}])
    data = Data(train="a.jsonl", turns="all")
    store = prepare(expand(data.train, tmp_path), data, ("preference",), tokenizer, tmp_path / "cache", base=tmp_path)
    assert any("data.turns: all changes nothing" in note for note in store.meta.notes)


def test_what_rows_say_that_is_not_read_is_in_the_notes(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", [conversation("1?", "1", system_prompt="Be brief.")] * 2)
    expected = "column `system_prompt` is not read: set data.columns to {system: system_prompt}"
    assert expected in run(tmp_path, tokenizer).meta.notes
    assert check(tmp_path).notes == [expected]


def parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def with_tool(name: str, **properties: str) -> dict:
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    call = {"type": "function", "function": {"name": name, "arguments": dict.fromkeys(properties, 1)}}
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    return {"messages": messages, "tools": [{"type": "function", "function": {"name": name, "parameters": schema}}]}


def test_tools_from_parquet_are_those_of_json_lines(tmp_path, tokenizer):
    rows = [with_tool("weather", city="integer"), with_tool("add", a="number", b="number")]
    write(tmp_path / "a.jsonl", rows)
    parquet(tmp_path / "a.parquet", rows)
    ours, theirs = (run(tmp_path, tokenizer, train=name) for name in ("a.jsonl", "a.parquet"))
    assert [ids.tolist() for ids, _ in theirs] == [ids.tolist() for ids, _ in ours]
    assert (ours.meta.changes, theirs.meta.changes) == ([], ["nested_nulls"])


def test_a_store_has_another_name_only_where_rows_mean_something_else_than_before(tmp_path, tokenizer):
    plain, flagged = conversation("1?", "1", "2?", "2"), conversation("1?", "1", "2?", "2")
    flagged["messages"][1]["train"] = False
    write(tmp_path / "a.jsonl", [plain])
    write(tmp_path / "b.jsonl", [flagged])
    for name, changes in (("a.jsonl", []), ("b.jsonl", ["flags"])):
        store = run(tmp_path, tokenizer, train=name)
        assert store.meta.changes == changes
        assert (store.meta.hash_before == "") == (not changes)
        assert store.folder.name != store.meta.hash_before
        assert run(tmp_path, tokenizer, train=name).folder == store.folder
    assert len(stores(tmp_path)) == 2


def test_a_store_of_a_version_without_checksums_is_made_anew_under_its_name(tmp_path, tokenizer, caplog):
    write(tmp_path / "a.jsonl", ROWS)
    store = run(tmp_path, tokenizer)
    path, tokens = store.folder / "meta.json", content(store)
    old = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("checksums", "checksum")}
    path.write_text(json.dumps(old))
    again = run(tmp_path, tokenizer)
    assert again.meta.checksums
    assert (again.folder, content(again)) == (store.folder, tokens)
    assert stores(tmp_path) == [path]
    assert not caplog.records


@pytest.mark.parametrize("name", ["tokens.bin", "targets.bin", "meta.json"])
def test_a_store_with_a_turned_bit_is_made_anew_and_a_warning_says_so(tmp_path, tokenizer, caplog, name):
    write(tmp_path / "a.jsonl", ROWS)
    store = run(tmp_path, tokenizer)
    tokens, path = content(store), store.folder / name
    written = bytearray(path.read_bytes())
    written[len(written) // 2] ^= 1
    path.write_bytes(written)
    again = run(tmp_path, tokenizer)
    assert (again.folder, content(again)) == (store.folder, tokens)
    (record,) = caplog.records
    assert "damaged" in record.message
    caplog.clear()
    again.verify()
    assert run(tmp_path, tokenizer).folder == store.folder
    assert not caplog.records


def test_a_store_that_another_process_has_made_anew_meanwhile_is_not_removed(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ROWS)
    store = run(tmp_path, tokenizer)
    damaged = store.folder.stat()
    store.folder.rename(tmp_path / "removed by another process")
    prepare_module._remove(store.folder, damaged)
    again = run(tmp_path, tokenizer)
    prepare_module._remove(again.folder, damaged)
    again.verify()


def test_only_plain_texts_of_a_tokenizer_that_adds_bos_have_another_store(tmp_path, tokenizer):
    with_bos = tmp_path / "adds"
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    bos = [("<s>", loaded.bos_token_id)]
    loaded.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    loaded.save_pretrained(with_bos)
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "chats.jsonl", [{"instruction": "2 + 2?", "output": "4"}])
    plain, old = run(tmp_path, str(with_bos)), run(tmp_path, str(with_bos), bos="none")
    assert plain.meta.tokens == old.meta.tokens + len(ROWS)
    assert plain.meta.hash_before == old.folder.name != plain.folder.name
    assert plain.meta.changes == ["bos"]
    assert run(tmp_path, str(with_bos)).folder == plain.folder
    assert run(tmp_path, str(with_bos), bos="none").folder == old.folder
    for tokens, train in ((tokenizer, "a.jsonl"), (str(with_bos), "chats.jsonl")):
        same, without = run(tmp_path, tokens, train), run(tmp_path, tokens, train, bos="none")
        assert same.folder == without.folder
        assert same.meta.same_without_bos


def test_the_row_of_a_prompt_has_no_nulls_that_parquet_filled_in(tmp_path, tokenizer):
    rows = [
        {"prompt": [{"role": "user", "content": "go"}], "tools": with_tool(*names)["tools"]}
        for names in (("a",), ("b",))
    ]
    rows[0]["tools"][0]["function"]["parameters"]["properties"] = {"city": {"type": "string"}}
    rows[1]["tools"][0]["function"]["parameters"]["properties"] = {"count": {"type": "integer"}}
    parquet(tmp_path / "a.parquet", rows)
    data = Data(train="a.parquet", template="chatml")
    store = prepare(expand(data.train, tmp_path), data, ("prompts",), tokenizer, tmp_path / "cache", base=tmp_path)
    assert [store.row(index) for index in range(2)] == rows


def test_texts_that_end_with_eos_get_no_second_one(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", [{"prompt": "1?", "completion": "1</s>"}])
    store = run(tmp_path, tokenizer)
    assert store.meta.changes == ["eos"]
    assert store[0][0].tolist()[-2] != store[0][0].tolist()[-1]
