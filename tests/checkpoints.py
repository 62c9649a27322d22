"""Sparse weight files for tests: safetensors and GGUF headers followed by holes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from memplan import ModelSpec
from memplan.models.headers import BITS, GGML_TYPES
from memplan.program.stored.checkpoint import built_tensors

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
Tensors = Mapping[str, tuple[str, Sequence[int]]]  # name -> dtype, shape


def of_model(config: Mapping[str, Any], dtype: str = "BF16") -> dict[str, tuple[str, Sequence[int]]]:
    """Return every parameter of the model, as transformers saves it."""
    return {name: (dtype, built.turned) for name, built in built_tensors(ModelSpec(config)).items()}


def header(tensors: Tensors) -> dict[str, Any]:
    """Return a safetensors header's JSON."""
    at, entries = 0, dict[str, Any]()
    for name, (dtype, shape) in tensors.items():
        end = at + prod(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return entries


def write_safetensors(path: Path, tensors: Tensors) -> Path:
    """Write a file whose weights are a hole."""
    entries = header(tensors)
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + max((entry["data_offsets"][1] for entry in entries.values()), default=0))
    return path


def folder_of(path: Path, config: Mapping[str, Any], tensors: Tensors, shards: int = 1) -> Path:
    """Write a folder as save_pretrained does."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    if shards == 1:
        write_safetensors(path / "model.safetensors", tensors)
        return path
    places: dict[str, str] = {}
    for i in range(shards):
        part = dict(list(tensors.items())[i::shards])
        file = write_safetensors(path / f"model-{i + 1:05}-of-{shards:05}.safetensors", part)
        places.update(dict.fromkeys(part, file.name))
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return path


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(it: Any) -> bytes:
    """Return a GGUF metadata value, preceded by its type."""
    match it:
        case bool():
            return struct.pack("<I?", 7, it)
        case int():
            return struct.pack("<II", 4, it)
        case float():
            return struct.pack("<If", 6, it)
        case str():
            return struct.pack("<I", 8) + text(it)
        case _:
            items = list(it)
            if items and isinstance(items[0], str):
                return struct.pack("<IIQ", 9, 8, len(items)) + b"".join(text(item) for item in items)
            return struct.pack(f"<IIQ{len(items)}i", 9, 5, len(items), *items)


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Iterable[tuple[str, str, Sequence[int]]]) -> Path:
    """Write a GGUF file of version 3; shapes are torch's."""
    numbers = {kind.name: (number, kind) for number, kind in GGML_TYPES.items()}
    infos, at, count = b"", 0, 0
    for name, dtype, shape in tensors:
        number, kind = numbers[dtype]
        dims = list(reversed(shape))
        infos += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, at)
        at += -(-prod(shape) // kind.elements * kind.bytes // 32) * 32
        count += 1
    pairs = b"".join(text(key) + value(it) for key, it in metadata.items())
    head = b"GGUF" + struct.pack("<IQQ", 3, count, len(metadata)) + pairs + infos
    with path.open("wb") as file:
        file.write(head)
        file.truncate(-(-len(head) // 32) * 32 + at)
    return path


# llama.cpp's names of transformers' modules. Source: gguf 0.19 tensor_mapping.py.
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_tensors(config: Mapping[str, Any], matrix: str = "Q4_0") -> list[tuple[str, str, Sequence[int]]]:
    """Return the model's parameters by llama.cpp's names: matrices quantised in blocks, the rest in fp32."""
    found: list[tuple[str, str, Sequence[int]]] = []
    for name, built in built_tensors(ModelSpec(config)).items():
        path, _, kind = name.rpartition(".")
        if path.endswith(".experts"):  # stacks; llama.cpp keeps gate and up separate
            layer = path.removeprefix("model.layers.").partition(".")[0]
            e, out, into = built.shape
            parts = ("gate", "up") if kind == "gate_up_proj" else ("down",)
            found += [(f"blk.{layer}.ffn_{p}_exps.weight", matrix, (e, out // len(parts), into)) for p in parts]
            continue
        if path.startswith("model.layers."):
            layer, _, inner = path.removeprefix("model.layers.").partition(".")
            path = f"blk.{layer}.{GGUF_NAMES[inner]}"
        else:
            path = GGUF_NAMES[path]
        found.append((f"{path}.{kind}", matrix if len(built.shape) == 2 else "F32", built.shape))
    return found
