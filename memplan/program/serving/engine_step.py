"""The most that a step of a serving engine has beside weights and pool, and the tensors it is."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

from memplan.catalogue.inference.caches import caches
from memplan.catalogue.inference.engine_step import instants, parts_of_rank
from memplan.catalogue.inference.engine_step_deepseek_v4 import LOGITS
from memplan.catalogue.inference.engine_step_towers import MADE, tower_instants
from memplan.catalogue.inference.instant import Instant
from memplan.core.units import ITEMSIZE
from memplan.program.serving.compressed import MODEL_TYPE, room_of
from memplan.program.serving.images import seen
from memplan.program.serving.settings import Settings


class Alive(NamedTuple):
    """One tensor: what it is, its shape in letters and in numbers, dtype and bytes."""

    what: str
    shape: str
    dims: tuple[int, ...]
    dtype: str
    bytes: int


class Step(NamedTuple):
    """The largest moment of a step."""

    where: str
    alive: tuple[Alive, ...]
    source: str
    basis: str

    @property
    def bytes(self) -> int:
        return sum(t.bytes for t in self.alive)


@lru_cache(maxsize=512)
def largest(s: Settings, tokens: int, requests: int, profiled: bool = False) -> Step:
    """The largest moment of a step of `tokens` of `requests`; of that which an engine measures, its encoder's too."""
    own, draft = _model_step(s, tokens, requests, profiled), _draft_step(s, tokens, requests)
    if draft is None:
        return own
    if s.engine.kind == "llama.cpp":  # whose drafts have a context with a buffer of its own
        return own._replace(alive=(*own.alive, *(a._replace(what=f"draft: {a.what}") for a in draft.alive)))
    return max(own, draft, key=lambda step: step.bytes)


def _model_step(s: Settings, tokens: int, requests: int, profiled: bool) -> Step:
    if s.engine.kind == "llama.cpp":
        from memplan.program.serving.llama_cpp import compute_buffer

        one = s._replace(serving=s.serving.model_copy(update={"max_num_batched_tokens": tokens}))
        buffer = compute_buffer(one)
        alive = tuple(Alive(what, "", dims, "", bytes_) for what, dims, bytes_ in buffer.alive)
        source = "llama.cpp src/llama-context.cpp sched_reserve, without data, and the logs that tests hold it to"
        return Step(buffer.where, alive, source, "measured")
    r, stage = s.ranks, s.stage
    axes = {**parts_of_rank(s.model, s.tp, r.dense, r.etp), "s": tokens, "n": min(tokens, requests), "most": s.steps}
    axes["all"] = tokens * r.sharing
    axes["se"] = min(axes["all"], s.words.get("experts_chunk") or axes["all"]) * axes.get("e", 0)
    axes["room"] = _room(s)
    if s.model.model_type == MODEL_TYPE:
        axes |= {**room_of(s), "logits": LOGITS}
    eager = s.engine.kind != "vllm" or not s.serving.cuda_graphs  # vLLM's enforce_eager compiles nothing either
    layers = s.model.layers[stage.first : stage.last]
    ends, gathered = (stage.headed, stage.fed), r.sharing > 1
    room = s.words.get("experts_room", "shared")
    whole = instants(s.model, r.dense, s.words["sampler"], eager, layers, *ends, gathered, room)
    found = [_step(s, instant, axes) for instant in (*whole, *_encoder(s, axes, whole if profiled else ()))]
    return max(found, key=lambda step: step.bytes)


def _draft_step(s: Settings, tokens: int, requests: int) -> Step | None:
    """The largest moment of the draft's own step, with the model's hidden states beside it; None where that is no more
    than one layer of the model takes."""
    draft = s.draft
    if draft is None or draft.settings is None or draft.method == "mtp":
        return None
    own = largest(draft.settings, tokens, requests)
    if s.engine.kind == "llama.cpp":
        return own
    shape = (tokens, s.model.hidden_size)
    hidden = Alive("hidden", "s h", shape, s.dtype, shape[0] * shape[1] * ITEMSIZE[s.dtype])
    return own._replace(where=f"draft: {own.where}", alive=(*own.alive, hidden))


def _encoder(s: Settings, axes: dict[str, int], steps: tuple[Instant, ...]) -> tuple[Instant, ...]:
    """The moments of the tower, whose axes are added, and those of the step with what it has made beside them."""
    found = seen(s) if steps else None
    if found is None:
        return ()
    axes["vn"], axes["vt"] = found.items * found.patches, found.items * found.tokens * found.levels
    axes["vhp"], axes["vfp"] = -(-axes["vh"] // s.tp), -(-axes["vf"] // s.tp)
    later = tuple(i._replace(alive=(*i.alive, MADE)) for i in steps)
    return *tower_instants(s.model.model_type), *later


def _room(s: Settings) -> int:
    """Tokens of cached prompts whose keys and values a step of latents has room for; 0 of an engine that makes none.

    Source: vllm 0.33.0 model_executor/layers/attention/mla_attention.py determine_chunked_prefill_workspace_size.
    """
    made = s.words.get("latent_workspace")
    sparse = any(part.name == "index keys" for c in caches(s.model) for part in c.parts)
    if made is None or (made == "dense" and sparse):
        return 0
    return min(max(8 * s.longest, 4 * (s.serving.max_num_seqs or 1) * s.block), 64 * 1024)


def _step(s: Settings, instant: Instant, axes: dict[str, int]) -> Step:
    alive: list[Alive] = []
    for t in instant.alive:
        dims = tuple(int(a) if a.isdigit() else axes[a] for a in t.shape.split())
        dtype = t.dtype or s.dtype
        alive.append(Alive(t.name, t.shape, dims, dtype, prod(dims) * ITEMSIZE[dtype]))
    return Step(instant.where, tuple(alive), instant.source, instant.basis)
