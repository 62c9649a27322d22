"""The ranks of a serving engine: tensor, pipeline, data and expert parallel degrees."""

from __future__ import annotations

from memplan.catalogue.inference.caches import caches
from memplan.catalogue.profiles.engines import Engine
from memplan.core.errors import SpecError
from memplan.models.model import ModelSpec
from memplan.program.serving.settings import Ranks
from memplan.spec.parallelism import Parallelism
from memplan.spec.run import RunSpec


def attention_free(model: ModelSpec) -> bool:
    """Whether no layer keeps keys, but states alone."""
    return all(c.kind in ("state", "") for c in caches(model))


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
