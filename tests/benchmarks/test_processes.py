"""Benchmarks: commands are timed, and ended with all that they started."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.processes import CommandFailed, run

FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""

SHARING = """
import os, time
shared = bytearray(b"x") * (200 << 20)
if os.fork() == 0:
    own = bytearray(b"y") * (100 << 20)
    time.sleep(3)
    os._exit(0)
time.sleep(3)
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_lines_carry_the_time_at_which_they_came(tmp_path):
    code = "import time; print('first', flush=True); time.sleep(0.5); print('second')"
    finished = run(python(code), folder=tmp_path, env={}, timeout_s=30)
    first, second = finished.lines
    assert (first.text, second.text) == ("first", "second")
    assert second.at - first.at > 0.4
    assert finished.seconds >= second.at


def test_env_is_laid_over_the_environment(tmp_path):
    finished = run(
        python("import os; print(os.environ['X'], 'PATH' in os.environ)"), folder=tmp_path, env={"X": "1"}, timeout_s=30
    )
    assert finished.lines[0].text == "1 True"


def test_a_failure_shows_the_last_lines(tmp_path):
    with pytest.raises(CommandFailed, match=r"status 3(.|\n)*the reason"):
        run(python("print('the reason'); raise SystemExit(3)"), folder=tmp_path, env={}, timeout_s=30)


def test_a_command_that_takes_too_long_is_ended_with_its_descendants(tmp_path):
    """Also those that have left its process group."""
    with pytest.raises(CommandFailed, match="did not end within 2 s") as caught:
        run(python(FAMILY), folder=tmp_path, env={}, timeout_s=2)
    child = int(str(caught.value).splitlines()[-1])
    deadline = time.monotonic() + 60
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the grandchild lives on"
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")
def test_memory_is_that_of_all_descendants_with_what_they_share_counted_once(tmp_path):
    finished = run(python(SHARING), folder=tmp_path, env={}, timeout_s=30, watch_memory=True)
    assert 300 < finished.peak_gib * 1024 < 400
