"""The forward and backward passes of a training step, and which of their moments can be the peak."""

from __future__ import annotations

from functools import lru_cache

from memplan.catalogue.parallelism.pipeline import PipelineMoment
from memplan.core.records import NamedTuple
from memplan.engine import walk
from memplan.engine.lowered import Lowered
from memplan.engine.walk import Term, Variable, chain, prune, rows, size
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


class Moments(NamedTuple):
    """The moments of a step that can be its peak, with the model's numbers filled in.

    variables         sizes that batch and sequence decide; moments are linear in them
    held              coefficients of what the script holds into the optimizer step, empty if it holds nothing
    products          chain of products that bounds moments, largest first
    needs             names of the axes of `variables`
    first             moments of a step's first micro-batch, by phase
    later             moments of a step's later micro-batches, by phase
    where             name of each moment's operation, for the first and for later micro-batches
    schedule_moments  position of each moment in a pipeline's schedule, for first and later micro-batches
    """

    variables: tuple[Variable, ...]
    held: tuple[int, ...]
    products: tuple[Variable, ...]
    needs: frozenset[str]
    first: Terms
    later: Terms
    where: tuple[dict[int, str], dict[int, str]]
    schedule_moments: tuple[tuple[ScheduleMoment, ...], tuple[ScheduleMoment, ...]] = ((), ())


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


@lru_cache(maxsize=512)
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
    """The largest moments of a pass, by phase, with what it keeps for backward and what the script holds afterwards.
    All are over some variables."""

    terms: Terms
    kept: tuple[int, ...]
    held: tuple[int, ...]


@lru_cache(maxsize=512)
def sizes_of(graph: Graph, options: TrainingPass) -> tuple[tuple[Variable, int], ...]:
    """Return the size of each of a pass's storages."""
    axes = operations_of(graph)[1]
    sizes = [(shape, dtype) for shape, dtype, *_ in lower_training(graph, options).sizes]
    known = {key: size(*key, axes) for key in dict.fromkeys(sizes)}
    return tuple(known[key] for key in sizes)


@lru_cache(maxsize=512)
def pass_terms(graph: Graph, options: TrainingPass, variables: tuple[Variable, ...]) -> PassTerms:
    """Return the largest moments of a pass."""
    low, axes = lower_training(graph, options), operations_of(graph)[1]
    moments = (*low.moments.unnamed, low.kept, low.held)
    *coefficients, kept, held = rows(moments, low.runs, axes, sizes_of(graph, options), variables)
    of_phase: dict[str, list[int]] = {phase: [] for phase in PHASES}
    for i, phase in enumerate(low.moments.phases):
        if phase in of_phase:
            of_phase[phase].append(i)
    along = chain(variables)
    terms = {
        phase: prune(((coefficients[i], i) for i in indices), variables, along) if indices else ()
        for phase, indices in of_phase.items()
    }
    return PassTerms(terms, kept, held)


def variables_of(used: set[Variable]) -> tuple[Variable, ...]:
    """Return the variables of moments in order, the constant first."""
    return (walk.ONE, *sorted(used - {walk.ONE}))


@lru_cache(maxsize=512)
def step_moments(graph: Graph, options: tuple[TrainingPass, ...], holds_outputs: bool) -> Moments:
    """Return the moments of a step's passes, cached for all optimizers with the same options."""
    variables = variables_of({v for of_pass in options for v, _ in sizes_of(graph, of_pass)})
    passes = [pass_terms(graph, of_pass, variables) for of_pass in options]
    lows = [lower_training(graph, of_pass) for of_pass in options]
    names = [
        {t.moment: low.moments[t.moment].where for phase in of_pass.terms.values() for t in phase}
        for low, of_pass in zip(lows, passes, strict=True)
    ]
    return Moments(
        variables=variables,
        held=passes[-1].held if holds_outputs else (),
        products=tuple(map(Variable, chain(variables))),
        needs=frozenset(axis for v in variables for axis in v.axes),
        first=passes[0].terms,
        later=passes[-1].terms,
        where=(names[0], names[-1]),
    )
