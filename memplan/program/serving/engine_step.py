"""The peak of a serving engine's step, without weights and pool, and the tensors alive at it."""

from __future__ import annotations

from functools import lru_cache
from math import prod

from memplan.catalogue.inference.caches import caches
from memplan.catalogue.inference.engine_step import instants, parts_of_rank
from memplan.catalogue.inference.engine_step_deepseek_v4 import LOGITS
from memplan.catalogue.inference.engine_step_towers import MADE, tower_instants
from memplan.catalogue.inference.instant import Instant
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE
from memplan.program.serving.compressed import room_of
from memplan.program.serving.images import profiled_items
from memplan.program.serving.settings import Settings


class Alive(NamedTuple):
    """One tensor.

    what   its name
    shape  its shape in axes
    dims   its shape in numbers
    dtype  its dtype
    bytes  its size
    """

    what: str
    shape: str
    dims: tuple[int, ...]
    dtype: str
    bytes: int


class EngineStep(NamedTuple):
    """The peak of a step: where it is, the tensors alive, and how that is known."""

    where: str
    alive: tuple[Alive, ...]
    source: str
    basis: str

    @property
    def bytes(self) -> int:
        return sum(t.bytes for t in self.alive)


@lru_cache(maxsize=512)
def largest(s: Settings, tokens: int, requests: int, profiled: bool = False) -> EngineStep:
    """Return the peak of a step over `tokens` tokens of `requests` requests. The step that an engine profiles
    (`profiled`) also runs the encoder."""
    model, draft = _model_step(s, tokens, requests, profiled), _draft_step(s, tokens, requests)
    if draft is None:
        return model
    if s.engine.kind == "llama.cpp":  # a draft has a context with its own compute buffer
        return model._replace(alive=(*model.alive, *(a._replace(what=f"draft: {a.what}") for a in draft.alive)))
    return max(model, draft, key=lambda step: step.bytes)


def _model_step(s: Settings, tokens: int, requests: int, profiled: bool) -> EngineStep:
    if s.engine.kind == "llama.cpp":
        from memplan.program.serving.llama_cpp import compute_buffer

        settings = s._replace(serving=s.serving.model_copy(update={"max_num_batched_tokens": tokens}))
        buffer = compute_buffer(settings)
        alive = tuple(Alive(what, "", dims, "", bytes_) for what, dims, bytes_ in buffer.alive)
        source = "llama.cpp src/llama-context.cpp sched_reserve, and the published logs that tests compare it with"
        return EngineStep(buffer.where, alive, source, "measured")
    r, stage = s.ranks, s.stage
    axes = {**parts_of_rank(s.model, s.tp, r.dense, r.etp), "s": tokens, "n": min(tokens, requests), "most": s.steps}
    axes["all"] = tokens * r.sharing
    axes["se"] = min(axes["all"], s.behaviour.experts_chunk or axes["all"]) * axes.get("e", 0)
    axes["room"] = _room(s)
    if s.model.has_compressed_cache:
        axes |= {**room_of(s), "logits": LOGITS}
    eager = not (s.behaviour.compiles and s.serving.cuda_graphs)
    layers = s.model.layers[stage.first : stage.last]
    ends, gathered = (stage.headed, stage.receives_hidden), r.sharing > 1
    room = s.behaviour.experts_room
    text = instants(s.model, r.dense, s.behaviour.sampler, eager, layers, *ends, gathered, room)
    steps = [_step(s, instant, axes) for instant in (*text, *_encoder(s, axes, text if profiled else ()))]
    return max(steps, key=lambda step: step.bytes)


def _draft_step(s: Settings, tokens: int, requests: int) -> EngineStep | None:
    """Return the peak of the draft's own step, with the model's hidden states; None if there is none, or if it takes no
    more than a layer of the model."""
    draft = s.draft
    if draft is None or draft.settings is None or (draft.method == "mtp" and s.engine.kind != "llama.cpp"):
        return None
    step = largest(draft.settings, tokens, requests)
    if s.engine.kind == "llama.cpp":
        return step
    shape = (tokens, s.model.hidden_size)
    hidden = Alive("hidden", "s h", shape, s.dtype, shape[0] * shape[1] * ITEMSIZE[s.dtype])
    return step._replace(where=f"draft: {step.where}", alive=(*step.alive, hidden))


def _encoder(s: Settings, axes: dict[str, int], steps: tuple[Instant, ...]) -> tuple[Instant, ...]:
    """Return the moments of the vision tower and those of the step with the tower's output; none without a tower. Adds
    the tower's axes to `axes`."""
    images, tower = profiled_items(s) if steps else None, s.model.family.images
    if images is None or tower is None or "vf" not in axes:
        return ()
    axes["vn"], axes["vt"] = images.items * images.patches, images.items * images.tokens * images.levels
    axes["vhp"], axes["vfp"] = -(-axes["vh"] // s.tp), -(-axes["vf"] // s.tp)
    later = tuple(i._replace(alive=(*i.alive, MADE)) for i in steps)
    return *tower_instants(tower), *later


def _room(s: Settings) -> int:
    """Return the tokens of cached prompts for which a step with latent attention has a workspace of keys and values; 0
    without such a workspace.

    Source: vllm 0.33.0 model_executor/layers/attention/mla_attention.py determine_chunked_prefill_workspace_size.
    """
    workspace = s.behaviour.latent_workspace
    sparse = any(part.name == "index keys" for c in caches(s.model) for part in c.parts)
    if not workspace or (workspace == "dense" and sparse):
        return 0
    return min(max(8 * s.longest, 4 * (s.serving.max_num_seqs or 1) * s.block), 64 * 1024)


def _step(s: Settings, instant: Instant, axes: dict[str, int]) -> EngineStep:
    alive: list[Alive] = []
    for t in instant.alive:
        dims = tuple(int(a) if a.isdigit() else axes[a] for a in t.shape.split())
        dtype = t.dtype or s.dtype
        alive.append(Alive(t.name, t.shape, dims, dtype, prod(dims) * ITEMSIZE[dtype]))
    return EngineStep(instant.where, tuple(alive), instant.source, instant.basis)
