"""A run's program: one model, method and set of kernels, lowered once. Batch and sequence are filled in afterwards."""

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
    TensorGroup,
    active_elements,
    elements,
    first_equal_stage,
    is_optimized,
    lower_training,
    operations_of,
    shape_of,
    shared_buffers,
    stage_boundaries,
    weights_of,
)
from memplan.program.loading import loading, most_at_once
from memplan.program.sharding import fsdp_loading, fsdp_pipeline, megatron, zero
from memplan.program.sharding.ranks import (
    SINGLE_RANK,
    Ranks,
    division,
    gradients_held,
    offloaded,
    parameters_held,
    trained_parts,
    whole_gradients,
)


class Pipe(NamedTuple):
    """How microbatches pass through a pipeline (see `memplan.catalogue.parallelism.pipeline`).

    engine        library that runs the pipeline, empty without one
    schedule      1f1b, gpipe or device_map
    microbatches  microbatches of one step
    """

    engine: str = ""
    schedule: str = ""
    microbatches: int = 1


class Structure(NamedTuple):
    """Everything in a run except batch and sequence: it decides which tensors exist and when they are alive.

    graph          operations of the forward and backward pass
    accumulates    a step has several micro-batches
    optimizer      name of the optimizer
    foreach        the optimizer steps lists of parameters; None for its default
    state_dtype    dtype of optimizer states, None for the optimizer's own
    momentum       momentum of the optimizer, None for its default
    in_backward    the optimizer steps inside backward
    grads          dtype of gradient buffers that exist throughout, None without such buffers
    master         dtype of master weights, None without them
    clips          gradients are clipped
    scales         a gradient scaler is used
    trainer        the script is transformers' Trainer
    holds_outputs  outputs that the script references stay alive in the optimizer step
    on_host        the optimizer's states and step are in host memory
    ranks          how ranks divide weights, gradients and states
    buffers        gradients live in buffers that ranks reduce in place, and no weights are broadcast
    workspace      bytes of a workspace that the model's own kernels hold throughout
    pipe           how microbatches pass through a pipeline
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
    ranks: Ranks = SINGLE_RANK
    buffers: bool = False
    workspace: int = 0
    pipe: Pipe = Pipe()


class ScheduleMoment(NamedTuple):
    """One moment of a pipeline rank: a moment of a pass, and where the schedule is at that time.

    schedule_position  the pass in the schedule: chunk, direction, and other microbatches in flight
    moment             index of the pass's moment; or RETURNED, when the model has returned its logits; REDUCED, when
                       the chunk's gradients are reduced; GATHERED, when the chunk's weights are gathered before its
                       first pass
    opens              the pass gathers the weights itself: the first pass of a rank with a single chunk
    """

    schedule_position: pipeline.PipelineMoment
    moment: int
    opens: bool = False


RETURNED, REDUCED, GATHERED = -1, -2, -3


class Program(NamedTuple):
    """A structure with its model's numbers filled in. Moments are linear in `variables`; other bytes are constant.

    structure             the structure
    variables             sizes that batch and sequence decide
    held                  coefficients of what the script holds into the optimizer step, empty if it holds nothing
    products              chain of products that bounds moments, largest first
    needs                 names of the axes of `variables`
    first                 moments of a step's first micro-batch, by phase
    later                 moments of a step's later micro-batches, by phase
    where                 name of each moment's operation, for the first and for later micro-batches
    schedule_moments      position of each moment in a pipeline's schedule, for first and later micro-batches
    parameters            bytes of weights and buffers
    loading               peak bytes while loading
    gradients             bytes of all gradients when backward is done
    buffered              bytes of gradients with buffers of their own that exist throughout
    accumulated           bytes of gradients that exist throughout a phase of a later micro-batch, by phase
    reducing              bytes that gradient reduction holds throughout
    passing               bytes that ranks hold during a phase of a pass, by phase
    optimizer             memory of the optimizer
    states                bytes of optimizer states on the GPU
    scaler                bytes of the gradient scaler
    host                  bytes of optimizer states and offloaded parts in host memory
    host_activations      activations kept in host memory: shape, dtype and count
    clipping              bytes between backward and the update
    total_parameters      parameters of the model, without adapters
    trainable_parameters  parameters that train
    active_parameters     parameters that one token uses, without adapters
    """

    structure: Structure
    variables: tuple[Variable, ...]
    held: tuple[int, ...]
    products: tuple[Variable, ...]
    needs: frozenset[str]
    first: dict[str, tuple[Term, ...]]
    later: dict[str, tuple[Term, ...]]
    where: tuple[dict[int, str], dict[int, str]]
    schedule_moments: tuple[tuple[ScheduleMoment, ...], tuple[ScheduleMoment, ...]]
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
    host_activations: tuple[tuple[str, str, int], ...]
    clipping: int
    total_parameters: int
    trainable_parameters: int
    active_parameters: int

    def between_steps(self, workspace: int) -> int:
        """Return the bytes allocated between two steps. `workspace` is cuBLAS's for one handle."""
        return self.parameters + self.buffered + self.reducing + self.scaler + self.states + 2 * workspace


PHASES = ("forward", "loss", "backward")


def pass_of(structure: Structure, later: bool = False, opens: bool = False) -> Lowered:
    """Return the moments of the first forward and backward pass of a step, or of a `later` pass.

    With `opens`, the moments of the pass that gathers weights for the rest of the step (see `stays_whole`).
    """
    return _lowered(structure.graph, _opening_options(structure) if opens else _options(structure, later))


class _Options(NamedTuple):
    """Arguments of `memplan.program.graph.lower_training` for one pass."""

    grads_exist: bool
    updates: tuple[tuple[str, int], ...]
    follows: bool
    division: Division | None


def _options(structure: Structure, later: bool) -> _Options:
    exist = later or leaves_no_gradients(structure)
    follows = later or not structure.accumulates  # without accumulation, the pass of every step but the first
    units = division_in_pass(structure, later)
    if units is not None and later and structure.ranks.delayed:
        units = units._replace(sums=True)
    return _Options(exist, updates_of(structure), follows, units)


def _opening_options(structure: Structure) -> _Options:
    """Return the options of the pass that gathers the weights for a step."""
    units = fsdp_pipeline.opening(structure.graph, structure.ranks) if stays_whole(structure) else None
    return _options(structure, later=False)._replace(division=units)


def _lowered(graph: Graph, options: _Options) -> Lowered:
    return lower_training(graph, options.grads_exist, options.updates, options.follows, options.division)


def division_of(structure: Structure) -> Division | None:
    """Return the FSDP units of the weights, or None if weights are not sharded."""
    return division(structure.graph, structure.ranks)


def stays_whole(structure: Structure) -> bool:
    """Whether sharded weights stay gathered for all passes of a step, and their gradients whole to its end."""
    return bool(structure.pipe.engine) and division_of(structure) is not None


def division_in_pass(structure: Structure, later: bool) -> Division | None:
    """Return the units that one pass gathers and reduces, or None if it does neither."""
    if stays_whole(structure):
        return fsdp_pipeline.passing(structure.graph, structure.ranks, later)
    return division_of(structure)


def leaves_no_gradients(structure: Structure) -> bool:
    """Whether a pass leaves no new gradient: each one is consumed, added to an existing one, or sent away at once."""
    if in_buckets(structure) and not structure.ranks.delayed:
        return True
    return structure.grads is not None or frees_gradients(structure) or zero.stage(structure.ranks) > 1


def updates_of(structure: Structure) -> tuple[tuple[str, int], ...]:
    """Return the bytes of each weight's update inside backward, by the weight's path; empty if updates come later."""
    if not frees_gradients(structure):
        return ()
    trained = {p.name: p._replace(copies=1) for p in trained_parameters(structure)}
    updates = ((name, optimizer_of(structure, [p]).backward) for name, p in trained.items())
    return tuple((name, bytes_) for name, bytes_ in updates if bytes_)


class _Moments(NamedTuple):
    """A structure's moments with its model's numbers filled in. Fields as in `Program`."""

    variables: tuple[Variable, ...]
    held: tuple[int, ...]
    products: tuple[Variable, ...]
    needs: frozenset[str]
    first: dict[str, tuple[Term, ...]]
    later: dict[str, tuple[Term, ...]]
    where: tuple[dict[int, str], dict[int, str]]
    schedule_moments: tuple[tuple[ScheduleMoment, ...], tuple[ScheduleMoment, ...]] = ((), ())


@lru_cache(maxsize=512)
def _moments(graph: Graph, options: tuple[_Options, ...], holds_outputs: bool) -> _Moments:
    """Return the moments of a step's passes, cached for all optimizers with the same options."""
    _, axes = operations_of(graph)
    passes = [_lowered(graph, of_pass) for of_pass in options]
    sizes = [[size(key[0], key[1], axes) for key in low.sizes] for low in passes]
    variables = (walk.ONE, *sorted({v for of_pass in sizes for v, _ in of_pass} - {walk.ONE}))

    def pruned(low: Lowered, of_pass: list[tuple[Variable, int]]) -> dict[str, tuple[Term, ...]]:
        coefficients = rows(low.moments, low.runs, axes, of_pass, variables)
        of_phase = {phase: [i for i, m in enumerate(low.moments) if m.phase == phase] for phase in PHASES}
        return {phase: prune(((coefficients[i], i) for i in moments), variables) for phase, moments in of_phase.items()}

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
        where=(_operation_names(passes[0], by_pass[0]), _operation_names(passes[-1], by_pass[-1])),
    )


def chunks_of(structure: Structure) -> tuple[Structure, ...]:
    """Return each chunk of a pipeline rank's layers as a structure of its own."""
    graph = structure.graph
    return tuple(structure._replace(graph=graph._replace(degrees=chunk)) for chunk in graph.degrees.chunks)


def schedule_positions(structure: Structure) -> tuple[pipeline.PipelineMoment, ...]:
    """Return every position of a pipeline rank's schedule that can be the peak."""
    d, pipe = structure.graph.degrees, structure.pipe
    return pipeline.moments(pipe.schedule, d.pp, d.stage, d.virtual_stages, pipe.microbatches)


def stage_buffers(
    structure: Structure, moment: pipeline.PipelineMoment | None, reduces: bool = False
) -> Iterator[tuple[Tensor, str, int]]:
    """Yield the hidden states and gradients that a pipeline rank buffers between passes: tensor, kind and count.

    Without `moment`, those alive in the optimizer step; with `reduces`, those alive when gradients are reduced after
    the moment.
    """
    d, pipe = structure.graph.degrees, structure.pipe
    engine = pipeline.ENGINES[pipe.engine]
    if moment is None:
        counts = pipeline.step_buffers(engine, d.pp, d.stage, d.virtual_stages, pipe.microbatches)
    elif reduces:
        counts = pipeline.extra_tensors_in_reduction(engine, moment, d.pp, d.stage, pipe.microbatches)
    else:
        counts = pipeline.extra_tensors(engine, pipe.schedule, moment, d.pp, d.stage, pipe.microbatches)
    chunks = chunks_of(structure)
    for tensor in shared_buffers(structure.graph):
        yield tensor, "buffer", 1
    for (what, chunk), count in counts.items():
        graph = chunks[chunk].graph
        tensor = _logits(graph) if what == "logits" else stage_boundaries(graph)[what == "sent"]
        if count and tensor is not None:
            yield tensor, what, count


def returned(structure: Structure) -> Tensor | None:
    """Return the logits if one process copies them from the last GPU to this first one, else None."""
    d, pipe = structure.graph.degrees, structure.pipe
    if not pipe.engine or not pipeline.ENGINES[pipe.engine].moves_tensors or d.stage:
        return None
    last = structure.graph._replace(degrees=d._replace(stage=d.pp - 1))
    names = {t.name for op in operations_of(last)[0].after for t in op.writes if "v" in t.shape.split()}
    logits = [key for key in lower_training(last).sizes if key[2] == "activation" and key[5] in names]
    return Tensor("logits", *logits[-1][:2]) if logits else None


def _logits(graph: Graph) -> Tensor | None:
    """Return the logits that the script holds, or None if the stage has none."""
    low = lower_training(graph)
    held = (low.sizes[key] for key, n in sorted(low.held.counts.items()) if n)
    return next((Tensor("logits", key[0], key[1]) for key in held if "v" in key[0].split()), None)


class _PassTerms(NamedTuple):
    """The largest moments of a pass, by phase, and what it keeps for backward. Both are over some variables."""

    terms: dict[str, tuple[Term, ...]]
    kept: tuple[int, ...]


@lru_cache(maxsize=512)
def _sizes(graph: Graph, options: _Options) -> tuple[tuple[Variable, int], ...]:
    axes = operations_of(graph)[1]
    return tuple(size(key[0], key[1], axes) for key in _lowered(graph, options).sizes)


@lru_cache(maxsize=512)
def _pass_terms(graph: Graph, options: _Options, variables: tuple[Variable, ...]) -> _PassTerms:
    low, axes = _lowered(graph, options), operations_of(graph)[1]
    coefficients = rows((*low.moments, low.kept), low.runs, axes, _sizes(graph, options), variables)
    of_phase = {phase: [i for i, m in enumerate(low.moments) if m.phase == phase] for phase in PHASES}
    terms = {
        phase: prune(((coefficients[i], i) for i in moments), variables) if moments else ()
        for phase, moments in of_phase.items()
    }
    return _PassTerms(terms, coefficients[-1])


def _buffer_sizes(
    structure: Structure, axes: Mapping[str, int], moment: pipeline.PipelineMoment | None, reduces: bool = False
) -> list[tuple[tuple[Variable, int], int]]:
    """Return the size and count of every tensor that a stage buffers between passes."""
    return [(size(t.shape, t.dtype, axes), n) for t, _, n in stage_buffers(structure, moment, reduces)]


def _pipeline_moments(structure: Structure) -> _Moments:  # noqa: PLR0915 (one schedule, moment after moment)
    """Return the moments of a pipeline rank: a pass, other microbatches in flight, and the buffers between stages."""
    chunks = [s._replace(graph=first_equal_stage(s.graph)) for s in chunks_of(structure)]
    moments = schedule_positions(structure)
    graded = {(m.chunk, m.has_gradient[m.chunk]) for m in moments} | {(i, False) for i in range(len(chunks))}
    options = {(i, later): _options(chunks[i], later) for i, later in graded}
    axes = operations_of(structure.graph)[1]

    ends, starts = reductions_of(structure), openings_of(structure)
    opening = _opening_options(chunks[0]) if starts else None
    buffers = {m: _buffer_sizes(structure, axes, m) for m in (*moments, *starts, None)}
    used = {v for (i, _), of_pass in options.items() for v, _ in _sizes(chunks[i].graph, of_pass)}
    ending = {r.after: _buffer_sizes(structure, axes, r.after, reduces=True) for r in ends}
    if opening is not None:
        used.update(v for v, _ in _sizes(chunks[0].graph, opening))
    used.update(v for tensors in (*buffers.values(), *ending.values()) for (v, _), _ in tensors)
    logits = returned(structure)
    if logits is not None:
        used.add(size(logits.shape, logits.dtype, axes)[0])
    variables = (walk.ONE, *sorted(used - {walk.ONE}))
    index = {v: i for i, v in enumerate(variables)}
    pass_terms = {key: _pass_terms(chunks[key[0]].graph, of_pass, variables) for key, of_pass in options.items()}
    accumulated = [accumulated_bytes(s) for s in chunks]
    released = [released_bytes(s) if ends else 0 for s in chunks]

    def row_of(moment: pipeline.PipelineMoment | None, reduces: bool = False) -> list[int]:
        row = [0] * len(variables)
        for (variable, bytes_), count in ending[moment] if reduces and moment else buffers[moment]:
            row[index[variable]] += bytes_ * count
        for i, count in enumerate(moment.others if moment else ()):
            if count:
                row = [a + count * b for a, b in zip(row, pass_terms[i, False].kept, strict=True)]
        if moment and not moment.first and not reduces:  # gradients that do not exist yet, or not any more
            row[0] -= sum(n for n, exists in zip(accumulated, moment.has_gradient, strict=True) if not exists)
            row[0] -= sum(n for n, over in zip(released, moment.done, strict=True) if over)
        return row

    def gathering_and_reducing() -> Iterator[tuple[bool, str, tuple[int, ...], ScheduleMoment, str]]:
        """Yield moments outside of passes: whether no gradient exists yet, phase, bytes, moment and name."""
        whole = sum(h.bytes * h.copies for h in passing_of(structure, "forward")) if starts or ends else 0
        for start in starts:
            row = row_of(start)
            if opening is None or len(chunks) > 1:
                scheduled = ScheduleMoment(start, GATHERED)
                row[0] += sum(h.bytes * h.copies for h in gathered_of(structure, scheduled))
                yield True, "forward", tuple(row), scheduled, "all_gather"
                continue
            row[0] -= whole
            low, terms = _lowered(chunks[0].graph, opening), _pass_terms(chunks[0].graph, opening, variables).terms
            for phase, term in ((name, term) for name in ("forward", "loss") for term in terms[name]):
                scheduled = ScheduleMoment(start, term.moment, opens=True)
                yield True, phase, tuple(map(add, row, term.coefficients)), scheduled, low.moments[term.moment].where
        for end in ends:
            scheduled = ScheduleMoment(end.after, REDUCED)
            row = row_of(end.after, reduces=True)
            row[0] += sum(h.bytes * h.copies for h in reduced_of(structure, scheduled))
            row[0] -= whole + accumulated_bytes(structure)
            yield not structure.accumulates, "backward", tuple(row), scheduled, "reduce_scatter"

    tables: list[tuple[dict[str, tuple[Term, ...]], tuple[ScheduleMoment, ...], dict[int, str]]] = []
    for first in (True, False):
        table: dict[str, list[tuple[tuple[int, ...], int]]] = {phase: [] for phase in PHASES}
        places: list[ScheduleMoment] = []
        where: dict[int, str] = {}
        for moment in (m for m in moments if m.first == first):
            key, row = (moment.chunk, moment.has_gradient[moment.chunk]), row_of(moment)
            of_pass, low = pass_terms[key], _lowered(chunks[moment.chunk].graph, options[key])
            for phase in ("backward",) if moment.backward else ("forward", "loss"):
                for term in of_pass.terms[phase]:
                    table[phase].append((tuple(map(add, row, term.coefficients)), len(places)))
                    where[len(places)] = low.moments[term.moment].where
                    places.append(ScheduleMoment(moment, term.moment))
            if logits is not None and not moment.backward:
                variable, bytes_ = size(logits.shape, logits.dtype, axes)
                total = [a + b for a, b in zip(row, of_pass.kept, strict=True)]
                total[index[variable]] += bytes_
                table["loss"].append((tuple(total), len(places)))
                where[len(places)] = "return"
                places.append(ScheduleMoment(moment, RETURNED))
        for at_first, phase, row, scheduled, name in gathering_and_reducing():
            if at_first == first:
                table[phase].append((row, len(places)))
                where[len(places)] = name
                places.append(scheduled)
        terms = {phase: prune(of_phase, variables) if of_phase else () for phase, of_phase in table.items()}
        tables.append((terms, tuple(places), where))
    (first_terms, *_), (later_terms, *_) = tables
    return _Moments(
        variables=variables,
        held=tuple(row_of(None)) if buffers[None] else (),
        products=tuple(map(Variable, chain(variables))),
        needs=frozenset(axis for v in variables for axis in v.axes),
        first=first_terms,
        later=later_terms if structure.accumulates else first_terms,
        where=(tables[0][2], tables[1][2]),
        schedule_moments=(tables[0][1], tables[1][1]),
    )


def released_bytes(chunk: Structure) -> int:
    """Return the bytes that reducing a chunk's gradients releases: whole weights and gradients, minus the rank's parts
    of the reduced gradients."""
    whole = (*fsdp_pipeline.weights(chunk.graph, chunk.ranks), *fsdp_pipeline.gradients(chunk.graph, chunk.ranks))
    parts = gradients_held(chunk.graph, chunk.ranks)
    return sum(h.bytes * h.copies for h in whole) - sum(h.bytes * h.copies for h in parts)


def accumulated_bytes(structure: Structure) -> int:
    """Return the bytes of gradients that a later micro-batch finds, without those in buffers of their own."""
    if structure.grads or not structure.accumulates or (in_buckets(structure) and not structure.ranks.delayed):
        return 0
    return sum(h.bytes * h.copies for h in accumulated_of(structure))


def _all_moments(structure: Structure) -> _Moments:
    if structure.pipe.engine:
        return _pipeline_moments(structure)
    options = tuple(_options(structure, later) for later in (False, True)[: 1 + structure.accumulates])
    return _moments(structure.graph, options, structure.holds_outputs)


@lru_cache(maxsize=2048)
def program(structure: Structure) -> Program:
    """Lower the structure and fill in its model's numbers. Takes milliseconds, then is cached."""
    whole = structure.graph._replace(degrees=WHOLE)
    moments = _all_moments(structure)
    weights, numbers = tuple(weights_of(whole)), operations_of(whole)[1]
    resident = tuple(resident_of(structure))
    trained = trained_parameters(structure)
    optimizer = _optimizer(structure, trained)
    consumed = frees_gradients(structure) or in_buckets(structure)
    gradients = 0 if consumed else sum(h.bytes * h.copies for h in gradients_of(structure))
    return Program(
        structure=structure,
        **moments._asdict(),
        parameters=sum(h.bytes * h.copies for h in resident),
        loading=_loading_peak(structure),
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
        host_activations=tuple(_offloaded_activations(structure)),
        clipping=_clipping(structure, trained),
        total_parameters=sum(elements(w, numbers) * n for w, n, _ in weights if w.group not in ("adapter", "buffer")),
        trainable_parameters=sum(elements(w, numbers) * n for w, n, _ in weights if is_optimized(w, whole) or w.idle),
        active_parameters=sum(
            active_elements(w, numbers) * n for w, n, _ in weights if w.group not in ("adapter", "buffer")
        ),
    )


def _offloaded_activations(structure: Structure) -> Iterator[tuple[str, str, int]]:
    """Yield the activations kept in host memory for all microbatches in flight: shape, dtype and count."""
    most = [1] * len(chunks_of(structure))
    if structure.pipe.engine:
        most = [max(m.others[i] + (m.chunk == i) for m in schedule_positions(structure)) for i in range(len(most))]
    for chunk, flights in zip(chunks_of(structure), most, strict=True):
        low = _lowered(chunk.graph, _options(chunk, later=False))
        for key, count in alive(low.host, low.runs, operations_of(chunk.graph)[1]).items():
            shape, dtype, *_ = low.sizes[key]
            yield shape, dtype, count * flights


def host_bytes(program: Program, axes: Mapping[str, int]) -> int:
    """Return the bytes in host memory of the optimizer and of passes, for a run with these `axes`. Not rounded."""
    if not program.host_activations:
        return program.host
    numbers = {**operations_of(program.structure.graph)[1], **axes}

    def bytes_of(shape: str, dtype: str) -> int:
        return ITEMSIZE[dtype] * prod(int(t) if t.isdigit() else numbers[t] for t in shape.split())

    return program.host + sum(bytes_of(shape, dtype) * count for shape, dtype, count in program.host_activations)


def _optimizer(structure: Structure, trained: list[Parameter]) -> OptimizerMemory:
    """Return the optimizer's memory. ZeRO stage 3 steps one sub-group after another, with the scratch of one."""
    memory = _with_local_gradients(optimizer_of(structure, trained), structure)
    if structure.ranks.knobs.optimizer or structure.ranks.offloads:
        states = tuple(s._replace(bytes=0, host=True) for s in memory.states)
        return memory._replace(states=states, first=0, later=0, scratch="", foreach_lists=())
    if zero.stage(structure.ranks) < 3:
        return memory
    sub_group = Parameter("", (zero.in_sub_group(structure.graph, structure.ranks),), "fp32")
    of_one = optimizer_of(structure, [sub_group])
    return memory._replace(first=of_one.first, later=of_one.later, foreach_lists=of_one.foreach_lists)


def _with_local_gradients(memory: OptimizerMemory, structure: Structure) -> OptimizerMemory:
    """Return the memory with a copy of the rank's parts of gradients that are whole though the weights are sharded.

    Source: torch 2.13 distributed/tensor/_dispatch.py redistribute_local_args.
    """
    _, axes = operations_of(structure.graph)
    whole = [(w, n) for w, n, _ in weights_of(structure.graph) if w.gradient and w.trains]
    local = sum(size(w.shape, w.dtype, axes)[1] * n for w, n in whole)
    if max(memory.first, memory.later) >= local or memory.frees_gradients or structure.optimizer == "none":
        return memory
    scratch = "the rank's parts of whole gradients"
    return memory._replace(first=max(memory.first, local), later=max(memory.later, local), scratch=scratch)


def _clipping(structure: Structure, trained: list[Parameter]) -> int:
    """Return the bytes between backward and the update: gradient norms, or DeepSpeed's gradient conversion."""
    if zero.stage(structure.ranks):
        return sum(h.bytes for h in gradient_conversion_of(structure))
    if structure.ranks.offloads:
        return NORM_OF_HOST[structure.ranks.row.flat] if structure.clips else 0
    return clipping(trained) if structure.clips and not frees_gradients(structure) else 0


def gradient_conversion_of(structure: Structure) -> tuple[TensorGroup, ...]:
    """Return DeepSpeed's temporaries while it builds the fp32 gradient of the partition."""
    return tuple(zero.converting(structure.graph, structure.ranks)) if zero.stage(structure.ranks) else ()


def host_of(structure: Structure) -> tuple[TensorGroup, ...]:
    """Return what DeepSpeed or FSDP offloads to a rank's host memory."""
    ranks = structure.ranks
    if ranks.offloads:
        trained = trained_parameters(structure)
        memory = optimizer_of(structure._replace(foreach=False if structure.foreach else None), trained)
        adds = structure.accumulates and not ranks.delayed
        return tuple(offloaded(structure.graph, ranks, memory, adds))
    if not zero.stage(ranks) or not (ranks.knobs.optimizer or ranks.knobs.parameters):
        return ()
    states = optimizer_of(structure, trained_parameters(structure)).states
    return tuple(zero.in_host_memory(structure.graph, ranks, states, structure.accumulates))


def host_notes(structure: Structure, node: int) -> Iterator[str]:
    """Yield notes on the host memory that the `node` ranks of one node share."""
    return zero.host_notes(structure.ranks, host_of(structure), node)


def passing_of(structure: Structure, phase: str) -> tuple[TensorGroup, ...]:
    """Return what ranks hold during a phase of a pass, in addition to the moments' tensors."""
    if stays_whole(structure):
        return tuple(fsdp_pipeline.weights(structure.graph, structure.ranks))
    return tuple(zero.held_in_phase(structure.graph, structure.ranks, phase)) if zero.stage(structure.ranks) else ()


def reduced_of(structure: Structure, scheduled: ScheduleMoment) -> Iterator[TensorGroup]:
    """Yield the weights and gradients alive while a chunk's gradients are reduced, those of other chunks included."""
    for i, chunk in enumerate(chunks_of(structure)):
        if i == scheduled.schedule_position.chunk:
            yield from fsdp_pipeline.reduction(chunk.graph, chunk.ranks).held
        else:
            yield from whole_of(chunk, scheduled.schedule_position, i)


def gathered_of(structure: Structure, scheduled: ScheduleMoment) -> tuple[TensorGroup, ...]:
    """Return the all-gather's output before it is copied into the weights of a chunk gathered before its first pass.
    All chunks' gathers are issued at once."""
    chunk = chunks_of(structure)[scheduled.schedule_position.chunk]
    return fsdp_pipeline.message(chunk.graph, chunk.ranks)


def whole_of(chunk: Structure, moment: pipeline.PipelineMoment, i: int) -> Iterator[TensorGroup]:
    """Yield the whole weights and gradients of the rank's `i`th chunk at a moment (see `stays_whole`). Once the chunk
    is done, only the rank's part of its gradients is left."""
    if moment.done[i]:
        yield from gradients_held(chunk.graph, chunk.ranks)
        return
    yield from fsdp_pipeline.weights(chunk.graph, chunk.ranks)
    if moment.has_gradient[i] and chunk.accumulates:
        yield from fsdp_pipeline.gradients(chunk.graph, chunk.ranks)


def reductions_of(structure: Structure) -> tuple[pipeline.GradientReduction, ...]:
    """Return when each chunk's gradients are reduced, if that happens once at the end of its passes."""
    if not stays_whole(structure):
        return ()
    d, pipe = structure.graph.degrees, structure.pipe
    return pipeline.reductions(pipe.schedule, d.pp, d.stage, d.virtual_stages, pipe.microbatches)


def openings_of(structure: Structure) -> tuple[pipeline.PipelineMoment, ...]:
    """Return each chunk's first forward pass, which gathers its weights for the step. Empty if accumulated gradients
    outweigh an all-gather's output, as these moments cannot be the peak then."""
    if not stays_whole(structure):
        return ()
    graph, ranks = structure.graph, structure.ranks
    written = sum(h.bytes for h in fsdp_pipeline.message(graph, ranks))
    if structure.accumulates and sum(h.bytes * h.copies for h in fsdp_pipeline.gradients(graph, ranks)) >= written:
        return ()
    d, pipe = structure.graph.degrees, structure.pipe
    first: dict[int, pipeline.PipelineMoment] = {}
    for moment in pipeline.distinct_passes(pipe.schedule, d.pp, d.stage, d.virtual_stages, pipe.microbatches):
        first.setdefault(moment.chunk, moment)
        if len(first) == d.virtual_stages:
            break
    return tuple(first.values())


def loading_of(structure: Structure, together: bool = False) -> Iterator[tuple[int, int]]:
    """Yield what loading allocates and frees (see `memplan.program.loading.loading`). For `together` see
    `memplan.program.sharding.fsdp_loading.loading_events`."""
    if zero.stage(structure.ranks):
        return zero.loading_events(structure.graph, structure.ranks)
    if megatron.divides(structure.ranks):
        return megatron.loading_events(structure.graph, structure.ranks, str(structure.grads))
    if structure.graph.code == "torchtitan":  # allocates each part once, uninitialised: trainer.py to_empty
        return enumerate(h.bytes for h in resident_of(structure) for _ in range(h.copies))
    if division_of(structure) is not None:
        return fsdp_loading.loading_events(structure.graph, structure.ranks, together)
    return loading(structure.graph)


def _loading_peak(structure: Structure) -> int:
    """Return the peak bytes before the first step. DDP broadcasts the first rank's weights to the others."""
    most = most_at_once(loading_of(structure, together=True))
    if structure.ranks.strategy != "ddp" or structure.ranks.world == 1 or structure.buffers:
        return most
    resident = sum(h.bytes * h.copies for h in resident_of(structure))
    return max(most, resident + min(resident, BROADCASTS * BROADCAST))


def resident_of(structure: Structure) -> Iterator[TensorGroup]:
    """Yield the weights and buffers that a rank holds."""
    if zero.stage(structure.ranks):
        return zero.parameters(structure.graph, structure.ranks)
    if megatron.divides(structure.ranks):
        return megatron.parameters(structure.graph, structure.ranks)
    return parameters_held(structure.graph, structure.ranks)


def reducing_of(structure: Structure) -> tuple[TensorGroup, ...]:
    """Return what gradient reduction holds throughout: buckets, and in ZeRO stage 3 the reduced partition. For a model
    with a workspace of its own, that workspace."""
    if structure.workspace:
        source = "TransformerEngine 2.3 pytorch/module/base.py get_workspace"
        shape = str(structure.workspace)
        return (
            TensorGroup("other", "workspace of Transformer Engine", "", shape, "uint8", 1, structure.workspace, source),
        )
    if zero.stage(structure.ranks):
        return tuple(zero.reducing(structure.graph, structure.ranks))
    if structure.ranks.world == 1 or structure.ranks.strategy != "ddp":
        return ()
    return tuple(
        TensorGroup("other", "bucket of gradients", "", str(bytes_), "uint8", count, bytes_, BUCKETS_SOURCE)
        for bytes_, count in buckets(trained_parameters(structure))
    )


def _operation_names(low: Lowered, terms: dict[str, tuple[Term, ...]]) -> dict[int, str]:
    return {t.moment: low.moments[t.moment].where for phase in terms.values() for t in phase}


def gradients_of(structure: Structure) -> Iterator[TensorGroup]:
    """Yield the gradients that the optimizer reads: whole, or the rank's part of them."""
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


def _whole_gradients(structure: Structure) -> Iterator[TensorGroup]:
    _, axes = operations_of(structure.graph)
    for w, count, where in weights_of(structure.graph):
        if w.trains:
            dtype = structure.grads or w.dtype
            shape = w.gradient or w.shape
            bytes_ = size(shape, dtype, axes)[1]
            yield TensorGroup("gradient", f"{w.name}.grad", where.rstrip("."), shape, dtype, count, bytes_, "autograd")


def stay_throughout(structure: Structure, phase: str) -> bool:
    """Whether accumulated gradients exist throughout a phase of a later micro-batch. They do not if ranks reduce them
    unit by unit in that phase."""
    whole = stays_whole(structure)
    return whole or not (phase == "backward" and structure.ranks.delayed and division_of(structure) is not None)


def accumulated_of(structure: Structure) -> Iterator[TensorGroup]:
    """Yield the gradients that a later micro-batch finds."""
    match zero.stage(structure.ranks):
        case 1:
            return _whole_gradients(structure)
        case 2 | 3:
            return zero.accumulated(structure.graph, structure.ranks)
        case _:
            pass
    if stays_whole(structure):
        return fsdp_pipeline.gradients(structure.graph, structure.ranks)
    if structure.ranks.delayed and division_of(structure) is not None:
        return whole_gradients(structure.graph, structure.ranks)
    return gradients_of(structure)


def trained_parameters(structure: Structure) -> list[Parameter]:
    """Return the parameters passed to the optimizer, in the model's order. A run of equal layers is its first layer
    and one entry for the others."""
    if zero.stage(structure.ranks):
        return zero.trained(structure.graph, structure.ranks)
    if megatron.divides(structure.ranks):
        return megatron.trained(structure.graph, structure.ranks)
    if division_of(structure) is not None:
        return trained_parts(structure.graph, structure.ranks, structure.trainer)
    _, axes = operations_of(structure.graph)
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
    """Whether gradients are views of DDP's buckets and have no memory of their own. If only a step's last micro-batch
    reduces, that is true of that micro-batch alone."""
    return structure.ranks.views and structure.ranks.world > 1


def frees_gradients(structure: Structure) -> bool:
    """Whether each gradient is consumed as soon as it is computed, by a fused optimizer or by stepping in backward."""
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
    """Yield the phase, step and peak bytes of every phase after loading; the step is None if all steps are equal.

    workspace  cuBLAS's workspace for one handle
    moving     peak of the forward pass, the loss and the backward pass, without what exists throughout
    held       bytes that the script holds into the optimizer step
    """
    p = program
    fixed = p.parameters + p.buffered + p.reducing + p.scaler + workspace
    for step in steps(p):
        states = _states(p, step)
        for phase, most in zip(PHASES, moving, strict=True):
            second = workspace if phase == "backward" or step != 1 else 0
            yield phase, step, fixed + second + states + p.passing[phase] + most
        yield "step", step, fixed + workspace + p.gradients + held + max(_update(p, step), states + p.clipping)


def steps(program: Program) -> tuple[int | None, ...]:
    """Return (1, 2) if the first step differs from later ones, else (None,)."""
    creates_states = program.states and not program.optimizer.at_once
    return (1, 2) if creates_states or program.optimizer.first != program.optimizer.later else (None,)


def step_where(program: Program, step: int | None) -> str:
    """Return which part of a step's end takes more memory: `optimizer`, or `clipping` before it."""
    clipping = _states(program, step) + program.clipping
    return "optimizer" if _update(program, step) >= clipping else "clipping"


def _states(program: Program, step: int | None) -> int:
    """Return the bytes of optimizer states before the update."""
    return program.states if step == 2 or program.optimizer.at_once else 0


def _update(program: Program, step: int | None) -> int:
    """Return the bytes of optimizer states and of the update's temporaries."""
    optimizer = program.optimizer
    return program.states + (optimizer.first if step == 1 else optimizer.later)
