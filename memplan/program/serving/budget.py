"""From a card's bytes to a pool: what the engine takes of the card, less weights, a step and recorded graphs."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from importlib import import_module
from math import ceil
from typing import NamedTuple

from memplan.catalogue.hardware.overhead import Communicator, Overhead, cuda_context, nccl
from memplan.catalogue.profiles.engines import beside_of, graphs_of
from memplan.core.units import MIB
from memplan.program.serving.engine_step import Step, largest
from memplan.program.serving.parallel import each
from memplan.program.serving.pool import Pool
from memplan.program.serving.settings import Settings
from memplan.program.serving.weights import Held, held

_MODULES = {"vllm": "vllm", "sglang": "sglang", "tgi": "tgi", "llama.cpp": "llama_cpp"}


class Budget(NamedTuple):
    """A card's bytes, divided.

    taken      what the engine takes of the card for itself; of a run without a card, just what it needs
    weights    by kind; `step` is the profile run's largest moment, `decoding` that of a step of one token a request
    graphs     recorded graphs, `beside` what the driver loads, `context` what it has for the process, NCCL's too
    available  bytes that are left for the pool; `pool` is what becomes of them
    aside      what is set aside for steps and graphs, where that is not what was measured of them
    wished     the answer shows the pool that the run's requests need, as they do not fit in the one there is
    """

    settings: Settings
    taken: int
    weights: tuple[Held, ...]
    step: Step
    decoding: Step
    graphs: Overhead
    beside: Overhead
    context: Overhead
    nccl: tuple[Overhead, ...]
    available: int
    pool: Pool
    aside: int | None = None
    wished: bool = False

    @property
    def parameters(self) -> int:
        return sum(h.bytes for h in self.weights)

    @property
    def shown(self) -> int:
        """Bytes of the pool in an answer."""
        s = self.settings
        return max(self.pool.bytes, self.pool.needs(s.context, s.batch)) if self.wished else self.pool.bytes

    @property
    def fits(self) -> bool:
        """Whether the run's requests fit at once."""
        return self.room >= 0

    @property
    def room(self) -> int:
        """Bytes of the pool beyond what the run's requests need; negative where they do not fit, or where what is set
        aside for steps does not hold one."""
        s = self.settings
        room = self.available - self.pool.needs(s.context, s.batch)
        return room if self.aside is None else min(room, self.aside - self.step.bytes - self.graphs.usual)


def pool_of(s: Settings, available: int) -> Pool:
    """What so many bytes on each rank become with the engine."""
    return import_module(f"memplan.program.serving.{_MODULES[s.engine.kind]}").pool(s, available)


@lru_cache(maxsize=1024)
def budget(s: Settings, total: int | None, level: str = "usual") -> Budget:
    """How the engine divides a card of `total` bytes that a program can have; without, just enough for the run. Where
    cards have different parts of the layers, it is about that with the smallest pool, which is all that others use of
    theirs; and of equal pools with the largest part.

    `level` is low, usual or high: which end of what was measured beside torch's tensors.
    """
    found = [_of_card(one, total, level) for one in each(s)]
    return min(found, key=lambda b: (b.pool.blocks, -b.taken if total is None else b.room))


@lru_cache(maxsize=1024)
def _of_card(s: Settings, total: int | None, level: str) -> Budget:
    graphs, beside, context, ranks = _overheads(s)
    weights = held(s)
    step = largest(s, s.steps, s.requests, profiled=True)
    decoding = largest(s, min(s.requests, s.steps), s.requests)
    parameters = sum(h.bytes for h in weights)
    before, aside = _at(s, level)
    if total is None:
        needs = pool_of(s, 0).needs(s.context, s.batch)
        available, taken = needs, parameters + step.bytes + aside + needs
    else:
        taken, available = _left(s, total, before, parameters, step.bytes, aside)
    found = Budget(s, taken, weights, step, decoding, graphs, beside, context, ranks, available, pool_of(s, available))
    if s.engine.kind == "sglang" and total is not None:
        return found._replace(aside=total - before - taken)
    return found


def _of_the_longest_prompts(s: Settings) -> int:
    """Bytes of the cache that TGI makes to measure a step, whose tokens the pool has beside its share of what is left.
    Source: text-generation-inference server/text_generation_server/models/flash_causal_lm.py FlashCausalLM.warmup."""
    return pool_of(s, 0).needs(s.steps, 1)


FIT_MARGIN = 1024 * MIB  # llama.cpp common/common.h common_params.fit_params_target: left free on every card


def layers_that_fit(s: Settings) -> int | None:
    """Layers, the head one more, that llama.cpp's --fit lays on its cards where --gpu-layers says nothing: as many as
    leave a GiB of each free; None of another engine, or without a card.

    Whole layers are counted: of a mixture of experts --fit leaves parts of layers with the host.
    Source: llama.cpp common/fit.cpp common_params_fit_impl.
    """
    if s.gpu is None or s.engine.kind != "llama.cpp":
        return None
    total, low, high = s.gpu.usable, 0, s.model.num_hidden_layers + 1

    def fits(layers: int) -> bool:
        one = s._replace(serving=s.serving.model_copy(update={"gpu_layers": layers}))
        return all(_of_card(card, total, "usual").room >= FIT_MARGIN for card in each(one))

    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _overheads(s: Settings) -> tuple[Overhead, Overhead, Overhead, tuple[Overhead, ...]]:
    """Recorded graphs, what is loaded beside torch, the driver's context, and NCCL's."""
    capability = s.gpu.compute_capability if s.gpu else None
    kind = s.engine.kind
    r = s.ranks
    divided = (("tp", max(r.tp, r.dense)), ("pp", r.pp), ("ep" if r.ep > 1 else "dp", r.sharing))
    groups = tuple(Communicator(what, ranks) for what, ranks in divided if ranks > 1)
    return graphs_of(kind, bool(s.serving.cuda_graphs)), beside_of(kind), cuda_context(capability), nccl(groups)


def _at(s: Settings, level: str) -> tuple[int, int]:
    """What is there before the engine looks at its card, and what it takes off for graphs and loaded kernels."""
    graphs, beside, context, ranks = _overheads(s)
    aside = getattr(beside, level) + (getattr(graphs, level) if s.words.get("counts_graphs") else 0)
    return sum(getattr(row, level) for row in (context, *ranks)), aside


def card_for(b: Budget, level: str = "usual") -> int:
    """Bytes that a card must have, at the engine's share of it, for the run's requests to fit at once; of several that
    which needs most."""
    total = b.settings.gpu.usable if b.settings.gpu else None
    return max(_card_for(_of_card(one, total, level), level) for one in each(b.settings))


def _card_for(b: Budget, level: str) -> int:
    s = b.settings
    share = Fraction(s.serving.memory_utilization or 1).limit_denominator(10**6)
    (before, aside), graphs = _at(s, level), getattr(b.graphs, level)
    needs, step = b.pool.needs(s.context, s.batch), b.step.bytes
    match s.engine.kind:
        case "vllm":
            found = (b.parameters + step + aside + needs) / share
        case "sglang":
            found = before + (b.parameters + aside + needs) / share
            if share < 1:
                found = max(found, before + (step + graphs) / (1 - share))
        case "tgi":
            first = _of_the_longest_prompts(s)
            made = first + Fraction((needs - first) * 1000, s.words["wiggle"])
            found = (before + b.parameters + step + aside + made) / share
        case _:
            found = Fraction(before + b.parameters + step + needs)
    return ceil(found)


def _left(s: Settings, total: int, before: int, parameters: int, step: int, aside: int) -> tuple[int, int]:
    """What the engine takes of the card, and what of that is left for the pool."""
    share = s.serving.memory_utilization or 1
    match s.engine.kind:
        case "vllm":
            from memplan.program.serving.vllm import requested

            taken = requested(s, total)
            return taken, taken - parameters - step - aside
        case "sglang":  # of what was free before the weights came, all but a share
            free = total - before
            return round(free * share), int(free - parameters - aside - free * (1 - share))
        case "tgi":
            taken = int(total * share) - before
            first = _of_the_longest_prompts(s)
            return taken, (taken - parameters - step - aside - first) * s.words["wiggle"] // 1000 + first
        case _:
            return total - before, total - before - parameters - step
