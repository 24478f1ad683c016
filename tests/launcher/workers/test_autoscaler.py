"""A cluster that grows and shrinks: Ray's own autoscaler, with machines
that are processes of this one (Ray's provider for that)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launcher.submit.test_jobs_on_cluster import Commands, until
from tests.support.growing_cluster import GrowingCluster

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]


class Growing(Commands):
    """`muster` beside such a cluster."""

    def __init__(self, folder: Path, cluster: GrowingCluster):
        super().__init__(folder)
        self.cluster = cluster

    def run(self, job: Path, *overrides: str, status: int = 0) -> str:
        return self("run", str(job), *overrides, "--on", str(self.cluster.file), status=status)


@pytest.fixture(scope="module")
def growing(tmp_path_factory) -> Iterator[Growing]:
    folder = tmp_path_factory.mktemp("growing")
    cluster = GrowingCluster(folder)
    yield Growing(folder, cluster)
    cluster.end()


@pytest.fixture
def job(place) -> Path:
    return place / "job.yaml"


def test_a_gang_brings_its_machines_at_once_says_what_is_coming_and_they_go_when_nobody_wants_them(growing, job):
    assert growing.cluster.machines() == 0
    said = growing.run(job, "resources.workers=2")
    # both at a time; the first may be up already when they are told of
    assert re.search(r"2 workers need one CPU each; the cluster has \d CPU \(\d free\); pending: 2 small", said), said
    assert "sft: done; the model is in" in said
    file = str(growing.cluster.file)
    again = growing("resume", said.split()[0], "--step", "2", "--on", file).split()[0]
    assert "sft: resuming after step 2" in growing("logs", "-f", again, "--on", file)
    until(lambda: growing.cluster.machines() == 0, lambda: growing.cluster.dashboard.nodes())


def test_what_can_never_come_is_told_at_once(growing, job):
    said = growing.run(job, "name=toolarge", "resources.workers=4", status=2)
    assert "resources.workers: the cluster cannot grow that large: 4 workers need one CPU each" in said
    assert growing.cluster.machines() == 0


@pytest.mark.faults
def test_fewer_workers_will_do_if_the_job_says_so(growing, job):
    said = growing.run(job, "name=fewer", "resources.workers=4", "resources.min_workers=2")
    assert "requesting 2 workers (resources.min_workers)" in said
    assert "sft: done; the model is in" in said


@pytest.mark.faults
def test_a_run_that_has_cost_what_it_may_saves_stops_and_says_so(growing, job):
    long = ("phases.sft.max_steps=100000", "phases.sft.checkpoint.every=50000")
    said = growing.run(job, "name=dear", "max_cost=0.002", *long, status=3)
    assert "stopped and saved: max_cost is 0.002, the run has cost 0.00" in said
