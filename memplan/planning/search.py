"""The cheapest sets of levers that make a run fit.

Every lever is tried alone. Sets are tried cheapest first: by how much the result changes, then by the number of levers
and how strong they are. No set costs less than a subset of it, so a set that fits needs all of its levers. If no set
that changes the result so much or less fits, all such levers are pulled at once, then dropped one by one, the most
costly first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from memplan.core.errors import MemplanError
from memplan.estimate.answer import Estimate, phase_peaks
from memplan.estimate.demand import Demand
from memplan.estimate.training import cannot_fit
from memplan.planning.levers import Lever, levers_of, pull, sequence_of, stacks_of
from memplan.planning.trials import MAX_VALUE, attempt
from memplan.resolve.decide import decide
from memplan.spec.run import RunSpec

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration

Set = tuple[Lever, ...]
_MAX_CANDIDATES = 600  # sets of one tier that are forecast
_MAX_TRIES = 20  # sets of one tier that are estimated
_SLACK = 110  # percent of a card's usable bytes that a forecast may reach
_SEQUENCE_STEP = 64  # tokens; sequences that fit are multiples of it


class Trials:
    """The estimates of a run with sets of levers, each made once."""

    def __init__(self, run: RunSpec, demand: Demand, calibration: Calibration | None) -> None:
        self.run = run
        self.demand = demand
        self._calibration = calibration
        self._answers: dict[frozenset[Lever], tuple[Set, Estimate | None]] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def answer(self, levers: Iterable[Lever]) -> Estimate | None:
        """Return the estimate with the levers pulled; None if the run cannot have them together."""
        pulled = tuple(levers)  # in their order: of two that change one setting, the later one counts
        key = frozenset(pulled)
        if key not in self._answers:
            self._answers[key] = pulled, attempt(lambda: pull(self.run, pulled), self._calibration)
        return self._answers[key][1]

    def fits(self, levers: Iterable[Lever]) -> bool:
        answer = self.answer(levers)
        return answer is not None and self.demand.met(answer)

    def fitting(self) -> list[Set]:
        """Return the sets that were tried and fit, fewest levers first."""
        return sorted((pulled for pulled, _ in self._answers.values() if pulled and self.fits(pulled)), key=len)

    def may_fit(self, levers: Iterable[Lever]) -> bool:
        """Whether the set may fit, judged without an estimate. Cheaper than `fits`."""
        try:
            return not cannot_fit(decide(pull(self.run, levers)), self._calibration)
        except MemplanError:
            return False

    def needs(self, levers: Set) -> bool:
        """Whether the set fits, and would not without any one of its levers."""
        fewer = (levers[:i] + levers[i + 1 :] for i in range(len(levers)))
        return self.fits(levers) and not any(map(self.fits, fewer))

    def known(self, levers: Iterable[Lever]) -> bool:
        """Whether the set has been tried and fits."""
        return frozenset(levers) in self._answers and self.fits(levers)


def cheapest(trials: Trials, levers: Sequence[Lever], most: int) -> list[Set]:
    """Return the sets of levers that meet the demand.

    These are the mildest lever of every group that suffices alone, and up to `most` sets of several levers in each
    tier. No set contains another, or equals another with a stronger lever of the same group.
    """
    singles = [(lever,) for lever in levers if trials.fits((lever,))]
    found = [single for single in singles if not _covers(single, [s for s in singles if s != single], levers)]
    tiers = sorted({lever.tier for lever in levers})
    for tier in tiers:
        sets: list[Set] = []
        likely = filter(_forecast(trials, levers), islice(_by_cost(trials, levers, tier), _MAX_CANDIDATES))
        for candidate in islice(likely, _MAX_TRIES):
            if len(sets) >= most:
                break
            if not _covers(candidate, [*found, *sets], levers) and trials.needs(candidate):
                sets.append(candidate)
        found += sets
        if not any(all(lever.tier <= tier for lever in s) for s in found):
            pulled = _drop_unneeded(trials, [lever for lever in levers if lever.tier <= tier])
            found += [pulled] if pulled else []
    return [_with_longest_sequence(trials, pulled) for pulled in found]


def under_other_stacks(trials: Trials, most: int, without: Sequence[str] = ()) -> list[Set]:
    """Return up to `most` other stacks under which the run meets the demand, or else the stack that takes least with
    the changes that it needs in addition; empty if nothing meets it."""
    base = trials.answer(())
    assert base is not None
    stacks = [lever for lever in stacks_of(base.run) if trials.answer((lever,)) is not None]
    found: list[Set] = [(lever,) for lever in stacks if trials.fits((lever,))]
    if found or not stacks:
        return found[:most]

    def least(lever: Lever) -> int:
        answer = trials.answer((lever,))
        return answer.least if answer is not None else MAX_VALUE

    stack = min(stacks, key=least)
    run = pull(trials.run, (stack,))
    answer = trials.answer((stack,))
    assert answer is not None
    inner = Trials(run, trials.demand, answer.calibration)
    levers = [lever for lever in levers_of(answer.run) if lever.group not in without]
    return [(stack, *pulled) for pulled in cheapest(inner, levers, 1)][:most]


def strongest(trials: Trials, levers: Iterable[Lever]) -> Set:
    """Return every lever that lowers the peak: the strongest of each group that the run allows with the others."""
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


def answer_with_one_lever(
    run: RunSpec, without: Sequence[str] = (), calibration: Calibration | None = None
) -> Estimate | None:
    """Return the estimate with the first lever that alone makes the run fit, skipping the groups in `without`."""
    trials = Trials(run, Demand(), calibration)
    answer = trials.answer(())
    if answer is None:
        return None
    levers = ((lever,) for lever in levers_of(answer.run) if lever.group not in without)
    return next((trials.answer(lever) for lever in levers if trials.may_fit(lever) and trials.fits(lever)), None)


def _forecast(trials: Trials, levers: Iterable[Lever]) -> Callable[[Set], bool]:
    """Return a predicate: whether a set would fit if its levers' separate savings simply added up, phase by phase.

    Levers seldom save more together, so sets that fail are not worth an estimate.
    """
    base = trials.answer(())
    assert base is not None
    assert base.gpu is not None
    peaks = phase_peaks(base)
    most = (base.gpu.usable - trials.demand.headroom) * _SLACK // 100
    answers = {lever: trials.answer((lever,)) for lever in levers}
    saved: dict[Lever, dict[str, int]] = {}
    for lever, answer in answers.items():
        if answer is not None:  # in a pipeline another stage, with other phases, may become the worst
            after = phase_peaks(answer)
            saved[lever] = {phase: peak - after.get(phase, 0) for phase, peak in peaks.items()}

    def likely(pulled: Set) -> bool:
        return all(peak - sum(saved[lever][phase] for lever in pulled) <= most for phase, peak in peaks.items())

    return likely


def _by_cost(trials: Trials, levers: Sequence[Lever], tier: int) -> Iterator[Set]:
    """Yield sets of two or more levers of a tier, none of which suffices alone: fewest levers first, then mildest."""
    tiers, groups = [lever.tier for lever in levers], [lever.group for lever in levers]
    weak = [
        i
        for i, lever in enumerate(levers)
        if tiers[i] <= tier and trials.answer((lever,)) is not None and not trials.fits((lever,))
    ]
    if all(tiers[i] < tier for i in weak):
        return  # none of what may be millions of sets is of the tier
    # number of levers, sum of their places, and the places
    queue: list[tuple[int, int, tuple[int, ...]]] = [(1, i, (i,)) for i in weak]
    while queue:
        count, total, places = heapq.heappop(queue)
        if count > 1:
            taken = tuple(levers[i] for i in places)
            if max(tiers[i] for i in places) == tier:
                yield taken
            if trials.known(taken):
                continue
        taken_groups = {groups[i] for i in places}
        for i in weak:
            if i > places[-1] and groups[i] not in taken_groups:
                heapq.heappush(queue, (count + 1, total + i, (*places, i)))


def _covers(pulled: Set, others: Iterable[Set], levers: Sequence[Lever]) -> bool:
    """Whether the set has an equal or stronger lever for every lever of one of the other sets."""

    def covers(lever: Lever) -> bool:
        return any(p.group == lever.group and levers.index(p) >= levers.index(lever) for p in pulled)

    return any(all(map(covers, other)) for other in others)


def _drop_unneeded(trials: Trials, levers: Sequence[Lever]) -> Set:
    """Pull all levers, then drop or weaken those that are not needed, the most costly first.

    Empty if even all levers together do not meet the demand.
    """
    pulled = strongest(trials, levers)
    if not trials.fits(pulled):
        return ()
    for lever in sorted(pulled, key=lambda lever: -levers.index(lever)):
        rest = tuple(other for other in pulled if other != lever)
        milder = [(*rest, other) for other in levers[: levers.index(lever)] if other.group == lever.group]
        pulled = next((fewer for fewer in (rest, *milder) if trials.fits(fewer)), pulled)
    return tuple(sorted(pulled, key=levers.index))


def _with_longest_sequence(trials: Trials, pulled: Set) -> Set:
    """Return the set with its sequence length, if it shortens sequences, as long as fits."""
    shorter = next((lever for lever in pulled if lever.group == "sequence"), None)
    if shorter is None:
        return pulled
    rest = tuple(lever for lever in pulled if lever is not shorter)
    low, high = shorter.fields[0][1] // _SEQUENCE_STEP, -(-trials.run.batch.sequence // _SEQUENCE_STEP)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if trials.fits((*rest, sequence_of(middle * _SEQUENCE_STEP))) else (low, middle)
    tokens = max(low * _SEQUENCE_STEP, shorter.fields[0][1])
    return (*rest, sequence_of(tokens))
