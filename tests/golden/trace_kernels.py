"""Trace losses, kernels and formats that single options choose, and print rows for tests/estimate/test_traced_steps.py.

python tests/golden/trace_kernels.py [NAME ...] >> tests/golden/traced_kernels.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.spec.run import RunSpec
from tests.golden.trace_runs import write
from tests.tiny import TINY
from tests.tiny_vision import TINY as SEEING

AUTOCAST = {"weights": "bf16", "compute": "bf16", "autocast": True}
TRAINER = {"trainer": True}


def small(family: str) -> dict[str, Any]:
    return {"model": {"config": {"model_type": family, **TINY[family]}}, "gpu": "a100-sxm-80gb"}


def smoothed(**more: Any) -> dict[str, Any]:
    return {"kernels": {"loss": "label_smoothing"}, "batch": {"sequence": 512}, **more}


SMOOTHED = {
    "label smoothing": smoothed(model="smollm-135m"),
    "label smoothing, autocast": smoothed(
        model="qwen2-0.5b", method="lora", precision=AUTOCAST, loop=TRAINER, batch={"micro": 2, "sequence": 384}
    ),
    "label smoothing, amp": smoothed(model="smollm-135m", precision="amp", loop=TRAINER),
    "label smoothing, fp32": smoothed(model="smollm-135m", precision="fp32", batch={"micro": 3, "sequence": 130}),
    "label smoothing, soft caps": smoothed(model="gemma-2-2b", method="lora"),
    "label smoothing, t5": smoothed(model="flan-t5-small", batch={"micro": 2, "sequence": 512, "target_sequence": 128}),
    "label smoothing, bert": smoothed(model="bert-base-uncased", batch={"micro": 2, "sequence": 512}),
    "label smoothing, accumulated": smoothed(
        model="smollm-135m", batch={"micro": 2, "sequence": 256, "accumulation": 2}, loop={"hold_outputs": True}
    ),
}


def stored(format: str, **more: Any) -> dict[str, Any]:
    """Return a run with adapters on weights in a format; to trace it, hqq or torchao is to be on the path."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    method = {"kind": "qlora", "targets": targets, "quantization": {"format": format}, **more.pop("method", {})}
    return {"model": "qwen2-0.5b", "method": method, "batch": {"sequence": 384}, **more}


STORED = {
    f"{format}, {name}": stored(format, **more)
    for format in ("hqq-int4", "torchao-int8")
    for name, more in {
        "checkpointed": {},
        "not checkpointed": {"kernels": {"checkpointing": "none"}, "batch": {"micro": 2, "sequence": 256}},
        "autocast": {"precision": AUTOCAST, "model": "smollm-135m", "kernels": {"checkpointing": "none"}},
        "dropout": {"method": {"dropout": 0.1, "targets": ["q_proj", "v_proj"]}, "model": "gemma-2-2b"},
        "16-bit adapters": {
            "method": {"adapter_dtype": "bf16", "targets": ["qkv_proj", "down_proj"]},
            "model": "phi-3-mini-4k",
        },
    }.items()
}


def every(n: int, model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "kernels": {"every_n_layers": n}, "batch": {"micro": 2, "sequence": 256}, **more}


SPACED = {
    "every second layer": every(2, "smollm-135m"),
    "every third layer, lora": every(3, "qwen2-0.5b", method="lora"),
    "every fourth of 26 layers that alternate": every(4, "gemma-2-2b", method="qlora"),
    "every layer but the first is plain": every(64, "smollm-135m", precision="amp"),
    "every second layer, t5": every(2, "flan-t5-small", batch={"micro": 2, "sequence": 256, "target_sequence": 64}),
    "every second of 3 layers": {**every(2, ""), **small("qwen3_moe")},
}


def selective(family: str, **more: Any) -> dict[str, Any]:
    return {**small(family), "kernels": {"checkpointing": "selective"}, "batch": {"micro": 2, "sequence": 256}, **more}


SELECTIVE = {
    **{f"products kept, {name}": selective(name) for name in ("llama", "qwen3", "gpt_neox", "phi3", "qwen3_moe")},
    "products kept, amp": selective("llama", precision="amp"),
    "products kept, lora": selective("llama", method="lora"),
    "products kept, eager": selective("gemma2", kernels={"checkpointing": "selective", "attention": "eager"}),
    "products kept, accumulated": selective("qwen2", batch={"micro": 2, "sequence": 384, "accumulation": 2}),
    "products kept, fp32": selective("mistral", precision="fp32"),
}


def attending(attention: str, model: str | dict[str, Any], **more: Any) -> dict[str, Any]:
    kernels = {"attention": attention, "checkpointing": "none"}
    return {"model": model, "kernels": kernels, "batch": {"micro": 2, "sequence": 384}, "gpu": "h100-sxm-80gb", **more}


ATTENDED = {
    f"{attention}, {name}": attending(attention, **more)
    for attention in ("flash_attention_3", "sdpa_cudnn")
    for name, more in {
        "grouped": {"model": "qwen2-0.5b", "batch": {"micro": 2, "sequence": 300}},
        "not grouped": {"model": "gpt2"},
        "lora": {"model": "llama-3.2-1b", "method": "lora", "kernels": {"attention": attention}},
        "autocast": {"model": "smollm-135m", "precision": "amp"},
    }.items()
}
ATTENDED["flash_attention_3, padded"] = attending("flash_attention_3", "smollm-135m", loop={"padded": True})
BINDING = {"model": "llama-2-7b", "method": "lora", "batch": {"micro": 1, "sequence": 1024}}
ATTENDED |= {
    f"{kind}, attention binds": attending(kind, **{**BINDING, "kernels": {"attention": kind, "loss": "fused"}})
    for kind in ("flash_attention_3", "sdpa_cudnn")
}
ATTENDED["flash_attention_3, grouped and binding"] = attending(
    "flash_attention_3",
    "smollm-135m",
    method={"kind": "lora", "targets": ["q_proj"]},
    batch={"sequence": 1024},
    kernels={"attention": "flash_attention_3", "loss": "fused"},
)
# One for each way in which heads reach the kernel.
FLEXIBLE = ("llama", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text", "granite", "olmo2", "cohere2", "glm4")
ATTENDED["flash_attention_3, windows"] = attending("flash_attention_3", "gemma-2-2b", method="lora")
ATTENDED |= {
    f"flash_attention_3, sinks, {name}": attending("flash_attention_3", small("gpt_oss")["model"], **more)
    for name, more in {
        "full": {},
        "lora": {"method": "lora"},
        "checkpointed": {"kernels": {"attention": "flash_attention_3"}},
        "autocast": {"precision": "amp"},
    }.items()
}


FLEX = {
    f"flex_attention, {family}, {kind}": {
        **small(family),
        "method": method,
        "kernels": {"attention": "flex_attention", "checkpointing": checkpointing},
        "batch": {"micro": 2, "sequence": 1000},
    }
    for family in FLEXIBLE
    for kind, method, checkpointing in (
        ("full", "full", "none"),
        ("lora", "lora", "full"),
        ("qlora", "qlora", "none"),
    )
}
FLEX["flex_attention, heads repeated"] = attending("flex_attention", "qwen2-0.5b", method="lora")
FLEX["flex_attention, autocast"] = attending("flex_attention", "smollm-135m", precision="amp")
FLEX |= {
    f"flex_attention, padded, {name}": {**case, "loop": {"padded": True}}
    for name, case in (
        ("full", attending("flex_attention", "smollm-135m")),
        ("windows", FLEX["flex_attention, gemma2, full"]),
        ("lora", {**FLEX["flex_attention, mistral, lora"], "batch": {"micro": 4, "sequence": 1000}}),
        ("autocast", attending("flex_attention", "smollm-135m", precision="amp")),
    )
}
FLEX["flex_attention, binding"] = attending(
    "flex_attention", **{**BINDING, "kernels": {"attention": "flex_attention", "loss": "fused"}}
)


def seeing(family: str, **more: Any) -> dict[str, Any]:
    config = {"model_type": family, **SEEING[family]}
    kernels = {"attention": "eager", "checkpointing": "none"}
    batch = {"micro": 2, "sequence": 640, "images": 2}
    return {"model": {"config": config}, "kernels": kernels, "batch": batch, **more}


_HEARD = {"micro": 2, "sequence": 110, "clips": 2}


FAMILIES = ("gemma3", "llava", "paligemma", "internvl")
SEEN = {f"eager attention with images, {family}": seeing(family) for family in FAMILIES}
SEEN |= {
    f"{attention} attention with {seconds} s of audio, {family}": seeing(
        family, kernels={"attention": attention, "checkpointing": "none"}, batch={**_HEARD, "clip_seconds": seconds}
    )
    for attention, seconds in (("eager", 1), ("eager", 2), ("sdpa_efficient", 1))
    for family in ("qwen2_audio", "voxtral")
}
SEEN["eager attention with images, lora"] = seeing("gemma3", method="lora")
CASES: dict[str, dict[str, Any]] = {**SMOOTHED, **STORED, **SPACED, **SELECTIVE, **ATTENDED, **FLEX, **SEEN}


def main() -> None:
    write([(name, RunSpec(**case)) for name, case in CASES.items() if not sys.argv[1:] or name in sys.argv[1:]])


if __name__ == "__main__":
    main()
