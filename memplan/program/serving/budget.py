"""How a serving engine divides a GPU's bytes: the pool gets what weights, a step and CUDA graphs leave of its share."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from importlib import import_module
from math import ceil

from memplan.catalogue.hardware.overhead import Communicator, Overhead, cuda_context, nccl
from memplan.catalogue.profiles.engines import cuda_graph_memory, loaded_kernels
from memplan.catalogue.quantization.gguf import DYNAMIC_SOURCE, dynamic_range
from memplan.core.records import NamedTuple
from memplan.core.units import MIB
from memplan.program.serving.draft_weights import rank_weights
from memplan.program.serving.engine_step import EngineStep, largest
from memplan.program.serving.model_weights import SLOTS, WeightGroup
from memplan.program.serving.parallel import stage_settings
from memplan.program.serving.pool import Pool
from memplan.program.serving.settings import Settings

_MODULES = {"vllm": "vllm", "sglang": "sglang", "tgi": "sglang", "llama.cpp": "llama_cpp"}


class Budget(NamedTuple):
    """How a serving engine divides a GPU's bytes.

    settings           the run's settings
    taken              bytes that the engine takes for itself; for a run without a GPU, just what it needs
    weights            weights by kind
    step               peak of the profile run's step
    decoding           peak of a step with one token per request
    graphs             CUDA graphs
    driver_kernels     kernels that the driver loads
    context            CUDA context
    nccl               NCCL's buffers
    available          bytes left for the pool
    pool               the pool made of them
    aside              bytes set aside for steps and graphs, if the engine does not measure them (SGLang)
    shows_needed_pool  the report shows the pool that the run's requests need, as they do not fit in the actual one
    """

    settings: Settings
    taken: int
    weights: tuple[WeightGroup, ...]
    step: EngineStep
    decoding: EngineStep
    graphs: Overhead
    driver_kernels: Overhead
    context: Overhead
    nccl: tuple[Overhead, ...]
    available: int
    pool: Pool
    aside: int | None = None
    shows_needed_pool: bool = False

    @property
    def parameters(self) -> int:
        return sum(h.bytes for h in self.weights)

    @property
    def paid(self) -> int:
        """Bytes of the weights that the engine's share pays for."""
        return _paid(self.settings, self.weights)

    @property
    def shown(self) -> int:
        """Bytes of the pool in a report."""
        s = self.settings
        return max(self.pool.bytes, self.pool.needs(s.context, s.batch)) if self.shows_needed_pool else self.pool.bytes

    @property
    def fits(self) -> bool:
        """Whether the run's requests fit at once."""
        return self.room >= 0

    @property
    def starts(self) -> bool:
        """Whether the engine starts: vLLM's pool must hold one request of the longest length that it admits."""
        s = self.settings
        return s.engine.kind != "vllm" or self.pool.holds(s.longest, 1)

    @property
    def room(self) -> int:
        """Bytes of the pool beyond what the run's requests need. Negative if they do not fit, or if a step does not fit
        in the bytes set aside for it, or if TGI's warm-up does not fit."""
        s = self.settings
        least = _warm_up_cache(s) if s.engine.kind == "tgi" and s.gpu else 0
        room = self.available - max(least, self.pool.needs(s.context, s.batch))
        return room if self.aside is None else min(room, self.aside - self.step.bytes - self.graphs.usual)


def _paid(s: Settings, weights: tuple[WeightGroup, ...]) -> int:
    return sum(h.bytes for h in weights if not s.behaviour.ignores_slots or h.group != SLOTS)


def pool_of(s: Settings, available: int) -> Pool:
    """Return the engine's pool for `available` bytes on each rank."""
    return import_module(f"memplan.program.serving.{_MODULES[s.engine.kind]}").pool(s, available)


@lru_cache(maxsize=1024)
def budget(s: Settings, total: int | None, level: str = "usual") -> Budget:
    """Return how the engine divides a GPU.

    total  bytes of the GPU that a program can have; None for just enough for the run
    level  `low`, `usual` or `high`: which measured value to use for memory outside torch's tensors

    If GPUs have different layers, it is the GPU with the smallest pool, as the others use no more of theirs; among
    equal pools, the GPU with the largest part of the model.
    """
    budgets = [_stage_budget(of_stage, total, level) for of_stage in stage_settings(s)]
    return min(budgets, key=lambda b: (b.pool.blocks, -b.taken if total is None else b.room))


def _stage_budget(s: Settings, total: int | None, level: str) -> Budget:
    """Return how the engine divides a GPU among the layers of one stage, which its requests do not change."""
    if total is None or s.serving.max_model_len is None:
        return _divided(s, total, level)
    return _divided(s._replace(context=1, prompt=1, batch=1), total, level)._replace(settings=s)


@lru_cache(maxsize=1024)
def _divided(s: Settings, total: int | None, level: str) -> Budget:
    graphs, kernels, context, ranks = _overheads(s)
    weights = rank_weights(s)
    step = largest(s, s.steps, s.requests, profiled=True)
    decoding = largest(s, min(s.requests, s.steps), s.requests)
    parameters = sum(h.bytes for h in weights)
    before, aside = _overhead_bytes(s, level)
    if total is None:
        needs = pool_of(s, 0).needs(s.context, s.batch)
        available, taken = needs, parameters + step.bytes + aside + needs
    else:
        taken, available = _left(s, total, before, _paid(s, weights), step.bytes, aside)
    pool = pool_of(s, available)
    # TGI 3.3.7 models/flash_causal_lm.py warmup logs that a graph finds no memory, and goes on without it
    if s.engine.kind == "tgi" and total is not None:
        left = max(0, total - before - parameters - step.bytes - pool.bytes)
        graphs = graphs._replace(**{each: min(left, getattr(graphs, each)) for each in ("low", "usual", "high")})
    result = Budget(s, taken, weights, step, decoding, graphs, kernels, context, ranks, available, pool)
    if s.engine.kind == "sglang" and total is not None:
        return result._replace(aside=total - before - taken)
    return result


def _warm_up_cache(s: Settings) -> int:
    """Return the bytes of the cache that TGI's warm-up makes for the longest prompts, which becomes part of the pool.

    Source: text-generation-inference server/text_generation_server/models/flash_causal_lm.py FlashCausalLM.warmup.
    """
    return pool_of(s, 0).needs(s.steps, 1)


FIT_MARGIN = 1024 * MIB  # left free on every GPU: llama.cpp common/common.h common_params.fit_params_target


def layers_that_fit(s: Settings) -> int | None:
    """Return how many layers llama.cpp's --fit puts on its GPUs if --gpu-layers is not given; the head counts as one.

    These are as many as leave a GiB of each GPU free. None for another engine, or without a GPU. Only whole layers are
    counted; for a mixture of experts --fit also leaves parts of layers on the host.
    Source: llama.cpp common/fit.cpp common_params_fit_impl.
    """
    if s.gpu is None or s.engine.kind != "llama.cpp":
        return None
    counts = range(1, s.model.num_hidden_layers + 2)
    return bisect_left(counts, True, key=lambda layers: not _has_margin(s, gpu_layers=layers))


def experts_on_host(s: Settings) -> int | None:
    """Return the least of llama.cpp's --n-cpu-moe that leaves a GiB of each GPU free, None as for `layers_that_fit`."""
    if s.gpu is None or s.engine.kind != "llama.cpp":
        return None
    counts = range(s.model.num_hidden_layers + 1)
    least = bisect_left(counts, True, key=lambda layers: _has_margin(s, n_cpu_moe=layers))
    return least if least in counts else None


def _has_margin(s: Settings, **fields: int) -> bool:
    """Whether --fit would be content with other settings, on every GPU."""
    assert s.gpu is not None
    settings, total = s._replace(serving=s.serving.model_copy(update=fields)), s.gpu.usable
    return all(_stage_budget(card, total, "usual").room >= FIT_MARGIN for card in stage_settings(settings))


def _overheads(s: Settings) -> tuple[Overhead, Overhead, Overhead, tuple[Overhead, ...]]:
    """Return the overheads of CUDA graphs, of loaded kernels, of the CUDA context, and of NCCL."""
    capability = s.gpu.compute_capability if s.gpu else None
    kind = s.engine.kind
    r = s.ranks
    divided = (("tp", max(r.tp, r.dense)), ("pp", r.pp), ("ep" if r.ep > 1 else "dp", r.sharing))
    groups = tuple(Communicator(what, ranks) for what, ranks in divided if ranks > 1)
    return (
        cuda_graph_memory(kind, bool(s.serving.cuda_graphs)),
        loaded_kernels(kind, s.behaviour.measures_since_start),
        cuda_context(capability),
        (*nccl(groups), *_dynamic_types(s)),
    )


def _dynamic_types(s: Settings) -> Iterator[Overhead]:
    """Yield by how much the weights of a dynamic GGUF file may differ from those that are counted."""
    low_high = dynamic_range(s.quantization) if isinstance(s.quantization, str) else None
    if low_high is not None:
        low, high = (sum(h.bytes for h in rank_weights(s)) * share // 1000 for share in low_high)
        yield Overhead("types of a dynamic GGUF file", low, 0, high, "assumed", DYNAMIC_SOURCE)


def _overhead_bytes(s: Settings, level: str) -> tuple[int, int]:
    """Return the bytes in use before the engine measures its GPU, and those it sets aside for graphs and kernels."""
    graphs, kernels, context, ranks = _overheads(s)
    aside = getattr(kernels, level) + (getattr(graphs, level) if s.behaviour.counts_graphs else 0)
    return sum(getattr(row, level) for row in (context, *ranks)), aside


def card_for(b: Budget, level: str = "usual") -> int:
    """Return the bytes that a GPU needs for the run's requests to fit at once, given the engine's share of it. If GPUs
    have different layers, the most that any of them needs."""
    total = b.settings.gpu.usable if b.settings.gpu else None
    return max(_card_for(_stage_budget(of_stage, total, level), level) for of_stage in stage_settings(b.settings))


def _card_for(b: Budget, level: str) -> int:
    s = b.settings
    share = Fraction(s.serving.memory_utilization or 1).limit_denominator(10**6)
    (before, aside), graphs = _overhead_bytes(s, level), getattr(b.graphs, level)
    needs, step = b.pool.needs(s.context, s.batch), b.step.bytes
    match s.engine.kind:
        case "vllm":
            total = (b.paid + step + aside + needs) / share
        case "sglang":
            total = before + (b.parameters + aside + needs) / share
            if share < 1:
                total = max(total, before + (step + graphs) / (1 - share))
        case "tgi":
            warm_up = _warm_up_cache(s)
            pool = warm_up + Fraction(max(0, needs - warm_up) * 1000, s.behaviour.pool_share)
            total = (before + b.parameters + step + aside + pool) / share
        case _:
            total = Fraction(before + b.parameters + step + needs)
    return ceil(total)


def _left(s: Settings, total: int, before: int, parameters: int, step: int, aside: int) -> tuple[int, int]:
    """Return the bytes that the engine takes of the GPU, and those left for the pool."""
    share = s.serving.memory_utilization or 1
    match s.engine.kind:
        case "vllm":
            taken = ceil(total * share)  # v1/worker/utils.py request_memory
            return taken, taken - parameters - step - aside
        case "sglang":  # a share of the memory that was free before the weights were loaded
            free = total - before
            return round(free * share), int(free - parameters - aside - free * (1 - share))
        case "tgi":
            taken = int(total * share) - before
            warm_up = _warm_up_cache(s)
            return taken, (taken - parameters - step - aside - warm_up) * s.behaviour.pool_share // 1000 + warm_up
        case _:
            return total - before, total - before - parameters - step
