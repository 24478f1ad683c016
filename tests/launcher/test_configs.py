"""The job files that come with Muster are right as they stand, without weights and without a network."""

from pathlib import Path

import pytest

from launcher import job

CONFIGS = Path(__file__).parents[2] / "configs"


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
