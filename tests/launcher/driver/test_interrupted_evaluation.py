"""A long evaluation at the end of a run: what happens meanwhile costs no step,
and a request to stop is answered at once."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from tests.support.forked_command import muster
from training.checkpoint.format import METRICS

pytestmark = [pytest.mark.cpu, pytest.mark.faults]


def test_a_killed_worker_and_a_request_to_stop_within_an_evaluation(run, tiny, undisturbed):
    questions, last = tiny / "ppo.eval.jsonl", 120
    asked = f"phases.sft.eval={{data: {questions}, max_new_tokens: 200, batch: 4, samples: 30, temperature: 1.0}}"
    run.start(asked, f"phases.sft.eval_every={last}")
    run.wait_for(lambda: last in [event["step"] for event in run.events("checkpoint")], "the last checkpoint")
    os.kill(run.worker(1)["pid"], signal.SIGKILL)
    run.wait_for(lambda: len(run.events("training")) == 2, "the second attempt")
    assert (run.incident["checkpoint"], run.events("training")[-1]["step"]) == (last, last)
    time.sleep(1)  # "training" is noted a moment before a request to stop is an orderly one
    run.process.send_signal(signal.SIGTERM)
    run.finish(status=75)
    assert [event.get("orderly", True) for event in run.events("interrupted")] == [True]
    assert evaluations(run) == [], "it ended before the evaluation did"
    run.start(verb="resume")
    run.finish()
    assert run.result == undisturbed

    (evaluated,) = evaluations(run)
    noted = json.loads(run.read(f"sft/checkpoints/step-{last:08d}/{METRICS}"))
    assert noted == {name: evaluated[name] for name in noted}
    assert {"eval_loss", "eval_accuracy"} < noted.keys()
    words = (
        "--data",
        str(questions),
        "--max-new-tokens",
        "200",
        "--samples",
        "30",
        "--temperature",
        "1",
        "--seed",
        "3",
        "--json",
    )
    status, out = muster(run.folder, "eval", "runs/job", *words)
    assert status == 0, out
    alone = json.loads(out[out.index("{") :])
    assert alone["response_tokens"] == noted["eval_response_tokens"]


def evaluations(run) -> list[dict]:
    return [row for row in run.rows("sft/metrics.jsonl") if "eval_loss" in row]
