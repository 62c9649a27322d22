"""Which key/value caches a generating run can have, and how a quantised one stores tokens.

Source: transformers 5.24 generation/utils.py _prepare_cache_for_generation, cache_utils.py QuantizedCache,
QuantoQuantizedLayer, HQQQuantizedLayer.
"""

from __future__ import annotations

from memplan.catalogue.inference.caches import LayerCache, caches
from memplan.catalogue.inference.one_pass import Cache
from memplan.catalogue.inference.quantized_caches import AXES, NBITS, USUAL, CacheQuantization
from memplan.catalogue.profiles.behaviour import LibraryBehaviour
from memplan.core.errors import refused
from memplan.models.configs.gemma import REUSED
from memplan.models.model import ModelSpec
from memplan.spec.generation import CacheConfig, Generation
from memplan.spec.run import Batch, RunSpec

_KIND = "generation.cache_implementation"
_CONFIG = "generation.cache_config"
_CHUNKS = "generation.prefill_chunk_size"
WAITING_PARTS = 4096  # prompt chunks read before a quantised cache first quantises: each is a different pass

# transformers' name for the layer type of each cache that it cannot quantise.
_TYPES = {
    "": "dummy",
    "sliding": "sliding_attention",
    "chunked": "chunked_attention",
    "state": "linear_attention",
    "compressed": "compressed_sparse_attention",
    "cross": "cross_attention",
}


def cache_implementation(generation: Generation) -> Cache:
    """Return the cache implementation by its current name, or "" if the run names none."""
    kind = generation.cache_implementation
    return "offloaded_static" if kind == "offloaded_hybrid" else kind or ""


def decided_cache(generation: Generation, library: LibraryBehaviour, profile: str) -> Generation:
    """Return the generation settings with the cache filled in, by default the profile's own.

    Raises SpecError for a cache the profile's library does not have, or settings that belong to another cache.
    """
    kind = cache_implementation(generation) or library.generation.cache
    is_new = kind in ("quantized", "offloaded", "offloaded_static")
    if is_new and not library.generation.further_caches:
        raise refused(
            _KIND,
            f"{kind} is not supported yet with profile {profile}; supported: dynamic, static, legacy, and {kind} with "
            "transformers-5",
        )
    if generation.prefill_chunk_size is not None and not library.generation.further_caches:
        raise refused(_CHUNKS, f"is not supported yet with profile {profile}; use transformers-5")
    if generation.cache_config is not None and kind != "quantized":
        raise refused(_CONFIG, f"only applies to a quantised cache, not {kind}; set {_KIND} quantized")
    config = _complete(generation.cache_config or CacheConfig()) if kind == "quantized" else None
    return generation.model_copy(update={"cache_implementation": kind, "cache_config": config})


def cache_storage(generation: Generation, model: ModelSpec, batch: Batch) -> CacheQuantization | None:
    """Return how the run's quantised cache stores tokens, or None if its cache is not quantised.

    Raises SpecError for a backend, model or length that transformers cannot quantise.
    """
    config = generation.cache_config
    if config is None:
        return None
    how = _stored(config)
    kept = caches(model)
    for layer in kept:
        other = _TYPES.get(layer.kind) or ("indexed_attention" if _indexed(layer) else "")
        if other:
            raise refused(
                _KIND,
                "transformers' quantized cache needs full attention in every layer, and "
                f"{model.name or model.model_type} has {other} layers; use dynamic, static or offloaded",
            )
    rows = batch.micro * generation.num_beams
    for tokens in _lengths_when_quantised(how, batch):
        for part in dict.fromkeys(part for layer in kept for part in layer.parts):
            wrong = _group_error(
                how, "value" if part.name == "values" else "key", rows, part.elements, part.heads, tokens
            )
            if wrong:
                field = f"{_CONFIG}.q_group_size"
                raise refused(field, f"{how.group} {wrong}, for the {part.name} of {tokens:,} tokens")
    waiting, part = min(how.residual, batch.sequence) if how.grouped else 0, generation.prefill_chunk_size
    if part is not None and waiting > WAITING_PARTS * part:
        raise refused(
            _CHUNKS,
            f"{part:,} takes {-(-waiting // part):,} passes for the {waiting:,} tokens read before the cache is "
            f"quantised, and memplan counts at most {WAITING_PARTS:,}; use {-(-waiting // WAITING_PARTS):,} or more",
        )
    return how


def refuse_cache(run: RunSpec, generation: Generation, model: ModelSpec, batch: Batch) -> None:
    """Raise SpecError for a cache or a prefill chunk size that transformers, or memplan so far, does not support."""
    name, kind = model.name or model.model_type, cache_implementation(generation)
    published = model.family.generation.published_cache
    is_new = kind in ("quantized", "offloaded", "offloaded_static")
    if any(layer.kind == "compressed" for layer in caches(model)):
        if kind in ("static", "offloaded_static"):
            raise refused(
                _KIND,
                f"transformers' {kind} cache has no layers for the compressed keys of {name} and fails; use dynamic",
            )
        if kind != "dynamic":
            raise refused(_KIND, f"{kind} is not supported yet for {name}, whose keys are compressed; use dynamic")
        if generation.num_beams > 1:
            raise refused(
                "generation.num_beams",
                f"{generation.num_beams} is not supported yet for {name}, whose keys are compressed; supported: 1",
            )
    if is_new or generation.prefill_chunk_size is not None:
        field = _KIND if is_new else _CHUNKS
        if kind == "quantized" and model.is_encoder_decoder:
            raise refused(_KIND, "transformers' quantized cache is for decoder-only models; use dynamic or static")
        crosses = any(part.per == "source" for layer in caches(model) for part in layer.parts)
        unsupported = (
            ("an encoder-decoder", model.is_encoder_decoder),
            ("a model with cross-attention to images", crosses),
            ("assisted generation", generation.assisted),
            ("several GPUs", run.parallelism.world > 1),
            ("autocast", is_new and run.precision.autocast),
            ("code published with the weights", bool(published)),
        )
        for what, there in unsupported:
            if there:
                raise refused(field, f"is not supported yet with {what}; leave it out")
    has_tuples = published == "tuples"
    if (has_tuples and kind == "dynamic") or (published in ("tuples", "grows") and kind == "static"):
        what = "returns its cache as tuples" if has_tuples else "has no cache of fixed size"
        raise refused(
            _KIND, f"the code published with {name}'s weights {what}, so {kind} is not possible; leave it out"
        )
    if generation.prefill_chunk_size is not None:
        parts = {part.per for layer in caches(model) for part in layer.parts}
        shares, states = any(layer.mixer == REUSED for layer in model.layers), parts != {"token"}
        if batch.sees:
            raise refused(_CHUNKS, "transformers reads a prompt with images in one pass; leave it out")
        if kind in ("static", "offloaded_static"):
            raise refused(_CHUNKS, f"is not supported yet with a {kind} cache; use dynamic")
        if shares or states or any(map(_indexed, caches(model))):
            what = "share keys" if shares else "keep states" if states else "keep index keys"
            raise refused(_CHUNKS, f"is not supported yet for {name}, whose layers {what}")
    if kind == "offloaded" and any(map(_indexed, caches(model))):
        raise refused(
            _KIND,
            f"transformers' {kind} cache fails for {name}: it concatenates index keys on the host with index keys on "
            "the GPU; use dynamic",
        )
    if kind == "offloaded_static" and any(map(_indexed, caches(model))):
        raise refused(_KIND, f"{kind} is not supported yet for {name}, which has index keys; use dynamic")
    if kind in ("static", "offloaded_static") and any(layer.mixer == REUSED for layer in model.layers):
        raise refused(_KIND, f"{kind} is not supported yet for {name}, whose layers share keys; use dynamic")


def _complete(config: CacheConfig) -> CacheConfig:
    """Return the config with its defaults filled in. fp8 has none."""
    if config.backend == "fp8":
        return config
    return config.model_copy(update={name: n for name, n in USUAL.items() if getattr(config, name) is None})


def _stored(config: CacheConfig) -> CacheQuantization:
    c = _complete(config)
    if c.backend == "fp8":
        for name in ("nbits", "axis_key", "axis_value", "q_group_size", "residual_length"):
            if getattr(c, name) is not None:
                field = f"{_CONFIG}.{name}"
                raise refused(field, f"fp8 uses one scale per layer; only quanto and hqq have {name}")
        return CacheQuantization("fp8", 8)
    settings = {name: int(getattr(c, name)) for name in ("nbits", "axis_key", "axis_value")}
    how = CacheQuantization(c.backend, **settings, group=int(c.q_group_size or 0), residual=int(c.residual_length or 0))
    known: dict[str, tuple[int, ...]] = {
        "nbits": NBITS[c.backend],
        "axis_key": AXES[c.backend],
        "axis_value": AXES[c.backend],
    }
    for name, choices in known.items():
        if getattr(how, name) not in choices:
            field = f"{_CONFIG}.{name}"
            raise refused(
                field, f"{c.backend} does not support {getattr(how, name)}; choose {', '.join(map(str, choices))}"
            )
    if how.backend == "hqq" and how.nbits == 3 and (how.axis_key or how.axis_value):
        field = f"{_CONFIG}.{'axis_key' if how.axis_key else 'axis_value'}"
        raise refused(field, "hqq cannot read back what it stores in 3 bits along axis 1; use 0")
    return how


def _indexed(layer: LayerCache) -> bool:
    return any(part.name == "index keys" for part in layer.parts)


def _lengths_when_quantised(how: CacheQuantization, batch: Batch) -> range:
    """Return the cache lengths at the first two times all tokens are quantised.

    Each later time adds the same number of tokens, so if the groups divide both evenly, they always do.
    """
    if not how.grouped:
        return range(0)
    return range(batch.sequence, batch.sequence + max(1, batch.new_tokens), how.residual)[:2]


def _group_error(how: CacheQuantization, what: str, rows: int, elements: int, heads: int, tokens: int) -> str:
    """Say why groups of `how.group` do not divide the numbers evenly, or return "" if they do."""
    axis = how.axis(what)
    if how.backend == "quanto":
        # along axis 0 a group takes numbers of one sequence, along the last axis numbers at one position of a head
        each = elements * tokens if axis == 0 else rows * max(1, heads) * tokens
        return f"does not divide the {each:,} numbers it groups" if each % how.group else ""
    every = rows * elements * tokens
    if every % how.group:
        return f"does not divide {every:,} numbers"
    parts, lines = 8 // how.nbits if how.nbits != 3 else 1, how.group if axis == 0 else every // how.group
    return f"leaves {lines:,} rows of codes, not a multiple of the {parts} per byte" if lines % parts else ""
