"""Optimizers: the states each keeps, and what its step needs besides. Here the rows of `optimizers` become bytes.

What a row says of a parameter is in `parameters`, what a parameter's turn does to the memory in `loops`, and how that
is played through in `stepping`.

Left out is what is a few bytes in host memory: torch's `step` of every parameter, where it is not on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import prod
from typing import NamedTuple

from memplan.catalogue.optimizers.optimizers import OPTIMIZERS, REFUSED, Optimizer, Rule, one_each
from memplan.catalogue.optimizers.parameter_rules import Parameter, bytes_of, large_no_embedding
from memplan.catalogue.optimizers.step_language import Step, Turn, largest_update, makes_states, peak
from memplan.core.errors import SpecError, UnknownNameError
from memplan.core.units import ITEMSIZE, rounded

__all__ = [
    "GRAD_SCALER",
    "OptimizerMemory",
    "Parameter",
    "State",
    "clipping",
    "optimizer_memory",
    "optimizer_names",
    "spares_embeddings",
    "takes_foreach",
]


class State(NamedTuple):
    """One kind of state tensor of one parameter, times the parameter's copies.

    `parameter` is empty for a tensor that all parameters share. `bytes` are of one, rounded to 512, or as they are
    where the tensor lives on the host.
    """

    what: str
    parameter: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (the contract's word)
    host: bool = False


class OptimizerMemory(NamedTuple):
    """What an optimizer holds, and what its step needs beside parameters, gradients and all states.

    first, later    bytes alive only inside the first step, and at most inside any other
    scratch         in words, what that is
    listed          of it, the lists with a tensor for every parameter: bytes of one, and how many like it
    at_once         the states are there before the first step
    frees_gradients gradients go in backward, as they come, and step() does nothing
    backward        bytes alive inside backward because of that: one parameter's update, beside the gradient that
                    backward has just made
    basis           derived (traced or exact), measured or assumed
    """

    states: tuple[State, ...]
    first: int
    later: int
    scratch: str
    listed: tuple[tuple[int, int], ...]
    at_once: bool
    frees_gradients: bool
    backward: int
    source: str
    basis: str


def optimizer_names() -> tuple[str, ...]:
    """Every name that `optimizer_memory` answers: of transformers' OptimizerNames all that run, `none` and `muon`."""
    return tuple(OPTIMIZERS)


def takes_foreach(name: str) -> bool:
    """Whether torch steps it with lists or, on demand, one parameter at a time."""
    row = OPTIMIZERS.get(name)
    return row is not None and row.alone is not None


def spares_embeddings(name: str) -> bool:
    """Whether the Trainer has the optimizer keep embeddings' states in fp32, where it would quantise them otherwise."""
    row = OPTIMIZERS.get(name)
    return row is not None and any(rule.of is large_no_embedding for rule in row.states)


def optimizer_memory(
    name: str,
    parameters: Sequence[Parameter],
    *,
    foreach: bool | None = None,
    state_dtype: str | None = None,
    momentum: float | None = None,
    master: str | None = None,
    in_backward: bool = False,
    on_host: bool = False,
) -> OptimizerMemory:
    """What the optimizer `name` holds for `parameters`: one group, in order, without weight decay.

    foreach     for torch's own (see `takes_foreach`): True or None for lists, False for a loop
    state_dtype of moments, instead of the optimizer's own choice
    momentum    of sgd and rmsprop
    master      mixed precision: parameters of another dtype have a copy in this one, and the optimizer works on that.
                torch's optimizers then run as apex's multi-tensor kernels do, without a step of each parameter's own
    in_backward every parameter has an optimizer of its own, which steps in a hook as soon as the gradient is there
    on_host     all it holds is in host memory, and the update is computed there (see `_moved`)

    Raises UnknownNameError, and SpecError for a name of OptimizerNames that cannot run.
    """
    if name in REFUSED:
        raise SpecError(f"optimizer.name: {name}: {REFUSED[name]}", "optimizer.name")
    row = OPTIMIZERS.get(name)
    if row is None:
        raise UnknownNameError("optimizer.name", name, OPTIMIZERS)
    row = _as_asked(row, foreach, momentum, bool(master))
    if in_backward and not row.frees_gradients:
        row = one_each(row)
    masters: list[State] = []
    states: list[State] = []
    turns: list[tuple[int, Turn]] = []
    cache: dict[Parameter, tuple[list[State], Turn]] = {}
    for p in parameters:
        if master and p.dtype != master:
            masters.append(State("master weight", p.name, p.shape, master, bytes_of(p.shape, master), p.copies))
        kind = Parameter("", p.shape, master or p.dtype, 1, p.embedding, p.target)
        if kind not in cache:
            cache[kind] = _states(row, kind, state_dtype or row.moments or kind.dtype)
        own, turn = cache[kind]
        states += [State(s.what, p.name, s.shape, s.dtype, s.bytes, p.copies, s.host) for s in own]
        turns.append((p.copies, turn))
    if any(turn.shared for _, turn in turns):
        states += [_state(rule, parameters[0], "fp32") for rule in row.shared]
    first, later = (0, 0) if row.frees_gradients else _step(row, turns, states)
    backward = _largest_alone(row, [turn for _, turn in cache.values()]) if row.frees_gradients else 0
    exact = not state_dtype and (not master or row.apex)
    memory = OptimizerMemory(
        states=(*masters, *states),
        first=first,
        later=later,
        scratch=row.scratch if first or later or backward else "",
        listed=tuple(_listed(row, turns)) if first or later else (),
        at_once=row.at_once,
        frees_gradients=row.frees_gradients,
        backward=backward,
        source=f"{row.source}; master weights as apex and Megatron-LM keep them" if master else row.source,
        basis=row.basis if exact else "assumed",
    )
    return _moved(memory, parameters, master) if on_host else memory


def _moved(memory: OptimizerMemory, parameters: Sequence[Parameter], master: str | None = None) -> OptimizerMemory:
    """The same in host memory, which then has a copy of every parameter, or its master, and of its gradient too.

    Gradients are copied there and parameters back, each over the tensor that is there, so that the step needs nothing
    on the GPU: where dtypes differ the host converts, as in torch's blocking copies. Stepping in backward, a gradient
    goes as soon as it has been copied. Left out: torchao leaves parameters of fewer than 4096 elements where they are.

    Source: torchao 0.18 optim/cpu_offload.py CPUOffloadOptimizer; torch 2.13 aten/src/ATen/native/cuda/Copy.cu.
    """
    copies: list[State] = []
    for p in parameters:
        dtype = master or p.dtype
        if dtype == p.dtype:
            copies.append(State("copy", p.name, p.shape, dtype, 0, p.copies))
        copies.append(State("gradient", p.name, p.shape, dtype, 0, p.copies))
    states = (s._replace(bytes=prod(s.shape) * ITEMSIZE[s.dtype], host=True) for s in (*memory.states, *copies))
    return memory._replace(
        states=tuple(states),
        first=0,
        later=0,
        scratch="",
        listed=(),
        backward=0,
        source=f"{memory.source}; moved to the host as torchao 0.18 optim/cpu_offload.py does",
    )


def _as_asked(row: Optimizer, foreach: bool | None, momentum: float | None, mixed: bool) -> Optimizer:
    """The row as the arguments change it."""
    if not momentum:
        row = row._replace(states=tuple(r for r in row.states if not r.momentum))
    if row.apex and mixed:
        return row._replace(states=tuple(r for r in row.states if r.what != "step"), lists=0)
    if foreach is not False or row.alone is None:
        return row
    return row._replace(lists=0, loop=row.alone, scratch="one parameter's update, and that of the one before")


def _state(rule: Rule, p: Parameter, moment: str) -> State:
    dtype = moment if rule.dtype == "moment" else p.dtype if rule.dtype == "own" else rule.dtype
    shape, host = rule.shape(p), rule.host(p)
    size = prod(shape) * ITEMSIZE[dtype]
    return State(rule.what, "", shape, dtype, size if host else rounded(size), 1, host)


def _states(row: Optimizer, p: Parameter, moment: str) -> tuple[list[State], Turn]:
    """The states of one parameter, and its turn in the loop."""
    rank = row.rank(p) if row.rank and p.target and len(p.shape) == 2 else 0
    low = p
    if rank:
        m, n = p.shape
        low = p._replace(shape=(m, rank) if m >= n else (rank, n))
    projector = [_state(rule, p, moment) for rule in row.projector if rank and rule.of(p)]
    states = [_state(rule, low, moment) for rule in row.states if rule.of(low)]
    made = {s.what: s.bytes for s in projector}
    made["states"] = sum(s.bytes for s in states if not s.host)
    shared = sum(_state(rule, low, moment).bytes for rule in row.shared if rule.of(low))
    loop = row.projected if rank else row.loop if row.takes(p) else ()
    return projector + states, Turn(p.shape, low.shape, rank, p.dtype, moment, made, shared, loop)


def _step(row: Optimizer, turns: Sequence[tuple[int, Turn]], states: Sequence[State]) -> tuple[int, int]:
    """Bytes beside all states, in the first step and at most in a later one."""
    lists = sum(bytes_ * n for bytes_, n in _listed(row, turns))
    order = sorted(turns, key=lambda turn: turn[1].rank > 0)  # the Trainer's groups: first the others, then targets
    runs = [(n, [turn for _, turn in run]) for n, run in groupby(order, key=lambda turn: turn[0])]
    later = max(peak(runs, Step.LATER), peak(runs, Step.PROJECTING) if row.projected else 0)
    first = later
    if makes_states((*row.loop, *row.projected)):
        first = max(0, peak(runs, Step.FIRST) - sum(s.bytes * s.count for s in states if not s.host))
    return max(first, lists if row.since == 1 else 0), max(later, lists)


def _listed(row: Optimizer, turns: Sequence[tuple[int, Turn]]) -> Iterator[tuple[int, int]]:
    """The lists of a step: a moment's bytes for every parameter that is not looped over, and how many like it."""
    for _ in range(row.lists):
        yield from ((bytes_of(turn.shape, turn.moment), n) for n, turn in turns if not turn.loop)


def _largest_alone(row: Optimizer, turns: Sequence[Turn]) -> int:
    """Bytes beside all states when a parameter is stepped by itself: of the one that needs most."""
    lists = max((row.lists * bytes_of(turn.shape, turn.moment) for turn in turns if not turn.loop), default=0)
    return max(lists, largest_update(turns))


def clipping(parameters: Sequence[Parameter]) -> int:
    """Bytes of `clip_grad_norm_`: a norm of every gradient, and either the kernel's partial sums or their stack.

    Gradients are in the parameters' dtypes. Source: torch 2.13 nn/utils/clip_grad.py, ATen's ForeachReduceOp.cu.
    """
    count: dict[str, int] = {}
    largest: dict[str, int] = {}
    for p in parameters:
        count[p.dtype] = count.get(p.dtype, 0) + p.copies
        largest[p.dtype] = max(largest.get(p.dtype, 0), prod(p.shape))
    if not count:
        return 0
    tensors = sum(count.values())
    partial = max(rounded(4 * n * -(-largest[dtype] // 65536)) for dtype, n in count.items())
    stack = rounded(tensors * max(ITEMSIZE[dtype] for dtype in count))
    return 512 * tensors + max(partial, stack + 512)


# What torch's GradScaler holds for fp16 beside at most 1536 bytes while it unscales, in place: the first two rows from
# its first use on, the last from unscale_ to update. It takes no fp16 gradients. Source: torch 2.13 amp/grad_scaler.py.
GRAD_SCALER = (
    State("scale", "", (), "fp32", 512, 1),
    State("growth_tracker", "", (), "int32", 512, 1),
    State("found_inf", "", (), "fp32", 512, 1),
)
