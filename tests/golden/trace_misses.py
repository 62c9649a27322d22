"""Trace runs that an estimate once missed, and print rows for tests/estimate/test_traced_steps.py.

python tests/golden/trace_misses.py [NAME ...] >> tests/golden/traced_misses.jsonl

A row's name says which tensor was missed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.spec.run import RunSpec
from tests.golden.trace_runs import write
from tests.tiny_vision import TINY


def lora(saved: list[str], **more: Any) -> dict[str, Any]:
    method = {"kind": "lora", "targets": ["q_proj", "v_proj"], "modules_to_save": saved}
    return {"method": method, "batch": {"micro": 2, "sequence": 512}, **more}


def held(hold: bool | str, loss: str = "hf", **loop: Any) -> dict[str, Any]:
    return {"kernels": {"loss": loss}, "loop": {"hold_outputs": hold, **loop}, "batch": {"sequence": 1024}}


def dora(targets: list[str], **method: Any) -> dict[str, Any]:
    return {"method": {"kind": "dora", "targets": targets, **method}, "batch": {"sequence": 512}}


AUTOCAST = {"weights": "bf16", "compute": "bf16", "autocast": True}
FREEZE = {"method": {"kind": "freeze", "trainable_layers": 2}, "batch": {"sequence": 512}}
_VL = TINY["qwen3_vl_moe"]
SHALLOW = {"model_type": "qwen3_vl_moe", **_VL, "text_config": {**_VL["text_config"], "num_hidden_layers": 2}}
SEEING = {"batch": {"sequence": 640, "images": 2, "image_size": [352, 480]}, "kernels": {"checkpointing": "none"}}
MAMBA = {
    "precision": {"weights": "fp32"},
    "kernels": {"attention": "eager", "loss": "chunked_lm_head", "checkpointing": "none"},
    "batch": {"micro": 2, "sequence": 128},
}

CASES: dict[str, dict[str, Any]] = {
    "tied copies": {"model": "llama-3.2-1b", **lora(["embed_tokens", "lm_head"])},
    "copy of a tied embedding": {"model": "llama-3.2-1b", **lora(["embed_tokens"])},
    "copy of a tied head": {"model": "gemma-2-2b", **lora(["lm_head"])},
    "tied copies of gpt2": {
        "model": "gpt2",
        **lora(["wte", "lm_head"]),
        "method": {"kind": "lora", "targets": ["c_attn"], "modules_to_save": ["wte", "lm_head"]},
    },
    "outputs cast by accelerate and held": {
        "model": "llama-3.2-1b",
        "method": "lora",
        "precision": AUTOCAST,
        **held(True, trainer=True),
    },
    "chunks held for a step": {"model": "llama-3.2-1b", "method": "lora", **held("step", "chunked")},
    "chunks held through backward": {"model": "smollm-135m", **held(True, "chunked")},
    "a head whose cast is dropped is held": {"model": "mamba-130m", **MAMBA},
    "norms of an adapted embedding": {"model": "qwen2-0.5b", **dora(["q_proj", "embed_tokens"])},
    "norms of an adapted embedding, over 4 bits": {
        "model": "llama-3.2-1b",
        **dora(["q_proj", "embed_tokens"], kind="qdora", dropout=0.1),
    },
    "deepstack features after the last layer": {"model": {"config": SHALLOW}, **SEEING},
    "layers after a tower": {"model": "qwen2-vl-2b", **FREEZE},
}


def main() -> None:
    wanted = sys.argv[1:] or list(CASES)
    write([(name, RunSpec(**CASES[name])) for name in wanted])


if __name__ == "__main__":
    main()
