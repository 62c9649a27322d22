"""Typed records of a framework's version: defaults of a run, and details of the library's code.

A row of a profile (`memplan.catalogue.profiles.setting`) sets one field of one of these records. Field names are unique
across them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from memplan.catalogue.inference.one_pass import Cache
from memplan.catalogue.kernels.wiring import DividedLogits, FusedGradients, KtoCopies, LogitsDtype, LogProbs
from memplan.core.records import NamedTuple


class RunDefaults(NamedTuple):
    """Defaults of the fields of a run. `kernels_loss` is the field `kernels.loss`, and so on."""

    optimizer_name: str
    kernels_checkpointing: Literal["none", "full", "offload"]
    kernels_reentrant: bool
    kernels_loss: Literal[
        "hf", "chunked", "fused", "chunked_lm_head", "chunked_nll", "chunked_nll_fp32", "tiled_lm_head", "fused_chunks"
    ]
    kernels_fused: tuple[str, ...]
    method_adapter_dtype: Literal["fp32", "bf16", "weights"]
    method_quantization_skip: tuple[str, ...]
    method_quantization_kbit_preparation: Literal[True, False, "trl", "axolotl", "axolotl-0.12"]
    method_quantization_experts: bool


class ModelBehaviour(NamedTuple):
    """The implementation of the model.

    code                       whose it is: transformers, litgpt or torchtitan
    has_family                 the version supports the model's family
    experts                    how experts are written: stacked (one 3-D parameter), modules (linear layers), own (the
                               framework's)
    names_linears              the trainer gives peft the names of all linear layers for all-linear, which leaves out
                               experts and routers that are parameters
    returns_caches             the model returns every layer's keys and values in training, checkpointed or not
    scales_embeddings_outside  Gemma's model scales the embeddings, instead of the embedding module
    dora_multiplies_twice      DoRA multiplies by the base weight a second time even without dropout
    magnitude_dtype            dtype of DoRA's magnitudes, if they have another than the adapters
    fused_lora                 whose functions the fused kernel `lora` is: unsloth's of 2025 or 2026, axolotl's, or NeMo
                               Automodel's
    own_kernels                what the library's own class of the model computes in one function
    fp32_ends                  full training casts norms, embeddings and head to fp32, except with flash attention 2
    """

    code: Literal["transformers", "litgpt", "torchtitan"]
    has_family: bool
    experts: Literal["stacked", "modules", "own"]
    names_linears: bool
    returns_caches: bool
    scales_embeddings_outside: bool
    dora_multiplies_twice: bool
    magnitude_dtype: Literal["", "fp32"]
    fused_lora: Literal["unsloth", "unsloth-2026", "axolotl", "automodel"]
    own_kernels: tuple[str, ...]
    fp32_ends: bool


class LossBehaviour(NamedTuple):
    """The logits, the loss and the outputs.

    logits                  how the loss over all logits is written (`memplan.catalogue.kernels.losses`)
    casts_outputs           the model's output is cast to fp32
    adds_products           Liger's fused loss adds half-precision products directly into the head's gradient
    fuses_evaluation        a fused loss computes no logits in evaluation either
    holds_previous_outputs  variables of the training loop hold a pass's outputs and graph until the next pass replaces
                            them
    """

    logits: Literal["padded", "shifted", "model", "half", "in_place", "plain", "parallel"]
    casts_outputs: bool
    adds_products: bool
    fuses_evaluation: bool
    holds_previous_outputs: bool


class AttentionBehaviour(NamedTuple):
    """The code around attention kernels.

    sdpa_copies           tensors copied before torch's attention: heads (repeated k and v), all (q, k and v), or none
    flash_2_copies        tensors copied before flash attention 2, likewise
    no_sdpa               the version has no sdpa for the family, and uses eager attention; or only on cards of a lower
                          compute capability than 8.0
    sdpa_skips_cap        sdpa is used although scores should be capped, and does not cap them
    half_math             torch's plain attention stays in the dtype of its inputs
    rotary_tables         rotary tables kept by every layer: gathered, computed, or none; by the model: cached
                          (`memplan.catalogue.attention.old_rotary_tables`)
    rotates_entire_heads  Phi-3 rotates entire heads, without a concatenation
    causal_buffers        every layer holds a causal mask for all positions, used or not
    one_mask              eager attention has one causal mask for the entire batch, unless there is padding
    float_masks           torch's attention gets masks of numbers in the model's dtype, like eager attention
    flex                  flex attention runs as in transformers 5, in supervised fine-tuning
    window_masks          LitGPT's layers with a window make a mask of all pairs, however short the sequence is
    masks_padding         training passes the model an attention mask if batches are padded
    packing               how the framework can pack sequences (`memplan.catalogue.kernels.packing`)
    packs_without_flash   it also does so with other attention than flash-attn's
    gives_lengths         flash attention is told where a packed row's sequences begin, instead of reading positions
    sdpa_varlen           with sdpa it runs torch's varlen attention over packed rows: `grouped` k and v, or `repeated`
    """

    sdpa_copies: Literal["", "heads", "all"]
    flash_2_copies: Literal["", "heads", "all"]
    no_sdpa: Literal[False, True, "before 8.0"]
    sdpa_skips_cap: bool
    half_math: bool
    rotary_tables: Literal["", "gathered", "computed", "cached"]
    rotates_entire_heads: bool
    causal_buffers: bool
    one_mask: bool
    float_masks: bool
    flex: bool
    window_masks: bool
    masks_padding: bool
    packing: tuple[str, ...]
    packs_without_flash: tuple[str, ...]
    gives_lengths: bool
    sdpa_varlen: Literal["", "grouped", "repeated"]


class CheckpointingBehaviour(NamedTuple):
    """Activation checkpointing and offloading.

    no_checkpoints   the family's code ignores gradient checkpointing
    by_module        each module of a block is a checkpoint of its own, not the block
    frozen_inputs    the embeddings' output requires a gradient even if the embeddings are frozen
    adapted_inputs   the embeddings' output requires a gradient under adapters even without checkpointing
    passes_keywords  a block takes masks and positions as keywords, which a reentrant one keeps with the graph
    last_of_n        of every n layers the last one is checkpointed, not the first
    keeps_last       offloaded checkpoints leave the last block's input on the GPU
    saved_tensors    what moves everything autograd saves to host memory: torch (save_on_cpu), trl (OffloadActivations),
                     or not counted yet
    """

    no_checkpoints: bool
    by_module: bool
    frozen_inputs: bool
    adapted_inputs: bool
    passes_keywords: bool
    last_of_n: bool
    keeps_last: bool
    saved_tensors: Literal["", "torch", "trl"]


class ShardingBehaviour(NamedTuple):
    """How the library divides a model among GPUs.

    pipeline                   what runs a pipeline's stages (`memplan.catalogue.parallelism.pipeline`)
    device_map                 the module for which a GPU's share leaves room in addition to layers: largest (leaf
                               module), mean
    tensor_parallel            whose tensor parallelism it is, if it was read
    divides_rank               Megatron's ranks divide both halves of an adapter, not only the half that its layer
                               divides
    fsdp_casts                 FSDP2's mixed precision only: no autocast around it
    fsdp_reduces               the dtype in which FSDP2 reduces gradients, if not the dtype of gathered weights
    fsdp2_casts_frozen         FSDP2's mixed precision keeps frozen weights in fp32, too, not only those that train
    ends_apart                 FSDP2's root has embeddings, last norm and head, except tables that train untied; the
                               last block stays gathered, and the loss is not part of the model
    root_has_ends              FSDP2's root has all weights outside of blocks, and `stays` gathered, as before torch
                               2.8, or is `freed` after forward, as its `reshard_after_forward` says
    delays_reduction           the strategies under which gradients stay whole until a step's last micro-batch
    owns_loop                  it does so in its own training loop, without transformers' Trainer
    finds_unused               DDP finds parameters without gradients, also in a checkpointed model, unless the run says
    moves_before_sharding      the model is moved to every GPU before FSDP divides it, in the dtype it computes in
    quantises_before_sharding  under FSDP every GPU holds the entire quantised model before it is divided
    stages_nf4                 FSDP2 with `cpu_ram_efficient_loading`: one process makes the weights NF4, and sends the
                               others their parts, in bytes
    regathers_weights          a checkpointed block is recomputed inside its FSDP wrapper, which gathers its weights
                               again
    records_streams            torch records NCCL's stream for what it sends, so a block that is freed meanwhile is not
                               reused until it has been sent
    """

    pipeline: Literal["megatron", "torch", "device_map"]
    device_map: Literal["largest", "mean"]
    tensor_parallel: Literal["", "transformers", "megatron", "torchtitan", "litgpt"]
    divides_rank: bool
    fsdp_casts: bool
    fsdp_reduces: Literal["", "fp32"]
    fsdp2_casts_frozen: bool
    ends_apart: bool
    root_has_ends: Literal["", "stays", "freed"]
    delays_reduction: tuple[str, ...]
    owns_loop: bool
    finds_unused: bool
    moves_before_sharding: bool
    quantises_before_sharding: bool
    stages_nf4: bool
    regathers_weights: bool
    records_streams: bool


class GenerationBehaviour(NamedTuple):
    """Forward passes without a backward pass, and generation.

    cache             what keeps keys and values in generation (`memplan.catalogue.inference.decoding`)
    further_caches    generate has quantised and offloaded caches and prefills prompts in chunks, as in 5.24
    evaluation_caches transformers' Trainer evaluates the model with a cache, which its nested `text_config` asks for
    last_logits       generation asks the model only for the last token's logits
    casts_all_logits  the model's code casts all logits to fp32, even without labels

    Of an engine on the GPU of a trainer that generates

    shares_weights    its weights are the policy's frozen ones
    engine_share      share of the GPU that it takes by default
    engine_is_short   it serves by default no more tokens than a prompt and its completion have
    """

    cache: Cache
    further_caches: bool
    evaluation_caches: bool
    last_logits: bool
    casts_all_logits: bool
    shares_weights: bool
    engine_share: float
    engine_is_short: bool


class WeightsBehaviour(NamedTuple):
    """Loading a checkpoint, and quantised weights.

    preallocates      weights for which memory is allocated in advance, before they are loaded: none, half or all
    stores_head       an AWQ checkpoint stores a tied head separately from the embeddings, and both are loaded
    gptq_int4_kernel  GPTQ's 4-bit kernel, if it allocates more than its output
                      (`memplan.catalogue.quantization.packed_kernels`)
    gptq_int8_kernel  GPTQ's 8-bit kernel, likewise
    awq_int4_kernel   AWQ's kernel, likewise
    keeps_matrix      a product with a GPTQ matrix keeps the dequantised matrix for backward
    trains_fp8        adapters train over fp8 weights without dequantising them
    trains_mxfp4      LoRA trains over gpt-oss's experts in MXFP4, which are dequantised while their module runs
    runs_formats      formats that nothing trains over were read (`memplan.catalogue.quantization.inference_formats`)
    few_rows          most rows of a 4-bit product that may read the packed matrix (`fused_4bit`)
    """

    preallocates: Literal["", "half", "all"]
    stores_head: bool
    gptq_int4_kernel: Literal["", "exllama_v1"]
    gptq_int8_kernel: Literal["", "cuda_old"]
    awq_int4_kernel: Literal["", "gemm"]
    keeps_matrix: bool
    trains_fp8: bool
    trains_mxfp4: bool
    runs_formats: bool
    few_rows: int

    def kernel(self, format: str) -> str:
        """Return the kernel that runs packed weights of a format; "" if it needs nothing but its output."""
        kernels = {
            "gptq-int4": self.gptq_int4_kernel,
            "gptq-int8": self.gptq_int8_kernel,
            "awq-int4": self.awq_int4_kernel,
        }
        return kernels.get(format, "")


class TrainerBehaviour(NamedTuple):
    """The trainers of TRL (`memplan.catalogue.kernels.preference`).

    trainers           those that the version has
    log_probs          how log-probabilities of tokens are computed
    value_head         a reward model's scores are of a head next to the language model's, which computes logits, too
    takes_one          KTO takes one completion a batch, whose divergence is then estimated from it; trainers that
                       compare completions take one of a prompt
    kto_copies         what KTO copies of the logits: `halves`, those of desirable examples and of the others; `all`,
                       those of all tokens but the last, too; or nothing
    logits_dtype       when the model's logits are cast to fp32
    prompt_logits      trainers that generate compute log-probabilities of prompts, too
    trained_reference  the weights of a reference model that is a copy require gradients
    fsdp2_reference    the units in which FSDP2 shards a copy: one `unit`, or `blocks`; or it `fails`
    reference_dtype    the dtype of a copy: of the policy's weights, or of its computation
    older_trainers     trainers without a reference prepare a quantised model themselves, as all did in TRL 0.24
    completion_tokens  most tokens of a completion, of trainers that generate
    divided_logits     how these trainers divide the logits by the temperature
    fused_gradients    how Liger's loss computes the head's gradient; empty without it
    fused_trainers     trainers that have such a loss
    fused_adapters     DPO's such loss works with adapters
    reward_caches      a reward model that is a decoder keeps its cache while it scores completions
    copies_adapters    the trainer gets a model with adapters, so the reference has a frozen copy of them
    projects_head      GaLore and APOLLO project the head's gradient, too
    """

    trainers: tuple[str, ...]
    log_probs: LogProbs
    value_head: bool
    takes_one: bool
    kto_copies: KtoCopies
    logits_dtype: LogitsDtype
    prompt_logits: bool
    trained_reference: bool
    fsdp2_reference: Literal["unit", "blocks", "fails"]
    reference_dtype: Literal["weights", "compute"]
    older_trainers: bool
    completion_tokens: int
    divided_logits: DividedLogits
    fused_gradients: FusedGradients
    fused_trainers: tuple[str, ...]
    fused_adapters: bool
    reward_caches: bool
    copies_adapters: bool
    projects_head: bool


class LibraryBehaviour(NamedTuple):
    """Everything that a profile decides.

    defaults       defaults of the run's fields
    model          the implementation of the model
    loss           the logits, the loss and the outputs
    attention      the code around attention kernels
    checkpointing  activation checkpointing and offloading
    sharding       division of a model among GPUs
    generation     forward passes and generation
    weights        loading and quantised weights
    trainer        trainers of TRL
    """

    defaults: RunDefaults
    model: ModelBehaviour
    loss: LossBehaviour
    attention: AttentionBehaviour
    checkpointing: CheckpointingBehaviour
    sharding: ShardingBehaviour
    generation: GenerationBehaviour
    weights: WeightsBehaviour
    trainer: TrainerBehaviour


# What `memplan profiles` calls a field, if not by its name. These names are part of its output.
PRINTED: Mapping[str, str] = {
    "returns_caches": "caches",
    "scales_embeddings_outside": "scales_apart",
    "dora_multiplies_twice": "dora_again",
    "casts_outputs": "converts",
    "holds_previous_outputs": "lingers",
    "sdpa_skips_cap": "uncapped",
    "rotates_entire_heads": "whole_rotary",
    "causal_buffers": "triangles",
    "passes_keywords": "by_name",
    "quantises_before_sharding": "quantised_there",
    "regathers_weights": "gathers_again",
    "casts_all_logits": "wide_logits",
    "preallocates": "warms",
    "gptq_int4_kernel": "gptq-int4",
    "gptq_int8_kernel": "gptq-int8",
    "awq_int4_kernel": "awq-int4",
    "counts_only_embeddings": "embeds",
    "image_cache_mib": "pictures_mib",
    "pool_share": "wiggle",
    "steps_in_flight": "in_flight",
}
