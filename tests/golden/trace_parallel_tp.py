"""Trace one rank's training step under tensor or context parallelism, and print the rows of golden files.

python tests/golden/trace_parallel_tp.py tp > tests/golden/traced_parallel_tp.jsonl
python tests/golden/trace_parallel_tp.py moe > tests/golden/traced_parallel_moe.jsonl
python tests/golden/trace_parallel_tp.py cp > tests/golden/traced_parallel_cp.jsonl
python tests/golden/trace_parallel_tp.py ulysses > tests/golden/traced_parallel_ulysses.jsonl

transformers' own plan shards the model, on a fake process group: every family of tests/tiny.py with a plan on two
ranks, and a few at real widths on common numbers of ranks. Experts are tensor- or expert-parallel. torch's context
parallelism divides sequences, with full weights, and with weights that accelerate's FSDP2 shards among the same ranks.
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
from memplan.spec.run import RunSpec, changed
from tests.golden.trace_families import config_of
from tests.golden.trace_runs import write
from tests.tiny import TINY

FAMILIES = [name for name, row in families().items() if row.parallel.context]
EXPERTS = [name for name, row in families().items() if row.parallel.experts]
PLANS = {name: row.parallel.plan for name, row in families().items() if row.parallel.plan is not None}

_KINDS: tuple[dict[str, Any], ...] = (
    {"kernels": {"checkpointing": "none"}},
    {"kernels": {"checkpointing": "full"}, "optimizer": "adamw_torch"},
    {"kernels": {"checkpointing": "full"}, "method": {"kind": "lora"}},
)
_MORE: tuple[dict[str, Any], ...] = (
    {"kernels": {"checkpointing": "none", "attention": "eager"}},
    {"kernels": {"checkpointing": "none"}, "method": {"kind": "lora", "dropout": 0.1, "adapter_dtype": "bf16"}},
    {"precision": "amp", "batch": {"micro": 2, "sequence": 256, "accumulation": 2}},
    {"loop": {"padded": True, "hold_outputs": True}, "kernels": {"checkpointing": "none"}, "optimizer": "sgd"},
)
_REAL: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
    ("llama-3.1-8b", 0, 4, {}),
    ("llama-3.1-8b", 0, 8, {"kernels": {"checkpointing": "none"}}),
    ("qwen2.5-0.5b", 0, 2, {"kernels": {"checkpointing": "none"}}),
    ("qwen2.5-72b", 4, 8, {}),
    ("qwen3-8b", 0, 4, {"optimizer": "adamw_torch", "precision": "amp"}),
    ("gemma-2-9b", 0, 4, {"kernels": {"checkpointing": "none"}}),
    ("phi-4", 0, 2, {}),
    ("pythia-6.9b", 0, 4, {"kernels": {"checkpointing": "none"}}),
    ("olmo-2-1b", 0, 4, {}),
    ("llama-3.1-8b", 0, 2, {"method": {"kind": "lora", "rank": 64}}),
    ("mistral-7b-v0.3", 0, 8, {"kernels": {"attention": "flash_attention_2"}}),
)
_MIXTURES = {*EXPERTS, *(name for name, plan in PLANS.items() if plan.experts)}
_WHOLE: tuple[dict[str, Any], ...] = (
    {"batch": {"micro": 8, "sequence": 128, "accumulation": 2}, "optimizer": "adamw_torch"},
    {"precision": "fp32", "loop": {"clip_grad_norm": None}, "optimizer": "sgd"},
)
_REAL_MIXTURES: tuple[tuple[str, int, int, int, dict[str, Any]], ...] = (
    ("mixtral-8x7b", 0, 8, 1, {}),
    ("mixtral-8x7b", 0, 8, 8, {}),
    ("qwen3-30b-a3b", 0, 4, 1, {"kernels": {"checkpointing": "none"}}),
    ("qwen3-30b-a3b", 0, 4, 4, {}),
    ("gpt-oss-20b", 0, 8, 8, {"optimizer": "adamw_torch"}),
    ("deepseek-v3", 5, 8, 8, {}),
)


def _run(config: dict[str, Any], tp: int, batch: dict[str, Any], options: dict[str, Any]) -> RunSpec:
    parallelism = {"world": tp, "tp": tp}
    given = {"batch": batch, **options}
    return RunSpec(model={"config": config}, parallelism=parallelism, gpu="a100-sxm-80gb", **given)


def runs() -> Iterator[tuple[str, RunSpec]]:
    for name in sorted(PLANS):
        if name not in TINY or name in _MIXTURES:
            continue
        for options in (*_KINDS, *(_MORE if name in ("llama", "qwen3", "gpt_neox", "phi3", "gemma2") else ())):
            yield f"{name}-tp2", _run(config_of(name, 0), 2, {"micro": 2, "sequence": 256}, options)
    for name, layers, tp, options in _REAL:
        yield f"{name}-tp{tp}", _run(config_of(name, layers), tp, {"micro": 1, "sequence": 2048}, options)


def mixture_runs() -> Iterator[tuple[str, RunSpec]]:
    adapted = {"kernels": {"checkpointing": "full"}, "method": {"kind": "lora", "targets": ["o_proj"]}}
    for name in sorted(PLANS):
        if name not in TINY or name not in _MIXTURES:
            continue
        config = config_of(name, 0)
        if config.get("moe_intermediate_size", 16) % 16:  # rows of half an expert's width must be aligned
            config["moe_intermediate_size"] = 32
        more = _MORE[:3:2] if name in ("mixtral", "qwen3_moe", "gpt_oss") else ()
        for options in (*_KINDS[:2], adapted, *more):
            for ep in (1, 2) if name in EXPERTS else (1,):
                asked = _run(config, 2, {"micro": 4, "sequence": 256}, options)
                parallelism = asked.parallelism.model_copy(update={"ep": ep})
                yield f"{name}-tp2-ep{ep}", asked.model_copy(update={"parallelism": parallelism})
    for name in EXPERTS:
        for options in (*_KINDS[:2], *(_WHOLE if name in ("mixtral", "qwen3_moe") else ())):
            asked = _whole(config_of(name, 0), 4, {"micro": 4, "sequence": 256}, options)
            if _is_answered(asked):  # FSDP2 takes no models with weights of two dtypes
                yield f"{name}-dp4-ep4", asked
    for name, dp, options in (
        ("mixtral-8x7b", 8, {}),
        ("qwen3-30b-a3b", 8, {"kernels": {"checkpointing": "none"}}),
        ("gpt-oss-20b", 16, {"optimizer": "adamw_torch"}),
    ):
        yield f"{name}-dp{dp}-ep{dp}", _whole(config_of(name, 0), dp, {"micro": 1, "sequence": 4096}, options)
    for name, layers, tp, ep, options in _REAL_MIXTURES:
        asked = _run(config_of(name, layers), tp, {"micro": 1, "sequence": 2048}, options)
        parallelism = asked.parallelism.model_copy(update={"ep": ep})
        yield f"{name}-tp{tp}-ep{ep}", asked.model_copy(update={"parallelism": parallelism})


def _whole(config: dict[str, Any], dp: int, batch: dict[str, Any], options: dict[str, Any]) -> RunSpec:
    """Yield runs of expert-parallel ranks that also divide the batch, with weights sharded by FSDP2."""
    parallelism = {"world": dp, "dp": dp, "ep": dp, "strategy": "fsdp2"}
    given = {"batch": batch, **options}
    return RunSpec(model={"config": config}, parallelism=parallelism, gpu="a100-sxm-80gb", **given)


def _is_answered(run: RunSpec) -> bool:
    try:
        estimate(run)
    except MemplanError:
        return False
    return True


def context_runs() -> Iterator[tuple[str, RunSpec]]:
    for name in sorted(FAMILIES):
        for cp, options in ((2, _KINDS[0]), (4, _KINDS[1]), (8, _KINDS[2])):
            yield f"{name}-cp{cp}", _context(config_of(name, 0), cp, {"micro": 2, "sequence": 256 * cp}, options)
    for name, cp, options in (
        ("llama-3.1-8b", 4, {}),
        ("llama-3.1-8b", 8, {"method": {"kind": "lora", "rank": 64}, "kernels": {"checkpointing": "none"}}),
        ("qwen3-4b", 2, {"optimizer": "adamw_torch"}),
        ("mistral-7b-v0.3", 16, {"batch": {"micro": 1, "sequence": 32768, "accumulation": 2}}),
    ):
        yield f"{name}-cp{cp}", _context(config_of(name, 0), cp, {"micro": 1, "sequence": 16384}, options)
    for name, cp, options in (
        ("llama-3.2-1b", 2, {}),
        ("qwen2.5-0.5b", 4, {"kernels": {"checkpointing": "none"}}),
        ("llama-3.2-1b", 8, {"method": {"kind": "lora", "rank": 64}}),
        ("qwen3-4b", 4, {"precision": "amp", "loop": {"trainer": True}}),
        ("olmo-2-1b", 2, {"optimizer": "adamw_torch", "batch": {"micro": 1, "sequence": 8192, "accumulation": 2}}),
        ("llama-3.2-3b", 4, {"method": {"kind": "freeze"}}),
    ):
        run = _context(config_of(name, 0), cp, {"micro": 1, "sequence": 8192}, options)
        yield f"{name}-cp{cp}-fsdp2", changed(run, "parallelism", strategy="fsdp2")


def _context(config: dict[str, Any], cp: int, batch: dict[str, Any], options: dict[str, Any]) -> RunSpec:
    given = {"batch": batch, **options}
    return RunSpec(model={"config": config}, parallelism={"world": cp, "cp": cp}, gpu="a100-sxm-80gb", **given)


def ulysses_runs() -> Iterator[tuple[str, RunSpec]]:
    """Yield Ulysses runs, with DeepSpeed's class as in the probe; heads are wide enough to be the peak, if possible."""
    adapted = {"kernels": {"checkpointing": "full"}, "method": {"kind": "lora", "adapter_dtype": "bf16"}}
    wide = {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
    }
    for name in sorted(FAMILIES):
        for cp, micro, options in ((2, 2, _KINDS[0]), (4, 1, _KINDS[1]), (8, 2, adapted)):
            config = config_of(name, 0)
            wider = {**config, **wide} if "head_dim" in config or name in ("llama", "mistral", "qwen3") else config
            if wider["num_attention_heads"] % cp:
                continue
            yield f"{name}-sp{cp}", _ulysses(wider, cp, {"micro": micro, "sequence": 256 * cp}, options)
    for name, cp, options in (
        ("llama-3.1-8b", 8, {}),
        ("llama-3.1-8b", 16, {"kernels": {"checkpointing": "none"}}),
        ("qwen3-4b", 4, {"optimizer": "adamw_torch"}),
    ):
        yield f"{name}-sp{cp}", _ulysses(config_of(name, 0), cp, {"micro": 1, "sequence": 16384}, options)


def _ulysses(config: dict[str, Any], cp: int, batch: dict[str, Any], options: dict[str, Any]) -> RunSpec:
    parallelism = {"world": cp, "cp": cp, "context": "ulysses"}
    given = {"batch": batch, **options}
    return RunSpec(model={"config": config}, parallelism=parallelism, gpu="a100-sxm-80gb", **given)


KINDS = {
    "ulysses": ("DeepSpeed's exchange of heads, written out", ulysses_runs),
    "tp": ("transformers' own tensor parallelism", runs),
    "moe": ("transformers' own tensor and expert parallelism", mixture_runs),
    "cp": ("torch's context parallelism", context_runs),
}


def main() -> None:
    what, wanted = KINDS[sys.argv[1]]
    about = (
        f"Training steps of one rank of several under {what}, traced on a process group that sends nothing: see "
        "tests/golden/trace_parallel_tp.py."
    )
    print(json.dumps({"about": about, "date": "2026-11-26", "versions": dict(versions())}), flush=True)
    write(list(wanted()))


if __name__ == "__main__":
    main()
