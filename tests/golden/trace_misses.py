"""Trace runs that an estimate once missed, and print rows for tests/estimate/test_traced_steps.py.

python tests/golden/trace_misses.py [NAME ...] >> tests/golden/traced_misses.jsonl

A row's name says which tensor was missed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from memplan.probe.run.trace import TracedRun, traces
from memplan.spec.run import RunSpec
from tests.encoders import SMALL
from tests.golden.trace_inference import row
from tests.golden.trace_runs import write
from tests.tiny import TINY as DECODERS
from tests.tiny_vision import TINY


def lora(saved: list[str], ties: bool = False, **more: Any) -> dict[str, Any]:
    options = {"options": {"ensure_weight_tying": True}} if ties else {}
    method = {"kind": "lora", "targets": ["q_proj", "v_proj"], "modules_to_save": saved, **options}
    return {"method": method, "batch": {"micro": 2, "sequence": 512}, **more}


def held(hold: bool | str, loss: str = "hf", **loop: Any) -> dict[str, Any]:
    return {"kernels": {"loss": loss}, "loop": {"hold_outputs": hold, **loop}, "batch": {"sequence": 1024}}


def dora(targets: list[str], **method: Any) -> dict[str, Any]:
    return {"method": {"kind": "dora", "targets": targets, **method}, "batch": {"sequence": 512}}


def small(family: str, configs: Mapping[str, Any] = DECODERS) -> dict[str, Any]:
    return {"model": {"config": {"model_type": family, **configs[family]}}, "gpu": "a100-sxm-80gb"}


def reentrant(family: str) -> dict[str, Any]:
    batch = {"micro": 2, "sequence": 256, "target_sequence": 96}
    return {**small(family, SMALL), "batch": batch, "kernels": {"reentrant": True}}


INT8 = {"method": {"quantization": {"format": "int8"}}}
AUTOCAST = {"weights": "bf16", "compute": "bf16", "autocast": True}
AMP = {"weights": "fp32", "autocast": True}
GENERATE = {"task": "generate", "batch": {"micro": 2, "sequence": 90, "new_tokens": 6}}
FREEZE = {"method": {"kind": "freeze", "trainable_layers": 2}, "batch": {"sequence": 512}}
_VL = TINY["qwen3_vl_moe"]
SHALLOW = {"model_type": "qwen3_vl_moe", **_VL, "text_config": {**_VL["text_config"], "num_hidden_layers": 2}}
SEEING = {"batch": {"sequence": 640, "images": 2, "image_size": [352, 480]}, "kernels": {"checkpointing": "none"}}
MAMBA = {
    "precision": {"weights": "fp32"},
    "kernels": {"attention": "eager", "loss": "chunked_lm_head", "checkpointing": "none"},
    "batch": {"micro": 2, "sequence": 128},
}
SELECTING = {"indexer_types": ["full", *("full", "shared") * 2, "full", "full", "shared", "shared"]}

CASES: dict[str, dict[str, Any]] = {
    "tied copies": {"model": "llama-3.2-1b", **lora(["embed_tokens", "lm_head"])},
    "copy of a tied embedding": {"model": "llama-3.2-1b", **lora(["embed_tokens"])},
    "copy of a tied head": {"model": "gemma-2-2b", **lora(["lm_head"])},
    "tied copies of gpt2": {
        "model": "gpt2",
        **lora(["wte", "lm_head"]),
        "method": {"kind": "lora", "targets": ["c_attn"], "modules_to_save": ["wte", "lm_head"]},
    },
    "one copy of tied modules": {"model": "llama-3.2-1b", **lora(["embed_tokens", "lm_head"], ties=True)},
    "one copy of a tied head": {"model": "gemma-2-2b", **lora(["lm_head"], ties=True)},
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
    "outputs held into the next micro-batch": {
        "model": "smollm-135m",
        "method": "lora",
        "kernels": {"loss": "chunked_lm_head"},
        "loop": {"hold_outputs": "step"},
        "batch": {"micro": 2, "sequence": 418, "accumulation": 2},
    },
    "a last chunk with what is left": {
        "model": "smollm-135m",
        "method": "lora",
        "kernels": {"loss": "chunked"},
        "batch": {"micro": 4, "sequence": 418},
    },
    "fewer than eight chunks": {"model": "smollm-135m", "kernels": {"loss": "chunked"}, "batch": {"sequence": 33}},
    "a wide sum added in place": {
        **small("llama4_text"),
        "precision": {"weights": "bf16", "autocast": True},
        "batch": {"sequence": 118},
    },
    "the reference product's probabilities outlive its result's cast": {
        **small("nemotron"),
        **INT8,
        "task": "forward",
        "batch": {"micro": 4, "sequence": 26},
        "kernels": {"attention": "sdpa_math"},
    },
    "an int8 product in fp16 next to int32": {
        **small("gpt_bigcode"),
        **INT8,
        "task": "generate",
        "batch": {"micro": 4, "sequence": 75, "new_tokens": 3},
        "generation": {"num_beams": 4},
    },
    "a shared bias passed by position": reentrant("mt5"),
    "a shared bias passed by position, with adapters": {**reentrant("mt5"), "method": "lora"},
    "encoded tokens passed by position": reentrant("bart"),
    "decoder of the encoder's length": {**small("bart", SMALL), "batch": {"micro": 2, "sequence": 96}},
    "sums of parameters without gradients": {
        "model": {"config": {"model_type": "internvl", **TINY["internvl"]}},
        "optimizer": "adagrad",
        "batch": {"micro": 2, "sequence": 96},
        "gpu": "a100-sxm-80gb",
    },
    "layers after a tower": {"model": "qwen2-vl-2b", **FREEZE},
    "casts of an encoder's weights, and of its keys'": {**small("flan-t5", SMALL), **GENERATE, "precision": AMP},
    "casts of a tower's weights": {
        **small("llava", TINY),
        "task": "generate",
        "precision": AMP,
        "batch": {"micro": 2, "sequence": 200, "new_tokens": 6, "images": 1},
    },
    "a triangle in the frame that makes it": {
        **small("t5", SMALL),
        "task": "forward",
        "batch": {"micro": 2, "sequence": 250},
    },
    "an encoder caches nothing": {**small("bart", SMALL), "task": "forward", "batch": {"micro": 3, "sequence": 47}},
    "the first product is freed before the second": {
        **small("deepseek_v2"),
        "method": "lora",
        "batch": {"sequence": 33},
    },
    "scales of every row of heads": {**small("glm4_moe_lite"), **INT8, **GENERATE},
    "a number without axes widens nothing": {
        **small("apertus"),
        "method": {"kind": "lora", "rank": 1},
        "precision": AMP,
        "batch": {"micro": 2, "sequence": 96},
        "kernels": {"checkpointing": "none"},
    },
    "an input that autocast copies after dropout": {
        **small("stablelm"),
        "method": {"kind": "lora", "dropout": 0.1},
        "precision": AMP,
        "batch": {"micro": 4, "sequence": 113},
    },
    "a head that an embedding model does not have": {
        **small("olmo2"),
        "objective": "feature_extraction",
        **lora(["lm_head"]),
        "batch": {"micro": 4, "sequence": 113},
    },
    "operands of the only chunk of a scan": {
        **small("granitemoehybrid"),
        "batch": {"micro": 2, "sequence": 21},
        "kernels": {"checkpointing": "none"},
    },
    "operands of the only chunk of one sequence": {
        **small("mamba2"),
        "batch": {"sequence": 20},
        "kernels": {"checkpointing": "none"},
    },
    "states of the last tokens of a scan": {
        **small("falcon_mamba"),
        "batch": {"micro": 2, "sequence": 19},
        "kernels": {"checkpointing": "none"},
    },
    "chunks of a short sequence": {
        **small("cohere2"),
        "method": "lora",
        "batch": {"micro": 16, "sequence": 9},
        "kernels": {"loss": "chunked"},
    },
    "the only chunk of a tied head": {
        "model": "smollm2-135m",
        "gpu": "a100-sxm-80gb",
        "batch": {"micro": 3, "sequence": 58},
        "kernels": {"loss": "chunked_nll"},
    },
    "the only product in fp16": {
        **small("opt"),
        "task": "forward",
        **INT8,
        "precision": {"weights": "fp16"},
        "batch": {"sequence": 29},
    },
    "repeated keys under autocast": {
        **small("ministral3"),
        **GENERATE,
        "precision": AMP,
        "kernels": {"attention": "sdpa_math"},
        "loop": {"padded": True},
    },
    "casts that end before the outputs are converted": {
        **small("xlm-roberta", SMALL),
        "precision": AMP,
        "batch": {"sequence": 78, "accumulation": 2},
        "loop": {"hold_outputs": True, "trainer": True},
    },
    "the encoder's output, which is held": {
        **small("bart", SMALL),
        "batch": {"micro": 2, "sequence": 200, "target_sequence": 24},
        "loop": {"hold_outputs": True},
    },
    "no cache without use_cache": {
        **small("granitemoehybrid"),
        "task": "forward",
        "batch": {"sequence": 40},
        "loop": {"use_cache": False},
    },
    "fp32 states of a trained copy of the embeddings": {
        **small("llama"),
        **lora(["embed_tokens"], optimizer="adamw_8bit", loop={"trainer": True}),
    },
    "outputs of layers, freed before the head": {
        **small("deberta-v2", {"deberta-v2": {**SMALL["deberta-v2"], "vocab_size": 6000}}),
        "task": "forward",
        "batch": {"micro": 3, "sequence": 90},
    },
    "a masked head's input, which the outputs hold": {
        **small("distilbert", SMALL),
        "task": "forward",
        "precision": AMP,
        "batch": {"micro": 2, "sequence": 37},
    },
    "embeddings that a script makes require a gradient": {
        **small("vit", SMALL),
        "method": "lora",
        "batch": {"micro": 4},
        "kernels": {"reentrant": True},
    },
    "a bias in the dtype of what a 4-bit layer reads": {
        **small("vit", SMALL),
        "method": {"kind": "qdora", "quantization": {}},
        "batch": {"micro": 4},
        "kernels": {"attention": "flash_attention_2"},
    },
    "a convolution's input, of frozen weights": {
        **small("whisper", SMALL),
        **lora(["embed_tokens"]),
        "batch": {"micro": 2},
        "kernels": {"reentrant": True},
    },
    "the gradient of the only chunk's logits, next to the head's": {
        "model": "qwen2-0.5b",
        "gpu": "a100-sxm-80gb",
        **lora(["lm_head"]),
        "batch": {"micro": 3, "sequence": 60},
        "kernels": {"loss": "chunked_nll", "checkpointing": "none"},
    },
    "the gradient of interpolated positions, expanded": {
        **small("qwen3_vl_moe", TINY),
        "batch": {"micro": 2, "sequence": 64, "images": 1, "image_size": 224},
    },
    "fp32 attention after k-bit preparation, without flash attention 2": {
        **small("albert", {"albert": {**SMALL["albert"], "vocab_size": 2600}}),
        "method": {"kind": "qlora", "quantization": {"kbit_preparation": True}},
        "batch": {"micro": 24, "sequence": 33},
        "kernels": {"checkpointing": "none"},
    },
    "keys that the layer before selected, which checkpoints keep": {
        **small("glm_moe_dsa", {"glm_moe_dsa": {**DECODERS["glm_moe_dsa"], "num_hidden_layers": 9, **SELECTING}}),
        "batch": {"micro": 3, "sequence": 35},
    },
    "zeros for encoded tokens, of which a kernel keeps a padded copy": {
        **small("t5", SMALL),
        "optimizer": "sgd",
        "batch": {"sequence": 82},
        "kernels": {"checkpointing": "full"},
    },
    "a clamp in fp16 alone adds no gradient": {
        **small("mt5", SMALL),
        "batch": {"micro": 2, "sequence": 63},
        "kernels": {"checkpointing": "full", "reentrant": True},
    },
    "the encoder's dropout mask, which outputs do not hold": {
        **small("flan-t5", SMALL),
        "precision": AMP,
        "batch": {"micro": 3, "sequence": 90},
        "loop": {"hold_outputs": True, "trainer": True},
    },
    "tokens of one sequence, which a product reads transposed": {
        **small("mamba"),
        "batch": {"sequence": 39},
        "kernels": {"checkpointing": "none"},
    },
    "gradients of one sequence's tokens, which are views": {
        **small("jamba"),
        "method": "lora",
        "batch": {"sequence": 81},
    },
    "what is added to gradients of stacked experts' adapters": {
        **small("ernie4_5_moe"),
        "method": {"kind": "qlora", "quantization": {}},
        "batch": {"sequence": 21, "accumulation": 3},
        "kernels": {"attention": "eager", "reentrant": True},
        "loop": {"trainer": True},
    },
    "one cast of a detached input": {**reentrant("bart"), "precision": AMP},
    "one cast of a detached input without a norm in front": {
        **small("olmo2"),
        "precision": AMP,
        "batch": {"micro": 2, "sequence": 128},
        "kernels": {"reentrant": True},
    },
    "a cast of embeddings that require a gradient": {
        **small("olmo2"),
        "method": "lora",
        "precision": AMP,
        "batch": {"micro": 2, "sequence": 128},
    },
    "casts of a scan's projection": {
        **small("jamba"),
        "method": "lora",
        "precision": AMP,
        "batch": {"micro": 2, "sequence": 48},
        "kernels": {"checkpointing": "none"},
    },
    "recomputed casts of a scan's projection": {
        **small("jamba"),
        "precision": AMP,
        "batch": {"sequence": 33},
    },
    "Mamba's last hidden states, which outputs do not hold": {
        **small("mamba", {"mamba": {**DECODERS["mamba"], "hidden_size": 256}}),
        "batch": {"micro": 2, "sequence": 64},
        "loop": {"hold_outputs": True},
    },
    "a single key head, copied for a product when that needs it": {
        **small("llama", {"llama": {**DECODERS["llama"], "num_key_value_heads": 1}}),
        "batch": {"micro": 2, "sequence": 300},
        "kernels": {"attention": "eager"},
    },
}


def main() -> None:
    wanted = [(name, RunSpec(**CASES[name])) for name in sys.argv[1:] or CASES]
    write([(name, run) for name, run in wanted if run.task == "train"])
    running = [(name, run) for name, run in wanted if run.task != "train"]
    for (name, run), traced in zip(running, traces((run for _, run in running), 1), strict=True):
        if isinstance(traced, TracedRun):
            print(json.dumps(row(name, run, traced)), flush=True)


if __name__ == "__main__":
    main()
