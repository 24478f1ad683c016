"""Handing a job to a cluster: seconds to its first line, bytes sent,
following again after a lost connection, growing for it."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import sft, workload
from benchmarks.options import Options
from benchmarks.processes import Finished, Line, run
from benchmarks.record import spread
from tests.support.growing_cluster import GrowingCluster

ROWS = 200
TARGETS = {"first_line_later_s": 2.0}
_FIRST = "run /"
"""How the first line begins that a job of Muster prints."""
_RAW_JOB = "print('first line')"
_RAW_GANG = """
import ray, time
from ray.util.placement_group import placement_group
ray.init()
began = time.monotonic()
ray.get(placement_group([{"CPU": 1}] * 2, strategy="PACK").ready())
print("gang after", time.monotonic() - began)
"""
_CUT_AT = 20
"""The step after whose line the connection is cut."""


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Each side in turn, on one cluster that has no machines for workers until somebody wants them."""
    cluster = GrowingCluster(folder, idle_minutes=0.2)
    try:
        return _Cluster(cluster, folder, options).figures()
    finally:
        cluster.end()


class _Cluster:
    def __init__(self, cluster: GrowingCluster, folder: Path, options: Options):
        self.cluster, self.folder, self.options = cluster, folder, options
        self.work = workload.make(folder, ROWS)
        self.environment = {
            **sft.environment(folder / "cache"), "MUSTER_HOME": str(folder / "muster"), "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": cluster.token,
        }  # fmt: skip
        self.count = 0

    def figures(self) -> dict[str, Any]:
        theirs, ours, warm, cold, provider = [], [], [], [], []
        self._job(steps=1)  # everything has been loaded once
        for _ in range(self.options.rounds):
            self._wait_for_none()
            provider.append(self._raw_gang())
            self._wait_for_none()
            cold.append(_gathered(self._job(steps=1)))
            again = self._job(steps=1)  # the machines are still there
            warm.append(_gathered(again))
            ours.append(_first(again, _FIRST))
            theirs.append(_first(self._raw(_RAW_JOB), "first line"))
        again_s = [self._cut() for _ in range(self.options.rounds)]
        return {
            "targets": TARGETS,
            "first_line_later_s": spread([mine - other for mine, other in zip(ours, theirs, strict=True)], 2),
            "first_line_s": spread(ours, 2),
            "ray_job_submit_first_line_s": spread(theirs, 2),
            "bytes": self._bytes(),
            "following_again_s": spread(again_s, 2),
            "grown_later_s": spread([c - w - p for c, w, p in zip(cold, warm, provider, strict=True)], 2),
            "grown_by_ray_s": spread(provider, 2),
        }

    def _muster(self, *words: str, on_line: Callable[[Line], None] = lambda line: None) -> Finished:
        command = [sys.executable, "-u", "-m", "launcher", *words]
        return run(command, folder=self.folder, env=self.environment, timeout_s=self.options.timeout_s, on_line=on_line)

    def _file(self, steps: int) -> Path:
        self.count += 1
        phase = {
            "data": {"train": str(self.work.rows), "template": "none", "max_length": 128, "overlong": "truncate"},
            "max_steps": steps,
            "batch": 2,
        }
        job = {
            "name": f"job-{self.count}", "storage": str(self.folder / "runs"),
            "model": {"path": str(self.work.model), "dtype": "fp32"},
            "resources": {"workers": 2}, "phases": {"sft": phase},
        }  # fmt: skip
        file = self.folder / f"job-{self.count}.yaml"
        file.write_text(json.dumps(job))
        return file

    def _job(self, steps: int) -> Finished:
        return self._muster("run", str(self._file(steps)), "--on", str(self.cluster.file))

    def _raw(self, script: str) -> Finished:
        ray = shutil.which("ray", path=self.environment["PATH"]) or "ray"
        command = [ray, "job", "submit", "--address", self.cluster.address, "--", "python", "-u", "-c", script]
        return run(command, folder=self.folder, env=self.environment, timeout_s=self.options.timeout_s)

    def _raw_gang(self) -> float:
        line = next(line for line in self._raw(_RAW_GANG).lines if line.text.startswith("gang after"))
        return float(line.text.split()[-1])

    def _wait_for_none(self) -> None:
        while self.cluster.machines():
            time.sleep(0.5)

    def _bytes(self) -> dict[str, int]:
        from launcher.jobfile import job as jobs
        from launcher.submit import bundle

        packed = self.folder / "bundle.zip"
        bundle.write(jobs.load(self._file(1)), "s3://bucket/runs", ("/",), packed)
        return {"muster_and_job": packed.stat().st_size}

    def _cut(self) -> float:
        """Seconds from a cut connection to the next line of the job."""
        cut_at: list[float] = []
        lost: list[float] = []
        next_at: list[float] = []

        def see(line: Line) -> None:
            if not cut_at and line.text.startswith(f"sft  step {_CUT_AT:>6}/"):
                cut_at.append(line.at)
                relay.cut()
            elif "the connection is lost" in line.text:
                lost.append(line.at)
            elif lost and not next_at and line.text.startswith("sft  step"):
                next_at.append(line.at)

        with _relay(self.cluster.address) as relay:
            file = self.folder / "relayed.yaml"
            spec = json.loads(self.cluster.file.read_text()) | {"address": relay.address}
            file.write_text(json.dumps(spec))
            self._muster("run", str(self._file(steps=60)), "--on", str(file), on_line=see)
        return next_at[0] - cut_at[0]


def _first(finished: Finished, beginning: str) -> float:
    return next(line.at for line in finished.lines if line.text.startswith(beginning))


def _gathered(finished: Finished) -> float:
    """Seconds from the job's first line to its model being built, machines included."""
    built = next(line.at for line in finished.lines if " parameters, " in line.text)
    return built - _first(finished, _FIRST)


class _Relay:
    """Passes bytes on to an address, until it is cut."""

    def __init__(self, address: str):
        there = urlsplit(address)
        self.there = (there.hostname or "", there.port or 0)
        self.door = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.door.getsockname()[1]}"
        self.ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self.door.accept()
                there = socket.create_connection(self.there)
                self.ends += [here, there]
                for one, other in ((here, there), (there, here)):
                    threading.Thread(target=_pass_on, args=(one, other), daemon=True).start()

    def cut(self) -> None:
        ends, self.ends = self.ends, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def _pass_on(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while data := one.recv(1 << 16):
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)


@contextmanager
def _relay(address: str) -> Iterator[_Relay]:
    relay = _Relay(address)
    try:
        yield relay
    finally:
        relay.cut()
        relay.door.close()
