"""Key names and defaults of the dense decoders' config classes."""

from __future__ import annotations

from typing import Any

from memplan.models.facts import DECODER, ONE_KERNEL, WRITTEN_OUT, Family

# Key names that differ from the standard ones (from a config class's attribute_map, and of older configs); () if the
# class has no such key, so that another family's key is ignored. Same sources as MODEL_TYPES.
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
    "qwen": {  # its first configs have GPT-2's names
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

# Defaults of config classes, by model_type: only those that memory depends on, without sizes that every config has.
# A sliding window or a partial rotary factor is read only from families that list it here.
# Source: transformers 5.24 configuration classes; for families without one, the code published with the model.
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

# Families with another family's architecture: only the config's keys differ.
_BUILT_AS = {"exaone": "llama"}

# Families whose class ignores `mlp_bias`; in the others it adds biases to the MLP's linear layers.
_NO_MLP_BIAS = frozenset(("hunyuan_v1_dense", "mimo", "ministral", "ministral3", "mistral", "qwen2", "qwen3"))

# Aliases of keys that are not sizes.
_RENAMED = {"internlm3": {"qkv_bias": "attention_bias", "bias": "mlp_bias"}}

# Families with a class for sequence classification and reward models. Source: transformers 5.24
# modeling_layers.py GenericForSequenceClassification.
_CLASSIFIERS = frozenset(
    (
        *("exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "hunyuan_v1_dense", "llama", "ministral"),
        *("ministral3", "mistral", "nemotron", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "seed_oss"),
        *("smollm3", "stablelm", "starcoder2"),
    )
)

# Families with an ungated MLP, whose stacks also support activations composed of several kernels.
_WRITE_OUT = frozenset(
    ("falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "nemotron", "opt", "phi", "starcoder2")
)

_LEARNED_POSITIONS = frozenset(("gpt2", "gpt_bigcode", "gpt_neo", "opt"))
_POSITION_TABLES = _LEARNED_POSITIONS | {"gptj"}  # a table with a row per position needs max_position_embeddings


def dense_family(model_type: str) -> Family:
    """Return the family of a dense decoder."""
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
