"""A plan: the sets of levers that make a run fit, each with what it saves in which phase, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.profiles.costs import LeverCost
from memplan.core.cached_property import cached_property
from memplan.core.errors import SpecError, refused
from memplan.core.records import NamedTuple
from memplan.estimate.answer import Estimate, phase_peaks
from memplan.estimate.demand import Demand
from memplan.estimate.estimate import estimate
from memplan.planning.levers import Lever, levers_of, with_fields
from memplan.planning.search import Set, Trials, cheapest, strongest, under_other_stacks
from memplan.planning.step_time import ratio, work
from memplan.spec.run import RunSpec

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration

SEVERITIES = ("unchanged", "hardly changes", "changes in some tasks", "different")  # effect on the trained model


class Time(NamedTuple):
    """How many times longer a step takes for the same number of tokens, at least and at most.

    `basis` is derived if it only counts operations at a range of rates; else assumed or measured, as a cost row says.
    """

    low: float
    high: float
    basis: str


class Effect(NamedTuple):
    """The effect of one lever on a run that may already have others.

    saves    reduction of the allocated peak in bytes; negative if the peak rises
    phases   reduction of each phase's peak; phases without a change are left out
    """

    lever: Lever
    before: Estimate
    after: Estimate

    @property
    def saves(self) -> int:
        return self.before.bytes.allocated - self.after.bytes.allocated

    @property
    def phases(self) -> dict[str, int]:
        before, after = (phase_peaks(answer) for answer in (self.before, self.after))
        return {phase: n - after.get(phase, 0) for phase, n in before.items() if n != after.get(phase, 0)}

    @property
    def time(self) -> Time | None:
        """The change in step time; None if the catalogue has no rate for the card."""
        return time_of(self.before, self.after, (self.lever,))


def time_of(before: Estimate, after: Estimate, levers: Set) -> Time | None:
    """Return how many times longer a step takes with the levers; None if the catalogue has no rate for the card."""
    return time_between(before, after, [cost for lever in levers for cost in lever.costs])


def time_between(before: Estimate, after: Estimate, costs: Iterable[LeverCost]) -> Time | None:
    """Return the ratio of two runs' step times; None if the catalogue has no rate for the card.

    Counts operations and bytes at the card's rates, times the factors of cost rows for what is not counted.
    """
    card = after.gpu or before.gpu
    factors = ratio(work(before.asked), work(after.asked), find_gpu(card.name)) if card else None
    if factors is None:
        return None
    low, high = factors
    basis = "derived"
    for cost in costs:
        if cost.low is not None and cost.high is not None:
            low, high = low * cost.low, high * cost.high
        if cost.basis != "derived":
            basis = cost.basis
    return Time(low, high, basis)


class Proposal:
    """A set of levers that meets the plan's demand, or comes nearest.

    levers     the one that saves most alone first
    answer     the estimate with all of them
    severity   change of the result, as an index into `SEVERITIES`
    """

    def __init__(self, trials: Trials, levers: Set) -> None:
        answer = trials.answer(levers)
        assert answer is not None
        self._trials = trials
        self.levers = tuple(sorted(levers, key=self._needed_alone))
        self.answer = answer
        self.severity = max((lever.severity for lever in levers), default=0)

    def _needed_alone(self, lever: Lever) -> int:
        """Return the allocated peak with this lever alone; of a run that cannot have it alone, the peak without it."""
        return (self._trials.answer((lever,)) or self.before).bytes.allocated

    @property
    def run(self) -> RunSpec:
        return self.answer.asked

    @property
    def saves(self) -> int:
        """Reduction of the allocated peak in bytes."""
        return self.before.bytes.allocated - self.answer.bytes.allocated

    @property
    def before(self) -> Estimate:
        """The estimate of the run without the levers."""
        answer = self._trials.answer(())
        assert answer is not None
        return answer

    @cached_property
    def effects(self) -> tuple[Effect, ...]:
        """The effect of each lever on top of the previous ones, of which the first saves most alone."""
        effects: list[Effect] = []
        before = self.before
        for n, lever in enumerate(self.levers, 1):
            after = self._trials.answer(self.levers[:n]) or before  # a lever may be invalid without a later one
            effects.append(Effect(lever, before, after))
            before = after
        return tuple(effects)

    @cached_property
    def time(self) -> Time | None:
        """How many times longer a step takes; None if the catalogue has no rate for the card."""
        return time_of(self.before, self.answer, self.levers)


class Plan:
    """The result of `plan`.

    asked       the run
    answer      the estimate of the run without changes, except one without which it does not start
    demand      the condition to meet
    proposals   sets of levers that meet it, ordered by change of the result (more GPUs last), then by step time, number
                and strength of levers; empty if the run already meets it, or nothing does
    nearest     all levers that lower the peak together, if nothing meets it
    tried       number of runs that were estimated
    is_partial  whether the search was interrupted, and the proposals are those that it had
    """

    def __init__(
        self,
        asked: RunSpec,
        trials: Trials,
        levers: tuple[Lever, ...],
        proposals: tuple[Proposal, ...],
        is_partial: bool = False,
    ) -> None:
        self.asked = asked
        self._trials = trials
        self._levers = levers
        self.is_partial = is_partial
        self.proposals = proposals
        self.demand = trials.demand
        self.tried = len(trials)

    @property
    def answer(self) -> Estimate:
        answer = self._trials.answer(())
        assert answer is not None
        return answer

    @property
    def fits(self) -> bool:
        """Whether the run meets the demand without changes."""
        return self.demand.met(self.answer)

    @property
    def best(self) -> Proposal | None:
        return self.proposals[0] if self.proposals else None

    @cached_property
    def nearest(self) -> Proposal | None:
        if self.fits or self.proposals:
            return None
        return Proposal(self._trials, strongest(self._trials, self._levers))

    @cached_property
    def levers(self) -> tuple[Effect, ...]:
        """The effect of each lever alone; levers that do not apply are left out."""
        tried = ((lever, self._trials.answer((lever,))) for lever in self._levers)
        return tuple(Effect(lever, self.answer, after) for lever, after in tried if after is not None)


def plan(
    run: RunSpec,
    *,
    headroom: int = 0,
    tight: bool = False,
    most: int = 2,
    calibration: Calibration | None = None,
    levers: Callable[[RunSpec], tuple[Lever, ...]] = levers_of,
    without: Sequence[str] = (),
) -> Plan:
    """Find the cheapest changes that make the run fit its GPU with `headroom` bytes free.

    Proposes the mildest lever of every group that suffices alone, and up to `most` sets of several levers for each
    degree of change in the result; if there are none, the same under other training stacks. If `tight` is true, a
    tight verdict counts as fitting. Every proposal has been estimated in full. `levers` returns the levers of the
    decided run, mildest first; groups in `without` are left out.

    Raises SpecError if the run names no GPU or does not train, or if the headroom is more than the GPU has, and
    whatever `estimate` raises.
    """
    if run.task != "train":
        raise refused("task", f"levers are for training; use memplan.questions for {run.task}")
    answer = _started(run, calibration)
    if answer.gpu is None:
        raise refused("gpu", "needed to tell what fits; name one")
    demand = Demand(tight, headroom)
    demand.check(find_gpu(answer.gpu.name))
    trials = Trials(answer.asked, demand, calibration)
    all_levers = tuple(lever for lever in levers(answer.run) if lever.group not in without)
    sets: list[Set] = []
    is_partial = False
    try:
        if not trials.fits(()):
            sets = cheapest(trials, all_levers, most)
            if not sets and levers is levers_of:
                sets = under_other_stacks(trials, most, without)
    except KeyboardInterrupt:
        sets, is_partial = trials.fitting()[:_MOST_KEPT], True
    all_levers += tuple(dict.fromkeys(lever for pulled in sets for lever in pulled if lever not in all_levers))
    proposals = tuple(sorted((Proposal(trials, pulled) for pulled in sets), key=lambda way: _cost(way, all_levers)))
    return Plan(run, trials, all_levers, proposals, is_partial)


def _cost(way: Proposal, levers: tuple[Lever, ...]) -> tuple[int, float, int, int]:
    """Return what proposals are ordered by: change of the result (more GPUs last), step time to a tenth, number of
    levers, and their strength."""
    tier = max(lever.tier for lever in way.levers)
    time = way.time.high if way.time else 0.0
    return tier, round(time, 1), len(way.levers), sum(levers.index(lever) for lever in way.levers)


def _started(run: RunSpec, calibration: Calibration | None) -> Estimate:
    """Return the estimate of the run, under DDP with `find_unused_parameters` if it waits for gradients otherwise."""
    try:
        return estimate(run, calibration)
    except SpecError as error:
        if error.field != "parallelism.find_unused_parameters" or run.parallelism.strategy != "ddp":
            raise
        return estimate(with_fields(run, ((error.field, True),)), calibration)


_MOST_KEPT = 4  # proposals of a search that was stopped
