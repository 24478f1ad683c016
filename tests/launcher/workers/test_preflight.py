"""Machines are looked at before the first step: what reports of workers mean, and what comes of it."""

from __future__ import annotations

import pytest

from launcher.driver.retry_policy import Incident, decide
from launcher.workers import preflight
from launcher.workers.errors import Kind
from launcher.workers.preflight import judge
from training.group import results

GB = 10**9


def report(machine="10.0.0.2", **changes):
    """Of a GPU that is well."""
    return {
        "machine": machine, "versions": {"python": "3.11", "torch": "2.13.0", "driver": "570.1"},
        "device": "NVIDIA H100", "device_free": 79 * GB,
        "device_total": 80 * GB, "shared_memory": 8 * GB, "storage_problem": "", "storage_free": 900 * GB,
        "storage_s": 0.1,
        "storage_mb_s": 800.0, "product_right": True, "tflops": 700.0, "sent_mb_s": 200_000.0, "clock": 1000.0,
        **changes,
    }  # fmt: skip


def four(**of_the_third):
    """Two machines with two workers each; the third worker is as given."""
    links = [200_000.0, 40_000.0, 200_000.0, 40_000.0]
    machines = ["10.0.0.2", "10.0.0.2", "10.0.0.3", "10.0.0.3"]
    reports = [report(machine, sent_mb_s=link) for machine, link in zip(machines, links, strict=True)]
    reports[2] |= of_the_third
    return reports


def test_machines_that_are_well():
    assert judge(four(), room=100 * GB) == []
    assert judge([report()], room=0) == []
    assert judge([report(sent_mb_s=None)], room=0) == []


@pytest.mark.parametrize(
    ("odd", "said", "fatal"),
    [
        ({"product_right": False}, "computes a wrong product of two matrices", True),
        ({"tflops": 200.0}, "computes 3.5 times slower than the others", True),
        (
            {"versions": {"python": "3.11", "torch": "2.12.0", "driver": "570.1"}},
            "has torch 2.12.0, the others have 2.13.0",
            True,
        ),
        (
            {"versions": {"python": "3.11", "torch": "2.13.0", "driver": "550.9"}},
            "has driver 550.9, the others have 570.1",
            False,
        ),
        (
            {"storage_problem": "Permission denied"},
            "cannot use the storage, but other machines can: Permission denied",
            True,
        ),
        ({"storage_mb_s": 2.0}, "reads and writes the storage at 2.0 MB/s", False),
        ({"clock": 1400.0}, "has a clock that is off by 400 s", False),
        ({"shared_memory": 64 << 20}, "has 64 MiB of shared memory", False),
        ({"device_free": 50 * GB}, "has 27.9 GiB of its GPU in use by another process", False),
    ],
)
def test_a_machine_that_is_not(odd, said, fatal):
    (finding,) = judge(four(**odd), room=0)
    assert finding.message.startswith(said)
    assert (finding.rank, finding.fatal) == (2, fatal)


def test_a_machine_whose_network_is_slow_both_ways():
    """In a ring of four machines the links to and from it are slow."""
    reports = [report(f"10.0.0.{n}", sent_mb_s=speed) for n, speed in enumerate([40_000.0, 900.0, 1_000.0, 40_000.0])]
    slow = judge(reports, room=0)
    assert [(finding.rank, finding.fatal) for finding in slow] == [(1, False), (2, True)]
    assert "sends 1,000 MB/s to 10.0.0.3" in slow[1].message


def test_a_slow_processor_is_told_and_not_judged():
    """It is shared with whoever else is there."""
    reports = [report(device="cpu", device_total=0, device_free=0, tflops=speed) for speed in (0.1, 0.1, 0.02)]
    assert [(finding.rank, finding.fatal) for finding in judge(reports, room=0)] == [(2, False)]


def test_what_no_other_machine_would_mend():
    (full,) = judge([report(storage_free=5 * GB)] * 2, room=20 * GB)
    assert (full.rank, full.fatal) == (None, True)
    assert "5.0 GB free, but two checkpoints need 20.0" in full.message
    (broken,) = judge([report(storage_problem="Read-only file system")] * 3, room=0)
    assert (broken.rank, broken.fatal) == (None, True)


def test_an_unfit_machine_is_avoided_at_once_and_given_up_on_if_there_is_no_other():
    found = Incident(Kind.UNFIT, "multiplies wrong", step=1, checkpoint=0, rank=2, node="10.0.0.3")
    first = decide(found, [])
    assert (first.retry, first.avoid) == (True, {"10.0.0.3"})
    again = decide(found, [found])
    assert not again.retry
    assert "no other machines" in again.why


@pytest.mark.cpu
def test_workers_report(tmp_path, tiny):
    """Two real ones."""
    from tests.support.fork_group import ForkGroup

    (tmp_path / "checkpoints").mkdir()
    with ForkGroup(2, preflight.TARGET) as group:
        looked = results(group.call("look", str(tmp_path / "checkpoints")))
        linked = results(group.call("links"))
        nowhere = results(group.call("look", "/proc/nothing"))
    reports = [{**look, **link, "machine": "here"} for look, link in zip(looked, linked, strict=True)]
    assert [finding for finding in judge(reports, room=1) if finding.fatal] == []
    for each in reports:
        assert each["product_right"]
        assert each["tflops"] > 0
        assert each["storage_mb_s"] > 0
        assert each["sent_mb_s"] > 0
    assert abs(reports[0]["clock"] - reports[1]["clock"]) < 5
    assert list((tmp_path / "checkpoints").glob("*")) == []
    assert all(each["storage_problem"] for each in nowhere)
