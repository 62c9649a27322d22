"""Profiles: the defaults and implementation details of a framework version, as rows with their sources.

A row sets a default for a field of the run (`kernels.loss`), or one of the words in `WORDS`, which describe the
version's code. A profile inherits the rows of the one it is `like`, and overrides them with its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from memplan.catalogue.profiles.engines import engine_names, find_engine
from memplan.catalogue.quantization.quantization import FEW_ROWS
from memplan.core.errors import SpecError, UnknownNameError

# Words that a row may set in addition to fields of a run.
WORDS = {
    "logits": "how the loss over all logits is written: padded, shifted, model, half, in_place (kernels/losses.py)",
    "sdpa_copies": "tensors copied before torch's attention: heads (repeated k and v), all (q, k and v), or none",
    "flash_2_copies": "tensors copied before flash attention 2, likewise",
    "code": "whose implementation of the model runs: transformers, litgpt, torchtitan",
    "converts": "the model's output is cast to fp32",
    "lingers": "variables of the training loop hold a pass's outputs and graph until the next pass replaces them",
    "dora_again": "DoRA multiplies by the base weight a second time even without dropout",
    "frozen_inputs": "under checkpointing the embeddings' output requires a gradient even if the embeddings are frozen",
    "has_family": "the version supports the model's family",
    "masks_padding": "training passes the model an attention mask if batches are padded",
    "triangles": "every layer holds a causal mask for all positions, used or not",
    "no_sdpa": "the version has no sdpa for the family, and uses eager attention",
    "no_checkpoints": "the family's code ignores gradient checkpointing",
    "whole_rotary": "Phi-3 rotates entire heads, without a concatenation",
    "uncapped": "sdpa is used although scores should be capped, and does not cap them",
    "one_mask": "eager attention has one causal mask for the entire batch, unless there is padding",
    "float_masks": "torch's attention gets masks of numbers in the model's dtype, like eager attention",
    "scales_apart": "Gemma's model scales the embeddings, instead of the embedding module",
    "rotary_tables": "rotary tables kept by every layer: gathered, computed, or none (attention/old_rotary_tables.py)",
    "half_math": "torch's plain attention stays in the dtype of its inputs",
    "caches": "the model returns every layer's keys and values, checkpointed or not",
    "experts": "how experts are written: stacked (one 3-D parameter), modules (linear layers), own (the framework's)",
    "keeps_matrix": "a product with a GPTQ matrix keeps the dequantised matrix for backward",
    "trains_fp8": "adapters train over fp8 weights without dequantising them",
    "by_name": "a checkpointed block takes masks and positions as keywords, which a reentrant one keeps with the graph",
    "adds_products": "Liger's fused loss adds half-precision products directly into the head's gradient",
    "pipeline": "what runs a pipeline's stages: megatron, torch, device_map (parallelism/pipeline.py)",
    "device_map": "the module for which a GPU's share leaves room in addition to layers: largest (leaf module), mean",
    "tensor_parallel": "whose tensor parallelism it is: transformers, megatron, torchtitan, litgpt, or none",
    "cache": "what keeps keys and values in generation: dynamic, legacy, static (inference/decoding.py)",
    "further_caches": "generate has quantised and offloaded caches and prefills prompts in chunks, as in 5.24",
    "forward_caches": "a forward pass keeps keys, values and states even with use_cache=False",
    "last_logits": "generation asks the model only for the last token's logits",
    "wide_logits": "the model's code casts all logits to fp32, even without labels",
    "gptq-int4": "GPTQ's 4-bit kernel, if it allocates more than its output (quantization/packed_kernels.py)",
    "gptq-int8": "GPTQ's 8-bit kernel, likewise",
    "awq-int4": "AWQ's kernel, likewise",
    "warms": "weights for which memory is allocated in advance, before they are loaded: none, half or all",
    "stores_head": "an AWQ checkpoint stores a tied head separately from the embeddings, and both are loaded",
    "runs_formats": "whether formats that nothing trains over were read (quantization/inference_formats.py)",
    "few_rows": "most rows of a 4-bit product that does not dequantise the matrix (quantization/quantization.py)",
    "fsdp_casts": "FSDP2's mixed precision only: no autocast around it",
    "fsdp_reduces": "the dtype in which FSDP2 reduces gradients, if not the dtype of gathered weights",
    "quantised_there": "under FSDP every GPU holds the entire quantised model before it is divided",
    "saved_tensors": "what moves everything autograd saves to host memory: torch (save_on_cpu), or not counted yet",
    "gathers_again": "a checkpointed block is recomputed inside its FSDP wrapper, which gathers its weights again",
}

# Conditions under which a row holds.
WHEN = {"": "always", "quantised": "for quantised weights"}


class ProfileSetting(NamedTuple):
    """One setting of a profile.

    field        a field of the run, or a word of `WORDS`
    value        its value
    source       where the value was read
    when         a key of `WHEN`
    model_types  the families it holds for; empty for all
    """

    field: str
    value: Any
    source: str
    when: str = ""
    model_types: tuple[str, ...] = ()


class Profile(NamedTuple):
    """A framework at a version.

    name   value of `profile`
    title  the framework and its version, as shown
    read   the library versions that were read
    like   the profile whose rows it inherits
    rows   its own rows
    waits  what the framework does that is not counted yet
    """

    name: str
    title: str
    read: str
    like: str
    rows: tuple[ProfileSetting, ...]
    waits: tuple[str, ...] = ()


# Before transformers 4.49: families whose loss stayed in the logits' dtype, and families whose model cast it to fp32.
_HALF = ("gpt2", "gpt_bigcode", "gpt_neox", "opt", "bloom", "mpt", "falcon", "stablelm")
_OWN_CAST = ("gpt_neo", "gptj")
_OWN_LOSS = (
    ProfileSetting(
        "logits", "half", "transformers 4.48.1 models/gpt_bigcode/modeling_gpt_bigcode.py, and alike", "", _HALF
    ),
    ProfileSetting("logits", "model", "transformers 4.48.1 models/gptj/modeling_gptj.py", "", _OWN_CAST),
)

# Families by the last version that was read without them.
# Source: models/auto/configuration_auto.py of each, and model_type in models/*/configuration_*.py.
_SINCE = {
    "4.55.2": (
        *("deepseek_v32", "deepseek_v4", "gemma4", "gemma4_text", "glm4_moe_lite", "glm_moe_dsa"),
        *("hunyuan_v1_dense", "hunyuan_v1_moe", "internlm3", "kimi_k25", "kimi_linear"),
        *("mimo_v2_flash", "minicpm3", "minimax_m2", "minimax_m3_vl_text", "ministral"),
        *("ministral3", "nemotron_h", "olmo3", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text"),
        *("qwen3_5_text", "qwen3_next", "qwen3_vl", "qwen3_vl_moe", "seed_oss", "step3p7"),
    ),
    "4.51.3": (
        *("deepseek_v2", "ernie4_5", "ernie4_5_moe", "exaone4", "gemma3n_text", "glm4_moe"),
        *("gpt_oss", "granitemoehybrid", "smollm3"),
    ),
    "4.48.1": (
        *("deepseek_v3", "gemma3", "gemma3_text", "glm4", "llama4", "llama4_text", "mistral3"),
        *("qwen2_5_vl", "qwen3", "qwen3_moe"),
    ),
    "4.46.3": (*("cohere2", "olmo2"),),
    "4.45.2": (*("glm", "phimoe"),),
    "4.38.2": (
        *("cohere", "dbrx", "falcon_mamba", "gemma2", "granite", "granitemoe", "jamba", "mamba"),
        *("mamba2", "mllama", "nemotron", "olmo", "olmoe", "phi3", "qwen2_moe", "qwen2_vl"),
        *("starcoder2",),
    ),
    "4.35.2": (*("gemma", "mixtral", "phi", "qwen2", "stablelm"),),
}


def _since(version: str, *more: str) -> ProfileSetting:
    """Return the row that lists the families missing from a version, and from the `more` versions read after it."""
    missing = tuple(name for later in (version, *more) for name in _SINCE[later])
    return ProfileSetting("has_family", False, f"transformers {version} models/auto/configuration_auto.py", "", missing)


# Families whose masks transformers made once and in the model's dtype until 4.52, with any attention.
_FLOAT_MASKS = (
    *("cohere", "dbrx", "deepseek_v3", "gemma", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "granite"),
    *("granitemoe", "llama", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmoe", "opt", "phi", "phi3"),
    *("phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "stablelm", "starcoder2"),
)

_BEFORE_2_5 = "torch before 2.5 attention.cpp, as copied by intel-extension-for-pytorch 2.1: no cast to fp32"

PROFILES = (
    Profile(
        "transformers-5",
        "transformers 5",
        "transformers 5.24, peft 0.21, bitsandbytes 0.50, torch 2.13",
        "",
        (
            ProfileSetting(
                "optimizer.name", "adamw_torch_fused", "transformers 5.24 training_args.py TrainingArguments.optim"
            ),
            ProfileSetting("kernels.checkpointing", "full", "assumed: most runs that are short of memory use it"),
            ProfileSetting(
                "kernels.reentrant", False, "transformers 5.24 modeling_utils.py activation_checkpointing_enable"
            ),
            ProfileSetting("kernels.loss", "hf", "transformers 5.24 loss/loss_utils.py ForCausalLMLoss"),
            ProfileSetting("kernels.fused", (), "transformers 5.24: none unless asked for"),
            ProfileSetting("method.adapter_dtype", "fp32", "peft 0.21 tuners/tuners_utils.py cast_adapter_dtype"),
            ProfileSetting(
                "method.quantization.skip",
                ("lm_head",),
                "transformers 5.24 quantizers/base.py get_modules_to_not_convert",
            ),
            ProfileSetting(
                "method.quantization.kbit_preparation",
                True,
                "peft 0.21 utils/other.py prepare_model_for_kbit_training, called as in peft's documentation",
            ),
            ProfileSetting("logits", "padded", "transformers 5.24 loss/loss_utils.py ForCausalLMLoss"),
            ProfileSetting("sdpa_copies", "", "transformers 5.24 integrations/sdpa_attention.py use_gqa_in_sdpa"),
            ProfileSetting("flash_2_copies", "", "transformers 5.24 integrations/flash_attention.py"),
            ProfileSetting("code", "transformers", "transformers 5.24"),
            ProfileSetting("dora_again", False, "peft 0.21 tuners/lora/dora.py DoraLinearLayer.forward"),
            ProfileSetting(
                "has_family",
                True,
                "transformers 5.24 models/auto/configuration_auto.py, or the code next to the weights",
            ),
            ProfileSetting(
                "masks_padding", True, "transformers 5.24 data/data_collator.py DataCollatorWithPadding, and alike"
            ),
            ProfileSetting("triangles", False, "transformers 5.24 models/gpt2/modeling_gpt2.py"),
            ProfileSetting(
                "rotary_tables", "", "transformers 5.24 models/llama/modeling_llama.py LlamaRotaryEmbedding"
            ),
            ProfileSetting(
                "no_sdpa", False, "transformers 5.24: the catalogue's families without sdpa are written without it"
            ),
            ProfileSetting(
                "no_sdpa",
                True,
                "transformers 5.24 models/gpt_oss/modeling_gpt_oss.py _supports_sdpa, and alike: sdpa has no sinks",
                "",
                ("gpt_oss", "mimo_v2_flash"),
            ),
            ProfileSetting("no_checkpoints", False, "transformers 5.24 modeling_layers.py GradientCheckpointingLayer"),
            ProfileSetting(
                "whole_rotary", False, "transformers 5.24 models/phi3/modeling_phi3.py apply_rotary_pos_emb"
            ),
            ProfileSetting("uncapped", False, "transformers 5.24 models/gemma2/modeling_gemma2.py: no sdpa"),
            ProfileSetting("one_mask", False, "transformers 5.24 masking_utils.py eager_mask"),
            ProfileSetting("float_masks", False, "transformers 5.24 masking_utils.py sdpa_mask"),
            ProfileSetting(
                "scales_apart", False, "transformers 5.24 models/gemma/modeling_gemma.py GemmaTextScaledWordEmbedding"
            ),
            ProfileSetting("half_math", False, "torch 2.13 aten/src/ATen/native/transformers/attention.cpp"),
            ProfileSetting(
                "frozen_inputs", True, "transformers 5.24 modeling_utils.py _activation_checkpointing_enable"
            ),
            ProfileSetting("lingers", False, "assumed: the step is a separate function, as in transformers' Trainer"),
            ProfileSetting(
                "converts", False, "accelerate does so only for a Trainer's run under autocast (loop.trainer)"
            ),
            ProfileSetting("caches", False, "transformers 5.24 modeling_layers.py GradientCheckpointingLayer"),
            ProfileSetting("by_name", True, "transformers 5.24 modeling_layers.py GradientCheckpointingLayer.__call__"),
            ProfileSetting(
                "by_name",
                False,
                "transformers 5.24 models/t5/modeling_t5.py T5Stack.forward, and alike",
                "",
                ("bert", "gpt2", "roberta", "t5", "whisper", "xlm-roberta"),
            ),
            ProfileSetting("cache", "dynamic", "transformers 5.24 generation/utils.py _prepare_cache_for_generation"),
            ProfileSetting(
                "further_caches", True, "transformers 5.24 generation/utils.py _prepare_cache_for_generation"
            ),
            ProfileSetting(
                "gptq-int4", "", "gptqmodel 7.7 utils/importer.py: Marlin comes before ExLlama, and has no such buffers"
            ),
            ProfileSetting("gptq-int8", "", "gptqmodel 7.7 utils/importer.py: Marlin"),
            ProfileSetting("awq-int4", "", "gptqmodel 7.7 utils/importer.py: Marlin"),
            ProfileSetting("warms", "all", "transformers 5.24 modeling_utils.py caching_allocator_warmup"),
            ProfileSetting(
                "stores_head", False, "transformers 5.24 core_model_loading.py: tied weights are loaded once"
            ),
            ProfileSetting(
                "runs_formats", True, "transformers 5.24 quantizers, integrations: quantization/inference_formats.py"
            ),
            ProfileSetting("few_rows", FEW_ROWS, "bitsandbytes 0.50 backends/cuda/ops.py gemm_4bit"),
            ProfileSetting("last_logits", True, "transformers 5.24 generation/utils.py prepare_inputs_for_generation"),
            ProfileSetting(
                "quantised_there", True, "transformers 5.24 quantizers/quantizer_bnb_4bit.py update_device_map"
            ),
            ProfileSetting(
                "cache", "legacy", "Qwen-7B's own modeling_qwen.py QWenAttention.forward: torch.cat", "", ("qwen",)
            ),
            ProfileSetting(
                "cache",
                "legacy",
                "the modeling_*.py published with the weights: tuples, which generate holds until the model returns",
                "",
                ("baichuan", "chatglm"),
            ),
            ProfileSetting(
                "cache",
                "dynamic",
                "modeling_minicpm.py MiniCPMModel.forward: the cache passed in; transformers 4.42 generation/utils.py",
                "",
                ("minicpm",),
            ),
            ProfileSetting(
                "last_logits", False, "Qwen-7B's own modeling_qwen.py QWenLMHeadModel.forward", "", ("qwen",)
            ),
            ProfileSetting(
                "last_logits",
                False,
                "the modeling_*.py published with the weights: no logits_to_keep; ChatGLM's has return_last_logit",
                "",
                ("baichuan", "internlm2", "minicpm"),
            ),
            ProfileSetting(
                "wide_logits", False, "transformers 5.24 models/llama/modeling_llama.py LlamaForCausalLM.forward"
            ),
            ProfileSetting(
                "wide_logits",
                True,
                "the modeling_internlm2.py and modeling_minicpm.py published with the weights: logits.float()",
                "",
                ("internlm2", "minicpm"),
            ),
            ProfileSetting(
                "forward_caches", False, "transformers 5.24 models/llama/modeling_llama.py LlamaModel.forward"
            ),
            ProfileSetting(
                "forward_caches",
                True,
                "transformers 5.24 models/granitemoe/modeling_granitemoe.py, and alike: seen in traces",
                "",
                ("granitemoe", "granitemoehybrid", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"),
            ),
            ProfileSetting(
                "gathers_again", False, "transformers 5.24 modeling_layers.py: FSDP wraps layers that checkpoint inside"
            ),
            ProfileSetting(
                "fsdp_casts", False, "accelerate 1.15 accelerator.py prepare_model: autocast around the model too"
            ),
            ProfileSetting(
                "fsdp_reduces", "", "accelerate 1.15 utils/dataclasses.py set_mixed_precision: one dtype for all"
            ),
            ProfileSetting(
                "pipeline", "device_map", "transformers 5.24 integrations/accelerate.py: the only one for training"
            ),
            ProfileSetting("device_map", "largest", "transformers 5.24 integrations/accelerate.py get_balanced_memory"),
            ProfileSetting("tensor_parallel", "transformers", "transformers 5.24 distributed/tensor_parallel.py"),
            ProfileSetting("experts", "stacked", "transformers 5.24 integrations/moe.py"),
            ProfileSetting(
                "keeps_matrix", True, "gptqmodel 7.7 nn_modules/qlinear/torch.py TorchLinear._forward_eager"
            ),
            ProfileSetting("trains_fp8", True, "transformers 5.24 integrations/finegrained_fp8.py FP8LinearFunction"),
            ProfileSetting(
                "saved_tensors", "torch", "assumed: the script runs forward inside it, as in torch's documentation"
            ),
            ProfileSetting(
                "adds_products", True, "liger-kernel 0.8.5 ops/fused_linear_cross_entropy.py: addmm, from 0.8.3 on"
            ),
        ),
    ),
    Profile(
        "transformers-5.14",
        "transformers 5 with Liger 0.6 to 0.8.2",
        "transformers 5.14.1, liger-kernel 0.8.0",
        "transformers-5",
        (
            ProfileSetting(
                "adds_products",
                False,
                "liger-kernel 0.8.0 ops/fused_linear_cross_entropy.py: a chunk's product, and its fp32 copy",
            ),
        ),
    ),
    Profile(
        "transformers-4.51",
        "transformers 4.49 to 4.52",
        "transformers 4.51.3, peft 0.15.2",
        "transformers-5",
        (
            _since("4.51.3", "4.55.2"),
            ProfileSetting(
                "optimizer.name", "adamw_torch", "transformers 4.51.3 training_args.py TrainingArguments.default_optim"
            ),
            ProfileSetting(
                "kernels.reentrant", True, "transformers 4.51.3 modeling_utils.py gradient_checkpointing_enable"
            ),
            ProfileSetting(
                "warms",
                "half",
                "transformers 4.51.3 modeling_utils.py caching_allocator_warmup, factor=4",
                "quantised",
            ),
            ProfileSetting("awq-int4", "gemm", "transformers 4.51.3 integrations/awq.py replace_with_awq_linear"),
            ProfileSetting(
                "stores_head",
                True,
                "autoawq 0.2.9 models/base.py BaseAWQForCausalLM.save_quantized: every tensor cloned",
            ),
            ProfileSetting(
                "runs_formats", False, "transformers 4.51 has other layers for these formats, which were not read"
            ),
            ProfileSetting("few_rows", 1, "bitsandbytes 0.45 autograd/_functions.py matmul_4bit"),
            ProfileSetting("further_caches", False, "transformers 4.51.3 cache_utils.py QuantizedCache: not read"),
            ProfileSetting(
                "frozen_inputs", False, "transformers 4.51.3 modeling_utils.py: only for models with adapters"
            ),
            ProfileSetting(
                "device_map", "mean", "transformers 4.51.3 modeling_utils.py: accelerate's get_balanced_memory"
            ),
            ProfileSetting("tensor_parallel", "", "transformers 4.51.3 integrations/tensor_parallel.py: not read"),
            ProfileSetting("keeps_matrix", False, "auto-gptq 0.7 qlinear_tritonv2.py QuantLinearFunction"),
            ProfileSetting(
                "trains_fp8", False, "transformers 4.51.3 quantizers/quantizer_finegrained_fp8.py is_trainable"
            ),
            ProfileSetting(
                "experts", "modules", "transformers 4.51.3 models/mixtral/modeling_mixtral.py MixtralBlockSparseTop2MLP"
            ),
            ProfileSetting(
                "sdpa_copies", "all", "transformers 4.51.3 integrations/sdpa_attention.py sdpa_attention_forward"
            ),
            ProfileSetting(
                "no_checkpoints",
                True,
                "transformers 4.51.3 models/starcoder2/modeling_starcoder2.py: nothing calls a checkpoint",
                "",
                ("starcoder2",),
            ),
            ProfileSetting(
                "uncapped", True, "transformers 4.51.3 models/gemma2/modeling_gemma2.py _supports_sdpa", "", ("gemma2",)
            ),
            ProfileSetting("by_name", False, "transformers 4.51.3 models/llama/modeling_llama.py LlamaModel.forward"),
            ProfileSetting(
                "quantised_there",
                False,
                "transformers 4.51.3 modeling_utils.py _load_state_dict_into_meta_model: back to the host, by weight",
            ),
            ProfileSetting(
                "gathers_again",
                True,
                "transformers 4.51.3 models/llama/modeling_llama.py: the model checkpoints blocks",
            ),
            ProfileSetting(
                "one_mask", True, "transformers 4.51.3 models/llama/modeling_llama.py: expanded, and copied if padded"
            ),
            ProfileSetting(
                "one_mask", False, "transformers 4.51.3 models/bloom/modeling_bloom.py: its own, copied", "", ("bloom",)
            ),
            ProfileSetting(
                "float_masks",
                True,
                "transformers 4.51.3 models/llama/modeling_llama.py LlamaModel._update_causal_mask, and alike",
                "",
                _FLOAT_MASKS,
            ),
            ProfileSetting(
                "scales_apart",
                True,
                "transformers 4.51.3 models/gemma/modeling_gemma.py normalizer",
                "",
                ("gemma", "gemma2"),
            ),
            ProfileSetting(
                "triangles", True, "transformers 4.51.3 models/gpt2/modeling_gpt2.py GPT2Attention", "", ("gpt2",)
            ),
            ProfileSetting(
                "caches",
                True,
                "transformers 4.51.3 models/gpt_bigcode/modeling_gpt_bigcode.py: checkpointing leaves use_cache on",
                "",
                ("gpt_bigcode",),
            ),
        ),
    ),
    Profile(
        "transformers-4.48",
        "transformers 4.48",
        "transformers 4.48.1, peft 0.13.2",
        "transformers-4.51",
        (
            _since("4.48.1"),
            ProfileSetting(
                "warms", "", "transformers 4.48.1 modeling_utils.py _load_state_dict_into_meta_model: one by one"
            ),
            ProfileSetting(
                "gptq-int4",
                "exllama_v1",
                "transformers 4.46.3 utils/quantization_config.py GPTQConfig.post_init: version 1, unless asked",
            ),
            ProfileSetting(
                "gptq-int8", "cuda_old", "auto-gptq 0.7.1 utils/import_utils.py dynamically_import_QuantLinear"
            ),
            ProfileSetting("logits", "shifted", "transformers 4.48.1 loss/loss_utils.py ForCausalLMLoss"),
            ProfileSetting("whole_rotary", True, "transformers 4.48.1 models/phi3/modeling_phi3.py", "", ("phi3",)),
            ProfileSetting("dora_again", True, "peft 0.13.2 tuners/lora/dora.py DoraLinearLayer.forward"),
            ProfileSetting(
                "triangles",
                True,
                "transformers 4.48.1 models/gpt_neox/modeling_gpt_neox.py GPTNeoXAttention",
                "",
                ("gpt_neox",),
            ),
            *_OWN_LOSS,
        ),
    ),
    Profile(
        "transformers-4.46",
        "transformers 4.46 and 4.47",
        "transformers 4.46.3, peft 0.13.2",
        "transformers-4.48",
        (
            _since("4.46.3"),
            ProfileSetting(
                "no_checkpoints",
                False,
                "transformers 4.46.3 models/starcoder2/modeling_starcoder2.py",
                "",
                ("starcoder2",),
            ),
            ProfileSetting(
                "uncapped",
                False,
                "transformers 4.46.3 models/gemma2/modeling_gemma2.py: eager instead",
                "",
                ("gemma2",),
            ),
            ProfileSetting(
                "sdpa_copies", "heads", "transformers 4.46.3 models/llama/modeling_llama.py LlamaSdpaAttention"
            ),
            ProfileSetting(
                "flash_2_copies",
                "heads",
                "transformers 4.46.3 models/mistral/modeling_mistral.py MistralFlashAttention2, and alike",
                "",
                ("mistral", "qwen2", "phi3", "starcoder2"),
            ),
        ),
    ),
    Profile(
        "transformers-4.45",
        "transformers 4.40 to 4.45",
        "transformers 4.45.2, peft 0.13.2",
        "transformers-4.46",
        (
            _since("4.45.2"),
            ProfileSetting(
                "no_sdpa", True, "transformers 4.45.2 models/opt/modeling_opt.py OPT_ATTENTION_CLASSES", "", ("opt",)
            ),
            ProfileSetting(
                "logits", "model", "transformers 4.45.2 models/llama/modeling_llama.py LlamaForCausalLM.forward"
            ),
            *_OWN_LOSS,
        ),
        ("OPT's eager attention, which clamps its scores to the lowest number and keeps one more tensor of them",),
    ),
    Profile(
        "transformers-4.38",
        "transformers 4.36 to 4.39",
        "transformers 4.38.2, peft 0.9.0",
        "transformers-4.45",
        (
            _since("4.38.2"),
            ProfileSetting("method.adapter_dtype", "weights", "peft 0.9.0 tuners/lora/layer.py LoraLayer.update_layer"),
            ProfileSetting(
                "method.adapter_dtype",
                "fp32",
                "peft 0.9.0 tuners/lora/layer.py LoraLayer.update_layer: quantised weights are not floating point",
                "quantised",
            ),
            ProfileSetting(
                "no_sdpa",
                True,
                "transformers 4.38.2 models/phi/modeling_phi.py, and alike: no _supports_sdpa",
                "",
                ("gpt2", "gpt_neox", "opt", "phi", "stablelm"),
            ),
            ProfileSetting("half_math", True, _BEFORE_2_5),
            ProfileSetting(
                "rotary_tables",
                "gathered",
                "transformers 4.38.2 models/qwen2/modeling_qwen2.py Qwen2RotaryEmbedding, and alike",
                "",
                ("falcon", "gpt_neox", "mistral", "mixtral", "phi", "qwen2", "qwen2_moe", "stablelm"),
            ),
            ProfileSetting(
                "rotary_tables",
                "computed",
                "transformers 4.38.2 models/llama/modeling_llama.py LlamaRotaryEmbedding",
                "",
                ("llama",),
            ),
            ProfileSetting(
                "last_logits", False, "transformers 4.38.2 models/llama/modeling_llama.py LlamaForCausalLM.forward"
            ),
            ProfileSetting(
                "cache",
                "legacy",
                "transformers 4.38.2 cache_utils.py DynamicCache.to_legacy_cache: generate holds the previous tuple",
            ),
        ),
    ),
    Profile(
        "transformers-4.35",
        "transformers 4.35",
        "transformers 4.35.2, peft 0.6.2",
        "transformers-4.38",
        (
            _since("4.35.2"),
            ProfileSetting(
                "no_sdpa",
                True,
                "transformers 4.35.2 models/llama/modeling_llama.py, and alike: no _supports_sdpa",
                "",
                ("gpt2", "gpt_bigcode", "gpt_neox", "llama", "mistral", "opt", "phi"),
            ),
            ProfileSetting(
                "rotary_tables",
                "gathered",
                "transformers 4.35.2 models/llama/modeling_llama.py LlamaRotaryEmbedding",
                "",
                ("llama",),
            ),
        ),
    ),
    Profile(
        "trl-0.24",
        "TRL 0.24",
        "trl 0.24.0 with transformers 5",
        "transformers-5",
        (
            ProfileSetting(
                "method.quantization.kbit_preparation",
                "trl",
                "trl 0.24.0 models/utils.py prepare_peft_model, under bf16",
            ),
            ProfileSetting("saved_tensors", "", "trl 0.24.0 models/activation_offloading.py OffloadActivations"),
        ),
        ("the copy of the shifted logits for token accuracy, after the loss: always less than the loss itself takes",),
    ),
    Profile(
        "trl-0.13",
        "TRL 0.13",
        "trl 0.13.0 with transformers 4.48.1 and peft 0.13.2",
        "transformers-4.48",
        (
            ProfileSetting(
                "method.quantization.kbit_preparation",
                "trl",
                "trl 0.13.0 trainer/sft_trainer.py, peft_module_casting_to_bf16 under bf16",
            ),
            ProfileSetting("saved_tensors", "", "trl 0.13.0: none"),
        ),
    ),
    Profile(
        "axolotl-0.12",
        "Axolotl 0.12",
        "axolotl 0.12.2, which pins transformers 4.55.2, peft 0.17.0, bitsandbytes 0.47.0",
        "transformers-5",
        (
            _since("4.55.2"),
            ProfileSetting("kernels.reentrant", True, "axolotl 0.12.2 utils/config/__init__.py normalize_config"),
            ProfileSetting("tensor_parallel", "", "axolotl 0.12.2, with transformers 4.55: not read"),
            ProfileSetting(
                "method.quantization.kbit_preparation",
                False,
                "axolotl 0.12.2 loaders/model.py: norms and embeddings are cast back if there is an adapter",
            ),
            ProfileSetting("experts", "modules", "transformers 4.55.2 models/mixtral/modeling_mixtral.py"),
            ProfileSetting(
                "saved_tensors",
                "",
                "axolotl 0.12.2 core/trainers/mixins/activation_checkpointing.py: trl's",
            ),
        ),
        ("sample packing and Axolotl's activation offloading",),
    ),
    Profile(
        "llamafactory-0.9",
        "LLaMA-Factory 0.9",
        "llamafactory 0.9.3 with transformers 4.51.3 and peft 0.15.2",
        "transformers-4.51",
        (
            ProfileSetting("kernels.reentrant", True, "llamafactory 0.9.3 hparams/model_args.py use_reentrant_gc"),
            ProfileSetting(
                "frozen_inputs",
                True,
                "llamafactory 0.9.3 model/model_utils/checkpointing.py prepare_model_for_training",
            ),
            ProfileSetting(
                "method.adapter_dtype", "fp32", "llamafactory 0.9.3 model/adapter.py cast_trainable_params_to_fp32"
            ),
            ProfileSetting("saved_tensors", "", "llamafactory 0.9.3: none"),
            ProfileSetting(
                "method.quantization.kbit_preparation",
                False,
                "llamafactory 0.9.3 model/model_utils/checkpointing.py prepare_model_for_training: no casts by default",
            ),
        ),
        ("full and freeze tuning cast trainable parameters to fp32 unless pure_bf16 is set: set precision amp",),
    ),
    Profile(
        "unsloth-2025",
        "Unsloth of January 2025",
        "unsloth 2025.1.5 with transformers 4.48",
        "transformers-4.48",
        (
            ProfileSetting("has_family", False, "unsloth 2025.1.5 models/loader.py FastLanguageModel.from_pretrained"),
            ProfileSetting(
                "has_family",
                True,
                "unsloth 2025.1.5 models/loader.py FastLanguageModel.from_pretrained",
                "",
                ("cohere", "gemma", "gemma2", "granite", "llama", "mistral", "qwen2"),
            ),
            ProfileSetting("logits", "padded", "unsloth 2025.1.5 models/llama.py CausalLM_fast_forward"),
            ProfileSetting("kernels.loss", "fused", "unsloth 2025.1.5 models/llama.py fused_linear_cross_entropy"),
            ProfileSetting("saved_tensors", "", "unsloth 2025.1.5: only checkpointed inputs"),
            ProfileSetting(
                "masks_padding",
                False,
                "unsloth 2025.1.5 models/llama.py LlamaModel_fast_forward: attention_mask = None while it trains",
            ),
            ProfileSetting(
                "kernels.fused",
                ("rope", "rms_norm", "swiglu", "cross_entropy", "lora"),
                "unsloth 2025.1.5 kernels/",
            ),
            ProfileSetting("sdpa_copies", "heads", "unsloth 2025.1.5 models/llama.py LlamaAttention_fast_forward"),
            ProfileSetting(
                "method.adapter_dtype", "fp32", "unsloth 2025.1.5 models/_utils.py prepare_model_for_kbit_training"
            ),
            ProfileSetting(
                "method.quantization.kbit_preparation",
                False,
                "unsloth 2025.1.5 models/_utils.py prepare_model_for_kbit_training: casts adapters only",
            ),
        ),
        (
            'tensors that use_gradient_checkpointing="unsloth" leaves on the GPU; kernels.checkpointing offload counts '
            "the rest",
        ),
    ),
    Profile(
        "torchtune",
        "torchtune 0.6",
        "torchtune 0.6.1, recipes/configs/llama3_1",
        "transformers-5",
        (
            ProfileSetting("kernels.loss", "chunked", "torchtune 0.6.1 modules/loss/ce_chunked_output_loss.py"),
            ProfileSetting("kernels.reentrant", False, "torchtune 0.6.1 training/activations.py"),
            ProfileSetting(
                "saved_tensors", "", "torchtune 0.6.1 training/_activation_offloading.py OffloadActivations"
            ),
            ProfileSetting(
                "masks_padding", False, "torchtune 0.6.1 data/_collate.py padded_collate_sft: tokens and labels"
            ),
            ProfileSetting("method.adapter_dtype", "weights", "torchtune 0.6.1 modules/peft/lora.py under dtype: bf16"),
            ProfileSetting("method.quantization.kbit_preparation", False, "torchtune 0.6.1: no counterpart"),
            ProfileSetting("sdpa_copies", "heads", "torchtune 0.6.1 modules/attention.py"),
            ProfileSetting("tensor_parallel", "", "torchtune 0.6.1 training/_distributed.py: not read"),
            ProfileSetting("experts", "own", "torchtune 0.6.1 modules/moe/experts.py"),
        ),
        (
            "torchtune's RMSNorm and rotary embeddings, in fp32 throughout: transformers' are counted instead",
            "compiled models, packed samples and offloaded activations",
        ),
    ),
    Profile(
        "torchtune-0.1",
        "torchtune 0.1",
        "torchtune 0.1.1, recipes/full_finetune_single_device.py",
        "torchtune",
        (
            ProfileSetting(
                "kernels.loss", "hf", "torchtune 0.1.1 recipes/full_finetune_single_device.py: torch's CrossEntropyLoss"
            ),
            ProfileSetting("logits", "model", "torchtune 0.1.1 modules/transformer.py TransformerDecoder.forward"),
        ),
        ("the recipe keeps the shifted logits through backward: set loop.hold_outputs",),
    ),
    Profile(
        "torchtitan",
        "TorchTitan 0.3",
        "torchtitan 0.3.0",
        "transformers-5",
        (
            ProfileSetting("kernels.reentrant", False, "torchtitan 0.3.0 distributed/activation_checkpoint.py"),
            ProfileSetting("saved_tensors", "", "torchtitan 0.3.0: none"),
            ProfileSetting(
                "masks_padding",
                False,
                "torchtitan 0.3.0 hf_datasets/text_datasets.py: packed samples, filled to the full length; "
                "models/common/attention.py ScaledDotProductAttention.forward takes no mask",
            ),
            ProfileSetting("fsdp_casts", True, "torchtitan 0.3.0 distributed/fsdp.py apply_fsdp_to_decoder"),
            ProfileSetting(
                "fsdp_reduces", "fp32", "torchtitan 0.3.0 config/configs.py TrainingConfig.mixed_precision_reduce"
            ),
            ProfileSetting("pipeline", "torch", "torchtitan 0.3.0 distributed/pipeline_parallel.py"),
            ProfileSetting("sdpa_copies", "", "torchtitan 0.3.0 models/common"),
            ProfileSetting("tensor_parallel", "torchtitan", "torchtitan 0.3.0 models/common/decoder_sharding.py"),
            ProfileSetting("code", "torchtitan", "torchtitan 0.3.0 models/llama3/model.py", "", ("llama",)),
            ProfileSetting("logits", "plain", "torchtitan 0.3.0 components/loss.py CrossEntropyLoss", "", ("llama",)),
            ProfileSetting("experts", "own", "torchtitan 0.3.0 models/common"),
        ),
        (
            "FSDP2 keeps fp32 shards and computes in bf16: set precision amp",
            "TorchTitan's layers, except for Llama in full training: transformers' are counted instead",
            "the chunked loss, selective checkpointing of operations, and compiled blocks and loss",
        ),
    ),
    Profile(
        "megatron-core",
        "Megatron-core 0.12",
        "megatron-core 0.12.0",
        "transformers-5",
        (
            ProfileSetting("kernels.checkpointing", "none", "megatron-core 0.12.0 transformer/transformer_config.py"),
            ProfileSetting(
                "kernels.reentrant", True, "megatron-core 0.12.0 tensor_parallel/random.py CheckpointFunction"
            ),
            ProfileSetting(
                "saved_tensors", "", "megatron-core 0.12.0 transformer/transformer_config.py cpu_offloading: not read"
            ),
            ProfileSetting("logits", "in_place", "megatron-core 0.12.0 tensor_parallel/cross_entropy.py"),
            ProfileSetting("pipeline", "megatron", "megatron-core 0.12.0 pipeline_parallel/schedules.py"),
            ProfileSetting("tensor_parallel", "megatron", "megatron-core 0.12.0 tensor_parallel/layers.py"),
            ProfileSetting("experts", "own", "megatron-core 0.12.0 transformer/moe/experts.py"),
        ),
        (
            "gradients and master weights in fp32: set precision mixed with grads fp32",
            "Megatron-core's layers, except for a megatron_gpt config: transformers' are counted instead",
            "latent attention, FP8, fused cross-entropy, and context parallelism except for a megatron_gpt config",
        ),
    ),
    Profile(
        "fsdp_qlora",
        "Answer.AI's fsdp_qlora",
        "fsdp_qlora train.py at 02586ac with transformers 4.38",
        "transformers-4.38",
        (
            ProfileSetting("kernels.reentrant", False, "fsdp_qlora train.py CheckpointImpl.NO_REENTRANT"),
            ProfileSetting("saved_tensors", "", "fsdp_qlora train.py: none"),
            ProfileSetting("optimizer.name", "adamw_torch", "fsdp_qlora train.py torch.optim.AdamW"),
            ProfileSetting("method.quantization.kbit_preparation", False, "fsdp_qlora train.py: model.to(torch_dtype)"),
        ),
        ("FSDP divides quantised weights in bf16 storage: set quantization.storage", "offloaded parameters"),
    ),
    Profile(
        "litgpt-2024",
        "LitGPT of 2024",
        "litgpt 0.5.3, lightning 2.2.5, bitsandbytes 0.42",
        "transformers-5",
        (
            ProfileSetting("code", "litgpt", "litgpt 0.5.3 model.py"),
            ProfileSetting("saved_tensors", "", "litgpt 0.5.3: none"),
            ProfileSetting("masks_padding", False, "litgpt 0.5.3 data/base.py _sft_collate_fn: only ids and labels"),
            ProfileSetting("tensor_parallel", "litgpt", "litgpt 0.5.3 generate/tp.py: only for generation"),
            ProfileSetting("optimizer.name", "adamw_torch", "litgpt 0.5.3 finetune/lora.py: torch's AdamW"),
            ProfileSetting(
                "optimizer.name", "paged_adamw_32bit", "litgpt 0.5.3 utils.py instantiate_bnb_optimizer", "quantised"
            ),
            ProfileSetting("kernels.checkpointing", "none", "litgpt 0.5.3 finetune/lora.py: only under FSDP"),
            ProfileSetting("kernels.loss", "chunked_lm_head", "litgpt 0.5.3 finetune/lora.py lm_head_chunk_size=128"),
            ProfileSetting("method.adapter_dtype", "weights", "litgpt 0.5.3 lora.py, under lightning's bf16-true"),
            ProfileSetting("method.quantization.skip", (), "litgpt 0.5.3 finetune/lora.py BitsandbytesPrecision"),
            ProfileSetting("method.quantization.kbit_preparation", False, "litgpt 0.5.3 finetune/lora.py"),
            ProfileSetting("cache", "static", "litgpt 0.5.3 generate/base.py main: set_kv_cache, for all tokens"),
            ProfileSetting("further_caches", False, "litgpt 0.5.3 model.py KVCache: the only cache"),
            ProfileSetting("last_logits", False, "litgpt 0.5.3 model.py GPT.forward"),
            ProfileSetting("few_rows", 1, "bitsandbytes 0.42 autograd/_functions.py matmul_4bit"),
            ProfileSetting("warms", "", "litgpt 0.5.3 generate/base.py main: init_module on the GPU, tensor by tensor"),
            ProfileSetting("converts", True, "lightning 2.2.5 fabric/plugins/precision/half.py convert_output"),
            ProfileSetting(
                "lingers", True, "litgpt 0.5.3 finetune/lora.py fit; truncated batches all have the same length"
            ),
        ),
        (
            "bitsandbytes' StableEmbedding, which 0.5.3 uses with quantised weights",
            "every block is checkpointed under FSDP: set kernels.checkpointing full",
        ),
    ),
    Profile(
        "litgpt-2023",
        "lit-gpt of autumn 2023",
        "lit_gpt at 98898ca and alike, torch 2.1, bitsandbytes 0.41",
        "litgpt-2024",
        (
            ProfileSetting("lingers", False, "lit_gpt finetune/lora.py: the longest sample comes first, only once"),
            ProfileSetting("half_math", True, _BEFORE_2_5),
        ),
    ),
)

_BY_NAME = {profile.name: profile for profile in PROFILES}


def find_profile(name: str) -> Profile:
    """Return the profile named `name`. Raises SpecError for a serving engine, else UnknownNameError."""
    profile = _BY_NAME.get(name)
    if profile is None and find_engine(name) is not None:
        raise SpecError(f"profile: {name} is a serving engine, which needs --method generate", "profile")
    if profile is None:
        engines = [engine for engine in engine_names() if engine[:3] == name.lower()[:3]]
        raise UnknownNameError("profile", name, (*_BY_NAME, *engines))
    return profile


def rows(profile: Profile) -> Iterator[ProfileSetting]:
    """Yield the inherited rows, then the profile's own; later rows override earlier ones."""
    if profile.like:
        yield from rows(_BY_NAME[profile.like])
    yield from profile.rows


@lru_cache(maxsize=1024)
def profile_settings(name: str, model_type: str, quantised: bool) -> dict[str, Any]:
    """Return the profile's settings for a run, by field or word. Raises UnknownNameError."""
    return {
        row.field: row.value
        for row in rows(find_profile(name))
        if (not row.model_types or model_type in row.model_types) and (not row.when or quantised)
    }
