"""Benchmarks: from what the sides print and write to the figures that are told."""

from __future__ import annotations

import json
import os
import time

import pytest

from benchmarks import data, data_side, save, sft, start, step, stop, workload
from benchmarks.processes import Finished, Line


def curve(step_s: float, steps: int = 8, first_step_s: float = 10.0) -> sft.Curve:
    """A first step that is slow, as it always is, and then steady ones."""
    return sft.Curve(
        losses=[8.0 - n for n in range(steps)],
        step_s=[9.0, *[step_s] * (steps - 1)],
        tokens=[100] * steps,
        first_step_s=first_step_s,
        rest_s=1.1 * step_s * (steps - 1),
    )


def test_a_printed_curve_is_read_from_between_other_lines():
    texts = [
        "noise",
        '{"step": 1, "loss": 8.0, "step_s": 2.0, "tokens": 30}',
        "more",
        '{"step": 2, "loss": 7.0, "step_s": 1.0, "tokens": 50}',
    ]
    lines = [Line(float(at), text) for at, text in enumerate(texts)]
    read = sft.printed_curve(Finished(0.0, 4.0, lines, peak_gib=2.5))
    assert read.peak_gib == 2.5
    assert read.losses == [8.0, 7.0]
    assert (read.first_step_s, read.rest_s) == (1.0, 2.0)
    assert read.tokens_per_s == 25.0  # the first step's tokens do not count: its time holds the start


def test_the_step_ratio_leaves_the_warm_up_out():
    figures = step.summary(
        [curve(1.0), curve(3.0)], {"dealt": [curve(0.5), curve(1.5)], "padded": [curve(2.0), curve(6.0)]}
    )
    assert figures["ratio"]["median"] == 2.0
    assert figures["ratio_to_padded"]["max"] == 0.5
    assert figures["dealt_loss_difference"] == 0.0
    assert figures["muster_step_s"] == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_a_start_is_cut_at_the_events():
    times = {"started": "2026-01-01T00:00:03+00:00", "phase_started": "2026-01-01T00:00:05.500+00:00"}
    times |= {"training": "2026-01-01T00:00:09+00:00", "done": "2026-01-01T00:01:00+00:00"}
    events = [{"event": name, "time": time} for name, time in times.items()]
    began = 1767225600.0  # 2026-01-01 00:00 UTC
    run = sft.MusterRun(curve=curve(1.0), finished=Finished(began, 70.0), events=events)
    assert start.parts(run) == pytest.approx(
        {"command line, data, Ray": 3, "workers, imports, model, engine": 6, "first step": 1}
    )


def test_what_is_finished_first_does_not_count_as_waiting():
    figures = stop.summary([stop.Stopped(9.0, 6.0, 75), stop.Stopped(8.0, 6.5, 75), stop.Stopped(4.0, 0.0, 0)])
    assert figures["over_s"] == {"median": 3.0, "min": 1.5, "max": 4.0}
    assert figures["statuses"] == [75, 75, 0]


def test_the_share_of_an_iteration_is_known_from_the_metrics(tmp_path):
    (tmp_path / "ppo").mkdir()
    metrics, run = tmp_path / "ppo/metrics.jsonl", stop.ObservedRun(0, tmp_path)
    metrics.write_text('{"step": 1, "st')
    assert not stop.is_into_iteration(run, 0.0)
    metrics.write_text('{"step": 1, "step_s": 60.0}\n{"step": 2')
    assert [stop.is_into_iteration(run, share) for share in (0.0, 0.5)] == [True, False]
    os.utime(metrics, (time.time() - 31,) * 2)
    assert [stop.is_into_iteration(run, share) for share in (0.5, 0.6)] == [True, False]


def test_rows_are_equal_for_equal_seeds_and_long_as_those_of_gsm8k():
    made = list(workload.rows(500, seed=1))
    assert made == list(workload.rows(500, seed=1))
    assert made != list(workload.rows(500, seed=2))
    words = [len(json.dumps(row).split()) for row in made]
    assert 140 < sum(words) / len(words) < 180
    assert max(words) < workload.GSM8K.max_tokens
    assert all(row["prompt"].endswith("\n") and row["completion"] for row in made)


def test_skewed_rows_have_a_heavy_tail_and_about_the_mean_of_gsm8k():
    lengths = sorted(len(" ".join(row.values()).split()) for row in workload.rows(2000, 1, workload.SKEWED))
    assert 130 < sum(lengths) / len(lengths) < 190
    assert lengths[1000] < 130
    assert lengths[-20] > 800
    assert lengths[-1] < workload.SKEWED.max_tokens


def test_checkpoint_ratios_compare_a_round_with_itself():
    events = [
        {"event": "training", "parameters": 1000},
        *({"event": "checkpoint", "stall_s": s} for s in (0.1, 0.3, 9.0)),
    ]
    runs = [sft.MusterRun(curve=curve(step_s), finished=Finished(0.0, 1.0), events=events) for step_s in (1.0, 1.1)]
    restored = {n: [[{"event": "restored", "seconds": n * 1.0}]] for n in (2, 1, 3)}
    figures = save.summary(runs[:1], runs[1:], [{"save_s": 2.0, "load_s": 4.0}], restored, 12_600, 1000)
    assert figures["stall_ratio"]["median"] == 0.1  # the save after the last step holds nothing up
    assert figures["restore_ratio"]["median"] == 0.5
    assert (figures["restore_1_workers_ratio"]["max"], figures["restore_3_workers_ratio"]["max"]) == (0.25, 0.75)
    assert figures["size_ratio"] == 1.05
    assert figures["step_ratio"]["median"] == pytest.approx(1.1)


def test_rates_and_growth_of_the_data_are_those_of_neighbouring_rounds():
    def sides(*cold_s: float, peak: float) -> dict[int, list[data.Side]]:
        return {
            rows: [data.Side(rows, time, 0.01, peak_mib) for time in cold_s]
            for rows, peak_mib in ((data.SMALL, 100.0), (data.LARGE, peak))
        }

    figures = data.summary({"muster": sides(10.0, 20.0, peak=100.0), "datasets": sides(20.0, 60.0, peak=150.0)})
    assert figures["ratio"] == {"median": 2.5, "min": 2.0, "max": 3.0}
    assert figures["muster_rows_per_s"]["max"] == data.LARGE / 10
    assert (figures["muster_memory_growth"]["median"], figures["datasets_memory_growth"]["median"]) == (1.0, 1.5)


@pytest.mark.cpu
def test_both_sides_of_the_data_give_the_same_tokens_and_another_row_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(data_side, "PROCESSES", 1)
    work = workload.make(tmp_path, 40, shape=workload.Shape(8, 8, 1, 1))
    fewer = data._first(work.rows, 30)
    assert data._same(tmp_path / "ours", tmp_path / "theirs", work.model, fewer)
    monkeypatch.setattr(data_side, "IGNORED", 0)
    assert not data._same(tmp_path / "ours", tmp_path / "others", work.model, fewer)


def test_the_hands_of_a_batch_are_a_small_part_of_a_step(tmp_path):
    for figures in data._hands(tmp_path).values():
        assert 0 < figures["share"] < 1
