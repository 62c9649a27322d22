"""Megatron-core's GPT, as a config with Hugging Face's names where there are any, else with Megatron's.

gated_mlp                        two up projections, one gating the other (--swiglu)
norm_type                        layernorm or rmsnorm (--normalization)
position_embedding_type          learned_absolute (or learned), rope or none
use_bias                         linear layers have biases (unless --disable-bias-linear)
add_qkv_bias                     the projection of queries, keys and values has one (--add-qkv-bias)
hidden_dropout                   dropout of embeddings and of both residual branches
attention_dropout                dropout of attention probabilities; default: hidden_dropout
qk_layernorm                     queries and keys are normalised per head
gradient_accumulation_fusion     products add weight gradients to the main gradients themselves (unless
                                 --no-gradient-accumulation-fusion)
create_attention_mask            the data loader makes a mask (unless --no-create-attention-mask-in-dataloader)
transformer_impl                 transformer_engine, or local for the same layers from torch and apex
num_local_experts                experts (also num_experts, n_routed_experts)
num_experts_per_tok              experts per token
moe_intermediate_size            width of an expert
shared_expert_intermediate_size  width of the shared expert
moe_layer_freq                   n if every n-th layer has experts, or a list of ones and zeros
moe_capacity_factor              capacity of an expert, as a multiple of an even share of the tokens; null for no
                                 limit
moe_token_dispatcher_type        allgather or alltoall
moe_grouped_gemm                 experts are multiplied in one grouped kernel, not one after the other
moe_router_dtype                 fp32, or null for the model's dtype
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.core.errors import ConfigError, UnsupportedModelError
from memplan.models.configs.layer_lists import listed
from memplan.models.facts import Family, LengthFacts, ModelFacts
from memplan.models.family_facts import AttentionFacts, GenerationFacts, ParallelFacts, ServingFacts
from memplan.models.layers import Layer, as_json
from memplan.models.tensor_plans import TensorParallelPlan

# Keys that are added to the config of one rank's part of a model: the number of ranks that divide the experts, the
# matrices of each expert, and all other matrices.
EXPERT_RANKS, EXPERT_TENSOR_RANKS, TENSOR_RANKS = "expert_ranks", "expert_tensor_ranks", "tensor_ranks"

NORMS = {"layernorm": True, "layer_norm": True, "rmsnorm": False, "rms_norm": False}
POSITIONS = ("learned_absolute", "rope", "none")
_UNREAD = ("kv_lora_rank", "fp32_residual_connection", "mtp_num_layers", "num_nextn_predict_layers")


def gpt_config(m: ModelFacts) -> dict[str, Any] | None:
    """Return the config of the GPT that Megatron-core has in place of a model of another family, or None without one.

    Source: megatron-bridge 0.3.1 models/conversion/model_bridge.py MegatronModelBridge.CONFIG_MAPPING.
    """
    own = m.family.parallel.gpt
    if own is None or m.objective != "causal_lm":
        return None
    axes, sparse_layers = m.axes(), [int(layer.ffn == "experts") for layer in m.layers]
    mixture = {
        "num_local_experts": axes.get("E"),
        "num_experts_per_tok": axes.get("e"),
        "moe_intermediate_size": axes.get("m"),
        "moe_layer_freq": sparse_layers,
    }
    return {
        "model_type": "megatron_gpt",
        "hidden_size": m.hidden_size,
        "num_hidden_layers": m.num_hidden_layers,
        "num_attention_heads": m.num_attention_heads,
        "num_key_value_heads": m.num_key_value_heads,
        "head_dim": m.head_dim,
        "intermediate_size": m.intermediate_size,
        "vocab_size": m.vocab_size,
        "max_position_embeddings": m.max_position_embeddings,
        "tie_word_embeddings": m.tie_word_embeddings,
        "hidden_act": m.hidden_act,
        "attention_dropout": m.probability("attention_dropout"),
        **own,
        **({"use_bias": True} if m.get("mlp_bias", False) else {}),
        **({"add_qkv_bias": True} if m.get("attention_bias", False) else {}),
        **(mixture if any(sparse_layers) else {}),
    }


def has_mean(m: ModelFacts) -> bool:
    """Whether norms are LayerNorms, with a mean and a bias, and not RMSNorms."""
    word = _word(m, "norm_type", "layernorm").lower()
    if word not in NORMS:
        raise _unsupported("norm_type", word, ("layernorm", "rmsnorm"), "not supported")
    return NORMS[word]


def positions_of(m: ModelFacts) -> str:
    """Return the kind of position embeddings, one of `POSITIONS`; `learned` is another name of the first."""
    if m.config.get("position_embedding_type") == "learned":
        return POSITIONS[0]
    return _choice(m, "position_embedding_type", POSITIONS[0], POSITIONS)


def uses_engine(m: ModelFacts) -> bool:
    """Whether the layers are Transformer Engine's."""
    known = ("transformer_engine", "local")
    return _choice(m, "transformer_impl", known[0], known, "not supported") == known[0]


def fuses_accumulation(m: ModelFacts) -> bool:
    """Whether products add weight gradients to the main gradients themselves."""
    return m.get("gradient_accumulation_fusion", True)


def is_gated(m: ModelFacts) -> bool:
    """Whether the MLP has a gate."""
    return m.get("gated_mlp", m.hidden_act == "swiglu")


def attention_drops(m: ModelFacts) -> bool:
    """Whether attention has dropout; by default, if hidden states have it."""
    return m.probability("hidden_dropout" if m.config.get("attention_dropout") is None else "attention_dropout") > 0


def dispatches_all(m: ModelFacts) -> bool:
    """Whether every rank gathers all tokens and picks those of its experts (allgather), instead of alltoall."""
    return _choice(m, "moe_token_dispatcher_type", "allgather", ("allgather", "alltoall")) == "allgather"


def groups_products(m: ModelFacts) -> bool:
    return m.get("moe_grouped_gemm", False)


def router_in_fp32(m: ModelFacts) -> bool:
    return _choice(m, "moe_router_dtype", "", ("fp32", "")) == "fp32"


def experts_of(m: ModelFacts) -> int:
    """Return the number of experts; 0 for a dense model."""
    key = next((key for key in ("num_local_experts", "num_experts", "n_routed_experts") if m.config.get(key)), None)
    return m.config_int(key) if key else 0


def sparse(m: ModelFacts) -> list[bool]:
    """Return whether each layer has experts: every n-th from the first on, or as a list says."""
    value: object = m.config.get("moe_layer_freq")
    if isinstance(value, tuple):
        return [bool(flag) for flag in listed(m, "moe_layer_freq") or ()]
    every = m.config_int("moe_layer_freq", 1)
    return [i % every == 0 for i in range(m.num_hidden_layers)]


def padded(vocabulary: int, t: int = 1) -> int:
    """Return the rows of the token embeddings on one of `t` ranks, each padded to a multiple of 128.

    Source: Megatron-LM 0.12 training/tokenizer/tokenizer.py _vocab_size_with_padding.
    """
    return -(-vocabulary // (128 * t)) * 128


def _word(m: ModelFacts, key: str, default: str) -> str:
    value: object = m.config.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise ConfigError(f"config: {key} must be a string, not {as_json(value)}", key)
    return value


def _choice(m: ModelFacts, key: str, default: str, known: tuple[str, ...], refused: str = "not supported yet") -> str:
    word = _word(m, key, default)
    if word not in known:
        raise _unsupported(key, word, known, refused)
    return word


def _unsupported(key: str, word: str, known: tuple[str, ...], refused: str) -> UnsupportedModelError:
    names = ", ".join(name or "null" for name in known)
    return UnsupportedModelError(f"{key}: {as_json(word)} is {refused}; supported: {names}", key)


def _layers(m: ModelFacts) -> tuple[Layer, ...]:
    has_mean(m)  # called, as some below, to check the config
    uses_engine(m)
    unread = next((key for key in _UNREAD if m.config.get(key)), None)
    if unread is not None:
        raise UnsupportedModelError(f"{unread}: is not supported yet for megatron_gpt", unread)
    if positions_of(m) == "learned_absolute" and m.max_position_embeddings is None:
        raise ConfigError(
            "config: no max_position_embeddings, which learned_absolute positions need", "max_position_embeddings"
        )
    if is_gated(m) and not m.config.get("intermediate_size"):
        raise ConfigError("config: no intermediate_size", "intermediate_size")
    layer = Layer(False, True, m.num_key_value_heads, m.intermediate_size)
    if not experts_of(m):
        return (layer,) * m.num_hidden_layers
    chosen = m.config_int("num_experts_per_tok")
    if chosen > experts_of(m):
        raise ConfigError(
            f"config: num_experts_per_tok {chosen} is more than the {experts_of(m)} experts", "num_experts_per_tok"
        )
    dispatches_all(m)
    router_in_fp32(m)
    return tuple(layer._replace(ffn="experts" if e else "dense") for e in sparse(m))


def _axes(m: ModelFacts) -> Mapping[str, int]:
    """Return the axes; `eg` ranks exchange tokens, and `et` of them divide each expert's matrices."""
    experts = experts_of(m)
    if not experts:
        return {"v": padded(m.vocab_size)}
    ep, et, t = m.config_int(EXPERT_RANKS, 1), m.config_int(EXPERT_TENSOR_RANKS, 1), m.config_int(TENSOR_RANKS, 1)
    shared = m.config_int("shared_expert_intermediate_size", 0, least=0)
    return {
        "v": padded(m.vocab_size),
        "E": experts,
        "Eown": experts // ep,
        "e": m.config_int("num_experts_per_tok"),
        "m": m.config_int("moe_intermediate_size", m.intermediate_size * t) // et,
        "eg": ep * et,
        "et": et,
        "capacity": round(1000 * m.get("moe_capacity_factor", 1.0)),
        **({"fs": shared // t} if shared else {}),
    }


def _longest(m: ModelFacts) -> int:
    """Return the number of learned positions; other kinds of positions have no limit."""
    learned = positions_of(m) == "learned_absolute"
    return m.max_position_embeddings if learned and m.max_position_embeddings else 2**40


# Source: Megatron-LM 0.12 training/arguments.py; megatron-core 0.12 transformer/transformer_config.py.
FAMILIES = {
    "megatron_gpt": Family(
        {
            "hidden_act": "gelu",
            "hidden_dropout": 0.1,
            "tie_word_embeddings": True,
            "use_bias": True,
            "partial_rotary_factor": 1.0,
        },
        layers=_layers,
        axes=_axes,
        acts=("gelu", "gelu_pytorch_tanh", "silu", "swiglu", "relu2", "squared_relu"),
        lengths=LengthFacts(learned=True, longest=_longest),
        stack="megatron",
        attention=AttentionFacts(single_sequence="views"),
        generation=GenerationFacts(is_modelled=False),
        parallel=ParallelFacts(
            megatron=TensorParallelPlan(("linear_qkv", "linear_fc1"), ("linear_proj", "linear_fc2"))
        ),
        serving=ServingFacts(is_modelled=False),
    )
}
