"""Small files that cannot be written for a moment: kept in memory, tried again, in the end an error."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from launcher.runfolder.run_folder import json_rows
from launcher.runfolder.small_files import SmallFiles
from training.errors import StorageError

PATIENCE_S = 300.0


class Clock:
    """Time passes while somebody sleeps, and something may happen meanwhile."""

    def __init__(self) -> None:
        self.now, self.happens = 0.0, lambda: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.happens()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def files(clock) -> SmallFiles:
    return SmallFiles(PATIENCE_S, clock, clock.sleep)


def test_rows_wait_for_a_folder_that_is_away_for_a_moment(tmp_path, files, clock):
    """As an unmounted storage: what is below it is not there."""
    folder, away = tmp_path / "storage", tmp_path / "away"
    folder.mkdir()
    files.append(folder / "metrics.jsonl", {"step": 1})
    folder.rename(away)
    for step in (2, 3):
        files.append(folder / "metrics.jsonl", {"step": step})
        files.replace(folder / "spent.json", json.dumps({"step": step}))
        clock.now += 1
    assert not folder.exists()
    clock.happens = lambda: away.rename(folder) if clock.now > 10 and away.exists() else None
    files.flush()
    assert [row["step"] for row in json_rows(folder / "metrics.jsonl")] == [1, 2, 3]
    assert json.loads((folder / "spent.json").read_text()) == {"step": 3}
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "spent.json"]


def test_what_lasts_too_long_is_an_error_and_nothing_is_forgotten(tmp_path, files, clock):
    folder = tmp_path / "storage"
    files.append(folder / "metrics.jsonl", {"step": 1})
    with pytest.raises(StorageError, match=r"writing has failed for 30\d s: .*metrics.jsonl"):
        files.flush()
    folder.mkdir()
    files.append(folder / "metrics.jsonl", {"step": 2})
    assert [row["step"] for row in json_rows(folder / "metrics.jsonl")] == [1, 2]


def test_rows_are_added_to_a_file_whose_replacement_waits(tmp_path, files, clock):
    folder = tmp_path / "storage"
    files.replace(folder / "metrics.jsonl", '{"step": 1}\n')
    files.append(folder / "metrics.jsonl", {"step": 2})
    folder.mkdir()
    clock.now += 1
    files.flush()
    assert [row["step"] for row in json_rows(folder / "metrics.jsonl")] == [1, 2]


def test_an_operation_is_tried_again(tmp_path, files, clock):
    clock.happens = lambda: (tmp_path / "storage").mkdir(exist_ok=True) if clock.now > 10 else None
    files.patiently(lambda: (tmp_path / "storage" / "sft").mkdir())
    assert (tmp_path / "storage" / "sft").is_dir()
    assert 10 < clock.now < 20


FULL = """
import resource, signal, sys
from pathlib import Path
from launcher.runfolder.small_files import SmallFiles

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
files, path = SmallFiles(sleep=lambda seconds: None), Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (32, -1))
for step in (1, 2, 3, 4):
    files.append(path, {"step": step})
assert path.stat().st_size == 32, path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
files.flush()
"""


def test_rows_that_a_full_disk_has_cut_are_there_once(tmp_path):
    """The kernel takes a part of what is written, as a full disk does."""
    path = tmp_path / "metrics.jsonl"
    ended = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4))


@pytest.mark.cpu
@pytest.mark.faults
def test_a_run_outlasts_a_storage_that_is_away(run, undisturbed):
    """Longer than the steps to the next checkpoint, which cannot be saved."""
    run.start()
    run.reach(25)
    storage, away = run.folder / "runs", run.folder / "away"
    storage.rename(away)
    time.sleep(8)
    assert not storage.exists()
    away.rename(storage)
    run.finish()
    assert [incident["class"] for incident in run.events("incident")] in ([], ["storage"])
    assert run.result == undisturbed
