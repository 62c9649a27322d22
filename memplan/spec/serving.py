"""Settings of a serving engine."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, Literal

from memplan.spec.base import Count, Flag, Natural, Number, Part, Rank
from memplan.spec.checks import Strict
from memplan.spec.generation import InlineModel

_OneScale = Literal["auto", "bf16", "fp16", "fp32", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3fn"]
_PerHead = Literal["int8_per_token_head", "fp8_per_token_head", "int4_per_token_head"]
_Blocks = Literal["nvfp4", "fp4_mx_block16", "mxfp8", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
CacheDtype = Literal[_OneScale, _PerHead, _Blocks]

_ONLY_IF_SET = ("sleep", "tensor_parallel", "trainer_offload", "override_tensor", "n_cpu_moe")

_MOST_LAYERS = 1000


def first_layers(number: int) -> str:
    """Return a regular expression of the numbers of the first layers; empty for none, and any number for many."""
    if number >= _MOST_LAYERS:
        return r"\d+"
    return f"({'|'.join(map(str, range(number)))})" if number > 0 else ""


@lru_cache(maxsize=64)
def _overrides(override_tensor: tuple[str, ...], n_cpu_moe: int) -> tuple[tuple[str, str], ...]:
    first = first_layers(n_cpu_moe)
    experts = [rf"blk\.{first}\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"] if first else []
    pairs = (text.rpartition("=") for text in (*override_tensor, *experts))
    return tuple((pattern, buffer) for pattern, _, buffer in pairs)


class Serving(Part):
    """How a serving engine is started (profiles `vllm-...`, `sglang-...`, `tgi-...`, `llama.cpp-...`).

    None is the engine's own default. A request has `batch.sequence` prompt tokens and `batch.new_tokens` new ones (256
    by default), and `batch.micro` requests must fit at once.

    weights                 storage format of the weights (`memplan.catalogue.quantization.storage`, or a GGUF type);
                            None for `method.quantization`, or else as the checkpoint stores them
    max_model_len           longest request that the engine admits, in tokens; None for the model's number of positions
                            (llama.cpp: for the run's request length)
    max_num_seqs            requests per step; llama.cpp's parallel slots
    max_num_batched_tokens  tokens per step: vLLM's name; SGLang's `chunked_prefill_size`, TGI's
                            `max_batch_prefill_tokens`, llama.cpp's `ubatch`
    memory_utilization      share of the GPU's memory that the engine takes: `gpu_memory_utilization`,
                            `mem_fraction_static`, `cuda_memory_fraction`
    block_size              tokens per block (or page) of the key/value pool
    cache_dtype             dtype of keys and values; `auto` for the model's
    cuda_graphs             whether decoding steps are captured as CUDA graphs
    prefix_caching          whether blocks of finished requests are kept for requests with the same prefix
    hybrid_cache            whether sliding-window layers cache only their window, if the engine can
    gpu_layers              llama.cpp: number of last layers in GPU memory; one more includes the head
    override_tensor         llama.cpp: `PATTERN=BUFFER`, the buffer (`CPU`, `CUDA1`) of tensors whose names in the GGUF
                            file match a regular expression; the first match counts
    n_cpu_moe               llama.cpp: number of first layers whose experts stay on the host
    flash_attention         llama.cpp: whether attention scores are never written out
    split_mode              llama.cpp on several GPUs: `layer` puts whole layers on each, `none` everything on one
    tensor_split            llama.cpp: proportions of the layers on each GPU; None for equal parts
    main_gpu                llama.cpp: index of the GPU that holds everything under split_mode `none`
    dp_attention            SGLang: only attention is data-parallel over `dp`; experts, MLPs and head are divided. If
                            off, the `dp` groups are replicas
    limit_images            most images per request (vLLM's `limit_mm_per_prompt`); None for no limit. With
                            `limit_videos` also 0, the vision tower is not loaded
    limit_videos            most videos per request, likewise
    lora_slots              most adapters in one step (vLLM's `max_loras`)
    lora_rank               largest rank of an adapter
    lora_cpu_slots          adapters kept on the host (vLLM's `max_cpu_loras`); None for `lora_slots`
    speculative_method      what proposes tokens: `draft_model` (SGLang's STANDALONE), `eagle`, `eagle3`, `mtp` (NEXTN),
                            `ngram`; None for `draft_model` if there is one, else no speculation
    draft_model             smaller model, or the config of EAGLE's head
    draft_weights           storage format of the draft model's weights
    sleep                   vLLM on a GPU that trains: weights and cache are freed until it generates again
    tensor_parallel         vLLM on GPUs that train: how many of them one engine is divided among
    trainer_offload         parts of the trainer that are on the host while vLLM on the same GPU generates:
                            `parameters`, `optimizer`
    num_speculative_tokens  tokens proposed per step: SGLang's `speculative_num_draft_tokens`, llama.cpp's `draft-max`
    """

    weights: str | None = None
    max_model_len: Count | None = None
    max_num_seqs: Count | None = None
    max_num_batched_tokens: Count | None = None
    memory_utilization: Annotated[Number, Strict(ge=0.001, le=1)] | None = None
    block_size: Count | None = None
    cache_dtype: CacheDtype | None = None
    cuda_graphs: Flag | None = None
    prefix_caching: Flag | None = None
    hybrid_cache: Flag | None = None
    gpu_layers: Natural | None = None
    override_tensor: tuple[str, ...] | None = None
    n_cpu_moe: Natural | None = None
    flash_attention: Flag | None = None
    split_mode: Literal["layer", "none", "row", "tensor"] | None = None
    tensor_split: tuple[Annotated[Number, Strict(ge=0, le=2**40)], ...] | None = None
    main_gpu: Rank | None = None
    dp_attention: Flag | None = None
    limit_images: Natural | None = None
    limit_videos: Natural | None = None
    lora_slots: Natural | None = None
    lora_rank: Count | None = None
    lora_cpu_slots: Natural | None = None
    speculative_method: Literal["draft_model", "eagle", "eagle3", "mtp", "ngram"] | None = None
    draft_model: str | InlineModel | None = None
    draft_weights: str | None = None
    num_speculative_tokens: Count | None = None
    sleep: Flag | None = None
    tensor_parallel: Count | None = None
    trainer_offload: tuple[Literal["parameters", "optimizer"], ...] | None = None

    @property
    def overrides(self) -> tuple[tuple[str, str], ...]:
        """llama.cpp's overrides, each a pattern of names and the tensors' buffer, in the order in which it tries them.

        Source: llama.cpp (llama-cpp-python 0.3.36) common/common.h llm_add_n_cpu_ffn_overrides.
        """
        return _overrides(self.override_tensor or (), self.n_cpu_moe or 0)

    def written(self, values: dict[str, Any]) -> dict[str, Any]:
        """Leave out what only an engine on a GPU that trains has, and llama.cpp's overrides, unless they are set."""
        return {k: v for k, v in values.items() if v is not None or k not in _ONLY_IF_SET}
