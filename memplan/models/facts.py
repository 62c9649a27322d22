"""`Family`, the facts of one model_type, and `ModelFacts`, a config checked and completed with them.

`ModelFacts` uses Hugging Face's names; `axes()` turns them into the letters of `memplan.core.ir`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

from memplan.core.cached_property import cached_property
from memplan.core.errors import ConfigError, UnsupportedModelError
from memplan.core.frozen import FrozenDict, frozen
from memplan.core.records import NamedTuple
from memplan.models.family_facts import (
    EMPTY,
    AttentionFacts,
    CheckpointFacts,
    ConfigKeys,
    GenerationFacts,
    ParallelFacts,
    Picture,
    ServingFacts,
    TrainingFacts,
)
from memplan.models.headers import Checkpoint
from memplan.models.layers import MOST_LAYERS, Layer, LayerRun, as_json, runs_of
from memplan.models.objectives import objective_of

# Largest accepted sizes: far above any existing model, so that a larger value must be a mistake.
_LIMITS = {"num_hidden_layers": MOST_LAYERS, "vocab_size": 2**27, "max_position_embeddings": 2**40}
_LIMIT = 2**21
_NESTED = ("rope_parameters", "rope_scaling", "quantization_config")  # mappings in transformers' config classes


# Standard name -> config keys, in the order they are looked up.
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

# transformers' activations that run as one kernel, which saves its input. Source: torch 2.13 derivatives.yaml.
ONE_KERNEL = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "hardswish", "leaky_relu", "mish", "relu6")
# Also the activations composed of several kernels, as in `memplan.catalogue.kernels.activations.activation`.
WRITTEN_OUT = (*ONE_KERNEL, "gelu_new", "relu", "relu2")


class LengthFacts(NamedTuple):
    """How long its sequences may be.

    learned  positions are looked up in a table, so longer sequences cannot run
    longest  longest sequence, if not `max_position_embeddings`
    fixed    fixed sequence length of an image or audio encoder: patches or frames
    window   the attention window, if it is not a key of the config
    target   longest decoder sequence of an encoder-decoder; returns None if it has no position table
    """

    learned: bool = False
    longest: Callable[[ModelFacts], int] | None = None
    fixed: Callable[[ModelFacts], int] | None = None
    window: Callable[[ModelFacts], int] | None = None
    target: Callable[[ModelFacts], int | None] | None = None


class ImageFacts(NamedTuple):
    """Its vision tower, or its audio encoder, whose clips are pictures too.

    defaults         defaults of the config class of `vision_config`
    picture          an image of a height and width in pixels as its processor resizes it; None if only the tower's
                     weights are estimated
    largest          the image with the most tokens, if it is not one of the tower's own size
    axes             the axes set by a run's images and an image, if not only the number and sizes of grids
    is_called        images can be read; else only the tower's weights are loaded
    is_fixed         its processor resizes every image to the same size
    is_packed        the tower reads all images as one packed sequence, which is split only for sdpa
    has_masks        the tower's layers take masks, which offloading checkpoints would also move
    sets_dtype       a linear layer to whose weight's dtype pixels are cast, also if that is quantised; "" if none is
    by_keyword       the tower passes hidden states to its layers by keyword, and its processor returns bf16 pixels
    several          each of several images in a sequence, if it is not what `picture` makes of a single one
    pictures         how many pictures the tower reads of a video's frames of a height and width, and one of them; None
                     if it takes no videos
    clip             how many windows the audio encoder reads of a clip of some seconds, and one of them; None if it
                     hears nothing
    video            how vLLM counts a video's patches: frames, as long as a request has room for, or pixels; "" if it
                     takes no videos
    boundary_tokens  tokens that its processor adds around an image's
    ffn              FFN of the tower: plain, gated, or fused, with a norm that adds the residual into a new tensor
    is_rotated       the tower rotates queries and keys
    """

    defaults: Mapping[str, int | tuple[int, ...]] = EMPTY
    picture: Callable[[ModelFacts, int, int], Picture] | None = None
    largest: Callable[[ModelFacts], Picture] | None = None
    axes: Callable[[ModelFacts, int, Picture], Mapping[str, int]] | None = None
    is_called: bool = True
    is_fixed: bool = False
    is_packed: bool = False
    has_masks: bool = False
    sets_dtype: str = ""
    by_keyword: bool = False
    several: Callable[[ModelFacts], Picture] | None = None
    pictures: Callable[[ModelFacts, int, int, int], tuple[int, Picture]] | None = None
    clip: Callable[[ModelFacts, int | None], tuple[int, Picture]] | None = None
    video: Literal["", "frames", "pixels"] = ""
    boundary_tokens: int = 0
    ffn: Literal["plain", "gated", "fused"] = "plain"
    is_rotated: bool = True


class Family(NamedTuple):
    """Every fact of one model_type. No other module compares a model_type or keeps a table of them.

    defaults    defaults of its config class that memory depends on
    keys        how its configs are read
    layers      the layers, one by one; None if all are equal
    axes        additional axes for shapes, on top of those of `ModelFacts.axes`
    kv_heads    the number of key/value heads, if no key of the config gives it
    built_as    model_type whose classes transformers builds from this config instead
    wraps       model_type of its decoder, which `text_config` may name otherwise; "" if it has one decoder of its own
    objectives  supported objectives (`memplan.models.objectives`), the default first
    acts        supported activations, by transformers' names, if not those of all gated or ungated MLPs
    gated       its MLPs have a gate; else two matrices with an activation between them
    lengths     how long its sequences may be
    stack       module of `memplan.catalogue.families` that builds it
    attention   how its attention runs
    training    how adapters, quantisation and placement treat its modules
    generation  how it generates
    checkpoint  how its weights are stored
    parallel    how libraries divide it among GPUs
    serving     what serving engines do differently
    images      its vision tower; None if it has none
    note        what an answer should say about it; "" for nothing
    """

    defaults: Mapping[str, Any]
    keys: ConfigKeys = ConfigKeys()
    layers: Callable[[ModelFacts], tuple[Layer, ...]] | None = None
    axes: Callable[[ModelFacts], Mapping[str, int]] | None = None
    kv_heads: Callable[[ModelFacts, int | None], int] | None = None
    built_as: str = ""
    wraps: str = ""
    objectives: tuple[str, ...] = ("causal_lm",)
    acts: tuple[str, ...] = ()
    gated: bool = True
    lengths: LengthFacts = LengthFacts()
    stack: str = ""
    attention: AttentionFacts = AttentionFacts()
    training: TrainingFacts = TrainingFacts()
    generation: GenerationFacts = GenerationFacts()
    checkpoint: CheckpointFacts = CheckpointFacts()
    parallel: ParallelFacts = ParallelFacts()
    serving: ServingFacts = ServingFacts()
    images: ImageFacts | None = None
    note: Callable[[ModelFacts], str] | None = None

    @property
    def activations(self) -> tuple[str, ...]:
        """The supported activations."""
        return self.acts or (ONE_KERNEL if self.gated else WRITTEN_OUT)


def flash_width(d: int) -> int:
    """Return the width that flash attention's backward rounds heads up to: multiples of 32, above 128 of 64."""
    return -(-d // 32) * 32 if d <= 128 else -(-d // 64) * 64


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"config: {key} must be a mapping, not {as_json(value)}", key)
    return cast(Mapping[str, Any], value)


class ModelFacts:
    """One model's facts, with Hugging Face's names. Immutable; equal if name, config and checkpoint are equal.

    `checkpoint` holds the headers of its weights, if they were read. Sizes are positive ints. `get` reads any other key
    of the config.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        model_type: str,
        family: Family,
        name: str = "",
        published: Mapping[str, Any] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Check `config` and fill in the config class's defaults.

        Raises ConfigError for a missing key or an invalid size, UnsupportedModelError for an unsupported model.
        """
        self.name = name
        self.card: Mapping[str, Any] = frozen(published or {})
        self.checkpoint = checkpoint
        self.family = family
        self.model_type = family.built_as or model_type
        self._defaults, keys = family.defaults, family.keys
        self._names = {**NAMES, **keys.names}
        if keys.decoder:
            outer = {key: config[key] for key in ("model_type", "tie_word_embeddings") if key in config}
            config = {**config, **_part(config, keys.decoder), **outer}
        renamed = {new: config[old] for old, new in keys.renamed.items() if old in config}
        self.config: FrozenDict = frozen({**self._defaults, **config, **renamed, **keys.fixed})
        self._given = frozenset(config)
        for key in _NESTED:
            self.part(key)
        sizes = {name: self._size(name) for name in NAMES if name != "hidden_act"}
        ffn = ("intermediate_size",) if any(name in self._defaults for name in self._names["intermediate_size"]) else ()
        for required in (*keys.required, *ffn):
            if sizes[required] is None:
                raise ConfigError(f"config: no {' or '.join(self._names[required])}", required)
        self.hidden_size = sizes["hidden_size"] or 0
        self.num_hidden_layers = sizes["num_hidden_layers"] or 0
        self.num_attention_heads = sizes["num_attention_heads"] or 1
        stated = sizes["num_key_value_heads"]
        self.num_key_value_heads = (
            family.kv_heads(self, stated) if family.kv_heads is not None else stated or self.num_attention_heads
        )
        self.vocab_size = sizes["vocab_size"] or 0
        self.intermediate_size = sizes["intermediate_size"] or 4 * self.hidden_size
        self.max_position_embeddings = sizes["max_position_embeddings"]
        divides = sizes["head_dim"] is not None or "num_attention_heads" not in keys.required
        if not divides and self.hidden_size % self.num_attention_heads:
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
        self.hidden_act = self._activation()
        self.tie_word_embeddings = bool(self.get("tie_word_embeddings", False))
        self.objective = objective_of(config, self.family.objectives)
        self.layers = self._layers()
        self.num_hidden_layers = self.num_hidden_layers or len(self.layers)  # NemotronH has only a list of layers

    def _layers(self) -> tuple[Layer, ...]:
        if self.family.layers is not None:
            return self.family.layers(self)
        return (self.equal_layer,) * self.num_hidden_layers

    @property
    def equal_layer(self) -> Layer:
        """The layer of a model whose layers are all equal."""
        return Layer(self.sliding_window is not None, True, self.num_key_value_heads, self.intermediate_size)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a key of the config, or `default` if it is absent or null.

        Raises ConfigError if the default is a bool or a number and the config's value is not.
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

    def config_int(self, key: str, default: int | None = None, least: int = 1, most: int = _LIMIT) -> int:
        """Return an integer of the config from `least` to `most`, or `default` if it is absent or null.

        Raises ConfigError for any other value, or if it is absent and there is no default.
        """
        value = self.config.get(key)
        if value is None:
            if default is None:
                raise ConfigError(f"config: no {key}", key)
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(
                f"config: {key} must be a whole number from {least} to {most:,}, not {as_json(value)}", key
            )
        return value

    def probability(self, key: str, part: str = "") -> float:
        """Return a dropout probability of the config or of its nested `part`; 0 if it is absent or null.

        Raises ConfigError unless it is a number from 0 to 1.
        """
        value = (self.part(part) if part else self.config).get(key)
        if value is None:
            return 0.0
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ConfigError(f"config: {key} must be a number from 0 to 1, not {as_json(value)}", key)
        return float(value)

    def part(self, key: str) -> Mapping[str, Any]:
        """Return a nested config, empty if it is absent or null. Raises ConfigError if it is not a mapping."""
        return _part(self.config, key)

    def _activation(self) -> str:
        """Return transformers' name of the MLP's activation. Raises UnsupportedModelError if it is not supported."""
        key = self._key("hidden_act")
        name = self.config.get(key) if key is not None else None
        if name is not None and name not in self.family.activations:
            raise UnsupportedModelError(
                f"{key}: {as_json(name)} is not supported yet for model_type {self.model_type}; "
                f"supported: {', '.join(self.family.activations)}",
                str(key),
            )
        return str(name or "silu")

    @cached_property
    def sliding_window(self) -> int | None:
        """The attention window, or None if the model has none."""
        if self.family.lengths.window is not None:
            return self.family.lengths.window(self)
        key = self._names.get("sliding_window", ("sliding_window",))[0]
        if key not in self._defaults:
            return None
        if (
            self.config.get(key) is not None
            and self.config_int(key, least=0, most=_LIMITS["max_position_embeddings"]) == 0
        ):
            return None  # Qwen2-MoE's config class writes 0 for no window
        window = self._whole(key, _LIMITS["max_position_embeddings"])
        used = "use_sliding_window" not in self._defaults or self.get("use_sliding_window", False)
        return window if used else None

    @property
    def is_megatron(self) -> bool:
        """Whether Megatron-core's own layers run it."""
        return self.family.stack == "megatron"

    @property
    def has_tower(self) -> bool:
        """Whether it has a vision tower that can be called or frozen."""
        return self.family.images is not None and self.family.images.is_called

    @property
    def has_compressed_cache(self) -> bool:
        """Whether it caches compressed keys."""
        return self.family.generation.cache == "compressed"

    @property
    def learned_positions(self) -> bool:
        """Whether positions are looked up in a table, so longer sequences cannot run."""
        return self.family.lengths.learned

    @property
    def objectives(self) -> tuple[str, ...]:
        """The objectives that its family supports, the default first."""
        return self.family.objectives

    @cached_property
    def num_labels(self) -> int:
        """The number of classes of a classification head, counted as transformers' config class does."""
        names = self.part("id2label")
        return self.config_int("num_labels", len(names) or 2)

    @property
    def longest_sequence(self) -> int | None:
        """The longest sequence that the model has positions for, in tokens."""
        return (
            self.family.lengths.longest(self)
            if self.family.lengths.longest is not None
            else self.max_position_embeddings
        )

    @property
    def only_sequence(self) -> int | None:
        """The fixed sequence length of an image or audio encoder; None for other models."""
        return self.family.lengths.fixed(self) if self.family.lengths.fixed is not None else None

    @cached_property
    def is_encoder_decoder(self) -> bool:
        return self.family.lengths.target is not None

    @property
    def has_all_logits(self) -> bool:
        """Whether its class computes the logits of all of a prompt's tokens, also to generate one."""
        return self.is_encoder_decoder or self.family.generation.all_logits

    @property
    def longest_target(self) -> int | None:
        """The longest decoder sequence of an encoder-decoder, in tokens; None for no limit."""
        return self.family.lengths.target(self) if self.family.lengths.target is not None else None

    @cached_property
    def rotary_width(self) -> int:
        """The number of rotated dimensions of a head."""
        if "rotary_dim" in self._defaults:
            width = self._whole("rotary_dim", _LIMIT) or self.head_dim
            if width > self.head_dim:
                raise ConfigError(f"config: rotary_dim {width} is more than a head's {self.head_dim}", "rotary_dim")
            return width
        key = next((key for key in ("partial_rotary_factor", "rotary_pct") if key in self._defaults), None)
        if key is None:
            return self.head_dim
        share: Any = self.get(key, self._defaults[key])
        scaling = self.part("rope_scaling") or self.part("rope_parameters")
        share = scaling.get("partial_rotary_factor", share)
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ConfigError(f"config: {key} must be above 0 and at most 1, not {as_json(cast(Any, share))}", key)
        width = int(self.head_dim * share)  # an odd width is rounded up: one frequency per pair, the last one included
        return min(width + width % 2, self.head_dim)

    @cached_property
    def head_widths(self) -> tuple[int, int]:
        """The width of a head's queries and keys (axis `d`), and of its values (axis `dv`, if there is one)."""
        axes = self.axes()
        return axes["d"], axes.get("dv", axes["d"])

    @cached_property
    def runs(self) -> tuple[LayerRun, ...]:
        """The layers as repeated patterns."""
        return runs_of(self.layers)

    @cached_property
    def scan_chunk(self) -> int:
        """The tokens that its layers scan at once; 0 if they do not scan chunk by chunk."""
        return self.axes().get("chunk", 0)

    def axes(self) -> dict[str, int]:
        """Return the size of every axis of `memplan.core.ir` for this model, and of widths derived from them.

        `L1`, `L2` and so on are the repetitions of its runs. A width of only some layers has its size in its name:
        `a64`, `k8`, `f512`.
        """
        return {**self._axes}

    @cached_property
    def _axes(self) -> dict[str, int]:
        d, a, k = self.head_dim, self.num_attention_heads, self.num_key_value_heads
        p = self.config_int("word_embed_proj_dim", self.hidden_size)
        return {
            **{run.times: run.number for run in self.runs},
            **{f"a{layer.a}": layer.a for layer in set(self.layers) if layer.a},
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
            "d32": flash_width(d),
            "d_flash_3": next((width for width in (64, 96, 128, 192) if d <= width), 256),
            "h32": -(-self.hidden_size // 32) * 32,
            "qkv": (a + 2 * k) * d,
            "ad": a * d,
            "kd": k * d,
            "p": p,
            "p32": -(-p // 32) * 32,
            "c": self.num_labels,
            **(self.family.axes(self) if self.family.axes is not None else {}),
        }

    def _key(self, name: str) -> str | None:
        """Return the config's key for the standard `name`: a key of the given config, else a defaulted one."""
        names = [n for n in self._names[name] if n in self.config]
        given = [n for n in names if n in self._given]
        return next((n for n in given if self.config[n] is not None), next(iter(given or names), None))

    def _size(self, name: str) -> int | None:
        key = self._key(name)
        return self._whole(key, _LIMITS.get(name, _LIMIT)) if key is not None else None

    def _whole(self, key: str, limit: int) -> int | None:
        return self.config_int(key, most=limit) if self.config.get(key) is not None else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelFacts) and self._known == other._known

    @property
    def _known(self) -> tuple[str, FrozenDict, Checkpoint | None]:
        return self.name, self.config, self.checkpoint

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.config))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the hash, which differs between processes, and the family's row, which has functions."""
        return {name: value for name, value in vars(self).items() if name not in ("_hash", "family")}

    def __repr__(self) -> str:
        return f"ModelSpec({self.name or self.model_type!r}, {self.num_hidden_layers} layers)"
