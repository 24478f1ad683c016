"""Adapters: what is trained, saved, exported, merged, gone on from."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from tests.support.training_fixtures import phase_of
from training.errors import InputError
from training.storage import open_storage

pytestmark = pytest.mark.cpu
LORA = {"rank": 4, "alpha": 8}
IDS = [[5, 6, 7, 8, 9, 10, 11]]


@pytest.fixture(scope="module")
def trained(tiny, train):
    """trained(recipe, stage) -> the hooks of a run of 8 steps with adapters, remembered."""
    known = {}

    def run(recipe="sft", stage=2):
        if (recipe, stage) not in known:
            known[recipe, stage] = train(2, recipe=recipe, stage=stage, lora=LORA)
        return known[recipe, stage]

    return run


def exported(tiny, hooks, out, recipe="sft", lora=LORA, **how):
    from training.checkpoint.export import export

    export(hooks.last, open_storage(out), phase_of(tiny, recipe, lora=lora), **how)
    return out


def logits(folder, adapter=None, classifier=False):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if classifier:
        lm = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=1)
    else:
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        lm = PeftModel.from_pretrained(lm, str(adapter))
    with torch.no_grad():
        return lm.eval()(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_only_adapters_are_trained_and_saved(trained, stage):
    from training.checkpoint.format import Manifest

    hooks = trained(stage=stage)
    manifest = Manifest.read(hooks.last)
    assert all(".lora_" in name for name in manifest.parameters)
    numbers = sum(int(np.prod(shape)) for shape in manifest.parameters.values())
    assert hooks.info.num_parameters == numbers
    content = sum(file.size - file.header for file in manifest.files)
    assert content == 12 * numbers  # weights and two moments, in fp32
    assert hooks.losses[-1] < hooks.losses[0]


def test_the_exported_adapter_is_one_that_peft_loads_and_merging_gives_the_same(tiny, trained, tmp_path):
    hooks = trained()
    adapter = exported(tiny, hooks, tmp_path / "adapter")
    merged = exported(tiny, hooks, tmp_path / "merged", merge=True)
    assert sorted(path.name for path in adapter.iterdir() if path.suffix == ".safetensors") == [
        "adapter_model.safetensors"
    ]
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == str(tiny / "model")
    with_adapter, base = logits(tiny / "model", adapter), logits(tiny / "model")
    assert np.abs(with_adapter - base).max() > 0.01
    # The product is rounded once more when it is added to the weights.
    assert logits(merged) == pytest.approx(with_adapter, abs=1e-5)


def test_an_adapter_of_some_layers_says_so(tiny, train, tmp_path):
    """PEFT would find tensors missing, and merge nothing, in layers that the folder claims and does not hold."""
    lora = {**LORA, "targets": ["layers.0.self_attn.q_proj", "v_proj"]}
    hooks = train(1, max_steps=2, lora=lora)
    adapter = exported(tiny, hooks, tmp_path / "adapter", lora=lora)
    merged = exported(tiny, hooks, tmp_path / "merged", lora=lora, merge=True)
    assert json.loads((adapter / "adapter_config.json").read_text())["target_modules"] == lora["targets"]
    assert logits(merged) == pytest.approx(logits(tiny / "model", adapter), abs=1e-5)


def test_a_reward_models_adapter_brings_its_head(tiny, trained, tmp_path):
    hooks = trained("reward")
    adapter = exported(tiny, hooks, tmp_path / "adapter", "reward")
    merged = exported(tiny, hooks, tmp_path / "merged", "reward", merge=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert logits(tiny / "model", adapter, classifier=True) == pytest.approx(logits(merged, classifier=True), abs=1e-5)


@pytest.mark.parametrize(("recipe", "stage"), [("sft", 2), ("sft", 3), ("reward", 3)])
def test_an_adapter_is_trained_on(tiny, trained, train, tmp_path, recipe, stage):
    """The first loss of a phase that starts from an adapter is the next one that its training would have had."""
    hooks = trained(recipe)
    model = {"path": str(exported(tiny, hooks, tmp_path / "adapter", recipe)), "dtype": "fp32", "lora": LORA}
    # The same first batch as after 0 steps: what the model has learnt shows as a smaller loss on it.
    on = train(1, recipe=recipe, stage=stage, model=model, max_steps=1)
    merged = {"path": str(exported(tiny, hooks, tmp_path / "merged", recipe, merge=True)), "dtype": "fp32"}
    again = train(1, recipe=recipe, stage=0, model=merged, max_steps=1)
    assert on.losses[0] == pytest.approx(again.losses[0], rel=1e-5)
    assert on.losses[0] < 0.9 * hooks.losses[0]


@pytest.mark.parametrize("stage", [0, 3])
def test_full_weights_may_start_from_an_adapter(tiny, trained, train, tmp_path, stage):
    from training.checkpoint.format import Manifest

    hooks = trained()
    adapter = exported(tiny, hooks, tmp_path / "adapter")
    merged = exported(tiny, hooks, tmp_path / "merged", merge=True)
    from_adapter, from_merged = (
        train(2, stage=stage, model={"path": str(folder), "dtype": "fp32"}, max_steps=2) for folder in (adapter, merged)
    )
    assert from_adapter.losses == pytest.approx(from_merged.losses, rel=1e-6)
    assert not any("lora" in name for name in Manifest.read(from_adapter.last).parameters)


def test_a_run_with_adapters_resumes_on_other_workers_at_another_stage(tiny, train, trained, tmp_path):
    whole = trained("reward", 2)
    train(2, tmp_path, stop_after=4, recipe="reward", stage=2, lora=LORA, checkpoint={"every": 4})
    on = train(3, tmp_path, recipe="reward", stage=3, lora=LORA, checkpoint={"every": 4})
    assert on.first == 4
    assert on.losses == pytest.approx(
        whole.losses[4:], rel=2e-5
    )  # a reward model's: tests/training/roles/test_same_curve.py


def test_the_start_of_adapters_hangs_on_the_seed_and_adds_nothing(tiny, train):
    first, other = (train(1, lora=LORA, seed=seed, max_steps=2).losses for seed in (5, 6))
    whole = train(1, max_steps=1).losses
    assert first[0] == pytest.approx(whole[0], rel=1e-6)
    assert first[1] != other[1]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], "`q_prj` matches no linear layer of the model; there are q_proj"),
        (["nothing"], "`nothing` matches no linear layer of the model; there are down_proj, gate_proj"),
    ],
)
def test_targets_that_match_nothing_are_refused(train, targets, message):
    with pytest.raises(InputError, match=message):
        train(1, lora={**LORA, "targets": targets})


def test_an_adapter_of_another_shape_is_refused(tiny, trained, train, tmp_path):
    adapter = exported(tiny, trained(), tmp_path / "adapter")
    with pytest.raises(InputError, match=r"rank 4 and alpha 8, model.lora says 8 and 16"):
        train(1, model={"path": str(adapter), "dtype": "fp32", "lora": {"rank": 8, "alpha": 16}})


def test_an_adapter_for_another_base_is_refused(tiny, trained, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from training.model_folder import inspect

    adapter = exported(tiny, trained(), tmp_path / "adapter")
    assert inspect(adapter).architecture == "LlamaForCausalLM"
    other = tmp_path / "other"
    LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    ).save_pretrained(other)
    shutil.copy(tiny / "model/tokenizer.json", other)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(other)}))
    with pytest.raises(InputError, match=r"is an adapter for another model: model.layers.0.*, which .*other has as \["):
        inspect(adapter)
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")})
    )
    with pytest.raises(InputError, match=r"was trained on .*gone, which is not here"):
        inspect(adapter)
    for variant in ("use_dora", "use_rslora"):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, variant: True}))
        with pytest.raises(InputError, match=rf"a kind of adapter that cannot be loaded here \({variant}\)"):
            inspect(adapter)


def model_of(tiny, folder, config):
    """A random model of a configuration with the tokenizer of the others."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny / "model", folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", ["sft", "reward"])
def test_names_in_files_may_lack_the_prefix_of_the_model(tiny, train, tmp_path, recipe):
    """As those of GPT-2 as published do: adapters are trained, used, and merged into what transformers alone loads."""
    from safetensors.torch import load_file, save_file
    from transformers import GPT2Config

    from training.model_folder import inspect
    from training.models import loading as models

    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2)
    base = model_of(tiny, tmp_path / "base", config)
    weights = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    how = {"model": {"path": str(base), "dtype": "fp32", "lora": LORA}, "max_steps": 3}
    hooks = train(1, recipe=recipe, **how)
    classifier = recipe == "reward"

    def of(out, **more):
        from training.checkpoint.export import export

        export(hooks.last, open_storage(out), phase_of(tiny, recipe, **how), **more)
        return out

    adapter, merged = of(tmp_path / "adapter"), of(tmp_path / "merged", merge=True)
    assert inspect(adapter, classifier=classifier).model_type == "gpt2"
    expected = logits(base, adapter, classifier=classifier)
    assert logits(merged, classifier=classifier) == pytest.approx(expected, abs=1e-5)
    if not classifier:
        import torch

        with torch.no_grad():
            own = models.for_inference(str(adapter))(torch.tensor(IDS)).logits.numpy()
        assert own == pytest.approx(expected, abs=1e-5)


def test_merging_goes_by_the_names_of_the_loaded_model_where_files_have_others(tiny, train, tmp_path):
    """Experts lie apart in the files of Mixtral and are one tensor in the loaded model;
    which adapters leave out, and it is told."""
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    base = model_of(tiny, tmp_path / "base", config)
    how = {"model": {"path": str(base), "dtype": "fp32", "lora": LORA}, "max_steps": 2}
    hooks = train(1, **how)
    (note,) = [note for note in hooks.info.notes if "experts" in note]
    assert "down_proj, gate_up_proj" in note
    assert "k_proj, o_proj, q_proj, v_proj" in note
    from training.checkpoint.export import export

    for out, merge in (("adapter", False), ("merged", True)):
        export(hooks.last, open_storage(tmp_path / out), phase_of(tiny, "sft", **how), merge=merge)
    assert logits(tmp_path / "merged") == pytest.approx(logits(base, tmp_path / "adapter"), abs=1e-5)


PARTS = [
    ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
    ({"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}, "trainable_token_indices"),
    ({"target_modules": ["q_proj"], "use_dora": True}, "use_dora"),
    ({"target_modules": ["q_proj"], "use_rslora": True}, "use_rslora"),
    ({"target_modules": ["q_proj"], "bias": "lora_only"}, "bias"),
    ({"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}, "rank_pattern"),
    ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "norm.weight"),
    ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "init_lora_weights pissa"),
]


@pytest.mark.parametrize(("settings", "named"), PARTS)
def test_an_adapter_of_which_a_part_would_not_be_applied_is_refused_by_name(tiny, tmp_path, settings, named):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from training.model_folder import inspect

    lm = AutoModelForCausalLM.from_pretrained(tiny / "model")
    get_peft_model(lm, LoraConfig(task_type="CAUSAL_LM", r=4, **settings)).save_pretrained(tmp_path)
    with pytest.raises(InputError) as caught:
        inspect(tmp_path)
    assert named in str(caught.value)
    assert "AutoPeftModelForCausalLM" in str(caught.value)


def test_an_adapter_on_quantized_weights_is_refused(tiny, trained, tmp_path):
    from training.model_folder import inspect

    adapter = exported(tiny, trained(), tmp_path / "adapter")
    base = tmp_path / "base"
    shutil.copytree(tiny / "model", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    with pytest.raises(InputError, match=r"whose weights are quantized \(gptq\)"):
        inspect(adapter)


def test_other_kinds_of_peft_are_refused_by_name(tiny, tmp_path):
    from peft import IA3Config, get_peft_model
    from transformers import AutoModelForCausalLM

    from training.model_folder import inspect

    lm = AutoModelForCausalLM.from_pretrained(tiny / "model")
    get_peft_model(lm, IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"peft_type IA3"):
        inspect(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_and_a_head_that_were_saved_whole(tiny, train, tmp_path, tied):
    """They are applied, and trained on; but not where the model below has one tensor for both and they differ."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    from training.model_folder import inspect
    from training.models import loading as models

    base = model_of(tiny, tmp_path / "base", LlamaConfig.from_pretrained(tiny / "model", tie_word_embeddings=tied))
    lm = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    made = get_peft_model(lm, config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    folder = tmp_path / "adapter"
    made.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    if tied:
        with pytest.raises(InputError) as caught:
            inspect(folder)
        message = str(caught.value)
        assert "was saved with lm_head.weight and model.embed_tokens.weight whole" in message
        assert "one tensor for embedding and head" in message
        assert "reward model" not in message
        return
    expected = logits(base, folder)
    with torch.no_grad():
        assert models.for_inference(str(folder))(torch.tensor(IDS)).logits.numpy() == pytest.approx(expected, abs=1e-5)
    first = [
        train(workers, stage=stage, max_steps=1, model={"path": str(folder), "dtype": "fp32", "lora": lora}).losses[0]
        for workers, stage, lora in ((1, 0, {"rank": 4, "alpha": 8}), (1, 0, None))
    ]
    assert first[0] == pytest.approx(first[1], rel=1e-6)
