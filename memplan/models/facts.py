"""A family's row, and what it makes of a model's config: every size checked, every default filled in.

`ModelFacts` speaks Hugging Face's words; `axes()` turns them into the letters of `memplan.core.ir`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from memplan.core.cached_property import cached_property
from memplan.core.errors import ConfigError, UnsupportedModelError
from memplan.core.frozen import FrozenDict, frozen
from memplan.models.headers import Checkpoint
from memplan.models.layers import MOST_LAYERS, Layer, Repeated, as_json, layers_of, runs_of
from memplan.models.objectives import objective_of

# The largest value taken for a size: beyond any model that exists, and small enough to be a mistake above it.
_LIMITS = {"num_hidden_layers": MOST_LAYERS, "vocab_size": 2**27, "max_position_embeddings": 2**40}
_LIMIT = 2**21
_NESTED = ("rope_parameters", "rope_scaling", "quantization_config")  # keys that are mappings in transformers' classes


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
DECODER = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")  # what a config must say

# transformers' activations that are one kernel, which keeps what it reads. Source: torch 2.13 derivatives.yaml.
ONE_KERNEL = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "hardswish", "leaky_relu", "mish", "relu6")
WRITTEN_OUT = (
    *ONE_KERNEL,
    "gelu_new",
    "relu",
    "relu2",
)  # and those that `memplan.catalogue.kernels.activations.activation` has beside


class Family(NamedTuple):
    """One model_type.

    defaults   what its config class fills in where the config is silent, if memory depends on it
    names      standard name -> what its configs call it, in the order looked up; () where it has none
    required   standard names that a config must have
    layers     what differs from layer to layer; None where all are alike
    axes       letters and words of its own for shapes, added to those of `ModelFacts.axes`
    decoder    the key of the nested config that has the decoder's keys: they count as the config's own
    built_as   another model_type whose classes transformers builds from this config
    positions  positions are looked up in a table, so that no longer sequence can run
    objectives what models of the family are trained for (`memplan.models.objectives`), the usual first
    longest    the longest sequence, where that is not `max_position_embeddings`
    only       the one length that the encoder takes: patches of an image, frames of a recording
    whole      modules that transformers never quantises: what it would keep in fp32 of an fp16 model
    lacks      kernels of attention that its classes do not take
    target     the longest sequence that the decoder of an encoder-decoder takes; None where it has no table
    acts       activations, by transformers' names, whose kernels its stack has
    renamed    other names of keys that are no sizes: older ones, and those that its config class writes
    fixed      keys that its classes do not read, with what they do instead
    """

    defaults: Mapping[str, Any]
    names: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    required: tuple[str, ...] = DECODER
    layers: Callable[[ModelFacts], tuple[Layer, ...]] | None = None
    axes: Callable[[ModelFacts], Mapping[str, int]] | None = None
    decoder: str = ""
    built_as: str = ""
    positions: bool = False
    objectives: tuple[str, ...] = ("causal_lm",)
    longest: Callable[[ModelFacts], int] | None = None
    whole: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    only: Callable[[ModelFacts], int] | None = None
    target: Callable[[ModelFacts], int | None] | None = None
    acts: tuple[str, ...] = ONE_KERNEL
    renamed: Mapping[str, str] = MappingProxyType({})
    fixed: Mapping[str, Any] = MappingProxyType({})


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"config: {key} must be a mapping, not {as_json(value)}", key)
    return cast(Mapping[str, Any], value)


class ModelFacts:
    """One model's facts, in Hugging Face's words. Immutable; equal if name, config and checkpoint are.

    `checkpoint` is what was seen of its weights, if anything. Sizes are positive ints. `get` reads any further key of
    the config, with the model class's own default.
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
        """Check `config` and fill in the model class's defaults.

        Raises ConfigError where a key is missing or no size, UnsupportedModelError for another kind of model.
        """
        self.name = name
        self.card: Mapping[str, Any] = frozen(published or {})
        self.checkpoint = checkpoint
        self._family = family
        self.model_type = family.built_as or model_type
        self._defaults = family.defaults
        self._names = {**NAMES, **family.names}
        if family.decoder:
            kept = {key: config[key] for key in ("model_type", "tie_word_embeddings") if key in config}
            config = {**config, **_part(config, family.decoder), **kept}
        renamed = {new: config[old] for old, new in family.renamed.items() if old in config}
        self.config: FrozenDict = frozen({**self._defaults, **config, **renamed, **family.fixed})
        self._given = frozenset(config)
        for key in _NESTED:
            self.part(key)
        sizes = {name: self._size(name) for name in NAMES if name != "hidden_act"}
        ffn = ("intermediate_size",) if any(name in self._defaults for name in self._names["intermediate_size"]) else ()
        for required in (*self._family.required, *ffn):
            if sizes[required] is None:
                raise ConfigError(f"config: no {' or '.join(self._names[required])}", required)
        self.hidden_size = sizes["hidden_size"] or 0
        self.num_hidden_layers = sizes["num_hidden_layers"] or 0
        self.num_attention_heads = sizes["num_attention_heads"] or 1
        self.num_key_value_heads = self._key_value_heads(sizes["num_key_value_heads"])
        self.vocab_size = sizes["vocab_size"] or 0
        self.intermediate_size = sizes["intermediate_size"] or 4 * self.hidden_size
        self.max_position_embeddings = sizes["max_position_embeddings"]
        divides = sizes["head_dim"] is not None or "num_attention_heads" not in self._family.required
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
        self.objective = objective_of(config, self._family.objectives)
        self.layers = self._layers()
        self.num_hidden_layers = self.num_hidden_layers or len(self.layers)  # of a family whose list of layers says it

    def _layers(self) -> tuple[Layer, ...]:
        if self._family.layers is not None:
            return self._family.layers(self)
        return layers_of(
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

    def whole(self, key: str, default: int | None = None, least: int = 1, most: int = _LIMIT) -> int:
        """A further size of the config: a whole number from `least` to `most`; `default` where it is absent or null.

        Raises ConfigError where it is no such number, or absent without a default.
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
        """A probability of dropout that the config has, or a `part` of it; 0 where it is absent or null.

        Raises ConfigError where it is no number from 0 to 1.
        """
        value = (self.part(part) if part else self.config).get(key)
        if value is None:
            return 0.0
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ConfigError(f"config: {key} must be a number from 0 to 1, not {as_json(value)}", key)
        return float(value)

    def part(self, key: str) -> Mapping[str, Any]:
        """A nested config, empty where there is none. Raises ConfigError where it is something else."""
        return _part(self.config, key)

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

    def _activation(self) -> str:
        """transformers' name of the MLP's activation. Raises UnsupportedModelError for one that no stack of the family
        has."""
        key = self._key("hidden_act")
        named = self.config.get(key) if key is not None else None
        if named is not None and named not in self._family.acts:
            raise UnsupportedModelError(
                f"{key}: {as_json(named)} is not supported yet for model_type {self.model_type}; "
                f"supported: {', '.join(self._family.acts)}",
                str(key),
            )
        return str(named or "silu")

    @cached_property
    def sliding_window(self) -> int | None:
        """The attention window, where the model uses one."""
        key = self._names.get("sliding_window", ("sliding_window",))[0]
        if key not in self._defaults:
            return None
        if self.config.get(key) is not None and self.whole(key, least=0, most=_LIMITS["max_position_embeddings"]) == 0:
            return None  # as Qwen2-MoE's config class writes that there is none
        window = self._whole(key, _LIMITS["max_position_embeddings"])
        used = "use_sliding_window" not in self._defaults or self.get("use_sliding_window", False)
        return window if used else None

    @property
    def learned_positions(self) -> bool:
        """Whether positions are looked up in a table, so that no longer sequence can run."""
        return self._family.positions

    @property
    def objectives(self) -> tuple[str, ...]:
        """What models of its family are trained for."""
        return self._family.objectives

    @property
    def unquantised(self) -> tuple[str, ...]:
        """Modules that transformers never quantises, nor loads in fp16."""
        return self._family.whole

    @property
    def lacks(self) -> tuple[str, ...]:
        """Kernels of attention that its classes do not take."""
        return self._family.lacks

    @cached_property
    def num_labels(self) -> int:
        """The classes of a classification head, as its config class counts them."""
        names = self.part("id2label")
        return self.whole("num_labels", len(names) or 2)

    @property
    def longest_sequence(self) -> int | None:
        """The tokens of a sequence that the model has positions for."""
        return self._family.longest(self) if self._family.longest is not None else self.max_position_embeddings

    @property
    def only_sequence(self) -> int | None:
        """The one length that its encoder takes, where inputs are images or recordings."""
        return self._family.only(self) if self._family.only is not None else None

    @property
    def is_encoder_decoder(self) -> bool:
        return self._family.target is not None

    @property
    def longest_target(self) -> int | None:
        """The tokens that the decoder of an encoder-decoder has positions for; None for any number."""
        return self._family.target(self) if self._family.target is not None else None

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
        scaling = self.part("rope_scaling") or self.part("rope_parameters")
        share = scaling.get("partial_rotary_factor", share)
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ConfigError(f"config: {key} must be above 0 and at most 1, not {as_json(cast(Any, share))}", key)
        width = int(self.head_dim * share)  # a frequency for each pair of dimensions, and for one left over
        return min(width + width % 2, self.head_dim)

    @cached_property
    def head_widths(self) -> tuple[int, int]:
        """How wide a head's queries and keys are, and its values: the axes `d` and, where they are others, `dv`."""
        axes = self.axes()
        return axes["d"], axes.get("dv", axes["d"])

    @cached_property
    def runs(self) -> tuple[Repeated, ...]:
        """The layers as patterns that repeat."""
        return runs_of(self.layers)

    def axes(self) -> dict[str, int]:
        """The letters of `memplan.ir` for this model, and the widths derived from them.

        `L1`, `L2` and so on count the repetitions of its runs; a width of some layers is named by it (`k8`, `f512`).
        """
        d, a, k = self.head_dim, self.num_attention_heads, self.num_key_value_heads
        p = self.whole("word_embed_proj_dim", self.hidden_size)
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
            "c": self.num_labels,
            **(self._family.axes(self) if self._family.axes is not None else {}),
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
        """Everything but the hash, which is another one in another process."""
        return {name: value for name, value in vars(self).items() if name != "_hash"}

    def __repr__(self) -> str:
        return f"ModelSpec({self.name or self.model_type!r}, {self.num_hidden_layers} layers)"
