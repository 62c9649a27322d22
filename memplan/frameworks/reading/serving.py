"""Rules of serving engines' commands: vLLM, SGLang, Text Generation Inference and llama.cpp.

Source: vllm 0.33.0 engine/arg_utils.py, utils/argparse_utils.py; sglang 0.5.23 srt/arg_groups/fields, server_args.py;
text-generation-inference launcher/src/main.rs; llama.cpp (llama-cpp-python 0.3.36) common/arg.cpp, common/common.h,
tools/server/server.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from memplan.catalogue.inference.caches import caches
from memplan.frameworks.change_table import pairs
from memplan.frameworks.reading import trainer
from memplan.frameworks.reading.config import Config, Rule, shown
from memplan.models.cards import other_format
from memplan.spec.run import Batch
from memplan.spec.serving import first_layers

NEW_TOKENS = 256  # of a request that says no number
_DTYPES = {**trainer.DTYPES, "half": "fp16", "float": "fp32"}
_LENGTH = re.compile(r"(\d+(?:\.\d+)?)([kKmM]?)")
_SUFFIXES = {"": 1, "k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20}
_LENGTHS = pairs(
    "max_model_len=serving.max_model_len max_num_batched_tokens=serving.max_num_batched_tokens "
    "context_length=serving.max_model_len"
)
# What engines quantise to while they load; other words name the checkpoint's own format.
_QUANTISES = pairs(
    "fp8=fp8-tensor fp8_per_tensor=fp8-tensor fp8_per_channel=fp8-channel fp8_per_block=fp8 w8a8_fp8=fp8-channel "
    "w8a8_int8=w8a8-int8 mxfp8 bitsandbytes=nf4 bitsandbytes-nf4=nf4 bitsandbytes-fp4=fp4 eetq=w8a8-int8"
)
_OF_CHECKPOINTS = ("awq", "gptq", "marlin", "compressed", "modelopt", "quark", "exl2", "gguf", "mxfp4", "nvfp4", "inc")
_METHODS = {"standalone": "draft_model", "nextn": "mtp", "eagle": "eagle", "eagle3": "eagle3", "ngram": "ngram"}
GGUF = re.compile(r"(?:UD-)?I?Q\d\w*|B?F16|F32", re.IGNORECASE)
_GGML = {"f16": "fp16", "f32": "fp32"}


def serves(config: Config) -> None:
    """The model is served: the run generates."""
    config.set("task", "generate", why=f"{config.title} serves the model")


def request(config: Config) -> None:
    """A request has the default length, or a shorter one if the engine admits no longer one."""
    longest, usual = config.value("serving.max_model_len"), Batch().sequence
    if longest is not None and longest < usual + NEW_TOKENS:
        new = min(NEW_TOKENS, max(longest // 2, 1))
        why = "assumed: a request of the longest length that the engine admits"
        config.set("batch.sequence", max(longest - new, 1), why=why)
        config.set("batch.new_tokens", new, why=why)


def _lengths(config: Config) -> None:
    """Lengths may be written as 32k, 32K or auto."""
    for key, field in _LENGTHS.items():
        value = config.get(key)
        if value is None or (field not in config.found and str(value).lower() in ("auto", "-1")):
            continue
        config.set(field, _length(config, key), key)


def _length(config: Config, key: str) -> int:
    match = _LENGTH.fullmatch(str(config.get(key)))
    if match is None:
        raise config.error(key, f"must be a number of tokens, as in 32768 or 32K, not {shown(config.get(key))}")
    return int(float(match[1]) * _SUFFIXES[match[2]])


def _dtype(config: Config) -> None:
    name = config.text("dtype")
    if name in (None, "auto"):
        return
    if name not in _DTYPES:
        raise config.error("dtype", f"must be auto, {', '.join(_DTYPES)}, not {shown(name)}")
    config.set("precision.weights", _DTYPES[name], "dtype")


def _quantization(config: Config, key: str = "quantization") -> None:
    name = config.text(key)
    if name is None:
        return
    if name in _QUANTISES and not _is_stored_so(config, name):
        config.set("serving.weights", _QUANTISES[name], key)
    elif name not in _QUANTISES and not any(word in name for word in _OF_CHECKPOINTS):
        config.leave(key, f"{shown(name)}: the weights are counted as the checkpoint stores them")


def _is_stored_so(config: Config, name: str) -> bool:
    """Whether the checkpoint is in that format already, so that its own layout holds."""
    model = trainer.model_of(config)
    if model is None:
        return False
    published: Any = model.config.get("quantization_config") or {"quant_method": model.card.get("stored", "")}
    return str(published.get("quant_method", "")).startswith(name.partition("_")[0])


def _ranks(config: Config, replicas: str = "") -> None:
    """The GPUs are those of all degrees together."""
    degrees = [config.value(f"parallelism.{name}") or 1 for name in ("tp", "pp", "dp")]
    world = degrees[0] * degrees[1] * degrees[2]
    if config.gpus is None and world > 1:
        whys = [config.found[f"parallelism.{n}"].why for n in ("tp", "pp", "dp") if config.value(f"parallelism.{n}")]
        config.set("parallelism.world", world, why=replicas or ", ".join(whys))


def _cuda_graphs(config: Config, key: str) -> None:
    if config.flag(key):
        config.set("serving.cuda_graphs", False, key)


def _speculation(config: Config, method: str, model: str, tokens: str) -> None:
    """The draft, by its keys: the method's, the draft model's and the number of tokens'."""
    name = config.text(method)
    if name is not None:
        known = _METHODS.get(name.lower(), "mtp" if name.lower().endswith("mtp") else name.lower())
        if known not in (*_METHODS.values(),):
            config.leave(method, f"{shown(name)}: no draft is counted")
            return
        config.set("serving.speculative_method", known, method)
    if config.text(model) is not None and config.value("serving.speculative_method") not in ("mtp", "ngram"):
        config.set("serving.draft_model", config.text(model), model)
    has_draft = {"serving.speculative_method", "serving.draft_model"} & config.found.keys()
    if config.whole(tokens) is not None and has_draft:
        config.set("serving.num_speculative_tokens", config.whole(tokens), tokens)


# --- vLLM ---


def _cache_dtype(config: Config) -> None:
    name = config.text("kv_cache_dtype")
    if name not in (None, "auto"):
        config.set("serving.cache_dtype", _DTYPES.get(str(name), name), "kv_cache_dtype")


def _vllm(config: Config) -> None:
    _cuda_graphs(config, "enforce_eager")
    if config.flag("disable_hybrid_kv_cache_manager"):
        config.set("serving.hybrid_cache", False, "disable_hybrid_kv_cache_manager")
    if config.flag("enable_lora"):
        config.set("serving.lora_slots", config.whole("max_loras") or 1, "enable_lora", "max_loras")
        for key, field in (("max_lora_rank", "lora_rank"), ("max_cpu_loras", "lora_cpu_slots")):
            if config.whole(key) is not None:
                config.set(f"serving.{field}", config.whole(key), key)
    _images(config)
    section = config.section("speculative_config")
    inner = "speculative_config." if section is not None else "spec_"
    if section is not None:
        config.defaults = {**config.defaults, **{f"{inner}{key}": value for key, value in section.values.items()}}
    _speculation(
        config, f"{inner}method", f"{inner}model", f"{inner}{'num_speculative_tokens' if section else 'tokens'}"
    )
    if config.flag("enable_expert_parallel"):
        ranks = (config.value("parallelism.tp") or 1) * (config.value("parallelism.dp") or 1)
        config.set("parallelism.ep", ranks, "enable_expert_parallel")
    _ranks(config)


def _images(config: Config) -> None:
    """The most images and videos of a request: JSON, `image=2,video=0`, or keys with a dot."""
    said = config.said("limit_mm_per_prompt")
    if isinstance(said, str) and "=" in said:
        limits: Mapping[str, Any] = dict(part.split("=", 1) for part in said.split(",") if "=" in part)
    else:
        section = config.section("limit_mm_per_prompt")
        limits = section.values if section is not None else {}
    for kind in ("image", "video"):
        limit = limits.get(kind, 0 if config.flag("language_model_only") else None)
        limit = cast("Mapping[str, Any]", limit).get("count") if isinstance(limit, Mapping) else limit
        if limit is not None and str(limit).isdecimal():
            config.set(f"serving.limit_{kind}s", int(limit), "limit_mm_per_prompt", "language_model_only")


# --- SGLang ---


def _sglang(config: Config) -> None:
    chunk = config.whole("chunked_prefill_size")
    if chunk is not None and chunk > 0:
        config.set("serving.max_num_batched_tokens", chunk, "chunked_prefill_size")
    elif chunk is not None:
        config.leave("chunked_prefill_size", "off: the default chunk is counted")
    if config.flag("disable_radix_cache"):
        config.set("serving.prefix_caching", False, "disable_radix_cache")
    _cuda_graphs(config, "disable_cuda_graph")
    if config.said("lora_paths") or config.flag("enable_lora"):
        config.set("serving.lora_slots", config.whole("max_loras_per_batch") or 8, "lora_paths", "max_loras_per_batch")
        if config.whole("max_lora_rank") is not None:
            config.set("serving.lora_rank", config.whole("max_lora_rank"), "max_lora_rank")
    names = ("speculative_algorithm", "speculative_draft_model_path", "speculative_num_draft_tokens")
    _speculation(config, *names)
    groups, key = config.whole("attn_dp_size"), "attn_dp_size"
    if groups is None and config.flag("enable_dp_attention"):
        groups, key = config.value("parallelism.dp") or 1, "enable_dp_attention"
    if groups is not None and groups > 1:  # the groups are inside the tensor-parallel ranks
        config.set("serving.dp_attention", True, key)
        config.set("parallelism.dp", groups, key)
        config.set("parallelism.tp", max((config.value("parallelism.tp") or 1) // groups, 1), "tp_size", key)
    _ranks(config)


# --- Text Generation Inference ---


def _tgi(config: Config) -> None:
    launch = config.companions.get("accelerate")
    if config.get("num_shard") is None and launch is not None and config.get("sharded") not in (False, "false"):
        config.set("parallelism.tp", launch.values["num_processes"], why="all GPUs: CUDA_VISIBLE_DEVICES")
    prompt = config.whole("max_input_tokens")
    if prompt is not None and config.value("serving.max_num_batched_tokens") is None:
        why = "50 more than the longest prompt"
        config.set("serving.max_num_batched_tokens", prompt + 50, "max_input_tokens", why=why)
    _quantization(config, "quantize")
    if str(config.get("cuda_graphs")) == "0":
        config.set("serving.cuda_graphs", False, "cuda_graphs")
    adapters = config.names("lora_adapters")
    if adapters:
        config.set("serving.lora_slots", len(adapters), "lora_adapters")
    _ranks(config)


# --- llama.cpp ---


def _llama_cpp(config: Config) -> None:
    repo = config.text("hf_repo")
    if repo is not None and config.text("model") is None:
        name, _, quantisation = repo.partition(":")
        quantisation = quantisation or "Q4_K_M"  # common/arg.cpp --hf-repo
        known = other_format(name)
        trainer.set_model(config, known[0] if known is not None else name, "hf_repo")
        if GGUF.fullmatch(quantisation):
            config.set("serving.weights", quantisation, "hf_repo")
        elif quantisation:
            config.leave("hf_repo", f"{shown(quantisation)}: the weights are counted as the file stores them")
    _context(config)
    layers = str(config.get("n_gpu_layers") or "auto")
    if layers.lstrip("-").isdecimal() and int(layers) >= 0:
        config.set("serving.gpu_layers", int(layers), "n_gpu_layers")
    said = config.get("flash_attn")
    if said not in (None, "auto"):
        config.set("serving.flash_attention", config.flag("flash_attn"), "flash_attn")
    keys, values = (config.text(f"cache_type_{kind}") for kind in "kv")
    if keys is not None and keys not in ("f16", values):
        config.leave("cache_type_k", "differs from cache_type_v, whose format is counted for both")
    if values is not None or keys is not None:
        dtype = str(values or "f16")
        config.set("serving.cache_dtype", _GGML.get(dtype, dtype), *(["cache_type_v"] if values else ["cache_type_k"]))
    if config.flag("swa_full"):
        config.set("serving.hybrid_cache", False, "swa_full")
    if config.get("split_mode") is not None:
        config.set("serving.split_mode", config.text("split_mode"), "split_mode")
    _overrides(config)
    _llama_cpp_gpus(config)
    predicts = str(config.get("spec_type")).endswith("mtp")
    _speculation(config, "spec_type" if predicts else "no_method", "model_draft", "draft_max")
    if not predicts and config.get("spec_type") is not None:
        config.leave("spec_type", "not counted")


def _overrides(config: Config) -> None:
    """Tensors that are kept on the CPU or on one card.

    Source: common/common.h LLM_FFN_EXPS_REGEX, LLM_FFN_DENSE_REGEX.
    """
    keys = [key for key in ("override_tensor", "cpu_moe", "n_cpu_ffn") if config.get(key) is not None]
    found = [part for text in config.names("override_tensor") or () for part in text.split(",")]
    if config.flag("cpu_moe"):
        found.append(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU")
    dense = first_layers(config.whole("n_cpu_ffn") or 0)
    if dense:
        found.append(rf"blk\.{dense}\.ffn_(up|down|gate)\.=CPU")
    if found:
        config.set("serving.override_tensor", found, *keys)


def _context(config: Config) -> None:
    """All slots share `ctx_size` tokens; if their number is not set, four slots use one cache."""
    context, slots = config.whole("ctx_size"), config.whole("parallel") or (1 if config.command == "llama-cli" else -1)
    model = trainer.model_of(config)
    if context == 0:
        context = model.longest_sequence if model is not None else None
    is_unified = slots < 1 or config.flag("kv_unified")
    if slots > 0 and not is_unified:
        config.set("serving.max_num_seqs", slots, "parallel")
    if context is not None:
        per_slot = context if is_unified else max(context // slots, 1)
        why = "" if is_unified or slots == 1 else f"{slots} slots divide it"
        config.set("serving.max_model_len", per_slot, "ctx_size", why=why)
    has_windows = model is not None and any(cache.kind in ("sliding", "chunked", "state") for cache in caches(model))
    if is_unified and has_windows:
        config.leave("parallel", "several slots share one cache: the windows and states of one are counted")


def _llama_cpp_gpus(config: Config) -> None:
    """llama.cpp uses all GPUs that it sees."""
    split = config.text("tensor_split")
    launch = config.companions.get("accelerate")
    if split is not None:
        try:
            parts = [float(part) for part in re.split("[,/]", split)]
        except ValueError:
            raise config.error("tensor_split", f"must be proportions, as in 3,1, not {shown(split)}") from None
        config.set("serving.tensor_split", parts, "tensor_split")
        config.set("parallelism.world", len(parts), "tensor_split")
    elif launch is not None and config.value("serving.split_mode") != "none":
        config.set("parallelism.world", launch.values["num_processes"], why="CUDA_VISIBLE_DEVICES")
    if config.value("parallelism.world"):
        config.set("parallelism.dp", config.value("parallelism.world"), why=config.found["parallelism.world"].why)


RULES: Mapping[str, tuple[Rule, ...]] = {
    "vllm": (serves, _lengths, _dtype, _quantization, _cache_dtype, _vllm, request),
    "sglang": (serves, _lengths, _dtype, _quantization, _cache_dtype, _sglang, request),
    "tgi": (serves, _dtype, _cache_dtype, _tgi, request),
    "llama.cpp": (serves, _llama_cpp, request),
}
