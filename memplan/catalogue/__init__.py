"""The memory that each kernel, method and optimizer takes, as data in the language of `memplan.core.ir`.

Each module of `families` covers one family of models. Its `BUILDERS` maps a model_type to the function that returns
the model's stack.
"""

from __future__ import annotations

from importlib import import_module

from memplan.catalogue.attention.attention import JOINED, flattened
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Stack
from memplan.models.model import ModelSpec

# The family module of each model_type. `build` imports only the one it needs.
_MODULES = {
    model_type: module
    for module, model_types in {
        "llama": "llama mistral ministral ministral3 qwen2 mimo qwen3 internlm3 hunyuan_v1_dense smollm3",
        "phi3": "phi3",
        "seed_oss": "seed_oss",
        "granite": "granite granitemoe",
        "ernie": "ernie4_5",
        "nemotron_nas": "nemotron-nas",
        "gpt": "gpt2 gpt_bigcode gpt_neo gptj",
        "neox": "gpt_neox phi nemotron starcoder2",
        "opt": "opt",
        "bloom_mpt": "bloom mpt",
        "falcon": "falcon",
        "published_code": "baichuan internlm2 minicpm qwen",
        "gemma": "gemma gemma2 gemma3_text",
        "cohere": "cohere cohere2",
        "olmo": "olmo olmo2 olmo3 exaone4",
        "glm": "glm glm4",
        "chatglm": "chatglm",
        "stablelm": "stablelm",
        "minicpm3": "minicpm3",
        "deepseek": "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa",
        "moe": "deepseek ernie4_5_moe glm4_moe hunyuan_v1_moe minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe",
        "kimi": "kimi_k25 kimi_k3",
        "kimi_linear": "kimi_linear",
        "deepseek_v4": "deepseek_v4",
        "qwen2_vl": "qwen2_vl qwen2_5_vl",
        "qwen3_vl": "qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe",
        "gemma3_vision": "gemma3",
        "mistral3": "mistral3",
        "mllama": "mllama",
        "dbrx": "dbrx",
        "qwen3_next": "qwen3_5_moe_text qwen3_5_text qwen3_next",
        "mamba": "falcon_mamba jamba mamba",
        "ssm": "granitemoehybrid mamba2 nemotron_h",
        "gemma3n": "gemma3n_text",
        "gemma4": "gemma4 gemma4_text",
        "llama4": "llama4_text",
        "llama4_vision": "llama4",
        "minimax_m3": "minimax_m3_vl_text",
        "step3p7": "step3p7",
        "megatron": "megatron_gpt",
        "gpt_oss": "gpt_oss mimo_v2_flash",
        "bert": "bert roberta xlm-roberta",
        "t5": "t5",
        "whisper": "whisper",
        "vit": "vit",
    }.items()
    for model_type in model_types.split()
}


def build(model: ModelSpec, wiring: Wiring, code: str = "transformers") -> Stack:
    """Return the model as a stack of operations with its weights, but without dtypes, method or loss.

    `code`: whose implementation to describe: `transformers`, `litgpt` or `torchtitan`.
    """
    if code == "torchtitan":
        return import_module("memplan.catalogue.families.torchtitan").build(model, wiring)
    if code == "litgpt":
        return import_module("memplan.catalogue.families.litgpt").build(model, wiring)
    wiring = wiring._replace(drops=model.probability("attention_dropout") > 0)
    module = import_module(f"memplan.catalogue.families.{_MODULES[model.model_type]}")
    stack: Stack = module.BUILDERS[model.model_type](model, wiring)
    if model.objective == "sequence_classification" and model.objectives[0] == "causal_lm":
        from memplan.catalogue.decoder.task_heads import classifying

        stack = classifying(model, stack)
    if model.get("output_router_logits", False):
        from memplan.catalogue.experts.routers import hold_router_logits
        from memplan.catalogue.kernels.rewriting import rewrite

        stack = rewrite(stack, lambda op: (hold_router_logits(op),))
    if not wiring.is_single_sequence or model.model_type not in JOINED:
        return stack
    from memplan.catalogue.kernels.rewriting import rewrite

    return rewrite(stack, lambda op: (flattened(op),))
