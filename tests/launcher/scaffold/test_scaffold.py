"""What `muster init` writes: honest data, flaws as recorded, a tokenizer without surprises,
a model and a job that load."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from launcher import scaffold
from launcher.jobfile import job as jobs
from launcher.scaffold import word_problems
from training.config import SFT
from training.errors import InputError

EQUATION = re.compile(r"(\d+)([+*-])(\d+)=(\d+)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaffold") / "demo"
    scaffold.write(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "model")


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "data" / name).read_text().splitlines()]


def question_of(row: dict[str, str]) -> str:
    return row.get("prompt") or row.get("question") or row["text"].partition("\n")[0]


def numbers(question: str) -> tuple[int, ...]:
    return tuple(sorted(map(int, re.findall(r"\d+", question))))


# --- the independent checker: knows the text of an answer, nothing of how it was made ---------------------------------


def parse(working: str) -> tuple[list[tuple[int, str, int, int]], int]:
    """Equations (left, op, right, result) and the final answer; fails on any other text."""
    *lines, last = working.strip("\n").split("\n")
    found = [EQUATION.fullmatch(line) for line in lines]
    assert all(found), working
    final = re.fullmatch(r"#### (\d+)", last)
    assert final, working
    return [(int(m[1]), m[2], int(m[3]), int(m[4])) for m in found if m], int(final[1])


def holds(equation: tuple[int, str, int, int]) -> bool:
    left, op, right, result = equation
    return {"+": left + right, "-": left - right, "*": left * right}[op] == result


def follows(right: list, wrong: list, start: int, offset: int = 0) -> bool:
    """From `start` on both are the same calculation: an operand differs only
    where it is an earlier result that differs.

    `offset` 1: the wrong working lacks step `start - 1`, so its operands may stand for that step's left one.
    """
    renamed = {(r[3], w[3]) for i, r in enumerate(right) for w in wrong[max(0, i - 1) : i + 1]}
    if offset:
        missing = right[start - 1]
        renamed |= {(missing[3], missing[0])} | {(missing[3], b) for a, b in renamed if a == missing[0]}
    same = all(
        r[1] == w[1] and all(a == b or (a, b) in renamed for a, b in ((r[0], w[0]), (r[2], w[2])))
        for r, w in zip(right[start:], wrong[start - offset :], strict=True)
    )
    return same and all(map(holds, wrong[start - offset :]))


def flaw_of(question: str, right_working: str, wrong_working: str) -> str:
    """The flaw, found by comparing the two workings from the first line in which they differ."""
    right, final = parse(right_working)
    wrong, wrong_final = parse(wrong_working)
    assert wrong_final != final
    assert wrong_final == wrong[-1][3]
    at = next((i for i, (r, w) in enumerate(zip(right, wrong, strict=False)) if r != w), len(wrong))
    if len(wrong) == len(right) - 1:
        assert follows(right, wrong, at + 1, offset=1)
        return "skipped"
    r, w = right[at], wrong[at]
    assert len(wrong) == len(right)
    assert follows(right, wrong, at + 1)
    if r[:3] == w[:3]:
        assert not holds(w)
        return "arithmetic"
    assert holds(w)
    if (r[0], r[2]) == (w[0], w[2]):
        return "operation"
    changed = [(a, b) for a, b in ((r[0], w[0]), (r[2], w[2])) if a != b]
    assert r[1] == w[1]
    assert len(changed) == 1
    assert changed[0][0] in numbers(question)
    assert changed[0][1] not in numbers(question)
    return "number"


# --- data ------------------------------------------------------------------------------------------------------------


def test_worked_answers_use_the_numbers_of_the_question_and_true_arithmetic(folder: Path) -> None:
    for row in rows(folder, "sft.jsonl") + rows(folder, "sft.heldout.jsonl"):
        equations, final = parse(row["completion"])
        assert all(map(holds, equations))
        assert final == equations[-1][3]
        given = Counter(numbers(row["prompt"]))
        operands = Counter(n for left, _, right, _ in equations for n in (left, right))
        results = Counter(result for *_, result in equations[:-1])
        assert operands == given + results, row


def test_answers_without_working_are_those_of_the_steps() -> None:
    for problem in word_problems.take(17, "eval.jsonl"):
        assert int(problem.answer) == parse(problem.working)[1]


KINDS = {"pairs.jsonl": set(word_problems.FLAWS), "sums/pairs.jsonl": set(word_problems.FLAWS) - {"arithmetic"}}


@pytest.mark.parametrize("name", KINDS)
def test_rejected_answers_are_wrong_in_just_the_recorded_way(folder: Path, name: str) -> None:
    pairs = rows(folder, name)
    for row in pairs:
        assert flaw_of(row["prompt"], row["chosen"], row["rejected"]) == row["flaw"], row
    assert min(Counter(row["flaw"] for row in pairs).values()) > len(pairs) / 10
    assert {row["flaw"] for row in pairs} == KINDS[name]


def test_two_in_five_careless_answers_are_wrong(folder: Path) -> None:
    truth = {problem.question: problem.working for problem in word_problems.take(17, "sums/sft.jsonl")}
    careless = rows(folder, "sums/sft.jsonl")
    wrong = [row for row in careless if row["completion"].strip() != truth[row["prompt"]]]
    # Five standard deviations of a share.
    assert len(wrong) / len(careless) == pytest.approx(0.4, abs=5 * (0.24 / len(careless)) ** 0.5)
    kinds = {flaw_of(row["prompt"], truth[row["prompt"]], row["completion"]) for row in wrong}
    assert kinds == KINDS["sums/pairs.jsonl"]


def test_critiques_conclude_what_the_answer_deserves_and_name_the_first_wrong_step(folder: Path) -> None:
    critiques = rows(folder, "critiques.jsonl")
    truth = {problem.question: problem.working for problem in word_problems.take(17, "critiques.jsonl")}
    for row in critiques:
        assert row["critique"].startswith("Critique:\nStep 1: ")
        assert row["critique"].endswith(f"Conclusion: {row['verdict']} [END]")
        assert (row["answer"] == truth[row["question"]]) == (row["verdict"] == "right")
        if row["verdict"] == "right":
            assert row["flaw"] == "none"
            continue
        assert flaw_of(row["question"], truth[row["question"]], row["answer"]) == row["flaw"]
        given, right = (text.split("\n")[:-1] for text in (row["answer"], truth[row["question"]]))
        at = next((i for i, (g, r) in enumerate(zip(given, right, strict=False)) if g != r), len(given))
        assert row["critique"].count("Step") == at + 1
        assert f"Step {at + 1}: " in row["critique"]
        assert " is right" not in row["critique"].split("\n")[at + 1]
    assert 0.45 < sum(row["verdict"] == "right" for row in critiques) / len(critiques) < 0.55


def test_splits_share_no_set_of_numbers_and_files_repeat_no_question(folder: Path) -> None:
    seen: dict[str, set[tuple[int, ...]]] = {"train": set(), "heldout": set(), "eval": set()}
    for name, table in word_problems.TABLES.items():
        questions = [question_of(row) for row in rows(folder, name)]
        assert len(set(questions)) == len(questions) == table.size
        seen[table.split] |= set(map(numbers, questions))
    assert not seen["train"] & seen["heldout"]
    assert not seen["train"] & seen["eval"]
    assert not seen["heldout"] & seen["eval"]


def test_splits_stay_apart_over_seeds() -> None:
    train = {numbers(row["prompt"]) for row in word_problems.rows(1, "prompts.jsonl")}
    other = {numbers(row["question"]) for row in word_problems.rows(2, "eval.jsonl")}
    assert not train & other


def test_another_seed_gives_other_rows() -> None:
    assert word_problems.rows(1, "eval.jsonl") == word_problems.rows(1, "eval.jsonl")
    assert word_problems.rows(1, "eval.jsonl") != word_problems.rows(2, "eval.jsonl")


def test_data_are_thousands_of_rows_in_less_than_eight_megabytes(folder: Path) -> None:
    files = list((folder / "data").rglob("*.jsonl"))
    assert sum(len(path.read_text().splitlines()) for path in files) > 5000
    assert sum(path.stat().st_size for path in files) < 8_000_000


# --- the folder ------------------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    scaffold.write(tmp_path)
    names = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert names == {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert [name for name in sorted(names) if (folder / name).read_bytes() != (tmp_path / name).read_bytes()] == []


def test_a_folder_with_contents_is_refused_unless_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaffold.tiny_model, "save_model", lambda folder, text, seed: 1_000_000)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty"):
        scaffold.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    lines = scaffold.write(tmp_path, force=True)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    assert "  muster run sft.yaml" in lines


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        scaffold.write(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        scaffold.write(tmp_path / "file" / "below")


def test_the_job_is_a_valid_sft_phase_whose_paths_exist(folder: Path) -> None:
    job = yaml.safe_load((folder / "sft.yaml").read_text())
    shared = {key: job[key] for key in ("seed", "model", "resources", "sharding")}
    phase = SFT.model_validate({"recipe": "sft", **shared, **job["phases"]["sft"]})
    assert (phase.resources.workers, phase.sharding.stage, phase.data.template) == (2, 2, "none")
    assert (folder / phase.model.path / "model.safetensors").is_file()
    assert (folder / str(phase.data.train)).is_file()
    assert (folder / str(phase.data.eval)).is_file()


@pytest.mark.parametrize("name", scaffold.JOBS)
def test_every_job_is_valid_and_its_files_are_there(folder: Path, name: str) -> None:
    assert jobs.load(folder / name, ()).phases


# --- tokenizer and model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["a 42 b", " lead", "tail \n", "12+7=19\n#### 19", "don't  do it .", "żółw 你好 🐢\t\x00"]
)
def test_tokens_decode_to_the_very_text(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sample_texts_survive_the_tokenizer_and_fit_the_job(folder: Path, tokenizer) -> None:
    for row in rows(folder, "sft.heldout.jsonl"):
        prompt, completion = tokenizer.encode(row["prompt"]), tokenizer.encode(row["completion"])
        assert tokenizer.decode(prompt) == row["prompt"]
        assert tokenizer.decode(completion) == row["completion"]
        assert prompt + completion == tokenizer.encode(row["prompt"] + row["completion"])
        assert len(prompt) + len(completion) < 100


def test_every_digit_is_a_token(tokenizer) -> None:
    assert tokenizer.tokenize("2026") == ["2", "0", "2", "6"]


def test_special_tokens_differ_and_none_is_added_unasked(tokenizer) -> None:
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert None not in special
    assert len(set(special)) == 3
    assert not set(tokenizer.encode("Mia has 3 pens")) & set(special)


def test_chat_template_says_what_a_row_says(folder: Path, tokenizer) -> None:
    row = rows(folder, "sft.heldout.jsonl")[0]
    user = {"role": "user", "content": row["prompt"]}
    assistant = {"role": "assistant", "content": row["completion"].removeprefix("\n")}
    text = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    assert text == row["prompt"] + row["completion"] + tokenizer.eos_token
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert prompt == row["prompt"] + "\n"


def test_model_loads_with_its_tokenizer_and_is_tiny(folder: Path, tokenizer) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert 500_000 < model.num_parameters() < 6_000_000
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
