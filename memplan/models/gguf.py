"""Turning a GGUF file's metadata into the model's Hugging Face config.

Sizes in the metadata get transformers' names; switches that the metadata does not have, such as biases and norms, are
inferred from the file's tensors. Families whose files say too little are refused.
Sources: gguf 0.19 constants.py; transformers 5.24 integrations/ggml.py GGUF_CONFIG_MAPPING; llama.cpp conversion/.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from memplan.core.errors import ConfigError, UnknownNameError, UnsupportedModelError, printable
from memplan.models.headers import ArrayLength, Gguf, StoredTensor

# Keys below the architecture's prefix -> transformers' names in most families.
_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "rope.freq_base": "rope_theta",
}
_CAPPED = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
_EXPERTS = {"expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size"}
_GPT = {
    "context_length": "n_positions",
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
}

# Routed and shared experts, after the first dense layers.
_DEEPSEEK: dict[str, str | None] = {
    "expert_count": "n_routed_experts",
    "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace",
    **_EXPERTS,
}
_LATENT: dict[str, str | None] = {
    "attention.key_length": None,
    "attention.head_count_kv": None,
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "rope.dimension_count": "qk_rope_head_dim",
}
_DELTA: dict[str, str | None] = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "full_attention_interval": "full_attention_interval",
    "expert_count": "num_experts",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    **_EXPERTS,
}

# general.architecture -> model_type, and keys in addition to or instead of those of `_KEYS`; None leaves a key out.
ARCHITECTURES: dict[str, tuple[str, Mapping[str, str | None]]] = {
    "command-r": ("cohere", {}),
    "cohere2": ("cohere2", {}),
    "deepseek2": ("deepseek_v2", {**_LATENT, **_DEEPSEEK}),
    "ernie4_5": ("ernie4_5", {}),
    "exaone4": ("exaone4", {}),
    "falcon": ("falcon", {"attention.head_count_kv": "num_kv_heads", "feed_forward_length": "ffn_hidden_size"}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", _CAPPED),
    "gemma3": ("gemma3_text", {}),
    "glm4": ("glm4", {}),
    "glm4moe": ("glm4_moe", _DEEPSEEK),
    "gpt-oss": (
        "gpt_oss",
        {
            "feed_forward_length": None,
            "expert_feed_forward_length": "intermediate_size",
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
        },
    ),
    "gpt2": ("gpt2", {**dict.fromkeys(_KEYS), **_GPT}),
    "granite": ("granite", {}),
    "granitemoe": ("granitemoe", {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}),
    "hunyuan-dense": ("hunyuan_v1_dense", {}),
    "internlm2": ("internlm2", {"attention.key_length": None}),
    "llama": ("llama", {"rope.dimension_count": "head_dim"}),
    "minicpm": ("minicpm", {"attention.key_length": None}),
    "mistral3": ("ministral3", {}),
    "nemotron": ("nemotron", {}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmoe": ("olmoe", {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}),
    "phi2": ("phi", {}),
    "phi3": ("phi3", {"attention.sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2moe": (
        "qwen2_moe",
        {
            "expert_count": "num_experts",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
            **_EXPERTS,
        },
    ),
    "qwen3": ("qwen3", {}),
    "qwen3moe": ("qwen3_moe", {"expert_count": "num_experts", **_EXPERTS}),
    "qwen3next": ("qwen3_next", _DELTA),
    "seed_oss": ("seed_oss", {}),
    "smollm3": ("smollm3", {}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {}),
}

# Boolean keys of a family's config, each with the tensor of the first layer that exists if it is true.
_SWITCHES: dict[str, dict[str, str]] = {
    "cohere": {"use_qk_norm": "attn_q_norm.weight"},
    "falcon": {"new_decoder_architecture": "attn_norm_2.weight", "bias": "attn_qkv.bias"},
    "glm4": {"attention_bias": "attn_q.bias"},
    "glm4_moe": {"attention_bias": "attn_q.bias", "use_qk_norm": "attn_q_norm.weight"},
    "gpt_oss": {"attention_bias": "attn_q.bias"},
    "granite": {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_down.bias"},
    "internlm2": {"bias": "attn_q.bias"},
    "llama": {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_down.bias"},
    "minicpm": {"attention_bias": "attn_q.bias"},
    "phi": {"qk_layernorm": "attn_q_norm.weight"},
    "qwen3": {"attention_bias": "attn_q.bias"},
    "seed_oss": {
        "attention_bias": "attn_q.bias",
        "attention_out_bias": "attn_output.bias",
        "mlp_bias": "ffn_down.bias",
    },
    "stablelm": {"use_qkv_bias": "attn_q.bias", "qk_layernorm": "attn_q_norm.weight"},
    "starcoder2": {"use_bias": "attn_q.bias"},
}

# Tensors that are not parameters of transformers' model, which computes these tables from its config.
TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_BUFFER = "exp_probs_b.bias"  # added to a router's scores; a buffer in transformers' models


def config_of(file: Gguf, where: str) -> dict[str, Any]:
    """Return the config with Hugging Face's keys.

    Raises UnsupportedModelError for an unknown architecture, ConfigError if a required key is missing.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ConfigError(f"model: {where} has no general.architecture", "model")
    if file.metadata.get("general.type", "model") != "model":
        kind = printable(str(file.metadata["general.type"]), 40)
        raise ConfigError(f"model: {where} is a GGUF file of the kind {kind}, not a model", "model")
    if architecture not in ARCHITECTURES:
        near = " or ".join(UnknownNameError("model", architecture, ARCHITECTURES).nearest)
        raise UnsupportedModelError(
            f"model: {where} has GGUF's architecture {printable(architecture, 40)!r}, which is not supported yet as "
            f"GGUF; give its config.json. The nearest supported: {near}",
            "model",
        )
    model_type, own = ARCHITECTURES[architecture]
    shapes = {tensor.name: tensor.shape for tensor in file.tensors}
    config: dict[str, Any] = {"model_type": model_type}
    for key, name in {**_KEYS, **own}.items():
        value = file.metadata.get(f"{architecture}.{key}")
        if name is not None and value is not None and name not in config:
            config[name] = _uniform(value, f"{architecture}.{key}", where)
    if model_type == "llama" and file.metadata.get("llama.expert_count"):
        config.update(model_type="mixtral", num_local_experts=file.metadata["llama.expert_count"])
        config["num_experts_per_tok"] = file.metadata.get("llama.expert_used_count", 2)
    config["vocab_size"] = _vocabulary(file.metadata, shapes, architecture, where)
    config["tie_word_embeddings"] = "output.weight" not in shapes
    for name, tensor in _SWITCHES.get(config["model_type"], {}).items():
        config[name] = f"blk.0.{tensor}" in shapes
    if model_type == "stablelm":  # a second norm per layer means that attention and MLP do not share one
        config["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in shapes
    drafting = file.metadata.get(f"{architecture}.nextn_predict_layers")
    if type(drafting) is int and type(config.get("num_hidden_layers")) is int:  # block_count includes the MTP layers
        config["num_hidden_layers"] -= drafting
    _add_family_keys(config, file.metadata, architecture, where)
    _add_expert_widths(config, shapes)
    title = file.metadata.get("general.name")
    return {**config, "_name_or_path": title} if isinstance(title, str) else config


def _add_family_keys(config: dict[str, Any], metadata: Mapping[str, Any], architecture: str, where: str) -> None:
    """Add config keys that must be computed from the file's keys. Raises ConfigError if one of those is missing."""

    def integer(key: str) -> int:
        value = metadata.get(f"{architecture}.{key}")
        if type(value) is not int:
            raise ConfigError(f"model: {where} has no {architecture}.{key}", "model")
        return value

    match config["model_type"]:
        case "deepseek_v2":
            # Files converted for attention in the latent space keep the widths of heads under keys of their own.
            suffix = "_mla" if f"{architecture}.attention.key_length_mla" in metadata else ""
            config["qk_nope_head_dim"] = integer(f"attention.key_length{suffix}") - integer("rope.dimension_count")
            config["v_head_dim"] = integer(f"attention.value_length{suffix}")
            config["num_key_value_heads"] = config.get("num_attention_heads")
            config.setdefault("q_lora_rank", None)
            if metadata.get(f"{architecture}.expert_gating_func") == _SIGMOID:
                config["model_type"] = "deepseek_v3"
        case "falcon":
            config["multi_query"] = not config["new_decoder_architecture"] and config.get("num_kv_heads") == 1
            config.update(parallel_attn=True, alibi=False)
        case "qwen3_next":
            config["linear_value_head_dim"] = integer("ssm.inner_size") // max(1, integer("ssm.time_step_rank"))
        case _:
            pass


_SIGMOID = 2  # gguf constants.py ExpertGatingFuncType


def _add_expert_widths(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Add the widths of experts, which older files do not have as keys, from the shapes of their weights."""
    stacks = {
        "moe_intermediate_size": "ffn_gate_exps.weight",
        "shared_expert_intermediate_size": "ffn_gate_shexp.weight",
    }
    for name, tensor in stacks.items() if config["model_type"] in ("qwen2_moe", "qwen3_moe") else ():
        shape = next((shape for key, shape in shapes.items() if key.endswith(f".{tensor}")), ())
        if len(shape) > 1:
            config[name] = shape[-2]


def parameters_in(tensors: tuple[StoredTensor, ...]) -> int:
    """Return the number of parameters of transformers' model that a GGUF file holds."""
    return sum(t.elements for t in loaded(tensors) if t.name not in TABLES and not t.name.endswith(_BUFFER))


def loaded(tensors: tuple[StoredTensor, ...]) -> tuple[StoredTensor, ...]:
    """Return a file's tensors without those of multi-token prediction layers, which only serve drafting."""
    drafting = {tensor.name.rpartition(".nextn.")[0] for tensor in tensors if ".nextn." in tensor.name}
    return tuple(t for t in tensors if ".".join(t.name.split(".")[:2]) not in drafting) if drafting else tensors


def _uniform(value: Any, key: str, where: str) -> Any:
    """Return a value for the whole model, also if the file lists it once per layer.

    Raises UnsupportedModelError if it differs between layers.
    """
    if isinstance(value, tuple) and value:
        per_layer = cast(tuple[Any, ...], value)
        if per_layer.count(per_layer[0]) == len(per_layer):
            return per_layer[0]
    if isinstance(value, (tuple, ArrayLength)):
        raise UnsupportedModelError(f"model: {where}: {key} differs between layers, not supported yet", "model")
    return value


def _vocabulary(metadata: Mapping[str, Any], shapes: Mapping[str, Any], architecture: str, where: str) -> Any:
    """Return the number of rows of the embeddings."""
    table = shapes.get("token_embd.weight")
    if table is not None and len(table) == 2:
        return table[0]
    tokens = metadata.get("tokenizer.ggml.tokens")
    stated = metadata.get(f"{architecture}.vocab_size", tokens.number if isinstance(tokens, ArrayLength) else None)
    if stated is None:
        raise ConfigError(f"model: {where} has neither token_embd.weight nor vocab_size", "model")
    return stated
