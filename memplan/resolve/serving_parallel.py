"""The ranks of a serving engine: its tensor, pipeline, data and expert parallel degrees."""

from __future__ import annotations

import re

from memplan.catalogue.inference.caches import caches
from memplan.catalogue.profiles.engines import ServingEngine
from memplan.core.errors import refused
from memplan.models.model import ModelSpec
from memplan.program.serving.settings import ServingRanks
from memplan.spec.parallelism import Parallelism
from memplan.spec.run import RunSpec
from memplan.spec.serving import Serving


def attention_free(model: ModelSpec) -> bool:
    """Return whether no layer keeps keys and values, only states."""
    return all(c.kind in ("state", "") for c in caches(model))


def ranks_of(run: RunSpec, engine: ServingEngine, model: ModelSpec) -> ServingRanks:
    """Return the run's ranks. Raises SpecError for degrees that the engine does not support."""
    p, s = run.parallelism, run.serving
    usual = Parallelism(world=p.world, dp=p.dp, tp=p.tp, pp=p.pp, ep=p.ep, strategy=p.strategy)
    other = next((name for name in Parallelism.model_fields if getattr(p, name) != getattr(usual, name)), None)
    if other is not None or p.strategy not in ("none", "ddp"):
        field = f"parallelism.{other or 'strategy'}"
        raise refused(field, f"{engine.name} only takes dp, tp, pp and ep")
    if p.world != p.dp * p.tp * p.pp:
        raise refused("parallelism.world", f"{p.world} GPUs are not dp {p.dp} x tp {p.tp} x pp {p.pp}")
    if engine.kind == "llama.cpp":
        return _llama_cpp_gpus(run)
    for name in ("split_mode", "tensor_split", "main_gpu"):
        if getattr(s, name) is not None:
            raise refused(f"serving.{name}", f"only applies to llama.cpp, not to {engine.name}")
    if s.dp_attention is not None and engine.kind != "sglang":
        why = ", which always shares experts between dp groups" if engine.kind == "vllm" else ""
        raise refused("serving.dp_attention", f"only applies to SGLang, not to {engine.name}{why}")
    if engine.kind == "tgi" and (p.pp > 1 or p.ep > 1):
        field = "pp" if p.pp > 1 else "ep"
        raise refused(f"parallelism.{field}", f"{engine.name} only supports tp")
    if model.num_attention_heads % p.tp and not attention_free(model):
        raise refused("parallelism.tp", f"{p.tp} does not divide {model.num_attention_heads} attention heads")
    if p.pp > model.num_hidden_layers:
        raise refused("parallelism.pp", f"{p.pp} stages are more than the model's {model.num_hidden_layers} layers")
    return _grouped_ranks(run, engine, model)


def _grouped_ranks(run: RunSpec, engine: ServingEngine, model: ModelSpec) -> ServingRanks:
    """Return the ranks of vLLM and SGLang."""
    p, experts = run.parallelism, model.axes().get("E", 0)
    shares_experts = (engine.kind == "vllm" and bool(experts)) or bool(run.serving.dp_attention)
    sharing = p.dp if shares_experts else 1
    expert_ranks = p.tp * sharing
    if p.ep > 1 and not experts:
        raise refused("parallelism.ep", f"{model.model_type} models have no experts to divide")
    if p.ep > 1 and engine.kind == "vllm" and p.ep != expert_ranks:
        raise refused(
            "parallelism.ep",
            "vLLM's --enable-expert-parallel uses all tp x dp ranks; use "
            f"{f'1 or {expert_ranks}' if expert_ranks > 1 else 1}, not {p.ep}",
        )
    if expert_ranks % p.ep:
        raise refused("parallelism.ep", f"{p.ep} does not divide the {expert_ranks} ranks that hold experts")
    if p.ep > experts > 0:
        raise refused("parallelism.ep", f"{p.ep} ranks are more than the model's {experts} experts")
    dense = expert_ranks if run.serving.dp_attention else p.tp
    return ServingRanks(p.tp, dense, p.ep, expert_ranks // p.ep, sharing, p.pp)


def _llama_cpp_gpus(run: RunSpec) -> ServingRanks:
    """Return llama.cpp's GPUs, from --gpus or --pp."""
    p, s = run.parallelism, run.serving
    if s.dp_attention is not None:
        raise refused("serving.dp_attention", "only applies to SGLang, not to llama.cpp")
    if p.tp > 1 or p.ep > 1:
        field = "tp" if p.tp > 1 else "ep"
        raise refused(
            f"parallelism.{field}", "llama.cpp splits by layers (serving.split_mode layer); only set the number of GPUs"
        )
    if s.split_mode in ("row", "tensor"):
        why = {
            "row": "llama.cpp of 2026 has no row-split CUDA buffers; use layer or none",
            "tensor": "is experimental in llama.cpp of 2026 and not supported yet; use layer or none",
        }
        raise refused("serving.split_mode", f"{s.split_mode}: {why[s.split_mode]}")
    if s.main_gpu is not None and s.split_mode != "none":
        raise refused("serving.main_gpu", "only applies to split_mode none; with layer use tensor_split")
    if s.main_gpu is not None and s.main_gpu >= p.world:
        raise refused("serving.main_gpu", f"{s.main_gpu} is not one of {p.world} GPUs, counted from 0")
    if s.tensor_split is not None:
        if s.split_mode == "none":
            raise refused("serving.tensor_split", "has no effect with split_mode none, which uses one GPU")
        if len(s.tensor_split) > p.world:
            raise refused("serving.tensor_split", f"has {len(s.tensor_split)} parts for {p.world} GPUs")
    cards = 1 if s.split_mode == "none" else p.world
    _refuse_overrides(s, cards)
    return ServingRanks(cards=cards)


# Groups that repeat, and more than six repetitions in one alternative, take too long to match.
_SLOW = re.compile(r"\)[*+{]|(?:[^|]*?(?<!\\)[*+{]){7}")
_LONGEST = 4096  # characters of a pattern


def _refuse_overrides(s: Serving, cards: int) -> None:
    """Raise SpecError for overrides of tensors that are not a pattern and a buffer."""
    field = "serving.override_tensor"
    for text in s.override_tensor or ():
        pattern, _, buffer = text.rpartition("=")
        if not pattern:
            raise refused(field, f"{text!r:.60} is not PATTERN=BUFFER; write exps=CPU to keep the experts on the host")
        number = re.fullmatch(r"(?:CPU|(?:CUDA|ROCm|Vulkan|SYCL|MUSA)(\d{1,4}))", buffer)
        if number is None:
            raise refused(field, f"{buffer!r:.40} is not a buffer; use CPU, or CUDA0 for the first GPU")
        if number[1] and int(number[1]) >= cards:
            raise refused(field, f"{buffer} is not one of {cards} GPUs, counted from 0")
        if len(pattern) > _LONGEST or _SLOW.search(pattern):
            raise refused(field, f"{pattern!r:.60} would take too long to match; write it without repeated groups")
        try:
            re.compile(pattern)
        except re.error as error:
            raise refused(field, f"{pattern!r:.60} is not a regular expression: {error}") from None
