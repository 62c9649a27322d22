"""Trace the side tasks of runs, and print the rows for tests/estimate/test_side_tasks.py.

python tests/golden/trace_asides.py > tests/golden/traced_asides.jsonl

Evaluation with and without kept logits, generation in it, saving and merging: pure, under autocast, with adapters over
unquantised and quantised weights. Small models of several families, and two cards at full size. Runs that cannot be
traced are listed on standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.core.errors import MemplanError
from memplan.probe.run.trace import TracedRun, traces
from memplan.spec.run import RunSpec
from tests.encoders import HEADS, SMALL
from tests.tiny import TARGETS, TINY
from tests.tiny_vision import TINY as TOWERS

PHASES = ("eval", "generate", "save", "merge")
SHORT = {"micro": 2, "sequence": 75}
KEEPS = {"micro": 3, "sequence": 61, "kept_batches": 4}
MERGES = {"saving": {}, "merging": "trained"}
# Families with other blocks, heads or losses than Llama, and experts that are converted back to be saved.
FAMILIES = (
    *("llama", "gpt2", "gemma2", "gemma3_text", "phi3", "granite", "falcon", "gpt_neox", "qwen2_moe", "mixtral"),
    *("deepseek_v3", "gpt_oss", "olmo2", "cohere", "opt", "qwen3_moe"),
)
RUNS: tuple[dict[str, Any], ...] = (
    {"also": {"evaluation": KEEPS, "saving": {}}},
    {"precision": "amp", "loop": {"trainer": True}, "also": {"evaluation": KEEPS, "saving": {}}},
    {"method": "lora", "also": {"evaluation": {"micro": 3, "new_tokens": 4}, **MERGES}},
    {"method": "qlora", "also": {"evaluation": {**KEEPS, "accumulation": 2}, **MERGES}},
    {"method": "dora", "also": {"evaluation": {"micro": 2}, **MERGES}},
)
LLAMA: tuple[dict[str, Any], ...] = (
    {"method": "qdora", "also": {"evaluation": {"micro": 2}, **MERGES}},
    {"method": {"kind": "qlora", "quantization": {"format": "int8"}}, "also": MERGES},
    {"method": {"kind": "qdora", "quantization": {"format": "int8"}}, "also": MERGES},
    {"method": {"kind": "qlora", "quantization": {"double_quant": False}}, "also": MERGES},
    {"method": {"kind": "lora", "dropout": 0.1, "adapter_dtype": "bf16"}, "also": {"evaluation": KEEPS, **MERGES}},
    {"method": {"kind": "dora", "adapter_dtype": "bf16"}, "also": MERGES},
    {"also": {"evaluation": {**KEEPS, "concatenates": False}}},
    {"also": {"evaluation": {**KEEPS, "preprocess": "argmax"}}},
    {"also": {"evaluation": {**KEEPS, "batch_metrics": True}}},
    {"kernels": {"loss": "fused"}, "also": {"evaluation": {"micro": 3}}},
    {"kernels": {"loss": "fused"}, "also": {"evaluation": KEEPS}},
    {"kernels": {"attention": "eager"}, "also": {"evaluation": {"micro": 3, "new_tokens": 3}}},
    {"loop": {"padded": True}, "also": {"evaluation": {"micro": 3}}},
    {"loop": {"use_cache": True}, "kernels": {"checkpointing": "none"}, "also": {"evaluation": {"micro": 3}}},
    {"precision": {"weights": "fp32"}, "also": {"evaluation": {"micro": 1}, "saving": {}}},
    {"optimizer": "adamw_8bit", "also": {"evaluation": {"micro": 1}, "saving": {}}},
)
ENCODERS: tuple[dict[str, Any], ...] = (  # and encoder-decoders, which also generate
    {"also": {"evaluation": {"micro": 3, "kept_batches": 4}}},
    {"precision": "amp", "loop": {"trainer": True}, "also": {"evaluation": {"micro": 3, "kept_batches": 4}}},
    {"method": "lora", "also": {"evaluation": {"micro": 3}}},
    {"kernels": {"attention": "eager"}, "also": {"evaluation": {"micro": 3}}},
)
REAL: tuple[dict[str, Any], ...] = (
    {"model": "qwen2.5-0.5b", "method": "lora", "also": {"evaluation": {"kept_batches": 4}, **MERGES}},
    {"model": "qwen2.5-0.5b", "precision": "amp", "loop": {"trainer": True}, "also": {"evaluation": {"micro": 4}}},
    {
        "model": "llama-3.1-8b",
        "method": "qlora",
        "also": {"evaluation": {"micro": 4, "new_tokens": 3}, **MERGES},
    },
)


def runs() -> Iterator[tuple[str, RunSpec]]:
    for name in FAMILIES:
        model = {"config": {"model_type": name, **TINY[name]}}
        for fields in (*RUNS, *(LLAMA if name == "llama" else ())):
            kind: Any = fields.get("method")
            targets = {"targets": TARGETS[name]} if isinstance(kind, str) and name in TARGETS else {}
            method = {"method": {"kind": kind, **targets}} if targets else {}
            yield name, RunSpec(**{"model": model, "batch": SHORT, "gpu": "a100-sxm-80gb", **fields, **method})
    yield from encoders()
    yield from several()
    yield from pictures()
    for fields in REAL:
        yield fields["model"], RunSpec(**{"gpu": "a100-sxm-80gb", "batch": {"micro": 2, "sequence": 1024}, **fields})


def several() -> Iterator[tuple[str, RunSpec]]:
    """Yield runs of one rank, under tensor and data parallelism."""
    generates = {"also": {"evaluation": {"micro": 3, "new_tokens": 4}}}
    adapted = {"method": {"kind": "lora", "targets": ["q_proj", "v_proj"]}, **generates}
    for name in ("llama", "phi3", "gemma2", "starcoder2", "mixtral"):
        for fields in ({"also": {"evaluation": {"micro": 3}}}, adapted):
            yield name, _on(name, {"world": 2, "tp": 2}, fields)
    for name in ("llama", "gemma2"):
        for strategy in ("ddp", "fsdp", "fsdp2"):
            yield name, _on(name, {"world": 4, "dp": 4, "strategy": strategy}, {"also": {"evaluation": {"micro": 3}}})
        yield name, _on(name, {"world": 4, "dp": 4, "strategy": "ddp"}, generates)


def _on(name: str, parallelism: dict[str, Any], fields: dict[str, Any]) -> RunSpec:
    model = {"config": {"model_type": name, **TINY[name]}}
    return RunSpec(**{"model": model, "batch": SHORT, "gpu": "a100-sxm-80gb", "parallelism": parallelism, **fields})


def pictures() -> Iterator[tuple[str, RunSpec]]:
    seen = {"micro": 2, "sequence": 400, "images": 1, "image_size": 112}
    adapted = {"kind": "lora", "targets": ["q_proj", "v_proj"]}
    for name in ("gemma3", "llama4", "mistral3", "mllama", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"):
        model = {"config": {"model_type": name, **TOWERS[name]}}
        shared = {"model": model, "batch": seen, "gpu": "a100-sxm-80gb"}
        yield name, RunSpec(**{**shared, "also": {"evaluation": {"micro": 3, "kept_batches": 3}}})
        yield name, RunSpec(**{**shared, "method": adapted, "also": {"evaluation": {"micro": 1, "new_tokens": 3}}})
        yield name, by_trainer({**shared, "batch": {"micro": 1, "sequence": 512}})
    for name in ("idefics3", "internvl", "llava", "paligemma", "qwen3_vl_moe", "smolvlm"):
        yield (
            name,
            by_trainer(
                {**shared, "model": {"config": {"model_type": name, **TOWERS[name]}}, "batch": {"sequence": 512}}
            ),
        )


def by_trainer(shared: dict[str, Any]) -> RunSpec:
    """Return a run that transformers' Trainer evaluates: it sets `use_cache` of the outer config alone."""
    return RunSpec(**{**shared, "loop": {"trainer": True}, "also": {"evaluation": {"micro": 4}}})


def encoders() -> Iterator[tuple[str, RunSpec]]:
    for name in ("bert", "roberta", "vit", "t5", "flan-t5", "whisper"):
        source = {} if name in ("vit", "whisper") else {"sequence": 75}
        target = {"target_sequence": 33} if HEADS[name][0] == "seq2seq_lm" else {}
        shared = {"model": {"config": SMALL[name]}, "objective": HEADS[name][0], "gpu": "a100-sxm-80gb"}
        for fields in ENCODERS:
            run: dict[str, Any] = {**shared, "batch": {"micro": 2, **source, **target}, **fields}
            yield name, RunSpec(**run)
            if target and "kept_batches" not in fields["also"]["evaluation"]:
                yield name, RunSpec(**{**run, "also": {"evaluation": {"micro": 3, "new_tokens": 4}}})


# Known differences, and their reasons.
CAUSES = {
    ("olmo2", "amp"): {
        "within": 0.02,
        "cause": "embeddings that ask for a gradient are cast straight away, and autocast keeps that cast of a leaf",
    },
    ("llama", "fsdp2"): {
        "within": 0.05,
        "cause": "a second batch finds the head gathered, and the last layer's all-gather stays: one batch is counted",
    },
}


def row(name: str, run: RunSpec, traced: TracedRun) -> dict[str, Any]:
    """Return the peaks of the run's side tasks, and torch's reserved bytes."""
    phases: dict[str, int] = {}
    for p in traced.phases:  # a prompt and its generated tokens are one phase
        if p.phase in PHASES:
            phases[p.phase] = max(phases.get(p.phase, 0), p.peak)
    asked = run.model_dump(mode="json", exclude_defaults=True)
    kind = "amp" if run.precision.autocast else run.parallelism.strategy.removeprefix("none")
    known = CAUSES.get((name, kind), {})
    return {"name": name, "run": asked, "phases": phases, "reserved": traced.reserved, **known}


def main() -> None:
    asked = list(runs())
    for (name, run), traced in zip(asked, traces((run for _, run in asked), 1), strict=True):
        if isinstance(traced, MemplanError):
            print(f"{name}: {run.method.kind}: {traced}", file=sys.stderr)
        else:
            print(json.dumps(row(name, run, traced)), flush=True)


if __name__ == "__main__":
    main()
