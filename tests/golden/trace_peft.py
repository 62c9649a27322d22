"""Trace steps with peft's methods and LoRA's settings, and print rows for tests/estimate/test_traced_steps.py.

python tests/golden/trace_peft.py [METHOD ...] >> tests/golden/traced_peft.jsonl

Every method on its default targets and on all linear layers, with and without checkpointing, in bf16 with fp32 and bf16
adapters, under autocast, in fp32, over quantised weights if peft can, and with each of its settings.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.models.peft_methods import PEFT_METHODS
from memplan.spec.run import RunSpec
from tests.golden.trace_runs import write

SIZES = {
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1408,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
BF16, FP32 = {"weights": "bf16"}, {"weights": "fp32"}
AUTOCAST = {"weights": "bf16", "compute": "bf16", "autocast": True}
VECTORS: dict[str, Any] = {"options": {"vector_length": 128}}
# Settings of each method that change its parameters or operations.
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "adalora": ({"rank": 8, "dropout": 0.1},),
    "adamss": ({"rank": 24, "options": {"num_subspaces": 3, "subspace_rank": 4}},),
    "adaption_prompt": (
        {"options": {"adapter_len": 10, "adapter_layers": 1}},
        {"options": {"adapter_len": 16, "adapter_layers": 2}},
    ),
    "boft": ({"options": {"boft_block_size": 8}}, {"options": {"boft_block_size": 0, "boft_block_num": 4}}),
    "beft": ({},),
    "c3a": ({"options": {"block_size": 64}},),
    "cartridge": (
        {"options": {"num_virtual_tokens": 20}},
        {"options": {"num_virtual_tokens": 33, "num_frozen_tokens": 0}},
    ),
    "cpt": ({"options": {"cpt_token_ids": [7] * 20}}, {"options": {"cpt_token_ids": [*range(33)]}}),
    "deft": ({"rank": 4, "dropout": 0.1}, {"options": {"para": True}}),
    "delora": ({"rank": 4},),
    "fourierft": ({"options": {"n_frequency": 300}},),
    "frod": ({"options": {"sparse_rate": 0.05}}, {"dropout": 0.1}),
    "glora": (
        {"rank": 4},
        {"options": {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}},
        {"options": {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"}},
    ),
    "gralora": ({"rank": 8, "dropout": 0.1}, {"options": {"gralora_k": 4, "hybrid_r": 8}}),
    "hra": ({"rank": 4}, {"rank": 1}),
    "hira": ({"rank": 8, "dropout": 0.1},),
    "ia3": ({"options": {"feedforward_modules": "q_proj"}},),
    "lily": ({"rank": 8, "options": {"num_B": 4}, "targets": ["k_proj", "down_proj"]},),
    "ln_tuning": ({}, {"adapter_dtype": "bf16"}),
    "loha": ({"rank": 4},),
    "lokr": ({"rank": 64, "options": {"decompose_factor": 4}}, {"options": {"decompose_both": True}}),
    "oft": (
        {"options": {"oft_block_size": 24}},
        {"options": {"r": 8, "oft_block_size": 0}},
        {"options": {"block_share": True}},
        {"options": {"num_cayley_neumann_terms": 3}},
    ),
    "miss": ({"rank": 24, "dropout": 0.1},),
    "osf": ({"options": {"effective_rank": 400}, "adapter_dtype": "bf16"},),
    "peanut": ({"rank": 8}, {"options": {"depth": 2}}),
    "poly": ({"rank": 4, "options": {"n_tasks": 3, "n_skills": 2}}, {"options": {"n_splits": 4}}),
    "psoft": (
        {"rank": 8, "dropout": 0.1},
        {"options": {"psoft_orth": False, "ab_svd_init": "pissa_init"}},
        {"options": {"psoft_mag_a": False, "psoft_mag_b": False}},
    ),
    "pvera": ({"rank": 32, "dropout": 0.1},),
    "p_tuning": (
        {"options": {"num_virtual_tokens": 20}},
        {"options": {"num_virtual_tokens": 20, "encoder_hidden_size": 128}},
    ),
    "prefix_tuning": (
        {"options": {"num_virtual_tokens": 20}},
        {"options": {"num_virtual_tokens": 33, "prefix_projection": True}},
        {"options": {"num_virtual_tokens": 20, "prefix_projection": True, "encoder_hidden_size": 128}},
    ),
    "multitask_prompt_tuning": (
        {"options": {"num_virtual_tokens": 20}},
        {"options": {"num_virtual_tokens": 33, "num_tasks": 4, "num_ranks": 8}},
    ),
    "prompt_tuning": ({"options": {"num_virtual_tokens": 20}}, {"options": {"num_virtual_tokens": 33}}),
    "randlora": ({"rank": 64, "dropout": 0.1},),
    "road": ({"options": {"variant": "road_2"}}, {"options": {"variant": "road_4", "group_size": 32}}),
    "shadow": (
        {},
        {"rank": 32},
        {"options": {"shadow_num_hidden_layers": 2}},
        {"options": {"shadow_intermediate_size": 256}},
        {"options": {"share_embeddings": False}},
        {"options": {"update_hidden_size": 64, "shadow_dropout": 0.0}},
        {"adapter_dtype": "bf16"},
        {"modules_to_save": ["lm_head"]},
    ),
    "shira": ({"rank": 16},),
    "supertuning": ({"options": {"sparsity": 0.9}},),
    "tinylora": ({"rank": 4, "dropout": 0.1}, {"options": {"u": 16}}),
    "trainable_tokens": ({"options": {"token_indices": [*range(9)]}}, {"options": {"token_indices": [1, 5]}}),
    "unilora": ({"rank": 8, "dropout": 0.1}, {"options": {"theta_d_length": 1000}}),
    "vblora": ({"rank": 8, "dropout": 0.1, **VECTORS}, {"options": {"vector_length": 64, "topk": 4}}),
    "waveft": ({"options": {"n_frequency": 300}}, {"options": {"use_idwt": False}}),
    "vera": ({"rank": 32, "dropout": 0.1},),
    "xlora": (
        {"dropout": 0.1, "options": {"adapters": 3, "use_trainable_adapters": True}},
        {"options": {"adapters": 2, "layerwise_scalings": True, "xlora_depth": 3, "xlora_size": 256}},
    ),
}


def one(
    kind: str,
    model: str = "qwen2",
    checkpointing: str = "none",
    precision: Any = BF16,
    words: int = 0,
    parts: Mapping[str, Any] = MappingProxyType({}),
    **method: Any,
) -> tuple[str, RunSpec]:
    """Return a named run; with few words in the vocabulary a block is the largest moment, not the loss.

    parts  fields of other parts of the run
    """
    shown = [*([f"{words} words"] if words else []), *map(str, (*method.values(), *parts.values()))]
    sizes = {**SIZES, **({"vocab_size": words} if words else {})}
    name = " ".join([kind, model, checkpointing, *map(str, precision.values()), *shown])
    fields: dict[str, Any] = {
        "model": model if "-" in model else {"config": {"model_type": model, **sizes}},
        "method": {"kind": kind, **method},
        "precision": precision,
        "optimizer": "adamw_torch_fused",
        "batch": {"micro": 2, "sequence": 256},
        "kernels": {"attention": "sdpa", "checkpointing": checkpointing},
    }
    for part, settings in parts.items():
        fields[part] = {**fields.get(part, {}), **settings}
    return name, RunSpec.model_validate(fields)


def other_runs(kind: str, settings: tuple[dict[str, Any], ...]) -> Iterator[tuple[str, RunSpec]]:
    """Yield runs of methods that adapt no linear layers, of which each has one of the `settings`."""
    first, row = settings[0], PEFT_METHODS[kind]
    wrapped = tuple(row.targets) if row.on == "attention" else ()
    # peft refuses to checkpoint a prefix, and takes the number of its heads from any config that has SIZES' name of it
    last, checkpointing = ("mistral", "none") if row.on == "prefix" else ("gpt2", "full")
    for i, model in enumerate(wrapped or ("qwen2", "gemma2", "llama", last)):
        yield one(kind, model, precision=(AUTOCAST, FP32)[i % 2], **first)
        yield one(kind, model, checkpointing, precision=(FP32, AUTOCAST)[i % 2], **first)
    for more in settings[1:]:
        yield one(kind, "llama" if wrapped else "qwen2", **more)
    for model, precision in (
        ("llama", AUTOCAST),
        ("mistral", BF16),
        ("qwen2", BF16),
        ("gemma2", FP32),
        ("qwen3", BF16),
    ):
        if row.on in ("prefix", "attention") and model in (wrapped or (model,)):
            yield one(kind, model, precision=precision, words=512, **first)
    if row.formats:
        yield one(kind, "qwen2", checkpointing, AUTOCAST, quantization={"format": "nf4"}, **first)


QV = ["q_proj", "v_proj"]
# LoRA's settings that choose modules by their paths, or train biases.
CHOSEN: tuple[dict[str, Any], ...] = (
    {"targets": QV, "options": {"layers_to_transform": [1]}},
    {"targets": [*QV, "down_proj"], "options": {"rank_pattern": {"q_proj": 64, "layers.1.mlp.down_proj": 4}}},
    {"targets": r".*\.1\..*(q|k|v|up)_proj"},
    {"targets": ["layers.0.self_attn.o_proj", "v_proj"]},
    {"targets": "all-linear", "options": {"exclude_modules": ["o_proj"], "bias": "all"}},
    {"targets": QV, "options": {"bias": "lora_only"}},
    {"targets": QV, "options": {"trainable_token_indices": [1, 2, 3]}},
)


def lora_runs() -> Iterator[tuple[str, RunSpec]]:
    for settings in CHOSEN:
        yield one("lora", **settings)
        yield one("lora", "gemma2", "full", AUTOCAST, **settings)
    yield one("lora", "gpt_neox", targets=["query_key_value"], options={"bias": "all"})
    for settings in CHOSEN[:3]:
        yield one("qlora", checkpointing="full", **settings)
        yield one("dora", **settings)
    more: tuple[tuple[str, dict[str, Any]], ...] = (
        ("qlora", {}),
        ("qlora", {"quantization": {"format": "int8"}}),
        ("dora", {"dropout": 0.1}),
    )
    for kind, settings in more:
        yield one(kind, "llama", "selective", AUTOCAST, targets="all-linear", **settings)


EAGER = {"kernels": {"attention": "eager"}}


def block_runs(kind: str, settings: tuple[dict[str, Any], ...]) -> Iterator[tuple[str, RunSpec]]:
    """Yield runs of a method that leads a second stream through the blocks."""
    for i, model in enumerate(("qwen2", "llama", "mistral", "gpt2", "gpt_neox", "opt", "phi", "mixtral", "falcon")):
        yield one(kind, model, words=512)
        yield one(kind, model, "full", (AUTOCAST, FP32)[i % 2])
    for model in ("gptj", "qwen3", "granite", "stablelm"):
        yield one(kind, model, "full", words=512)
    for model in ("gemma2", "bloom"):
        yield one(kind, model, words=512, parts=EAGER)
    yield one(kind, "gemma2", "full", AUTOCAST, parts=EAGER)
    yield one(kind, "gpt2", options={"share_embeddings": False})
    for more in settings[1:]:
        yield one(kind, words=512, **more)
        yield one(kind, "llama", "full", AUTOCAST, **more)
    for checkpointing in ("offload", "selective"):
        yield one(kind, checkpointing=checkpointing, words=512)
    yield one(kind, checkpointing="full", words=512, parts={"kernels": {"reentrant": True}})
    yield one(kind, checkpointing="full", words=512, parts={"kernels": {"every_n_layers": 2}})
    yield one(kind, parts={"batch": {"micro": 1}})
    yield one(kind, words=512, parts={"batch": {"accumulation": 2}})
    yield one(kind, parts={"loop": {"padded": True}})
    yield one(kind, parts={"loop": {"hold_outputs": True}})
    yield one(kind, precision=AUTOCAST, parts={"loop": {"trainer": True}})
    yield one(kind, "llama", words=512, parts={"kernels": {"attention": "flash_attention_2"}})
    yield one(kind, precision=FP32, words=512, parts={"kernels": {"attention": "sdpa_efficient"}})
    yield one(kind, "llama", "full", AUTOCAST, parts={"also": {"evaluation": {"micro": 8}}})
    for form in PEFT_METHODS[kind].formats:
        yield one(kind, words=512, quantization={"format": form})
        yield one(kind, "llama", "full", AUTOCAST, quantization={"format": form})
    yield one(kind, "qwen2.5-0.5b", "full", AUTOCAST)
    yield one(kind, "llama-3.2-1b", parts={"batch": {"micro": 1, "sequence": 1024}})


def runs(kind: str) -> Iterator[tuple[str, RunSpec]]:
    if kind == "lora":
        yield from lora_runs()
        return
    row = PEFT_METHODS[kind]
    if row.on == "blocks":
        yield from block_runs(kind, SETTINGS[kind])
        return
    if row.on != "linear":
        yield from other_runs(kind, SETTINGS[kind])
        return
    needed: dict[str, Any] = {"options": {"adapters": 2}} if kind == "xlora" else {}
    targets = ["q_proj", "o_proj"] if kind in ("c3a", "lily", "vblora") else "all-linear"
    yield one(kind, **needed)
    yield one(kind, "llama", "full" if row.again else "none", targets=targets, **needed)
    yield one(kind, "gemma2", precision=AUTOCAST, **needed)
    yield one(kind, precision=FP32, **needed)
    yield one(kind, adapter_dtype="bf16", **needed)
    for settings in SETTINGS[kind]:
        yield one(kind, **{"targets": "all-linear", **settings})
    if row.formats:
        yield one(kind, quantization={"format": "nf4"})
        yield one(kind, "llama", "full", AUTOCAST, targets="all-linear", quantization={"format": "nf4"})
        yield one(kind, quantization={"format": "int8"})


def main() -> None:
    write([pair for kind in sys.argv[1:] or (*PEFT_METHODS, "lora") for pair in runs(kind)])


if __name__ == "__main__":
    main()
