"""Temporary folders for Unix sockets, where TMPDIR is long or cannot be used."""

from __future__ import annotations

import shutil
import socket
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from launcher.process.short_tempdir import SOCKET_PATH, short_tempdir
from training.errors import InputError


@pytest.fixture
def made(monkeypatch):
    """A function that makes a folder with a TMPDIR."""

    def make(tmpdir: Path, longest: int = SOCKET_PATH - 8) -> AbstractContextManager[str]:
        monkeypatch.setenv("TMPDIR", str(tmpdir))
        monkeypatch.setattr(tempfile, "tempdir", None)  # what the library has remembered
        return short_tempdir(longest)

    return make


@pytest.mark.parametrize("length", [60, 82, 83, 84, 131])
def test_a_socket_fits_whatever_the_length_of_tmpdir(tmp_path, made, length):
    at = Path("/tmp") / tmp_path.name / ("n" * 40)
    at = at / ("t" * (length - len(str(at)) - 1)) if length > len(str(at)) else Path(str(at)[:length])
    at.mkdir(parents=True)
    try:
        with made(at) as folder:
            assert Path(folder).stat().st_mode & 0o777 == 0o700
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(f"{folder}/fork")
            assert Path(folder).parent == (at if length <= SOCKET_PATH - 8 - 16 else Path("/tmp"))
        assert not Path(folder).exists()
    finally:
        shutil.rmtree(Path("/tmp") / tmp_path.name)


def test_tmpdir_is_named_where_no_folder_can_be_made(tmp_path, monkeypatch, made):
    monkeypatch.setattr("launcher.process.short_tempdir._SHORT", "/nowhere/at/all")
    with pytest.raises(
        InputError, match=r"^TMPDIR: no temporary folder can be made \(No such file or directory\); set TMPDIR to"
    ):
        made(tmp_path, longest=1).__enter__()
