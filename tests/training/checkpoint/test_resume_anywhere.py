"""One checkpoint restores at any number of workers and any ZeRO stage: every number exactly,
and no worker holds it all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.support.fork_group import ForkGroup
from tests.support.training_fixtures import Recorder, sft_phase
from tests.training.checkpoint.test_exact_resume import state
from training.checkpoint.format import Manifest
from training.checkpoint.repository import opened
from training.drivers import supervised
from training.group import results
from training.storage import open_storage

pytestmark = pytest.mark.cpu

STEPS, AT = 8, 4
WRITERS = [(2, 2), (3, 3), (1, 0), (2, 1)]
TRAINER = "training.roles.language:LanguageTrainer"


def phase_of(tiny, workers, stage, **settings):
    return sft_phase(tiny, workers=workers, stage=stage, max_steps=STEPS, checkpoint={"every": AT}, **settings)


@pytest.fixture(scope="module")
def whole(train):
    return train(1, stage=0, max_steps=STEPS).losses


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    """written(workers, stage) -> the checkpoint after step 4 that they wrote."""
    known = {}

    def written(workers: int, stage: int):
        if (workers, stage) not in known:
            hooks = Recorder(tmp_path_factory.mktemp("written"), stop_after=AT)
            phase = phase_of(tiny, workers, stage)
            with ForkGroup(workers, TRAINER, phase, str(tiny / "cache")) as group:
                assert supervised.run(phase, {"trainer": group}, hooks) is None
            known[workers, stage] = hooks.checkpoints.at(AT)
        return known[workers, stage]

    return written


def saved_again(group: ForkGroup, checkpoint, folder):
    """What the workers hold, written by them as a checkpoint of their own."""
    checkpoints = opened(open_storage(folder), 1)
    staged = checkpoints.stage(AT)
    results(group.call("begin_save", str(staged)))
    files = [file for of_worker in results(group.call("finish_save")) for file in of_worker]
    return checkpoints.commit(staged, replace(Manifest.read(checkpoint), files=files))


def check(written, whole, tiny, folder, before, after, **settings):
    checkpoint, (workers, stage) = written(*before), after
    with ForkGroup(workers, TRAINER, phase_of(tiny, workers, stage, **settings), str(tiny / "cache")) as group:
        results(group.call("setup"))
        assert results(group.call("restore", str(checkpoint))) == [None] * workers
        results(group.call("publish"))
        assert state(saved_again(group, checkpoint, folder)) == state(checkpoint)
        losses = [row["loss"] for row in results(group.call("train", AT, STEPS - AT))[0]["rows"]]
    assert losses == pytest.approx(whole[AT:], rel=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 8])
def test_a_checkpoint_of_two_workers_restores_anywhere(written, whole, tiny, tmp_path, workers, stage):
    check(written, whole, tiny, tmp_path, (2, 2), (workers, stage))


@pytest.mark.parametrize("after", [(1, 0), (2, 0), (2, 1), (2, 2), (4, 3), (8, 2)], ids=str)
@pytest.mark.parametrize("before", [(3, 3), (1, 0), (2, 1)], ids=str)
def test_and_so_do_others(written, whole, tiny, tmp_path, before, after):
    check(written, whole, tiny, tmp_path, before, after)


@pytest.mark.parametrize("after", [(1, 1), (2, 2), (3, 3)], ids=str)
def test_into_host_memory(written, whole, tiny, tmp_path, after):
    check(written, whole, tiny, tmp_path, (2, 2), after, sharding={"stage": after[1], "offload": "cpu"})


# Memory


@pytest.fixture(scope="module")
def larger(tiny, tmp_path_factory):
    """A folder with a model of 16 M parameters: 63 MB of weights, 189 MB with the moments."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("larger")
    shutil.copytree(tiny / "model", folder / "model")
    config = LlamaConfig(
        vocab_size=300, hidden_size=512, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8, eos_token_id=0, tie_word_embeddings=False, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.long), 3])
def test_no_worker_holds_the_optimizer_of_all_while_restoring(tiny, larger, tmp_path, stage):
    def phase(workers):
        model = {"path": str(larger / "model"), "dtype": "fp32"}
        return phase_of(tiny, workers, stage, model=model, batch=4)

    hooks = Recorder(tmp_path, stop_after=AT)
    with ForkGroup(2, TRAINER, phase(2), str(tiny / "cache")) as group:
        supervised.run(phase(2), {"trainer": group}, hooks)
    checkpoint = hooks.checkpoints.at(AT)
    parameters = sum(int(np.prod(shape)) for shape in Manifest.read(checkpoint).parameters.values())
    assert parameters > 15e6
    for workers in (2, 4):
        with ForkGroup(
            workers, "tests.support.measured_trainer:MeasuredTrainer", phase(workers), str(tiny / "cache")
        ) as group:
            results(group.call("setup"))
            results(group.call("finish_save"))  # the memory of the snapshot is there
            peaks = results(group.call("restore_measured", str(checkpoint)))
        # Its share of the two moments (the weights have their place already), and the blocks that are being read.
        share, reading = 8 * parameters / workers, 40e6
        assert share < max(peaks) <= share + reading
