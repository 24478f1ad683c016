"""The sweep over architectures: twelve of them here, and the page that it writes."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import pytest

from benchmarks import architecture_page
from benchmarks.architecture_columns import COLUMNS, Architecture, Cell
from benchmarks.architectures import figures_of, look_at

ROOT = Path(__file__).parents[2]
TWELVE = (
    "llama", "qwen2", "gemma2", "opt", "bloom", "falcon", "gpt2", "gpt_neox", "mixtral", "mamba", "llama4_text",
    "jamba",
)  # fmt: skip
"""Of different kinds: positions rotated, learned, or none; tied heads, mixtures of experts,
states in place of attention."""


@pytest.mark.cpu
@pytest.mark.parametrize("model_type", TWELVE)
def test_an_architecture_is_right_in_every_column_or_says_what_is_not(model_type, tmp_path):
    found = look_at(model_type, tmp_path)
    assert found.not_built == ""
    assert {name: cell for name, cell in found.cells.items() if cell.verdict in ("WRONG", "crash")} == {}
    assert found.cells.keys() == COLUMNS.keys()
    assert found.cells["SFT"].verdict != "refused"


@pytest.mark.cpu
def test_an_architecture_that_takes_too_long_is_a_crash(tmp_path):
    found = look_at("llama", tmp_path, limit_s=0)
    assert set(found.cells.values()) == {Cell("crash", "took more than 0 s")}


def test_the_page_is_of_the_transformers_that_is_pinned():
    pinned = re.search(r"^transformers==(\S+)", (ROOT / ".ci" / "cpu.lock").read_text(), re.MULTILINE)
    page = architecture_page.PAGE.read_text(encoding="utf-8")
    assert pinned is not None
    assert f"of transformers {pinned[1]}." in page, "run `python -m benchmarks architectures`"


def made(model_type: str, **cells: Cell) -> Architecture:
    return Architecture(model_type, {name: cells.get(name, Cell("yes")) for name in COLUMNS})


FOUND = [
    made("llama", LoRA=Cell("yes", layers="`q_proj`")),
    made("opt", packed=Cell("another way", "one sample\na row"), LoRA=Cell("yes", layers="`q_proj`")),
    made("bloom", packed=Cell("another way", "one sample a row"), reward=Cell("WRONG", "the loss is 1, not 2")),
    Architecture("git", not_built="a model of images"),
]


def test_the_page_has_a_row_for_every_architecture_and_each_note_once():
    page = architecture_page.text_of(FOUND, "5.0", date(2026, 11, 29))
    assert "transformers 5.0. Written on 2026-11-29" in page
    assert "| `opt` | yes | yes | another way (1) | yes | yes | yes | yes | yes |" in page
    assert "| `bloom` | yes | yes | another way (1) | yes | yes | WRONG (2) | yes | yes |" in page
    assert page.count("1. one sample a row\n2. the loss is 1, not 2\n") == 1
    assert "| `q_proj` | `llama`, `opt` |" in page
    assert "| `git` | a model of images |" in page
    assert "| another way | 0 | 0 | 2 | 0 | 0 | 0 | 0 | 0 |" in page


def test_the_figures_count_each_column_and_name_every_fault():
    figures = figures_of(FOUND)
    assert figures["architectures"] == 3
    assert figures["columns"]["packed"] == {"yes": 1, "another way": 2}
    assert figures["faults"] == {"bloom": {"reward": "WRONG: the loss is 1, not 2"}}
    assert figures["not_built"] == {"git": "a model of images"}
    assert figures["wrong"] is True
    assert figures_of(FOUND[:2])["wrong"] is False
