"""Trace generation with transformers' other caches, and print the rows for tests/program/test_generation_caches.py.

Needs optimum-quanto and hqq in addition to the probe's libraries.

python tests/golden/trace_caches.py > tests/golden/traced_caches.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.core.errors import MemplanError
from memplan.probe.run.trace import traces
from memplan.spec.run import RunSpec
from tests.golden.trace_inference import row
from tests.tiny import TINY

# Wide heads and a narrow MLP, so that the cache's temporaries are the peak.
WIDE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
BACKENDS: tuple[dict[str, Any], ...] = (
    {"backend": "quanto"},
    {"backend": "quanto", "nbits": 2},
    {"backend": "quanto", "axis_key": -1},
    {"backend": "quanto", "axis_key": -1, "axis_value": -1, "q_group_size": 32},
    *({"backend": "hqq", "nbits": nbits} for nbits in (1, 2, 3, 4, 8)),
    {"backend": "hqq", "axis_key": 1},
    {"backend": "hqq", "axis_key": 1, "axis_value": 1, "q_group_size": 32},
)
# Families with full attention in every layer: grouped and single key heads, fused projections, latent, no rotation.
OFFLOADED = ("bloom", "deepseek_v3", "gemma3_text", "llama", "llama4_text", "mamba2", "gpt2", "qwen3_next", "jamba")
FAMILIES = ("bloom", "deepseek_v3", "gpt2", "gpt_bigcode", "gpt_neo", "minicpm3", "mpt", "phi3", "qwen3", "stablelm")


def quantised(model: dict[str, Any], config: dict[str, Any], batch: dict[str, int], **more: Any) -> dict[str, Any]:
    generation = {"cache_implementation": "quantized", "cache_config": config, **more.pop("generation", {})}
    return {"model": {"config": model}, "batch": batch, "generation": generation, **more}


def runs() -> Iterator[tuple[str, dict[str, Any]]]:
    for config in BACKENDS:
        for new_tokens in (3, 12):  # without and with a pass that requantises the cache
            batch = {"micro": 4, "sequence": 128, "new_tokens": new_tokens}
            if -1 not in (config.get("axis_key"), config.get("axis_value")) or new_tokens == 3:
                yield "wide", quantised(WIDE, {**config, "residual_length": 8}, batch)
    for new_tokens in (2, 12):
        yield "wide", quantised(WIDE, {"backend": "fp8"}, {"micro": 4, "sequence": 128, "new_tokens": new_tokens})
    short = {"micro": 2, "sequence": 64, "new_tokens": 6}
    for config in ({"backend": "quanto"}, {"backend": "hqq"}, {"backend": "fp8"}):
        requantising = {} if config["backend"] == "fp8" else {"residual_length": 4}
        for dtype in ("fp16", "fp32"):
            yield "wide", quantised(WIDE, {**config, **requantising}, short, precision={"weights": dtype})
        yield "wide", quantised(WIDE, {**config, **requantising}, short, kernels={"attention": "eager"})
        yield "wide", quantised(WIDE, {**config, **requantising}, short, loop={"padded": True})
        yield "wide", quantised(WIDE, {**config, **requantising}, short, generation={"num_beams": 3})
    for name in FAMILIES:
        model, requantising = {"model_type": name, **TINY[name]}, {"residual_length": 4, "q_group_size": 16}
        yield name, quantised(model, {"backend": "quanto", **requantising}, short)
        yield name, quantised(model, {"backend": "hqq", **requantising}, {"micro": 3, "sequence": 96, "new_tokens": 3})


def offloaded() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield runs with offloaded caches: windows and full attention, state layers between, and a single layer."""
    short = {"micro": 2, "sequence": 64, "new_tokens": 6}
    for name in OFFLOADED:
        model = {"config": {"model_type": name, **TINY[name]}}
        yield name, {"model": model, "batch": short, "generation": {"cache_implementation": "offloaded"}}
    llama = {"config": {"model_type": "llama", **TINY["llama"]}}
    gemma = {"config": {"model_type": "gemma3_text", **TINY["gemma3_text"], "num_hidden_layers": 13}}
    for model in (llama, gemma):
        for more in ({}, {"kernels": {"attention": "eager"}}, {"loop": {"padded": True}}):
            for kind in ("offloaded", "offloaded_static"):
                yield "varied", {"model": model, "batch": short, "generation": {"cache_implementation": kind}, **more}
    for kind in ("offloaded", "offloaded_static"):
        for choosing in ({"num_beams": 3}, {"do_sample": True}):
            generation = {"cache_implementation": kind, **choosing}
            yield "chosen", {"model": llama, "batch": short, "generation": generation}


def chunked() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield runs with chunked prefill: chunks as long as a window, shorter ones, and uneven ones."""
    for name in ("llama", "gemma3_text", "deepseek_v3", "gpt2", "bloom", "mixtral", "stablelm"):
        model = {"config": {"model_type": name, **TINY[name]}}
        for sequence, chunk in ((64, 32), (75, 20), (64, 100)):
            batch = {"micro": 2, "sequence": sequence, "new_tokens": 4}
            yield name, {"model": model, "batch": batch, "generation": {"prefill_chunk_size": chunk}}
    batch = {"micro": 2, "sequence": 75, "new_tokens": 4}
    for name in ("llama", "gemma3_text"):
        model = {"config": {"model_type": name, **TINY[name]}}
        for more in (
            {"kernels": {"attention": "eager"}},
            {"kernels": {"attention": "flash_attention_2"}},
            {"loop": {"padded": True}},
            {"precision": {"weights": "fp32", "autocast": True}},
            {"generation": {"cache_implementation": "offloaded"}},
        ):
            generation = {"prefill_chunk_size": 20, **more.get("generation", {})}
            yield name, {"model": model, "batch": batch, **more, "generation": generation}
    for config in ({"residual_length": 32}, {"residual_length": 8}, {"backend": "hqq"}, {"backend": "fp8"}):
        made = quantised(WIDE, config, batch, generation={"prefill_chunk_size": 20})
        yield "wide", made


def main() -> None:
    asked = [
        (name, RunSpec(task="generate", gpu="a100-sxm-80gb", **fields)) for name, fields in (*runs(), *offloaded())
    ]
    for (name, run), traced in zip(asked, traces((run for _, run in asked), 1), strict=True):
        if isinstance(traced, MemplanError):
            print(f"{name}: {traced}", file=sys.stderr)
        else:
            print(json.dumps(row(name, run, traced)), flush=True)


if __name__ == "__main__":
    main()
