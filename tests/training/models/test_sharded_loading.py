"""Under ZeRO-3 no worker ever holds the whole model, not even while it loads."""

import pytest

from tests.support.fork_group import ForkGroup
from training.group import results

pytestmark = pytest.mark.cpu

MIB = 1 << 20


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A LLaMA of 59 M parameters in several files, 224 MiB in fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=4096, hidden_size=640, intermediate_size=1920, num_hidden_layers=10, num_attention_heads=10,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="60MB")
    return folder, 4 * model.num_parameters()


def test_a_worker_of_four_loads_little_more_than_its_quarter(model_folder, record_property):
    folder, whole = model_folder
    with ForkGroup(4, "tests.support.roles:LoadProbe") as group:
        sharded = max(results(group.call("load", str(folder), 3)))
    with ForkGroup(1, "tests.support.roles:LoadProbe") as group:
        unsharded = results(group.call("load", str(folder), 0))[0]
    print(
        f"model {whole / MIB:.0f} MiB; ZeRO-3 on 4 workers {sharded / MIB:.0f} MiB each; unsharded "
        f"{unsharded / MIB:.0f} MiB"
    )
    assert unsharded > 0.9 * whole, "the probe does not see what is loaded"
    # A quarter, and the file's or the layer's tensors that are in hand at one moment.
    assert sharded < 0.5 * whole
