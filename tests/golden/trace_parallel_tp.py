"""Traces one rank's training step under tensor parallelism, and prints the rows of traced_parallel_tp.jsonl.

python tests/golden/trace_parallel_tp.py > tests/golden/traced_parallel_tp.jsonl

transformers' own plan divides the model, on a process group that sends nothing; every family of tests/tiny.py that has
a plan, on two ranks, and a few at their real widths on as many as are common.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.catalogue.tensor_parallel import PLANS
from memplan.probe.libraries import versions
from memplan.spec import RunSpec
from tests.golden.trace_families import config_of
from tests.golden.trace_runs import write
from tests.tiny import TINY

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


def _run(config: dict[str, Any], tp: int, batch: dict[str, Any], options: dict[str, Any]) -> RunSpec:
    parallelism = {"world": tp, "tp": tp}
    given = {"batch": batch, **options}
    return RunSpec(model={"config": config}, parallelism=parallelism, gpu="a100-sxm-80gb", **given)


def runs() -> Iterator[tuple[str, RunSpec]]:
    for name in sorted(PLANS):
        if name not in TINY:
            continue
        for options in (*_KINDS, *(_MORE if name in ("llama", "qwen3", "gpt_neox", "phi3", "gemma2") else ())):
            yield f"{name}-tp2", _run(config_of(name, 0), 2, {"micro": 2, "sequence": 256}, options)
    for name, layers, tp, options in _REAL:
        yield f"{name}-tp{tp}", _run(config_of(name, layers), tp, {"micro": 1, "sequence": 2048}, options)


def main() -> None:
    about = (
        "Training steps of one rank of two to eight under transformers' own tensor parallelism, traced on a process "
        "group that sends nothing: see tests/golden/trace_parallel_tp.py."
    )
    print(json.dumps({"about": about, "date": "2026-11-26", "versions": dict(versions())}), flush=True)
    write(list(runs()))


if __name__ == "__main__":
    main()
