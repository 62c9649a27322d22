"""Trace a step of one rank under DDP and FSDP, and print the rows for tests/program/test_traced_ranks.py.

python tests/golden/trace_ranks.py > tests/golden/traced_ranks.jsonl

A small Llama with every strategy, 2 to 64 GPUs, and each method, precision and kind of accumulation; options of FSDP
and DDP; small models of other families, mixtures, hybrids and encoders; and real ones. torch's process group `fake`
stands in for the other ranks; runs that the libraries do not support are listed on standard error. Takes about fifteen
minutes on one core. Runs in a file given as an argument are not traced again.

Rows named root- are of accelerate before 1.14, whose FSDP2 has embeddings and head in its root, and those named casts-
of accelerate before 1.13, whose FSDP2 casts all parts to fp32: they were traced as transformers-5 with the rows
`root_has_ends` and `fsdp2_casts_frozen` of the profile that they name, since a probe runs no other framework's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.core.errors import MemplanError
from memplan.estimate.estimate import estimate
from memplan.probe.libraries import versions
from memplan.spec.run import RunSpec
from tests.encoders import SMALL
from tests.golden.trace_runs import same, write
from tests.tiny import TARGETS, TINY

STRATEGIES = ("fsdp2", "fsdp", "ddp")
WORLDS = (2, 3, 8, 16, 64)
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
LORA = {"kind": "lora", "rank": 8}
PLAIN = {"kernels": {"checkpointing": "none"}}
TRAINER = {"loop": {"trainer": True}}
THREE = {"batch": {"micro": 2, "sequence": 64, "accumulation": 3}}
TIED = {"model": {"config": {**LLAMA, "tie_word_embeddings": True}}}
# Training options of a small Llama on four GPUs.
RUNS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "amp": {"precision": "amp"},
    "amp-trainer": {"precision": "amp", **TRAINER},
    "autocast": {"precision": {"weights": "bf16", "autocast": True}},
    "fp32": {"precision": "fp32"},
    "tied": TIED,
    "tied-plain": {**TIED, **PLAIN},
    "three": THREE,
    "three-trainer": {**THREE, **TRAINER},
    "three-trainer-amp": {**THREE, **TRAINER, "precision": "amp"},
    "long": {"batch": {"micro": 4, "sequence": 512}},
    "foreach": {"optimizer": "adamw_torch"},
    "sgd": {"optimizer": "sgd"},
    "lora": {"method": LORA},
    "lora-plain": {"method": LORA, **PLAIN},
    "lora-amp": {"method": LORA, "precision": "amp"},
    "lora-bf16": {"method": {**LORA, "adapter_dtype": "bf16"}},
    "lora-attention": {"method": {**LORA, "targets": ["q_proj", "v_proj"]}},
    "lora-dropout": {"method": {**LORA, "dropout": 0.1}, **PLAIN},
    "lora-tied": {"method": LORA, **TIED},
    "lora-three": {"method": LORA, **THREE},
    "lora-three-trainer": {"method": LORA, **THREE, **TRAINER},
}
# Options of FSDP and DDP on eight GPUs, for each of these runs.
HYBRID = {"shard_group": 2}
KEPT = {"reshard_after_forward": False}
KNOBS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    *((f"{name}-{s}", s, knob) for s in STRATEGIES[:2] for name, knob in (("hybrid", HYBRID), ("kept", KEPT))),
    *((f"hybrid-kept-{s}", s, {**HYBRID, **KEPT}) for s in STRATEGIES[:2]),
    ("forward-prefetch-fsdp", "fsdp", {"forward_prefetch": True}),
    ("post-fsdp", "fsdp", {"backward_prefetch": "post"}),
    ("no-prefetch-fsdp", "fsdp", {"backward_prefetch": "none"}),
    ("view-ddp", "ddp", {"bucket_view": True}),
)
WITH_KNOBS = ({}, PLAIN, {"precision": "amp"}, {"method": LORA}, TIED, {**THREE, **TRAINER})
# transformers' Trainer makes FSDP2 gather all weights of a model with adapters at once.
AT_ONCE = ({}, PLAIN, {"precision": "amp"}, TIED, THREE)
# With offloaded FSDP shards, on four GPUs and in groups of two on eight.
OFFLOADED = (
    *("plain", "amp", "amp-trainer", "autocast", "tied-plain", "three", "three-trainer", "three-trainer-amp", "long"),
    *("foreach", "lora", "lora-amp", "lora-three-trainer"),
)
# bitsandbytes' optimizers, to which FSDP1 passes flat vectors.
BITSANDBYTES = (
    *("adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "lion_8bit", "lion_32bit"),
    *("ademamix_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit"),
)
# Under FSDP1's NO_SHARD.
UNDIVIDED = (
    *("plain", "amp", "amp-trainer", "autocast", "fp32", "tied", "tied-plain", "three", "three-trainer"),
    *("three-trainer-amp", "foreach", "lora", "lora-amp", "lora-attention", "lora-three-trainer"),
)
# FSDP in a launcher's single process; FSDP1 traces no tied weights of adapters there, and does not offload.
ALONE = (
    *("plain", "amp", "tied", "autocast", "fp32", "three", "three-trainer-amp", "lora", "lora-amp", "lora-plain"),
    *("full", "lora-tied"),
)
OFFLOADED_ALONE = ("plain", "lora", "three-trainer", "tied-plain")
FAMILIES = (
    *("qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3", "gpt_neox", "opt", "bloom", "cohere2"),
    *("mixtral", "qwen3_moe", "granitemoe", "olmoe", "gpt_oss", "jamba", "qwen3_next"),
)
# Weights that the model keeps in fp32 are cast like all others by FSDP's mixed precision.
KEEPS_FP32 = ("deepseek_v4", "minimax_m3_vl_text")
MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "qwen3_next")
ENCODERS = ("bert", "vit", "whisper")
REAL: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama-3.2-1b", {"batch": {"sequence": 2048}}),
    ("llama-3.2-1b", {"batch": {"sequence": 2048}, "precision": "amp"}),
    ("llama-3.2-1b", {"batch": {"sequence": 2048}, "method": {"kind": "lora"}}),
    ("llama-3.1-8b", {"batch": {"sequence": 4096}}),
    ("llama-3.1-8b", {"batch": {"sequence": 4096}, "method": {"kind": "lora"}}),
)

ON_TEXT = {"batch": {"sequence": 512}}
WITH_IMAGE = {"batch": {"sequence": 600, "images": 1, "image_size": (448, 448)}}
LANGUAGE = {"frozen": ("vision", "projector")}
ONE_BY_ONE = {"cpu_ram_efficient_loading": False}  # accelerate 1.15 cannot send persistent buffers
# Models whose layers differ or share weights: windows, towers, embeddings shared by head, encoder and decoder.
UNEQUAL: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("gemma-3-4b", {**ON_TEXT, "method": "lora"}, {}),
    ("gemma-3-4b", {**ON_TEXT, "method": {"kind": "full", **LANGUAGE}}, {}),
    ("gemma-3-4b", {"batch": {"sequence": 600, "images": 1}}, {}),
    ("gemma-3-4b", ON_TEXT, {}),
    ("qwen3-vl-2b", ON_TEXT, {}),
    ("ministral-3-3b", {**ON_TEXT, "method": "lora"}, {}),
    ("ministral-3-3b", {**WITH_IMAGE, "method": {"kind": "full", **LANGUAGE}}, {}),
    ("qwen2.5-vl-3b", {**ON_TEXT, "method": "lora"}, {}),
    ("qwen2.5-vl-3b", WITH_IMAGE, {}),
    ("t5-base", {**ON_TEXT, "method": "lora"}, {}),
    ("t5-base", ON_TEXT, {}),
    ("flan-t5-base", ON_TEXT, ONE_BY_ONE),
    ("gemma-4-e2b", {**ON_TEXT, "method": "lora"}, ONE_BY_ONE),
    ("gemma-3n-e4b", {**ON_TEXT, "method": "lora"}, {}),
    ("gemma-3n-e4b", ON_TEXT, {}),
    ("whisper-large-v3", {}, {}),
    ("llama-3.2-11b-vision", {**ON_TEXT, "method": "lora"}, {}),
    ("opt-1.3b", {**ON_TEXT, "method": "lora"}, {}),
    ("gpt2", ON_TEXT, {}),
)
# Towers whose weights are flattened with others, trained or frozen, by FSDP1.
ON_IMAGE = {"batch": {"sequence": 600, "images": 1}}
TOWERS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("qwen3-vl-2b", ON_TEXT, 2),
    ("qwen3-vl-2b", {**ON_TEXT, **PLAIN}, 2),
    ("gemma-3-4b", ON_TEXT, 2),
    ("gemma-3-4b", {**ON_TEXT, **PLAIN}, 2),
    ("qwen3-vl-2b", {**ON_TEXT, "method": {"kind": "full", **LANGUAGE}}, 2),
    ("gemma-3-4b", {**ON_TEXT, "method": {"kind": "full", **LANGUAGE}}, 4),
    ("gemma-3-4b", ON_IMAGE, 2),
    ("ministral-3-3b", ON_TEXT, 4),
    ("qwen2.5-vl-3b", WITH_IMAGE, 2),
    ("qwen3-vl-2b", {**ON_TEXT, "precision": "amp"}, 4),
    ("gemma-3-4b", {**ON_IMAGE, "method": {"kind": "full", **LANGUAGE}}, 2),
    ("qwen3-vl-2b", {**ON_TEXT, "method": "lora"}, 2),
    ("qwen2.5-vl-3b", {**ON_TEXT, "method": "lora"}, 2),
    ("qwen2-vl-2b", {**ON_TEXT, "method": "lora"}, 2),
    ("ministral-3-3b", {**ON_TEXT, "method": "lora"}, 2),
)


def draw() -> Iterator[tuple[str, dict[str, Any]]]:  # noqa: PLR0912 (a branch for each case)
    small = {"model": {"config": LLAMA}, "batch": {"micro": 2, "sequence": 64}}
    for strategy in STRATEGIES:
        for world in WORLDS:
            yield f"full-{strategy}", {**small, **divided(strategy, world)}
            yield f"lora-{strategy}", {**small, "method": LORA, **divided(strategy, world)}
        for name, run in RUNS.items():
            yield f"{name}-{strategy}", {**small, **run, **divided(strategy, 4)}
        stored = {} if strategy == "ddp" else {"storage": "bf16"}
        qlora = {"kind": "qlora", "rank": 8, "quantization": stored}
        yield f"qlora-{strategy}", {**small, "method": qlora, **divided(strategy, 4)}
        yield f"qlora-plain-{strategy}", {**small, "method": qlora, **PLAIN, **divided(strategy, 4)}
        for kind in ("freeze", "dora"):
            method = {"kind": kind, **({"rank": 8} if kind == "dora" else {"trainable_layers": 2})}
            yield f"{kind}-{strategy}", {**small, "method": method, **divided(strategy, 4)}
            yield f"{kind}-plain-{strategy}", {**small, "method": method, **PLAIN, **divided(strategy, 4)}
    for name, strategy, knob in KNOBS:
        for run in WITH_KNOBS:
            fields = divided(strategy, 8)
            yield name, {**small, **run, **fields, "parallelism": {**fields["parallelism"], **knob}}
    for strategy in STRATEGIES[:2]:
        for world in WORLDS:
            yield f"offload-{strategy}", {**small, **offloaded(strategy, world)}
        for name in OFFLOADED:
            yield f"offload-{name}-{strategy}", {**small, **RUNS[name], **offloaded(strategy, 4)}
        qlora = {"kind": "qlora", "rank": 8, "quantization": {"storage": "bf16"}}
        yield f"offload-qlora-{strategy}", {**small, "method": qlora, **offloaded(strategy, 4)}
        for run in ({}, {"precision": "amp"}, {"method": LORA}):
            for knob in (HYBRID, KEPT):
                yield f"offload-knob-{strategy}", {**small, **run, **offloaded(strategy, 8, **knob)}
        for model, run in REAL[-2:]:
            yield f"offload-{model}-{strategy}", {"model": model, **run, **offloaded(strategy, 8)}
    for name in BITSANDBYTES:
        yield f"bnb-{name}-fsdp", {**small, "optimizer": name, **divided("fsdp", 4)}
    for run in ({"precision": "amp"}, TRAINER, {"method": LORA}):
        yield "bnb-fsdp", {**small, "optimizer": "adamw_bnb_8bit", **run, **divided("fsdp", 4)}
    for name in UNDIVIDED:
        fields = divided("fsdp", 4)
        run = {**small, **RUNS[name], **fields, "parallelism": {**fields["parallelism"], "shard_group": 1}}
        yield f"no-shard-{name}", run
    for world in WORLDS:
        fields = divided("fsdp", world)
        yield "no-shard", {**small, **fields, "parallelism": {**fields["parallelism"], "shard_group": 1}}
    for run in AT_ONCE:
        yield "adapters-trainer-fsdp2", {**small, "method": LORA, **run, **TRAINER, **divided("fsdp2", 4)}
    for family in FAMILIES:
        run = {"model": {"config": {"model_type": family, **TINY[family]}}, "batch": {"sequence": 64}}
        adapters = {**LORA, **({"targets": TARGETS[family]} if family in TARGETS else {})}
        for strategy in STRATEGIES:
            yield f"{family}-full-{strategy}", {**run, **divided(strategy, 4)}
            yield f"{family}-full-plain-{strategy}", {**run, **PLAIN, **divided(strategy, 4)}
            yield f"{family}-lora-{strategy}", {**run, "method": adapters, **divided(strategy, 4)}
    for family in MIXTURES:  # peft's adapters on their experts fail under FSDP1
        run = {"model": {"config": {"model_type": family, **TINY[family]}}, "batch": {"sequence": 64}}
        adapters = {**LORA, "targets": ["q_proj", "v_proj"]}
        yield f"{family}-lora-attention-fsdp", {**run, "method": adapters, **divided("fsdp", 4)}
    for family in KEEPS_FP32:
        config = {"model_type": family, **TINY[family], "max_position_embeddings": 1024}
        adapters = {**LORA, "targets": TARGETS.get(family, ["q_proj", "v_proj"])}
        run = {"model": {"config": config}, "method": adapters, "precision": "amp", "batch": {"sequence": 1024}}
        fields = divided("fsdp2", 4)
        yield f"{family}-lora-amp-fsdp2", {**run, **fields, "parallelism": {**fields["parallelism"], **ONE_BY_ONE}}
    for family in ENCODERS:
        length = {} if family in ("vit", "whisper") else {"sequence": 256}
        run = {"model": {"config": SMALL[family]}, "batch": {"micro": 2, **length}}
        for strategy in STRATEGIES:
            yield f"{family}-full-{strategy}", {**run, **divided(strategy, 4)}
            yield f"{family}-full-plain-{strategy}", {**run, **PLAIN, **divided(strategy, 4)}
            yield f"{family}-lora-{strategy}", {**run, "method": LORA, **divided(strategy, 4)}
    for model, run in REAL:
        for strategy in STRATEGIES:
            yield f"{model}-{strategy}", {"model": model, **run, **divided(strategy, 8)}
    for model, run, knob in UNEQUAL:
        for world in (2, 4):
            fields = divided("fsdp2", world)
            parallelism = {**fields["parallelism"], **knob}
            yield f"unequal-{model}", {"model": model, **run, **fields, "parallelism": parallelism}
    for model, run, world in TOWERS:
        yield f"tower-{model}", {"model": model, **run, **divided("fsdp", world)}
    yield from alone()


def alone() -> Iterator[tuple[str, dict[str, Any]]]:
    small = {"model": {"config": LLAMA}, "batch": {"micro": 2, "sequence": 64}}
    qlora = {"kind": "qlora", "rank": 8, "quantization": {"storage": "bf16"}}
    for strategy in STRATEGIES[:2]:
        for name in ALONE:
            yield f"alone-{name}-{strategy}", {**small, **RUNS.get(name, {}), **divided(strategy, 1)}
        yield f"alone-qlora-{strategy}", {**small, "method": qlora, **divided(strategy, 1)}
        for model, run in REAL[:3]:
            yield f"alone-{model}-{strategy}", {"model": model, **run, **divided(strategy, 1)}
    for name in OFFLOADED_ALONE:
        yield f"alone-offload-{name}-fsdp2", {**small, **RUNS[name], **offloaded("fsdp2", 1)}


def divided(strategy: str, world: int) -> dict[str, Any]:
    return {"parallelism": {"world": world, "dp": world, "strategy": strategy}, "gpu": "a100-sxm-80gb"}


def offloaded(strategy: str, world: int, **knobs: Any) -> dict[str, Any]:
    fields = divided(strategy, world)
    return {**fields, "parallelism": {**fields["parallelism"], **knobs, "offload": {"parameters": True}}}


def main() -> None:
    done: set[str] = set()
    if len(sys.argv) > 1 and Path(sys.argv[1]).exists():
        lines = map(json.loads, Path(sys.argv[1]).read_text("utf-8").splitlines())
        done = {same(RunSpec(**row["run"])) for row in lines if "run" in row}
    else:
        about = "One rank's training steps under DDP and FSDP, traced: see tests/golden/trace_ranks.py."
        print(json.dumps({"about": about, "date": "2026-11-26", "versions": dict(versions())}), flush=True)
    wanted: list[tuple[str, RunSpec]] = []
    for name, fields in draw():
        run = RunSpec.model_validate(fields)
        try:
            estimate(run)
        except MemplanError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        if same(run) not in done:
            wanted.append((name, run))
    write(wanted)


if __name__ == "__main__":
    main()
