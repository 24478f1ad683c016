"""Temporary folders for Unix sockets, where TMPDIR is long or cannot be used."""

from __future__ import annotations

import shutil
import socket
import tempfile
from pathlib import Path

import pytest

from launcher.short_tempdir import SOCKET_PATH, short_tempdir
from training.errors import InputError


def made(monkeypatch: pytest.MonkeyPatch, tmpdir: Path, longest: int = SOCKET_PATH - 8) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmpdir))
    monkeypatch.setattr(tempfile, "tempdir", None)  # what the library has remembered
    return Path(short_tempdir(longest))


@pytest.mark.parametrize("length", [60, 82, 83, 84, 131])
def test_a_socket_fits_whatever_the_length_of_tmpdir(tmp_path, monkeypatch, length):
    at = Path("/tmp") / tmp_path.name / ("n" * 40)
    at = at / ("t" * (length - len(str(at)) - 1)) if length > len(str(at)) else Path(str(at)[:length])
    at.mkdir(parents=True)
    try:
        folder = made(monkeypatch, at)
        assert folder.stat().st_mode & 0o777 == 0o700
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "nursery"))
        assert folder.parent == (at if length <= SOCKET_PATH - 8 - 16 else Path("/tmp"))
        shutil.rmtree(folder)
    finally:
        shutil.rmtree(Path("/tmp") / tmp_path.name)


def test_tmpdir_is_named_where_no_folder_can_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr("launcher.short_tempdir._SHORT", "/nowhere/at/all")
    with pytest.raises(
        InputError, match=r"^TMPDIR: no temporary folder can be made \(No such file or directory\); set TMPDIR to"
    ):
        made(monkeypatch, tmp_path, longest=1)
