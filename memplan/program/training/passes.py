"""The forward and backward passes of a training step, and which of their moments can be the peak."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from operator import itemgetter

from memplan.catalogue.parallelism.pipeline import PipelineMoment
from memplan.core.cached_property import cached_property
from memplan.core.collection import without_collection
from memplan.core.records import NamedTuple
from memplan.engine import walk
from memplan.engine.lowered import Lowered
from memplan.engine.walk import Term, Variable, bytes_at_each, chain, prune, rows, size
from memplan.program.graph import Graph, TrainingPass, lower_training, operations_of
from memplan.program.sharding.choice import sharding_of
from memplan.program.structure import Structure

PHASES = ("forward", "reference", "teacher", "loss", "backward")
Terms = dict[str, tuple[Term, ...]]  # largest moments, by phase


class ScheduleMoment(NamedTuple):
    """One moment of a pipeline rank: a moment of a pass, and where the schedule is at that time.

    schedule_position  the pass in the schedule: chunk, direction, and other microbatches in flight
    moment             index of the pass's moment; or RETURNED, when the model has returned its logits; REDUCED, when
                       the chunk's gradients are reduced; GATHERED, when the chunk's weights are gathered before its
                       first pass
    opens              the pass gathers the weights itself: the first pass of a rank with a single chunk
    """

    schedule_position: PipelineMoment
    moment: int
    opens: bool = False


RETURNED, REDUCED, GATHERED = -1, -2, -3


class MomentTerms(NamedTuple):
    """The moments of a step that can be its peak, whatever its batch and sequence.

    first  moments of a step's first micro-batch, by phase
    later  moments of a step's later micro-batches, by phase
    where  name of each moment's operation, for the first and for later micro-batches
    """

    first: Terms
    later: Terms
    where: tuple[dict[int, str], dict[int, str]]


class LargestMoments(NamedTuple):
    """The largest moments of a step at some batch and sequence.

    of_phases  the most bytes of each phase of each pass and its moment: 0 and -1 for a phase without moments
    where      name of each of these moments' operations, for the first and for later micro-batches
    """

    of_phases: list[tuple[int, int]]
    where: tuple[dict[int, str], dict[int, str]]


class Moments:
    """The moments of a step, with the model's numbers filled in.

    variables         sizes that batch and sequence decide; moments are linear in them
    held              coefficients of what the script holds into the optimizer step, empty if it holds nothing
    needs             names of the axes of `variables`
    schedule_moments  position of each moment in a pipeline's schedule, for first and later micro-batches
    """

    def __init__(
        self,
        variables: tuple[Variable, ...],
        held: tuple[int, ...],
        terms: Callable[[], MomentTerms],
        largest: Callable[[Sequence[int]], LargestMoments | None] | None = None,
        schedule_moments: tuple[tuple[ScheduleMoment, ...], tuple[ScheduleMoment, ...]] = ((), ()),
    ) -> None:
        self.variables, self.held, self.schedule_moments = variables, held, schedule_moments
        self.needs = frozenset(axis for v in variables for axis in v.axes)
        self._terms, self._largest = terms, largest
        self._first: tuple[list[int], LargestMoments | None] | None = None

    @cached_property
    def terms(self) -> MomentTerms:
        """The moments that can be the peak. Finding them takes as long as lowering."""
        return self._terms()

    def largest(self, numbers: list[int]) -> LargestMoments | None:
        """Return the largest moments at the first values of the variables that are asked for, without finding out which
        can be the peak at others. None at others, and if it takes that to tell equally large ones apart."""
        if self._first is None:
            self._first = numbers, None if self._largest is None else self._largest(numbers)
        at, found = self._first
        return found if at == numbers else None


def pass_of(structure: Structure, later: bool = False, opens: bool = False) -> Lowered:
    """Return the moments of the first forward and backward pass of a step, or of a `later` pass.

    With `opens`, the moments of the pass that gathers weights for the rest of the step.
    """
    return lower_training(structure.graph, pass_options(structure, later, opens))


def pass_options(structure: Structure, later: bool, opens: bool = False) -> TrainingPass:
    """Return the options of a step's first pass, of a `later` pass, or of the pass that gathers weights (`opens`)."""
    follows = later or not structure.accumulates  # without accumulation, the pass of every step but the first
    previous = structure.graph.holds_previous_outputs if follows else ""
    options = recorded_options(structure, later, opens)._replace(follows=previous)
    if options.division is not None and later and structure.ranks.delayed:
        options = options._replace(division=options.division._replace(sums=True))
    return options


@lru_cache(maxsize=64)
def recorded_options(structure: Structure, later: bool, opens: bool = False) -> TrainingPass:
    """Return the options of a pass whose allocations are recorded. Whole gradients of earlier passes, and outputs that
    the loop still references, are not among these."""
    sharding = sharding_of(structure)
    exist = later or sharding.leaves_no_gradients
    return TrainingPass(exist, updates_of(structure), division=sharding.division(later, opens))


def updates_of(structure: Structure) -> tuple[tuple[str, int], ...]:
    """Return the bytes of each weight's update inside backward, by the weight's path; empty if updates come later."""
    sharding = sharding_of(structure)
    if not sharding.frees_gradients:
        return ()
    trained = {p.name: p._replace(copies=1) for p in sharding.trained()}
    updates = ((name, sharding.memory_of([p]).backward) for name, p in trained.items())
    return tuple((name, bytes_) for name, bytes_ in updates if bytes_)


class PassTerms(NamedTuple):
    """The largest moments of a pass, by phase, and what it keeps for backward, over some variables."""

    terms: Terms
    kept: tuple[int, ...]


@lru_cache(maxsize=64)
def sizes_of(graph: Graph, options: TrainingPass) -> tuple[tuple[Variable, int], ...]:
    """Return the size of each of a pass's storages."""
    axes = operations_of(graph)[1]
    sizes = [(shape, dtype) for shape, dtype, *_ in lower_training(graph, options).sizes]
    known = {key: size(*key, axes) for key in dict.fromkeys(sizes)}
    return tuple(known[key] for key in sizes)


@lru_cache(maxsize=64)
def pass_terms(graph: Graph, options: TrainingPass, variables: tuple[Variable, ...]) -> PassTerms:
    """Return the largest moments of a pass."""
    low, axes = lower_training(graph, options), operations_of(graph)[1]
    rows_of = partial(rows, runs=low.runs, axes=axes, sizes=sizes_of(graph, options), variables=variables)
    terms: Terms = dict.fromkeys(PHASES, ())
    along = chain(variables)
    each = zip(low.moments.phases, rows_of(low.moments.unnamed), itertools.count(), strict=False)
    for phase, of_phase in itertools.groupby(each, itemgetter(0)):
        if phase in terms:
            terms[phase] = prune(itertools.chain(terms[phase], map(itemgetter(1, 2), of_phase)), variables, along)
    (kept,) = rows_of((low.kept,))
    return PassTerms(terms, kept)


def _by_phase(low: Lowered) -> dict[str, list[int]]:
    """Return the moments of each phase of a pass."""
    of_phase: dict[str, list[int]] = {phase: [] for phase in PHASES}
    at = 0
    for phase, moments in itertools.groupby(low.moments.phases):
        end = at + len([*moments])
        of_phase.get(phase, []).extend(range(at, end))
        at = end
    return of_phase


def variables_of(used: set[Variable]) -> tuple[Variable, ...]:
    """Return the variables of moments in order, the constant first."""
    return (walk.ONE, *sorted(used - {walk.ONE}))


@lru_cache(maxsize=64)
def step_moments(graph: Graph, options: tuple[TrainingPass, ...], holds_outputs: bool) -> Moments:
    """Return the moments of a step's passes, cached for all optimizers with the same options."""
    variables = variables_of({v for of_pass in options for v, _ in sizes_of(graph, of_pass)})
    last, axes = lower_training(graph, options[-1]), operations_of(graph)[1]
    (held,) = rows((last.held,), last.runs, axes, sizes_of(graph, options[-1]), variables) if holds_outputs else ((),)
    return Moments(
        variables, held, partial(_terms, graph, options, variables), partial(_largest, graph, options, variables)
    )


@without_collection
def _terms(graph: Graph, options: Sequence[TrainingPass], variables: tuple[Variable, ...]) -> MomentTerms:
    passes = [pass_terms(graph, of_pass, variables).terms for of_pass in options]
    names = [
        {t.moment: low.moments[t.moment].where for phase in terms.values() for t in phase}
        for low, terms in zip([lower_training(graph, of_pass) for of_pass in options], passes, strict=True)
    ]
    return MomentTerms(passes[0], passes[-1], (names[0], names[-1]))


def _largest(
    graph: Graph, options: Sequence[TrainingPass], variables: tuple[Variable, ...], numbers: Sequence[int]
) -> LargestMoments | None:
    value_of, axes = dict(zip(variables, numbers, strict=True)), operations_of(graph)[1]
    of_phases: list[tuple[int, int]] = []
    names: list[dict[int, str]] = []
    for of_pass in options:
        low, sizes = lower_training(graph, of_pass), sizes_of(graph, of_pass)
        live = [*bytes_at_each(low.moments.unnamed, low.runs, axes, [n * value_of[v] for v, n in sizes])]
        for indices in _by_phase(low).values():
            of_phase = [*map(live.__getitem__, indices)]
            most = max(of_phase, default=0)
            if of_phase.count(most) > 1:
                tied = (low.moments[i] for i, bytes_ in zip(indices, of_phase, strict=True) if bytes_ == most)
                if len({*rows(tied, low.runs, axes, sizes, variables)}) > 1:
                    return None
            of_phases.append((most, indices[of_phase.index(most)] if indices else -1))
        names.append({i: low.moments[i].where for _, i in of_phases[-len(PHASES) :] if i >= 0})
    return LargestMoments(of_phases, (names[0], names[-1]))
