"""A plan: the sets of levers that make a run fit, each with what it saves, when, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.profiles.costs import Cost
from memplan.core.cached_property import cached_property
from memplan.core.errors import SpecError
from memplan.estimate.answer import Estimate, phase_peaks
from memplan.estimate.calibration import Calibration
from memplan.estimate.demand import Demand
from memplan.estimate.estimate import estimate
from memplan.planning.levers import Lever, levers_of
from memplan.planning.search import Set, Trials, cheapest, strongest
from memplan.planning.step_time import ratio, work
from memplan.spec.run import RunSpec

SEVERITIES = ("the same result", "hardly seen", "seen in some tasks", "another result")


class Time(NamedTuple):
    """How many times longer a step over as many tokens takes, at least and at most.

    `basis` is derived where only operations were counted at a range of rates, assumed or measured where a row says it.
    """

    low: float
    high: float
    basis: str


class Effect(NamedTuple):
    """What one lever does to a run that has others already.

    saves    bytes of the peak of what is allocated; negative where the peak rises
    phases   the same for the peak of every phase, those without any left out
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
        """None where the catalogue has no rate for the card."""
        return time_of(self.before, self.after, (self.lever,))


def time_of(before: Estimate, after: Estimate, levers: Set) -> Time | None:
    """How many times longer a step takes with the levers; None where the catalogue has no rate for the card."""
    return time_between(before, after, [cost for lever in levers for cost in lever.costs])


def time_between(before: Estimate, after: Estimate, costs: Iterable[Cost]) -> Time | None:
    """Counted operations and bytes at the card's rates, times what rows say of what is not counted."""
    card = after.gpu or before.gpu
    found = ratio(work(before.asked), work(after.asked), find_gpu(card.name)) if card else None
    if found is None:
        return None
    low, high = found
    basis = "derived"
    for cost in costs:
        if cost.low is not None and cost.high is not None:
            low, high = low * cost.low, high * cost.high
        if cost.basis != "derived":
            basis = cost.basis
    return Time(low, high, basis)


class Proposal:
    """A set of levers that meets the plan's demand, or comes nearest.

    levers     the mildest first
    answer     the run with all of them, estimated
    severity   how far the result differs: an index into `SEVERITIES`
    """

    def __init__(self, trials: Trials, levers: Set) -> None:
        answer = trials.answer(levers)
        assert answer is not None  # it was tried
        self._trials = trials
        self.levers = levers
        self.answer = answer
        self.severity = max((lever.severity for lever in levers), default=0)

    @property
    def run(self) -> RunSpec:
        return self.answer.asked

    @property
    def saves(self) -> int:
        """Bytes of the peak of what is allocated."""
        return self.before.bytes.allocated - self.answer.bytes.allocated

    @property
    def before(self) -> Estimate:
        """The run as it was asked."""
        answer = self._trials.answer(())
        assert answer is not None
        return answer

    @cached_property
    def effects(self) -> tuple[Effect, ...]:
        """What each lever brings when they are pulled one after another."""
        found: list[Effect] = []
        before = self.before
        for n, lever in enumerate(self.levers, 1):
            after = self._trials.answer(self.levers[:n]) or before  # a lever may need one that follows
            found.append(Effect(lever, before, after))
            before = after
        return tuple(found)

    @cached_property
    def time(self) -> Time | None:
        """How many times longer a step takes; None where the catalogue has no rate for the card."""
        return time_of(self.before, self.answer, self.levers)


class Plan:
    """The answer of `plan`.

    answer      the run as it was asked
    demand      what was to be reached
    proposals   sets of levers that reach it, by how far the result differs, how many they are and how strong; empty
                where the run as asked does, or nothing does
    nearest     where nothing does: all levers that lower the peak, at once
    tried       how many runs were estimated
    """

    def __init__(self, trials: Trials, levers: tuple[Lever, ...], proposals: tuple[Proposal, ...]) -> None:
        self._trials = trials
        self._levers = levers
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
        """Whether the run as asked meets the demand."""
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
        """What every lever brings alone, those that the run cannot have left out."""
        tried = ((lever, self._trials.answer((lever,))) for lever in self._levers)
        return tuple(Effect(lever, self.answer, after) for lever, after in tried if after is not None)


def plan(
    run: RunSpec,
    *,
    headroom: int = 0,
    tight: bool = False,
    most: int = 2,
    calibration: Calibration | None = None,
) -> Plan:
    """The cheapest changes that make the run fit its GPU, with `headroom` bytes free.

    Of every kind of change the mildest that does alone, and for every degree of difference in the result up to `most`
    sets of several. `tight` counts as fitting where it is asked for. Each proposal was estimated as it stands.

    Raises SpecError where the run names no GPU, or does not train, or the headroom is more than the GPU has, and what
    `estimate` raises.
    """
    if run.task != "train":
        raise SpecError(f"task: levers are of training; memplan.questions answers for {run.task}", "task")
    answer = estimate(run, calibration)
    if answer.gpu is None:
        raise SpecError("gpu: what fits depends on it; name one", "gpu")
    demand = Demand(tight, headroom)
    demand.check(find_gpu(answer.gpu.name))
    trials = Trials(run, demand, calibration)
    levers = levers_of(answer.run)
    found: list[Set] = [] if trials.fits(()) else cheapest(trials, levers, most)
    return Plan(trials, levers, tuple(Proposal(trials, pulled) for pulled in ranked(found, levers)))


def ranked(sets: list[Set], levers: tuple[Lever, ...]) -> list[Set]:
    """By how far the result differs, more GPUs last; how many levers there are, and how strong they are."""
    places = {lever: i for i, lever in enumerate(levers)}
    last = len(levers)

    def cost(pulled: Set) -> tuple[int, int, int]:
        return (
            max(lever.tier for lever in pulled),
            len(pulled),
            sum(places.get(lever, last) for lever in pulled),
        )

    return sorted(sets, key=cost)
