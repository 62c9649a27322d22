"""Trace steps of trainers on packed and padding-free batches, and print rows for tests/estimate/test_packing.py.

/tmp/trl/bin/python tests/golden/trace_packing.py trl-1.15 tests/golden/traced_packing.jsonl >> /tmp/rows.jsonl

The environments are those of trace_trainers.py, whose trainers and tiny models these are. A row of tokens has a
sequence for every 512 tokens, or those of the micro-batch if the batch is padding-free.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.spec.run import RunSpec
from tests.golden.trace_trainers import BF16, CONFIGS, FP32, main

FLASH, SDPA, EAGER = "flash_attention_2", "sdpa", "eager"
# Profile -> packing and attention.
KINDS: dict[str, tuple[tuple[str, str], ...]] = {
    "trl-1.15": (("bfd", FLASH), ("bfd", SDPA), ("bfd", EAGER), ("padding_free", FLASH), ("padding_free", SDPA)),
    "trl-1.13": (("bfd_split", FLASH), ("bfd", SDPA), ("wrapped", SDPA)),
    "trl-0.24": (("bfd", FLASH), ("bfd", SDPA), ("padding_free", FLASH)),
    "axolotl-0.21": (("sample_packing", FLASH), ("sample_packing", SDPA), ("sample_packing", EAGER)),
    # not with flash attention, on which transformers 5.6.0 fails if a model has no attention sinks
    "llamafactory-0.9.5": (("neat_packing", SDPA), ("neat_packing", EAGER), ("knapsack", SDPA)),
    "ms-swift-4.6": (("binpack", FLASH), ("padding_free", FLASH)),
}
# Family, method, precision, sequences and tokens, checkpointing: each kind has all of them in turn.
CASES: tuple[tuple[str, str, dict[str, Any], int, int, str | None], ...] = (
    ("llama", "full", BF16, 2, 1024, None),
    ("qwen3", "lora", BF16, 4, 1024, None),
    ("mistral", "qlora", BF16, 2, 2048, None),
    ("blocks", "lora", BF16, 2, 2048, None),
    ("blocks", "full", BF16, 2, 2048, "none"),
    ("qwen2", "full", FP32, 1, 2048, None),
    ("gemma2", "lora", BF16, 2, 1024, None),
    ("phi3", "lora", BF16, 2, 2048, "none"),
)


def runs(profile: str) -> Iterator[tuple[str, RunSpec]]:
    """Yield the runs of a profile: for each of its kinds, every other case."""
    for number, (packing, attention) in enumerate(KINDS[profile]):
        for family, method, precision, micro, tokens, checkpointing in CASES[number % 2 :: 2]:
            framework = profile.rpartition("-")[0]
            if precision == FP32 and framework in ("axolotl", "ms-swift"):
                precision = BF16  # they load weights so  # noqa: PLW2901
            if method == "full" and framework == "llamafactory":
                precision = FP32  # it casts them  # noqa: PLW2901
            named = "all-linear" if framework == "axolotl" else ["q_proj", "v_proj", "down_proj"]
            kernels: dict[str, Any] = {"attention": attention}
            if checkpointing:
                kernels["checkpointing"] = checkpointing
            if (framework, family) == ("axolotl", "phi3"):
                kernels["fused"] = []  # its kernels refuse fused projections
            words = f"{precision['weights']} {micro}x{tokens}{' plain' if checkpointing else ''}"
            yield (
                f"{profile} {packing} {attention} {family} {method} {words}",
                RunSpec.model_validate(
                    {
                        "model": {"config": CONFIGS[family]},
                        "method": {"kind": method, **({} if method == "full" else {"targets": named})},
                        "precision": precision,
                        "batch": {"micro": micro, "sequence": tokens, "packing": packing},
                        "kernels": kernels,
                        "loop": {"trainer": True},
                        "profile": profile,
                    }
                ),
            )


if __name__ == "__main__":
    main(runs)
