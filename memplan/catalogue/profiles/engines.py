"""Serving engines: the defaults and implementation details of each version, as rows with their sources.

An engine loads the weights, measures a step, and gives the rest of its share of the card to the KV cache. The layout of
the cache is in `memplan.program.serving`, one module per `kind` of engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from memplan.catalogue.hardware.overhead import Overhead
from memplan.core.units import MIB

Kind = Literal["vllm", "sglang", "tgi", "llama.cpp"]

# Words that a row may set in addition to the fields of `memplan.spec.serving.Serving`.
WORDS = {
    "counts_graphs": "memory of CUDA graphs is measured and subtracted before the pool is allocated",
    "mixes_pages": "layers whose pages differ in size are brought to one size, instead of refused",
    "in_flight": "steps that may be in flight at once, for whose tokens sliding-window layers keep blocks",
    "null_block": "one block of the pool is never handed out, and counts against the longest request",
    "group_tokens": "the pool's tokens are counted as blocks of one group, not as requests of the longest length",
    "latent_workspace": "latent attention whose step needs a workspace for the keys and values of prompts: all, dense",
    "packs_latents": "latents with a sparse index are stored in 656 bytes, unless a dtype is given",
    "latent_block": "tokens that blocks of latents are rounded up to in models that also have states",
    "experts_room": "whether experts' outputs share the buffer of gates and ups (shared) or of activations (two)",
    "experts_chunk": "the most tokens that experts compute at once; 0 for all tokens of a step",
    "runner": "what the runner allocates rows for before a step is measured: requests, tokens",
    "embeds": "an image counts only as its tower's embeddings, without the tokens around and between them",
    "pictures_mib": "MiB that cache a tower's outputs for images",
    "sampler": "how next tokens are drawn: sorted (all probabilities), filtered (a kernel masks them)",
    "state_dtype": "dtype of state-space states, unless the config has one: model, fp32",
    "capability": "lowest compute capability of an NVIDIA card that it runs on, in tenths",
    "towers": "which stages of a pipeline hold the vision and audio towers: first, all",
    "wiggle": "the share of free memory that becomes the pool, in thousandths",
    "window_share": "tokens of sliding-window layers per thousand tokens of full-attention layers",
    "state_share": "bytes of states per thousand bytes of the other caches",
}


class EngineSetting(NamedTuple):
    """One setting of an engine.

    field   a field of `memplan.spec.serving.Serving`, or a word of `WORDS`
    value   its value
    source  where the value was read
    basis   `derived` if it was read in the engine's code, else `assumed`
    """

    field: str
    value: Any
    source: str
    basis: Literal["derived", "assumed"] = "derived"


class ServingEngine(NamedTuple):
    """A serving engine at a version.

    name   value of `profile`
    title  the engine and its version, as shown
    kind   the module of `memplan.program.serving` that lays out its pool
    read   the files that were read
    like   the engine whose rows it inherits
    rows   its own rows
    waits  what the engine does that is not counted yet
    """

    name: str
    title: str
    kind: Kind
    read: str
    like: str
    rows: tuple[EngineSetting, ...]
    waits: tuple[str, ...] = ()


_VLLM = "vllm 0.33.0"

ENGINES = (
    ServingEngine(
        "vllm-0.33",
        "vLLM 0.33",
        "vllm",
        "vllm 0.33.0 from PyPI: v1/core/kv_cache_planning.py, v1/worker/gpu_worker.py, engine/arg_utils.py",
        "",
        (
            EngineSetting("memory_utilization", 0.92, f"{_VLLM} config/cache.py CacheConfig.gpu_memory_utilization"),
            EngineSetting("block_size", 16, f"{_VLLM} config/cache.py CacheConfig.DEFAULT_BLOCK_SIZE"),
            EngineSetting("cache_dtype", "auto", f"{_VLLM} config/cache.py CacheConfig.cache_dtype"),
            EngineSetting(
                "cuda_graphs", True, f"{_VLLM} config/compilation.py: FULL_AND_PIECEWISE unless enforce_eager"
            ),
            EngineSetting("prefix_caching", True, f"{_VLLM} config/cache.py CacheConfig.enable_prefix_caching"),
            EngineSetting("hybrid_cache", True, f"{_VLLM} config/scheduler.py disable_hybrid_kv_cache_manager"),
            EngineSetting("lora_slots", 0, f"{_VLLM} engine/arg_utils.py enable_lora"),
            EngineSetting("lora_rank", 16, f"{_VLLM} config/lora.py LoRAConfig.max_lora_rank"),
            EngineSetting("counts_graphs", True, f"{_VLLM} envs.py VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS"),
            EngineSetting("mixes_pages", True, f"{_VLLM} v1/core/kv_cache_planning.py unify_kv_cache_spec_page_size"),
            EngineSetting(
                "in_flight", 2, f"{_VLLM} config/vllm.py max_concurrent_batches, under asynchronous scheduling"
            ),
            EngineSetting("null_block", True, f"{_VLLM} v1/core/kv_cache_planning.py get_kv_cache_configs"),
            EngineSetting("group_tokens", False, f"{_VLLM} v1/core/kv_cache_utils.py get_kv_cache_capacity"),
            EngineSetting("sampler", "filtered", f"{_VLLM} v1/sample/ops/topk_topp_sampler.py"),
            EngineSetting(
                "latent_workspace", "all", f"{_VLLM} model_executor/layers/attention/mla_attention.py forward_impl"
            ),
            EngineSetting("packs_latents", False, f"{_VLLM} model_executor/models/config.py DeepseekV32ForCausalLM"),
            EngineSetting("latent_block", 128, f"{_VLLM} platforms/interface.py _align_hybrid_block_size"),
            EngineSetting(
                "state_dtype", "model", f"{_VLLM} model_executor/layers/mamba/mamba_utils.py _mamba_state_dtype"
            ),
            EngineSetting("experts_room", "two", f"{_VLLM} layers/fused_moe/experts/triton_moe.py workspace_shapes"),
            EngineSetting(
                "experts_chunk", 0, f"{_VLLM} model_executor/layers/fused_moe/modular_kernel.py _allocate_buffers"
            ),
            EngineSetting(
                "runner", "requests", f"{_VLLM} config/vllm.py use_v2_model_runner, v1/worker/gpu/sample/sampler.py"
            ),
            EngineSetting(
                "embeds", True, f"{_VLLM} multimodal/encoder_budget.py get_mm_max_toks_per_item: get_num_embeds"
            ),
            EngineSetting("towers", "first", f"{_VLLM} model_executor/models/interfaces.py _mark_tower_model"),
            EngineSetting("capability", 75, "vllm 0.21.0 docs/getting_started/installation/gpu.cuda.inc.md, and later"),
        ),
        (
            "audio, offloaded caches, redundant experts and DeepEP's buffers",
            "workspaces of attention backends, and weights that quantised kernels repack, except mxfp4",
            "encoder-decoders",
        ),
    ),
    ServingEngine(
        "vllm-0.11",
        "vLLM 0.11",
        "vllm",
        "vllm 0.11.0 from PyPI: v1/core/kv_cache_utils.py, v1/worker/gpu_worker.py, engine/arg_utils.py",
        "vllm-0.33",
        (
            EngineSetting("memory_utilization", 0.9, "vllm 0.11.0 config/cache.py CacheConfig.gpu_memory_utilization"),
            EngineSetting("counts_graphs", False, "vllm 0.11.0 v1/worker/gpu_worker.py determine_available_memory"),
            EngineSetting("mixes_pages", False, "vllm 0.11.0 v1/core/kv_cache_utils.py is_kv_cache_page_size_uniform"),
            EngineSetting(
                "in_flight", 1, "vllm 0.11.0 v1/kv_cache_interface.py SlidingWindowSpec.max_memory_usage_bytes"
            ),
            EngineSetting("null_block", False, "vllm 0.11.0 v1/core/kv_cache_utils.py check_enough_kv_cache_memory"),
            EngineSetting(
                "group_tokens", True, "vllm 0.11.0 v1/core/kv_cache_utils.py get_kv_cache_config_from_groups"
            ),
            EngineSetting(
                "latent_workspace", "dense", "vllm 0.11.0 v1/attention/backends/mla/common.py MLACommonImpl.forward"
            ),
            EngineSetting("packs_latents", True, "vllm 0.11.0 model_executor/models/config.py DeepseekV32ForCausalLM"),
            EngineSetting(
                "latent_block", 64, "vllm 0.11.1 model_executor/models/config.py HybridAttentionMambaModelConfig"
            ),
            EngineSetting("sampler", "sorted", "vllm 0.11.0 v1/sample/ops/topk_topp_sampler.py apply_top_k_top_p"),
            EngineSetting("runner", "tokens", "vllm 0.11.0 v1/worker/gpu_model_runner.py GPUModelRunner.__init__"),
            EngineSetting("experts_room", "shared", "vllm 0.11.0 layers/fused_moe/fused_moe.py fused_experts_impl"),
            EngineSetting("experts_chunk", 32768, "vllm 0.11.0 envs.py VLLM_FUSED_MOE_CHUNK_SIZE"),
            EngineSetting("embeds", False, "vllm 0.11.0 multimodal/profiling.py: lengths of placeholders"),
            EngineSetting("towers", "all", "vllm 0.11.0 model_executor/models/qwen2_5_vl.py: made on every rank"),
            EngineSetting("capability", 70, "vllm 0.14.0 docs/getting_started/installation/gpu.md, and earlier"),
        ),
    ),
    ServingEngine(
        "sglang-0.5",
        "SGLang 0.5",
        "sglang",
        "sglang 0.5.23 from PyPI: arg_groups/memory_hook.py, model_executor/pool_configurator.py",
        "",
        (
            EngineSetting("block_size", 1, "sglang 0.5.23 arg_groups/overrides.py _page_size_default"),
            EngineSetting("cache_dtype", "auto", "sglang 0.5.23 arg_groups/fields/memory.py kv_cache_dtype"),
            EngineSetting("cuda_graphs", True, "sglang 0.5.23 arg_groups/memory_hook.py"),
            EngineSetting("prefix_caching", True, "sglang 0.5.23: radix cache unless disabled"),
            EngineSetting(
                "hybrid_cache", True, "sglang 0.5.23 model_executor/pool_configurator.py HybridSWAPoolConfigurator"
            ),
            EngineSetting("lora_slots", 0, "sglang 0.5.23: none unless --lora-paths"),
            EngineSetting("lora_rank", 16, "assumed: the rank of the adapters that are loaded decides", "assumed"),
            EngineSetting("sampler", "filtered", "sglang 0.5.23 layers/sampler.py: FlashInfer's kernels"),
            EngineSetting("state_dtype", "fp32", "sglang 0.5.23 configs/mamba_utils.py mamba2_state_dtype"),
            EngineSetting("pictures_mib", 100, "sglang 0.5.23 environ.py SGLANG_VLM_CACHE_SIZE_MB"),
            EngineSetting("towers", "all", "sglang 0.5.23 models/qwen2_5_vl.py: made on every rank"),
            EngineSetting("capability", 75, "SGLang's documentation, install: FlashInfer supports sm75 and above"),
            EngineSetting("window_share", 800, "sglang 0.5.23 arg_groups/fields/schedule.py swa_full_tokens_ratio"),
            EngineSetting("state_share", 900, "sglang 0.5.23 arg_groups/fields/schedule.py mamba_full_memory_ratio"),
        ),
        (
            "audio, CUDA graphs of draft models, hierarchical caches and DeepEP's buffers",
            "encoder-decoders, and DeepSeek V4's pools",
        ),
    ),
    ServingEngine(
        "tgi-3",
        "Text Generation Inference 3",
        "tgi",
        "text-generation-inference: server/text_generation_server/models/flash_causal_lm.py, globals.py, documentation",
        "",
        (
            EngineSetting("memory_utilization", 1.0, "documentation, cuda-memory-fraction: 1.0"),
            EngineSetting(
                "block_size", 1, "server/text_generation_server/models/globals.py BLOCK_SIZE, with prefix caching"
            ),
            EngineSetting("cache_dtype", "auto", "documentation, kv-cache-dtype"),
            EngineSetting(
                "cuda_graphs", True, "flash_causal_lm.py warmup: after the pool, of batches 1, 2, 4, 8, 16, 32"
            ),
            EngineSetting("prefix_caching", True, "documentation, prefix caching"),
            EngineSetting(
                "hybrid_cache", False, "flash_causal_lm.py init_kv_cache: the same number of blocks for every layer"
            ),
            EngineSetting("lora_slots", 0, "documentation, lora-adapters"),
            EngineSetting("lora_rank", 16, "assumed: the rank of the adapters that are loaded decides", "assumed"),
            EngineSetting(
                "max_num_batched_tokens",
                4096,
                "assumed: what older versions had for max-batch-prefill-tokens",
                "assumed",
            ),
            EngineSetting("max_num_seqs", 128, "documentation, max-concurrent-requests: 128"),
            EngineSetting("sampler", "sorted", "assumed: transformers' warpers", "assumed"),
            EngineSetting("state_dtype", "model", "assumed", "assumed"),
            EngineSetting("wiggle", 900, "globals.py TGI_WIGGLE_ROOM, of what flash_causal_lm.py warmup finds free"),
        ),
        ("how many tokens are read at once, how they are drawn and its kernels were not read, but are assumed",),
    ),
    ServingEngine(
        "llama.cpp-2026",
        "llama.cpp of 2026",
        "llama.cpp",
        "llama.cpp in llama-cpp-python 0.3.36 from PyPI: src/llama-context.cpp, src/llama-kv-cache-iswa.cpp",
        "",
        (
            EngineSetting("max_num_batched_tokens", 512, "common/common.h common_params.n_ubatch"),
            EngineSetting("memory_utilization", 1.0, "it takes what it needs instead of a share of the card"),
            EngineSetting("block_size", 256, "src/llama-context.cpp: n_ctx is padded to 256"),
            EngineSetting("cache_dtype", "fp16", "common/common.h common_params.cache_type_k and cache_type_v"),
            EngineSetting("cuda_graphs", False, "no memory of ggml-cuda's graphs was observed", "assumed"),
            EngineSetting("prefix_caching", False, "it takes no memory: a slot keeps its tokens"),
            EngineSetting("hybrid_cache", True, "src/llama-kv-cache-iswa.cpp, unless --swa-full"),
            EngineSetting(
                "flash_attention", True, "common/common.h common_params.flash_attn_type: auto, on where supported"
            ),
            EngineSetting("lora_slots", 0, "common/common.h common_params.lora_adapters"),
            EngineSetting("lora_rank", 16, "assumed: the rank of the adapters that are loaded decides", "assumed"),
            EngineSetting("state_dtype", "fp32", "src/llama-model.cpp recurrent_type_r and recurrent_type_s"),
        ),
        (
            "tensors on other devices (-ot, --n-cpu-moe), and multimodal projectors",
            "compute buffers of gated delta rules: those of a dense model are counted instead",
        ),
    ),
)

_BY_NAME = {engine.name: engine for engine in ENGINES}


def find_engine(name: str) -> ServingEngine | None:
    """Return the engine named `name`, if there is one."""
    return _BY_NAME.get(name)


def engine_names() -> tuple[str, ...]:
    """Names of all engines."""
    return tuple(_BY_NAME)


def rows(engine: ServingEngine) -> Iterator[EngineSetting]:
    """Yield the inherited rows, then the engine's own; later rows override earlier ones."""
    if engine.like:
        yield from rows(_BY_NAME[engine.like])
    yield from engine.rows


def engine_settings(engine: ServingEngine) -> dict[str, Any]:
    """Return the engine's settings, by field or word."""
    return {row.field: row.value for row in rows(engine)}


_CAPTURED = (
    "vLLM's logs: 2.02 GiB for Llama 3.1 8B in INT8 at 0.7 (vllm-project/vllm#14286), 0.64 GiB for a 3B model in 2026 "
    "(generative-computing/granite-switch#128), 0.46 GiB of 0.29 for one request at most (vllm-project/vllm#57475), "
    "0.09 GiB on each of two RTX 5090 (noonghunna/club-3090#1087); the usual is assumed"
)


def cuda_graph_memory(kind: Kind, captured: bool) -> Overhead:
    """Return the memory of captured CUDA graphs, including their pools of activations."""
    what = "CUDA graphs"
    if not captured or kind == "llama.cpp":
        return Overhead(what, 0, 0, 0, "derived", "none are captured")
    return Overhead(what, 92 * MIB, 700 * MIB, 2068 * MIB, "measured", _CAPTURED)


_NON_TORCH = (
    "vLLM 0.6's report of non-torch memory after its profile run: 0.35 GiB on an RTX 3090 (vllm-project/vllm#10517), "
    "0.25 GiB on an RTX 4090 (#13061), 0.30 GiB on an L40S (#15815), 1.79 GiB on an 80 GB card (#10511), including the "
    "driver's context; the part beyond the context is assumed"
)


def loaded_kernels(kind: Kind) -> Overhead:
    """Return the driver's memory for kernels and libraries that a step loads, in addition to the CUDA context."""
    if kind == "llama.cpp":
        return Overhead("loaded kernels", 0, 0, 0, "derived", "part of the CUDA context's row")
    return Overhead("loaded kernels and libraries", 0, 256 * MIB, 768 * MIB, "assumed", _NON_TORCH)
