"""Random runs, configs, pairs of runs, command lines and files for `benchmarks/fuzz.py`, as JSON values."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from random import Random
from typing import Annotated, Any, Literal, get_args, get_origin

from benchmarks.sweep import FAMILIES
from memplan import RunSpec, all_gpus, card_names
from memplan.catalogue.profiles.engines import ENGINES
from memplan.catalogue.profiles.profiles import PROFILES
from memplan.cli.commands import Switch, type_of
from memplan.models.cards import find_config
from memplan.spec.checks import part_of
from memplan.spec.options import OPTIONS

Value = dict[str, Any]

# Values --------------------------------------------------------------------------------------------------------------

CARDS = tuple(card_names())
SMALL_CARDS = tuple(
    name
    for name in (
        *("qwen2-0.5b", "llama-3.2-1b", "gemma-2-2b", "gemma-3-4b", "phi-4-mini", "qwen3-0.6b", "gpt2", "t5-base"),
        *("bert-base-uncased", "falcon-7b", "opt-1.3b", "whisper-small", "vit-base-patch16-224", "mixtral-8x7b"),
        *("gpt-oss-20b", "mamba-1.4b", "bloom-560m", "pythia-410m", "qwen2-vl-2b"),
    )
    if name in CARDS
)
GPUS = tuple(gpu.name for gpu in all_gpus())
PROFILE_NAMES = tuple(profile.name for profile in (*PROFILES, *ENGINES))
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "lm_head", "embed_tokens", "all-linear", "query", "nonsense")
NAMES: Mapping[str, Sequence[str]] = {
    "model": SMALL_CARDS,
    "gpu": GPUS,
    "profile": PROFILE_NAMES,
    "method.targets": TARGETS,
    "method.modules_to_save": ("lm_head", "embed_tokens", "score", "norm"),
    "method.frozen": ("vision", "projector", "language"),
    "generation.assistant_model": SMALL_CARDS,
    "serving.draft_model": SMALL_CARDS,
}
TEXTS = (
    *("", " ", "x" * 5000, "Ünïcødé😀", "\x00", "\x1b[31mred", "a\nb", "<script>", "null", "-1", "1e5", "=1+1", "a|b"),
    *("../../etc/passwd", "\u202eabc", "\ud800"),
)
SIZES = (2**31, 2**40, 2**40 + 1, 2**63, 10**30, 10**400)
LARGEST_CHANGED = 10**15  # of a config's numbers: a larger one is no float, or not one plus a half
LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention", "x")


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"k": value}
    return value


def size_below(random: Random, limit: int) -> int:
    """Return a number whose magnitude is equally likely."""
    return int(math.exp(random.uniform(0, math.log(limit))))


def junk(random: Random) -> Any:
    """Return a value of any type."""
    return random.choice(
        (
            *(None, True, False, 0, 1, -1, 2, 3, 7, 0.5, 1.0, -0.0, 1e308, 1e-320, math.nan, math.inf),
            *([], {}, [1], [None], ["a", "b"], [[1, 2], [3]], {"a": 1}, {"type": "linear", "factor": 4}),
            *("1", "64", "true", {"__float__": "Infinity"}, nested(random.randint(2, 40)), nested(70)),
            random.randint(-(10**6), 10**6),
            random.choice(SIZES) * random.choice((1, -1)),
            random.choice(TEXTS),
            [random.randint(-3, 99) for _ in range(random.randint(1, 70))],
            [random.choice(LAYER_TYPES) for _ in range(random.randint(0, 100))],
            {str(i): i for i in range(random.randint(1, 300))},
        )
    )


def copied(value: Any) -> Any:
    """Return a copy with lists for tuples, as JSON has them."""
    if isinstance(value, Mapping):
        return {str(key): copied(inner) for key, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, (list, tuple)) else value


# Runs ----------------------------------------------------------------------------------------------------------------

TEMPLATES: tuple[Value, ...] = (
    *({}, {"method": "lora"}, {"method": "qlora", "gpu": "rtx-3090"}, {"method": "dora"}, {"method": "freeze"}),
    *({"precision": "amp"}, {"precision": "mixed", "optimizer": "adamw_torch"}, {"task": "forward"}),
    {"method": {"kind": "lora", "targets": ["q_proj", "v_proj"]}, "gpu": "rtx-4090"},
    {"task": "generate", "batch": {"sequence": 100, "new_tokens": 20}, "gpu": "h100-sxm"},
    *({"task": "generate", "profile": engine.name, "gpu": "h100-sxm"} for engine in ENGINES),
    *(
        {"parallelism": {"world": 4, "dp": 4, "strategy": strategy}}
        for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp2")
    ),
    *({"parallelism": {"world": 2, name: 2}} for name in ("tp", "cp", "ep", "pp")),
    {"parallelism": {"world": 4, "pp": 4}, "profile": "megatron-core", "batch": {"accumulation": 8}},
    *(
        {"profile": name, "method": method}
        for name in ("trl", "axolotl", "llamafactory", "unsloth", "ms-swift", "litgpt")
        for method in ("lora", "qlora")
    ),
    *({"also": also} for also in ({"evaluation": {}}, {"saving": {}})),
    {"method": "lora", "also": {"merging": "reloaded"}},
    {"kernels": {"checkpointing": "none", "attention": "eager"}},
    {"task": "generate", "parallelism": {"world": 2, "device_map": "auto"}},
    {"loop": {"trainer": True}, "optimizer": "adamw_bnb_8bit"},
    *(
        {"model": name, "batch": {"images": 1}}
        for name in ("qwen2-vl-2b", "llava-1.5-7b", "smolvlm-256m", "gemma-3-4b")
    ),
)


@cache
def fields() -> tuple[tuple[str, Any], ...]:
    """Return the path and type of every field of a run."""

    def walk(part: Any, start: str) -> Iterator[tuple[str, Any]]:
        for name, info in part.model_fields.items():
            yield f"{start}{name}", info.annotation
            inner = part_of(info.annotation)
            if inner is not None and name != "model":
                yield from walk(inner, f"{start}{name}.")

    return tuple(walk(RunSpec, ""))


def members(annotation: Any) -> list[Any]:
    """Return the types that a field may have."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return members(inner[0])
    if origin in (None, Literal, tuple, dict):
        return [annotation]
    return [member for each in inner for member in members(each)]


def drawn_value(random: Random, path: str, annotation: Any) -> Any:  # noqa: PLR0911 (a return for each kind of type)
    """Return a value of the type of the field at `path`."""
    type_, names = random.choice(members(annotation)), NAMES.get(path, TEXTS[:10])
    part = part_of(type_)
    if type_ is type(None):
        return None
    if get_origin(type_) is Literal:
        return random.choice(get_args(type_))
    if type_ is bool:
        return random.random() < 0.5
    if type_ is int:
        return random.choice((1, 1, 2, 2, 3, 4, 8, 0, *(size_below(random, 2**n) for n in (6, 12, 20, 40))))
    if type_ is float:
        return random.choice((0.0, 0.1, 0.5, 0.9, 1.0, 2.0, 16.0, 1e-9, 1e9, random.random()))
    if get_origin(type_) is tuple:
        first = members(get_args(type_)[0])[0]
        if first is int:
            return [random.choice((1, 2, 224, 336)) for _ in range(random.randint(0, 3))]
        choices = get_args(first) or names
        return random.sample(list(choices), random.randint(0, min(3, len(choices))))
    if path.endswith(("config", ".model")) or type_ is dict or get_origin(type_) is dict:
        return random.choice(({}, {"a": 1}, {"use_dora": True}))
    if part is not None and path != "model":
        inner = {name: info.annotation for name, info in part.model_fields.items() if random.random() < 0.2}
        return {name: drawn_value(random, f"{path}.{name}", each) for name, each in inner.items()}
    return {"config": random_config(random)} if part is not None else random.choice(names)


def put(spec: Value, path: str, value: Any) -> None:
    """Set the field at a dotted path, making sections of words."""
    *parts, name = path.split(".")
    for part in parts:
        word = spec.get(part)
        if not isinstance(word, dict):
            spec[part] = {"kind": word} if part == "method" and isinstance(word, str) else {}
        spec = spec[part]
    spec[name] = value


def random_run(random: Random) -> Value:
    """Return a run: a common one with some fields set at random."""
    spec = copied(random.choice(TEMPLATES))
    spec.setdefault("model", random.choice(SMALL_CARDS if random.random() < 0.8 else CARDS))
    if random.random() < 0.6:
        put(spec, "batch.sequence", random.choice((1, 7, 64, 128, 512, size_below(random, 8192))))
        put(spec, "batch.micro", random.choice((1, 2, 3, size_below(random, 64))))
    if random.random() < 0.3:
        spec["gpu"] = random.choice(GPUS)
    for _ in range(random.choice((0, 1, 1, 2, 3, 6))):
        path, annotation = random.choice(fields())
        is_typed = random.random() < 0.85
        put(spec, path, drawn_value(random, path, annotation) if is_typed else junk(random))
    return spec


# Configs -------------------------------------------------------------------------------------------------------------


@cache
def configs() -> tuple[Mapping[str, Any], ...]:
    """Return the configs of all bundled cards and of all families."""
    small = ({"model_type": name, **config} for name, config in FAMILIES.items())
    return (*map(find_config, CARDS), *small)


KEYS = (
    *("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "layer_types", "architectures", "quantization_config", "sliding_window", "rope_scaling"),
    *("max_position_embeddings", "tie_word_embeddings", "rope_parameters", "text_config", "vision_config"),
    *("num_experts", "num_experts_per_tok", "n_routed_experts", "hidden_act", "model_type", "id2label", "num_labels"),
    *("dtype", "torch_dtype", "kv_lora_rank", "q_lora_rank", "first_k_dense_replace", "_name_or_path", "auto_map"),
)
QUANTIZATIONS: tuple[Any, ...] = (
    *({"quant_method": "gptq", "bits": bits, "group_size": size} for bits, size in ((4, 128), (0, 0), ("4", -5))),
    {"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["("]},
    *({"quant_method": "fp8", "weight_block_size": block} for block in ([128, 128], [0, 128])),
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": "lm_head"},
    *({"quant_method": "compressed-tensors", "config_groups": groups} for groups in ([], {"g": None})),
    {
        "quant_method": "compressed-tensors",
        "ignore": ["re:(a+)+$"],
        "config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 128}, "targets": ["Linear"]}},
    },
    *({"quant_method": method} for method in (None, 5, ["gptq"], "unknown", "mxfp4", "torchao", "modelopt", "hqq")),
    *({}, [], "gptq", "64"),
)
ARCHITECTURES: tuple[Any, ...] = (
    *(["LlamaForCausalLM"], ["LlamaForSequenceClassification"], ["BertForMaskedLM"], ["Qwen2Model"], "LlamaModel"),
    *([], [None], [{}], [[]], 5, ["A" * 10000], ["\ud800"], ["Foo\nBar"], ["\x1b[31m"]),
)
BATCHES: tuple[Value, ...] = (
    *({"batch": {"sequence": 64}, "method": method} for method in ("full", "lora", "qlora")),
    *({"batch": {"sequence": 32, "new_tokens": 8}, "task": task} for task in ("forward", "generate")),
    *({"parallelism": {"world": 2, "dp": 2, "strategy": name}} for name in ("zero3", "fsdp2")),
    *({"task": "generate", "profile": name, "gpu": "h100-sxm"} for name in ("vllm", "sglang", "llama.cpp")),
    *({"parallelism": {"world": 2, "tp": 2}}, {"objective": "sequence_classification"}),
    {"precision": "amp", "kernels": {"checkpointing": "none"}},
)


def random_config(random: Random) -> Value:
    """Return a model's config with some keys changed."""
    config = copied(random.choice(configs()))
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 5))):
        parts = [value for value in config.values() if isinstance(value, dict) and value]
        part = random.choice(parts) if parts and random.random() < 0.35 else config
        key = random.choice([*part, "x"]) if random.random() < 0.6 else random.choice(KEYS)
        if random.random() < 0.12:
            part.pop(key, None)
        else:
            part[key] = changed_value(random, key, part.get(key))
    return config


def changed_value(random: Random, key: str, old: Any) -> Any:  # noqa: PLR0911 (a return for each kind of value)
    """Return another value for a config's key: mostly a likely one, sometimes any."""
    own: Mapping[str, Sequence[Any]] = {"quantization_config": QUANTIZATIONS, "architectures": ARCHITECTURES}
    if random.random() < 0.25:
        return junk(random)
    if key in own:
        return copied(random.choice(own[key]))
    if key == "model_type":
        return random.choice(configs()).get(key)
    if isinstance(old, bool):
        return not old
    if isinstance(old, (int, float)) and abs(old) < LARGEST_CHANGED:
        likely = (random.randint(1, 8), 2 ** random.randint(0, 13), 3 * 2 ** random.randint(0, 9), old * 2)
        odd = (old + 1, old - 1, -old, 0, 10000, 10001, 2**21 + 1, 10**30, float(old), str(old), [old], old + 0.5)
        return random.choice(likely if random.random() < 0.6 else odd)
    if isinstance(old, list):
        mixed = random.sample(old, len(old))
        return random.choice((old[:-1], old[1:], old * 2, [*old, "x"], [*old, None], [], mixed, [old]))
    if isinstance(old, dict):
        return random.choice(([], list(old), {}, {**old, "x": 1}, str(old), dict.fromkeys(old)))
    if isinstance(old, str):
        return random.choice((random.choice(configs()).get(key), old.upper(), old + "x", "gelu", "silu", "float32", ""))
    return junk(random)


def draw_config(random: Random) -> Value:
    run = random.choice(BATCHES) if random.random() < 0.3 else None
    return {"config": random_config(random), "run": copied(run)}


# Laws ----------------------------------------------------------------------------------------------------------------

MORE = ("batch.micro", "batch.sequence", "batch.accumulation", "batch.new_tokens", "method.rank", "layers")
TINY: Value = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
CHOICES: Mapping[str, Sequence[Any]] = {
    "kernels.attention": ("sdpa", "eager", "flash_attention_2", "sdpa_math", "sdpa_efficient"),
    "kernels.checkpointing": ("none", "full", "offload"),
    "kernels.loss": ("hf", "fused", "chunked"),
    "loop.padded": (True, False),
    "optimizer": ("adamw_torch", "sgd", "adafactor", "adamw_bnb_8bit", "lion_32bit", "muon"),
    "precision": ("amp", "mixed", "fp32", "fp16", "bf16"),
}


def draw_law(random: Random) -> Value:
    spec = copied(random.choice(TEMPLATES))
    layers = {**TINY, "intermediate_size": 704, "vocab_size": 1000, "num_hidden_layers": random.randint(1, 4)}
    spec["model"] = random.choice(SMALL_CARDS) if random.random() < 0.5 else {"config": layers}
    put(spec, "batch.sequence", random.choice((1, 7, 64, 65, 200, 512, size_below(random, 2048))))
    put(spec, "batch.micro", random.choice((1, 2, 3, 8)))
    for path, choices in CHOICES.items():
        if random.random() < 0.2 and spec.get("task", "train") == "train":
            put(spec, path, random.choice(choices))
    return {"run": spec, "field": random.choice(MORE), "more": random.choice((1, 1, 2, 3, 7, 8, 31, 64, 100))}


# Command lines and files ---------------------------------------------------------------------------------------------

UNUSED = ("output", "online", "write", "help", "trace", "measure", "upload")  # write files, ask the Hub, run for long
QUICK_COMMANDS = ("", "", "", "estimate", "plan", "compare", "explain", "models", "gpus", "profiles", "schema", "card")


@cache
def options() -> tuple[tuple[str, Any], ...]:
    rows = ((name, option) for group in OPTIONS.values() for name, option in group.items())
    return tuple((name, option) for name, option in rows if name not in UNUSED and not option.is_argument)


def option_words(random: Random) -> Iterator[str]:
    for _ in range(random.choice((0, 1, 2, 3, 5))):
        name, option = random.choice(options())
        yield f"--{name.replace('_', '-')}"
        if type_of(option) in (bool, Switch):
            continue
        known = option.choices or NAMES.get(option.field, ())
        numbers = (1, 2, 4, 8, 128, 0, -1, 10**30, 2**40)
        words = known if known and random.random() < 0.8 else numbers if random.random() < 0.7 else TEXTS
        yield str(random.choice(words))


def draw_line(random: Random) -> Value:
    command = random.choice(QUICK_COMMANDS)
    first = random.choice(SMALL_CARDS) if random.random() < 0.9 else random.choice(TEXTS)
    if command == "compare":
        runs = [shlex.join([random.choice(SMALL_CARDS), *option_words(random)]) for _ in range(random.randint(0, 3))]
        words = [command, *runs, *option_words(random)]
    elif command in ("models", "gpus", "profiles", "schema", "card"):
        topic = random.choice((*TEXTS, "qwen", "3090", "answer", "run", "plan"))
        words = [command, *(["new", first] if command == "card" else [topic] if random.random() < 0.7 else [])]
    else:
        words = [*([command] if command else []), first, *option_words(random)]
        words += random.choice(((), (), ("--json",), ("--format", random.choice(("csv", "markdown", "html")))))
    return {"words": [word.replace("\x00", "").replace("\ud800", "") for word in words], "files": {}}


RUN_FILES: Mapping[str, str] = {
    "run.json": '{"model": "qwen2-0.5b", "method": "qlora", "gpu": "rtx-3090", "batch": {"micro": 2, "sequence": 64}}',
    "run.yaml": "model: qwen2-0.5b\nmethod:\n  kind: lora\n  rank: 8\nbatch: {micro: 2, sequence: 64}\ngpu: 3090\n",
    "axolotl.yaml": "base_model: Qwen/Qwen2-0.5B\nadapter: lora\nlora_r: 8\nlora_target_linear: true\n"
    "sequence_len: 512\nmicro_batch_size: 2\nload_in_4bit: true\noptimizer: adamw_bnb_8bit\nbf16: auto\n",
    "llamafactory.yaml": "model_name_or_path: Qwen/Qwen2-0.5B\nstage: sft\nfinetuning_type: lora\nlora_rank: 8\n"
    "cutoff_len: 512\nper_device_train_batch_size: 2\nbf16: true\ntemplate: qwen\n",
    "train.sh": "torchrun --nproc_per_node 2 train.py --model_name_or_path Qwen/Qwen2-0.5B --bf16 True "
    "--per_device_train_batch_size 2 --fsdp 'full_shard auto_wrap'\n",
    "train.py": "from transformers import TrainingArguments\nargs = TrainingArguments('out', bf16=True, "
    "per_device_train_batch_size=4)\nmodel = AutoModelForCausalLM.from_pretrained('Qwen/Qwen2-0.5B')\n",
    "deepspeed.json": '{"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}, "bf16": {"enabled": true}}',
}
PIECES = (
    *("", "\x00", "\t", "\n", "- ", "{", "}", "[", "]", ": ", '"', "'", "&a ", "*a ", "!!int ", "!!python/object:a.B "),
    *("null", "true", "1e400", "-1", "0", "9" * 400, "NaN", "auto", "\ufeff", "é", "<<: *a\n", "$(rm)", "`x`", "# "),
)


def changed_text(random: Random, text: str) -> str:
    """Return a text with parts cut, doubled, moved or replaced."""
    for _ in range(random.choice((1, 1, 2, 3, 6))):
        a, b = sorted(random.randint(0, len(text)) for _ in range(2))
        b = min(b, a + random.choice((1, 4, 20, 200)))
        word = random.choice((random.choice(PIECES), text[a:b] * random.randint(2, 40), str(junk(random))[:400]))
        text = random.choice((text[:a] + text[b:], text[:a] + word + text[b:], text[:a] + word + text[a:]))
    return text


def draw_file(random: Random) -> Value:
    if random.random() < 0.3:
        text = json.dumps(random_config(random))
        text = text if random.random() < 0.5 else changed_text(random, text)
        return {"words": ["./config.json", "--seq-len", "64"], "files": {"config.json": escaped(text)}}
    name = random.choice(list(RUN_FILES))
    files = {name: escaped(changed_text(random, RUN_FILES[name]))}
    if name == "deepspeed.json":
        return {"words": ["qwen2-0.5b", "--gpus", "2", "--deepspeed", name], "files": files}
    before = random.choice(([], [], ["explain"], ["plan"]))
    return {"words": [*before, *random.choice((["--spec", name], [name]))], "files": files}


def escaped(text: str) -> str:
    """Return the text without lone surrogates, which no file can hold."""
    return text.encode("utf-8", "replace").decode()
