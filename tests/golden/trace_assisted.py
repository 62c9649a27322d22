"""Trace assisted generation, and print the rows for tests/program/test_assisted.py.

python tests/golden/trace_assisted.py > tests/golden/traced_assisted.jsonl

transformers' `generate` with small pairs of models: several families, mixtures, windows, early exits and prompt lookup,
other kernels and dtypes, quantised, sampled. Then some cards at full size. Runs that cannot be traced are listed on
standard error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.core.errors import MemplanError
from memplan.probe.run.trace import traces
from memplan.spec.run import RunSpec
from tests.golden.trace_inference import row
from tests.tiny import TINY

ABOUT = (
    "Generation with an assistant, of small pairs of every kind that transformers 5.24 generates with, and of some "
    "cards at their own sizes: its own generate, in which no proposed token is accepted. transformers 5.24, peft "
    "0.21.2, bitsandbytes 0.50.2 on torch 2.13, on fake CUDA tensors with every allocation recorded. `within` bounds "
    "the error of a phase where it is more than 0.2 %."
)
WIDE = {"vocab_size": 30000}  # so that logits matter
CARD = "a100-sxm-80gb"


def config(kind: str, **fields: Any) -> dict[str, Any]:
    return {"config": {"model_type": kind, **TINY[kind], "vocab_size": 300, **fields}}


def small(kind: str, assistant: str = "", wide: bool = False, **fields: Any) -> dict[str, Any]:
    """Return a run of a small model; the assistant has one layer."""
    vocabulary = WIDE if wide else {}
    generation = dict(fields.pop("generation", {}))
    if assistant:
        one = {
            "n_layers"
            if assistant == "mpt"
            else "n_layer"
            if assistant in ("gpt2", "bloom")
            else "num_hidden_layers": 1
        }
        generation = {
            "assistant_model": config(assistant, **one, **vocabulary),
            "num_assistant_tokens": 4,
            **generation,
        }
    batch = {"sequence": 75, "new_tokens": 12, **fields.pop("batch", {})}
    return {"model": config(kind, **vocabulary), "batch": batch, "generation": generation, **fields}


LONG = {"sequence": 20, "new_tokens": 60}
RUNS: dict[str, dict[str, Any]] = {
    "llama": small("llama", "llama"),
    "llama, many words": small("llama", "llama", wide=True),
    "llama, one token": small("llama", "llama", batch={"sequence": 1, "new_tokens": 7}),
    "llama, two new tokens": small("llama", "llama", batch={"new_tokens": 2}),
    "llama, as many as usual": small(
        "llama", "llama", wide=True, generation={"num_assistant_tokens": None}, batch={"new_tokens": 40}
    ),
    "llama, drawn": small("llama", "llama", wide=True, generation={"do_sample": True}),
    "llama, eager": small("llama", "llama", kernels={"attention": "eager"}),
    "llama, math": small("llama", "llama", kernels={"attention": "sdpa_math"}),
    "llama, efficient": small("llama", "llama", kernels={"attention": "sdpa_efficient"}),
    "llama, flash attention 2": small("llama", "llama", kernels={"attention": "flash_attention_2"}),
    "llama, static": small("llama", "llama", generation={"cache_implementation": "static"}),
    "llama, static, eager": {
        **small("llama", "llama", generation={"cache_implementation": "static"}, kernels={"attention": "eager"}),
        "within": 5e-3,
    },
    "llama, padded": small("llama", "llama", loop={"padded": True}),
    "llama, fp32": small("llama", "llama", precision="fp32"),
    "llama, assistant in fp32": small("llama", "llama", generation={"assistant_dtype": "fp32"}),
    "llama, assistant in 4 bits": small("llama", "llama", wide=True, generation={"assistant_quantization": {}}),
    "llama, adapted": small("llama", "llama", method={"kind": "lora"}),
    "llama, early exit": small("llama", wide=True, generation={"assistant_early_exit": 1}),
    "llama, prompt lookup": small("llama", wide=True, generation={"prompt_lookup_num_tokens": 6}),
    "llama, prompt lookup, drawn": small(
        "llama", wide=True, generation={"prompt_lookup_num_tokens": 6, "do_sample": True}
    ),
    "qwen2": small("qwen2", "qwen2"),
    "qwen3": small("qwen3", "qwen3"),
    "gemma2": small("gemma2", "gemma2"),
    "gemma2, beyond its window": small("gemma2", "gemma2", batch=LONG),
    "gemma2, early exit": small("gemma2", generation={"assistant_early_exit": 1, "num_assistant_tokens": 3}),
    "gemma2, prompt lookup": small("gemma2", generation={"prompt_lookup_num_tokens": 3}),
    "gemma3_text": small("gemma3_text", "gemma3_text"),
    "gemma4_text": small("gemma4_text", "gemma3_text"),
    "mistral, beyond its window": small("mistral", "gemma2", batch=LONG),
    "phi3": small("phi3", "phi3"),
    "gpt2": small("gpt2", "gpt2"),
    "opt": small("opt", "opt"),
    "opt, prompt lookup": small("opt", wide=True, generation={"prompt_lookup_num_tokens": 3}),
    "opt, prompt lookup, padded": small(
        "opt", wide=True, generation={"prompt_lookup_num_tokens": 3}, loop={"padded": True}
    ),
    "bloom": {**small("bloom", "bloom"), "within": 1e-2},
    "gpt_neox": small("gpt_neox", "gpt_neox"),
    "cohere2": small("cohere2", "cohere2"),
    "mixtral": small("mixtral", "mistral"),
    "mixtral, early exit": small("mixtral", generation={"assistant_early_exit": 1, "num_assistant_tokens": 3}),
    "qwen3_moe": small("qwen3_moe", "qwen3"),
    "qwen3, a mixture assists": small("qwen3", "qwen3_moe"),
    "deepseek_v3": small("deepseek_v3", "llama"),
    "gpt_oss": small("gpt_oss", "gpt_oss"),
    "llama4_text": small("llama4_text", "llama"),
}
REAL: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model": "llama-3.1-8b",
        "generation": {"assistant_model": "llama-3.2-1b"},
        "batch": {"sequence": 4096, "new_tokens": 24},
    },
    "gemma-2-9b": {
        "model": "gemma-2-9b",
        "generation": {"assistant_model": "gemma-2-2b", "num_assistant_tokens": 5},
        "batch": {"sequence": 5000, "new_tokens": 8},
    },
    "mixtral-8x7b": {
        "model": "mixtral-8x7b",
        "generation": {"assistant_model": "mistral-7b-v0.1", "num_assistant_tokens": 5, "assistant_quantization": {}},
        "batch": {"sequence": 1024, "new_tokens": 8},
    },
    "qwen2.5-0.5b": {
        "model": "qwen2.5-0.5b",
        "generation": {"prompt_lookup_num_tokens": 10},
        "batch": {"sequence": 2048, "new_tokens": 4},
    },
}


def main() -> None:
    asked = [(name, dict(fields)) for name, fields in (*RUNS.items(), *REAL.items())]
    within = [fields.pop("within", None) for _, fields in asked]
    runs = [RunSpec(task="generate", gpu=CARD, **fields) for _, fields in asked]
    print(json.dumps({"about": ABOUT, "date": "2026-11-26"}))
    for (name, _), bound, run, traced in zip(asked, within, runs, traces(runs, 1), strict=True):
        if isinstance(traced, MemplanError):
            print(f"{name}: {traced}", file=sys.stderr)
        else:
            print(json.dumps({**row(name, run, traced), **({"within": bound} if bound else {})}), flush=True)


if __name__ == "__main__":
    main()
