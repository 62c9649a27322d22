"""Traces forward passes and generation, and prints the rows that tests/test_generating.py compares with.

python tests/golden/trace_inference.py > tests/golden/traced_inference.jsonl
python tests/golden/trace_inference.py llama mistral

Every family of tests/tiny.py and tests/tiny_vision.py and Step 3.7, or those named, at its small size: a forward pass, and a prompt
with a few tokens after it, with eager attention and with padding; some in further dtypes, with adapters, quantised,
with other caches, with beams and drawn. Then some cards at their own sizes. Runs that cannot be traced are said on
standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.errors import MemplanError
from memplan.probe.trace import Traced, traces
from memplan.spec import RunSpec
from tests.tiny import TINY
from tests.tiny_towers import TINY as OWN
from tests.tiny_vision import TINY as TOWERS

SHORT = {"micro": 3, "sequence": 75}
AMP = {"weights": "fp32", "autocast": True}
RUNS: tuple[dict[str, Any], ...] = (
    {"task": "forward", "batch": SHORT, "loop": {"use_cache": False}},
    {"task": "forward", "batch": SHORT, "loop": {"padded": True, "use_cache": False}},
    {"task": "forward", "batch": SHORT},
    {"task": "generate", "batch": {**SHORT, "new_tokens": 5}},
    {"task": "generate", "batch": {**SHORT, "new_tokens": 3}, "kernels": {"attention": "eager"}},
    {"task": "generate", "batch": {**SHORT, "new_tokens": 3}, "loop": {"padded": True}},
)
MORE: tuple[dict[str, Any], ...] = (
    {"task": "forward", "batch": SHORT, "loop": {"padded": True}},
    {"task": "generate", "batch": {"micro": 1, "sequence": 33, "new_tokens": 2}},
    {"precision": {"weights": "fp32"}},
    {"method": {"kind": "lora"}},
    {"method": {"quantization": {}}},
    {"generation": {"cache_implementation": "static"}},
    {"generation": {"cache_implementation": "static"}, "kernels": {"attention": "eager"}},
    {"generation": {"num_beams": 4}},
    {"generation": {"do_sample": True}, "batch": {"micro": 40, "sequence": 5, "new_tokens": 3}},
    {"generation": {"num_beams": 4, "do_sample": True}, "batch": {"micro": 40, "sequence": 5, "new_tokens": 3}},
    {"precision": AMP},
    {"precision": AMP, "task": "forward", "batch": SHORT},
)
VARIED = ("llama", "qwen2", "gpt2", "gemma3_text", "mixtral", "starcoder2")  # with all of those
REAL: tuple[dict[str, Any], ...] = (
    {"model": "qwen2.5-0.5b", "batch": {"micro": 4, "sequence": 1024, "new_tokens": 8}},
    {"model": "llama-3.2-1b", "batch": {"micro": 1, "sequence": 8192, "new_tokens": 3}},
    {"model": "llama-3.1-8b", "batch": {"micro": 16, "sequence": 512, "new_tokens": 16}},
    {
        "model": "llama-3.1-8b",
        "batch": {"micro": 2, "sequence": 2048, "new_tokens": 3},
        "kernels": {"attention": "eager"},
    },
    {"model": "qwen2-7b", "batch": {"micro": 8, "sequence": 1024, "new_tokens": 3}, "gpu": "t4"},
    {"model": "gemma-2-2b", "batch": {"micro": 1, "sequence": 6000, "new_tokens": 4}},
    {"model": "gemma-3-1b", "batch": {"micro": 4, "sequence": 2048, "new_tokens": 6}},
    {"model": "mistral-7b-v0.1", "batch": {"micro": 1, "sequence": 5000, "new_tokens": 4}},
    {"model": "phi-4-mini", "batch": {"micro": 2, "sequence": 1000, "new_tokens": 4}, "loop": {"padded": True}},
    {"model": "qwen3-8b", "batch": {"micro": 2, "sequence": 4096, "new_tokens": 4}, "method": {"quantization": {}}},
    {
        "model": "llama-3.1-8b",
        "batch": {"micro": 1, "sequence": 1024, "new_tokens": 4},
        "method": {"quantization": {"format": "int8"}},
    },
)


# A loop over experts depends on data, and is not traced: without.
STEP = OWN["step3p7"]
DENSE = {"step3p7": {**STEP, "text_config": {**STEP["text_config"], "mlp_layer_types": ["dense"] * 5}}}


def runs(names: list[str]) -> Iterator[tuple[str, RunSpec]]:
    for name in names or (*TINY, *TOWERS, *DENSE):
        config = {"config": {"model_type": name, **{**TINY, **TOWERS, **DENSE}[name]}}
        plain = {"task": "generate", "batch": {**SHORT, "new_tokens": 3}, "gpu": "a100-sxm-80gb"}
        for fields in (*RUNS, *(MORE if name in VARIED else ())):
            yield name, RunSpec(model=config, **{**plain, **fields})
    for fields in () if names else REAL:
        yield fields["model"], RunSpec(**{"task": "generate", "gpu": "a100-sxm-80gb", **fields})


def row(name: str, run: RunSpec, traced: Traced) -> dict[str, Any]:
    """The peaks of a run's phases, and what torch would reserve."""
    phases = {p.phase: p.peak for p in traced.phases}
    asked = run.model_dump(mode="json", exclude_defaults=True)
    return {"name": name, "run": asked, "phases": phases, "reserved": traced.reserved, "parameters": traced.parameters}


def main() -> None:
    asked = list(runs(sys.argv[1:]))
    for (name, run), traced in zip(asked, traces((run for _, run in asked), 1), strict=True):
        if isinstance(traced, MemplanError):
            print(f"{name}: {traced}", file=sys.stderr)
        else:
            print(json.dumps(row(name, run, traced)), flush=True)


if __name__ == "__main__":
    main()
