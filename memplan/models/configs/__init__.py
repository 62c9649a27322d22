"""Defaults and structure of transformers' config classes, one `Family` per model_type.

There is one module per kind of model, each with `FAMILIES`. Dense decoders are rows of the tables in `dense`.
"""

from __future__ import annotations

from importlib import import_module

from memplan.models.configs.dense import dense_family
from memplan.models.facts import Family

# Module -> its model_types, so that only the needed module is imported.
_MODEL_TYPES: dict[str, str] = {
    "mla": "deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 glm4_moe_lite glm_moe_dsa kimi_k2 kimi_k25 kimi_k3 "
    "kimi_linear minicpm3",
    "moe": "dbrx deepseek ernie4_5_moe glm4_moe granitemoe hunyuan_v1_moe minimax_m2 mixtral olmoe phimoe "
    "qwen2_moe qwen3_moe",
    "vision": "gemma3 mistral3 mllama qwen2_vl qwen2_5_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe",
    "ssm": "falcon_mamba granitemoehybrid jamba mamba mamba2 nemotron_h qwen3_5_moe_text qwen3_5_text qwen3_next",
    "block_sparse": "minimax_m3_vl_text step3p7",
    "gemma": "gemma3n_text gemma4 gemma4_text",
    "llama4": "llama4 llama4_text",
    "gpt_oss": "gpt_oss mimo_v2_flash",
    "megatron": "megatron_gpt",
    "encoders": "bert roberta xlm-roberta t5 whisper vit",
}
MODULES: dict[str, str] = {
    model_type: module for module, model_types in _MODEL_TYPES.items() for model_type in model_types.split()
}


def family(model_type: str) -> Family:
    """Return the family of a model_type. Raises KeyError for an unsupported one."""
    module = MODULES.get(model_type)
    if module is None:
        return dense_family(model_type)
    return import_module(f"memplan.models.configs.{module}").FAMILIES[model_type]
