"""Saves that go wrong with real processes: killed at random moments, two attempts at once, a full disk."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.fork_group import ForkGroup
from tests.support.made_checkpoints import save
from tests.support.training_fixtures import Recorder, sft_phase
from training.checkpoint.format import OPTIMIZER, Manifest, Reader, verify
from training.checkpoint.repository import Checkpoints, opened, step_of
from training.drivers import supervised
from training.errors import SaveError, Superseded, TrainingError
from training.storage import StoragePath, open_storage

pytestmark = [pytest.mark.cpu, pytest.mark.faults]

TRIES = 50
LIMIT_S = 60


class Killed:
    """A group of which one worker is killed a moment after the call `begin_save` number `save` began."""

    def __init__(self, group: ForkGroup, rng: random.Random):
        self.group, self.size = group, group.size
        self.save, self.victim, self.delay_s = rng.randrange(3), rng.randrange(group.size), rng.uniform(0, 0.012)
        self.saves = 0

    def call(self, method: str, *args):
        if method == "begin_save":
            if self.saves == self.save:
                pid = self.group.processes[self.victim].pid
                threading.Timer(self.delay_s, os.kill, (pid, signal.SIGKILL)).start()
            self.saves += 1
        return self.group.call(method, *args)


def test_a_worker_killed_in_a_save_always_leaves_a_checkpoint_to_go_on_from(train, tiny, tmp_path):
    settings = {"stage": 2, "workers": 2, "max_steps": 160, "checkpoint": {"every": 1, "keep": 2}}
    phase, rng, curve = sft_phase(tiny, **settings), random.Random(17), {}
    in_the_middle = 0
    for _ in range(TRIES):
        hooks = Recorder(tmp_path)
        with ForkGroup(2, "training.roles.language:LanguageTrainer", phase, str(tiny / "cache")) as group:
            killed = Killed(group, rng)
            with pytest.raises(TrainingError):
                supervised.run(phase, {"trainer": killed}, hooks)
        assert killed.saves > killed.save
        in_the_middle += bool(hooks.checkpoints.staging.children())
        curve |= {row["step"]: row["loss"] for row in hooks.rows}
        newest, findings = Checkpoints(open_storage(tmp_path)).newest_whole()
        assert findings == [], "what is committed is whole"
        assert newest is not None or killed.save == 0
    last = train(checkpoints=tmp_path, **settings)
    curve |= {row["step"]: row["loss"] for row in last.rows}
    assert in_the_middle >= TRIES // 4, "too few were killed before the commit: this proved nothing"
    expected = train(**settings)
    assert [curve[step] for step in range(1, 161)] == expected.losses
    assert state(last.last) == state(expected.last)


def state(checkpoint: StoragePath) -> dict[str, bytes]:
    reader = Reader(checkpoint)
    return {name: reader.whole(name).tobytes() for name in reader.manifest.parameters}


# A process that does nothing but save


_CONTEXT = multiprocessing.get_context("forkserver")


def _save_for_ever(root: str, attempt: int, first: int, environment: dict[str, str], told) -> None:
    os.environ.update(environment)
    checkpoints = opened(open_storage(root), attempt)
    told.send([step_of(folder) for folder in checkpoints.folders()])
    try:
        for step in range(first, first + 100_000):
            try:
                save(checkpoints, step, world_size=4)
            except (
                FileNotFoundError
            ):  # its staging folder was taken away under a worker; it is told when it begins the next
                continue
            checkpoints.retain(2, keep_weights=2)
            told.send(step)
    except Superseded as error:
        told.send(str(error))


def saving(root: StoragePath, attempt: int, first: int):
    """The process and what it tells: the steps that it found, every step that it committed, why it stopped."""
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "MUSTER_"))}
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(
        target=_save_for_ever, args=(str(root), attempt, first, environment, theirs), daemon=True
    )
    process.start()
    theirs.close()
    assert ours.poll(LIMIT_S)
    return process, ours


def everything(pipe) -> list:
    """What is left in the pipe of a process that has ended."""
    told = []
    with suppress(EOFError):
        while True:
            told.append(pipe.recv())
    return told


def test_a_driver_killed_while_it_commits_always_leaves_a_checkpoint_to_go_on_from(tmp_path):
    root, rng, newest = open_storage(tmp_path), random.Random(23), 0
    for attempt in range(1, TRIES + 1):
        process, told = saving(root, attempt, newest + 1)
        assert newest in [0, *told.recv()]
        assert told.poll(LIMIT_S)
        told.recv()  # one is there
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        folders = Checkpoints(root).folders()
        assert [problem for folder in folders for problem in verify(folder)] == []
        assert step_of(folders[-1]) > newest
        newest = step_of(folders[-1])
    opened(root, TRIES + 1).close()
    for folder in Checkpoints(root).folders():
        optimizers = [name for name in folder.children() if name.endswith(OPTIMIZER)]
        assert bool(optimizers) != Manifest.read(folder).weights_only
    left = [name for name in root.children() if not name.startswith("step-")]
    assert left == [], "what the killed ones left is swept"


@pytest.fixture(params=["folder", "bucket"])
def root(request, tmp_path):
    return (
        open_storage(tmp_path) if request.param == "folder" else open_storage(request.getfixturevalue("s3").url + "/a")
    )


def test_of_two_attempts_that_save_at_once_the_later_wins(root):
    old, from_old = saving(root, 1, 1)
    from_old.recv()
    for _ in range(3):
        assert from_old.poll(LIMIT_S)
        from_old.recv()
    new, from_new = saving(root, 2, 1000)
    found = from_new.recv()
    for _ in range(5):
        assert from_new.poll(LIMIT_S)
        from_new.recv()
    old.join(LIMIT_S)
    assert old.exitcode == 0, "it stopped by itself"
    assert "this is attempt 1" in everything(from_old)[-1]
    new.kill()
    new.join()
    for folder in Checkpoints(root).folders():
        assert verify(folder) == []
        assert Manifest.read(folder).attempt == 2 or step_of(folder) in found


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """A disk with room for one checkpoint of 0.7 MB and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1100k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def test_a_full_disk_is_told_and_the_checkpoint_before_it_is_there_to_go_on_from(train, small_disk):
    settings = {"stage": 2, "max_steps": 12, "checkpoint": {"every": 4, "keep": 2}}
    with pytest.raises(SaveError, match="No space left on device"):
        train(2, checkpoints=small_disk / "c", **settings)
    newest, findings = Checkpoints(open_storage(small_disk / "c")).newest_whole()
    assert (step_of(newest), findings) == (4, [])
    resize(small_disk, "8m")
    run = train(2, checkpoints=small_disk / "c", **settings)
    assert run.first == 4
    assert run.losses == train(2, **settings).losses[4:]


def test_a_disk_that_has_room_again_is_used_at_the_next_opportunity(train, small_disk):
    settings = {"stage": 2, "max_steps": 12, "checkpoint": {"every": 4, "keep": 2}}

    class Widening(Recorder):
        def event(self, kind, **fields):
            super().event(kind, **fields)
            if kind == "save_failed":
                resize(small_disk, "8m")

    run = train(2, checkpoints=small_disk / "c", hooks=Widening, **settings)
    failed = [fields["step"] for kind, fields in run.events if kind == "save_failed"]
    assert failed == [8]
    saved = [fields["step"] for kind, fields in run.events if kind == "checkpoint"]
    assert (saved[0], saved[-1]) == (4, 12)
