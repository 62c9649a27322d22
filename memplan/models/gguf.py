"""Turning a GGUF file's metadata into the model's Hugging Face config.

Sizes in the metadata get transformers' names; switches that the metadata does not have, such as biases and norms, are
inferred from the file's tensors. Families whose files say too little are refused.
Sources: gguf 0.19 constants.py; transformers 5.24 integrations/ggml.py GGUF_CONFIG_MAPPING; llama.cpp conversion/.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from memplan.core.errors import ConfigError, UnknownNameError, UnsupportedModelError, printable
from memplan.models.configs import families, family
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


def architectures() -> dict[str, str]:
    """Map each architecture that is read to its model_type."""
    return {
        row.checkpoint.gguf: model_type
        for model_type, row in families().items()
        if row.checkpoint.gguf_keys is not None and not row.keys.decoder
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
    known = architectures()
    if architecture not in known:
        near = " or ".join(UnknownNameError("model", architecture, sorted(known)).suggestions)
        raise UnsupportedModelError(
            f"model: {where} has GGUF's architecture {printable(architecture, 40)!r}, which is not supported yet as "
            f"GGUF; give its config.json. The nearest supported: {near}",
            "model",
        )
    model_type = known[architecture]
    own = family(model_type).checkpoint.gguf_keys or {}
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
    for name, tensor in family(config["model_type"]).checkpoint.gguf_switches.items():
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
