"""How the cards of an engine divide a model: ranks of a matrix, stages of a pipeline, replicas that share experts.

vLLM's ranks are tp x dp x pp. Of a model with experts the dp groups of ranks share them: each divides its attention and
its MLPs by tp, and the experts are divided by tp x dp, by their width or (ep) one by one. SGLang's groups are replicas,
but with attention that is data parallel (`dp_attention`): then attention is divided by tp alone, all else but the
embeddings by tp x dp, of which ep take whole experts.

llama.cpp is one process that lays layers on all its cards.

Source: vllm 0.33.0 model_executor/layers/fused_moe/config.py FusedMoEParallelConfig.make; sglang 0.5.23
arg_groups/fields/parallel.py attn_dp_size, layers/vocab_parallel_embedding.py, layers/moe/fused_moe_triton/layer.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from memplan.catalogue.caches import caches
from memplan.errors import SpecError
from memplan.models import ModelSpec
from memplan.serving.stages import Stage, by_card, pipeline, whole
from memplan.spec import Parallelism, RunSpec, Serving

if TYPE_CHECKING:
    from memplan.catalogue.engines import Engine
    from memplan.serving.settings import Settings


def attention_free(model: ModelSpec) -> bool:
    """Whether no layer keeps keys, but states alone."""
    return all(c.kind in ("state", "") for c in caches(model))


class Ranks(NamedTuple):
    """How many cards divide what.

    tp       attention, and all that nothing else is said of
    dense    MLPs and the head
    ep       experts, one by one; etp their width
    sharing  groups of ranks whose tokens meet at the experts
    pp       stages of layers
    cards    of llama.cpp
    """

    tp: int = 1
    dense: int = 1
    ep: int = 1
    etp: int = 1
    sharing: int = 1
    pp: int = 1
    cards: int = 1


def ranks_of(run: RunSpec, engine: Engine, model: ModelSpec) -> Ranks:
    """Raises SpecError for what the engine does not divide so."""
    p, s = run.parallelism, run.serving
    usual = Parallelism(world=p.world, dp=p.dp, tp=p.tp, pp=p.pp, ep=p.ep, strategy=p.strategy)
    other = next((name for name in Parallelism.model_fields if getattr(p, name) != getattr(usual, name)), None)
    if other is not None or p.strategy not in ("none", "ddp"):
        field = f"parallelism.{other or 'strategy'}"
        raise SpecError(f"{field}: {engine.name} is told dp, tp, pp and ep alone", field)
    if p.world != p.dp * p.tp * p.pp:
        raise SpecError(
            f"parallelism.world: {p.world} GPUs are not dp {p.dp} x tp {p.tp} x pp {p.pp}", "parallelism.world"
        )
    if engine.kind == "llama.cpp":
        return _cards(run)
    for name in ("split_mode", "tensor_split", "main_gpu"):
        if getattr(s, name) is not None:
            raise SpecError(f"serving.{name}: is llama.cpp's, and {engine.name} has no such", f"serving.{name}")
    if s.dp_attention is not None and engine.kind != "sglang":
        why = "shares experts between dp groups always" if engine.kind == "vllm" else "has no such"
        raise SpecError(f"serving.dp_attention: is SGLang's, and {engine.name} {why}", "serving.dp_attention")
    if engine.kind == "tgi" and (p.pp > 1 or p.ep > 1):
        field = "pp" if p.pp > 1 else "ep"
        raise SpecError(f"parallelism.{field}: {engine.name} divides matrices alone (tp)", f"parallelism.{field}")
    if model.num_attention_heads % p.tp and not attention_free(model):
        raise SpecError(
            f"parallelism.tp: {p.tp} does not divide {model.num_attention_heads} attention heads", "parallelism.tp"
        )
    if p.pp > model.num_hidden_layers:
        raise SpecError(
            f"parallelism.pp: {p.pp} stages of {model.num_hidden_layers} layers leave some with none", "parallelism.pp"
        )
    return _grouped(run, engine, model)


def _grouped(run: RunSpec, engine: Engine, model: ModelSpec) -> Ranks:
    """vLLM's and SGLang's groups of ranks."""
    p, experts = run.parallelism, model.axes().get("E", 0)
    together = (engine.kind == "vllm" and bool(experts)) or bool(run.serving.dp_attention)
    sharing = p.dp if together else 1
    over = p.tp * sharing
    if p.ep > 1 and not experts:
        raise SpecError(f"parallelism.ep: {model.model_type} models have no experts to divide", "parallelism.ep")
    if p.ep > 1 and engine.kind == "vllm" and p.ep != over:
        raise SpecError(
            f"parallelism.ep: vLLM's --enable-expert-parallel divides experts over all tp x dp ranks: "
            f"{f'1 or {over}' if over > 1 else 1}, not {p.ep}",
            "parallelism.ep",
        )
    if over % p.ep:
        raise SpecError(f"parallelism.ep: {p.ep} does not divide the {over} ranks that have experts", "parallelism.ep")
    if p.ep > experts > 0:
        raise SpecError(f"parallelism.ep: {p.ep} ranks of {experts} experts leave some with none", "parallelism.ep")
    dense = over if run.serving.dp_attention else p.tp
    return Ranks(p.tp, dense, p.ep, over // p.ep, sharing, p.pp)


def _cards(run: RunSpec) -> Ranks:
    """llama.cpp's cards: --gpus, or --pp."""
    p, s = run.parallelism, run.serving
    if s.dp_attention is not None:
        raise SpecError("serving.dp_attention: is SGLang's, and llama.cpp has no such", "serving.dp_attention")
    if p.tp > 1 or p.ep > 1:
        field = "tp" if p.tp > 1 else "ep"
        raise SpecError(
            f"parallelism.{field}: llama.cpp lays whole layers on its cards (serving.split_mode layer): say how many "
            "GPUs there are alone",
            f"parallelism.{field}",
        )
    if s.split_mode in ("row", "tensor"):
        why = {
            "row": "llama.cpp of 2026 has no buffers for CUDA that are split by rows; layer, none",
            "tensor": "experimental in llama.cpp of 2026, and not supported yet; layer, none",
        }
        raise SpecError(f"serving.split_mode: {s.split_mode}: {why[s.split_mode]}", "serving.split_mode")
    if s.main_gpu is not None and s.split_mode != "none":
        raise SpecError(
            "serving.main_gpu: has all under split_mode none; with layer the proportions are tensor_split's",
            "serving.main_gpu",
        )
    if s.main_gpu is not None and s.main_gpu >= p.world:
        raise SpecError(f"serving.main_gpu: {s.main_gpu} of {p.world} GPUs, counted from 0", "serving.main_gpu")
    if s.tensor_split is not None:
        if s.split_mode == "none":
            raise SpecError("serving.tensor_split: split_mode none lays all on one card", "serving.tensor_split")
        if len(s.tensor_split) > p.world:
            raise SpecError(
                f"serving.tensor_split: {len(s.tensor_split)} parts of {p.world} GPUs", "serving.tensor_split"
            )
    return Ranks(cards=1 if s.split_mode == "none" else p.world)


def stages_of(engine: Engine, model: ModelSpec, ranks: Ranks, serving: Serving) -> tuple[Stage, ...]:
    """What each card has, of ranks that divide matrices the first."""
    layers = model.num_hidden_layers
    if engine.kind == "llama.cpp":
        split = serving.tensor_split or ()
        return by_card(layers, serving.gpu_layers or 0, ranks.cards, split if any(split) else ())
    if ranks.pp == 1:
        return (whole(layers),)
    stages = pipeline(layers, ranks.pp, "middle" if engine.kind == "vllm" else "last")
    if not model.tie_word_embeddings:
        return stages
    return (*stages[:-1], stages[-1]._replace(embedded=True))


def each(s: Settings) -> tuple[Settings, ...]:
    """The settings of every card that has another part of the layers."""
    return tuple(s._replace(stage=stage) for stage in stages_of(s.engine, s.model, s.ranks, s.serving))
