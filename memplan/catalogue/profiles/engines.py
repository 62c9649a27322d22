"""Serving engines: the defaults and implementation details of each version, as rows with their sources.

An engine loads the weights, measures a step, and gives the rest of its share of the card to the KV cache. The layout of
the cache is in `memplan.program.serving`, one module per `kind` of engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

from memplan.catalogue.hardware.overhead import Overhead
from memplan.catalogue.profiles.profile_table import (
    EngineSetting,
    Kind,
    ServingEngine,
    check_values,
    engines,
    field_types,
    known_name,
)
from memplan.core.records import NamedTuple
from memplan.core.units import MIB


class EngineDefaults(NamedTuple):
    """Defaults of the fields of `memplan.spec.serving.Serving`; None if the engine has no fixed one."""

    memory_utilization: float | None = None
    block_size: int | None = None
    cache_dtype: str | None = None
    cuda_graphs: bool | None = None
    prefix_caching: bool | None = None
    hybrid_cache: bool | None = None
    lora_slots: int | None = None
    lora_rank: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    flash_attention: bool | None = None


class EngineBehaviour(NamedTuple):
    """Details of an engine's code. A default means that the engine has nothing of the kind.

    counts_graphs           memory of CUDA graphs is measured and subtracted before the pool is allocated
    measures_since_start    the share pays for what its process uses outside torch since it started, without the context
    ignores_slots           the share does not pay for adapters' slots, which are allocated after weights were measured
    mixes_pages             layers whose pages differ in size are brought to one size, instead of refused
    steps_in_flight         steps that may be in flight at once, for whose tokens sliding-window layers keep blocks
    null_block              one block of the pool is never handed out, and counts against the longest request
    compiles                layers are compiled unless CUDA graphs are off; else they run in Python
    default_step            what decides how many tokens and requests a step has: card (the GPU's memory), small card
                            (alike, without steps for 160 GiB), request (its longest length)
    group_tokens            the pool's tokens are counted as blocks of one group, not as requests of the longest length
    latent_workspace        latent attention whose step needs a workspace for the keys and values of prompts: all, dense
    packs_latents           latents with a sparse index are stored in 656 bytes, unless a dtype is given
    latent_block            tokens that blocks of latents are rounded up to in models that also have states
    experts_room            whether experts' outputs share the buffer of gates and ups (shared) or of activations (two)
    experts_chunk           the most tokens that experts compute at once; 0 for all tokens of a step
    runner                  what the runner allocates rows for before a step is measured: requests, tokens
    counts_only_embeddings  an image counts only as its tower's embeddings, without the tokens around and between them
    image_cache_mib         MiB that cache a tower's outputs for images
    sampler                 how next tokens are drawn: sorted (all probabilities), filtered (a kernel masks them)
    state_dtype             dtype of state-space states, unless the config has one: model, fp32
    capability              lowest compute capability of an NVIDIA card that it runs on, in tenths
    towers                  which stages of a pipeline hold the vision and audio towers: first, all
    pool_share              the share of free memory that becomes the pool, in thousandths
    window_share            tokens of sliding-window layers per thousand tokens of full-attention layers
    state_share             bytes of states per thousand bytes of the other caches; 0 if states have no share
    """

    counts_graphs: bool = False
    measures_since_start: bool = False
    ignores_slots: bool = False
    mixes_pages: bool = False
    steps_in_flight: int = 1
    null_block: bool = False
    compiles: bool = False
    default_step: Literal["", "card", "small card", "request"] = ""
    group_tokens: bool = False
    latent_workspace: Literal["", "all", "dense"] = ""
    packs_latents: bool = False
    latent_block: int = 0
    experts_room: Literal["shared", "two"] = "shared"
    experts_chunk: int = 0
    runner: Literal["", "requests", "tokens"] = ""
    counts_only_embeddings: bool = False
    image_cache_mib: int = 0
    sampler: Literal["", "sorted", "filtered"] = ""
    state_dtype: Literal["model", "fp32"] = "model"
    capability: int = 0
    towers: Literal["first", "all"] = "all"
    pool_share: int = 1000
    window_share: int = 1000
    state_share: int = 0


ENGINES = tuple(engines())
_BY_NAME = {engine.name: engine for engine in ENGINES}


def find_engine(name: str) -> ServingEngine | None:
    """Return the engine named `name`, or of the nearest version at or below, if there is one."""
    return _BY_NAME.get(known_name(name))


def engine_names() -> tuple[str, ...]:
    """Names of all engines."""
    return tuple(_BY_NAME)


def rows(engine: ServingEngine) -> Iterator[EngineSetting]:
    """Yield the inherited rows, then the engine's own; later rows override earlier ones."""
    if engine.like:
        yield from rows(_BY_NAME[engine.like])
    yield from engine.rows


@lru_cache(maxsize=16)
def engine_settings(engine: ServingEngine) -> tuple[EngineDefaults, EngineBehaviour]:
    """Return the defaults of the run's serving options, and what the engine's code does.

    Raises ValueError for a row whose field does not exist or whose value has a wrong type.
    """
    values = {row.field: row.value for row in rows(engine)}
    check_values(values.items(), {**field_types(EngineDefaults), **field_types(EngineBehaviour)}, engine.name)
    defaults = {field: value for field, value in values.items() if field in EngineDefaults._fields}
    behaviour = {field: value for field, value in values.items() if field in EngineBehaviour._fields}
    return EngineDefaults(**defaults), EngineBehaviour(**behaviour)


_CAPTURED = (
    "vLLM's logs: 2.02 GiB for Llama 3.1 8B in INT8 at 0.7 (vllm-project/vllm#14286), 0.64 GiB for a 3B model in 2026 "
    "(generative-computing/granite-switch#128), 0.46 GiB of 0.29 for one request at most (vllm-project/vllm#57475), "
    "0.09 GiB on each of two RTX 5090 (noonghunna/club-3090#1087); the usual is assumed"
)


def cuda_graph_memory(kind: Kind, captured: bool) -> Overhead:
    """Return the memory of captured CUDA graphs, including their pools of activations."""
    what = "CUDA graphs"
    if not captured or kind == "llama.cpp":
        return Overhead(what, 0, 0, 0, "derived", "none are captured")
    return Overhead(what, 92 * MIB, 700 * MIB, 2068 * MIB, "measured", _CAPTURED)


_NON_TORCH = (
    "vLLM 0.6's report of non-torch memory after its profile run: 0.35 GiB on an RTX 3090 (vllm-project/vllm#10517), "
    "0.25 GiB on an RTX 4090 (#13061), 0.30 GiB on an L40S (#15815), 1.79 GiB on an 80 GB card (#10511), including the "
    "driver's context; the part beyond the context is assumed"
)


_SINCE_START = (
    "logs of vLLM 0.7 and 0.8 on one card: 0.03 and 0.05 GiB on a T4 (Unsloth's notebooks), 0.04 GiB on one of 8 GiB "
    "(vllm-project/vllm#12095), 0.16 GiB on an H100 (#12126)"
)


def loaded_kernels(kind: Kind, since_start: bool = False) -> Overhead:
    """Return the driver's memory for kernels and libraries that a step loads, in addition to the CUDA context."""
    if kind == "llama.cpp":
        return Overhead("loaded kernels", 0, 0, 0, "derived", "part of the CUDA context's row")
    if since_start:
        return Overhead("loaded kernels and libraries", 31 * MIB, 51 * MIB, 164 * MIB, "measured", _SINCE_START)
    return Overhead("loaded kernels and libraries", 0, 256 * MIB, 768 * MIB, "assumed", _NON_TORCH)
