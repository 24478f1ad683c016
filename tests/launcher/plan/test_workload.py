"""How much data there is, at a glance: near what reading all of it finds."""

from __future__ import annotations

import gzip
import json

import pytest

from launcher.plan.workload import work_of
from tests.support.training_fixtures import phase_of


@pytest.mark.parametrize("recipe", ["sft", "pretrain", "cft", "ppo"])
def test_tokens_are_near_those_of_the_whole_data(tiny, recipe):
    from training.data.phase_data import open_stores

    settings = {"reward": "tests.support.some_rewards:length"} if recipe == "ppo" else {}
    phase = phase_of(tiny, recipe, **settings)
    store = open_stores(phase, tiny / "cache").train
    work = work_of(phase)
    assert work.rows == store.meta.rows
    whole_rows = store.meta.tokens / store.meta.rows
    assert work.tokens == pytest.approx(
        whole_rows, rel=0.25
    )  # templates and end tokens are not looked at, other columns are


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_rows_are_counted(tiny, tmp_path, suffix):
    rows = [{"prompt": f"What is {n}?", "completion": str(n)} for n in range(1234)]
    file = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        text = json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        file.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    assert work_of(phase_of(tiny, "sft", data={"train": str(file)})).rows == 1234


def test_what_is_not_here_is_said(tiny):
    work = work_of(phase_of(tiny, "sft", data={"train": "somebody/rows"}))
    assert work.rows is None
    assert "--rows" in work.note
    assert "--tokens" in work.note
    given = work_of(phase_of(tiny, "sft", data={"train": "somebody/rows"}), rows=10, tokens=7.0)
    assert (given.rows, given.tokens, given.note) == (10, 7.0, "")
