"""What each model_type's config class calls its sizes and fills in, and which families memplan has no stack for yet."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from memplan.errors import ConfigError, UnsupportedModelError
from memplan.families import MODULES

_LONGEST = 80  # letters of a name that an error repeats

# Standard name -> what a config calls it, in the order looked up.
NAMES: dict[str, tuple[str, ...]] = {
    name: (name,)
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "head_dim",
        "max_position_embeddings",
        "hidden_act",
    )
}
# The same where a family's config class has other names (its attribute_map and what it takes from older configs); ()
# where it has none, so that a key of another family means nothing. Read where MODEL_TYPES is from.
_EQUAL_HEADS: dict[str, tuple[str, ...]] = {"num_key_value_heads": (), "head_dim": ()}
_GPT: dict[str, tuple[str, ...]] = {
    **_EQUAL_HEADS,
    "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "intermediate_size": ("n_inner",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "hidden_act": ("activation_function",),
}
OWN_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "baichuan": {**_EQUAL_HEADS, "max_position_embeddings": ("max_position_embeddings", "model_max_length")},
    "bloom": {
        **_EQUAL_HEADS,
        "hidden_size": ("n_embed", "hidden_size"),
        "num_hidden_layers": ("num_hidden_layers", "n_layer"),
        "num_attention_heads": ("num_attention_heads", "n_head"),
        "intermediate_size": (),
        "max_position_embeddings": ("seq_length",),
        "hidden_act": (),
    },
    "chatglm": {
        "num_hidden_layers": ("num_hidden_layers", "num_layers"),
        "num_key_value_heads": ("multi_query_group_num",),
        "intermediate_size": ("ffn_hidden_size",),
        "vocab_size": ("padded_vocab_size",),
        "head_dim": ("kv_channels",),
        "max_position_embeddings": ("seq_length",),
    },
    "exaone": {
        "num_hidden_layers": ("num_layers", "num_hidden_layers"),
        "hidden_act": ("activation_function", "hidden_act"),
    },
    "falcon": {
        "hidden_size": ("n_embed", "hidden_size"),
        "num_key_value_heads": ("num_kv_heads",),
        "intermediate_size": ("ffn_hidden_size",),
        "head_dim": (),
        "hidden_act": ("activation",),
    },
    "gemma2": {"hidden_act": ("hidden_activation",)},
    "gemma3_text": {"hidden_act": ("hidden_activation",)},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        **_EQUAL_HEADS,
        "num_hidden_layers": ("num_hidden_layers", "num_layers"),
        "num_attention_heads": ("num_attention_heads", "num_heads"),
        "hidden_act": ("activation_function",),
    },
    "gpt_neox": _EQUAL_HEADS,
    "gptj": _GPT,
    "internlm2": {"head_dim": ()},
    "minicpm": {"head_dim": ()},
    "mpt": {
        **_EQUAL_HEADS,
        "hidden_size": ("hidden_size", "d_model"),
        "num_hidden_layers": ("num_hidden_layers", "n_layers"),
        "num_attention_heads": ("num_attention_heads", "n_heads"),
        "intermediate_size": (),
        "max_position_embeddings": ("max_seq_len",),
        "hidden_act": (),
    },
    "nemotron-nas": {"num_key_value_heads": (), "intermediate_size": ()},
    "opt": {**_EQUAL_HEADS, "intermediate_size": ("ffn_dim",), "hidden_act": ("activation_function",)},
    "qwen": {  # its first configs were written like GPT-2's
        "hidden_size": ("hidden_size", "n_embd"),
        "num_hidden_layers": ("num_hidden_layers", "n_layer"),
        "num_attention_heads": ("num_attention_heads", "n_head"),
        "num_key_value_heads": (),
        "intermediate_size": ("intermediate_size", "ffn_hidden_size"),
        "head_dim": ("kv_channels",),
        "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    },
    "stablelm": {"head_dim": ()},
}

_DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "n_positions": 1024}
_LLAMA = {"intermediate_size": 11008}
_QWEN2 = {"num_key_value_heads": 32, "intermediate_size": 22016}
_GLM = {
    "head_dim": 128,
    "num_key_value_heads": 2,
    "intermediate_size": 13696,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}

# What a model's config class fills in where the config is silent, by model_type: only what memory depends on, and not
# the sizes that no two models share. A window or a share of rotated dimensions counts where it stands here only.
# Source: transformers 5.24 configuration classes; where it has none, the code published with the model's card.
MODEL_TYPES: dict[str, dict[str, Any]] = {
    "baichuan": {"intermediate_size": None},  # 11008 in the code of the 7B model, 13696 in that of the 13B
    "bloom": {"tie_word_embeddings": True},
    "chatglm": {
        "partial_rotary_factor": 0.5,
        "multi_query_group_num": 1,
        "ffn_hidden_size": 13696,
        "kv_channels": 128,
        "seq_length": 2048,
    },
    "cohere": {"tie_word_embeddings": True, "intermediate_size": 22528},
    "cohere2": {"tie_word_embeddings": True, "intermediate_size": 22528, "sliding_window": 4096},
    "ernie4_5": {
        "tie_word_embeddings": True,
        "head_dim": 128,
        "num_key_value_heads": 2,
        "intermediate_size": 3072,
    },
    "exaone": {"num_key_value_heads": 8, "intermediate_size": 14336},
    "exaone4": {"num_key_value_heads": 32, "intermediate_size": 16384, "sliding_window": 4096},
    "falcon": {"tie_word_embeddings": True, "multi_query": True, "parallel_attn": True, "activation": "gelu"},
    "gemma": {"tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 16, "intermediate_size": 24576},
    "gemma2": {
        "tie_word_embeddings": True,
        "head_dim": 256,
        "num_key_value_heads": 4,
        "intermediate_size": 9216,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "tie_word_embeddings": True,
        "head_dim": 256,
        "num_key_value_heads": 4,
        "intermediate_size": 9216,
        "sliding_window": 4096,
    },
    "glm": _GLM,
    "glm4": _GLM,
    "gpt2": {"tie_word_embeddings": True, "activation_function": "gelu_new", **_DROPOUT},
    "gpt_bigcode": {
        "tie_word_embeddings": True,
        "activation_function": "gelu_pytorch_tanh",
        "multi_query": True,
        **_DROPOUT,
    },
    "gpt_neo": {"tie_word_embeddings": True, "activation_function": "gelu_new", "max_position_embeddings": 2048},
    "gpt_neox": {
        "rotary_pct": 0.25,
        "intermediate_size": 24576,
        "attention_bias": True,
        "use_parallel_residual": True,
        "hidden_act": "gelu",
    },
    "gptj": {"rotary_dim": 64, "activation_function": "gelu_new", "n_positions": 2048},
    "granite": _LLAMA,
    "hunyuan_v1_dense": _LLAMA,
    "internlm2": {"bias": True, **_LLAMA},
    "internlm3": {"num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 10240},
    "llama": _LLAMA,
    "mimo": _QWEN2,
    "minicpm": {"tie_word_embeddings": True, **_LLAMA},
    "ministral": {"num_key_value_heads": 8, "intermediate_size": 14336, "sliding_window": 4096},
    "ministral3": {"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336, "sliding_window": None},
    "mistral": {"num_key_value_heads": 8, "intermediate_size": 14336, "sliding_window": 4096},
    "mpt": {"tie_word_embeddings": True, "max_seq_len": 2048},
    "nemotron": {"partial_rotary_factor": 0.5, "intermediate_size": 24576, "hidden_act": "relu2"},
    "nemotron-nas": {},
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "olmo3": {**_LLAMA, "sliding_window": 4096},
    "opt": {
        "tie_word_embeddings": True,
        "dropout": 0.1,
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
    },
    "phi": {"partial_rotary_factor": 0.5, "intermediate_size": 8192, "hidden_act": "gelu_new"},
    "phi3": {"partial_rotary_factor": 1.0, "intermediate_size": 8192, "sliding_window": None},
    "qwen": {"rotary_pct": 1.0, "intermediate_size": 22016, "kv_channels": 128},
    "qwen2": {**_QWEN2, "use_sliding_window": False, "sliding_window": 4096},
    "qwen3": {**_QWEN2, "head_dim": 128, "use_sliding_window": False, "sliding_window": 4096},
    "seed_oss": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 27648,
        "attention_bias": True,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
    },
    "smollm3": {
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "intermediate_size": 11008,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "stablelm": {"partial_rotary_factor": 0.25, "num_key_value_heads": 32, "intermediate_size": 6912},
    "starcoder2": {
        "tie_word_embeddings": True,
        "num_key_value_heads": 2,
        "intermediate_size": 12288,
        "sliding_window": None,
        "use_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
    },
}

# Families that transformers builds with another's classes: the config differs, the model does not.
BUILT_AS = {"exaone": "llama"}

# Families whose class has no such key; with it, the others add biases to the MLP's linears.
NO_MLP_BIAS = frozenset(("hunyuan_v1_dense", "mimo", "ministral", "ministral3", "mistral", "qwen2", "qwen3"))

_KIMI = {
    "model_max_length": "max_position_embeddings",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_experts": "n_routed_experts",
    "num_local_experts": "n_routed_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}

# Other names of keys that are no sizes: older ones, and those that a config class of transformers 5.24 writes.
RENAMED = {
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "qwen3_vl_moe": {"num_local_experts": "num_experts"},
    "internlm3": {"qkv_bias": "attention_bias", "bias": "mlp_bias"},
    "kimi_k3": _KIMI,
    "kimi_linear": _KIMI,
}

# Families whose decoders transformers 5.24 also builds to classify sequences, or to reward them: GenericForSequence-
# Classification of modeling_layers.py.
CLASSIFIERS = frozenset(
    (
        *("exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "hunyuan_v1_dense", "llama", "ministral"),
        *("ministral3", "mistral", "nemotron", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "seed_oss"),
        *("smollm3", "stablelm", "starcoder2"),
    )
)

# Families whose MLPs, which no gate multiplies, have their activation written out where it is no kernel of its own.
WRITE_OUT = frozenset(
    ("falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "nemotron", "opt", "phi", "starcoder2")
)

LEARNED_POSITIONS = frozenset(("gpt2", "gpt_bigcode", "gpt_neo", "opt"))
POSITION_TABLES = LEARNED_POSITIONS | {"gptj"}  # models that hold a row a position, and so must know how many


# What a key of a config says of a model that memplan has no stack for yet, or that is no text decoder.
_KINDS = {
    "num_experts": "mixture of experts",
    "num_local_experts": "mixture of experts",
    "n_routed_experts": "mixture of experts",
    "moe_num_experts": "mixture of experts",
    "kv_lora_rank": "multi-head latent attention",
    "vision_config": "vision-language",
    "visual": "vision-language",
    "mm_vision_tower": "vision-language",
    "audio_config": "audio-language",
    "audio": "audio-language",
    "ssm_cfg": "state space",
    "state_size": "state space",
    "mamba_d_state": "state space hybrid",
    "linear_num_key_heads": "linear attention hybrid",
    "hidden_size_per_layer_input": "embeddings in every layer",
    "position_encoding_2d": "the first ChatGLM",
    "use_bidirectional_attention": "encoder",
    "is_encoder_decoder": "encoder-decoder",
    "add_cross_attention": "encoder-decoder",
}
# The same by what a model_type contains, where no key says so.
_KINDS_BY_NAME = {
    "bert": "encoder",
    "electra": "encoder",
    "t5": "encoder-decoder",
    "vit": "vision encoder",
    "dbrx": "mixture of experts",
    "moe": "mixture of experts",
    "rwkv": "recurrent",
    "recurrent": "recurrent",
}


def family_of(config: Mapping[str, Any]) -> str:
    """The config's model_type, if memplan has a stack for it."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError("config: no model_type, so not a Hugging Face model config", "model_type")
    if model_type in MODULES:
        return model_type
    shown = repr(model_type) if len(model_type) <= _LONGEST else f"{model_type[:_LONGEST]!r}..."
    kinds = dict.fromkeys(kind for key, kind in _KINDS.items() if _says(config, key))
    if not kinds and config.get("text_config"):
        kinds = {"multimodal": None}
    if not kinds and model_type not in MODEL_TYPES:
        kinds = {kind: None for part, kind in _KINDS_BY_NAME.items() if part in model_type}
    if kinds or model_type not in MODEL_TYPES:
        said = f" ({', '.join(kinds)})" if kinds else ""
        near = " or ".join(nearest_families(model_type, kinds))
        hint = f"; did you mean {near}?" if near else ", and no family with a stack has a name like it"
        raise UnsupportedModelError(f"model_type: {shown}{said} is not supported yet{hint}", "model_type")
    return model_type


# What a family is, by the module of `memplan.families` that knows it; the others are dense decoders.
_KINDS_OF_MODULES = {
    "vision": "vision-language",
    "llama4": "mixture of experts",
    "moe": "mixture of experts",
    "mla": "mixture of experts, multi-head latent attention",
    "blocks": "mixture of experts",
    "sinks": "mixture of experts",
    "ssm": "state space, recurrent, linear attention",
    "encoders": "encoder",
}
_TOWERS = ("gemma4", "kimi_k25", "kimi_k3", "llama4")  # that other modules know


_ALIKE = 0.6  # of the letters of two names, at which one may be meant by the other


def nearest_families(model_type: str, kinds: Iterable[str] = ()) -> tuple[str, ...]:
    """The families with a stack that are most like `model_type`, which has none, and like what its config says; three
    at most, and none where nothing is.

    Those whose names begin alike come first, of these the ones of its kind, and of these the nearest versions.

    >>> nearest_families("qwen4"), nearest_families("qwen4", ["mixture of experts"])
    (('qwen3', 'qwen2', 'qwen'), ('qwen3_moe', 'qwen2_moe', 'qwen3_5'))
    """
    said, (stem, version, rest) = " ".join(kinds), _words(model_type[:_LONGEST].lower())
    alike = {name: difflib.SequenceMatcher(None, model_type[:_LONGEST].lower(), name).ratio() for name in _families()}

    def distance(name: str) -> tuple[float, ...]:
        stem_of, version_of, rest_of = _words(name)
        common = next((i for i, (a, b) in enumerate(zip(stem, stem_of, strict=False)) if a != b), None)
        common = min(len(stem), len(stem_of)) if common is None else common
        kind = _kind(name)
        other = float(not any(part in said for part in kind.split(", ")) if kind else bool(said))
        if not common:
            return 0, other, -alike[name]
        return -common, other, len(set(rest) ^ set(rest_of)), abs(version - version_of), -alike[name]

    def like(name: str) -> bool:
        of_its_kind = any(part in said for part in _kind(name).split(", ") if part)
        return of_its_kind or alike[name] >= _ALIKE or _words(name)[0][:1] == stem[:1]

    return tuple(sorted((name for name in _families() if name != model_type and like(name)), key=distance)[:3])


def _families() -> tuple[str, ...]:
    return (*MODEL_TYPES, *MODULES)


def _kind(name: str) -> str:
    tower = name in _TOWERS or "_vl" in name.removesuffix("_text")
    return "vision-language" if tower else _KINDS_OF_MODULES.get(MODULES.get(name, ""), "")


def _words(name: str) -> tuple[list[str], float, list[str]]:
    """The words that a name begins with, the version after them, and the other words.

    >>> _words("kimi_k25"), _words("qwen3_5_moe"), _words("gemma3_text")
    ((['kimi', 'k'], 25.0, []), (['qwen'], 3.5, ['moe']), (['gemma'], 3.0, []))
    """
    parts = re.findall(r"[a-z]+|[0-9]+", name)
    at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    numbers = [part for part in parts[at : at + 2] if part.isdigit()]
    version = float(".".join(numbers)) if numbers else 1.0
    return parts[:at], version, [part for part in parts[at + len(numbers) :] if part != "text"]


def _says(config: Mapping[str, Any], key: str) -> bool:
    """Whether the config has the key for a reason: one expert is no mixture."""
    return bool(config.get(key)) and not (key.endswith("experts") and config[key] == 1)
