"""What to buy or rent: every catalogued card, in every count and strategy, that runs it, cheapest first.

Memory is searched by bounds: of cards that share their kernels a run is walked once, and what torch may reserve at
least and at most is compared with every card. What is offered in the end was estimated as it stands.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Iterator, Sequence
from math import inf
from typing import NamedTuple, get_args

from memplan.catalogue.hardware.gpu import GPU, Market
from memplan.catalogue.hardware.gpus import all_gpus, find_gpu
from memplan.catalogue.profiles.costs import cost_of
from memplan.core.errors import MemplanError, SpecError
from memplan.estimate.answer import Estimate
from memplan.estimate.calibration import Calibration
from memplan.estimate.demand import FITS, Demand
from memplan.estimate.estimate import estimate
from memplan.planning.levers import STRATEGIES, spread, with_fields
from memplan.planning.step_time import Cost, Hourly, Pace, Range, Work, cost, hourly, pace, work
from memplan.spec.run import RunSpec

COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64)
_ALONE = "none"
MARKETS: tuple[str, ...] = get_args(Market)


class Owned(NamedTuple):
    """So many of one card."""

    gpu: GPU
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (the contract's word)


class Wanted(NamedTuple):
    """Which cards may be offered; empty or None is any.

    vendors, markets   as the catalogue has them
    memory             usable bytes of one, at least and at most
    usd_per_hour       of all together, at most; a card without a dated price is then left out
    owned              cards that are there already, and how many: no others, no more
    counts             how many of a card
    """

    vendors: tuple[str, ...] = ()
    markets: tuple[str, ...] = ()
    memory: tuple[int | None, int | None] = (None, None)
    usd_per_hour: float | None = None
    owned: tuple[Owned, ...] = ()
    counts: tuple[int, ...] = COUNTS


ANY = Wanted()


class Offer(NamedTuple):
    """Cards that run it.

    answer    the run on one of them, estimated
    price     of all of them an hour; None where the catalogue has no dated one
    pace      of one; None where the catalogue has no rate
    million   what a million tokens take: seconds of all together, and US dollars
    whole     the same for the tokens that were asked
    """

    gpu: GPU
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (the contract's word)
    strategy: str
    answer: Estimate
    price: Hourly | None
    pace: Pace | None
    million: Cost | None
    whole: Cost | None

    @property
    def usd(self) -> float | None:
        """What a million tokens usually cost."""
        return self.million.usd.usual if self.million is not None and self.million.usd is not None else None


class Miss(NamedTuple):
    """The cards that come nearest to running it, and the bytes they lack."""

    gpu: GPU
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (the contract's word)
    strategy: str
    lacks: int


class Offers(NamedTuple):
    """The cheapest offers, and how many choices of card, count and strategy were looked at; where there is none, what
    comes nearest."""

    offers: tuple[Offer, ...]
    considered: int
    nearest: Miss | None


def offers(
    run: RunSpec,
    wanted: Wanted = ANY,
    *,
    tokens: int | None = None,
    most: int = 20,
    each: bool = False,
    demand: Demand = FITS,
    calibration: Calibration | None = None,
) -> Offers:
    """Up to `most` offers, by what a million tokens cost; those without a price after them, by the time they take.

    Of every card the smallest count that runs it, or, with `each`, every count. Of a count the strategy that sends the
    least. The run's own GPU and count of GPUs say nothing. `tokens` are those of a data set.

    Raises SpecError where no card is as wanted, and what `estimate` raises where the run cannot be answered.
    """
    bare = with_fields(run.model_copy(update={"gpu": None}), spread(run, 1, _ALONE))
    estimate(bare)
    kinds = _Kinds(bare, demand)
    queue: list[tuple[tuple[float, float, float, str], int, _Choice, Iterator[_Choice]]] = []
    numbers = itertools.count()

    def queued(choices: Iterator[_Choice]) -> None:
        choice = next(choices, None)
        if choice is not None:
            heapq.heappush(queue, (_order(choice), next(numbers), choice, choices))

    for gpu, counts in wanted_cards(wanted):
        for some in [(n,) for n in counts] if each else [counts]:
            queued(_choices(kinds, gpu, some, wanted, tokens))
    found: list[Offer] = []
    missed: list[tuple[_Choice, Estimate]] = []
    while queue and len(found) < most:
        _, _, choice, more = heapq.heappop(queue)
        answer = _on(bare, choice.gpu, choice.count, choice.strategy, calibration)
        if answer is not None and demand.met(answer):
            found.append(Offer(*choice[:3], answer, *choice[3:]))
            continue
        if answer is not None:
            missed.append((choice, answer))
        queued(more)
    if found:
        return Offers(tuple(found), kinds.considered, None)
    misses = [_miss(choice, answer, demand) for choice, answer in missed]
    misses += [kinds.nearest] if kinds.nearest is not None else []
    return Offers((), kinds.considered, min(misses, key=lambda miss: miss.lacks, default=None))


class _Choice(NamedTuple):
    """An offer that bounds do not rule out."""

    gpu: GPU
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (the contract's word)
    strategy: str
    price: Hourly | None
    pace: Pace | None
    million: Cost | None
    whole: Cost | None


class _Kinds:
    """The run on cards of each kind: those that share a compute capability share its kernels, and so its tensors."""

    def __init__(self, run: RunSpec, demand: Demand) -> None:
        self._run = run
        self._demand = demand
        self._answers: dict[tuple[tuple[int, int] | None, int, str], Estimate | None] = {}
        self._works: dict[tuple[int, int] | None, Work | None] = {}
        self._considered: set[tuple[str, int, str]] = set()
        self.nearest: Miss | None = None

    @property
    def considered(self) -> int:
        """How many choices of card, count and strategy were looked at."""
        return len(self._considered)

    def told(self, gpu: GPU, count: int, strategy: str) -> bool | None:
        """Whether bounds tell that the demand is met; None where they do not."""
        self._considered.add((gpu.name, count, strategy))
        key = (gpu.compute_capability, count, strategy)
        if key not in self._answers:
            self._answers[key] = _on(self._run, gpu, count, strategy, None)
        answer = self._answers[key]
        if answer is None:
            return False
        told = self._demand.told(answer, gpu.usable)
        lacks = answer.least + self._demand.headroom - gpu.usable
        if told is False and (self.nearest is None or lacks < self.nearest.lacks):
            self.nearest = Miss(gpu, count, strategy, lacks)
        return told

    def work(self, gpu: GPU) -> Work | None:
        key = gpu.compute_capability
        if key not in self._works:
            try:
                self._works[key] = work(self._run.model_copy(update={"gpu": gpu.name}))
            except MemplanError:
                self._works[key] = None
        return self._works[key]


def _miss(choice: _Choice, answer: Estimate, demand: Demand) -> Miss:
    """What a choice lacks that bounds did not rule out: of the bytes it shows, or a byte where those would do."""
    lacks = demand.headroom - (answer.verdict.headroom or 0)
    return Miss(choice.gpu, choice.count, choice.strategy, max(lacks, 1))


def _on(run: RunSpec, gpu: GPU, count: int, strategy: str, calibration: Calibration | None) -> Estimate | None:
    """The run on so many of the card; None where it cannot run there."""
    try:
        there = with_fields(run, spread(run, count, strategy)) if count > 1 else run
        return estimate(there.model_copy(update={"gpu": gpu.name}), calibration)
    except MemplanError:  # flash attention on a card that is too old, an optimizer that a strategy does not divide
        return None


def _choices(kinds: _Kinds, gpu: GPU, counts: Sequence[int], wanted: Wanted, tokens: int | None) -> Iterator[_Choice]:
    """The counts and strategies that bounds do not rule out, the fewest cards and the least sent first."""
    most = max(counts)
    for count in counts:
        price = _of_all(hourly(gpu), count)
        if wanted.usd_per_hour is not None and (price is None or price.low > wanted.usd_per_hour):
            continue
        for strategy in STRATEGIES if count > 1 else (_ALONE,):
            # More ranks never hold more each: what as many as there may be do not hold, fewer do not.
            if count > 1 and kinds.told(gpu, most, strategy) is False:
                continue
            if kinds.told(gpu, count, strategy) is not False:
                yield _choice(kinds.work(gpu), gpu, count, strategy, price, tokens)
                break


def _choice(
    done: Work | None, gpu: GPU, count: int, strategy: str, price: Hourly | None, tokens: int | None
) -> _Choice:
    one = pace(done, gpu) if done is not None else None
    if one is None:
        return _Choice(gpu, count, strategy, price, None, None, None)
    together = one._replace(tokens=one.tokens * count, seconds=_slowed(one.seconds, count))
    whole = None if tokens is None else cost(together, price, tokens)
    return _Choice(gpu, count, strategy, price, together, cost(together, price), whole)


def _slowed(seconds: Range, count: int) -> Range:
    """A step's time with what the GPUs send each other."""
    row = cost_of("more_gpus")
    if count == 1 or row.low is None or row.high is None:
        return seconds
    return Range(seconds.low * row.low, seconds.usual * (row.low + row.high) / 2, seconds.high * row.high)


def _of_all(price: Hourly | None, count: int) -> Hourly | None:
    return None if price is None else price._replace(low=price.low * count, high=price.high * count)


def _order(choice: _Choice) -> tuple[float, float, float, str]:
    """Cheapest first, then the fastest, then the least memory."""
    million = choice.million
    usd = million.usd.usual if million is not None and million.usd is not None else inf
    seconds = million.seconds.usual if million is not None else inf
    return usd, seconds, choice.gpu.usable * choice.count, choice.gpu.name


def wanted_cards(wanted: Wanted) -> Iterator[tuple[GPU, tuple[int, ...]]]:
    """The cards that may be offered, and the counts of each. Raises SpecError where there are none."""
    if wanted.owned:
        cards = [(owned.gpu, tuple(n for n in range(1, owned.count + 1))) for owned in wanted.owned]
    else:
        cards = [(gpu, wanted.counts) for gpu in all_gpus()]
    least, most = wanted.memory
    if least is not None and most is not None and least > most:
        raise SpecError(f"memory: at least {least:,} and at most {most:,} bytes exclude each other", "memory")
    found = [
        (gpu, counts)
        for gpu, counts in cards
        if (not wanted.vendors or gpu.vendor in wanted.vendors)
        and (not wanted.markets or gpu.market in wanted.markets)
        and (least is None or gpu.usable >= least)
        and (most is None or gpu.usable <= most)
    ]
    if not found:
        raise SpecError("buy: no card of the catalogue is as wanted; leave out one of vendor, market or memory", "buy")
    yield from found


def owned(text: str) -> tuple[Owned, ...]:
    """What `2x3090,1xa100` lists. Raises SpecError where it cannot be read, UnknownNameError for an unknown card."""
    out: list[Owned] = []
    for item in text.split(","):
        found = re.fullmatch(r"\s*(?:(\d{1,6})\s*[x×*]\s*)?(\S.*?)\s*", item, re.IGNORECASE)
        if found is None or (found[1] is not None and int(found[1]) == 0):
            raise SpecError(f"have: {item!r:.80} is no count and card, as in 2x3090,1xa100", "have")
        out.append(Owned(find_gpu(found[2]), int(found[1] or 1)))
    return tuple(out)
