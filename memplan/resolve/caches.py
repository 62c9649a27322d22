"""Which caches a run of generation may have: of which version, model and batch; and how a quantised one stores tokens.

Source: transformers 5.24 generation/utils.py _prepare_cache_for_generation, cache_utils.py QuantizedCache,
QuantoQuantizedLayer, HQQQuantizedLayer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.catalogue.inference.caches import LayerCache, caches
from memplan.catalogue.inference.decoding import CACHED_BY_ITS_CODE, NO_STATIC_CACHE, RETURNS_TUPLES
from memplan.catalogue.inference.one_pass import Cache
from memplan.catalogue.inference.quantized_caches import AXES, NBITS, USUAL, Stored
from memplan.core.errors import SpecError
from memplan.models.configs.gemma import REUSED
from memplan.models.model import ModelSpec
from memplan.spec.generation import CacheConfig, Generation
from memplan.spec.run import Batch, RunSpec

_KIND = "generation.cache_implementation"
_CONFIG = "generation.cache_config"
_CHUNKS = "generation.prefill_chunk_size"
WAITING_PARTS = 4096  # of a prompt, while a quantised cache keeps the newest tokens as they are: each pass differs

# transformers' word for the layer of each kind of cache that it does not quantise.
_TYPES = {
    "": "dummy",
    "sliding": "sliding_attention",
    "chunked": "chunked_attention",
    "state": "linear_attention",
    "compressed": "compressed_sparse_attention",
    "cross": "cross_attention",
}


def kind_of(generation: Generation) -> Cache:
    """What is asked for, by the name that it has now; empty where nothing is."""
    kind = generation.cache_implementation
    return "offloaded_static" if kind == "offloaded_hybrid" else kind or ""


def decided_cache(generation: Generation, words: Mapping[str, Any], profile: str) -> Generation:
    """What keeps keys and values, the profile's own where nothing is asked.

    Raises SpecError for what the profile's library does not have, or a cache of another kind has no use for.
    """
    kind = kind_of(generation) or words["cache"]
    newer = kind in ("quantized", "offloaded", "offloaded_static")
    if newer and not words["further_caches"]:
        raise SpecError(
            f"{_KIND}: {kind} is not supported yet with profile {profile}; supported: dynamic, static, legacy, and "
            f"{kind} with transformers-5",
            _KIND,
        )
    if generation.prefill_chunk_size is not None and not words["further_caches"]:
        raise SpecError(f"{_CHUNKS}: is not supported yet with profile {profile}; it is with transformers-5", _CHUNKS)
    if generation.cache_config is not None and kind != "quantized":
        raise SpecError(f"{_CONFIG}: is of a quantised cache, and {kind} is none; say {_KIND} quantized", _CONFIG)
    config = _complete(generation.cache_config or CacheConfig()) if kind == "quantized" else None
    return generation.model_copy(update={"cache_implementation": kind, "cache_config": config})


def stored_of(generation: Generation, model: ModelSpec, batch: Batch) -> Stored | None:
    """How the run's quantised cache stores what it is given; None where it has another.

    Raises SpecError for a backend, a model or a length that transformers does not quantise with, or to.
    """
    config = generation.cache_config
    if config is None:
        return None
    how = _stored(config)
    kept = caches(model)
    for layer in kept:
        other = _TYPES.get(layer.kind) or ("indexed_attention" if _indexed(layer) else "")
        if other:
            raise SpecError(
                f"{_KIND}: transformers' quantized cache is of models with full attention in every layer, and "
                f"{model.name or model.model_type} has layers of {other}; dynamic, static and offloaded are of all",
                _KIND,
            )
    rows = batch.micro * generation.num_beams
    for tokens in _stored_at(how, batch):
        for part in dict.fromkeys(part for layer in kept for part in layer.parts):
            wrong = _unfilled(how, "value" if part.name == "values" else "key", rows, part.elements, part.heads, tokens)
            if wrong:
                field = f"{_CONFIG}.q_group_size"
                raise SpecError(f"{field}: {how.group} {wrong}, of the {part.name} of {tokens:,} tokens", field)
    waiting, part = min(how.residual, batch.sequence) if how.grouped else 0, generation.prefill_chunk_size
    if part is not None and waiting > WAITING_PARTS * part:
        raise SpecError(
            f"{_CHUNKS}: {part:,} reads {waiting:,} tokens in {-(-waiting // part):,} passes before all are quantised, "
            f"and at most {WAITING_PARTS:,} are counted; say {-(-waiting // WAITING_PARTS):,} or more",
            _CHUNKS,
        )
    return how


def refuse_cache(run: RunSpec, generation: Generation, model: ModelSpec, batch: Batch) -> None:
    """Raise SpecError for a cache that transformers, or memplan yet, does not keep of the model's layers, or does not
    fill in parts."""
    name, kind = model.name or model.model_type, kind_of(generation)
    newer = kind in ("quantized", "offloaded", "offloaded_static")
    if any(layer.kind == "compressed" for layer in caches(model)):
        if kind in ("static", "offloaded_static"):
            raise SpecError(
                f"{_KIND}: transformers' {kind} cache has no layers for the keys of {name} that stand for windows of "
                "tokens, and ends with an error; dynamic has",
                _KIND,
            )
        if kind != "dynamic":
            raise SpecError(
                f"{_KIND}: {kind} is not supported yet for {name}, whose keys stand for windows of tokens; dynamic is",
                _KIND,
            )
        if generation.num_beams > 1:
            raise SpecError(
                f"generation.num_beams: {generation.num_beams} is not supported yet for {name}, whose keys stand for "
                "windows of tokens; supported: 1",
                "generation.num_beams",
            )
    if newer or generation.prefill_chunk_size is not None:
        field = _KIND if newer else _CHUNKS
        if kind == "quantized" and model.is_encoder_decoder:
            raise SpecError(
                f"{_KIND}: transformers' quantized cache is of decoders alone; dynamic and static are", _KIND
            )
        crosses = any(part.per == "source" for layer in caches(model) for part in layer.parts)
        others = (
            ("an encoder-decoder", model.is_encoder_decoder),
            ("a model that attends to images apart", crosses),
            ("tokens that are proposed", generation.assisted),
            ("several GPUs", run.parallelism.world > 1),
            ("autocast", run.precision.autocast),
            ("code that is published with the weights", model.model_type in CACHED_BY_ITS_CODE),
        )
        for what, there in others:
            if there:
                raise SpecError(f"{field}: is not supported yet with {what}; leave it out", field)
    tuples = model.model_type in RETURNS_TUPLES and kind == "dynamic"
    if tuples or (model.model_type in NO_STATIC_CACHE and kind == "static"):
        what = "returns tuples of its own" if model.model_type in RETURNS_TUPLES else "has no cache of fixed size"
        raise SpecError(
            f"{_KIND}: the code published with {name}'s weights {what}, and not {kind}; leave it out", _KIND
        )
    if generation.prefill_chunk_size is not None:
        parts = {part.per for layer in caches(model) for part in layer.parts}
        shares, states = any(layer.mixer == REUSED for layer in model.layers), parts != {"token"}
        if batch.images:
            raise SpecError(f"{_CHUNKS}: transformers reads a prompt with images at once; leave it out", _CHUNKS)
        if kind in ("static", "offloaded_static"):
            raise SpecError(f"{_CHUNKS}: is not supported yet with a cache that is {kind}; dynamic is", _CHUNKS)
        if shares or states or any(map(_indexed, caches(model))):
            what = "share keys" if shares else "keep states" if states else "keep index keys"
            raise SpecError(f"{_CHUNKS}: is not supported yet for {name}, whose layers {what}", _CHUNKS)
    if kind == "offloaded" and any(map(_indexed, caches(model))):
        raise SpecError(
            f"{_KIND}: transformers' {kind} cache joins {name}'s index keys in host memory with those on the card, and "
            "ends with an error; dynamic is without",
            _KIND,
        )
    if kind == "offloaded_static" and any(map(_indexed, caches(model))):
        raise SpecError(f"{_KIND}: {kind} is not supported yet for {name}, which has index keys; dynamic is", _KIND)
    if kind in ("static", "offloaded_static") and any(layer.mixer == REUSED for layer in model.layers):
        raise SpecError(f"{_KIND}: {kind} is not supported yet for {name}, whose layers share keys; dynamic is", _KIND)


def _complete(config: CacheConfig) -> CacheConfig:
    """The config with what it leaves open; of fp8, which has none of that, as it is."""
    if config.backend == "fp8":
        return config
    return config.model_copy(update={name: n for name, n in USUAL.items() if getattr(config, name) is None})


def _stored(config: CacheConfig) -> Stored:
    c = _complete(config)
    if c.backend == "fp8":
        for name in ("nbits", "axis_key", "axis_value", "q_group_size", "residual_length"):
            if getattr(c, name) is not None:
                field = f"{_CONFIG}.{name}"
                raise SpecError(
                    f"{field}: fp8 has one scale for all of a layer's keys; quanto and hqq have {name}", field
                )
        return Stored("fp8", 8)
    said = {name: int(getattr(c, name)) for name in ("nbits", "axis_key", "axis_value")}
    how = Stored(c.backend, **said, group=int(c.q_group_size or 0), residual=int(c.residual_length or 0))
    known: dict[str, tuple[int, ...]] = {
        "nbits": NBITS[c.backend],
        "axis_key": AXES[c.backend],
        "axis_value": AXES[c.backend],
    }
    for name, choices in known.items():
        if getattr(how, name) not in choices:
            field = f"{_CONFIG}.{name}"
            raise SpecError(
                f"{field}: {getattr(how, name)} is none of {c.backend}'s; known: {', '.join(map(str, choices))}", field
            )
    if how.backend == "hqq" and how.nbits == 3 and (how.axis_key or how.axis_value):
        field = f"{_CONFIG}.{'axis_key' if how.axis_key else 'axis_value'}"
        raise SpecError(
            f"{field}: what hqq stores in 3 bits along axis 1 it cannot read back; along axis 0 it can", field
        )
    return how


def _indexed(layer: LayerCache) -> bool:
    return any(part.name == "index keys" for part in layer.parts)


def _stored_at(how: Stored, batch: Batch) -> range:
    """How many tokens there are the first two times that all of them are quantised: groups that come out even then do
    so every time, as each time has as many tokens more than the one before."""
    if not how.grouped:
        return range(0)
    return range(batch.sequence, batch.sequence + max(1, batch.new_tokens), how.residual)[:2]


def _unfilled(how: Stored, what: str, rows: int, elements: int, heads: int, tokens: int) -> str:
    """What is wrong with groups of so many, where they do not come out even; empty where they do."""
    axis = how.axis(what)
    if how.backend == "quanto":
        # along the first axis groups are of a sequence's numbers, along the last of those that share a place in a head
        each = elements * tokens if axis == 0 else rows * max(1, heads) * tokens
        return f"does not divide the {each:,} numbers that groups are taken of" if each % how.group else ""
    every = rows * elements * tokens
    if every % how.group:
        return f"does not divide {every:,} numbers"
    parts, lines = 8 // how.nbits if how.nbits != 3 else 1, how.group if axis == 0 else every // how.group
    return f"makes {lines:,} rows of codes, which {parts} to a byte do not fill" if lines % parts else ""
