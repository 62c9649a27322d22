"""Trace forward passes and generation, and print the rows for tests/program/test_inference.py.

python tests/golden/trace_inference.py > tests/golden/traced_inference.jsonl
python tests/golden/trace_inference.py llama mistral

Every family of tests/tiny.py, tests/tiny_vision.py and Step 3.7, or the named ones, at its small size: a forward pass,
and a prompt with a few generated tokens, with eager attention and with padding; some in other dtypes, with adapters,
quantised, with other caches, beams and sampling. Also encoder-decoders (tests/encoders.py) with beams, mllama with
images (`images`), padded images (`padded`), audio (`audio`), special cases (`apart`), and some cards at full size
(`real`). Runs that cannot be traced are listed on standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.core.errors import MemplanError
from memplan.probe.run.trace import TracedRun, traces
from memplan.spec.run import RunSpec
from tests.encoders import SMALL
from tests.tiny import TINY
from tests.tiny_towers import TINY as OWN
from tests.tiny_vision import TINY as TOWERS

SHORT = {"micro": 3, "sequence": 75}
AMP = {"weights": "fp32", "autocast": True}
STATIC = {"cache_implementation": "static"}
INT8 = {"method": {"quantization": {"format": "int8"}}, "precision": AMP}
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
    {"generation": STATIC},
    {"generation": STATIC, "kernels": {"attention": "eager"}},
    {"generation": {"num_beams": 4}},
    {"generation": {**STATIC, "num_beams": 4}},
    {"generation": {"do_sample": True}, "batch": {"micro": 40, "sequence": 5, "new_tokens": 3}},
    {"generation": {"num_beams": 4, "do_sample": True}, "batch": {"micro": 40, "sequence": 5, "new_tokens": 3}},
    {"precision": AMP},
    {"precision": AMP, "task": "forward", "batch": SHORT},
)
# For DeepSeek V4, with windows of 4 and 128 tokens and attention over 64: prompts below, at and above those, and enough
# generated tokens to fill some.
WINDOWS: tuple[dict[str, Any], ...] = (
    *(
        {"batch": {"micro": 3, "sequence": sequence, "new_tokens": 2}}
        for sequence in (2, 3, 4, 5, 63, 64, 65, 126, 127, 128, 129)
    ),
    {"batch": {"micro": 1, "sequence": 75, "new_tokens": 5}},
    {"batch": {"micro": 2, "sequence": 2, "new_tokens": 9}},
    {"batch": {"micro": 2, "sequence": 100, "new_tokens": 40}},
    {"batch": {"micro": 40, "sequence": 5, "new_tokens": 5}, "generation": {"do_sample": True}},
    {"precision": {"weights": "fp32"}},
    {"precision": AMP, "task": "forward", "batch": SHORT},
)
VARIED = ("llama", "qwen2", "gpt2", "gemma3_text", "mixtral", "starcoder2")  # with all variations
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

MATH = {"attention": "sdpa_math"}
FEW = {"micro": 3, "sequence": 75, "new_tokens": 3}
MANY = {"micro": 64, "sequence": 40, "new_tokens": 80}
UNSHARED = {"num_kv_shared_layers": 0, "use_double_wide_mlp": False}
ALIBI = {"alibi": True, "multi_query": False}
APART: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (  # special cases, named `apart`
    *(
        (name, {}, {"batch": FEW, "kernels": MATH, "loop": {"padded": padded}})
        for name in ("llama", "gpt2", "gpt_bigcode", "falcon")
        for padded in (False, True)
    ),
    *(("falcon", {"multi_query": False}, {"batch": FEW, "kernels": {"attention": a}}) for a in ("eager", "sdpa_math")),
    *(("falcon", ALIBI, {"batch": FEW, "kernels": {"attention": a}}) for a in ("eager", "sdpa", "sdpa_math")),
    *((name, {}, {"batch": MANY, "generation": STATIC}) for name in ("llama", "bloom", "deepseek_v32", "gemma3_text")),
    ("gemma3_text", {}, {"batch": MANY, "generation": STATIC, "loop": {"padded": True}}),
    *((name, {}, {"batch": {**SHORT, "new_tokens": 5}, "generation": STATIC}) for name in ("codegen", "biogpt")),
    *(
        ("gemma4_text", {**UNSHARED, "attention_k_eq_v": eq}, {"batch": FEW, "generation": STATIC})
        for eq in (False, True)
    ),
)


OVER = ("bart", "m2m_100", "t5", "flan-t5", "umt5", "whisper")  # whose decoders read an encoder's output
SOURCE: dict[str, dict[str, Any]] = {name: {"sequence": 75} if name != "whisper" else {} for name in OVER}
ACROSS: tuple[dict[str, Any], ...] = (
    *(
        {
            "batch": {"micro": micro, "new_tokens": 4},
            "kernels": {"attention": attention},
            "precision": weights,
            "generation": {"num_beams": beams},
        }
        for micro, attention, weights, beams in product((1, 3), ("sdpa", "eager"), ("bf16", "fp32"), (1, 4))
    ),
    {"batch": {"micro": 3, "new_tokens": 3}, "generation": {"do_sample": True}},
    {"batch": {"micro": 3, "new_tokens": 3}, "loop": {"padded": True}},
    {"batch": {"micro": 3, "new_tokens": 3}, "loop": {"padded": True}, "kernels": {"attention": "eager"}},
    {"batch": {"micro": 3, "new_tokens": 5}, "generation": STATIC},
    {"batch": {"micro": 3, "new_tokens": 5}, "generation": STATIC, "kernels": {"attention": "eager"}},
    {"batch": {"micro": 2, "new_tokens": 5}, "generation": {**STATIC, "num_beams": 4}},
    {"batch": {"micro": 2, "new_tokens": 4, "target_sequence": 7}},
    {"batch": {"micro": 2, "new_tokens": 4, "target_sequence": 7}, "kernels": {"attention": "eager"}},
    {"batch": {"micro": 2, "new_tokens": 4, "target_sequence": 7}, "generation": STATIC},
    {"batch": {"micro": 2, "new_tokens": 4}, "method": {"kind": "lora"}},
    {"batch": {"micro": 2, "new_tokens": 4}, "method": {"quantization": {}}},
    {"batch": {"micro": 2, "new_tokens": 4}, "method": {"kind": "lora"}, "precision": AMP},
    {"task": "forward", "batch": {"micro": 3, "target_sequence": 33}},
    {"task": "forward", "batch": {"micro": 3, "target_sequence": 33}, "kernels": {"attention": "eager"}},
    {"task": "forward", "batch": {"micro": 3, "target_sequence": 33}, "loop": {"use_cache": False}},
)
IMAGES = {"micro": 3, "sequence": 75, "new_tokens": 4, "images": 2}
PICTURED = {"micro": 2, "sequence": 600, "images": 2, "image_size": (300, 420), "new_tokens": 3}
SEEN: tuple[dict[str, Any], ...] = (  # mllama, whose layers attend to images in addition to tokens
    *(
        {"batch": {**IMAGES, "micro": micro, "images": 1}, "precision": weights, "generation": {"num_beams": beams}}
        for micro, weights, beams in product((1, 3), ("bf16", "fp32"), (1, 4))
    ),
    {"batch": IMAGES},
    {"batch": IMAGES, "kernels": {"attention": "sdpa_efficient"}},
    {"batch": IMAGES, "generation": {"do_sample": True}},
    {"batch": IMAGES, "generation": STATIC},
    {"batch": IMAGES, "loop": {"padded": True}},
    {"batch": IMAGES, "method": {"kind": "lora"}},
    {"batch": IMAGES, "method": {"quantization": {}}},
    {"task": "forward", "batch": {**IMAGES, "new_tokens": 0}},
    {"task": "forward", "batch": {**IMAGES, "new_tokens": 0}, "loop": {"use_cache": False}},
)
HEARD: tuple[dict[str, Any], ...] = (
    {"batch": {"micro": 2, "sequence": 110, "clips": 2, "clip_seconds": 1}, "task": "forward"},
    *(
        {"batch": {"micro": 2, "sequence": 110, "clips": 2, "new_tokens": 4}, "generation": {"num_beams": beams}}
        for beams in (1, 2)
    ),
)
PADDED: tuple[dict[str, Any], ...] = (  # images, which pad a tile to its most patches
    {"batch": {**PICTURED, "new_tokens": 0}, "task": "forward"},
    {"batch": {**PICTURED, "new_tokens": 0}, "task": "forward", "precision": "fp32"},
    {"batch": {**PICTURED, "new_tokens": 0}, "task": "forward", "kernels": {"attention": "eager"}},
    {"batch": PICTURED},
    {"batch": PICTURED, "generation": {"num_beams": 2}},
)
SPOKEN = {"micro": 2, "sequence": 200, "clips": 2, "clip_seconds": 3, "new_tokens": 3}
TALKED: tuple[dict[str, Any], ...] = ({"batch": {**SPOKEN, "new_tokens": 0}, "task": "forward"}, {"batch": SPOKEN})
REAL_ACROSS: tuple[dict[str, Any], ...] = (
    {"model": "flan-t5-base", "batch": {"micro": 8, "sequence": 512, "new_tokens": 8}, "generation": {"num_beams": 4}},
    {"model": "t5-base", "batch": {"micro": 4, "sequence": 1001, "new_tokens": 3}, "kernels": {"attention": "eager"}},
    {"model": "t5-base", "batch": {"micro": 2, "sequence": 300, "new_tokens": 2}, "precision": "fp16"},
    {"model": "whisper-large-v3", "batch": {"micro": 4, "new_tokens": 8}, "precision": "fp16"},
    {"model": "whisper-large-v3-turbo", "batch": {"micro": 16, "new_tokens": 4}, "generation": {"num_beams": 5}},
    {"model": "llama-3.2-11b-vision", "batch": {"micro": 2, "sequence": 600, "images": 1, "new_tokens": 4}},
)


def runs(names: list[str]) -> Iterator[tuple[str, RunSpec]]:
    yield from decoders(names)
    for name in (name for name in OVER if not names or name in names):
        for fields in ACROSS:
            batch = {**SOURCE[name], **fields["batch"]}
            shared = {"model": {"config": SMALL[name]}, "task": "generate", "gpu": "a100-sxm-80gb"}
            yield name, RunSpec(**{**shared, **fields, "batch": batch})
    ways = (*({"kernels": MATH, "loop": {"padded": padded}} for padded in (False, True)), INT8)
    for more in ways if not names or "apart" in names else ():
        shared = {"model": {"config": SMALL["whisper"]}, "task": "generate", "gpu": "a100-sxm-80gb"}
        yield "whisper", RunSpec(**shared, **more, batch={"micro": 3, "new_tokens": 4})
    for fields in SEEN if not names or "images" in names else ():
        config = {"config": {"model_type": "mllama", **TOWERS["mllama"]}}
        yield "mllama", RunSpec(**{"model": config, "task": "generate", "gpu": "a100-sxm-80gb", **fields})
    for name, fields in product(("qwen2_audio", "voxtral"), HEARD) if not names or "audio" in names else ():
        config = {"config": {"model_type": name, **TOWERS[name]}}
        yield name, RunSpec(**{"model": config, "task": "generate", "gpu": "a100-sxm-80gb", **fields})
    own = (PADDED[0], PADDED[3], *TALKED)
    padded = (*product(("lfm2_vl",), PADDED), *product(("gemma4_unified",), PADDED))
    padded = (*padded, *product(("gemma4", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), own))
    for name, fields in padded if not names or "padded" in names else ():
        config = {"config": {"model_type": name, **TOWERS[name]}}
        yield name, RunSpec(**{"model": config, "task": "generate", "gpu": "a100-sxm-80gb", **fields})
    for fields in REAL_ACROSS if not names or "real" in names else ():
        yield fields["model"], RunSpec(**{"task": "generate", "gpu": "a100-sxm-80gb", **fields})


# Loops over experts depend on data and cannot be traced.
STEP = OWN["step3p7"]
DENSE = {"step3p7": {**STEP, "text_config": {**STEP["text_config"], "mlp_layer_types": ["dense"] * 5}}}


def decoders(names: list[str]) -> Iterator[tuple[str, RunSpec]]:
    resting = {name: config for name, config in OWN.items() if name == config["model_type"]}
    known = {**resting, **TINY, **TOWERS, **DENSE}
    for name in [name for name in names if name in known] or (() if names else known):
        config = {"config": {"model_type": name, **known[name]}}
        plain = {"task": "generate", "batch": {**SHORT, "new_tokens": 3}, "gpu": "a100-sxm-80gb"}
        for fields in (*RUNS, *(MORE if name in VARIED else WINDOWS if name == "deepseek_v4" else ())):
            yield name, RunSpec(model=config, **{**plain, **fields})
    for name, more, fields in APART if not names or "apart" in names else ():
        config = {"config": {"model_type": name, **TINY[name], **more}}
        yield name, RunSpec(**{"model": config, "task": "generate", "gpu": "a100-sxm-80gb", **fields})
    for fields in () if names else REAL:
        yield fields["model"], RunSpec(**{"task": "generate", "gpu": "a100-sxm-80gb", **fields})


def row(name: str, run: RunSpec, traced: TracedRun) -> dict[str, Any]:
    """Return the peaks of a run's phases, and torch's reserved bytes."""
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
