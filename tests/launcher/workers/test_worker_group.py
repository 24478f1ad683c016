"""Worker groups on a real Ray: gangs, seats, calls that fail as a whole, logs, and nothing left."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager

import psutil
import pytest

from launcher.workers.errors import Kind, NoMachines, WorkerError
from training.config import Resources
from training.errors import InputError, TrainingError
from training.group import results

pytestmark = pytest.mark.cpu


@contextmanager
def probes(folder, **resources):
    """Two workers with the role Probe."""
    from launcher.workers.worker_group import WorkerGroup

    workers = WorkerGroup(Resources(workers=2, **resources), print, print)
    try:
        workers.begin(folder / "logs")
        yield workers.build("probe", "tests.support.roles:Probe")
    finally:
        workers.close()


@pytest.fixture(scope="module")
def group(ray_cluster, tmp_path_factory):
    """For tests that leave the workers alive."""
    with probes(tmp_path_factory.mktemp("group")) as group:
        yield group


def test_workers_know_their_seats_and_reach_each_other(group):
    rank_infos = results(group.call("who"), 60)
    assert [
        (rank_info.rank, rank_info.size, rank_info.local_rank, rank_info.local_size) for rank_info in rank_infos
    ] == [(0, 2, 0, 2), (1, 2, 1, 2)]
    assert {rank_info.host for rank_info in rank_infos} == {"127.0.0.1"}
    assert [future.result(60) for future in group.map("add_up", [3, 4])] == [7, 7]


def test_nothing_listens_beyond_loopback(group):
    group.call("add_up", 1)
    own = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in own]
    assert len(listening) > 4, "the ports of Ray and its workers are not seen"
    assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}


def test_a_worker_computes_with_its_share_of_the_cores(group):
    cores = len(psutil.Process().cpu_affinity())
    assert results(group.call("threads"), 60) == [max(1, cores // 2)] * 2


def test_one_shard_a_worker(group):
    with pytest.raises(ValueError, match="3 shards for a group of 2 workers"):
        group.map("add_up", [1, 2, 3])


def test_an_exception_names_the_worker_and_shows_where(group):
    with pytest.raises(TrainingError) as caught:
        results(group.call("fail", 1), 60)
    text = str(caught.value)
    assert text.startswith("worker 1 on 127.0.0.1 raised: ValueError: row 7 of data.jsonl made worker 1 fail")
    assert "in fail" in text
    assert "rank-1.log" in text


def test_errors_meant_for_people_arrive_as_they_are(group):
    with pytest.raises(TrainingError, match="^step 3: the loss is nan$"):
        results(group.call("refuse", 0), 60)
    with pytest.raises(InputError, match="^data.jsonl:4: no answer$"):
        results(group.call("refuse_input"), 60)


def test_the_victim_is_blamed_and_the_survivor_is_collateral(ray_cluster, tmp_path):
    killed = pytest.raises(TrainingError, match="worker 1 on 127.0.0.1 was killed by SIGKILL")
    with probes(tmp_path) as group, killed as caught:
        results(group.call("die_while_others_wait", 1), 60)
    assert (caught.value.rank, caught.value.kind) == (1, Kind.KILLED)
    assert caught.value.collateral in ((), (0,))


def test_a_collective_that_one_worker_never_enters_is_a_hang(ray_cluster, tmp_path):
    hang_after = 2.0
    with probes(tmp_path, hang_after=hang_after) as group:
        began = time.monotonic()
        with pytest.raises(WorkerError, match="has made no progress at step 7") as caught:
            results(group.call("train", 0), 60)
        took = time.monotonic() - began
    assert (caught.value.rank, caught.value.kind) == (0, Kind.HANG)
    assert hang_after < took
    absent, waiting = (tmp_path / "logs/stacks.txt").read_text().split("== worker 1")
    assert "in train" in absent
    assert "all_reduce" in waiting


@pytest.mark.parametrize("victim", ["worker", "place"])
def test_who_gives_no_answer_is_blamed_for_the_calls_that_wait_for_it(ray_cluster, group, tmp_path, victim):
    import ray

    with probes(tmp_path) as giver:
        group.workers.others = [giver.workers]
        given = giver.call("sleep", 1, 30)
        taken = group.map("sleep", given, 0.0)
        if victim == "worker":
            os.kill(giver.workers.pids[1], signal.SIGKILL)
        else:
            ray.kill(giver.workers.actors[1])
        with pytest.raises(WorkerError, match="worker 1 on 127.0.0.1 was killed") as caught:
            results(taken, 60)
        assert (caught.value.rank, caught.value.kind, caught.value.log) == (
            1,
            Kind.KILLED,
            tmp_path / "logs/rank-1.log",
        )
        group.workers.others = []


def fork_servers(group):
    """The processes that workers are forked from."""
    return [psutil.Process(pid).ppid() for pid in group.workers.pids]


def test_the_places_begin_again_at_once(ray_cluster, tmp_path):
    with probes(tmp_path) as group:
        before = fork_servers(group)
        with pytest.raises(WorkerError):
            results(group.call("die_while_others_wait", 1), 60)
        assert group.workers.end()
        group.workers.begin(tmp_path / "again")
        again = group.workers.build("probe", "tests.support.roles:Probe")
        assert results(again.call("add_up", 2), 60) == [4, 4]
        assert fork_servers(group) == before, "torch was imported anew"


def test_a_call_that_takes_too_long_names_those_who_did_not_answer(group):
    with pytest.raises(TrainingError, match=r"has not answered `sleep` within 1 s \(workers 1\)"):
        results(group.call("sleep", 1, 3), 1)


def test_logs_can_be_read_while_the_worker_is_busy(group):
    results(group.call("say", "hello from a worker"), 60)
    busy = group.call("sleep", 0, 8)
    assert b"hello from a worker" in group.workers.read_log(0, 0)
    with pytest.raises(TrainingError, match=r"has not answered `sleep`.*workers 0"):
        results(busy, 0.0)  # it was busy all the time
    assert "hello" in group.workers.log_of(1).read_text()


def test_closing_ends_the_processes_and_gives_the_places_back(ray_cluster, tmp_path):
    import ray

    from launcher.workers.worker_group import WorkerGroup

    def free():
        return ray.available_resources().get("CPU", 0)

    before = free()
    workers = WorkerGroup(Resources(workers=1), print, print)
    workers.begin(tmp_path)
    assert all(psutil.pid_exists(pid) for pid in workers.pids)
    wait_until(lambda: free() == before - 1)
    workers.close()
    wait_until(lambda: free() == before and not any(psutil.pid_exists(pid) for pid in workers.pids))


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "workers or places are still there"
        time.sleep(0.1)


def test_a_gang_that_does_not_fit_waits_says_what_is_missing_and_gives_up(ray_cluster):
    from launcher.workers.worker_group import WorkerGroup

    with pytest.raises(
        NoMachines, match=r"became available: 999 workers need one CPU each; the cluster has \d+ CPU .*, after 2 s"
    ):
        WorkerGroup(Resources(workers=999, wait_for_machines=2.0), print, print)


def test_a_gang_that_may_be_smaller_takes_what_there_is(ray_cluster):
    from launcher.workers.worker_group import WorkerGroup

    said: list[str] = []
    workers = WorkerGroup(Resources(workers=999, min_workers=1, wait_for_machines=1.0), said.append, print)
    try:
        assert 1 <= workers.size < 999
        assert said[-1].startswith(f"continuing with {workers.size} of 999 workers")
        assert not workers.could_grow()
    finally:
        workers.close()


def test_where_others_have_the_machines_a_gang_waits_its_turn(ray_cluster):
    from launcher.workers import placement
    from launcher.workers.worker_group import WorkerGroup

    free, since = -1, time.monotonic()
    while time.monotonic() - since < 3:  # the places of the tests before come back one by one
        if (now := placement.fitting({"CPU": 1.0})) != free:
            free, since = now, time.monotonic()
        time.sleep(0.2)
    others = WorkerGroup(Resources(workers=free), print, print)
    leave = threading.Timer(5.0, others.close)
    leave.start()
    said: list[str] = []
    try:  # far beyond wait_for_machines, which is for machines that are not there at all
        workers = WorkerGroup(Resources(workers=free, wait_for_machines=0.5), said.append, print)
        workers.close()
    finally:
        leave.join()
    assert workers.size == free > 0
    assert f"{free} workers need one CPU each; the cluster has" in said[0]


def test_two_groups_do_not_meet(ray_cluster, tmp_path):
    from launcher.workers.worker_group import WorkerGroup

    groups = [WorkerGroup(Resources(workers=1), print, print) for _ in "ab"]
    try:
        for name, group in zip("ab", groups, strict=True):
            group.begin(tmp_path / name)
        roles = [group.build("probe", "tests.support.roles:Probe") for group in groups]
        assert [results(role.call("add_up", 5), 60) for role in roles] == [[5], [5]]
    finally:
        for group in groups:
            group.close()
