"""Serving engines: what each version decides where a run leaves it open, as rows with their sources.

An engine loads the weights, sees how much a step of its own takes, and gives what is left of its share of the card to
the caches of keys and values. How those are laid out is in `memplan.estimate.serving`, one module for each `kind` of
engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from memplan.catalogue.hardware.overhead import Overhead
from memplan.core.units import MIB

Kind = Literal["vllm", "sglang", "tgi", "llama.cpp"]

# What a row may set beside the fields of `memplan.spec.serving.Serving`.
WORDS = {
    "counts_graphs": "memory of CUDA graphs is measured and taken off before the pool is made",
    "mixes_pages": "layers whose pages differ in size are brought to one size, instead of refused",
    "in_flight": "steps whose tokens may be under way at once, which layers with a window keep blocks for",
    "null_block": "one block of the pool is never given out, and counts against the longest request",
    "group_tokens": "the pool in tokens is blocks of one group, not what requests of the longest length come to",
    "latent_workspace": "latents whose step makes room for the keys and values of cached prompts: all, dense",
    "packs_latents": "latents beside an index are stored in 656 bytes, unless a dtype is asked for",
    "latent_block": "tokens that blocks of latents are rounded up to, where layers beside them keep states",
    "experts_room": "experts' rows: outputs share the buffer of gates and ups (shared), or that of activations (two)",
    "experts_chunk": "the most tokens that experts compute at once; 0 for all of a step",
    "runner": "what the runner has rows for before a step is measured: requests, tokens",
    "embeds": "an image counts as what its tower makes of it, without the tokens around and between",
    "pictures_mib": "MiB kept for what a tower has made of images",
    "sampler": "how next tokens are drawn: sorted (all probabilities are), filtered (a kernel masks them)",
    "state_dtype": "what states of state spaces are stored in, unless the config says: model, fp32",
    "capability": "the least compute capability of an NVIDIA card that it runs on, in tenths",
    "towers": "which stages of a pipeline have what sees and hears: first, all",
    "wiggle": "the share of free memory that becomes the pool, in thousandths",
    "window_share": "tokens of layers with a window for every thousand of those without one",
    "state_share": "bytes of states for every thousand of the other caches",
}


class Row(NamedTuple):
    """`field` is `value`; `basis` is derived where it is read in the engine's code, else assumed."""

    field: str
    value: Any
    source: str
    basis: Literal["derived", "assumed"] = "derived"


class Engine(NamedTuple):
    """A serving engine at a version.

    kind    which module of `memplan.estimate.serving` lays out its pool
    read    what was read of it
    like    the engine whose rows it has too
    waits   what it does that no answer counts yet
    """

    name: str
    title: str
    kind: Kind
    read: str
    like: str
    rows: tuple[Row, ...]
    waits: tuple[str, ...] = ()


_VLLM = "vllm 0.33.0"

ENGINES = (
    Engine(
        "vllm-0.33",
        "vLLM 0.33",
        "vllm",
        "vllm 0.33.0 from PyPI: v1/core/kv_cache_planning.py, v1/worker/gpu_worker.py, engine/arg_utils.py",
        "",
        (
            Row("memory_utilization", 0.92, f"{_VLLM} config/cache.py CacheConfig.gpu_memory_utilization"),
            Row("block_size", 16, f"{_VLLM} config/cache.py CacheConfig.DEFAULT_BLOCK_SIZE"),
            Row("cache_dtype", "auto", f"{_VLLM} config/cache.py CacheConfig.cache_dtype"),
            Row("cuda_graphs", True, f"{_VLLM} config/compilation.py: FULL_AND_PIECEWISE unless enforce_eager"),
            Row("prefix_caching", True, f"{_VLLM} config/cache.py CacheConfig.enable_prefix_caching"),
            Row("hybrid_cache", True, f"{_VLLM} config/scheduler.py disable_hybrid_kv_cache_manager"),
            Row("lora_slots", 0, f"{_VLLM} engine/arg_utils.py enable_lora"),
            Row("lora_rank", 16, f"{_VLLM} config/lora.py LoRAConfig.max_lora_rank"),
            Row("counts_graphs", True, f"{_VLLM} envs.py VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS"),
            Row("mixes_pages", True, f"{_VLLM} v1/core/kv_cache_planning.py unify_kv_cache_spec_page_size"),
            Row("in_flight", 2, f"{_VLLM} config/vllm.py max_concurrent_batches, under asynchronous scheduling"),
            Row("null_block", True, f"{_VLLM} v1/core/kv_cache_planning.py get_kv_cache_configs"),
            Row("group_tokens", False, f"{_VLLM} v1/core/kv_cache_utils.py get_kv_cache_capacity"),
            Row("sampler", "filtered", f"{_VLLM} v1/sample/ops/topk_topp_sampler.py"),
            Row("latent_workspace", "all", f"{_VLLM} model_executor/layers/attention/mla_attention.py forward_impl"),
            Row("packs_latents", False, f"{_VLLM} model_executor/models/config.py DeepseekV32ForCausalLM"),
            Row("latent_block", 128, f"{_VLLM} platforms/interface.py _align_hybrid_block_size"),
            Row("state_dtype", "model", f"{_VLLM} model_executor/layers/mamba/mamba_utils.py _mamba_state_dtype"),
            Row("experts_room", "two", f"{_VLLM} layers/fused_moe/experts/triton_moe.py workspace_shapes"),
            Row("experts_chunk", 0, f"{_VLLM} model_executor/layers/fused_moe/modular_kernel.py _allocate_buffers"),
            Row("runner", "requests", f"{_VLLM} config/vllm.py use_v2_model_runner, v1/worker/gpu/sample/sampler.py"),
            Row("embeds", True, f"{_VLLM} multimodal/encoder_budget.py get_mm_max_toks_per_item: get_num_embeds"),
            Row("towers", "first", f"{_VLLM} model_executor/models/interfaces.py _mark_tower_model"),
            Row("capability", 75, "vllm 0.21.0 docs/getting_started/installation/gpu.cuda.inc.md, and later"),
        ),
        (
            "audio, offloaded caches, redundant experts and what DeepEP's kernels hold",
            "workspaces of attention backends, and what kernels of quantised weights repack, but for mxfp4",
            "encoder-decoders",
        ),
    ),
    Engine(
        "vllm-0.11",
        "vLLM 0.11",
        "vllm",
        "vllm 0.11.0 from PyPI: v1/core/kv_cache_utils.py, v1/worker/gpu_worker.py, engine/arg_utils.py",
        "vllm-0.33",
        (
            Row("memory_utilization", 0.9, "vllm 0.11.0 config/cache.py CacheConfig.gpu_memory_utilization"),
            Row("counts_graphs", False, "vllm 0.11.0 v1/worker/gpu_worker.py determine_available_memory"),
            Row("mixes_pages", False, "vllm 0.11.0 v1/core/kv_cache_utils.py is_kv_cache_page_size_uniform"),
            Row("in_flight", 1, "vllm 0.11.0 v1/kv_cache_interface.py SlidingWindowSpec.max_memory_usage_bytes"),
            Row("null_block", False, "vllm 0.11.0 v1/core/kv_cache_utils.py check_enough_kv_cache_memory"),
            Row("group_tokens", True, "vllm 0.11.0 v1/core/kv_cache_utils.py get_kv_cache_config_from_groups"),
            Row("latent_workspace", "dense", "vllm 0.11.0 v1/attention/backends/mla/common.py MLACommonImpl.forward"),
            Row("packs_latents", True, "vllm 0.11.0 model_executor/models/config.py DeepseekV32ForCausalLM"),
            Row("latent_block", 64, "vllm 0.11.1 model_executor/models/config.py HybridAttentionMambaModelConfig"),
            Row("sampler", "sorted", "vllm 0.11.0 v1/sample/ops/topk_topp_sampler.py apply_top_k_top_p"),
            Row("runner", "tokens", "vllm 0.11.0 v1/worker/gpu_model_runner.py GPUModelRunner.__init__"),
            Row("experts_room", "shared", "vllm 0.11.0 layers/fused_moe/fused_moe.py fused_experts_impl"),
            Row("experts_chunk", 32768, "vllm 0.11.0 envs.py VLLM_FUSED_MOE_CHUNK_SIZE"),
            Row("embeds", False, "vllm 0.11.0 multimodal/profiling.py: lengths of placeholders"),
            Row("towers", "all", "vllm 0.11.0 model_executor/models/qwen2_5_vl.py: made on every rank"),
            Row("capability", 70, "vllm 0.14.0 docs/getting_started/installation/gpu.md, and earlier"),
        ),
    ),
    Engine(
        "sglang-0.5",
        "SGLang 0.5",
        "sglang",
        "sglang 0.5.23 from PyPI: arg_groups/memory_hook.py, model_executor/pool_configurator.py",
        "",
        (
            Row("block_size", 1, "sglang 0.5.23 arg_groups/overrides.py _page_size_default"),
            Row("cache_dtype", "auto", "sglang 0.5.23 arg_groups/fields/memory.py kv_cache_dtype"),
            Row("cuda_graphs", True, "sglang 0.5.23 arg_groups/memory_hook.py"),
            Row("prefix_caching", True, "sglang 0.5.23: radix cache unless disabled"),
            Row("hybrid_cache", True, "sglang 0.5.23 model_executor/pool_configurator.py HybridSWAPoolConfigurator"),
            Row("lora_slots", 0, "sglang 0.5.23: none unless --lora-paths"),
            Row("lora_rank", 16, "assumed: the rank of the adapters that are loaded decides", "assumed"),
            Row("sampler", "filtered", "sglang 0.5.23 layers/sampler.py: FlashInfer's kernels"),
            Row("state_dtype", "fp32", "sglang 0.5.23 configs/mamba_utils.py mamba2_state_dtype"),
            Row("pictures_mib", 100, "sglang 0.5.23 environ.py SGLANG_VLM_CACHE_SIZE_MB"),
            Row("towers", "all", "sglang 0.5.23 models/qwen2_5_vl.py: made on every rank"),
            Row("capability", 75, "SGLang's documentation, install: FlashInfer supports sm75 and above"),
            Row("window_share", 800, "sglang 0.5.23 arg_groups/fields/schedule.py swa_full_tokens_ratio"),
            Row("state_share", 900, "sglang 0.5.23 arg_groups/fields/schedule.py mamba_full_memory_ratio"),
        ),
        (
            "audio, graphs of drafts, hierarchical caches, and what DeepEP's kernels hold",
            "encoder-decoders, and DeepSeek V4's pools",
        ),
    ),
    Engine(
        "tgi-3",
        "Text Generation Inference 3",
        "tgi",
        "text-generation-inference: server/text_generation_server/models/flash_causal_lm.py, globals.py, documentation",
        "",
        (
            Row("memory_utilization", 1.0, "documentation, cuda-memory-fraction: 1.0"),
            Row("block_size", 1, "server/text_generation_server/models/globals.py BLOCK_SIZE, with prefix caching"),
            Row("cache_dtype", "auto", "documentation, kv-cache-dtype"),
            Row("cuda_graphs", True, "flash_causal_lm.py warmup: after the pool, of batches 1, 2, 4, 8, 16, 32"),
            Row("prefix_caching", True, "documentation, prefix caching"),
            Row("hybrid_cache", False, "flash_causal_lm.py init_kv_cache: as many blocks of every layer"),
            Row("lora_slots", 0, "documentation, lora-adapters"),
            Row("lora_rank", 16, "assumed: the rank of the adapters that are loaded decides", "assumed"),
            Row(
                "max_num_batched_tokens",
                4096,
                "assumed: what older versions had for max-batch-prefill-tokens",
                "assumed",
            ),
            Row("max_num_seqs", 128, "documentation, max-concurrent-requests: 128"),
            Row("sampler", "sorted", "assumed: transformers' warpers", "assumed"),
            Row("state_dtype", "model", "assumed", "assumed"),
            Row("wiggle", 900, "globals.py TGI_WIGGLE_ROOM, of what flash_causal_lm.py warmup finds free"),
        ),
        ("how many tokens are read at once, how they are drawn and its kernels were not read, but are assumed",),
    ),
    Engine(
        "llama.cpp-2026",
        "llama.cpp of 2026",
        "llama.cpp",
        "llama.cpp as llama-cpp-python 0.3.36 from PyPI has it: src/llama-context.cpp, src/llama-kv-cache-iswa.cpp",
        "",
        (
            Row("max_num_batched_tokens", 512, "common/common.h common_params.n_ubatch"),
            Row("memory_utilization", 1.0, "it takes what it needs, and no share of the card"),
            Row("block_size", 256, "src/llama-context.cpp: n_ctx is padded to 256"),
            Row("cache_dtype", "fp16", "common/common.h common_params.cache_type_k and cache_type_v"),
            Row("cuda_graphs", False, "ggml-cuda's graphs hold no memory that was seen", "assumed"),
            Row("prefix_caching", False, "it takes no memory: a slot keeps what it has"),
            Row("hybrid_cache", True, "src/llama-kv-cache-iswa.cpp, unless --swa-full"),
            Row("flash_attention", True, "common/common.h common_params.flash_attn_type: auto, on where supported"),
            Row("lora_slots", 0, "common/common.h common_params.lora_adapters"),
            Row("lora_rank", 16, "assumed: the rank of the adapters that are loaded decides", "assumed"),
            Row("state_dtype", "fp32", "src/llama-model.cpp recurrent_type_r and recurrent_type_s"),
        ),
        (
            "tensors put elsewhere (-ot, --n-cpu-moe), and multimodal projectors",
            "compute buffers of gated delta rules: those of a dense model are counted",
        ),
    ),
)

_BY_NAME = {engine.name: engine for engine in ENGINES}


def find_engine(name: str) -> Engine | None:
    """The engine of a profile of that name; None where it is no engine's."""
    return _BY_NAME.get(name)


def engine_names() -> tuple[str, ...]:
    return tuple(_BY_NAME)


def rows(engine: Engine) -> Iterator[Row]:
    """The engine's rows, those of what it is like first: a later one goes over an earlier one."""
    if engine.like:
        yield from rows(_BY_NAME[engine.like])
    yield from engine.rows


def decided(engine: Engine) -> dict[str, Any]:
    """What the engine sets, by field and word."""
    return {row.field: row.value for row in rows(engine)}


_CAPTURED = (
    "vLLM's logs: 2.02 GiB for Llama 3.1 8B in INT8 at 0.7 (vllm-project/vllm#14286), 0.64 GiB for a 3B model in 2026 "
    "(generative-computing/granite-switch#128), 0.46 GiB of 0.29 for one request at most (vllm-project/vllm#57475), "
    "0.09 GiB on each of two RTX 5090 (noonghunna/club-3090#1087); the usual is assumed"
)


def graphs_of(kind: Kind, captured: bool) -> Overhead:
    """What recorded graphs hold on the card, their own pools of activations among it."""
    what = "CUDA graphs"
    if not captured or kind == "llama.cpp":
        return Overhead(what, 0, 0, 0, "derived", "none are recorded")
    return Overhead(what, 92 * MIB, 700 * MIB, 2068 * MIB, "measured", _CAPTURED)


_BESIDE = (
    "what vLLM 0.6 reports as non-torch memory after its profile run: 0.35 GiB on an RTX 3090 (vllm-project/vllm#10517)"
    ", 0.25 GiB on an RTX 4090 (#13061), 0.30 GiB on an L40S (#15815), 1.79 GiB on an 80 GB card (#10511), with the "
    "driver's context among it; what of that comes after the context is assumed"
)


def beside_of(kind: Kind) -> Overhead:
    """What the driver takes for kernels that a step loads, after the process has its context."""
    if kind == "llama.cpp":
        return Overhead("loaded kernels", 0, 0, 0, "derived", "part of the CUDA context's row")
    return Overhead("loaded kernels and libraries", 0, 256 * MIB, 768 * MIB, "assumed", _BESIDE)
