"""Files of models, checkpoints and data that somebody spoilt: refused in words, or read;
never a traceback, never the machine's memory."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tests.support.hostile import bounded, spoilt, text_of
from tests.support.made_checkpoints import save_in
from training import model_folder
from training.checkpoint.format import MANIFEST, Reader, verify
from training.checkpoint.repository import Checkpoints
from training.data import files
from training.errors import InputError, MusterError
from training.estimate.parameters import shape_of
from training.storage import open_storage as storage_place

HEADER = json.loads(
    (lambda raw: raw)(
        '{"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"format": "pt"}}'
    )
)


@pytest.fixture(scope="module")
def model(template, tmp_path_factory) -> Path:
    """A model folder that may be spoilt file by file."""
    folder = tmp_path_factory.mktemp("models") / "model"
    shutil.copytree(template / "model", folder)
    return folder


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 260, "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False, "eos_token_id": 0, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "torch_dtype": "float32",
    "quantization_config": {"quant_method": "x"}, "auto_map": {"AutoConfig": "x.Y"},
}  # fmt: skip


def looked_at(folder: Path) -> None:
    """All that is found out about a model without loading it."""
    for look in (
        lambda: model_folder.inspect(folder),
        lambda: model_folder.inspect(folder, classifier=True, check_code=False),
        lambda: model_folder.notes_on(str(folder)),
        lambda: model_folder.quantization(folder),
        lambda: model_folder.window_of(str(folder)),
        lambda: model_folder.tensor_shapes(folder),
        lambda: shape_of(str(folder)),
    ):
        with suppress(MusterError):
            look()


@bounded
@given(config=spoilt(CONFIG))
def test_the_configuration_of_a_model(model, config):
    before = (model / "config.json").read_bytes()
    (model / "config.json").write_text(text_of(config), encoding="utf-8", errors="surrogatepass")
    try:
        looked_at(model)
    finally:
        (model / "config.json").write_bytes(before)


def weights(header: Any, length: int | None = None, data: bytes = bytes(24)) -> bytes:
    text = text_of(header).encode("utf-8", "surrogatepass")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@bounded
@given(header=spoilt(HEADER), length=st.sampled_from([None, None, None, 0, 1, 7, 2**31, 2**62, 2**64 - 1]))
def test_the_header_of_weights(model, header, length):
    file = model / "model.safetensors"
    before = file.read_bytes()
    file.write_bytes(weights(header, length))
    try:
        looked_at(model)
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 24]}, "its header is malformed"),
        ({"dtype": "F32", "shape": [10**13], "data_offsets": [0, 24]}, "its header is malformed"),
        ({"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}, "its header is malformed"),
        ({"dtype": "NEW", "shape": [10**13], "data_offsets": [0, 24]}, "its header is malformed"),
        ({"dtype": "F32", "shape": [2, 3], "data_offsets": [0, float("inf")]}, "its header is malformed"),
    ],
)
def test_tensors_that_cannot_be_are_refused(tmp_path, entry, message):
    file = tmp_path / "model.safetensors"
    file.write_bytes(weights({"w": entry}))
    with pytest.raises(ValueError, match=message):
        model_folder._read_header(file)


def test_a_header_of_more_bytes_than_there_can_be_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(weights(HEADER, 2**62))
    with pytest.raises(ValueError, match="is no safetensors file"):
        model_folder._read_header(file)


@bounded
@given(index=spoilt({"metadata": {"total_size": 24}, "weight_map": {"w": "model-00001-of-00001.safetensors"}}))
def test_the_index_of_weights(tmp_path_factory, template, index):
    folder = tmp_path_factory.mktemp("sharded")
    shutil.copy(template / "model" / "config.json", folder)
    (folder / "model-00001-of-00001.safetensors").write_bytes(weights(HEADER))
    (folder / "model.safetensors.index.json").write_text(text_of(index), encoding="utf-8", errors="surrogatepass")
    looked_at(folder)


ADAPTER = {
    "peft_type": "LORA", "base_model_name_or_path": "BASE", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
    "revision": None, "bias": "none", "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    "use_rslora": False,
}  # fmt: skip


@bounded
@given(config=spoilt(ADAPTER))
def test_the_configuration_of_an_adapter(tmp_path_factory, template, config):
    folder = tmp_path_factory.mktemp("adapter")
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{q}.lora_A.weight": np.zeros((4, 16), np.float32), f"{q}.lora_B.weight": np.zeros((16, 4), np.float32)},
        folder / "adapter_model.safetensors",
    )
    text = text_of(config).replace('"BASE"', json.dumps(str(template / "model")))
    (folder / "adapter_config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    looked_at(folder)
    with suppress(InputError):
        model_folder.adapter_in(str(folder))


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return Path(str(save_in(storage_place(str(tmp_path_factory.mktemp("run") / "checkpoints")), 2)))


def read_whole(folder: Path) -> None:
    where = storage_place(str(folder))
    with suppress(MusterError):
        verify(where)
    with suppress(MusterError):
        Checkpoints(storage_place(str(folder.parent))).newest_whole()
    with suppress(MusterError):
        reader = Reader(where)
        for name in reader.parameters:
            with suppress(MusterError):
                reader.whole(name)


@bounded
@given(data=st.data())
def test_the_manifest_of_a_checkpoint(checkpoint, data):
    before = (checkpoint / MANIFEST).read_text()
    manifest = data.draw(spoilt(json.loads(before)))
    (checkpoint / MANIFEST).write_text(text_of(manifest), encoding="utf-8", errors="surrogatepass")
    try:
        read_whole(checkpoint)
    finally:
        (checkpoint / MANIFEST).write_text(before)


@bounded
@given(data=st.data())
def test_the_header_of_a_shard_whose_checksum_is_right(checkpoint, data):
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    before, text = {}, (checkpoint / MANIFEST).read_text()
    file = checkpoint / manifest["files"][0]["name"]
    raw = before[file] = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = text_of(data.draw(spoilt(json.loads(raw[8 : 8 + length])))).encode("utf-8", "surrogatepass")
    header = len(header).to_bytes(8, "little") + header
    file.write_bytes(header + raw[8 + length :])
    manifest["files"][0] |= {
        "size": file.stat().st_size, "header": len(header), "xxh128": xxhash.xxh3_128_hexdigest(header),
    }  # fmt: skip
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    try:
        read_whole(checkpoint)
    finally:
        file.write_bytes(raw)
        (checkpoint / MANIFEST).write_text(text)


# Data


@bounded
@given(state=spoilt({"_data_files": [{"filename": "rows.arrow"}], "_split": "train", "_indices_data_files": None}))
def test_the_state_of_a_saved_data_set(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("saved")
    (folder / "rows.arrow").write_bytes(b"rows")
    (folder / "state.json").write_text(text_of(state), encoding="utf-8", errors="surrogatepass")
    read_rows(folder)


@bounded
@given(splits=spoilt({"splits": ["train", "test"]}))
def test_the_splits_of_a_saved_data_set_stay_in_its_folder(tmp_path_factory, splits):
    folder = tmp_path_factory.mktemp("saved")
    (folder / "x.arrow").write_bytes(b"rows")
    (folder / "dataset_dict.json").write_text(text_of(splits), encoding="utf-8", errors="surrogatepass")
    read_rows(folder)


def read_rows(folder: Path) -> None:
    with suppress(InputError):
        (source,) = files.expand(str(folder), Path("/"))
        for part in source.parts:
            assert Path(part.path).is_relative_to(folder)
            list(files.rows(part))


ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "b", "output": "c", "history": [["a", "b"]]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s", "tools": "[]"},
    {
        "messages": [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "b"}],
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
                "weight": 1,
            },
        ],
        "tools": [{"type": "function"}],
    },
    {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.0},
    {"question": "a", "answer": "b", "critique": "c", "verdict": "right"},
    {"text": "a"},
]


@bounded
@given(data=st.data())
def test_rows_of_every_format(tmp_path_factory, data):
    from training.data.formats import Parser

    row = data.draw(spoilt(data.draw(st.sampled_from(ROWS))))
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text(text_of(row) + "\n", encoding="utf-8", errors="surrogatepass")
    for read in files.rows(files.DataFile(str(file), "rows.jsonl")):
        if isinstance(read.value, files.RowError):
            continue
        for kind in (
            "text",
            "prompt_completion",
            "alpaca",
            "sharegpt",
            "messages",
            "critique",
            "preference",
            "prompts",
        ):
            with suppress(files.RowError):
                Parser(kind, {}, (kind,))(read.value)


# Templates


@pytest.mark.cpu
@pytest.mark.parametrize(
    "text",
    ["{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"],
)
def test_templates_that_cannot_be_rendered(template, tmp_path, text):
    from training.data.render import Renderer, load_tokenizer

    (tmp_path / "own.jinja").write_text(text)
    with pytest.raises(InputError, match="own.jinja cannot be rendered: "):
        Renderer(load_tokenizer(str(template / "model")), "own.jinja", tmp_path)
