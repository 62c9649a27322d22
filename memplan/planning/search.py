"""The cheapest sets of levers that make a run fit.

Every lever alone is tried. Sets are tried cheapest first: by how far the result differs, then by how many levers they
take and how strong these are, so that no set costs less than a part of it, and one that fits needs all of its levers.
Where that finds none, all levers that differ no further are pulled at once, and let go again one by one, the dearest
first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from memplan.core.errors import MemplanError
from memplan.estimate.answer import Estimate, phase_peaks
from memplan.estimate.calibration import Calibration
from memplan.estimate.demand import Demand
from memplan.estimate.estimate import estimate
from memplan.planning.levers import Lever, levers_of, pull, sequence_of
from memplan.spec.run import RunSpec

Set = tuple[Lever, ...]
_SETS = 600  # sets of one tier that are thought of
_TRIES = 20  # and tried
_SLACK = 110  # hundredths of a card's usable bytes: how far a forecast may be above them
_STEP = 64  # tokens: a sequence that fits is a multiple of so many


class Trials:
    """What each set of levers makes of the run; None where a run cannot have them together."""

    def __init__(self, run: RunSpec, demand: Demand, calibration: Calibration | None) -> None:
        self.run = run
        self.demand = demand
        self._calibration = calibration
        self._answers: dict[frozenset[Lever], Estimate | None] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def answer(self, levers: Iterable[Lever]) -> Estimate | None:
        key = frozenset(levers)
        if key not in self._answers:
            try:
                self._answers[key] = estimate(pull(self.run, key), self._calibration)
            except MemplanError:  # not for this model, or not together
                self._answers[key] = None
        return self._answers[key]

    def fits(self, levers: Iterable[Lever]) -> bool:
        answer = self.answer(levers)
        return answer is not None and self.demand.met(answer)

    def needs(self, levers: Set) -> bool:
        """Whether the set fits, and does not without one of its levers."""
        fewer = (levers[:i] + levers[i + 1 :] for i in range(len(levers)))
        return self.fits(levers) and not any(map(self.fits, fewer))

    def known(self, levers: Iterable[Lever]) -> bool:
        """Whether the set was tried, and fits."""
        return frozenset(levers) in self._answers and self.fits(levers)


def cheapest(trials: Trials, levers: Sequence[Lever], most: int) -> list[Set]:
    """The sets of levers that meet the demand: of every group the mildest lever that does alone, and of every tier up
    to `most` sets of several.

    No set holds another one, or is one with a lever of the same group made stronger.
    """
    singles = [(lever,) for lever in levers if trials.fits((lever,))]
    found = [single for single in singles if not _stronger(single, [s for s in singles if s != single], levers)]
    tiers = sorted({lever.tier for lever in levers})
    for tier in tiers:
        sets: list[Set] = []
        likely = filter(_forecast(trials, levers), islice(_by_cost(trials, levers, tier), _SETS))
        for candidate in islice(likely, _TRIES):
            if len(sets) >= most:
                break
            if not _stronger(candidate, [*found, *sets], levers) and trials.needs(candidate):
                sets.append(candidate)
        if not any(max(lever.tier for lever in s) == tier for s in (*found, *sets)):
            pulled = _let_go(trials, [lever for lever in levers if lever.tier <= tier])
            sets += [pulled] if pulled and not _stronger(pulled, found, levers) else []
        found += sets
    return [_longest(trials, pulled) for pulled in found]


def strongest(trials: Trials, levers: Iterable[Lever]) -> Set:
    """All that lowers the peak: of every group its strongest lever that the run can have beside the others."""
    pulled: tuple[Lever, ...] = ()
    least = trials.answer(())
    by_group: dict[str, list[Lever]] = {}
    for lever in levers:
        by_group.setdefault(lever.group, []).append(lever)
    for group in by_group.values():
        for lever in reversed(group):
            answer = trials.answer((*pulled, lever))
            if answer is not None and least is not None and answer.bytes.allocated <= least.bytes.allocated:
                pulled += (lever,)
                least = answer
                break
    return pulled


def alone(run: RunSpec, without: Sequence[str] = (), calibration: Calibration | None = None) -> Estimate | None:
    """The run with the first of its levers that alone makes it fit, those of the groups `without` left out."""
    trials = Trials(run, Demand(), calibration)
    answer = trials.answer(())
    if answer is None:
        return None
    levers = (lever for lever in levers_of(answer.run) if lever.group not in without)
    return next((trials.answer((lever,)) for lever in levers if trials.fits((lever,))), None)


def _forecast(trials: Trials, levers: Iterable[Lever]) -> Callable[[Set], bool]:
    """Whether a set is worth a try: if its levers save together what they save alone, phase by phase.

    They seldom save more, so that a set which is then still too large is passed over.
    """
    base = trials.answer(())
    assert base is not None
    assert base.gpu is not None
    peaks = phase_peaks(base)
    most = (base.gpu.usable - trials.demand.headroom) * _SLACK // 100
    answers = {lever: trials.answer((lever,)) for lever in levers}
    saved: dict[Lever, dict[str, int]] = {}
    for lever, answer in answers.items():
        if answer is not None:  # of a pipeline another stage may be the worst, which has other phases
            after = phase_peaks(answer)
            saved[lever] = {phase: peak - after.get(phase, 0) for phase, peak in peaks.items()}

    def likely(pulled: Set) -> bool:
        return all(peak - sum(saved[lever][phase] for lever in pulled) <= most for phase, peak in peaks.items())

    return likely


def _by_cost(trials: Trials, levers: Sequence[Lever], tier: int) -> Iterator[Set]:
    """Sets of two levers and more, none of which meets the demand alone, of that tier: fewest levers and mildest
    first."""
    order = {lever: i for i, lever in enumerate(levers)}
    weak = [lever for lever in levers if lever.tier <= tier and trials.answer((lever,)) is not None]
    weak = [lever for lever in weak if not trials.fits((lever,))]

    def pushed(taken: Set) -> None:
        places = tuple(order[lever] for lever in taken)
        heapq.heappush(queue, (len(taken), sum(places), places, taken))

    queue: list[tuple[int, int, tuple[int, ...], Set]] = []
    for lever in weak:
        pushed((lever,))
    while queue:
        *_, taken = heapq.heappop(queue)
        if len(taken) > 1:
            if max(lever.tier for lever in taken) == tier:
                yield taken
            if trials.known(taken):
                continue
        groups = {lever.group for lever in taken}
        for lever in weak:
            if order[lever] > max(map(order.__getitem__, taken)) and lever.group not in groups:
                pushed((*taken, lever))


def _stronger(pulled: Set, others: Iterable[Set], levers: Sequence[Lever]) -> bool:
    """Whether the set does all that one of the others does, with levers as strong or stronger."""

    def does(lever: Lever) -> bool:
        return any(own.group == lever.group and levers.index(own) >= levers.index(lever) for own in pulled)

    return any(all(map(does, other)) for other in others)


def _let_go(trials: Trials, levers: Sequence[Lever]) -> Set:
    """All levers at once, then without those that are not needed, or with milder ones, the dearest first; empty where
    all together do not meet the demand."""
    pulled = strongest(trials, levers)
    if not trials.fits(pulled):
        return ()
    for lever in sorted(pulled, key=lambda lever: -levers.index(lever)):
        rest = tuple(other for other in pulled if other != lever)
        milder = [(*rest, other) for other in levers[: levers.index(lever)] if other.group == lever.group]
        pulled = next((fewer for fewer in (rest, *milder) if trials.fits(fewer)), pulled)
    return tuple(sorted(pulled, key=levers.index))


def _longest(trials: Trials, pulled: Set) -> Set:
    """The set with its sequences, if it shortens them, as long as they may be, in steps of so many tokens."""
    shorter = next((lever for lever in pulled if lever.group == "sequence"), None)
    if shorter is None:
        return pulled
    rest = tuple(lever for lever in pulled if lever is not shorter)
    low, high = shorter.fields[0][1] // _STEP, -(-trials.run.batch.sequence // _STEP)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if trials.fits((*rest, sequence_of(middle * _STEP))) else (low, middle)
    tokens = max(low * _STEP, shorter.fields[0][1])
    return (*rest, sequence_of(tokens))
