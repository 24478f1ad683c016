"""Job files, cluster files and runs that somebody spoilt: refused in words, or shown; never a traceback."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from cluster.errors import ClusterError
from launcher.jobfile import job as jobs
from launcher.jobfile import yaml_with_lines
from launcher.report import compare, status
from launcher.report import report as reports
from launcher.runfolder import run_folder
from launcher.submit import clusters
from tests.support.hostile import bounded, few, spoilt, text_of
from tests.support.made_runs import QUESTIONS, MadeRun
from training.errors import InputError, MusterError

JOB = {
    "name": "sums",
    "seed": 1,
    "storage": "runs",
    "env": ["HOME"],
    "model": {"path": "model", "dtype": "fp32", "lora": {"rank": 4}},
    "resources": {"workers": 1, "gpus_per_worker": 0},
    "sharding": {"stage": 0},
    "deepspeed": {"zero_optimization": {"x": 1}},
    "phases": {
        "sft": {
            "data": {
                "train": [{"path": "data/train.jsonl", "weight": 1}],
                "eval": "data/heldout.jsonl",
                "columns": {"prompt": "p"},
            },
            "max_steps": 4,
            "batch": 4,
            "learning_rate": 1e-3,
            "checkpoint": {"every": 2, "best": {"metric": "eval_loss"}},
            "schedule": {"name": "cosine", "warmup": 0.1},
            "optimizer": {"betas": [0.9, 0.95]},
        }
    },
}


@few
@given(job=spoilt(JOB))
def test_job_files(place, job):
    file = place / "other.yaml"
    file.write_text(text_of(job), encoding="utf-8", errors="surrogatepass")
    with suppress(InputError):
        jobs.load(file)
    with suppress(InputError):
        jobs.read(file)


CLUSTERS: list[dict[str, Any]] = [
    {
        "provider": "ssh",
        "name": "x",
        "head": {"host": "a", "cpus": 1},
        "pools": {"p": {"hosts": ["b"], "gpus": 1, "gpu": "H100", "price": 1.0}},
    },
    {
        "provider": "aws",
        "name": "x",
        "region": "r",
        "head": {"instance": "m5.large"},
        "pools": {"p": {"instance": "p4d.24xlarge", "max": 2}},
    },
    {"provider": "slurm", "name": "x", "folder": "/f", "workers_per_node": 1, "options": ["--x"]},
    {"provider": "existing", "name": "x", "address": "http://a:8265", "ssh": "b"},
]


@pytest.mark.parametrize("spec", CLUSTERS, ids=lambda spec: spec["provider"])
def test_cluster_files(place, spec):
    @few
    @given(given_spec=spoilt(spec))
    def spoilt_one(given_spec: Any) -> None:
        file = place / "cluster.yaml"
        file.write_text(text_of(given_spec), encoding="utf-8", errors="surrogatepass")
        with suppress(InputError, ClusterError):
            clusters.load(file)

    spoilt_one()


@few
@given(raw=spoilt({"zero_optimization": {"stage": 2}, "train_batch_size": 4}))
def test_settings_of_deepspeed(place, raw):
    (place / "ds.json").write_text(text_of(raw), encoding="utf-8", errors="surrogatepass")
    with suppress(InputError):
        jobs.load(place / "job.yaml", ["deepspeed=ds.json"])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short run with a failure, an evaluation and a checkpoint."""
    made = MadeRun(tmp_path_factory.mktemp("runs"), "one", {"sft": {}})
    made.start("sft", total=4)
    made.steps("sft", 1, 2)
    made.save("sft", 2)
    made.evaluate("sft", 2, 0.5, QUESTIONS[:2])
    made.fail("sft", 2, 2)
    made.start("sft", by_itself=True, step=2, total=4)
    made.finish("sft", 4)
    return made.folder


def look(folder: Path) -> None:
    found = run_folder.RunFolder(folder)
    with suppress(MusterError):
        list(status.status_lines(status.status(found)))
    with suppress(MusterError):
        list(status.listing_lines(status.listing(str(folder.parent))))
    with suppress(MusterError):
        list(compare.lines(compare.compare(str(folder), str(folder))))
    with suppress(MusterError):
        reports.report([str(folder)])


def spoil_each_row(folder: Path, name: str) -> None:
    file = folder / name
    before = file.read_text()
    rows = [json.loads(line) for line in before.splitlines()]

    @bounded
    @given(spoilt_rows=spoilt(rows))
    def spoilt_one(spoilt_rows: Any) -> None:
        given_rows = spoilt_rows if isinstance(spoilt_rows, list) else [spoilt_rows]
        file.write_text("".join(text_of(row) + "\n" for row in given_rows), encoding="utf-8", errors="surrogatepass")
        look(folder)

    try:
        spoilt_one()
    finally:
        file.write_text(before)


@pytest.mark.parametrize("name", ["events.jsonl", "sft/metrics.jsonl"])
def test_what_runs_have_written_down(run, name):
    spoil_each_row(run, name)


def test_the_job_of_a_run(run):
    file = run / "job.yaml"
    before = file.read_text()

    @settings(few, max_examples=10)
    @given(job=spoilt(yaml_with_lines.load(file).data))
    def spoilt_one(job: Any) -> None:
        file.write_text(text_of(job), encoding="utf-8", errors="surrogatepass")
        look(run)

    try:
        spoilt_one()
    finally:
        file.write_text(before)
