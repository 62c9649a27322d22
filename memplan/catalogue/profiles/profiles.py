"""Profiles: what a framework and its version decide where a run leaves it open, as rows with their sources.

A row sets a field of the run (`kernels.loss`) or one of the words in `WORDS`, which say how the version's code is
written. A profile has the rows of the one it is `like`, and its own over them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from memplan.catalogue.profiles.engines import engine_names, find_engine
from memplan.catalogue.quantization.quantization import FEW_ROWS
from memplan.core.errors import SpecError, UnknownNameError

# What a row may set beside fields of a run.
WORDS = {
    "logits": "how the loss of all logits is written: padded, shifted, model, half, in_place (catalogue/losses.py)",
    "sdpa_copies": "what is copied before torch's attention: heads (repeated k and v), all (q, k and v), or nothing",
    "flash_2_copies": "the same before flash attention 2",
    "code": "whose model it is: transformers, litgpt, torchtitan",
    "converts": "what the model returns is cast to fp32",
    "lingers": "the loop's names keep a pass's outputs and graph until the next pass has made its own",
    "dora_again": "DoRA multiplies by the base weight once more though nothing is dropped",
    "frozen_inputs": "under checkpointing the embeddings' output asks for a gradient also where they are frozen",
    "has_family": "the framework has the model's family at that version",
    "masks_padding": "in training the model is given an attention mask if batches are padded",
    "triangles": "every layer holds a causal mask for all positions, used or not",
    "no_sdpa": "the version has no sdpa for the family, and takes eager attention",
    "no_checkpoints": "the family's code has no checkpointing, and takes no notice of being asked",
    "whole_rotary": "Phi-3 rotates whole heads and joins nothing",
    "uncapped": "sdpa is taken where scores are to be capped, and does not cap them",
    "one_mask": "eager's causal mask is one for the whole batch, unless there is padding",
    "float_masks": "torch's attention is given masks of numbers in the model's dtype, as eager attention",
    "scales_apart": "Gemma's model scales the embeddings, not their module",
    "rotary_tables": "rotary tables that every layer keeps: gathered, computed anew, or none (catalogue/tables.py)",
    "half_math": "torch's plain attention stays in the dtype of what it is given",
    "caches": "the model returns every layer's keys and values, checkpointed or not",
    "experts": "how experts are written: stacked (one parameter of three dimensions), modules (linear layers), own",
    "keeps_matrix": "a product with a GPTQ matrix keeps it dequantised for the backward pass",
    "trains_fp8": "adapters train over a checkpoint that is stored in fp8, and do not dequantise it",
    "by_name": "a checkpointed block is given masks and positions by name: reentrant ones keep these with the graph",
    "adds_products": "Liger's fused loss adds half-precision products into the head's gradient, and makes none apart",
    "pipeline": "what runs a pipeline's stages: megatron, torch, device_map (catalogue/pipeline.py)",
    "device_map": "for which module a GPU's share leaves room beside layers: largest (of those without modules), mean",
    "tensor_parallel": "whose tensor parallelism it is: transformers, megatron, torchtitan, litgpt, or none",
    "cache": "what keeps keys and values in generation: dynamic, legacy (catalogue/decoding.py)",
    "further_caches": "generate has quantised and offloaded caches, and reads prompts in chunks, as in 5.24",
    "forward_caches": "a forward pass keeps keys, values and states though it is asked not to",
    "last_logits": "generation asks the model for the last token's logits alone",
    "wide_logits": "the model's own code makes its logits fp32 though it has no labels, all of them",
    "gptq-int4": "the kernel of GPTQ's 4 bits where it makes something beside its output (catalogue/packed.py)",
    "gptq-int8": "the same of GPTQ's 8 bits",
    "awq-int4": "the same of AWQ",
    "warms": "what is allocated once before weights are loaded, and carved up for them: nothing, half or all of them",
    "stores_head": "a checkpoint in AWQ has the head beside embeddings it is tied to, and both are loaded",
    "runs_formats": "whether formats that nothing trains over were read (catalogue/running.py)",
    "few_rows": "rows at most of a product with 4-bit weights that makes no whole matrix (catalogue/quantization.py)",
    "fsdp_casts": "FSDP2's mixed precision is all there is: no autocast around it",
    "fsdp_reduces": "the dtype that FSDP2 reduces gradients in, where it is not the one weights are gathered in",
    "quantised_there": "under FSDP a quantised model is whole on every GPU before it is divided",
    "saved_tensors": "what puts all that autograd saves into host memory: torch (save_on_cpu), or nothing counted yet",
    "gathers_again": "a checkpointed block is recomputed with its FSDP wrapper, which gathers its weights once more",
}

# Rows that hold only for some runs.
WHEN = {"": "always", "quantised": "of quantised weights"}


class Row(NamedTuple):
    """`field` is `value`; `when` is a word of `WHEN`; `model_types`: only of these families."""

    field: str
    value: Any
    source: str
    when: str = ""
    model_types: tuple[str, ...] = ()


class Profile(NamedTuple):
    """A framework at a version.

    read    the versions of the libraries that were read
    like    the profile whose rows it has too
    waits   what the framework does that no answer counts yet
    """

    name: str
    title: str
    read: str
    like: str
    rows: tuple[Row, ...]
    waits: tuple[str, ...] = ()


# Families whose loss was in the logits' own dtype until transformers 4.49, and two whose model itself made it fp32.
_HALF = ("gpt2", "gpt_bigcode", "gpt_neox", "opt", "bloom", "mpt", "falcon", "stablelm")
_OWN_CAST = ("gpt_neo", "gptj")
_OWN_LOSS = (
    Row("logits", "half", "transformers 4.48.1 models/gpt_bigcode/modeling_gpt_bigcode.py, and alike", "", _HALF),
    Row("logits", "model", "transformers 4.48.1 models/gptj/modeling_gptj.py", "", _OWN_CAST),
)

# Families that transformers has had since a version, by the last version that was read before it.
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


def _since(version: str, *more: str) -> Row:
    """The row that says which families a version does not have."""
    missing = tuple(name for later in (version, *more) for name in _SINCE[later])
    return Row("has_family", False, f"transformers {version} models/auto/configuration_auto.py", "", missing)


# Families whose masks transformers made once and in the model's dtype until 4.52, whatever the attention.
_FLOAT_MASKS = (
    *("cohere", "dbrx", "deepseek_v3", "gemma", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "granite"),
    *("granitemoe", "llama", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmoe", "opt", "phi", "phi3"),
    *("phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "stablelm", "starcoder2"),
)

_BEFORE_2_5 = "torch before 2.5 attention.cpp, as intel-extension-for-pytorch 2.1 copied it: it casts nothing to fp32"

PROFILES = (
    Profile(
        "transformers-5",
        "transformers 5",
        "transformers 5.24, peft 0.21, bitsandbytes 0.50, torch 2.13",
        "",
        (
            Row("optimizer.name", "adamw_torch_fused", "transformers 5.24 training_args.py TrainingArguments.optim"),
            Row("kernels.checkpointing", "full", "assumed: most runs that are short of memory have it on"),
            Row("kernels.reentrant", False, "transformers 5.24 modeling_utils.py activation_checkpointing_enable"),
            Row("kernels.loss", "hf", "transformers 5.24 loss/loss_utils.py ForCausalLMLoss"),
            Row("kernels.fused", (), "transformers 5.24: none unless asked for"),
            Row("method.adapter_dtype", "fp32", "peft 0.21 tuners/tuners_utils.py cast_adapter_dtype"),
            Row(
                "method.quantization.skip",
                ("lm_head",),
                "transformers 5.24 quantizers/base.py get_modules_to_not_convert",
            ),
            Row(
                "method.quantization.kbit_preparation",
                True,
                "peft 0.21 utils/other.py prepare_model_for_kbit_training, as its documentation has it called",
            ),
            Row("logits", "padded", "transformers 5.24 loss/loss_utils.py ForCausalLMLoss"),
            Row("sdpa_copies", "", "transformers 5.24 integrations/sdpa_attention.py use_gqa_in_sdpa"),
            Row("flash_2_copies", "", "transformers 5.24 integrations/flash_attention.py"),
            Row("code", "transformers", "transformers 5.24"),
            Row("dora_again", False, "peft 0.21 tuners/lora/dora.py DoraLinearLayer.forward"),
            Row(
                "has_family",
                True,
                "transformers 5.24 models/auto/configuration_auto.py, or the code next to the weights",
            ),
            Row("masks_padding", True, "transformers 5.24 data/data_collator.py DataCollatorWithPadding, and alike"),
            Row("triangles", False, "transformers 5.24 models/gpt2/modeling_gpt2.py"),
            Row("rotary_tables", "", "transformers 5.24 models/llama/modeling_llama.py LlamaRotaryEmbedding"),
            Row("no_sdpa", False, "transformers 5.24: families without one are written so in the catalogue"),
            Row(
                "no_sdpa",
                True,
                "transformers 5.24 models/gpt_oss/modeling_gpt_oss.py _supports_sdpa, and alike: it knows no sinks",
                "",
                ("gpt_oss", "mimo_v2_flash"),
            ),
            Row("no_checkpoints", False, "transformers 5.24 modeling_layers.py GradientCheckpointingLayer"),
            Row("whole_rotary", False, "transformers 5.24 models/phi3/modeling_phi3.py apply_rotary_pos_emb"),
            Row("uncapped", False, "transformers 5.24 models/gemma2/modeling_gemma2.py: no sdpa"),
            Row("one_mask", False, "transformers 5.24 masking_utils.py eager_mask"),
            Row("float_masks", False, "transformers 5.24 masking_utils.py sdpa_mask"),
            Row("scales_apart", False, "transformers 5.24 models/gemma/modeling_gemma.py GemmaTextScaledWordEmbedding"),
            Row("half_math", False, "torch 2.13 aten/src/ATen/native/transformers/attention.cpp"),
            Row("frozen_inputs", True, "transformers 5.24 modeling_utils.py _activation_checkpointing_enable"),
            Row("lingers", False, "assumed: the step is a function of its own, as in transformers' Trainer"),
            Row("converts", False, "accelerate does so only for a Trainer's run under autocast (loop.trainer)"),
            Row("caches", False, "transformers 5.24 modeling_layers.py GradientCheckpointingLayer"),
            Row("by_name", True, "transformers 5.24 modeling_layers.py GradientCheckpointingLayer.__call__"),
            Row(
                "by_name",
                False,
                "transformers 5.24 models/t5/modeling_t5.py T5Stack.forward, and alike",
                "",
                ("bert", "gpt2", "roberta", "t5", "whisper", "xlm-roberta"),
            ),
            Row("cache", "dynamic", "transformers 5.24 generation/utils.py _prepare_cache_for_generation"),
            Row("further_caches", True, "transformers 5.24 generation/utils.py _prepare_cache_for_generation"),
            Row(
                "gptq-int4", "", "gptqmodel 7.7 utils/importer.py: Marlin comes before ExLlama, and has no such buffers"
            ),
            Row("gptq-int8", "", "gptqmodel 7.7 utils/importer.py: Marlin"),
            Row("awq-int4", "", "gptqmodel 7.7 utils/importer.py: Marlin"),
            Row("warms", "all", "transformers 5.24 modeling_utils.py caching_allocator_warmup"),
            Row("stores_head", False, "transformers 5.24 core_model_loading.py: tied weights are loaded once"),
            Row("runs_formats", True, "transformers 5.24 quantizers, integrations: catalogue/running.py"),
            Row("few_rows", FEW_ROWS, "bitsandbytes 0.50 backends/cuda/ops.py gemm_4bit"),
            Row("last_logits", True, "transformers 5.24 generation/utils.py prepare_inputs_for_generation"),
            Row("quantised_there", True, "transformers 5.24 quantizers/quantizer_bnb_4bit.py update_device_map"),
            Row("cache", "legacy", "Qwen-7B's own modeling_qwen.py QWenAttention.forward: torch.cat", "", ("qwen",)),
            Row(
                "cache",
                "legacy",
                "the modeling_*.py published with the weights: tuples, which generate has until the model returns",
                "",
                ("baichuan", "chatglm"),
            ),
            Row(
                "cache",
                "dynamic",
                "modeling_minicpm.py MiniCPMModel.forward: what it is given; transformers 4.42 generation/utils.py",
                "",
                ("minicpm",),
            ),
            Row("last_logits", False, "Qwen-7B's own modeling_qwen.py QWenLMHeadModel.forward", "", ("qwen",)),
            Row(
                "last_logits",
                False,
                "the modeling_*.py published with the weights: no logits_to_keep; ChatGLM's has return_last_logit",
                "",
                ("baichuan", "internlm2", "minicpm"),
            ),
            Row("wide_logits", False, "transformers 5.24 models/llama/modeling_llama.py LlamaForCausalLM.forward"),
            Row(
                "wide_logits",
                True,
                "the modeling_internlm2.py and modeling_minicpm.py published with the weights: logits.float()",
                "",
                ("internlm2", "minicpm"),
            ),
            Row("forward_caches", False, "transformers 5.24 models/llama/modeling_llama.py LlamaModel.forward"),
            Row(
                "forward_caches",
                True,
                "transformers 5.24 models/granitemoe/modeling_granitemoe.py, and alike: seen in traces",
                "",
                ("granitemoe", "granitemoehybrid", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"),
            ),
            Row("gathers_again", False, "transformers 5.24 modeling_layers.py: FSDP wraps what checkpoints itself"),
            Row("fsdp_casts", False, "accelerate 1.15 accelerator.py prepare_model: autocast around the model too"),
            Row("fsdp_reduces", "", "accelerate 1.15 utils/dataclasses.py set_mixed_precision: one dtype for all"),
            Row("pipeline", "device_map", "transformers 5.24 has no other for training: integrations/accelerate.py"),
            Row("device_map", "largest", "transformers 5.24 integrations/accelerate.py get_balanced_memory"),
            Row("tensor_parallel", "transformers", "transformers 5.24 distributed/tensor_parallel.py"),
            Row("experts", "stacked", "transformers 5.24 integrations/moe.py"),
            Row("keeps_matrix", True, "gptqmodel 7.7 nn_modules/qlinear/torch.py TorchLinear._forward_eager"),
            Row("trains_fp8", True, "transformers 5.24 integrations/finegrained_fp8.py FP8LinearFunction"),
            Row("saved_tensors", "torch", "assumed: the script runs forward in it, as torch's documentation shows"),
            Row("adds_products", True, "liger-kernel 0.8.5 ops/fused_linear_cross_entropy.py: addmm, from 0.8.3 on"),
        ),
    ),
    Profile(
        "transformers-5.14",
        "transformers 5 with Liger 0.6 to 0.8.2",
        "transformers 5.14.1, liger-kernel 0.8.0",
        "transformers-5",
        (
            Row(
                "adds_products",
                False,
                "liger-kernel 0.8.0 ops/fused_linear_cross_entropy.py: a chunk's product, and that in fp32",
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
            Row(
                "optimizer.name", "adamw_torch", "transformers 4.51.3 training_args.py TrainingArguments.default_optim"
            ),
            Row("kernels.reentrant", True, "transformers 4.51.3 modeling_utils.py gradient_checkpointing_enable"),
            Row(
                "warms",
                "half",
                "transformers 4.51.3 modeling_utils.py caching_allocator_warmup, factor=4",
                "quantised",
            ),
            Row("awq-int4", "gemm", "transformers 4.51.3 integrations/awq.py replace_with_awq_linear"),
            Row(
                "stores_head",
                True,
                "autoawq 0.2.9 models/base.py BaseAWQForCausalLM.save_quantized: every tensor cloned",
            ),
            Row("runs_formats", False, "transformers 4.51 has other layers for them, which were not read"),
            Row("few_rows", 1, "bitsandbytes 0.45 autograd/_functions.py matmul_4bit"),
            Row("further_caches", False, "transformers 4.51.3 cache_utils.py QuantizedCache: not read"),
            Row("frozen_inputs", False, "transformers 4.51.3 modeling_utils.py: of models with adapters alone"),
            Row("device_map", "mean", "transformers 4.51.3 modeling_utils.py: accelerate's get_balanced_memory"),
            Row("tensor_parallel", "", "transformers 4.51.3 integrations/tensor_parallel.py: not read"),
            Row("keeps_matrix", False, "auto-gptq 0.7 qlinear_tritonv2.py QuantLinearFunction"),
            Row("trains_fp8", False, "transformers 4.51.3 quantizers/quantizer_finegrained_fp8.py is_trainable"),
            Row(
                "experts", "modules", "transformers 4.51.3 models/mixtral/modeling_mixtral.py MixtralBlockSparseTop2MLP"
            ),
            Row("sdpa_copies", "all", "transformers 4.51.3 integrations/sdpa_attention.py sdpa_attention_forward"),
            Row(
                "no_checkpoints",
                True,
                "transformers 4.51.3 models/starcoder2/modeling_starcoder2.py: nothing calls a checkpoint",
                "",
                ("starcoder2",),
            ),
            Row(
                "uncapped", True, "transformers 4.51.3 models/gemma2/modeling_gemma2.py _supports_sdpa", "", ("gemma2",)
            ),
            Row("by_name", False, "transformers 4.51.3 models/llama/modeling_llama.py LlamaModel.forward"),
            Row(
                "quantised_there",
                False,
                "transformers 4.51.3 modeling_utils.py _load_state_dict_into_meta_model: back to the host, by weight",
            ),
            Row(
                "gathers_again",
                True,
                "transformers 4.51.3 models/llama/modeling_llama.py: the model checkpoints blocks",
            ),
            Row("one_mask", True, "transformers 4.51.3 models/llama/modeling_llama.py: expanded, and copied if padded"),
            Row(
                "one_mask", False, "transformers 4.51.3 models/bloom/modeling_bloom.py: its own, copied", "", ("bloom",)
            ),
            Row(
                "float_masks",
                True,
                "transformers 4.51.3 models/llama/modeling_llama.py LlamaModel._update_causal_mask, and alike",
                "",
                _FLOAT_MASKS,
            ),
            Row(
                "scales_apart",
                True,
                "transformers 4.51.3 models/gemma/modeling_gemma.py normalizer",
                "",
                ("gemma", "gemma2"),
            ),
            Row("triangles", True, "transformers 4.51.3 models/gpt2/modeling_gpt2.py GPT2Attention", "", ("gpt2",)),
            Row(
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
            Row("warms", "", "transformers 4.48.1 modeling_utils.py _load_state_dict_into_meta_model: one by one"),
            Row(
                "gptq-int4",
                "exllama_v1",
                "transformers 4.46.3 utils/quantization_config.py GPTQConfig.post_init: version 1, unless asked",
            ),
            Row("gptq-int8", "cuda_old", "auto-gptq 0.7.1 utils/import_utils.py dynamically_import_QuantLinear"),
            Row("logits", "shifted", "transformers 4.48.1 loss/loss_utils.py ForCausalLMLoss"),
            Row("whole_rotary", True, "transformers 4.48.1 models/phi3/modeling_phi3.py", "", ("phi3",)),
            Row("dora_again", True, "peft 0.13.2 tuners/lora/dora.py DoraLinearLayer.forward"),
            Row(
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
            Row(
                "no_checkpoints",
                False,
                "transformers 4.46.3 models/starcoder2/modeling_starcoder2.py",
                "",
                ("starcoder2",),
            ),
            Row(
                "uncapped",
                False,
                "transformers 4.46.3 models/gemma2/modeling_gemma2.py: eager instead",
                "",
                ("gemma2",),
            ),
            Row("sdpa_copies", "heads", "transformers 4.46.3 models/llama/modeling_llama.py LlamaSdpaAttention"),
            Row(
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
            Row("no_sdpa", True, "transformers 4.45.2 models/opt/modeling_opt.py OPT_ATTENTION_CLASSES", "", ("opt",)),
            Row("logits", "model", "transformers 4.45.2 models/llama/modeling_llama.py LlamaForCausalLM.forward"),
            *_OWN_LOSS,
        ),
        ("OPT's own eager attention clamps its scores to the lowest number, and keeps one more tensor of them",),
    ),
    Profile(
        "transformers-4.38",
        "transformers 4.36 to 4.39",
        "transformers 4.38.2, peft 0.9.0",
        "transformers-4.45",
        (
            _since("4.38.2"),
            Row("method.adapter_dtype", "weights", "peft 0.9.0 tuners/lora/layer.py LoraLayer.update_layer"),
            Row(
                "method.adapter_dtype",
                "fp32",
                "peft 0.9.0 tuners/lora/layer.py LoraLayer.update_layer: quantised weights are no floating ones",
                "quantised",
            ),
            Row(
                "no_sdpa",
                True,
                "transformers 4.38.2 models/phi/modeling_phi.py, and alike: no _supports_sdpa",
                "",
                ("gpt2", "gpt_neox", "opt", "phi", "stablelm"),
            ),
            Row("half_math", True, _BEFORE_2_5),
            Row(
                "rotary_tables",
                "gathered",
                "transformers 4.38.2 models/qwen2/modeling_qwen2.py Qwen2RotaryEmbedding, and alike",
                "",
                ("falcon", "gpt_neox", "mistral", "mixtral", "phi", "qwen2", "qwen2_moe", "stablelm"),
            ),
            Row(
                "rotary_tables",
                "computed",
                "transformers 4.38.2 models/llama/modeling_llama.py LlamaRotaryEmbedding",
                "",
                ("llama",),
            ),
            Row("last_logits", False, "transformers 4.38.2 models/llama/modeling_llama.py LlamaForCausalLM.forward"),
            Row(
                "cache",
                "legacy",
                "transformers 4.38.2 cache_utils.py DynamicCache.to_legacy_cache: generate has the tuple of before",
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
            Row(
                "no_sdpa",
                True,
                "transformers 4.35.2 models/llama/modeling_llama.py, and alike: no _supports_sdpa",
                "",
                ("gpt2", "gpt_bigcode", "gpt_neox", "llama", "mistral", "opt", "phi"),
            ),
            Row(
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
            Row(
                "method.quantization.kbit_preparation",
                "trl",
                "trl 0.24.0 models/utils.py prepare_peft_model, under bf16",
            ),
            Row("saved_tensors", "", "trl 0.24.0 models/activation_offloading.py OffloadActivations"),
        ),
        ("token accuracy copies the shifted logits after the loss: never as much as the loss itself has had",),
    ),
    Profile(
        "trl-0.13",
        "TRL 0.13",
        "trl 0.13.0 with transformers 4.48.1 and peft 0.13.2",
        "transformers-4.48",
        (
            Row(
                "method.quantization.kbit_preparation",
                "trl",
                "trl 0.13.0 trainer/sft_trainer.py, peft_module_casting_to_bf16 under bf16",
            ),
            Row("saved_tensors", "", "trl 0.13.0: none"),
        ),
    ),
    Profile(
        "axolotl-0.12",
        "Axolotl 0.12",
        "axolotl 0.12.2, which pins transformers 4.55.2, peft 0.17.0, bitsandbytes 0.47.0",
        "transformers-5",
        (
            _since("4.55.2"),
            Row("kernels.reentrant", True, "axolotl 0.12.2 utils/config/__init__.py normalize_config"),
            Row("tensor_parallel", "", "axolotl 0.12.2, with transformers 4.55: not read"),
            Row(
                "method.quantization.kbit_preparation",
                False,
                "axolotl 0.12.2 loaders/model.py: norms and embeddings are cast back where there is an adapter",
            ),
            Row("experts", "modules", "transformers 4.55.2 models/mixtral/modeling_mixtral.py"),
            Row(
                "saved_tensors",
                "",
                "axolotl 0.12.2 core/trainers/mixins/activation_checkpointing.py: trl's",
            ),
        ),
        ("sample packing and Axolotl's own offloading of activations",),
    ),
    Profile(
        "llamafactory-0.9",
        "LLaMA-Factory 0.9",
        "llamafactory 0.9.3 with transformers 4.51.3 and peft 0.15.2",
        "transformers-4.51",
        (
            Row("kernels.reentrant", True, "llamafactory 0.9.3 hparams/model_args.py use_reentrant_gc"),
            Row(
                "frozen_inputs",
                True,
                "llamafactory 0.9.3 model/model_utils/checkpointing.py prepare_model_for_training",
            ),
            Row("method.adapter_dtype", "fp32", "llamafactory 0.9.3 model/adapter.py cast_trainable_params_to_fp32"),
            Row("saved_tensors", "", "llamafactory 0.9.3: none"),
            Row(
                "method.quantization.kbit_preparation",
                False,
                "llamafactory 0.9.3 model/model_utils/checkpointing.py prepare_model_for_training: no casts by default",
            ),
        ),
        ("full and freeze tuning cast what trains to fp32 unless pure_bf16 is set: say precision amp for that",),
    ),
    Profile(
        "unsloth-2025",
        "Unsloth of January 2025",
        "unsloth 2025.1.5 with transformers 4.48",
        "transformers-4.48",
        (
            Row("has_family", False, "unsloth 2025.1.5 models/loader.py FastLanguageModel.from_pretrained"),
            Row(
                "has_family",
                True,
                "unsloth 2025.1.5 models/loader.py FastLanguageModel.from_pretrained",
                "",
                ("cohere", "gemma", "gemma2", "granite", "llama", "mistral", "qwen2"),
            ),
            Row("logits", "padded", "unsloth 2025.1.5 models/llama.py CausalLM_fast_forward"),
            Row("kernels.loss", "fused", "unsloth 2025.1.5 models/llama.py fused_linear_cross_entropy"),
            Row("saved_tensors", "", "unsloth 2025.1.5: none but its checkpoints'"),
            Row(
                "masks_padding",
                False,
                "unsloth 2025.1.5 models/llama.py LlamaModel_fast_forward: attention_mask = None while it trains",
            ),
            Row(
                "kernels.fused",
                ("rope", "rms_norm", "swiglu", "cross_entropy", "lora"),
                "unsloth 2025.1.5 kernels/",
            ),
            Row("sdpa_copies", "heads", "unsloth 2025.1.5 models/llama.py LlamaAttention_fast_forward"),
            Row("method.adapter_dtype", "fp32", "unsloth 2025.1.5 models/_utils.py prepare_model_for_kbit_training"),
            Row(
                "method.quantization.kbit_preparation",
                False,
                "unsloth 2025.1.5 models/_utils.py prepare_model_for_kbit_training: casts adapters only",
            ),
        ),
        ('what use_gradient_checkpointing="unsloth" leaves on the GPU (kernels.checkpointing offload is the rest)',),
    ),
    Profile(
        "torchtune",
        "torchtune 0.6",
        "torchtune 0.6.1, recipes/configs/llama3_1",
        "transformers-5",
        (
            Row("kernels.loss", "chunked", "torchtune 0.6.1 modules/loss/ce_chunked_output_loss.py"),
            Row("kernels.reentrant", False, "torchtune 0.6.1 training/activations.py"),
            Row("saved_tensors", "", "torchtune 0.6.1 training/_activation_offloading.py OffloadActivations"),
            Row("masks_padding", False, "torchtune 0.6.1 data/_collate.py padded_collate_sft: tokens and labels"),
            Row("method.adapter_dtype", "weights", "torchtune 0.6.1 modules/peft/lora.py under dtype: bf16"),
            Row("method.quantization.kbit_preparation", False, "torchtune 0.6.1: no counterpart"),
            Row("sdpa_copies", "heads", "torchtune 0.6.1 modules/attention.py"),
            Row("tensor_parallel", "", "torchtune 0.6.1 training/_distributed.py: not read"),
            Row("experts", "own", "torchtune 0.6.1 modules/moe/experts.py"),
        ),
        (
            "torchtune's RMSNorm and rotary positions, in fp32 throughout: transformers' are counted",
            "compiled models, packed samples and offloaded activations",
        ),
    ),
    Profile(
        "torchtune-0.1",
        "torchtune 0.1",
        "torchtune 0.1.1, recipes/full_finetune_single_device.py",
        "torchtune",
        (
            Row(
                "kernels.loss", "hf", "torchtune 0.1.1 recipes/full_finetune_single_device.py: torch's CrossEntropyLoss"
            ),
            Row("logits", "model", "torchtune 0.1.1 modules/transformer.py TransformerDecoder.forward"),
        ),
        ("the recipe keeps the shifted logits through backward: say loop.hold_outputs",),
    ),
    Profile(
        "torchtitan",
        "TorchTitan 0.3",
        "torchtitan 0.3.0",
        "transformers-5",
        (
            Row("kernels.reentrant", False, "torchtitan 0.3.0 distributed/activation_checkpoint.py"),
            Row("saved_tensors", "", "torchtitan 0.3.0: none"),
            Row(
                "masks_padding",
                False,
                "torchtitan 0.3.0 hf_datasets/text_datasets.py: packed samples, filled up with tokens; "
                "models/common/attention.py ScaledDotProductAttention.forward takes no mask",
            ),
            Row("fsdp_casts", True, "torchtitan 0.3.0 distributed/fsdp.py apply_fsdp_to_decoder"),
            Row("fsdp_reduces", "fp32", "torchtitan 0.3.0 config/configs.py TrainingConfig.mixed_precision_reduce"),
            Row("pipeline", "torch", "torchtitan 0.3.0 distributed/pipeline_parallel.py"),
            Row("sdpa_copies", "", "torchtitan 0.3.0 models/common"),
            Row("tensor_parallel", "torchtitan", "torchtitan 0.3.0 models/common/decoder_sharding.py"),
            Row("code", "torchtitan", "torchtitan 0.3.0 models/llama3/model.py", "", ("llama",)),
            Row("logits", "plain", "torchtitan 0.3.0 components/loss.py CrossEntropyLoss", "", ("llama",)),
            Row("experts", "own", "torchtitan 0.3.0 models/common"),
        ),
        (
            "FSDP2 keeps fp32 shards and computes in bf16: say precision amp",
            "its own layers are those of Llama, in full training; others are counted with transformers' layers",
            "the loss in chunks, selective checkpointing of operations, and compiled blocks and loss",
        ),
    ),
    Profile(
        "megatron-core",
        "Megatron-core 0.12",
        "megatron-core 0.12.0",
        "transformers-5",
        (
            Row("kernels.checkpointing", "none", "megatron-core 0.12.0 transformer/transformer_config.py"),
            Row("kernels.reentrant", True, "megatron-core 0.12.0 tensor_parallel/random.py CheckpointFunction"),
            Row("saved_tensors", "", "megatron-core 0.12.0 transformer/transformer_config.py cpu_offloading: not read"),
            Row("logits", "in_place", "megatron-core 0.12.0 tensor_parallel/cross_entropy.py"),
            Row("pipeline", "megatron", "megatron-core 0.12.0 pipeline_parallel/schedules.py"),
            Row("tensor_parallel", "megatron", "megatron-core 0.12.0 tensor_parallel/layers.py"),
            Row("experts", "own", "megatron-core 0.12.0 transformer/moe/experts.py"),
        ),
        (
            "gradients and masters in fp32: say precision mixed with grads fp32",
            "its own layers are those of a megatron_gpt config; other models are counted with transformers' layers",
            "latent attention, FP8, and the fused cross-entropy; context parallelism but of a megatron_gpt config",
        ),
    ),
    Profile(
        "fsdp_qlora",
        "Answer.AI's fsdp_qlora",
        "fsdp_qlora train.py at 02586ac with transformers 4.38",
        "transformers-4.38",
        (
            Row("kernels.reentrant", False, "fsdp_qlora train.py CheckpointImpl.NO_REENTRANT"),
            Row("saved_tensors", "", "fsdp_qlora train.py: none"),
            Row("optimizer.name", "adamw_torch", "fsdp_qlora train.py torch.optim.AdamW"),
            Row("method.quantization.kbit_preparation", False, "fsdp_qlora train.py: model.to(torch_dtype)"),
        ),
        ("quantised weights that FSDP divides are in bf16 storage: say quantization.storage; offloaded parameters",),
    ),
    Profile(
        "litgpt-2024",
        "LitGPT of 2024",
        "litgpt 0.5.3, lightning 2.2.5, bitsandbytes 0.42",
        "transformers-5",
        (
            Row("code", "litgpt", "litgpt 0.5.3 model.py"),
            Row("saved_tensors", "", "litgpt 0.5.3: none"),
            Row("masks_padding", False, "litgpt 0.5.3 data/base.py _sft_collate_fn: ids and labels alone"),
            Row("tensor_parallel", "litgpt", "litgpt 0.5.3 generate/tp.py: of generation alone"),
            Row("optimizer.name", "adamw_torch", "litgpt 0.5.3 finetune/lora.py: torch's AdamW"),
            Row("optimizer.name", "paged_adamw_32bit", "litgpt 0.5.3 utils.py instantiate_bnb_optimizer", "quantised"),
            Row("kernels.checkpointing", "none", "litgpt 0.5.3 finetune/lora.py: only under FSDP"),
            Row("kernels.loss", "chunked_lm_head", "litgpt 0.5.3 finetune/lora.py lm_head_chunk_size=128"),
            Row("method.adapter_dtype", "weights", "litgpt 0.5.3 lora.py, under lightning's bf16-true"),
            Row("method.quantization.skip", (), "litgpt 0.5.3 finetune/lora.py BitsandbytesPrecision"),
            Row("method.quantization.kbit_preparation", False, "litgpt 0.5.3 finetune/lora.py"),
            Row("cache", "static", "litgpt 0.5.3 generate/base.py main: set_kv_cache, for all tokens"),
            Row("further_caches", False, "litgpt 0.5.3 model.py KVCache: none but that"),
            Row("last_logits", False, "litgpt 0.5.3 model.py GPT.forward"),
            Row("few_rows", 1, "bitsandbytes 0.42 autograd/_functions.py matmul_4bit"),
            Row("warms", "", "litgpt 0.5.3 generate/base.py main: init_module on the GPU, tensor by tensor"),
            Row("converts", True, "lightning 2.2.5 fabric/plugins/precision/half.py convert_output"),
            Row("lingers", True, "litgpt 0.5.3 finetune/lora.py fit; batches that are cut are all as long"),
        ),
        (
            "of quantised weights: bitsandbytes' StableEmbedding, if it is there (in 0.5.3 it is)",
            "every block is checkpointed under FSDP: say kernels.checkpointing full",
        ),
    ),
    Profile(
        "litgpt-2023",
        "lit-gpt of autumn 2023",
        "lit_gpt at 98898ca and alike, torch 2.1, bitsandbytes 0.41",
        "litgpt-2024",
        (
            Row("lingers", False, "lit_gpt finetune/lora.py: the longest sample comes first, and once"),
            Row("half_math", True, _BEFORE_2_5),
        ),
    ),
)

_BY_NAME = {profile.name: profile for profile in PROFILES}


def find_profile(name: str) -> Profile:
    """The profile of that name. Raises UnknownNameError, which names the nearest."""
    found = _BY_NAME.get(name)
    if found is None and find_engine(name) is not None:
        raise SpecError(f"profile: {name} serves models, which is task generate alone (--method generate)", "profile")
    if found is None:
        engines = [engine for engine in engine_names() if engine[:3] == name.lower()[:3]]
        raise UnknownNameError("profile", name, (*_BY_NAME, *engines))
    return found


def rows(profile: Profile) -> Iterator[Row]:
    """The profile's rows, those of what it is like first: a later one goes over an earlier one."""
    if profile.like:
        yield from rows(_BY_NAME[profile.like])
    yield from profile.rows


@lru_cache(maxsize=1024)
def decided(name: str, model_type: str, quantised: bool) -> dict[str, Any]:
    """What the profile sets for such a run, by field. Raises UnknownNameError."""
    return {
        row.field: row.value
        for row in rows(find_profile(name))
        if (not row.model_types or model_type in row.model_types) and (not row.when or quantised)
    }
