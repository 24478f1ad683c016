"""Folders whose owner is gone are removed by the next process; those of others, and of the living, are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile

import pytest

from training.data.token_store import create
from training.io.owned_folders import OWNER, own, sweep, temporary_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from training.data.token_store import create
from training.io.owned_folders import temporary_folder

with temporary_folder("muster-", sys.argv[1]) as folder, create(Path(sys.argv[1]) / "0123", 1):
    (folder / "large").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def left(tmp_path):
    """A folder with what a process has left that was killed while it prepared data."""
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert sorted(path.name[:6] for path in tmp_path.iterdir()) == [".0123-", "muster"]
    return tmp_path


def test_the_next_temporary_folder_takes_those_of_the_dead_away(left):
    with temporary_folder("muster-view-", str(left)) as folder:
        assert [path.name for path in left.glob("muster-*")] == [folder.name]
    assert list(left.glob("muster-*")) == []


def test_the_next_store_takes_half_a_store_away(left):
    with pytest.raises(KeyboardInterrupt), create(left / "4567", 1):
        assert [path.name[:6] for path in left.glob(".*")] == [".4567-"]
        raise KeyboardInterrupt
    assert list(left.glob(".*")) == []


def test_folders_of_the_living_and_of_nobody_stay(tmp_path):
    folders = [tmp_path / f"muster-{name}" for name in ("living", "nobodys", "dead")]
    for folder in folders:
        folder.mkdir()
    living = own(folders[0])
    os.close(own(folders[2]))
    (tmp_path / "muster-link").symlink_to(folders[2])
    sweep(tmp_path, "muster-*")
    os.close(living)
    assert [folder.exists() for folder in folders] == [True, True, False]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a folder another user's")
def test_folders_of_other_users_stay(tmp_path):
    folder = tmp_path / "muster-theirs"
    folder.mkdir()
    os.close(own(folder))
    os.chown(folder, 12345, 12345)
    sweep(tmp_path, "muster-*")
    assert (folder / OWNER).exists()


def test_a_temporary_folder_is_ours_alone_and_goes(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder("muster-") as folder:
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []
