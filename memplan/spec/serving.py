"""What a serving engine is asked for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from memplan.spec.base import Count, Flag, Natural, Number, Part, Rank
from memplan.spec.generation import InlineModel

CacheDtype = Literal[
    "auto",
    "bf16",
    "fp16",
    "fp32",
    "fp8",
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_e4m3fn",
    "int8_per_token_head",
    "fp8_per_token_head",
    "int4_per_token_head",
    "nvfp4",
    "fp4_mx_block16",
    "mxfp8",
    "q8_0",
    "q5_1",
    "q5_0",
    "q4_1",
    "q4_0",
    "iq4_nl",
]


class Serving(Part, frozen=True):
    """How a serving engine is started (profiles `vllm-...`, `sglang-...`, `tgi-...`, `llama.cpp-...`).

    None is the engine's own default. A request is `batch.sequence` and `batch.new_tokens` together (256 of those where
    none are asked for), and `batch.micro` of them at once are to fit.

    weights                 what the weights are stored in, by name (`memplan.catalogue.quantization.storage`, or a GGUF
                            type); None for `method.quantization`, or as the checkpoint is stored
    max_model_len           the most tokens of a request that the engine admits; None for as many as the model has
                            positions for, and of llama.cpp for those of the run's requests
    max_num_seqs            requests in one step; of llama.cpp its parallel slots
    max_num_batched_tokens  tokens in one step: vLLM's word; SGLang's `chunked_prefill_size`, TGI's
                            `max_batch_prefill_tokens`, llama.cpp's `ubatch`
    memory_utilization      the share of the card it takes: `gpu_memory_utilization`, `mem_fraction_static`,
                            `cuda_memory_fraction`
    block_size              tokens of a block of the pool, or of a page
    cache_dtype             what keys and values are stored in; `auto` is the model's dtype
    cuda_graphs             steps of few tokens are recorded and replayed
    prefix_caching          blocks of requests that are over are kept for those that begin alike
    hybrid_cache            layers with a window keep that alone, where the engine can
    gpu_layers              of llama.cpp: the layers in the card's memory, from the last; one more is the head
    flash_attention         of llama.cpp: scores are not written out
    split_mode              of llama.cpp on several cards: `layer` lays whole layers on each, `none` all on one of them
    tensor_split            of llama.cpp: in which proportions cards have layers; None for equal parts
    main_gpu                of llama.cpp: the card that has all under split_mode `none`, the first is 0
    dp_attention            of SGLang: the `dp` groups of ranks share one model's experts, MLPs and head, and only
                            attention is theirs alone; without it they are replicas
    limit_images, limit_videos
                            how many of them a request may have (vLLM's `limit_mm_per_prompt`); None for any number. 0
                            of both: the tower is not there
    lora_slots, lora_rank   adapters that may be in one step, and the largest rank of them
    lora_cpu_slots          adapters that the host has (vLLM's `max_cpu_loras`); None for as many as there are slots
    speculative_method      what proposes tokens: `draft_model` (SGLang's STANDALONE), `eagle`, `eagle3`, `mtp` (NEXTN),
                            `ngram`; None for nothing, or a `draft_model` where one is said
    draft_model             the smaller model, or the config of EAGLE's head; `draft_weights` what it is stored in
    num_speculative_tokens  how many are proposed: SGLang's `speculative_num_draft_tokens`, llama.cpp's `draft-max`
    """

    weights: str | None = None
    max_model_len: Count | None = None
    max_num_seqs: Count | None = None
    max_num_batched_tokens: Count | None = None
    memory_utilization: Annotated[Number, Field(ge=0.001, le=1)] | None = None
    block_size: Count | None = None
    cache_dtype: CacheDtype | None = None
    cuda_graphs: Flag | None = None
    prefix_caching: Flag | None = None
    hybrid_cache: Flag | None = None
    gpu_layers: Natural | None = None
    flash_attention: Flag | None = None
    split_mode: Literal["layer", "none", "row", "tensor"] | None = None
    tensor_split: tuple[Annotated[Number, Field(ge=0, le=2**40)], ...] | None = None
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
