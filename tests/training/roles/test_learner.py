"""Which worker prepares the data of its node, and with how many cores."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.cpu

SETTING = "TOKENIZERS_PARALLELISM"


@pytest.fixture
def seen(tiny, monkeypatch):
    """From a worker's place on its node to the tokenizer's setting at every opening of the data,
    and whether that verifies them."""
    from tests.support.training_fixtures import phase_of
    from training.process.distributed import RankInfo
    from training.roles import learner

    def look(local_rank: int) -> list[tuple[str | None, bool]]:
        found: list[tuple[str | None, bool]] = []
        store = SimpleNamespace(folder=Path("store"))

        def opening(*_: object, verify: bool = True) -> SimpleNamespace:
            found.append((os.environ.get(SETTING), verify))
            return SimpleNamespace(train=store, eval=None, damage=[])

        monkeypatch.setattr(learner, "open_stores", opening)
        monkeypatch.setattr(learner.dist, "barrier", lambda: None)
        monkeypatch.setattr(learner, "differences", lambda *_: [])
        rank_info = RankInfo(rank=local_rank, size=2, local_rank=local_rank, local_size=2)
        learner.Learner(rank_info, phase_of(tiny, "sft"), "cache").open_data()
        return found

    return look


def test_the_first_worker_of_a_node_prepares_and_verifies_on_all_cores_and_then_keeps_to_its_own(seen, monkeypatch):
    monkeypatch.setenv(SETTING, "false")
    assert seen(local_rank=0) == [("true", True), ("false", False)]
    assert seen(local_rank=1) == [("false", False)]
    assert os.environ[SETTING] == "false"


def test_a_setting_that_was_not_there_is_not_left_behind(seen, monkeypatch):
    monkeypatch.delenv(SETTING, raising=False)
    assert seen(local_rank=0) == [("true", True), (None, False)]


def test_the_setting_is_put_back_when_rows_are_refused(monkeypatch):
    from training.roles import learner

    monkeypatch.setenv(SETTING, "false")
    with pytest.raises(KeyError), learner._tokenizer_on_all_cores():
        raise KeyError
    assert os.environ[SETTING] == "false"
