"""The job files that come with Muster are right as they stand, without weights and without a network."""

from pathlib import Path

import pytest

from launcher.jobfile import job

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("llama2-*-sft.yaml")), ids=lambda file: file.stem)
def test_the_llama2_jobs_load_and_have_the_settings_of_its_authors(file):
    loaded = job.load(file)
    sft = loaded.phases["sft"]
    assert loaded.name == file.stem
    assert sft.model.path.startswith("meta-llama/Llama-2-")
    assert (sft.learning_rate, sft.optimizer.weight_decay, sft.batch, sft.epochs) == (2e-5, 0.1, 64, 2)
    assert sft.data.max_length == 4096
    assert sft.batch % sft.resources.workers == 0


def test_there_is_a_job_for_each_size_and_the_large_ones_shard_their_weights():
    stages = {
        size: job.load(CONFIGS / f"llama2-{size}-sft.yaml").phases["sft"].sharding.stage
        for size in ("7b", "13b", "70b")
    }
    assert stages == {"7b": 2, "13b": 3, "70b": 3}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_job_loads_and_is_named_like_its_file(file):
    loaded = job.load(file)
    assert loaded.name == file.stem
    assert all(phase.batch % phase.resources.workers == 0 for phase in loaded.phases.values())


def test_the_cft_job_has_the_settings_of_the_paper():
    cft = job.load(CONFIGS / "llama2-7b-cft.yaml").phases["cft"]
    assert (cft.learning_rate, cft.batch, cft.epochs, cft.data.max_length) == (5e-6, 512, 1, 2048)
    assert (cft.schedule.name, cft.schedule.warmup, cft.schedule.floor, cft.sharding.stage) == ("cosine", 0.1, 0.0, 3)
