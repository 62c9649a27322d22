"""Values of options: what people type, in the option's own words, and text parsed into a field's value."""

from __future__ import annotations

import json
from typing import Any

from memplan.core.errors import refused


def tokens(text: str) -> str:
    """Return a number of tokens in digits; k and m are 1,024 and 1,048,576, as in the names of context lengths.

    >>> tokens("4k"), tokens("2,048"), tokens("many")
    ('4096', '2048', 'many')
    """
    number, unit = text.replace(",", ""), 1
    if number[-1:].lower() in _UNITS:
        number, unit = number[:-1], _UNITS[number[-1].lower()]
    return str(int(number) * unit) if number.isdecimal() and len(number) < 10 else text


_UNITS = {"k": 2**10, "m": 2**20}


def method_word(text: str) -> str:
    """Return a method in memplan's words, in any case.

    >>> method_word("QLoRA"), method_word("inference"), method_word("full-finetuning")
    ('qlora', 'generate', 'full')
    """
    word = text.lower().replace("-", "_")
    return next((method for method, words in _METHOD_WORDS.items() if word in words), word)


def trainer_word(text: str) -> str:
    """Return a trainer in memplan's words, in any case; IPO is a loss of DPO's."""
    word = text.lower()
    return {"ipo": "dpo", "rm": "reward"}.get(word, word)


def is_method(text: str) -> bool:
    """Return whether a word says what to do with a model: a method that trains or runs it, or a trainer."""
    return method_word(text) in (*_METHOD_WORDS, *FLAGS, *TRAINERS)


_METHOD_WORDS = {
    "full": (
        "fft",
        "ft",
        "finetune",
        "full_finetune",
        "full_finetuning",
        "full_fine_tuning",
        "full_ft",
        "full_sft",
        "sft",
        "train",
    ),
    "generate": ("generation", "infer", "inference", "serve", "serving"),
}


def retold(name: str, text: str) -> tuple[str, str]:
    """Return the option and value that people mean by a value of another option: `--gpus 2x4090` names a card.

    >>> retold("gpus", "2x4090"), retold("gpus", "2"), retold("deepspeed", "zero3"), retold("vram", "24")
    (('gpu', '2x4090'), ('gpus', '2'), ('zero', '3'), ('gpu', '24gb'))
    >>> retold("method", "DPO"), retold("method", "lora")
    (('trainer', 'dpo'), ('method', 'lora'))
    >>> retold("optimizer", "AdamW")
    ('optimizer', 'adamw_torch_fused')
    """
    word = text.lower()
    if name == "gpus" and not word.isdecimal():
        return "gpu", text
    if name == "deepspeed" and word[:4] == "zero" and word[-1:] in ("1", "2", "3") and len(word) <= len("zero-3"):
        return "zero", word[-1]
    if name == "method" and word in TRAINERS[1:]:
        return "trainer", word
    if name in ("optimizer", "optim") and word in ("adam", "adamw"):
        return name, "adamw_torch_fused"
    if name == "vram":
        return "gpu", f"{text}gb" if word.isdecimal() else text
    return name, text


TRAINERS = ("sft", "dpo", "kto", "orpo", "cpo", "simpo", "reward", "grpo", "rloo", "ppo", "gkd", "distill")
_SERVED = "--method generate --profile vllm"
FLAGS = ("qlora", "lora", "dora", "qdora")  # methods that people type as flags
# Options of other tools, or words in front of the model, and what to type: nothing for those that take no memory.
INSTEAD = {
    **{engine: f"--method generate --profile {engine}" for engine in ("vllm", "sglang", "tgi", "llama.cpp")},
    **dict.fromkeys(("gguf", "llama-cpp", "ollama"), "--method generate --profile llama.cpp"),
    **dict.fromkeys(("serve", "engine", "backend", "framework"), _SERVED),
    **dict.fromkeys(("inference", "generate", "run"), "--method generate"),
    **dict.fromkeys(("full", "train", "finetune"), "--method full"),
    **dict.fromkeys(("g", "card", "device", "hardware", "mem", "memory"), "--gpu, as in --gpu 24gb"),
    **dict.fromkeys(("m", "b"), "--method or --batch-size in full"),
    **dict.fromkeys(("ddp", "dp", "data-parallel-size"), "--gpus 2 alone, which is DDP"),
    "nodes": "--gpus 2, the GPUs of all nodes together",
    **dict.fromkeys(("strategy", "sharding", "distributed"), "--zero 3 or --fsdp fsdp2, with --gpus 2"),
    **dict.fromkeys(("sp", "sequence-parallel-size"), "--cp 2, which divides the sequence"),
    **dict.fromkeys(("html", "markdown", "csv", "svg", "yaml"), "--output FILE, whose ending says the format"),
    **dict.fromkeys(("liger", "use-liger", "use-liger-kernel"), "--loss fused --fused rms_norm,swiglu,rope"),
    **dict.fromkeys(("kv-cache", "kv-cache-type"), "--cache-dtype, with --method generate --profile vllm"),
    **dict.fromkeys(("users", "concurrency"), f"--batch-size 4 {_SERVED}"),
    "cpu-offload": "--zero 3 --offload optimizer",
    **dict.fromkeys(("lr", "learning-rate", "epochs", "num-train-epochs", "max-steps", "warmup-ratio", "seed"), ""),
    **dict.fromkeys(("alpha", "lora-alpha"), ""),
    **{f"zero{stage}": f"--zero {stage}" for stage in (1, 2, 3)},
    **dict.fromkeys(("quantization", "quantize", "quant"), "--quant-format to train on it, or --stored to run it"),
    **dict.fromkeys(("load-in-4bit", "4bit", "int4"), "--method qlora"),
    **dict.fromkeys(("load-in-8bit", "8bit", "int8"), "--method qlora --quant-format int8"),
    "bf16": "--precision autocast",
    "fp16": "--dtype fp16",
    **dict.fromkeys(("flash-attn", "flash-attention", "use-flash-attn"), "--attention flash_attention_2"),
    **dict.fromkeys(("unsloth", "use-unsloth"), "--profile unsloth"),
    "use-peft": "--method lora",
    "sleep-level": "--sleep, which levels 1 and 2 are on the GPU; level 0 is --no-sleep",
    "beta": "--reference copy, adapters or none (beta 0)",
    **dict.fromkeys(("use-vllm", "vllm-mode"), "--rollout colocate, vLLM on the same GPUs, or server"),
}


# Words that people give as a method or an attention kernel, and what to type: first the word that takes its place.
MEANT = {
    **dict.fromkeys(("fa2", "flash", "flash_attn", "flash_attention"), "flash_attention_2"),
    **dict.fromkeys(("fa3", "flash_attn_3"), "flash_attention_3"),
    "flex": "flex_attention",
    **{
        name: f"lora --peft-options init_lora_weights={name}"
        for name in ("pissa", "olora", "corda", "eva", "orthogonal")
    },
    **dict.fromkeys(
        ("int4", "4bit", "int8", "8bit", "fp8", "nf4"), "bf16 (quantised weights: --method qlora, --stored)"
    ),
    "vllm": "colocate (vLLM on the same GPUs) or server",
    **dict.fromkeys(("rslora", "rs_lora"), "lora --peft-options use_rslora=true"),
    **dict.fromkeys(("lora+", "loraplus", "lora_plus"), "lora (its learning rates take no memory)"),
}


def listed(text: str) -> list[str]:
    """Parse words separated by commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def names(text: str) -> str | list[str]:
    """Parse `all-linear`, `default`, names separated by commas, or a regular expression."""
    return text if text in ("all-linear", "default") or not _NAMES.isdisjoint(text) else listed(text)


_NAMES = frozenset("*+?|()[]{}^$\\")  # characters of regular expressions that no module's name has


def settings(text: str) -> dict[str, Any]:
    """Parse settings `name=value` separated by commas; values are numbers, true, false, or words."""
    parsed: dict[str, Any] = {}
    for setting in _outer_parts(text):
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not equals:
            raise refused(
                "method.options", f"{setting!r:.40} is not a setting; write name=value, as in oft_block_size=64"
            )
        try:
            parsed[name] = json.loads(value.lower() if value.lower() in ("true", "false") else value)
        except ValueError:
            parsed[name] = value
    return parsed


def role_model(text: str) -> dict[str, Any]:
    """Parse a model with its settings, `quantization.format` among them as `format`.

    >>> role_model("qwen2-7b,format=nf4,location=server")
    {'model': 'qwen2-7b', 'quantization': {'format': 'nf4'}, 'location': 'server'}
    """
    model, *settings = _outer_parts(text) or [""]
    spec: dict[str, Any] = {"model": model}
    for setting in settings:
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not equals:
            raise refused("roles", f"{setting!r:.40} is not a setting of a model; write name=value, as in format=nf4")
        spec |= {"quantization": {"format": value}} if name == "format" else {name: value}
    return spec


def _outer_parts(text: str) -> list[str]:
    """Return the parts between commas that are not inside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def pixels(text: str) -> int | list[int]:
    """Parse the side of an image, or its height and width."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() for side in sides):
        raise refused(
            "batch.image_size", f"{text!r:.40} is not a size in pixels; write 1024, or height x width as 768x1024"
        )
    height, *width = map(int, sides)
    return [height, *width] if width else height


def proportions(text: str) -> list[float]:
    """Parse numbers separated by commas or slashes, as llama.cpp does."""
    try:
        return [float(part) for part in text.replace("/", ",").split(",")]
    except ValueError:
        raise refused(
            "serving.tensor_split", f"{text!r:.40} is not a list of proportions; write 3,1 for two cards"
        ) from None


def kbit_preparation(text: str) -> bool | str:
    """Parse `true` or `false`; any other word is left to the field."""
    word = text.lower()
    return {"true": True, "false": False}.get(word, word)


def saving(wanted: bool) -> dict[str, Any] | None:
    """Return the default `Saving`, or None."""
    return {} if wanted else None
