"""Benchmarks: statistics, the name of a machine, and what is kept."""

from __future__ import annotations

import json

import pytest

from benchmarks import record


def test_spread_is_median_smallest_and_largest():
    assert record.spread([3.0, 1.0, 2.0, 10.0]) == {"median": 2.5, "min": 1.0, "max": 10.0}


def test_spread_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no values"):
        record.spread([])


def test_a_ratio_compares_each_round_with_its_neighbour():
    """A machine that slows down threefold from one round to the next does not show in the ratios."""
    assert record.ratios([1.0, 3.0], [2.0, 6.0]) == {"median": 0.5, "min": 0.5, "max": 0.5}


def test_ratios_of_unequal_rounds_are_refused():
    with pytest.raises(ValueError, match="zip"):
        record.ratios([1.0], [1.0, 2.0])


def test_largest_difference_looks_at_every_step_and_both_directions():
    assert record.largest_difference([1.0, 2.0, 3.0], [1.0, 2.5, 2.75]) == 0.5


@pytest.mark.parametrize(
    ("cpu", "flags", "gpu", "name"),
    [
        ("Intel(R) Xeon(R) Processor", "avx2 avx512f amx_tile", None, "2-core-xeon-amx"),
        ("AMD EPYC 7763 64-Core Processor", "avx2", None, "2-core-epyc"),
        ("Intel(R) Xeon(R) Processor", "avx512f", "NVIDIA H100 80GB HBM3", "2-core-xeon-avx512-h100-80gb-hbm3"),
        ("aarch64", "", None, "2-core-aarch64"),
    ],
)
def test_a_machine_is_named_after_what_it_is(cpu, flags, gpu, name):
    assert record.machine_name(2, cpu, flags, gpu) == name


def test_conditions_name_no_host():
    import socket

    found = record.conditions()
    assert {"date", "machine", "load_before", "versions"} <= set(found)
    assert socket.gethostname() not in json.dumps([found["machine"], found["versions"]])


def test_rows_are_appended_to_the_file_of_their_machine(tmp_path):
    for ratio in (1.0, 2.0):
        path = record.keep({"machine": "2-core-xeon", "ratio": ratio}, tmp_path / "results")
    assert path.name == "2-core-xeon.jsonl"
    assert [json.loads(line)["ratio"] for line in path.read_text().splitlines()] == [1.0, 2.0]
