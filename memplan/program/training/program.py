"""A run's program: one model, method and set of kernels, lowered once; batch and sequence are put in afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod
from operator import add
from typing import NamedTuple

from memplan.catalogue.degrees import WHOLE
from memplan.catalogue.optimizers.parameter_rules import Parameter
from memplan.catalogue.optimizers.states import GRAD_SCALER, OptimizerMemory, clipping, optimizer_memory
from memplan.catalogue.parallelism import pipeline
from memplan.catalogue.parallelism.sharding import BROADCAST, BROADCASTS, BUCKETS_SOURCE, NORM_OF_HOST, buckets
from memplan.core.arithmetic import Size
from memplan.core.ir import Division, Tensor
from memplan.core.units import ITEMSIZE
from memplan.engine import walk
from memplan.engine.step import Lowered
from memplan.engine.walk import Term, Variable, alive, chain, prune, rows, size
from memplan.program.graph import (
    Graph,
    Held,
    active,
    built,
    elements,
    first_alike,
    handed_on,
    lowered,
    optimized,
    shape_of,
    shared_buffers,
    weights_of,
)
from memplan.program.loading import loading, most_at_once
from memplan.program.sharding import fsdp_loading as dividing
from memplan.program.sharding import fsdp_pipeline as unsharded
from memplan.program.sharding import megatron, zero
from memplan.program.sharding.ranks import (
    ONE,
    Ranks,
    division,
    gradients_held,
    offloaded,
    parameters_held,
    trained_parts,
    whole_gradients,
)


class Pipe(NamedTuple):
    """How microbatches pass through a pipeline: see `memplan.catalogue.parallelism.pipeline`. `engine` names what runs
    it, and is empty where nothing is; one pass of all `microbatches` is a step."""

    engine: str = ""
    schedule: str = ""
    microbatches: int = 1


class Structure(NamedTuple):
    """Everything of a run but its batch and sequence: what decides which tensors exist and when they are alive.

    `holds_outputs`: what the script holds of a pass is there in the optimizer's step too. `on_host`: the optimizer and
    its step are in host memory. `buffers`: gradients lie in buffers that ranks reduce as they are, and weights are not
    sent around. `workspace`: bytes of one that the model's own kernels have throughout.
    """

    graph: Graph
    accumulates: bool
    optimizer: str
    foreach: bool | None = None
    state_dtype: str | None = None
    momentum: float | None = None
    in_backward: bool = False
    grads: str | None = None
    master: str | None = None
    clips: bool = True
    scales: bool = False
    trainer: bool = False
    holds_outputs: bool = False
    on_host: bool = False
    ranks: Ranks = ONE
    buffers: bool = False
    workspace: int = 0
    pipe: Pipe = Pipe()


class Flown(NamedTuple):
    """A moment of a pipeline: that of a pass through a chunk of the rank's layers, with what is there beside it. With
    `moment` RETURNED it is when the model has returned, and its logits are there as well; with REDUCED, when a chunk's
    gradients are reduced; with GATHERED, when its weights are gathered before its first pass. The first pass of a
    rank's only chunk gathers them as it goes (`opens`)."""

    beside: pipeline.Moment
    moment: int
    opens: bool = False


RETURNED, REDUCED, GATHERED = -1, -2, -3


class Program(NamedTuple):
    """A structure with its model's numbers put in. Bytes of moments are over `variables`; all else is constant.

    held            what the script holds from backward into the optimizer's step, over `variables`; empty for nothing
    products        the chain of products that bounds moments, largest first
    first, later    the moments of a step's first micro-batch and of the others, by phase
    where           what the operations of those moments are called, by pass and moment
    flown           what a pipeline's moments are, by pass and moment
    parameters      bytes of weights and buffers; `loading` at most while they are loaded
    gradients       bytes of all gradients together, when backward is done; `buffered` of those in a dtype of their own,
                    which have buffers throughout; `accumulated` of those that a later micro-batch finds, where they
                    are there throughout a phase of it
    reducing        bytes of what ranks have throughout to reduce gradients; `passing` of what they have in a phase of a
                    pass
    states          bytes of the optimizer's states on the GPU, `host` of those beside it
    away            what checkpoints, or all operations, keep in host memory: shape, dtype and how many
    """

    structure: Structure
    variables: tuple[Variable, ...]
    held: tuple[int, ...]
    products: tuple[Variable, ...]
    needs: frozenset[str]
    first: dict[str, tuple[Term, ...]]
    later: dict[str, tuple[Term, ...]]
    where: tuple[dict[int, str], dict[int, str]]
    flown: tuple[tuple[Flown, ...], tuple[Flown, ...]]
    parameters: int
    loading: int
    gradients: int
    buffered: int
    accumulated: dict[str, int]
    reducing: int
    passing: dict[str, int]
    optimizer: OptimizerMemory
    states: int
    scaler: int
    host: int
    away: tuple[tuple[str, str, int], ...]
    clipping: int
    total_parameters: int
    trainable_parameters: int
    active_parameters: int

    def standing(self, workspace: int) -> int:
        """Bytes that are there between two steps; `workspace` is cuBLAS's for one handle."""
        return self.parameters + self.buffered + self.reducing + self.scaler + self.states + 2 * workspace


PHASES = ("forward", "loss", "backward")


def pass_of(structure: Structure, later: bool = False, opens: bool = False) -> Lowered:
    """The moments of the first forward and backward pass of a step, or of a `later` one; where weights stay whole, of
    the one that gathers them, if it `opens` the step."""
    return _lowered(structure.graph, _opening(structure) if opens else _way(structure, later))


class _Way(NamedTuple):
    """How a graph's pass is run, see `memplan.program.graph.lowered`."""

    grads_exist: bool
    updates: tuple[tuple[str, int], ...]
    follows: bool
    division: Division | None


def _way(structure: Structure, later: bool) -> _Way:
    exist = later or spends_gradients(structure)
    follows = later or not structure.accumulates  # without accumulation, of every step but the first
    found = division_in_pass(structure, later)
    if found is not None and later and structure.ranks.delayed:
        found = found._replace(sums=True)
    return _Way(exist, updates_of(structure), follows, found)


def _opening(structure: Structure) -> _Way:
    """The way of the pass that gathers weights which stay whole."""
    found = unsharded.opening(structure.graph, structure.ranks) if stays_whole(structure) else None
    return _way(structure, later=False)._replace(division=found)


def _lowered(graph: Graph, way: _Way) -> Lowered:
    return lowered(graph, way.grads_exist, way.updates, way.follows, way.division)


def division_of(structure: Structure) -> Division | None:
    """The units of weights that a pass gathers, where ranks hold parts of them."""
    return division(structure.graph, structure.ranks)


def stays_whole(structure: Structure) -> bool:
    """Whether weights that ranks have parts of are whole for a step's passes, and their gradients until its end."""
    return bool(structure.pipe.engine) and division_of(structure) is not None


def division_in_pass(structure: Structure, later: bool) -> Division | None:
    """What a pass gathers and reduces of it."""
    if stays_whole(structure):
        return unsharded.passing(structure.graph, structure.ranks, later)
    return division_of(structure)


def spends_gradients(structure: Structure) -> bool:
    """Whether a pass leaves no gradient: each is used up as it comes, or added to what is there, or sent away."""
    if in_buckets(structure) and not structure.ranks.delayed:
        return True
    return structure.grads is not None or frees_gradients(structure) or zero.stage(structure.ranks) > 1


def updates_of(structure: Structure) -> tuple[tuple[str, int], ...]:
    """What each weight's update takes where it comes as soon as its gradient is there, by the weight's path."""
    if not frees_gradients(structure):
        return ()
    trained = {p.name: p._replace(copies=1) for p in trained_parameters(structure)}
    found = ((name, optimizer_of(structure, [p]).backward) for name, p in trained.items())
    return tuple((name, bytes_) for name, bytes_ in found if bytes_)


class _Moments(NamedTuple):
    """A structure's moments with its model's numbers put in: see `Program`."""

    variables: tuple[Variable, ...]
    held: tuple[int, ...]
    products: tuple[Variable, ...]
    needs: frozenset[str]
    first: dict[str, tuple[Term, ...]]
    later: dict[str, tuple[Term, ...]]
    where: tuple[dict[int, str], dict[int, str]]
    flown: tuple[tuple[Flown, ...], tuple[Flown, ...]] = ((), ())


@lru_cache(maxsize=512)
def _moments(graph: Graph, ways: tuple[_Way, ...], holds_outputs: bool) -> _Moments:
    """The moments of a step's passes. Optimizers that leave the passes as they are share them."""
    _, axes = built(graph)
    passes = [_lowered(graph, way) for way in ways]
    sizes = [[size(key[0], key[1], axes) for key in low.sizes] for low in passes]
    variables = (walk.ONE, *sorted({v for of_pass in sizes for v, _ in of_pass} - {walk.ONE}))

    def pruned(low: Lowered, of_pass: list[tuple[Variable, int]]) -> dict[str, tuple[Term, ...]]:
        every = rows(low.moments, low.runs, axes, of_pass, variables)
        found = {phase: [i for i, m in enumerate(low.moments) if m.phase == phase] for phase in PHASES}
        return {phase: prune(((every[i], i) for i in moments), variables) for phase, moments in found.items()}

    held: tuple[int, ...] = ()
    if holds_outputs:
        (held,) = rows((passes[-1].held,), passes[-1].runs, axes, sizes[-1], variables)
    by_pass = [pruned(low, of_pass) for low, of_pass in zip(passes, sizes, strict=True)]
    return _Moments(
        variables=variables,
        held=held,
        products=tuple(map(Variable, chain(variables))),
        needs=frozenset(axis for v in variables for axis in v.axes),
        first=by_pass[0],
        later=by_pass[-1],
        where=(_where(passes[0], by_pass[0]), _where(passes[-1], by_pass[-1])),
    )


def chunks_of(structure: Structure) -> tuple[Structure, ...]:
    """Each chunk of layers that a rank of a pipeline has, as if it were a stage by itself."""
    graph = structure.graph
    return tuple(structure._replace(graph=graph._replace(degrees=chunk)) for chunk in graph.degrees.chunks)


def flying(structure: Structure) -> tuple[pipeline.Moment, ...]:
    """What may be there beside a pass of a pipeline's rank."""
    d, pipe = structure.graph.degrees, structure.pipe
    return pipeline.moments(pipe.schedule, d.pp, d.stage, d.virtual_stages, pipe.microbatches)


def beside_of(
    structure: Structure, moment: pipeline.Moment | None, reduces: bool = False
) -> Iterator[tuple[Tensor, str, int]]:
    """What a pipeline's rank has of hidden states and their gradients beside the passes' own: each tensor, which it is,
    and how many. In the optimizer's step where there is no `moment`; with `reduces`, when gradients are reduced after
    it."""
    d, pipe = structure.graph.degrees, structure.pipe
    engine = pipeline.ENGINES[pipe.engine]
    if moment is None:
        found = pipeline.lasting(engine, d.pp, d.stage, d.virtual_stages, pipe.microbatches)
    elif reduces:
        found = pipeline.reducing(engine, moment, d.pp, d.stage, pipe.microbatches)
    else:
        found = pipeline.beside(engine, pipe.schedule, moment, d.pp, d.stage, pipe.microbatches)
    chunks = chunks_of(structure)
    for tensor in shared_buffers(structure.graph):
        yield tensor, "buffer", 1
    for (what, chunk), count in found.items():
        graph = chunks[chunk].graph
        tensor = _logits(graph) if what == "logits" else handed_on(graph)[what == "sent"]
        if count and tensor is not None:
            yield tensor, what, count


def returned(structure: Structure) -> Tensor | None:
    """The logits that a model moves from its last GPU to the first one, where it does."""
    d, pipe = structure.graph.degrees, structure.pipe
    if not pipe.engine or not pipeline.ENGINES[pipe.engine].moves or d.stage:
        return None
    last = structure.graph._replace(degrees=d._replace(stage=d.pp - 1))
    made = {t.name for op in built(last)[0].after for t in op.writes if "v" in t.shape.split()}
    found = [key for key in lowered(last).sizes if key[2] == "activation" and key[5] in made]
    return Tensor("logits", *found[-1][:2]) if found else None


def _logits(graph: Graph) -> Tensor | None:
    """What the last stage's model returns, where that has logits."""
    low = lowered(graph)
    held = (low.sizes[key] for key, n in sorted(low.held.counts.items()) if n)
    return next((Tensor("logits", key[0], key[1]) for key in held if "v" in key[0].split()), None)


class _Passed(NamedTuple):
    """The largest moments of a pass over some variables, by phase, and what is kept when forward is done."""

    terms: dict[str, tuple[Term, ...]]
    kept: tuple[int, ...]


@lru_cache(maxsize=512)
def _sizes(graph: Graph, way: _Way) -> tuple[tuple[Variable, int], ...]:
    axes = built(graph)[1]
    return tuple(size(key[0], key[1], axes) for key in _lowered(graph, way).sizes)


@lru_cache(maxsize=512)
def _passed(graph: Graph, way: _Way, variables: tuple[Variable, ...]) -> _Passed:
    low, axes = _lowered(graph, way), built(graph)[1]
    every = rows((*low.moments, low.kept), low.runs, axes, _sizes(graph, way), variables)
    found = {phase: [i for i, m in enumerate(low.moments) if m.phase == phase] for phase in PHASES}
    terms = {phase: prune(((every[i], i) for i in found[phase]), variables) if found[phase] else () for phase in PHASES}
    return _Passed(terms, every[-1])


def _flown(structure: Structure) -> _Moments:
    """The moments of a pipeline's rank: those of a pass with the microbatches in flight, and what is between stages."""
    chunks = [s._replace(graph=first_alike(s.graph)) for s in chunks_of(structure)]
    moments = flying(structure)
    graded = {(m.chunk, m.graded[m.chunk]) for m in moments} | {(i, False) for i in range(len(chunks))}
    ways = {(i, later): _way(chunks[i], later) for i, later in graded}
    axes = built(structure.graph)[1]

    def between(moment: pipeline.Moment | None, reduces: bool = False) -> list[tuple[tuple[Variable, int], int]]:
        return [(size(t.shape, t.dtype, axes), n) for t, _, n in beside_of(structure, moment, reduces)]

    ends, starts = reductions_of(structure), openings_of(structure)
    opening = _opening(chunks[0]) if starts else None
    beside = {m: between(m) for m in (*moments, *starts, None)}
    used = {v for (i, _), way in ways.items() for v, _ in _sizes(chunks[i].graph, way)}
    ending = {r.after: between(r.after, reduces=True) for r in ends}
    if opening is not None:
        used.update(v for v, _ in _sizes(chunks[0].graph, opening))
    used.update(v for of in (*beside.values(), *ending.values()) for (v, _), _ in of)
    logits = returned(structure)
    if logits is not None:
        used.add(size(logits.shape, logits.dtype, axes)[0])
    variables = (walk.ONE, *sorted(used - {walk.ONE}))
    index = {v: i for i, v in enumerate(variables)}
    passed = {key: _passed(chunks[key[0]].graph, way, variables) for key, way in ways.items()}
    accumulated = [accumulated_bytes(s) for s in chunks]
    gone = [gone_bytes(s) if ends else 0 for s in chunks]

    def row_of(moment: pipeline.Moment | None, reduces: bool = False) -> list[int]:
        row = [0] * len(variables)
        for (variable, bytes_), count in ending[moment] if reduces and moment else beside[moment]:
            row[index[variable]] += bytes_ * count
        for i, count in enumerate(moment.others if moment else ()):
            if count:
                row = [a + count * b for a, b in zip(row, passed[i, False].kept, strict=True)]
        if moment and not moment.first and not reduces:  # of gradients that are not all there yet, or not any more
            row[0] -= sum(n for n, there in zip(accumulated, moment.graded, strict=True) if not there)
            row[0] -= sum(n for n, over in zip(gone, moment.done, strict=True) if over)
        return row

    def gathering_and_reducing() -> Iterator[tuple[bool, str, tuple[int, ...], Flown, str]]:
        """Where weights stay whole for a step: whether before any gradient, the phase, bytes, the moment, its name."""
        whole = sum(h.bytes * h.copies for h in passing_of(structure, "forward")) if starts or ends else 0
        for start in starts:
            row = row_of(start)
            if opening is None or len(chunks) > 1:
                flown = Flown(start, GATHERED)
                row[0] += sum(h.bytes * h.copies for h in gathered_of(structure, flown))
                yield True, "forward", tuple(row), flown, "all_gather"
                continue
            row[0] -= whole
            low, terms = _lowered(chunks[0].graph, opening), _passed(chunks[0].graph, opening, variables).terms
            for phase, term in ((of, term) for of in ("forward", "loss") for term in terms[of]):
                flown = Flown(start, term.moment, opens=True)
                yield True, phase, tuple(map(add, row, term.coefficients)), flown, low.moments[term.moment].where
        for end in ends:
            flown = Flown(end.after, REDUCED)
            row = row_of(end.after, reduces=True)
            row[0] += sum(h.bytes * h.copies for h in reduced_of(structure, flown))
            row[0] -= whole + accumulated_bytes(structure)
            yield not structure.accumulates, "backward", tuple(row), flown, "reduce_scatter"

    tables: list[tuple[dict[str, tuple[Term, ...]], tuple[Flown, ...], dict[int, str]]] = []
    for first in (True, False):
        found: dict[str, list[tuple[tuple[int, ...], int]]] = {phase: [] for phase in PHASES}
        places: list[Flown] = []
        where: dict[int, str] = {}
        for moment in (m for m in moments if m.first == first):
            own, row = passed[moment.chunk, moment.graded[moment.chunk]], row_of(moment)
            low = _lowered(chunks[moment.chunk].graph, ways[moment.chunk, moment.graded[moment.chunk]])
            for phase in ("backward",) if moment.backward else ("forward", "loss"):
                for term in own.terms[phase]:
                    found[phase].append((tuple(map(add, row, term.coefficients)), len(places)))
                    where[len(places)] = low.moments[term.moment].where
                    places.append(Flown(moment, term.moment))
            if logits is not None and not moment.backward:
                variable, bytes_ = size(logits.shape, logits.dtype, axes)
                whole = [a + b for a, b in zip(row, own.kept, strict=True)]
                whole[index[variable]] += bytes_
                found["loss"].append((tuple(whole), len(places)))
                where[len(places)] = "return"
                places.append(Flown(moment, RETURNED))
        for at_first, phase, row, flown, name in gathering_and_reducing():
            if at_first == first:
                found[phase].append((row, len(places)))
                where[len(places)] = name
                places.append(flown)
        terms = {phase: prune(some, variables) if some else () for phase, some in found.items()}
        tables.append((terms, tuple(places), where))
    (first_terms, *_), (later_terms, *_) = tables
    return _Moments(
        variables=variables,
        held=tuple(row_of(None)) if beside[None] else (),
        products=tuple(map(Variable, chain(variables))),
        needs=frozenset(axis for v in variables for axis in v.axes),
        first=first_terms,
        later=later_terms if structure.accumulates else first_terms,
        where=(tables[0][2], tables[1][2]),
        flown=(tables[0][1], tables[1][1]),
    )


def gone_bytes(chunk: Structure) -> int:
    """Bytes of whole weights and gradients that go when a chunk's gradients are reduced, less what comes for them."""
    whole = (*unsharded.weights(chunk.graph, chunk.ranks), *unsharded.gradients(chunk.graph, chunk.ranks))
    parts = gradients_held(chunk.graph, chunk.ranks)
    return sum(h.bytes * h.copies for h in whole) - sum(h.bytes * h.copies for h in parts)


def accumulated_bytes(structure: Structure) -> int:
    """Bytes of gradients that a later microbatch finds, where they have no buffers of their own."""
    if structure.grads or not structure.accumulates or (in_buckets(structure) and not structure.ranks.delayed):
        return 0
    return sum(h.bytes * h.copies for h in accumulated_of(structure))


def _every_moment(structure: Structure) -> _Moments:
    if structure.pipe.engine:
        return _flown(structure)
    ways = tuple(_way(structure, later) for later in (False, True)[: 1 + structure.accumulates])
    return _moments(structure.graph, ways, structure.holds_outputs)


@lru_cache(maxsize=2048)
def program(structure: Structure) -> Program:
    """Lower the structure and put its model's numbers in: milliseconds, and then kept."""
    whole = structure.graph._replace(degrees=WHOLE)
    moments = _every_moment(structure)
    weights, numbers = tuple(weights_of(whole)), built(whole)[1]
    resident = tuple(resident_of(structure))
    trained = trained_parameters(structure)
    optimizer = _optimizer(structure, trained)
    spent = frees_gradients(structure) or in_buckets(structure)
    gradients = 0 if spent else sum(h.bytes * h.copies for h in gradients_of(structure))
    return Program(
        structure=structure,
        **moments._asdict(),
        parameters=sum(h.bytes * h.copies for h in resident),
        loading=_loading(structure),
        gradients=0 if structure.grads else gradients,
        buffered=gradients if structure.grads else 0,
        accumulated={
            phase: accumulated_bytes(structure) if stay_throughout(structure, phase) else 0 for phase in PHASES
        },
        reducing=sum(h.bytes * h.copies for h in reducing_of(structure)),
        passing={phase: sum(h.bytes * h.copies for h in passing_of(structure, phase)) for phase in PHASES},
        optimizer=optimizer,
        states=sum(s.bytes * s.count for s in optimizer.states if not s.host),
        scaler=sum(s.bytes for s in GRAD_SCALER) if structure.scales else 0,
        host=sum(h.bytes * h.copies for h in host_of(structure))
        + sum(s.bytes * s.count for s in optimizer.states if s.host),
        away=tuple(_away(structure)),
        clipping=_clipping(structure, trained),
        total_parameters=sum(elements(w, numbers) * n for w, n, _ in weights if w.group not in ("adapter", "buffer")),
        trainable_parameters=sum(elements(w, numbers) * n for w, n, _ in weights if optimized(w, whole) or w.idle),
        active_parameters=sum(active(w, numbers) * n for w, n, _ in weights if w.group not in ("adapter", "buffer")),
    )


def _away(structure: Structure) -> Iterator[tuple[str, str, int]]:
    """What a pass keeps in host memory, of every microbatch in flight."""
    most = [1] * len(chunks_of(structure))
    if structure.pipe.engine:
        most = [max(m.others[i] + (m.chunk == i) for m in flying(structure)) for i in range(len(most))]
    for chunk, flights in zip(chunks_of(structure), most, strict=True):
        low = _lowered(chunk.graph, _way(chunk, later=False))
        for key, count in alive(low.host, low.runs, built(chunk.graph)[1]).items():
            shape, dtype, *_ = low.sizes[key]
            yield shape, dtype, count * flights


def host_bytes(program: Program, axes: Mapping[str, int]) -> int:
    """Bytes in host memory for a run with these `axes`: of the optimizer, and of passes; not rounded."""
    if not program.away:
        return program.host
    numbers = {**built(program.structure.graph)[1], **axes}

    def one(shape: str, dtype: str) -> int:
        return ITEMSIZE[dtype] * prod(int(t) if t.isdigit() else numbers[t] for t in shape.split())

    return program.host + sum(one(shape, dtype) * count for shape, dtype, count in program.away)


def _optimizer(structure: Structure, trained: list[Parameter]) -> OptimizerMemory:
    """The optimizer's memory; at ZeRO's stage 3 it steps one sub-group after the other, with that one's scratch."""
    found = _with_parts(optimizer_of(structure, trained), structure)
    if structure.ranks.knobs.optimizer or structure.ranks.offloads:
        states = tuple(s._replace(bytes=0, host=True) for s in found.states)
        return found._replace(states=states, first=0, later=0, scratch="", listed=())
    if zero.stage(structure.ranks) < 3:
        return found
    sub_group = Parameter("", (zero.in_sub_group(structure.graph, structure.ranks),), "fp32")
    one = optimizer_of(structure, [sub_group])
    return found._replace(first=one.first, later=one.later, listed=one.listed)


def _with_parts(found: OptimizerMemory, structure: Structure) -> OptimizerMemory:
    """The same, where gradients are of whole weights of which a rank has parts: one copy of those parts at a time.

    Source: torch 2.13 distributed/tensor/_dispatch.py redistribute_local_args.
    """
    _, axes = built(structure.graph)
    whole = [(w, n) for w, n, _ in weights_of(structure.graph) if w.gradient and w.trains]
    parted = sum(size(w.shape, w.dtype, axes)[1] * n for w, n in whole)
    if max(found.first, found.later) >= parted or found.frees_gradients or structure.optimizer == "none":
        return found
    scratch = "the rank's parts of whole gradients"
    return found._replace(first=max(found.first, parted), later=max(found.later, parted), scratch=scratch)


def _clipping(structure: Structure, trained: list[Parameter]) -> int:
    """Bytes between backward and the update: norms of gradients, or what DeepSpeed makes the update's of."""
    if zero.stage(structure.ranks):
        return sum(h.bytes for h in converting_of(structure))
    if structure.ranks.offloads:
        return NORM_OF_HOST[structure.ranks.row.flat] if structure.clips else 0
    return clipping(trained) if structure.clips and not frees_gradients(structure) else 0


def converting_of(structure: Structure) -> tuple[Held, ...]:
    """What DeepSpeed makes the partition's gradient of, beside it."""
    return tuple(zero.converting(structure.graph, structure.ranks)) if zero.stage(structure.ranks) else ()


def host_of(structure: Structure) -> tuple[Held, ...]:
    """What DeepSpeed or FSDP has in a rank's host memory."""
    ranks = structure.ranks
    if ranks.offloads:
        trained = trained_parameters(structure)
        alone = optimizer_of(structure._replace(foreach=False if structure.foreach else None), trained)
        adds = structure.accumulates and not ranks.delayed
        return tuple(offloaded(structure.graph, ranks, alone, adds))
    if not zero.stage(ranks) or not (ranks.knobs.optimizer or ranks.knobs.parameters):
        return ()
    states = optimizer_of(structure, trained_parameters(structure)).states
    return tuple(zero.in_host_memory(structure.graph, ranks, states, structure.accumulates))


def host_notes(structure: Structure, node: int) -> Iterator[str]:
    """What to know of the host memory that the ranks of a `node`, so many, share."""
    return zero.host_notes(structure.ranks, host_of(structure), node)


def passing_of(structure: Structure, phase: str) -> tuple[Held, ...]:
    """What ranks have in a phase of a pass beside the moments' tensors."""
    if stays_whole(structure):
        return tuple(unsharded.weights(structure.graph, structure.ranks))
    return tuple(zero.passing(structure.graph, structure.ranks, phase)) if zero.stage(structure.ranks) else ()


def reduced_of(structure: Structure, flown: Flown) -> Iterator[Held]:
    """The weights and gradients at a moment at which a chunk's gradients are reduced: other chunks have theirs whole,
    or are done."""
    for i, chunk in enumerate(chunks_of(structure)):
        if i == flown.beside.chunk:
            yield from unsharded.reduction(chunk.graph, chunk.ranks).held
        else:
            yield from whole_of(chunk, flown.beside, i)


def gathered_of(structure: Structure, flown: Flown) -> tuple[Held, ...]:
    """What an all-gather wrote, before it is copied into the weights of a chunk that is gathered before its first pass:
    all chunks' are asked for at once."""
    chunk = chunks_of(structure)[flown.beside.chunk]
    return unsharded.message(chunk.graph, chunk.ranks)


def whole_of(chunk: Structure, moment: pipeline.Moment, i: int) -> Iterator[Held]:
    """The weights and gradients that a chunk of a rank's layers, the `i`th, has beside the passes at a moment, where
    its weights are whole for a step: none, once it is done, but the rank's part of its gradients."""
    if moment.done[i]:
        yield from gradients_held(chunk.graph, chunk.ranks)
        return
    yield from unsharded.weights(chunk.graph, chunk.ranks)
    if moment.graded[i] and chunk.accumulates:
        yield from unsharded.gradients(chunk.graph, chunk.ranks)


def reductions_of(structure: Structure) -> tuple[pipeline.Reduced, ...]:
    """When the gradients of a rank's chunks are reduced, where that is at the end of their passes."""
    if not stays_whole(structure):
        return ()
    d, pipe = structure.graph.degrees, structure.pipe
    return pipeline.reductions(pipe.schedule, d.pp, d.stage, d.virtual_stages, pipe.microbatches)


def openings_of(structure: Structure) -> tuple[pipeline.Moment, ...]:
    """Each chunk's first pass forward, where its weights are gathered for a step: none where later passes find more in
    gradients than an all-gather writes."""
    if not stays_whole(structure):
        return ()
    graph, ranks = structure.graph, structure.ranks
    written = sum(h.bytes for h in unsharded.message(graph, ranks))
    if structure.accumulates and sum(h.bytes * h.copies for h in unsharded.gradients(graph, ranks)) >= written:
        return ()
    d, pipe = structure.graph.degrees, structure.pipe
    first: dict[int, pipeline.Moment] = {}
    for one in pipeline.distinct_passes(pipe.schedule, d.pp, d.stage, d.virtual_stages, pipe.microbatches):
        first.setdefault(one.chunk, one)
        if len(first) == d.virtual_stages:
            break
    return tuple(first.values())


def loading_of(structure: Structure, together: bool = False) -> Iterator[tuple[int, int]]:
    """What loading allocates and frees, in order, see `memplan.program.loading.loading`; `together` as
    `memplan.program.sharding.fsdp_loading.loading_events` has it."""
    if zero.stage(structure.ranks):
        return zero.loading_events(structure.graph, structure.ranks)
    if megatron.divides(structure.ranks):
        return megatron.loading_events(structure.graph, structure.ranks, str(structure.grads))
    if structure.graph.code == "torchtitan":  # made where it lies: trainer.py to_empty
        return enumerate(h.bytes for h in resident_of(structure) for _ in range(h.copies))
    if division_of(structure) is not None:
        return dividing.loading_events(structure.graph, structure.ranks, together)
    return loading(structure.graph)


def _loading(structure: Structure) -> int:
    """The most bytes at once until the first step. DDP sends the first rank's weights to the others."""
    most = most_at_once(loading_of(structure, together=True))
    if structure.ranks.strategy != "ddp" or structure.ranks.world == 1 or structure.buffers:
        return most
    resident = sum(h.bytes * h.copies for h in resident_of(structure))
    return max(most, resident + min(resident, BROADCASTS * BROADCAST))


def resident_of(structure: Structure) -> Iterator[Held]:
    """The weights and buffers that a rank holds."""
    if zero.stage(structure.ranks):
        return zero.parameters(structure.graph, structure.ranks)
    if megatron.divides(structure.ranks):
        return megatron.parameters(structure.graph, structure.ranks)
    return parameters_held(structure.graph, structure.ranks)


def reducing_of(structure: Structure) -> tuple[Held, ...]:
    """The buckets that gradients are copied into, to be summed over ranks, and at ZeRO's stage 3 where the sums go; and
    a workspace of the model's own."""
    if structure.workspace:
        source = "TransformerEngine 2.3 pytorch/module/base.py get_workspace"
        shape = str(structure.workspace)
        return (Held("other", "workspace of Transformer Engine", "", shape, "uint8", 1, structure.workspace, source),)
    if zero.stage(structure.ranks):
        return tuple(zero.reducing(structure.graph, structure.ranks))
    if structure.ranks.world == 1 or structure.ranks.strategy != "ddp":
        return ()
    return tuple(
        Held("other", "bucket of gradients", "", str(bytes_), "uint8", count, bytes_, BUCKETS_SOURCE)
        for bytes_, count in buckets(trained_parameters(structure))
    )


def _where(low: Lowered, terms: dict[str, tuple[Term, ...]]) -> dict[int, str]:
    return {t.moment: low.moments[t.moment].where for phase in terms.values() for t in phase}


def gradients_of(structure: Structure) -> Iterator[Held]:
    """The gradient of every weight that trains, or the rank's part of it, as the optimizer reads it."""
    if zero.stage(structure.ranks):
        yield from zero.stepping(structure.graph, structure.ranks)
        return
    if megatron.divides(structure.ranks):
        yield from megatron.gradients(structure.graph, structure.ranks, str(structure.grads))
        return
    if division_of(structure) is not None:
        yield from gradients_held(structure.graph, structure.ranks)
        return
    yield from _whole_gradients(structure)


def _whole_gradients(structure: Structure) -> Iterator[Held]:
    _, axes = built(structure.graph)
    for w, count, where in weights_of(structure.graph):
        if w.trains:
            dtype = structure.grads or w.dtype
            shape = w.gradient or w.shape
            bytes_ = size(shape, dtype, axes)[1]
            yield Held("gradient", f"{w.name}.grad", where.rstrip("."), shape, dtype, count, bytes_, "autograd")


def stay_throughout(structure: Structure, phase: str) -> bool:
    """Whether the gradients that a later micro-batch finds are there throughout a phase of it: not where ranks reduce
    them then, unit by unit."""
    whole = stays_whole(structure)
    return whole or not (phase == "backward" and structure.ranks.delayed and division_of(structure) is not None)


def accumulated_of(structure: Structure) -> Iterator[Held]:
    """The gradients that a later micro-batch finds."""
    match zero.stage(structure.ranks):
        case 1:
            return _whole_gradients(structure)
        case 2 | 3:
            return zero.accumulated(structure.graph, structure.ranks)
        case _:
            pass
    if stays_whole(structure):
        return unsharded.gradients(structure.graph, structure.ranks)
    if structure.ranks.delayed and division_of(structure) is not None:
        return whole_gradients(structure.graph, structure.ranks)
    return gradients_of(structure)


def trained_parameters(structure: Structure) -> list[Parameter]:
    """The parameters the optimizer is given, in the model's order; a run of layers as its first and the others."""
    if zero.stage(structure.ranks):
        return zero.trained(structure.graph, structure.ranks)
    if megatron.divides(structure.ranks):
        return megatron.trained(structure.graph, structure.ranks)
    if division_of(structure) is not None:
        return trained_parts(structure.graph, structure.ranks, structure.trainer)
    _, axes = built(structure.graph)
    out: list[Parameter] = []
    blocks: dict[str, list[tuple[Parameter, int]]] = {}
    for w, count, where in weights_of(structure.graph):
        if not w.trains:
            continue
        shape = shape_of(w, axes)
        embedding = structure.trainer and w.group == "embedding" and not w.matrix
        p = Parameter(f"{where}{w.name}", shape, w.dtype, 1, embedding=embedding, target=w.matrix and not w.transposed)
        if where:
            blocks.setdefault(where, []).append((p, count))
        else:
            _flush(blocks, out)
            out.append(p)
    _flush(blocks, out)
    return out


def _flush(blocks: dict[str, list[tuple[Parameter, int]]], out: list[Parameter]) -> None:
    for group in blocks.values():
        out += [p for p, _ in group]
        out += [p._replace(copies=n - 1) for p, n in group if n > 1]
    blocks.clear()


def in_buckets(structure: Structure) -> bool:
    """Whether gradients lie in the buckets that ranks reduce, and nowhere else: of several micro-batches where they are
    reduced in the last only, not before that."""
    return structure.ranks.views and structure.ranks.world > 1


def frees_gradients(structure: Structure) -> bool:
    """Whether each gradient is used up as soon as it is made: by the optimizer's kind, or stepping in backward."""
    return structure.in_backward or optimizer_memory(structure.optimizer, ()).frees_gradients


def optimizer_of(structure: Structure, trained: list[Parameter]) -> OptimizerMemory:
    return optimizer_memory(
        structure.optimizer,
        trained,
        foreach=structure.foreach,
        state_dtype=structure.state_dtype,
        momentum=structure.momentum,
        master=structure.master,
        in_backward=structure.in_backward,
        on_host=structure.on_host and not structure.ranks.knobs.optimizer,
    )


def phase_peaks(
    program: Program, workspace: int, moving: Sequence[Size], held: Size
) -> Iterator[tuple[str, int | None, Size]]:
    """The peak of every phase after loading, in order, with its step where the first differs from later ones.

    `moving` is the most that the forward pass, the loss and the backward pass hold beside what is there throughout;
    `held`, what the script holds of them into the optimizer's step; `workspace` is cuBLAS's for one handle.
    """
    p = program
    fixed = p.parameters + p.buffered + p.reducing + p.scaler + workspace
    for step in steps(p):
        states = _states(p, step)
        for phase, most in zip(PHASES, moving, strict=True):
            second = workspace if phase == "backward" or step != 1 else 0
            yield phase, step, fixed + second + states + p.passing[phase] + most
        yield "step", step, fixed + workspace + p.gradients + held + max(_stepping(p, step), states + p.clipping)


def steps(program: Program) -> tuple[int | None, ...]:
    """1 and 2 where the first step is not as the later ones; else None, for any."""
    made = program.states and not program.optimizer.at_once
    return (1, 2) if made or program.optimizer.first != program.optimizer.later else (None,)


def step_where(program: Program, step: int | None) -> str:
    """What of a step's end takes the most: the update, or the clipping before it."""
    clipped = _states(program, step) + program.clipping
    return "optimizer" if _stepping(program, step) >= clipped else "clipping"


def _states(program: Program, step: int | None) -> int:
    """The states there are before the update."""
    return program.states if step == 2 or program.optimizer.at_once else 0


def _stepping(program: Program, step: int | None) -> int:
    optimizer = program.optimizer
    return program.states + (optimizer.first if step == 1 else optimizer.later)
