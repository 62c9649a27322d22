"""Weight files: headers are read exactly, and anything invalid gives one error line."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan import RunSpec, card_names, estimate, find_model, load_card
from memplan.core.errors import ConfigError, MemplanError
from memplan.models.gguf import architectures, config_of
from memplan.models.headers import GGML_TYPES, ArrayLength, StoredTensor, read_gguf, read_safetensors, stored_bytes
from memplan.program.stored.checkpoint import built_tensors, notes
from tests.checkpoints import (
    TINY,
    folder_of,
    gguf_tensors,
    header,
    of_model,
    text,
    value,
    write_gguf,
    write_safetensors,
)
from tests.sampling import examples

Read = TypeVar("Read")


def line(error: pytest.ExceptionInfo[MemplanError]) -> str:
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


def one_line(read: Callable[[Path], Read], path: Path) -> Read | None:
    """Return what is read, or None after a one-line error."""
    failed = None
    try:
        return read(path)
    except MemplanError as error:
        failed = str(error)
    assert "\n" not in failed
    return None


def test_a_file_says_its_shapes_dtypes_and_bytes(tmp_path: Path) -> None:
    tensors = {
        "b": ("F8_E4M3", (128, 64)),
        "a.weight": ("BF16", (3, 5)),
        "scalar": ("F32", ()),
        "none": ("I64", (0, 7)),
    }
    read = read_safetensors(write_safetensors(tmp_path / "model.safetensors", tensors))
    assert {t.name: (t.dtype, t.shape) for t in read} == tensors
    assert {t.name: t.bytes for t in read} == {"b": 128 * 64, "a.weight": 2 * 15, "scalar": 4, "none": 0}
    assert stored_bytes(read) == {"F8_E4M3": 8192, "BF16": 30, "F32": 4, "I64": 0}


@pytest.mark.torch
def test_a_file_that_safetensors_writes_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors = {"x": torch.zeros(3, 4, dtype=torch.bfloat16), "y": torch.zeros(7, dtype=torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "model.safetensors")
    read = read_safetensors(tmp_path / "model.safetensors")
    assert {(t.name, t.dtype, t.shape) for t in read} == {("x", "BF16", (3, 4)), ("y", "F8_E4M3", (7,))}


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


WRONG_JSON: dict[str, Any] = {
    "no object": [],
    "a tensor without facts": {"x": 3},
    "an unknown dtype": {"x": entry("F7")},
    "a dtype that is no text": {"x": entry(["F32"])},
    "a negative size": {"x": entry(shape=[-2])},
    "a size that is no number": {"x": entry(shape=[True, 2])},
    "a shape with ten thousand dimensions": {"x": entry(shape=[1] * 10_000)},
    "a size beyond any": {"x": entry(shape=[2**63], offsets=[0, 2**65])},
    "negative offsets": {"x": entry(offsets=[-8, 0])},
    "offsets the wrong way round": {"x": entry(offsets=[8, 0])},
    "three offsets": {"x": entry(offsets=[0, 8, 8])},
    "fewer bytes than the shape has": {"x": entry(offsets=[0, 4])},
    "overlapping tensors": {"x": entry(), "y": entry(offsets=[4, 12])},
    "a gap": {"x": entry(), "y": entry(offsets=[16, 24])},
    "bytes that are not there": {"x": entry(), "y": entry(offsets=[8, 16])},
    "bits that are no bytes": {"x": entry("F4", [3], [0, 1])},
}


@pytest.mark.parametrize("said", WRONG_JSON.values(), ids=WRONG_JSON)
def test_a_header_that_contradicts_itself_is_one_line(said: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    body = json.dumps(said).encode()
    path.write_bytes(struct.pack("<Q", len(body)) + body + bytes(8))
    with pytest.raises(ConfigError) as error:
        read_safetensors(path)
    assert line(error).startswith(f"model: {path}")


WRONG_BYTES: dict[str, bytes] = {
    "nothing": b"",
    "half a length": b"\x01\x02",
    "a length of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "a length of 2^64 - 1": b"\xff" * 8 + b"{}",
    "a header cut short": struct.pack("<Q", 40) + b'{"x":{"dtype":"F32"',
    "no JSON": struct.pack("<Q", 5) + b"\x80\x04abc",
    "a key twice": struct.pack("<Q", 15) + b'{"x":{},"x":{}}',
    "a number of 5000 digits": struct.pack("<Q", 5006) + b'{"x":' + b"1" * 5000 + b"}",
    "100,000 levels": struct.pack("<Q", 200_006) + b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "4 million lists": struct.pack("<Q", 12_000_007) + b'{"x":[' + b"[],"[:3] * 4_000_000 + b"]",
}


@pytest.mark.parametrize("content", WRONG_BYTES.values(), ids=WRONG_BYTES)
def test_an_invalid_header_is_one_error_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_safetensors(tmp_path / "model.safetensors")
    line(error)


def test_a_header_larger_than_any_model_needs_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 50 * 2**20))
        file.truncate(2**40)  # a hole of a terabyte
    with pytest.raises(ConfigError) as error:
        read_safetensors(path)
    assert "header of 52,428,800 bytes" in line(error)


def test_only_the_header_of_a_large_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY), "utf-8")
    body = json.dumps({"x": entry(shape=[2**38], offsets=[0, 2**40])}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(body)) + body)
        file.truncate(8 + len(body) + 2**40)  # a hole of a terabyte
    checkpoint = find_model(str(tmp_path)).checkpoint
    assert checkpoint is not None
    assert checkpoint.tensors == (StoredTensor("x", "F32", (2**38,), 2**40),)


def test_an_empty_tensor_may_share_its_offset(tmp_path: Path) -> None:
    body = json.dumps({"x": entry(), "none": entry(shape=[0], offsets=[0, 0])}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(body)) + body + bytes(8))
    assert [tensor.name for tensor in read_safetensors(tmp_path / "model.safetensors")] == ["none", "x"]


def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(ConfigError) as error:
        find_model(str(tmp_path / "model.gguf"))
    assert "is not a regular file" in line(error)


@settings(max_examples=examples(200), deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_file_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for name, read in (("x.safetensors", read_safetensors), ("x.gguf", read_gguf)):
        for prefix in (b"", struct.pack("<Q", len(content)), b"GGUF" + struct.pack("<I", 3)):
            (folder / name).write_bytes(prefix + content)
            one_line(read, folder / name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F4", "Q4"]) | JSON,
        "shape": st.lists(st.integers(-1, 2**50), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 2**66), max_size=3) | JSON,
    },
)


@settings(max_examples=examples(200), deadline=None)
@given(said=st.dictionaries(st.text(max_size=8), ENTRY | JSON, max_size=4), size=st.integers(0, 64))
def test_any_json_is_a_header_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, said: dict[str, Any], size: int
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    body = json.dumps(said).encode()
    path.write_bytes(struct.pack("<Q", len(body)) + body + bytes(size))
    read = one_line(read_safetensors, path)
    assert read is None or sum(tensor.bytes for tensor in read) == size


def test_a_folder_is_answered_by_its_config_and_its_checkpoint_agrees(tmp_path: Path) -> None:
    run = RunSpec(model=str(folder_of(tmp_path / "one", TINY, of_model(TINY))), method="lora")
    plain = RunSpec(model={"config": TINY}, method="lora")
    assert estimate(run).bytes.allocated == estimate(plain).bytes.allocated
    assert estimate(run).notes == estimate(plain).notes
    sharded = folder_of(tmp_path / "two", TINY, of_model(TINY), shards=3)
    assert estimate(RunSpec(model=str(sharded), method="lora")).notes == estimate(plain).notes
    tensors = find_model(str(sharded)).checkpoint
    assert tensors is not None
    assert sum(t.elements for t in tensors.tensors) == estimate(plain).parameters.total


def test_file_paths_of_weights_mean_their_folder(tmp_path: Path) -> None:
    folder_of(tmp_path, TINY, of_model(TINY), shards=2)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        assert find_model(str(tmp_path / name)).num_hidden_layers == 3


def notes_of(folder: Path) -> list[str]:
    run = RunSpec(model=str(folder), batch={"sequence": 128})
    return [note for note in estimate(run).notes if "checkpoint" in note]


def test_tensors_that_the_model_does_not_build_are_noted(tmp_path: Path) -> None:
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": ("F32", (8,)) for i in range(3)}
    extra = {"model.layers.3.eh_proj.weight": ("BF16", (64, 128)), "model.layers.3.enorm.weight": ("BF16", (64,))}
    folder = folder_of(tmp_path, TINY, {**of_model(TINY), **buffers, **extra})
    size = 3 * 8 * 4 + 2 * (64 * 128 + 64)
    assert notes_of(folder) == [
        "the checkpoint also has 3 × model.layers.*.self_attn.rotary_emb.inv_freq and 2 × model.layers.3.* "
        f"({size / 1024:.1f} KiB): not in the model"
    ]


def test_tensors_missing_from_the_checkpoint_are_noted(tmp_path: Path) -> None:
    whole = of_model(TINY)
    part = {name: of for name, of in whole.items() if name != "lm_head.weight"}
    assert notes_of(folder_of(tmp_path, TINY, part)) == [
        "the checkpoint does not have lm_head.weight: newly initialised when the model is loaded"
    ]
    tied = {**TINY, "tie_word_embeddings": True}
    assert notes_of(folder_of(tmp_path / "tied", tied, {**of_model(tied)})) == []


def test_a_shape_that_contradicts_the_config_is_an_error_with_the_tensor(tmp_path: Path) -> None:
    tensors = {**of_model(TINY), "model.layers.1.mlp.up_proj.weight": ("BF16", (176, 64))}
    with pytest.raises(ConfigError) as error:
        estimate(RunSpec(model=str(folder_of(tmp_path, TINY, tensors))))
    assert line(error) == (
        "model: model.layers.1.mlp.up_proj.weight is 176 x 64 in the checkpoint, and 192 x 64 by its config"
    )


def test_names_without_the_class_before_them_and_transposed_matrices_agree(tmp_path: Path) -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100}
    tensors = {name.removeprefix("transformer."): of for name, of in of_model(gpt2, "F32").items()}
    assert tensors["h.0.attn.c_attn.weight"] == ("F32", (64, 192))
    assert notes_of(folder_of(tmp_path, gpt2, tensors)) == []


def test_layers_under_other_names_agree_by_their_elements(tmp_path: Path) -> None:
    joined = {
        name: of for name, of in of_model(TINY).items() if not name.endswith(("gate_proj.weight", "up_proj.weight"))
    }
    joined.update({f"model.layers.{i}.mlp.gate_up.weight": ("BF16", (384, 64)) for i in range(3)})
    assert notes_of(folder_of(tmp_path, TINY, joined)) == []


def test_a_dtype_unlike_the_configs_is_a_note_for_unquantised_weights(tmp_path: Path) -> None:
    config = {**TINY, "dtype": "float16"}
    for dtype, noted in (("F32", True), ("F16", False), ("U8", False)):
        model = find_model(str(folder_of(tmp_path / dtype, config, of_model(TINY, dtype))))
        assert any("though its config says float16" in note for note in notes(model)) == noted, dtype


def test_experts_one_by_one_agree_with_experts_stacked(tmp_path: Path) -> None:
    mixtral = {
        **TINY,
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }
    tensors = {name: of for name, of in of_model(mixtral).items() if ".mlp." not in name}
    for layer in range(3):
        moe = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{moe}.gate.weight"] = ("BF16", (4, 64))
        for expert in range(4):
            for name, shape in (("w1", (192, 64)), ("w2", (64, 192)), ("w3", (192, 64))):
                tensors[f"{moe}.experts.{expert}.{name}.weight"] = ("BF16", shape)
    assert notes_of(folder_of(tmp_path, mixtral, tensors)) == []


def test_weights_that_are_not_here_are_a_note(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, TINY, of_model(TINY), shards=2)
    (folder / "model-00002-of-00002.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    assert notes_of(folder) == ["the checkpoint was not looked at: model-00002-of-00002.safetensors is not here"]
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert notes_of(folder) == [
        "the checkpoint was not looked at: pytorch_model.bin is a pickle, which is never opened"
    ]


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError) as error:
        find_model(str(tmp_path / "pytorch_model.bin"))
    assert "is a pickle, which is never opened" in line(error)


def test_an_index_is_held_to_its_shards(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, TINY, of_model(TINY), shards=2)
    path = folder / "model.safetensors.index.json"
    good = json.loads(path.read_text())
    second = next(name for name, file in good["weight_map"].items() if "00002-" in file)
    for change, word in (
        ({"weight_map": {**good["weight_map"], "more": "model-00001-of-00002.safetensors"}}, "which"),
        ({"weight_map": {**good["weight_map"], second: "model-00001-of-00002.safetensors"}}, "does not list"),
        ({"weight_map": {"x": "../../model.safetensors"}}, "not a safetensors file in the same folder"),
        ({"weight_map": [1]}, "no weight_map"),
        ({}, "no weight_map"),
    ):
        path.write_text(json.dumps(change))
        with pytest.raises(ConfigError) as error:
            find_model(str(folder))
        assert word in line(error)


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen2-7B"}')
    with pytest.raises(ConfigError) as error:
        find_model(str(tmp_path))
    assert "is an adapter; give its base model, 'Qwen/Qwen2-7B'" in line(error)


METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "llama.context_length": 2048,
    "llama.block_count": 3,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 192,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.dimension_count": 16,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.tokens": [f"t{i}" for i in range(512)],
    "tokenizer.ggml.token_type": [1] * 512,
}


def test_a_gguf_file_is_answered_as_the_model_it_is_of(tmp_path: Path) -> None:
    tables = [("rope_freqs.weight", "F32", (8,))]
    path = write_gguf(tmp_path / "model.gguf", METADATA, [*gguf_tensors(TINY), *tables])
    for name in (str(path), str(tmp_path)):
        answer = estimate(RunSpec(model=name, method="lora"))
        assert answer.bytes.allocated == estimate(RunSpec(model={"config": TINY}, method="lora")).bytes.allocated
    matrices = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 192) + 2 * 512 * 64
    q4, f32 = matrices // 32 * 18, 4 * (7 * 64 + 8)
    assert answer.notes == (
        f"the GGUF file has {(q4 + f32) / 1024:.1f} KiB of tensors (Q4_0 {q4 / 1024:.1f} KiB, F32 {f32 / 1024:.1f} KiB)"
        ", which transformers trains dequantised",
    )
    assert isinstance(read_gguf(path).metadata["tokenizer.ggml.tokens"], ArrayLength)
    assert len(read_gguf(path).metadata["tokenizer.ggml.token_type"]) == 512


FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2": ({"model_type": "qwen2", "tie_word_embeddings": True}, {}),
    "qwen3": ({"model_type": "qwen3", "head_dim": 32}, {"attention.key_length": 32}),
    "gemma2": (
        {"model_type": "gemma2", "head_dim": 32, "sliding_window": 128},
        {"attention.key_length": 32, "attention.sliding_window": 128, "attn_logit_softcapping": 50.0},
    ),
    "phi3": ({"model_type": "phi3"}, {}),
    "qwen3moe": (
        {
            "model_type": "qwen3_moe",
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        {"attention.key_length": 32, "expert_count": 4, "expert_used_count": 2},
    ),
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_gguf_families_take_the_memory_of_their_configs(architecture: str, tmp_path: Path) -> None:
    own, more = FAMILIES[architecture]
    config = {**TINY, **own}
    metadata = {
        key.replace("llama.", f"{architecture}."): architecture if key == "general.architecture" else it
        for key, it in METADATA.items()
        if not key.startswith(("llama.rope", "general.name"))
    }
    metadata.update({f"{architecture}.{key}": it for key, it in more.items()})
    path = write_gguf(tmp_path / "model.gguf", metadata, gguf_tensors(config))
    answer = estimate(RunSpec(model=str(path), method="lora"))
    expected = estimate(RunSpec(model={"config": {**config, "max_position_embeddings": 2048}}, method="lora"))
    assert answer.bytes.allocated == expected.bytes.allocated
    assert find_model(str(path)).model_type == config["model_type"]


def test_a_mixtral_file_says_llama_and_has_experts(tmp_path: Path) -> None:
    mixtral = {**TINY, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    metadata = {**METADATA, "llama.expert_count": 8, "llama.expert_used_count": 2}
    path = write_gguf(tmp_path / "x.gguf", metadata, gguf_tensors(mixtral))
    config = config_of(read_gguf(path), "x")
    assert (config["model_type"], config["num_local_experts"], config["num_experts_per_tok"]) == ("mixtral", 8, 2)
    answer = estimate(RunSpec(model=str(path), method="lora"))
    assert answer.parameters == estimate(RunSpec(model={"config": mixtral}, method="lora")).parameters


def test_a_gguf_file_of_other_sizes_than_its_metadata_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", METADATA, gguf_tensors(TINY)[:5])
    with pytest.raises(ConfigError) as error:
        estimate(RunSpec(model=str(path)))
    assert "give the model's config.json" in line(error)


@pytest.mark.parametrize("said", ["rwkv7", "llama\n", "x" * 500])
def test_an_architecture_that_is_not_known_is_refused(said: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", {**METADATA, "general.architecture": said}, [])
    with pytest.raises(ConfigError) as error:
        find_model(str(path))
    assert "is not supported yet as GGUF" in line(error)


@pytest.mark.torch
def test_blocks_of_ggml_are_as_long_as_transformers_has_them() -> None:
    pytest.importorskip("torch")
    dequant = pytest.importorskip("transformers.integrations.gguf.dequant")
    assert {number: GGML_TYPES[number] for number in dequant.GGML_BLOCK} == {
        number: (dequant.GGML_NAME[number], *sizes) for number, sizes in dequant.GGML_BLOCK.items()
    }


def test_every_family_of_gguf_files_is_one_of_memplan() -> None:
    assert set(FAMILIES) <= set(architectures())


def test_parts_of_a_gguf_file_are_read_together(tmp_path: Path) -> None:
    tensors = gguf_tensors(TINY)
    for i in (0, 1):
        said = {**METADATA, "split.count": 2, "split.no": i} if i == 0 else {"split.count": 2, "split.no": i}
        write_gguf(tmp_path / f"m-0000{i + 1}-of-00002.gguf", said, tensors[i::2])
    assert estimate(RunSpec(model=str(tmp_path))).parameters.total == sum(
        t.elements for t in read_gguf(tmp_path / "m-00001-of-00002.gguf").tensors
    )
    with pytest.raises(ConfigError) as error:
        read_gguf(tmp_path / "m-00002-of-00002.gguf")
    assert "give the first, m-00001-of-00002.gguf" in line(error)


def test_a_gguf_file_of_a_billion_parts_is_one_line(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m-00001-of-999999999.gguf", {**METADATA, "split.count": 999_999_999}, [])
    with pytest.raises(ConfigError) as error:
        read_gguf(path)
    assert "claims to be one of 999999999 parts" in line(error)


def test_a_gguf_file_of_no_model_is_refused_by_its_kind(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "adapter.gguf", {**METADATA, "general.type": "adapter"}, gguf_tensors(TINY))
    with pytest.raises(ConfigError) as error:
        find_model(str(path))
    assert "is a GGUF file of the kind adapter, not a model" in line(error)


def test_a_list_per_layer_must_repeat_one_value_or_is_refused(tmp_path: Path) -> None:
    layers, heads = METADATA["llama.block_count"], METADATA["llama.attention.head_count"]
    same = {**METADATA, "llama.attention.head_count": [heads] * layers}
    assert config_of(read_gguf(write_gguf(tmp_path / "same.gguf", same, [])), "x")["num_attention_heads"] == heads
    other = {**METADATA, "llama.attention.head_count": [heads, *[1] * (layers - 1)]}
    with pytest.raises(ConfigError) as error:
        config_of(read_gguf(write_gguf(tmp_path / "other.gguf", other, [])), "x")
    assert "llama.attention.head_count differs between layers" in line(error)


def test_the_width_of_keys_comes_before_how_much_of_them_is_rotated(tmp_path: Path) -> None:
    said = {**METADATA, "llama.attention.key_length": 32, "llama.rope.dimension_count": 16}
    assert config_of(read_gguf(write_gguf(tmp_path / "model.gguf", said, [])), "x")["head_dim"] == 32


def gguf_head(tensors: int = 0, pairs: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


ARRAY_OF_TEXTS, ARRAY_OF_ARRAYS = struct.pack("<II", 9, 8), struct.pack("<II", 9, 9)
WRONG_GGUF: dict[str, bytes] = {
    "nothing": b"",
    "another magic": b"GGML" + bytes(20),
    "version 1": gguf_head(version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "10^9 tensors": gguf_head(10**9),
    "2^64 - 1 keys": gguf_head(0, 2**64 - 1),
    "a key of 2^60 letters": gguf_head(0, 1) + struct.pack("<Q", 2**60) + bytes(32),
    "a text of 2^60 letters": gguf_head(0, 1) + text("a") + struct.pack("<IQ", 8, 2**60) + bytes(32),
    "an array of 2^60 numbers": gguf_head(0, 1) + text("a") + struct.pack("<IIQ", 9, 4, 2**60) + bytes(32),
    "an array of 2^60 texts": gguf_head(0, 1) + text("a") + ARRAY_OF_TEXTS + struct.pack("<Q", 2**60) + bytes(99),
    "arrays in arrays": gguf_head(0, 1) + text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50,
    "an array of 2^60 arrays": gguf_head(0, 1) + text("a") + ARRAY_OF_ARRAYS + struct.pack("<Q", 2**60) + bytes(99),
    "a value of no type": gguf_head(0, 1) + text("a") + struct.pack("<I", 77) + bytes(32),
    "a key twice": gguf_head(0, 2) + (text("a") + value(1)) * 2,
    "a tensor of no type": gguf_head(1) + text("t") + struct.pack("<IQIQ", 1, 32, 99, 0) + bytes(64),
    "a tensor of 2^32 - 1 dimensions": gguf_head(1) + text("t") + struct.pack("<I", 2**32 - 1) + bytes(64),
    "a tensor of half a block": gguf_head(1) + text("t") + struct.pack("<IQIQ", 1, 33, 2, 0) + bytes(64),
    "a tensor beyond the end": gguf_head(1) + text("t") + struct.pack("<IQIQ", 1, 2**40, 0, 0) + bytes(64),
    "a tensor at an odd place": gguf_head(1) + text("t") + struct.pack("<IQIQ", 1, 4, 0, 7) + bytes(64),
    "a tensor at a negative place": gguf_head(1) + text("t") + struct.pack("<IQIq", 1, 4, 0, -32) + bytes(64),
    "a tensor's name that is no UTF-8": gguf_head(1)
    + b"\4\0\0\0\0\0\0\0\xff\x1b[2"
    + struct.pack("<IQIQ", 1, 9, 77, 0),
    "two tensors at one place": gguf_head(2)
    + b"".join(text(name) + struct.pack("<IQIQ", 1, 16, 0, 0) for name in "ab")
    + bytes(200),
    "one tensor twice": gguf_head(2)
    + b"".join(text("a") + struct.pack("<IQIQ", 1, 8, 0, at) for at in (0, 32))
    + bytes(200),
    "an alignment of 0": gguf_head(0, 1) + text("general.alignment") + value(0),
}


@pytest.mark.parametrize("content", WRONG_GGUF.values(), ids=WRONG_GGUF)
def test_a_gguf_file_that_is_wrong_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_gguf(tmp_path / "model.gguf")
    line(error)


@settings(max_examples=examples(150), deadline=None)
@given(data=st.data())
def test_a_gguf_file_with_wrong_bytes_is_read_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    path = write_gguf(folder / "model.gguf", {**METADATA, "tokenizer.ggml.tokens": ["a"] * 4}, gguf_tensors(TINY)[:4])
    good = bytearray(path.read_bytes()[:900])
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(good + bytes(data.draw(st.sampled_from([0, 10**6]))))
    one_line(lambda _: estimate(RunSpec(model=str(path))), path)


VALUES = st.booleans() | st.integers(0, 2**32 - 1) | st.floats(width=32) | st.text(max_size=8)
SAID = st.dictionaries(
    st.sampled_from([*METADATA, "llama.attention.key_length", "llama.expert_count", "general.type", "split.count"]),
    VALUES | st.lists(st.integers(-5, 2**31 - 1), max_size=4) | st.lists(st.text(max_size=3), min_size=1, max_size=3),
    max_size=5,
)


@settings(max_examples=examples(150), deadline=None)
@given(said=SAID)
def test_any_metadata_is_a_model_or_one_line(tmp_path_factory: pytest.TempPathFactory, said: dict[str, Any]) -> None:
    metadata = {**METADATA, "tokenizer.ggml.tokens": ["a"] * 4, **said}
    path = write_gguf(tmp_path_factory.mktemp("fuzz") / "model.gguf", metadata, gguf_tensors(TINY)[:6])
    one_line(lambda _: estimate(RunSpec(model=str(path))), path)


def test_a_written_header_reads_back_unchanged() -> None:
    assert list(header({"a": ("BF16", (2, 3))}).values()) == [entry("BF16", [2, 3], [0, 12])]
    assert StoredTensor("a", "BF16", (2, 3), 12).elements == 6


@pytest.mark.parametrize("name", card_names()[::16])
def test_every_parameter_of_a_model_has_one_name(name: str) -> None:
    model = load_card(name)
    assert sum(built.elements for built in built_tensors(model).values()) == model.card["parameters"]
