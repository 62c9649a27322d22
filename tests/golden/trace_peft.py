"""Trace steps with peft's methods other than LoRA, and print rows for tests/estimate/test_traced_steps.py.

python tests/golden/trace_peft.py [METHOD ...] >> tests/golden/traced_peft.jsonl

Every method on its default targets and on all linear layers, with and without checkpointing, in bf16 with fp32 and bf16
adapters, under autocast, in fp32, over quantised weights if peft can, and with each of its settings.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
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
# Settings of each method that change its parameters or operations.
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "adalora": ({"rank": 8, "dropout": 0.1},),
    "boft": ({"options": {"boft_block_size": 8}}, {"options": {"boft_block_size": 0, "boft_block_num": 4}}),
    "ia3": ({"options": {"feedforward_modules": "q_proj"}},),
    "loha": ({"rank": 4},),
    "lokr": ({"rank": 64, "options": {"decompose_factor": 4}}, {"options": {"decompose_both": True}}),
    "oft": (
        {"options": {"oft_block_size": 24}},
        {"options": {"r": 8, "oft_block_size": 0}},
        {"options": {"block_share": True}},
        {"options": {"num_cayley_neumann_terms": 3}},
    ),
    "vera": ({"rank": 32, "dropout": 0.1},),
}


def one(
    kind: str, model: str = "qwen2", checkpointing: str = "none", precision: Any = BF16, **method: Any
) -> tuple[str, RunSpec]:
    shown = [str(value) for value in method.values()]
    name = " ".join([kind, model, checkpointing, *map(str, precision.values()), *shown])
    fields = {
        "model": model if "-" in model else {"config": {"model_type": model, **SIZES}},
        "method": {"kind": kind, **method},
        "precision": precision,
        "optimizer": "adamw_torch_fused",
        "batch": {"micro": 2, "sequence": 256},
        "kernels": {"attention": "sdpa", "checkpointing": checkpointing},
    }
    return name, RunSpec.model_validate(fields)


def runs(kind: str) -> Iterator[tuple[str, RunSpec]]:
    row = PEFT_METHODS[kind]
    yield one(kind)
    yield one(kind, "llama", "full", targets="all-linear")
    yield one(kind, "gemma2", precision=AUTOCAST)
    yield one(kind, precision=FP32)
    yield one(kind, adapter_dtype="bf16")
    for settings in SETTINGS[kind]:
        yield one(kind, targets="all-linear", **settings)
    if row.formats:
        yield one(kind, quantization={"format": "nf4"})
        yield one(kind, "llama", "full", AUTOCAST, targets="all-linear", quantization={"format": "nf4"})
        yield one(kind, quantization={"format": "int8"})


def main() -> None:
    write([pair for kind in sys.argv[1:] or PEFT_METHODS for pair in runs(kind)])


if __name__ == "__main__":
    main()
