"""A model: Hugging Face's config, checked, with what its config class fills in.

`ModelSpec` speaks Hugging Face's words; `axes()` turns them into the letters of `memplan.ir`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, cast

from memplan.errors import ConfigError, UnknownNameError, UnsupportedModelError
from memplan.layers import Repeated, as_json, layers_of, runs_of
from memplan.spec import FrozenDict, frozen

# Standard name -> what a config calls it, in the order looked up.
_NAMES: dict[str, tuple[str, ...]] = {
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
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

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

# The largest value taken for a size: beyond any model that exists, and small enough to be a mistake above it.
_LIMITS = {"num_hidden_layers": 10_000, "vocab_size": 2**27, "max_position_embeddings": 2**40}
_LIMIT = 2**21
_LONGEST = 80  # letters of a name that an error repeats

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
_NO_MLP_BIAS = frozenset(("hunyuan_v1_dense", "mimo", "ministral", "ministral3", "mistral", "qwen2", "qwen3"))

# Older names of keys that are no sizes.
_RENAMED = {"internlm3": {"qkv_bias": "attention_bias", "bias": "mlp_bias"}}

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
        family = _family(config)
        self.model_type = BUILT_AS.get(family, family)
        self._defaults = MODEL_TYPES[family]
        self._names = {**_NAMES, **_OWN_NAMES.get(family, {})}
        renamed = {new: config[old] for old, new in _RENAMED.get(family, {}).items() if old in config}
        unread = {"mlp_bias": False} if family in _NO_MLP_BIAS else {}
        self.config: FrozenDict = frozen({**self._defaults, **config, **renamed, **unread})
        self._given = frozenset(config)
        sizes = {name: self._size(name) for name in _NAMES if name != "hidden_act"}
        tables = ("max_position_embeddings",) if self.model_type in _POSITION_TABLES else ()
        ffn = ("intermediate_size",) if any(name in self._defaults for name in self._names["intermediate_size"]) else ()
        for required in (*_REQUIRED, *tables, *ffn):
            if sizes[required] is None:
                raise ConfigError(f"config: no {' or '.join(self._names[required])}", required)
        self.hidden_size = sizes["hidden_size"] or 0
        self.num_hidden_layers = sizes["num_hidden_layers"] or 0
        self.num_attention_heads = sizes["num_attention_heads"] or 0
        self.num_key_value_heads = self._key_value_heads(sizes["num_key_value_heads"])
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
                raise ConfigError(f"config: {key} must be true or false, not {as_json(value)}", key)
        elif isinstance(default, (int, float)) and (
            isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LIMIT
        ):
            raise ConfigError(f"config: {key} must be a number from 0 to {_LIMIT:,}, not {as_json(value)}", key)
        return value

    def _key_value_heads(self, stated: int | None) -> int:
        """How many heads of keys and values there are, `stated` being the number the config has."""
        a = self.num_attention_heads
        match self.model_type:
            case "gpt_bigcode":
                return 1 if self.get("multi_query", False) else a
            case "falcon" if not self.get("new_decoder_architecture", False):
                return 1 if self.get("multi_query", False) else a
            case "chatglm" if not self.get("multi_query_attention", False):
                return a
            case _:
                return stated or a

    @cached_property
    def hidden_act(self) -> str:
        key = self._key("hidden_act")
        return str(self.config[key]) if key is not None else "silu"

    @cached_property
    def sliding_window(self) -> int | None:
        """The attention window, where the model uses one."""
        if "sliding_window" not in self._defaults:
            return None
        window = self._whole("sliding_window", _LIMITS["max_position_embeddings"])
        used = "use_sliding_window" not in self._defaults or self.get("use_sliding_window", False)
        return window if used else None

    @property
    def learned_positions(self) -> bool:
        """Whether positions are looked up in a table, so that no longer sequence can run."""
        return self.model_type in _LEARNED_POSITIONS

    @cached_property
    def rotary_width(self) -> int:
        """How many of a head's dimensions are rotated."""
        if "rotary_dim" in self._defaults:
            width = self._whole("rotary_dim", _LIMIT) or self.head_dim
            if width > self.head_dim:
                raise ConfigError(f"config: rotary_dim {width} is more than a head's {self.head_dim}", "rotary_dim")
            return width
        key = next((key for key in ("partial_rotary_factor", "rotary_pct") if key in self._defaults), None)
        if key is None:
            return self.head_dim
        share: Any = self.get(key, self._defaults[key])
        scaling: Any = self.config.get("rope_scaling") or self.config.get("rope_parameters")
        if isinstance(scaling, Mapping):
            share = scaling.get("partial_rotary_factor", share)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ConfigError(f"config: {key} must be above 0 and at most 1, not {as_json(cast(Any, share))}", key)
        return int(self.head_dim * share)

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

    def _key(self, name: str) -> str | None:
        """The key of the config that has the standard `name`: one that was given, else one that was filled in."""
        names = [n for n in self._names[name] if n in self.config]
        given = [n for n in names if n in self._given]
        return next((n for n in given if self.config[n] is not None), next(iter(given or names), None))

    def _size(self, name: str) -> int | None:
        key = self._key(name)
        return self._whole(key, _LIMITS.get(name, _LIMIT)) if key is not None else None

    def _whole(self, key: str, limit: int) -> int | None:
        value = self.config.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise ConfigError(f"config: {key} must be a whole number from 1 to {limit:,}, not {as_json(value)}", key)
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

# Models with the decoder of a supported family and a head of their own, by what their class is called.
_OTHER_HEADS = ("Classification", "QuestionAnswering", "MultipleChoice", "Reward")


def _family(config: Mapping[str, Any]) -> str:
    """The config's model_type, if memplan has a stack for it."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError("config: no model_type, so not a Hugging Face model config", "model_type")
    shown = repr(model_type) if len(model_type) <= _LONGEST else f"{model_type[:_LONGEST]!r}..."
    kinds = dict.fromkeys(kind for key, kind in _KINDS.items() if _says(config, key))
    if not kinds and config.get("text_config"):
        kinds = {"multimodal": None}
    if not kinds and model_type not in MODEL_TYPES:
        kinds = {kind: None for part, kind in _KINDS_BY_NAME.items() if part in model_type}
    if kinds:
        raise UnsupportedModelError(
            f"model_type: {shown} ({', '.join(kinds)}) is not supported yet; supported are dense decoders",
            "model_type",
        )
    if model_type not in MODEL_TYPES:
        nearest = " or ".join(UnknownNameError("model_type", model_type, MODEL_TYPES).nearest)
        raise UnsupportedModelError(f"model_type: {shown} is not supported yet; did you mean {nearest}?", "model_type")
    for name in _strings(config.get("architectures")):
        if any(head in name for head in _OTHER_HEADS):
            raise UnsupportedModelError(
                f"architectures: {name[:_LONGEST]} has a head of its own; supported are language models",
                "architectures",
            )
    return model_type


def _says(config: Mapping[str, Any], key: str) -> bool:
    """Whether the config has the key for a reason: one expert is no mixture."""
    return bool(config.get(key)) and not (key.endswith("experts") and config[key] == 1)


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, (list, tuple)) else ()  # pyright: ignore[reportUnknownVariableType]
