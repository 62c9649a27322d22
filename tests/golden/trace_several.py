"""Trace forward passes and generation on several GPUs, and print the rows for
tests/program/test_inference_on_several_gpus.py.

python tests/golden/trace_several.py tp > tests/golden/traced_running_tp.jsonl
python tests/golden/trace_several.py device_map > tests/golden/traced_running_map.jsonl

One rank under transformers' tensor parallelism, on a fake process group: every family of tests/tiny.py with a plan, and
some cards at real widths. And every GPU of transformers' device_map, with accelerate's hooks: small families, and cards
at full size, some with layers on the host.
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
from memplan.models.configs import families
from memplan.probe.libraries import versions
from memplan.probe.run.trace import traces
from memplan.spec.run import RunSpec
from tests.golden.trace_families import config_of
from tests.golden.trace_inference import SHORT, row
from tests.tiny import TINY

PLANS = {name: row.parallel.plan for name, row in families().items() if row.parallel.plan is not None}

TP: tuple[dict[str, Any], ...] = (
    {"task": "forward", "batch": SHORT},
    {"task": "generate", "batch": {**SHORT, "new_tokens": 5}},
    {"task": "generate", "batch": {**SHORT, "new_tokens": 3}, "kernels": {"attention": "eager"}},
)
MORE: tuple[dict[str, Any], ...] = (
    {"batch": {**SHORT, "new_tokens": 3}, "loop": {"padded": True}},
    {"batch": {**SHORT, "new_tokens": 3}, "generation": {"cache_implementation": "static"}},
    {"batch": {**SHORT, "new_tokens": 3}, "generation": {"num_beams": 4}},
    {"batch": {"micro": 40, "sequence": 5, "new_tokens": 3}, "generation": {"do_sample": True}},
)
REAL: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
    ("llama-3.1-8b", 0, 4, {"micro": 4, "sequence": 2048, "new_tokens": 4}),
    ("qwen2.5-72b", 8, 8, {"micro": 1, "sequence": 8192, "new_tokens": 3}),
    ("mixtral-8x7b", 4, 8, {"micro": 2, "sequence": 2048, "new_tokens": 3}),
    ("gemma-2-9b", 0, 4, {"micro": 1, "sequence": 5000, "new_tokens": 3}),
    ("phi-4", 0, 2, {"micro": 2, "sequence": 1000, "new_tokens": 3}),
    ("qwen3-30b-a3b", 4, 4, {"micro": 8, "sequence": 512, "new_tokens": 3}),
)


def tp_runs() -> Iterator[tuple[str, RunSpec]]:
    for name in sorted(PLANS):
        if name not in TINY:
            continue
        config = config_of(name, 0)
        if config.get("moe_intermediate_size", 16) % 16:  # rows of half an expert's width must be aligned
            config["moe_intermediate_size"] = 32
        for options in (*TP, *(MORE if name in ("llama", "gemma2", "mixtral") else ())):
            yield f"{name}-tp2", _of_ranks(config, 2, {"task": "generate", **options})
    for name, layers, tp, batch in REAL:
        yield f"{name}-tp{tp}", _of_ranks(config_of(name, layers), tp, {"task": "generate", "batch": batch})


MAPPED = (
    *("llama", "gpt2", "gemma2", "gemma3_text", "mixtral", "bloom", "cohere", "deepseek_v3", "gpt_oss", "phi"),
    *("qwen3_next", "qwen3_moe", "gpt_neox", "falcon", "starcoder2", "mamba2", "jamba", "olmo2"),
)
LARGE: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("llama-3.1-70b", "a100-80gb", {"world": 3}),
    ("llama-3.1-8b", "a100-80gb", {"world": 3, "device_map": "balanced_low_0"}),
    ("llama-3.1-8b", "rtx-2070", {"world": 3, "device_map": "sequential"}),
    ("llama-3.1-8b", "t4", {}),
    ("qwen2.5-14b", "3090", {}),
    ("qwen2.5-32b", "3090", {"world": 2}),
    ("gemma-2-27b", "3090", {}),
    ("mixtral-8x7b", "a100-40gb", {"world": 2}),
    ("qwen2.5-3b", "3060-ti", {"world": 2}),
)


def map_runs() -> Iterator[tuple[str, RunSpec]]:
    for name in MAPPED:
        config = config_of(name, 0)
        for options in TP:
            for world in (2, 3):
                parallelism = {"world": world, "device_map": "auto"}
                run = RunSpec(model={"config": config}, parallelism=parallelism, gpu="a100-sxm-80gb", **options)
                yield from _every_gpu(f"{name}-{world}", run)
    for name, gpu, parallelism in LARGE:
        batch = {"micro": 1, "sequence": 1024, "new_tokens": 3}
        run = RunSpec(
            model=name, gpu=gpu, task="generate", batch=batch, parallelism={"device_map": "auto", **parallelism}
        )
        yield from _every_gpu(name, run)


def _every_gpu(name: str, run: RunSpec) -> Iterator[tuple[str, RunSpec]]:
    for stage in range(max(1, len(estimate(run).ranks))):
        yield name, run.model_copy(update={"parallelism": run.parallelism.model_copy(update={"stage": stage})})


def _of_ranks(config: dict[str, Any], tp: int, options: dict[str, Any]) -> RunSpec:
    return RunSpec(
        model={"config": config},
        parallelism={"world": tp, "tp": tp},
        gpu="a100-sxm-80gb",
        **options,
    )


def answered(asked: Iterator[tuple[str, RunSpec]]) -> Iterator[tuple[str, RunSpec]]:
    """Yield the runs that memplan answers; the others are listed on standard error."""
    for name, run in asked:
        try:
            estimate(run)
        except MemplanError as error:
            print(f"{name}: {error}", file=sys.stderr)
        else:
            yield name, run


KINDS = {
    "tp": ("one rank of several under transformers' own tensor parallelism", tp_runs),
    "device_map": ("every GPU that a device_map puts modules on", map_runs),
}


def main() -> None:
    what, runs = KINDS[sys.argv[1]]
    about = f"Forward passes and generation, {what}, traced on tensors without data: see tests/golden/trace_several.py."
    print(json.dumps({"about": about, "date": "2026-11-26", "versions": dict(versions())}), flush=True)
    asked = list(answered(runs()))
    for (name, run), traced in zip(asked, traces((run for _, run in asked), 1), strict=True):
        if isinstance(traced, MemplanError):
            print(f"{name}: {traced}", file=sys.stderr)
        else:
            print(json.dumps(row(name, run, traced)), flush=True)


if __name__ == "__main__":
    main()
