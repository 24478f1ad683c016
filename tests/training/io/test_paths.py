"""A user's path names the file that the operating system would open,
and keeps its text where nothing forces another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from training.io.paths import absolute

PATHS = (
    "link/../file", "link/../../file", "link/sub/../../file", "./link/.././file", "link/../deep/../file",
    "real/../file", "away/../file", "link/back/../file", "chain/../file",
)  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Links into another part of the tree, and a file in every folder that a wrong answer may name."""
    for folder in ("here/real", "other/deep/sub"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "here/link").symlink_to(tmp_path / "other/deep")
    (tmp_path / "here/away").symlink_to("../other/deep/sub")
    (tmp_path / "here/chain").symlink_to("link")
    (tmp_path / "other/deep/back").symlink_to(tmp_path / "here/real")
    for folder in (".", "here", "here/real", "other", "other/deep", "other/deep/sub"):
        (tmp_path / folder / "file").write_text(folder)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.mark.parametrize("path", PATHS)
def test_two_dots_behind_a_link_are_those_of_the_system(tree, path):
    assert Path(absolute(path)).samefile(path)
    assert ".." not in absolute(path)
    assert Path(absolute(path, Path())).samefile(path)


@pytest.mark.parametrize(
    "path",
    ["link/file", "a/../b", "real/../file", "/x/y/../z", "x//y/", ".", "missing/*/../x", "../other", "~nobody-is/x"],
)
def test_a_path_without_two_dots_behind_a_link_keeps_its_text(tree, path):
    assert absolute(path) == os.path.abspath(path)
    assert absolute(path, Path("real")) == os.path.abspath(Path("real") / path)


def test_home_is_expanded(tree, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert absolute("~/data/x.jsonl", tree) == "/home/somebody/data/x.jsonl"
