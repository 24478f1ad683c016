"""The lock of a run: nobody else can hold it, looking at a run does not keep it from starting,
and runs of older versions hold it too."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from launcher.driver import open_run
from launcher.jobfile import job as jobs
from launcher.runfolder import run_folder
from training.errors import InputError

STRANGER = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as a second user")


@pytest.fixture
def begin(place):
    """begin() works on the run of job.yaml."""
    opened: list[open_run.OpenRun] = []

    def begun(*overrides: str) -> open_run.OpenRun:
        opened.append(open_run.begin(jobs.load(Path("job.yaml"), overrides)))
        return opened[-1]

    yield begun
    for run in opened:
        run.close()


@needs_root
def test_another_user_cannot_take_the_lock(begin, place):
    with tempfile.TemporaryDirectory(dir="/tmp") as shared:
        Path(shared).chmod(0o755)  # nothing but the file's own mode is in the way
        run = begin(f"storage={shared}")
        lock = run.folder / run_folder.LOCK
        assert lock.stat().st_mode & 0o777 == 0o600
        assert as_a_stranger_locks(lock) == "refused\n"


def as_a_stranger_locks(lock: Path) -> str:
    code = (
        f"import fcntl, os; os.setgroups([]); os.setgid({STRANGER}); os.setuid({STRANGER})\n"
        f"try:\n    fcntl.flock(os.open({str(lock)!r}, os.O_RDONLY), fcntl.LOCK_SH | fcntl.LOCK_NB)\n"
        "except PermissionError:\n    print('refused')\n"
    )
    return subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60)


def test_a_lock_of_an_older_version_becomes_its_owners_alone(begin, place):
    (place / "runs" / "sums").mkdir(parents=True)
    lock = place / "runs" / "sums" / run_folder.LOCK
    lock.touch(mode=0o644)
    begin()
    assert lock.stat().st_mode & 0o777 == 0o600


def test_a_run_that_is_looked_at_for_a_moment_starts(begin, place):
    lock = place / "runs" / "sums" / run_folder.LOCK
    lock.parent.mkdir(parents=True)
    lock.touch()
    with lock.open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)  # as `muster status` does
        threading.Timer(0.5, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        assert begin().attempt == 1


def test_a_run_at_work_is_refused_by_name_of_who_holds_it(begin):
    begin()
    with pytest.raises(InputError, match=f"is in use by process {os.getpid()} on "):
        begin()


@needs_root
def test_whether_a_run_of_another_user_is_at_work_is_seen(begin, place):
    run = begin()
    lock = run.folder / run_folder.LOCK
    assert run_folder._is_locked_by_another_user(lock)
    run.close()
    deadline = time.monotonic() + 10
    while run_folder._is_locked_by_another_user(lock):
        assert time.monotonic() < deadline
