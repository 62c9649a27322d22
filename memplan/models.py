"""A model: Hugging Face's config, checked, with what its config class fills in.

`ModelSpec` speaks Hugging Face's words; `axes()` turns them into the letters of `memplan.ir`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from memplan.errors import ConfigError, UnknownNameError, UnsupportedModelError
from memplan.layers import Repeated, layers_of, runs_of
from memplan.spec import FrozenDict, frozen

# Standard name -> what configs call it, in the order looked up.
_NAMES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "n_embed"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner"),
    "vocab_size": ("padded_vocab_size", "vocab_size"),
    "head_dim": ("head_dim", "kv_channels"),
    "max_position_embeddings": (
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "seq_length",
        "model_max_length",
    ),
    "hidden_act": ("hidden_activation", "hidden_act", "activation_function", "activation"),
}
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

# The largest value taken for a size: beyond any model that exists, and small enough to be a mistake above it.
_LIMITS = {"num_hidden_layers": 10_000, "vocab_size": 2**27, "max_position_embeddings": 2**40}
_LIMIT = 2**21

_DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "n_positions": 1024}

# What a model's config class fills in where the config is silent, by model_type: only what memory depends on.
# Source: transformers 5.24 configuration classes; where it has none, the code published with the model's card.
MODEL_TYPES: dict[str, dict[str, Any]] = {
    "baichuan": {},
    "bloom": {"tie_word_embeddings": True},
    "chatglm": {"partial_rotary_factor": 0.5, "add_qkv_bias": True},
    "cohere": {"tie_word_embeddings": True},
    "cohere2": {"tie_word_embeddings": True, "sliding_window": 4096},
    "ernie4_5": {"tie_word_embeddings": True, "head_dim": 128},
    "exaone4": {"sliding_window": 4096},
    "falcon": {"tie_word_embeddings": True, "multi_query": True, "parallel_attn": True, "activation": "gelu"},
    "gemma": {"tie_word_embeddings": True, "head_dim": 256},
    "gemma2": {
        "tie_word_embeddings": True,
        "head_dim": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {"tie_word_embeddings": True, "head_dim": 256, "sliding_window": 4096},
    "glm": {"head_dim": 128, "num_key_value_heads": 2, "attention_bias": True, "partial_rotary_factor": 0.5},
    "glm4": {"head_dim": 128, "num_key_value_heads": 2, "attention_bias": True, "partial_rotary_factor": 0.5},
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
        "attention_bias": True,
        "use_parallel_residual": True,
        "hidden_act": "gelu",
    },
    "gptj": {"rotary_dim": 64, "activation_function": "gelu_new", "n_positions": 2048},
    "granite": {},
    "hunyuan_v1_dense": {},
    "internlm2": {},
    "internlm3": {"num_key_value_heads": 2, "head_dim": 128},
    "llama": {},
    "mimo": {},
    "minicpm": {"tie_word_embeddings": True},
    "ministral3": {"num_key_value_heads": 8, "head_dim": 128},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "mpt": {"tie_word_embeddings": True, "max_seq_len": 2048},
    "nemotron": {"partial_rotary_factor": 0.5, "hidden_act": "relu2"},
    "nemotron-nas": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 4096},
    "opt": {
        "tie_word_embeddings": True,
        "dropout": 0.1,
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "max_position_embeddings": 2048,
    },
    "phi": {"partial_rotary_factor": 0.5, "hidden_act": "gelu_new"},
    "phi3": {},
    "qwen": {},
    "qwen2": {"use_sliding_window": False, "sliding_window": 4096},
    "qwen3": {"head_dim": 128, "use_sliding_window": False, "sliding_window": 4096},
    "smollm3": {"tie_word_embeddings": True, "no_rope_layer_interval": 4, "use_sliding_window": False},
    "stablelm": {"partial_rotary_factor": 0.25},
    "starcoder2": {
        "tie_word_embeddings": True,
        "num_key_value_heads": 2,
        "use_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
    },
}

_LEARNED_POSITIONS = frozenset(("gpt2", "gpt_bigcode", "gpt_neo", "opt"))
_POSITION_TABLES = _LEARNED_POSITIONS | {"gptj"}  # models that hold a row a position, and so must know how many


class ModelSpec:
    """One model's facts, in Hugging Face's words. Immutable; equal if name and config are.

    Sizes are positive ints. `get` reads any further key of the config, with the model class's own default.
    """

    def __init__(self, config: Mapping[str, Any], name: str = "", published: Mapping[str, Any] | None = None) -> None:
        """Check `config` and fill in the model class's defaults.

        Raises ConfigError where a key is missing or no size, UnsupportedModelError for another kind of model.
        """
        self.name = name
        self.card: Mapping[str, Any] = frozen(published or {})
        self.model_type = _model_type(config)
        self.config: FrozenDict = frozen({**MODEL_TYPES[self.model_type], **config})
        sizes = {name: self._size(name) for name in _NAMES if name != "hidden_act"}
        tables = ("max_position_embeddings",) if self.model_type in _POSITION_TABLES else ()
        for required in (*_REQUIRED, *tables):
            if sizes[required] is None:
                raise ConfigError(f"config: no {' or '.join(_NAMES[required])}", required)
        self.hidden_size = sizes["hidden_size"] or 0
        self.num_hidden_layers = sizes["num_hidden_layers"] or 0
        self.num_attention_heads = sizes["num_attention_heads"] or 0
        self.num_key_value_heads = 1 if self.multi_query else sizes["num_key_value_heads"] or self.num_attention_heads
        self.vocab_size = sizes["vocab_size"] or 0
        self.intermediate_size = sizes["intermediate_size"] or 4 * self.hidden_size
        self.max_position_embeddings = sizes["max_position_embeddings"]
        if sizes["head_dim"] is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"config: num_attention_heads {self.num_attention_heads} does not divide "
                f"hidden_size {self.hidden_size}",
                "num_attention_heads",
            )
        self.head_dim = sizes["head_dim"] or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"config: num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}",
                "num_key_value_heads",
            )
        self.tie_word_embeddings = bool(self.get("tie_word_embeddings", False))
        self.layers = layers_of(
            self.model_type,
            self.config,
            self.num_hidden_layers,
            self.sliding_window,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.intermediate_size,
            self.hidden_size,
        )

    def get(self, key: str, default: Any = None) -> Any:
        """A further key of the config; `default` where it is absent or null.

        Raises ConfigError where the default is a bool or a number and the config's value is no such thing.
        """
        value = self.config.get(key)
        if value is None:
            return default
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise ConfigError(f"config: {key} must be true or false, not {value!r:.40}", key)
        elif isinstance(default, (int, float)) and (
            isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LIMIT
        ):
            raise ConfigError(f"config: {key} must be a number from 0 to {_LIMIT:,}, not {value!r:.40}", key)
        return value

    @property
    def multi_query(self) -> bool:
        """Whether all query heads share one key/value head, whatever number the config has."""
        old = not self.get("new_decoder_architecture", False)
        return self.model_type in ("falcon", "gpt_bigcode") and bool(self.get("multi_query", False)) and old

    @cached_property
    def hidden_act(self) -> str:
        return next((str(self.config[n]) for n in _NAMES["hidden_act"] if self.config.get(n)), "silu")

    @cached_property
    def sliding_window(self) -> int | None:
        """The attention window, where the model uses one."""
        window = self._whole("sliding_window", _LIMITS["max_position_embeddings"])
        return window if self.get("use_sliding_window", True) else None

    @property
    def learned_positions(self) -> bool:
        """Whether positions are looked up in a table, so that no longer sequence can run."""
        return self.model_type in _LEARNED_POSITIONS

    @cached_property
    def rotary_width(self) -> int:
        """How many of a head's dimensions are rotated."""
        share = self.get("partial_rotary_factor", self.get("rotary_pct", 1.0))
        parameters: Any = self.get("rope_parameters", {})
        if isinstance(parameters, Mapping):
            share = parameters.get("partial_rotary_factor", share)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ConfigError(
                f"config: partial_rotary_factor must be above 0 and at most 1, not {share!r:.40}",
                "partial_rotary_factor",
            )
        return int(self.get("rotary_dim", int(self.head_dim * share)))

    @cached_property
    def runs(self) -> tuple[Repeated, ...]:
        """The layers as patterns that repeat."""
        return runs_of(self.layers)

    def axes(self) -> dict[str, int]:
        """The letters of `memplan.ir` for this model, and the widths derived from them.

        `L1`, `L2` and so on count the repetitions of its runs; a width of some layers is named by it (`k8`, `f512`).
        """
        d, a, k = self.head_dim, self.num_attention_heads, self.num_key_value_heads
        p = int(self.get("word_embed_proj_dim", self.hidden_size))
        return {
            **{run.times: run.number for run in self.runs},
            **{f"k{layer.k}": layer.k for layer in set(self.layers)},
            **{f"f{layer.f}": layer.f for layer in set(self.layers)},
            "h": self.hidden_size,
            "a": a,
            "k": k,
            "d": d,
            "f": self.intermediate_size,
            "f2": self.intermediate_size // 2,
            "v": self.vocab_size,
            "L": self.num_hidden_layers,
            "rot": self.rotary_width,
            "rot2": self.rotary_width // 2,
            "d32": -(-d // 32) * 32 if d <= 128 else -(-d // 64) * 64,
            "h32": -(-self.hidden_size // 32) * 32,
            "qkv": (a + 2 * k) * d,
            "ad": a * d,
            "kd": k * d,
            "p": p,
            "p32": -(-p // 32) * 32,
        }

    def _size(self, name: str) -> int | None:
        key = next((n for n in _NAMES[name] if self.config.get(n) is not None), None)
        return self._whole(key, _LIMITS.get(name, _LIMIT)) if key is not None else None

    def _whole(self, key: str, limit: int) -> int | None:
        value = self.config.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise ConfigError(f"config: {key} must be a whole number from 1 to {limit:,}, not {value!r:.40}", key)
        return value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelSpec) and (self.name, self.config) == (other.name, other.config)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.config))

    def __repr__(self) -> str:
        return f"ModelSpec({self.name or self.model_type!r}, {self.num_hidden_layers} layers)"


# Families memplan has no stack for yet, by a key of their config that says so.
_KINDS = {
    "num_experts": "mixture of experts",
    "num_local_experts": "mixture of experts",
    "n_routed_experts": "mixture of experts",
    "moe_num_experts": "mixture of experts",
    "kv_lora_rank": "multi-head latent attention",
    "vision_config": "vision-language",
    "ssm_cfg": "state space",
    "state_size": "state space",
    "mamba_d_state": "state space hybrid",
    "linear_num_key_heads": "linear attention hybrid",
}


def _model_type(config: Mapping[str, Any]) -> str:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError("config: no model_type, so not a Hugging Face model config", "model_type")
    kind = next((kind for key, kind in _KINDS.items() if config.get(key)), None)
    if model_type in MODEL_TYPES and kind is None:
        return model_type
    if kind is not None or _encoder(config):
        raise UnsupportedModelError(
            f"model_type: {model_type!r} ({kind or 'encoder'}) is not supported yet; supported are dense decoders",
            model_type,
        )
    error = UnknownNameError("model_type", model_type, MODEL_TYPES)
    raise UnsupportedModelError(f"{error} (supported are dense decoders)", "model_type")


def _encoder(config: Mapping[str, Any]) -> bool:
    return bool(config.get("is_encoder_decoder")) or str(config.get("model_type")) in ("bert", "roberta", "t5", "vit")
