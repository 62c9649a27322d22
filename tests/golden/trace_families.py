"""Trace a step of families at small and at real widths, and print the rows for tests/estimate/test_traced_steps.py.

python tests/golden/trace_families.py mixtral qwen3_moe >> tests/golden/traced_families.jsonl
python tests/golden/trace_families.py --layers 2 olmoe-1b-7b mixtral-8x7b >> tests/golden/traced_families.jsonl
python tests/golden/trace_families.py --layers 4 --sequence 128 --autocast qwen3.5-4b-text
python tests/golden/trace_families.py --sequence 128 --reentrant bloom mpt falcon gpt_neo
python tests/golden/trace_families.py --sequence 128 --dora gpt2
python tests/golden/trace_families.py --sequence 128 --dropout llama gpt_oss ernie4_5

A model_type is traced with its config in tests/tiny.py, a card with its own; `--layers` keeps only a card's first
layers, so that a model of hundreds of gigabytes can be traced at its real width. Each is traced with full, LoRA
and QLoRA, with and without checkpointing, and once each with eager attention, with padding and with dropout; or, by
option, with reentrant checkpointing, with DoRA and dropout, or with the config's attention_dropout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.models.cards import card_names, find_config
from memplan.spec.run import RunSpec
from tests.golden.trace_runs import write
from tests.tiny import TARGETS, TINY

RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((kind, {"method": {"kind": kind}}) for kind in ("full", "lora", "qlora")),
    *((kind, {"method": {"kind": kind}, "kernels": {"checkpointing": "none"}}) for kind in ("full", "lora", "qlora")),
)
MORE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("full", {"kernels": {"checkpointing": "none", "attention": "eager"}}),
    ("lora", {"method": {"kind": "lora", "dropout": 0.1}, "kernels": {"checkpointing": "none"}}),
    ("full", {"loop": {"padded": True}, "kernels": {"checkpointing": "none"}}),
)
REENTRANT: tuple[tuple[str, dict[str, Any]], ...] = tuple(
    (kind, {"method": {"kind": kind}, "kernels": {"checkpointing": "full", "reentrant": True, "attention": attention}})
    for kind in ("full", "lora")
    for attention in ("sdpa", "eager")
)
DORA: tuple[tuple[str, dict[str, Any]], ...] = tuple(
    (
        "dora",
        {"method": {"kind": "dora", "dropout": 0.1, "adapter_dtype": adapters}, "precision": precision, "kernels": how},
    )
    for adapters, precision in (
        ("bf16", {"weights": "bf16"}),
        ("fp32", {"weights": "bf16"}),
        ("fp32", {"weights": "fp32", "compute": "bf16", "autocast": True}),
    )
    for how in ({"checkpointing": "none"}, {"checkpointing": "full"}, {"checkpointing": "full", "reentrant": True})
)
DROPOUT: tuple[tuple[str, dict[str, Any]], ...] = (
    *(("full", {"kernels": {"checkpointing": how, "attention": "eager"}}) for how in ("none", "full")),
    ("lora", {"method": {"kind": "lora"}, "kernels": {"checkpointing": "none"}}),
)
# Modules that bitsandbytes does not quantise.
SKIPPED = {"mamba": ["lm_head", "dt_proj"]}


def method_of(model_type: str, method: dict[str, Any]) -> dict[str, Any]:
    """Return the method with the targets that this family supports."""
    kind = method.get("kind", "full")
    targets = {"targets": TARGETS[model_type]} if kind != "full" and model_type in TARGETS else {}
    quantised = kind == "qlora" and model_type in SKIPPED
    return {**method, **targets, **({"quantization": {"skip": SKIPPED[model_type]}} if quantised else {})}


def config_of(name: str, layers: int) -> dict[str, Any]:
    """The config to trace: of a model_type in tests/tiny.py, or of a card, cut to its first `layers`."""
    if name in TINY:
        return {"model_type": name, **TINY[name]}
    config = json.loads(json.dumps(find_config(name), default=list))
    for part in (config, config.get("text_config") or {}):
        for key in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
            if layers and key in part:
                part[key] = min(layers, part[key])
        for key in ("layer_types", "mlp_layer_types", "layers_block_type"):
            if layers and isinstance(part.get(key), list):
                part[key] = part[key][:layers]
        kinds = part.get("linear_attn_config") or {}
        for key in ("full_attn_layers", "kda_layers"):  # counted from 1
            if layers and key in kinds:
                kinds[key] = [i for i in kinds[key] if i <= layers]
    return config


def runs(
    names: list[str], layers: int, sequence: int, autocast: bool, only: tuple[tuple[str, dict[str, Any]], ...] = ()
) -> Iterator[tuple[str, RunSpec]]:
    precision = {"precision": {"weights": "fp32", "compute": "bf16", "autocast": True}} if autocast else {}
    for name in names:
        config = {**config_of(name, layers), **({"attention_dropout": 0.1} if only is DROPOUT else {})}
        for kind, options in only or (*RUNS, *(MORE if name in TINY else ())):
            method = method_of(config["model_type"], options.get("method", {"kind": "full"}))
            batch = {"micro": 8 if name in TINY else 2, "sequence": sequence}
            yield (
                f"{name}-{kind}",
                RunSpec(
                    model={"config": config},
                    batch=batch,
                    gpu="a100-sxm-80gb",
                    **{**options, **precision, "method": method},
                ),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", help="model_types of tests/tiny.py, or cards")
    parser.add_argument("--layers", type=int, default=0, help="trace only the first layers of a card")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--autocast", action="store_true", help="in fp32 under bf16 autocast")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--reentrant", dest="only", action="store_const", const=REENTRANT, default=())
    kinds.add_argument("--dora", dest="only", action="store_const", const=DORA)
    kinds.add_argument("--dropout", dest="only", action="store_const", const=DROPOUT)
    asked = parser.parse_args()
    unknown = [name for name in asked.names if name not in TINY and name not in card_names()]
    if unknown:
        parser.error(f"neither in tests/tiny.py nor a card: {', '.join(unknown)}")
    write(list(runs(asked.names, asked.layers, asked.sequence, asked.autocast, asked.only)))


if __name__ == "__main__":
    main()
