"""A model folder is judged by its headers alone: sound ones give facts, broken ones say what to do."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from training.errors import InputError
from training.model_folder import inspect, notes_on

VOCAB, HIDDEN = 11, 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "num_hidden_layers": 2,
}


def tensors(layers=2):
    layer_weights = {
        f"model.layers.{n}.mlp.up_proj.weight": np.zeros((HIDDEN, HIDDEN), np.float32) for n in range(layers)
    }
    return {"model.embed_tokens.weight": np.zeros((VOCAB, HIDDEN), np.float32)} | layer_weights


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def configure(folder, **changes):
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def shard(folder):
    """The same weights in two files and an index."""
    (folder / "model.safetensors").unlink()
    parts: dict[str, dict] = {"part-1.safetensors": {}, "part-2.safetensors": {}}
    for index, (name, tensor) in enumerate(tensors().items()):
        parts[f"part-{1 + index % 2}.safetensors"][name] = tensor
    for file, part in parts.items():
        save_file(part, folder / file)
    places = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def problems(folder, **options):
    """What inspect says, with the folder's path left out."""
    with pytest.raises(InputError) as caught:
        inspect(folder, **options)
    return [str(problem).replace(f"{folder}/", "").replace(str(folder), "FOLDER") for problem in caught.value.problems]


def test_facts_of_a_sound_folder(folder):
    info = inspect(folder)
    assert (info.architecture, info.model_type, info.dtype) == ("LlamaForCausalLM", "llama", "float32")
    assert info.num_parameters == VOCAB * HIDDEN + 2 * HIDDEN * HIDDEN
    assert info.bytes == 4 * info.num_parameters
    assert (info.vocab_size, info.max_positions) == (VOCAB, 128)
    assert [file.name for file in info.weight_files] == ["model.safetensors"]


def test_weights_in_several_files_have_the_same_facts(folder):
    whole = inspect(folder)
    shard(folder)
    parts = inspect(folder)
    assert (parts.num_parameters, parts.bytes) == (whole.num_parameters, whole.bytes)
    assert [file.name for file in parts.weight_files] == ["part-1.safetensors", "part-2.safetensors"]


def test_the_file_size_is_compared_with_the_header(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-10], whole + b"12"):
        file.write_bytes(content)
        message = f"header promises {len(whole):,} bytes, the file has {len(content):,}: copy it again"
        assert problems(folder) == [f"model.safetensors: {message}"]


def test_a_file_that_ends_inside_its_header(folder):
    file = folder / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    file.write_bytes(file.read_bytes()[:50])
    assert problems(folder) == [
        f"model.safetensors: its header alone has {header} bytes, the file has 50: copy it again"
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no safetensors file (0 bytes); copy it again"),
        (b"\xff" * 20, "is no safetensors file (20 bytes); copy it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a Git LFS pointer instead of the weights; run `git lfs pull` in the folder",
        ),
        ((4).to_bytes(8, "little") + b"{...", "its header is malformed; copy it again"),
        ((4).to_bytes(8, "little") + b"[12]", "its header is malformed; copy it again"),
        ((14).to_bytes(8, "little") + b'{"a":{"b": 1}}', "its header is malformed; copy it again"),
        ((2).to_bytes(8, "little") + b"{}", "holds no tensors"),
    ],
)
def test_a_file_that_is_no_safetensors_file(folder, content, message):
    (folder / "model.safetensors").write_bytes(content)
    assert problems(folder) == [f"model.safetensors: {message}"]


def test_missing_files_of_an_index_are_named(folder):
    shard(folder)
    (folder / "part-2.safetensors").unlink()
    assert problems(folder) == [
        "model.safetensors.index.json: names 1 of 2 files that are not there: part-2.safetensors; copy them"
    ]


@pytest.mark.parametrize("name", ["../part-1.safetensors", "/part-1.safetensors", "a/../../part-1.safetensors", ""])
def test_an_index_names_nothing_outside_of_its_folder(folder, name):
    places = shard(folder)
    places["model.norm.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (problem,) = problems(folder)
    assert problem.startswith("model.safetensors.index.json: names files outside of its folder: ")


def test_tensors_that_the_index_promises_and_no_file_holds_are_named(folder):
    places = shard(folder)
    places["model.norm.weight"] = "part-1.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert problems(folder) == [
        "model.safetensors.index.json: names 1 tensors that their files do not hold: model.norm.weight; copy them again"
    ]


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_weight_map(folder, content):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(content)
    expected = "expected a `weight_map` from tensor names to file names; copy it again"
    assert problems(folder) == [f"model.safetensors.index.json: {expected}"]


def test_pickled_weights_are_refused_with_a_way_out(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (problem,) = problems(folder)
    assert problem.startswith(
        "FOLDER: has its weights in pytorch_model.bin, a pickle, which can run code when it is loaded"
    )
    assert "save_pretrained" in problem


def test_a_folder_without_weights_tells_what_it_holds(folder):
    (folder / "model.safetensors").unlink()
    assert problems(folder) == [
        "FOLDER: has no weights: no model.safetensors; the folder holds config.json, tokenizer.json"
    ]


def test_everything_is_told_at_once(folder):
    configure(folder, architectures=["BertForMaskedLM"])
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    assert problems(folder) == [
        (
            "config.json: BertForMaskedLM is not a causal language model; expected an architecture such as "
            "LlamaForCausalLM"
        ),
        "FOLDER: has no weights: no model.safetensors; the folder holds config.json",
        "FOLDER: has no tokenizer (tokenizer.json or tokenizer.model); copy it here or set model.tokenizer",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON in line 1: Expecting property name enclosed in double quotes; copy it again"),
        ("[]", "expected a JSON object"),
        ("{}", "says no `architectures`; expected one such as LlamaForCausalLM"),
    ],
)
def test_a_broken_config(folder, content, message):
    (folder / "config.json").write_text(content)
    assert problems(folder) == [f"config.json: {message}"]


def test_a_folder_that_is_not_there_a_file_and_an_adapter(folder, tmp_path_factory):
    with pytest.raises(InputError, match="no such folder"):
        inspect(folder / "nowhere")
    with pytest.raises(InputError, match="is a file; give the folder"):
        inspect(folder / "config.json")
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert problems(folder) == [
        "adapter_config.json: not a readable adapter of LoRA (KeyError('peft_type')); copy it again"
    ]
    empty = tmp_path_factory.mktemp("empty")
    assert problems(empty)[0] == "FOLDER: has no config.json; the folder is empty"


def test_weights_and_config_must_belong_together(folder):
    configure(folder, vocab_size=12, num_hidden_layers=4)
    assert problems(folder) == [
        (
            "config.json: says vocab_size 12, but the weights' model.embed_tokens.weight has 11 rows; they do not "
            "belong together"
        ),
        "FOLDER: its weights lack 2 of 4 layers: 2, 3; copy them again or correct config.json",
    ]


def test_weights_without_an_embedding(folder):
    weights = tensors()
    del weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors")
    (problem,) = problems(folder)
    assert problem.startswith("FOLDER: its weights have no token embedding; the first tensors are model.layers.0.mlp")


def test_a_tokenizer_may_lie_elsewhere(folder):
    (folder / "tokenizer.json").unlink()
    assert inspect(folder, tokenizer_elsewhere=True).vocab_size == VOCAB


def test_python_code_of_a_model_needs_consent_unless_transformers_knows_the_model(folder):
    auto_map = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    configure(folder, auto_map=auto_map)
    assert inspect(folder).model_type == "llama"
    configure(folder, auto_map=auto_map, model_type="mine", architectures=["MineForCausalLM"])
    assert problems(folder) == [
        "config.json: the model needs Python code that comes with it (`auto_map`); if you trust it, set "
        "model.trust_remote_code: true (generate, eval, critique: --trust-remote-code)"
    ]
    assert inspect(folder, trust_remote_code=True).architecture == "MineForCausalLM"


def test_looking_into_a_folder_loads_no_torch():
    code = "import sys, training.model_folder; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_layers_that_the_configuration_does_not_count_are_named(folder):
    assert notes_on(str(folder)) == []
    configure(folder, num_hidden_layers=1)
    assert notes_on(str(folder)) == [
        (
            "config.json counts 1 layers, and the weights have more: layers 1 are not used; correct num_hidden_layers "
            "unless that is meant"
        )
    ]
    configure(folder, num_hidden_layers=1, num_nextn_predict_layers=1)
    assert notes_on(str(folder)) == [], "layers that predict further tokens are left out by transformers on purpose"


def test_a_loss_of_routers_that_is_not_learnt_is_named(folder):
    configure(folder, router_aux_loss_coef=0.02)
    assert notes_on(str(folder)) == []
    configure(folder, router_aux_loss_coef=0.02, output_router_logits=True)
    assert "router_aux_loss_coef 0.02" in notes_on(str(folder))[0]


def test_a_gguf_file_is_no_model_to_train(folder):
    (folder / "model.safetensors").rename(folder / "tiny.Q4.gguf")
    assert problems(folder) == [
        "FOLDER: has no weights: no model.safetensors; tiny.Q4.gguf is for llama.cpp: get the model that it was made of"
    ]
