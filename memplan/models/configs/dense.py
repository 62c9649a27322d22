"""What each dense decoder's config class calls its sizes and fills in."""

from __future__ import annotations

from typing import Any

from memplan.models.facts import DECODER, ONE_KERNEL, WRITTEN_OUT, Family

# Where a family's config class has other names (its attribute_map and what it takes from older configs); ()
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
_OWN_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
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
_BUILT_AS = {"exaone": "llama"}

# Families whose class has no such key; with it, the others add biases to the MLP's linears.
_NO_MLP_BIAS = frozenset(("hunyuan_v1_dense", "mimo", "ministral", "ministral3", "mistral", "qwen2", "qwen3"))

# Other names of keys that are no sizes.
_RENAMED = {"internlm3": {"qkv_bias": "attention_bias", "bias": "mlp_bias"}}

# Families whose decoders transformers 5.24 also builds to classify sequences, or to reward them: GenericForSequence-
# Classification of modeling_layers.py.
_CLASSIFIERS = frozenset(
    (
        *("exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "hunyuan_v1_dense", "llama", "ministral"),
        *("ministral3", "mistral", "nemotron", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "seed_oss"),
        *("smollm3", "stablelm", "starcoder2"),
    )
)

# Families whose MLPs, which no gate multiplies, have their activation written out where it is no kernel of its own.
_WRITE_OUT = frozenset(
    ("falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "nemotron", "opt", "phi", "starcoder2")
)

_LEARNED_POSITIONS = frozenset(("gpt2", "gpt_bigcode", "gpt_neo", "opt"))
_POSITION_TABLES = _LEARNED_POSITIONS | {"gptj"}  # models that hold a row a position, and so must know how many


def dense_family(model_type: str) -> Family:
    """A dense decoder, as a family."""
    return Family(
        MODEL_TYPES[model_type],
        _OWN_NAMES.get(model_type, {}),
        required=(*DECODER, *(("max_position_embeddings",) if model_type in _POSITION_TABLES else ())),
        built_as=_BUILT_AS.get(model_type, ""),
        positions=model_type in _LEARNED_POSITIONS,
        objectives=("causal_lm", *(("sequence_classification",) if model_type in _CLASSIFIERS else ())),
        acts=WRITTEN_OUT if model_type in _WRITE_OUT else ONE_KERNEL,
        renamed=_RENAMED.get(model_type, {}),
        fixed={"mlp_bias": False} if model_type in _NO_MLP_BIAS else {},
    )
