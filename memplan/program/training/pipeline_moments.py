"""The moments of a pipeline rank's step: passes through its chunks of layers, with other microbatches in flight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from operator import add

from memplan.catalogue.parallelism import pipeline
from memplan.catalogue.parallelism.pipeline import PipelineMoment
from memplan.core.ir import Tensor
from memplan.engine.walk import Variable, prune, size
from memplan.program.graph import (
    Graph,
    first_equal_stage,
    lower_training,
    operations_of,
    shared_buffers,
    stage_boundaries,
    total_bytes,
)
from memplan.program.sharding.choice import sharding_of
from memplan.program.structure import Structure, chunks_of
from memplan.program.training.passes import (
    GATHERED,
    PHASES,
    REDUCED,
    RETURNED,
    Moments,
    MomentTerms,
    ScheduleMoment,
    Terms,
    pass_options,
    pass_terms,
    sizes_of,
    variables_of,
)


def schedule_positions(structure: Structure) -> tuple[pipeline.PipelineMoment, ...]:
    """Return every position of a pipeline rank's schedule that can be the peak."""
    return pipeline.moments(*structure.schedule)


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
    d = structure.graph.degrees
    if not structure.is_one_process or d.stage:
        return None
    last = structure.graph._replace(degrees=d._replace(stage=d.pp - 1))
    names = {t.name for op in operations_of(last)[0].after for t in op.writes if "v" in t.shape.split()}
    logits = [key for key in lower_training(last).sizes if key[2:3] == ("activation",) and key[5] in names]
    return Tensor("logits", *logits[-1][:2]) if logits else None


def _logits(graph: Graph) -> Tensor | None:
    """Return the logits that the script holds, or None if the stage has none."""
    low = lower_training(graph)
    held = (low.sizes[key] for key, n in sorted(low.held.counts.items()) if n)
    return next((Tensor("logits", key[0], key[1]) for key in held if "v" in key[0].split()), None)


def rank_moments(structure: Structure) -> Moments:
    """Return the moments of a pipeline rank: a pass, other microbatches in flight, and the buffers between stages."""
    rank = _Rank(structure)
    first, later = rank.table(first=True), rank.table(first=False)
    of_first = first.terms
    of_later = later.terms if structure.accumulates else of_first
    held = tuple(rank.row(None)) if rank.buffers[None] else ()
    places = tuple(first.places), tuple(later.places)
    terms = partial(MomentTerms, of_first, of_later, (first.names, later.names))
    return Moments(rank.variables, held, terms, schedule_moments=places)


class _Table:
    """Moments of a first or later micro-batch: the largest by phase, and the place in the schedule and name of each."""

    def __init__(self, variables: tuple[Variable, ...]) -> None:
        self._variables = variables
        self._rows: dict[str, list[tuple[tuple[int, ...], int]]] = {phase: [] for phase in PHASES}
        self.places: list[ScheduleMoment] = []
        self.names: dict[int, str] = {}

    def add(self, phase: str, row: Sequence[int], place: ScheduleMoment, name: str) -> None:
        self._rows[phase].append((tuple(row), len(self.places)))
        self.names[len(self.places)] = name
        self.places.append(place)

    @property
    def terms(self) -> Terms:
        return {phase: prune(of_phase, self._variables) for phase, of_phase in self._rows.items()}


class _Rank:
    """A pipeline rank: its chunks of layers, where its schedule can peak, and what it buffers at each of these times.

    Chunks are lowered as the first stage that equals them.
    """

    def __init__(self, structure: Structure) -> None:
        self.structure, self.sharding = structure, sharding_of(structure)
        self.chunks = [s._replace(graph=first_equal_stage(s.graph)) for s in chunks_of(structure)]
        self.axes = operations_of(structure.graph)[1]
        self.positions = schedule_positions(structure)
        self.starts, self.ends = self.sharding.openings(), self.sharding.reductions()
        self.opening = (
            pass_options(self.chunks[0], later=False, opens=True) if self.starts and len(self.chunks) == 1 else None
        )
        graded = {(m.chunk, m.has_gradient[m.chunk]) for m in self.positions}
        graded |= {(i, False) for i in range(len(self.chunks))}
        self.options = {(i, later): pass_options(self.chunks[i], later) for i, later in graded}
        self.buffers = {m: self._buffers(m) for m in (*self.positions, *self.starts, None)}
        self.ending = {end.after: self._buffers(end.after, reduces=True) for end in self.ends}
        logits = returned(structure)
        self.returned = size(logits.shape, logits.dtype, self.axes) if logits else None
        self.variables = variables_of({*self._used()})
        self.index = {v: i for i, v in enumerate(self.variables)}
        self.terms = {
            key: pass_terms(self.chunks[key[0]].graph, of_pass, self.variables) for key, of_pass in self.options.items()
        }
        shardings = [sharding_of(chunk) for chunk in self.chunks]
        self.accumulated = [sharding.accumulated_bytes() for sharding in shardings]
        self.released = [sharding.released().total() for sharding in shardings]

    def _buffers(self, moment: PipelineMoment | None, reduces: bool = False) -> list[tuple[tuple[Variable, int], int]]:
        """Return the size and count of every tensor that a stage buffers between passes."""
        buffers = stage_buffers(self.structure, moment, reduces)
        return [(size(t.shape, t.dtype, self.axes), count) for t, _, count in buffers]

    def _used(self) -> Iterator[Variable]:
        """Yield the variables of all passes and buffers."""
        passes = [(self.chunks[i].graph, of_pass) for (i, _), of_pass in self.options.items()]
        if self.opening is not None:
            passes.append((self.chunks[0].graph, self.opening))
        yield from (v for graph, options in passes for v, _ in sizes_of(graph, options))
        yield from (v for buffers in (*self.buffers.values(), *self.ending.values()) for (v, _), _ in buffers)
        if self.returned:
            yield self.returned[0]

    def row(self, moment: PipelineMoment | None, reduces: bool = False) -> list[int]:
        """Return what is alive around a moment: buffers, and what other microbatches in flight keep."""
        row = [0] * len(self.variables)
        for (variable, bytes_), count in self.ending[moment] if reduces and moment else self.buffers[moment]:
            row[self.index[variable]] += bytes_ * count
        for i, count in enumerate(moment.others if moment else ()):
            if count:
                row = [a + count * b for a, b in zip(row, self.terms[i, False].kept, strict=True)]
        if moment and not moment.first and not reduces:  # gradients that do not exist yet, or not any more
            row[0] -= sum(n for n, exists in zip(self.accumulated, moment.has_gradient, strict=True) if not exists)
            row[0] -= sum(n for n, over in zip(self.released, moment.done, strict=True) if over)
        return row

    def table(self, first: bool) -> _Table:
        """Return the moments of the first micro-batch, or of later ones."""
        table = _Table(self.variables)
        for moment in self.positions:
            if moment.first == first:
                self._add_pass(table, moment)
        whole = total_bytes(self.sharding.held_in("forward"))
        for start in self.starts if first else ():
            self._add_opening(table, start, whole)
        for end in self.ends if first != self.structure.accumulates else ():
            place, row = ScheduleMoment(end.after, REDUCED), self.row(end.after, reduces=True)
            row[0] += total_bytes(self.sharding.reduced(end.after)) - whole - self.sharding.accumulated_bytes()
            table.add("backward", row, place, "reduce_scatter")
        return table

    def _add_pass(self, table: _Table, moment: PipelineMoment) -> None:
        key, row = (moment.chunk, moment.has_gradient[moment.chunk]), self.row(moment)
        of_pass, low = self.terms[key], lower_training(self.chunks[moment.chunk].graph, self.options[key])
        for phase in ("backward",) if moment.backward else ("forward", "loss"):
            for term in of_pass.terms[phase]:
                place, name = ScheduleMoment(moment, term.moment), low.moments[term.moment].where
                table.add(phase, [*map(add, row, term.coefficients)], place, name)
        if self.returned and not moment.backward:
            variable, bytes_ = self.returned
            row = [*map(add, row, of_pass.kept)]
            row[self.index[variable]] += bytes_
            table.add("loss", row, ScheduleMoment(moment, RETURNED), "return")

    def _add_opening(self, table: _Table, start: PipelineMoment, whole: int) -> None:
        """Add the moments in which a chunk's weights are gathered for the step; `whole` are their bytes."""
        row = self.row(start)
        if self.opening is None:
            row[0] += total_bytes(self.sharding.gathered(start))
            table.add("forward", row, ScheduleMoment(start, GATHERED), "all_gather")
            return
        row[0] -= whole
        graph = self.chunks[0].graph
        low, terms = lower_training(graph, self.opening), pass_terms(graph, self.opening, self.variables).terms
        for phase in ("forward", "loss"):
            for term in terms[phase]:
                place, name = ScheduleMoment(start, term.moment, opens=True), low.moments[term.moment].where
                table.add(phase, [*map(add, row, term.coefficients)], place, name)
