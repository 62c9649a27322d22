"""Bytes of an optimizer's states and of the temporaries of its step.

Turns the rows of `optimizers` into bytes, with the rules of `parameter_rules` and the loops of `step_loops`, which
`step_language` plays through.

Left out: torch's `step` count of every parameter when it is in host memory, a few bytes each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from math import prod

from memplan.catalogue.optimizers.optimizers import OPTIMIZERS, REFUSED, OptimizerRow, Rule, stepped_in_backward
from memplan.catalogue.optimizers.parameter_rules import Parameter, bytes_of, large_no_embedding
from memplan.catalogue.optimizers.step_language import StepInstruction, Turn, largest_update, makes_states, peak
from memplan.core.errors import UnknownNameError, refused
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE, rounded

__all__ = [
    "GRAD_SCALER",
    "OptimizerMemory",
    "Parameter",
    "State",
    "clipping",
    "optimizer_memory",
    "optimizer_names",
    "row_of",
    "spares_embeddings",
    "takes_foreach",
]


class State(NamedTuple):
    """One kind of state tensor of one parameter.

    what       name of the state
    parameter  name of the parameter; empty for a tensor that all parameters share
    shape      shape of one tensor
    dtype      dtype of one tensor
    bytes      bytes of one tensor: rounded to 512 on the GPU, exact on the host
    count      number of copies
    host       whether it is in host memory
    """

    what: str
    parameter: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (the contract's word)
    host: bool = False


class OptimizerMemory(NamedTuple):
    """An optimizer's states, and the temporaries of its step in addition to parameters, gradients and states.

    states           the state tensors
    first            bytes alive only inside the first step
    later            most bytes alive only inside any later step
    scratch          those temporaries, in words
    foreach_lists    their share in lists with one tensor per parameter: (bytes of one tensor, number of tensors)
    at_once          states exist before the first step
    frees_gradients  gradients are freed in backward as they come, and step() does nothing
    backward         bytes of one parameter's update inside backward, not counting its gradient, if it frees gradients
    source           where the facts come from
    basis            derived (traced or exact), measured or assumed
    """

    states: tuple[State, ...]
    first: int
    later: int
    scratch: str
    foreach_lists: tuple[tuple[int, int], ...]
    at_once: bool
    frees_gradients: bool
    backward: int
    source: str
    basis: str


def optimizer_names() -> tuple[str, ...]:
    """Every name that `optimizer_memory` accepts: all of transformers' OptimizerNames that run, `none` and `muon`."""
    return tuple(OPTIMIZERS)


def takes_foreach(name: str) -> bool:
    """Whether it has torch's `foreach` argument: lists of all parameters, or one parameter at a time."""
    row = OPTIMIZERS.get(name)
    return row is not None and row.foreach_loop is not None


def spares_embeddings(name: str) -> bool:
    """Whether the Trainer makes the optimizer keep embeddings' states in fp32 instead of quantising them."""
    row = OPTIMIZERS.get(name)
    return row is not None and any(rule.of is large_no_embedding for rule in row.states)


def row_of(name: str) -> OptimizerRow:
    """Return the row of the optimizer `name`.

    Raises UnknownNameError, and SpecError for a name of OptimizerNames that cannot run.
    """
    if name in REFUSED:
        raise refused("optimizer.name", f"{name}: {REFUSED[name]}")
    if name not in OPTIMIZERS:
        raise UnknownNameError("optimizer.name", name, OPTIMIZERS)
    return OPTIMIZERS[name]


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
    """Return the memory of the optimizer `name` for `parameters`: one group, in order, without weight decay.

    foreach      for torch's optimizers (see `takes_foreach`): True or None for lists, False for a loop
    state_dtype  dtype of moments, instead of the optimizer's choice
    momentum     momentum of sgd and rmsprop
    master       mixed precision: the optimizer updates a copy in this dtype of every parameter in another dtype.
                 torch's optimizers then run like apex's multi-tensor kernels, without a `step` per parameter
    in_backward  every parameter has its own optimizer, which steps in a hook as soon as the gradient is ready
    on_host      states are in host memory, and the update is computed there (see `_offloaded`)

    Raises the errors of `row_of`.
    """
    row = _row_of_run(name, foreach, momentum, bool(master), in_backward)
    masters: list[State] = []
    states: list[State] = []
    turns: list[tuple[int, Turn]] = []
    cache: dict[Parameter, tuple[list[State], Turn]] = {}
    for p in parameters:
        if master and p.dtype != master:
            masters.append(State("master weight", p.name, p.shape, master, bytes_of(p.shape, master), p.copies))
        kind = Parameter("", p.shape, master or p.dtype, 1, p.embedding, p.target, p.vocabulary)
        if kind not in cache:
            cache[kind] = _states(row, kind, state_dtype or row.moments or kind.dtype)
        parameter_states, turn = cache[kind]
        states += [State(s.what, p.name, s.shape, s.dtype, s.bytes, p.copies, s.host) for s in parameter_states]
        turns.append((p.copies, turn))
    if any(turn.shared for _, turn in turns):
        states += [_state(rule, parameters[0], "fp32") for rule in row.shared]
    first, later = (0, 0) if row.frees_gradients else _step_bytes(row, turns, states)
    backward = _largest_single_step(row, [turn for _, turn in cache.values()]) if row.frees_gradients else 0
    exact = not state_dtype and (not master or row.apex)
    memory = OptimizerMemory(
        states=(*masters, *states),
        first=first,
        later=later,
        scratch=row.scratch if first or later or backward else "",
        foreach_lists=tuple(_listed(row, turns)) if first or later else (),
        at_once=row.exists_before_step,
        frees_gradients=row.frees_gradients,
        backward=backward,
        source=f"{row.source}; master weights as apex and Megatron-LM keep them" if master else row.source,
        basis=row.basis if exact else "assumed",
    )
    return _offloaded(memory, parameters, master) if on_host else memory


def _offloaded(memory: OptimizerMemory, parameters: Sequence[Parameter], master: str | None = None) -> OptimizerMemory:
    """The optimizer in host memory, which then also holds a copy of every parameter (or its master) and gradient.

    Gradients are copied to the host and parameters back, both into existing tensors, so the step needs nothing on the
    GPU; if dtypes differ the host converts, as in torch's blocking copies. When stepping in backward, a gradient is
    freed as soon as it has been copied. Left out: torchao keeps parameters of fewer than 4096 elements on the GPU.

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
        foreach_lists=(),
        backward=0,
        source=f"{memory.source}; moved to the host as torchao 0.18 optim/cpu_offload.py does",
    )


@lru_cache(maxsize=64)  # a step in backward asks for each weight
def _row_of_run(
    name: str, foreach: bool | None, momentum: float | None, mixed: bool, in_backward: bool
) -> OptimizerRow:
    """The row adjusted for the options of the run."""
    row = _with_options(row_of(name), foreach, momentum, mixed)
    return stepped_in_backward(row) if in_backward and not row.frees_gradients else row


def _with_options(row: OptimizerRow, foreach: bool | None, momentum: float | None, mixed: bool) -> OptimizerRow:
    """The row adjusted for the options of the run."""
    if not momentum:
        row = row._replace(states=tuple(r for r in row.states if not r.momentum))
    if row.apex and mixed:
        return row._replace(states=tuple(r for r in row.states if r.what != "step"), lists=0)
    if foreach is not False or row.foreach_loop is None:
        return row
    return row._replace(lists=0, loop=row.foreach_loop, scratch="one parameter's update and the previous parameter's")


def _state(rule: Rule, p: Parameter, moment: str) -> State:
    dtype = moment if rule.dtype == "moment" else p.dtype if rule.dtype == "own" else rule.dtype
    shape, host = rule.shape(p), rule.host(p)
    size = prod(shape) * ITEMSIZE[dtype]
    return State(rule.what, "", shape, dtype, size if host else rounded(size), 1, host)


def _states(row: OptimizerRow, p: Parameter, moment: str) -> tuple[list[State], Turn]:
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


def _step_bytes(row: OptimizerRow, turns: Sequence[tuple[int, Turn]], states: Sequence[State]) -> tuple[int, int]:
    """Bytes in addition to all states in the first step, and the most in a later step."""
    lists = sum(bytes_ * n for bytes_, n in _listed(row, turns))
    order = sorted(turns, key=lambda turn: turn[1].rank > 0)  # the Trainer puts targets in its last parameter group
    runs = [(n, [turn for _, turn in run]) for n, run in groupby(order, key=lambda turn: turn[0])]
    later = max(peak(runs, StepInstruction.LATER), peak(runs, StepInstruction.PROJECTING) if row.projected else 0)
    first = later
    if makes_states((*row.loop, *row.projected)):
        first = max(0, peak(runs, StepInstruction.FIRST) - sum(s.bytes * s.count for s in states if not s.host))
    return max(first, lists if row.first_list_step == 1 else 0), max(later, lists)


def _listed(row: OptimizerRow, turns: Sequence[tuple[int, Turn]]) -> Iterator[tuple[int, int]]:
    """The lists of a foreach step: (bytes of one moment, number of copies) for every parameter without a loop."""
    for _ in range(row.lists):
        yield from ((bytes_of(turn.shape, turn.moment), n) for n, turn in turns if not turn.loop)


def _largest_single_step(row: OptimizerRow, turns: Sequence[Turn]) -> int:
    """The most bytes, in addition to all states, that stepping one parameter by itself needs."""
    lists = max((row.lists * bytes_of(turn.shape, turn.moment) for turn in turns if not turn.loop), default=0)
    return max(lists, largest_update(turns))


def clipping(parameters: Sequence[Parameter]) -> int:
    """Bytes of `clip_grad_norm_`: one norm per gradient, plus the kernel's partial sums or the stacked norms.

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


# Tensors of torch's GradScaler for fp16: the first two live from its first use on, the last from unscale_ to update.
# Left out: up to 1536 bytes while it unscales in place. It refuses fp16 gradients.
# Source: torch 2.13 amp/grad_scaler.py.
GRAD_SCALER = (
    State("scale", "", (), "fp32", 512, 1),
    State("growth_tracker", "", (), "int32", 512, 1),
    State("found_inf", "", (), "fp32", 512, 1),
)
