"""A worker's place, without Ray: it begins processes, sees them from outside, and leaves none behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launcher.jobfile import job as jobs
from launcher.workers.errors import Kind, Raised, WorkerDied
from launcher.workers.supervisor import WorkerSupervisor, apart, fork_server_here, has_fork_server
from training.data.phase_data import open_stores
from training.errors import InputError
from training.process.distributed import RankInfo

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def shared():
    host = WorkerSupervisor("cpu")
    yield host
    host.close()


@pytest.fixture
def host(shared, tmp_path):
    """A place with a worker of one, that hosts a Probe."""
    shared.pid = begin(shared, tmp_path)
    yield shared
    shared.end()


def begin(host: WorkerSupervisor, folder: Path) -> int:
    pid = host.begin(str(folder / "rank-0.log"), {"GREETING": "hello"})
    host.ask("join", RankInfo(rank=0, size=1), b"", None)
    host.ask("build", "probe", "tests.support.roles:Probe", ())
    return pid


def call(host: WorkerSupervisor, method: str, *args):
    return host.ask("call", "probe", method, args, {})


def wait_for(condition, what: str, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_a_worker_answers_with_its_environment_and_writes_to_its_log(host, tmp_path):
    assert call(host, "environment", "GREETING") == {"GREETING": "hello"}
    call(host, "say", "hello")
    assert (tmp_path / "rank-0.log").read_text() == "hello\n"


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE.exists() or "[madvise]" not in HUGE.read_text(), reason="huge pages are not for who asks")
@pytest.mark.skipif("GLIBC_TUNABLES" in os.environ, reason="the tests run with settings of glibc's")
def test_a_worker_on_cpus_asks_for_huge_pages(host):
    lines = Path(f"/proc/{host.pid}/smaps").read_text().splitlines()
    assert any("hg" in line.split() for line in lines if line.startswith("VmFlags:"))


def test_errors_arrive_with_the_workers_own_traceback(host):
    with pytest.raises(Raised) as caught:
        call(host, "fail", 0)
    assert (caught.value.name, caught.value.message) == ("ValueError", "row 7 of data.jsonl made worker 0 fail")
    assert "roles.py" in caught.value.trace
    with pytest.raises(InputError, match="no answer"):
        call(host, "refuse_input")


def test_errors_arrive_with_the_kind_that_they_have_in_the_worker(host):
    with pytest.raises(Raised) as caught:
        call(host, "take_memory", 1 << 60)
    assert caught.value.kind is Kind.MEMORY
    with pytest.raises(Raised, match="Connection refused") as caught:
        call(host, "connect", 1)
    assert (caught.value.name, caught.value.kind) == ("ConnectionRefusedError", Kind.PROGRAM)


@pytest.mark.timeout(120)  # a call that does not see it waits for ever
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_death_is_seen_at_once_with_the_signal(host, number):
    os.kill(host.pid, number)
    with pytest.raises(WorkerDied) as caught:
        call(host, "who")
    assert caught.value.status == -number


def test_an_exit_is_seen_with_its_status(host):
    with pytest.raises(WorkerDied) as caught:
        call(host, "leave", 3)
    assert caught.value.status == 3


@pytest.fixture
def little_memory(host) -> Iterator[None]:
    """The worker may take 100 MB more than it has, no swap."""
    root = Path("/sys/fs/cgroup")
    version_1 = (root / "memory").is_dir()
    group = root / ("memory" if version_1 else ".") / f"muster-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = "memory.limit_in_bytes" if version_1 else "memory.max"
        (group / limit).write_text(str(100 << 20))
        (group / "cgroup.procs").write_text(str(host.pid))
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        pytest.skip(f"cannot limit the memory of a process: {error}")
    yield
    host.end()
    group.rmdir()


@pytest.mark.usefixtures("little_memory")
def test_a_worker_that_the_kernel_kills_for_memory_is_told_as_such(host):
    with pytest.raises(WorkerDied) as caught:
        call(host, "take_memory", 400 << 20)
    assert (caught.value.status, caught.value.reason) == (-signal.SIGKILL, "the kernel ran out of memory")


def test_after_a_death_another_begins_without_the_imports(host, tmp_path):
    fork_server = psutil.Process(host.pid).parent()
    os.kill(host.pid, signal.SIGKILL)
    pid = begin(host, tmp_path)
    assert call(host, "threads") >= 1
    assert psutil.Process(pid).parent() == fork_server, "its process comes from another that has imported torch anew"


def test_a_worker_is_watched_while_it_is_busy(host):
    from threading import Thread

    busy = Thread(target=call, args=(host, "sleep", 0, 1.5))
    busy.start()
    time.sleep(1.2)
    health = host.health()
    assert health.pulse is not None
    assert health.pulse.beat_s < 1
    assert health.state in "SR"
    assert 0 < health.memory < 1
    busy.join()


def test_a_stopped_worker_has_no_heartbeat(host):
    os.kill(host.pid, signal.SIGSTOP)
    wait_for(lambda: host.health().pulse.beat_s > 1.5, "the heart beats on")
    assert host.health().state == "T"
    os.kill(host.pid, signal.SIGCONT)
    wait_for(lambda: host.health().pulse.beat_s < 1, "the heart does not beat again")


def test_progress_is_counted_with_the_step_in_hand(host):
    before = host.health().pulse
    call(host, "progress", 12)
    after = host.health().pulse
    assert (after.count, after.step) == (before.count + 1, 12)
    assert after.progress_s < 1


def test_the_stacks_of_a_busy_worker_say_what_it_does(host, tmp_path):
    from threading import Thread

    busy = Thread(target=call, args=(host, "sleep", 0, 2))
    busy.start()
    time.sleep(0.3)
    assert "in sleep" in host.stacks(tmp_path / "rank-0.log")
    busy.join()


def test_a_stopped_worker_has_no_stacks_and_is_ended_all_the_same(host, tmp_path):
    os.kill(host.pid, signal.SIGSTOP)
    assert host.stacks(tmp_path / "rank-0.log") == ""
    host.end()
    assert not psutil.pid_exists(host.pid)
    assert host.health().pulse is None


def test_what_cannot_be_sent_is_an_error_of_the_call_alone(host):
    with pytest.raises(Raised, match="cannot be sent"):
        call(host, "something_that_cannot_be_pickled")
    assert call(host, "who").rank == 0


@pytest.fixture
def two_supervisors(tmp_path):
    """With the workers of one fork server, which was there before them."""
    with fork_server_here("cpu"):
        places = [WorkerSupervisor("cpu"), WorkerSupervisor("cpu")]
        for rank, place in enumerate(places):
            (tmp_path / str(rank)).mkdir()
            begin(place, tmp_path / str(rank))
        yield places
        for place in places:
            place.close()


def test_places_share_a_fork_server_that_is_there(two_supervisors):
    first, second = (place.worker.pid for place in two_supervisors)
    assert psutil.Process(first).parent() == psutil.Process(second).parent()
    assert call(two_supervisors[0], "who").rank == call(two_supervisors[1], "who").rank == 0
    two_supervisors[0].close()
    wait_for(lambda: not _lives(first), "the worker outlives its place")
    assert call(two_supervisors[1], "who").rank == 0, "the other place's worker has nothing to do with it"


@pytest.mark.faults
def test_with_their_fork_server_all_workers_are_gone_and_their_places_begin_others_by_one_of_their_own(two_supervisors):
    fork_server = psutil.Process(two_supervisors[0].worker.pid).parent()
    workers = [place.worker.pid for place in two_supervisors]
    fork_server.kill()
    wait_for(lambda: not any(map(_lives, workers)), "a worker outlives the fork server")
    for place in two_supervisors:
        with pytest.raises(WorkerDied):
            call(place, "who")
    first, _ = two_supervisors
    first.begin(os.devnull, {})
    assert psutil.Process(first.worker.pid).parent().pid == first.fork_server.process.pid


def test_a_fork_server_at_hand_ends_with_the_block(tmp_path):
    before = os.environ.get("MUSTER_FORK_SERVER", "")
    with fork_server_here("cpu"):
        place = WorkerSupervisor("cpu")
        pid = place.begin(str(tmp_path / "log"), {})
        fork_server = psutil.Process(pid).parent()
    wait_for(lambda: not _lives(pid) and not _lives(fork_server.pid), "somebody lives on")
    assert os.environ["MUSTER_FORK_SERVER"] == before
    place.close()


def test_a_fork_prepares_data(place, tmp_path):
    phase = jobs.load(place / "job.yaml").phases["sft"]
    cache = tmp_path / "cache"
    with fork_server_here("cpu"):
        assert has_fork_server()
        apart("prepare", phase, str(cache), {})
        assert len(open_stores(phase, cache).train) == 40
        made = sorted(cache.iterdir())
        with Path("data/train.jsonl").open("a") as rows:
            rows.write('{"prompt": 7, "completion": "x"}\n')
        with pytest.raises(InputError, match="train.jsonl:41"):
            apart("prepare", phase, str(cache), {})
        assert sorted(path for path in cache.iterdir() if path in made) == made


def test_a_fork_that_cannot_do_what_it_should_says_so():
    with fork_server_here("cpu"), pytest.raises(Raised, match="no_such_function"):
        apart("no_such_function")


HOLDER = """
import sys, time
from launcher.workers.supervisor import WorkerSupervisor
host = WorkerSupervisor("cpu")
print(host.fork_server.process.pid, host.begin(sys.argv[1], {}), flush=True)
time.sleep(600)
"""


@pytest.mark.faults
@pytest.mark.parametrize("victim", ["the place", "the fork server"])
def test_nobody_outlives_the_place_or_the_fork_server(tmp_path, victim):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "log")]
    own_fork_server = {**os.environ, "MUSTER_FORK_SERVER": ""}
    with subprocess.Popen(command, env=own_fork_server, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            fork_server, worker = map(int, holder.stdout.readline().split())
            os.kill(worker, signal.SIGSTOP)  # it cannot help
            os.kill(holder.pid if victim == "the place" else fork_server, signal.SIGKILL)
            wait_for(lambda: not _lives(worker), "the worker lives on")
            wait_for(lambda: not _lives(fork_server), "the fork server lives on")
        finally:
            holder.kill()


def _lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
