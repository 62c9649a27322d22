"""Cards to own or rent: the catalogued cards, counts and strategies that hold a run, cheapest first.

The search uses bounds: cards that run the same kernels share one estimate, and the least and most that torch may
reserve are compared with each card's memory. Every card that is finally offered has been estimated in full.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from math import inf, log2
from typing import TYPE_CHECKING, Literal, Protocol

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import all_gpus, find_gpu
from memplan.catalogue.profiles.costs import cost_of
from memplan.core.errors import MemplanError, refused
from memplan.core.records import NamedTuple
from memplan.core.several import several
from memplan.core.units import GIB
from memplan.estimate.answer import Estimate
from memplan.estimate.demand import FITS, Demand
from memplan.estimate.estimate import estimate
from memplan.planning.levers import STRATEGIES, spread, with_fields
from memplan.planning.step_time import Cost, Hourly, Pace, Range, Work, cost, hourly, step_pace, work
from memplan.planning.trials import attempt
from memplan.resolve.refusals.vendors import not_on
from memplan.spec.run import RunSpec

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration

COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64)
IN_ONE_MACHINE = {"own": 4, "rent": 8}  # cards; offers of more are looked for if none of fewer holds the run
_LEAST_FREE = GIB // 20  # of a card that is offered: less is shown as 0.0 GiB
_NO_STRATEGY = "none"


class CountedCards(Protocol):
    """A number of cards of one type."""

    @property
    def gpu(self) -> GPU: ...

    @property
    def count(self) -> int: ...


class OwnedCards(NamedTuple):
    """Cards of one type that the user already has."""

    gpu: GPU
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (the contract's word)


class CardFilter(NamedTuple):
    """Which cards may be offered; an empty or None field allows all.

    vendors, markets   names from the catalogue
    memory             least and most usable bytes of one card
    usd_per_hour       most that all cards together may cost; excludes cards without a dated price
    owned              only these cards, and at most these counts
    counts             numbers of cards to try; empty for those of one machine, and then for more to rent
    to                 what the offers are ranked for: own, by list price, with cards that have one; or rent, by the
                       price of a million tokens
    """

    vendors: tuple[str, ...] = ()
    markets: tuple[str, ...] = ()
    memory: tuple[int | None, int | None] = (None, None)
    usd_per_hour: float | None = None
    owned: tuple[OwnedCards, ...] = ()
    counts: tuple[int, ...] = ()
    to: Literal["own", "rent"] = "rent"

    @property
    def tiers(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of cards to try, and those to try if none of the former holds the run."""
        if self.counts or self.owned:
            return (self.counts,)
        most = IN_ONE_MACHINE[self.to]
        machine, more = tuple(n for n in COUNTS if n <= most), tuple(n for n in COUNTS if n > most)
        return (machine, more) if self.to == "rent" else (machine,)


ANY = CardFilter()


class Offer(NamedTuple):
    """A number of cards that hold the run.

    answer    the estimate of the run on one of the cards
    price     hourly price of all the cards; None if the catalogue has no dated price
    pace      speed of all the cards together; None if the catalogue has no rate
    million   seconds and US dollars for a million tokens
    whole     seconds and US dollars for the requested tokens
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
        """The usual price of a million tokens."""
        return self.million.usd.usual if self.million is not None and self.million.usd is not None else None


class NearestMiss(NamedTuple):
    """The cards that come nearest to holding the run, and the bytes they are short of."""

    gpu: GPU
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (the contract's word)
    strategy: str
    short_by: int


class Offers(NamedTuple):
    """The cheapest offers.

    considered   number of combinations of card, count and strategy that were looked at
    nearest      what comes nearest, if there is no offer
    """

    offers: tuple[Offer, ...]
    considered: int
    nearest: NearestMiss | None


def offers(
    run: RunSpec,
    wanted: CardFilter = ANY,
    *,
    tokens: int | None = None,
    most: int = 20,
    each: bool = False,
    demand: Demand = FITS,
    calibration: Calibration | None = None,
) -> Offers:
    """Return up to `most` offers, in the order of `wanted.to`; to rent, unpriced ones follow by time.

    Each card is offered in the smallest count that holds the run, or in every such count if `each` is true, with the
    strategy that communicates least. Among offers of about the same price the one of fewest cards comes first. The
    run's own GPU and degrees are ignored. `tokens` is the size of the data set.

    Raises SpecError if no card matches `wanted`, and whatever `estimate` raises for the run.
    """
    bare = with_fields(run.model_copy(update={"gpu": None}), spread(run, 1, _NO_STRATEGY))
    estimate(bare)
    kinds = _Kinds(bare, demand)
    missed: list[NearestMiss] = []
    for tier in wanted.tiers:
        found = _offers(kinds, wanted._replace(counts=tier), tokens, most, each, calibration, missed)
        if found:
            return Offers(tuple(found), kinds.considered, None)
    misses = [*missed, *((kinds.nearest,) if kinds.nearest is not None else ())]
    return Offers((), kinds.considered, min(misses, key=lambda miss: miss.short_by, default=None))


def _offers(
    kinds: _Kinds,
    wanted: CardFilter,
    tokens: int | None,
    most: int,
    each: bool,
    calibration: Calibration | None,
    missed: list[NearestMiss],
) -> list[Offer]:
    """Return the offers, and add what misses the demand to `missed`."""
    queue: list[tuple[tuple[float | str, ...], int, _Candidate, Iterator[_Candidate]]] = []
    numbers = itertools.count()
    order = by_list_price if wanted.to == "own" else _by_tokens

    def push(choices: Iterator[_Candidate]) -> None:
        choice = next(choices, None)
        if choice is not None:
            heapq.heappush(queue, (order(choice), next(numbers), choice, choices))

    for gpu, counts in wanted_cards(wanted, kinds.run):
        for group in [(n,) for n in counts] if each else [counts]:
            push(_candidates(kinds, gpu, group, wanted, tokens))
    found: list[Offer] = []
    while queue and len(found) < most:
        _, _, choice, more = heapq.heappop(queue)
        answer = _on(kinds.run, choice.gpu, choice.count, choice.strategy, calibration)
        if answer is not None and kinds.demand.met(answer) and has_room(answer, wanted):
            found.append(Offer(*choice[:3], answer, *choice[3:]))
            continue
        if answer is not None:
            missed.append(_miss(choice, answer, kinds.demand))
        push(more)
    return found


def has_room(answer: Estimate, wanted: CardFilter) -> bool:
    """Whether a card that is offered leaves some memory free; cards that the user has need not."""
    return bool(wanted.owned) or (answer.verdict.headroom or 0) >= _LEAST_FREE


class _Candidate(NamedTuple):
    """Cards and a strategy that the bounds do not rule out."""

    gpu: GPU
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (the contract's word)
    strategy: str
    price: Hourly | None
    pace: Pace | None
    million: Cost | None
    whole: Cost | None


class _Kinds:
    """The run on each kind of card. Cards of one compute capability run the same kernels, so they share one answer."""

    def __init__(self, run: RunSpec, demand: Demand) -> None:
        self.run = run
        self.demand = demand
        self._answers: dict[tuple[tuple[int, int] | None, int, str], Estimate | None] = {}
        self._works: dict[tuple[int, int] | None, Work | None] = {}
        self._considered: set[tuple[str, int, str]] = set()
        self.nearest: NearestMiss | None = None

    @property
    def considered(self) -> int:
        """Number of combinations of card, count and strategy that were looked at."""
        return len(self._considered)

    def told(self, gpu: GPU, count: int, strategy: str) -> bool | None:
        """Whether the demand is met, judged by bounds alone; None if the bounds do not decide it."""
        self._considered.add((gpu.name, count, strategy))
        key = (gpu.compute_capability, count, strategy)
        if key not in self._answers:
            self._answers[key] = _on(self.run, gpu, count, strategy, None)
        answer = self._answers[key]
        if answer is None:
            return False
        told = self.demand.fits_card_of(answer, gpu.usable)
        short_by = answer.least + self.demand.headroom - gpu.usable
        if told is False and (self.nearest is None or short_by < self.nearest.short_by):
            self.nearest = NearestMiss(gpu, count, strategy, short_by)
        return told

    def work(self, gpu: GPU) -> Work | None:
        key = gpu.compute_capability
        if key not in self._works:
            try:
                self._works[key] = work(self.run.model_copy(update={"gpu": gpu.name}))
            except MemplanError:
                self._works[key] = None
        return self._works[key]


def _miss(choice: _Candidate, answer: Estimate, demand: Demand) -> NearestMiss:
    """Return how far a fully estimated candidate misses the demand: at least one byte, even if its bytes would fit."""
    short_by = demand.headroom - (answer.verdict.headroom or 0)
    return NearestMiss(choice.gpu, choice.count, choice.strategy, max(short_by, 1))


def _on(run: RunSpec, gpu: GPU, count: int, strategy: str, calibration: Calibration | None) -> Estimate | None:
    """Estimate the run on `count` cards; None if it cannot run there."""

    def sharded() -> RunSpec:
        fields = spread(run, count, strategy) if count > 1 else ()
        return with_fields(run, fields).model_copy(update={"gpu": gpu.name})

    return attempt(sharded, calibration)  # refused: flash attention on a card that is too old, say


def _candidates(
    kinds: _Kinds, gpu: GPU, counts: Sequence[int], wanted: CardFilter, tokens: int | None
) -> Iterator[_Candidate]:
    """Yield what the bounds do not rule out, the fewest cards and the least communication first."""
    most = max(counts)
    for count in counts:
        price = hourly(gpu, count)
        if wanted.usd_per_hour is not None and (price is None or price.low > wanted.usd_per_hour):
            continue
        for strategy in STRATEGIES if count > 1 else (_NO_STRATEGY,):
            # A rank of a larger group never holds more: if the largest count is too small, every count is.
            if count > 1 and kinds.told(gpu, most, strategy) is False:
                continue
            if kinds.told(gpu, count, strategy) is not False:
                yield _candidate(kinds.work(gpu), gpu, count, strategy, price, tokens)
                break


def _candidate(
    done: Work | None, gpu: GPU, count: int, strategy: str, price: Hourly | None, tokens: int | None
) -> _Candidate:
    single = step_pace(done, gpu) if done is not None else None
    if single is None:
        return _Candidate(gpu, count, strategy, price, None, None, None)
    together = single._replace(tokens=single.tokens * count, seconds=_with_communication(single.seconds, count))
    whole = None if tokens is None else cost(together, price, tokens)
    return _Candidate(gpu, count, strategy, price, together, cost(together, price), whole)


def _with_communication(seconds: Range, count: int) -> Range:
    """A step's time, including communication between the GPUs."""
    row = cost_of("more_gpus")
    if count == 1 or row.low is None or row.high is None:
        return seconds
    return Range(seconds.low * row.low, seconds.usual * (row.low + row.high) / 2, seconds.high * row.high)


def _by_tokens(choice: _Candidate) -> tuple[float | str, ...]:
    """Sort key to rent: about the price of a million tokens, fewest cards, that price, time, memory."""
    million = choice.million
    usd = million.usd.usual if million is not None and million.usd is not None else inf
    seconds = million.seconds.usual if million is not None else inf
    return _about(usd), choice.count * (usd < inf), usd, seconds, choice.gpu.usable * choice.count, choice.gpu.name


def by_list_price(choice: CountedCards) -> tuple[float | str, ...]:
    """Sort key to own: about the list price of all cards, fewest cards, that price, watts, memory."""
    gpu, count = choice.gpu, choice.count
    usd = (gpu.launch_usd or inf) * count
    return _about(usd), count, usd, (gpu.tdp_watts or 0) * count, -gpu.usable, gpu.name


def _about(usd: float) -> float:
    """Return the price in steps of a fifth: within one, a person prefers fewer cards."""
    return round(4 * log2(usd)) if 0 < usd < inf else usd


def wanted_cards(wanted: CardFilter, run: RunSpec) -> Iterator[tuple[GPU, tuple[int, ...]]]:
    """Yield the cards that may be offered for a run and the counts of each. Raises SpecError if there are none."""
    if wanted.owned:
        cards = [(owned.gpu, tuple(n for n in range(1, owned.count + 1))) for owned in wanted.owned]
    else:
        cards = [(gpu, wanted.counts or COUNTS) for gpu in all_gpus()]
    least, most = wanted.memory
    if least is not None and most is not None and least > most:
        raise refused("memory", f"the least, {least:,} bytes, is more than the most, {most:,} bytes")
    matching = [
        (gpu, counts)
        for gpu, counts in cards
        if (not wanted.vendors or gpu.vendor in wanted.vendors)
        and (not wanted.markets or gpu.market in wanted.markets)
        and (least is None or gpu.usable >= least)
        and (most is None or gpu.usable <= most)
    ]
    if not matching:
        raise refused("buy", "no catalogued card matches; drop one of vendor, market or memory")
    is_any = wanted.to == "rent" or wanted.owned
    found = [choice for choice in matching if is_any or None not in (choice[0].launch_usd, choice[0].slots)]
    if not found:
        raise refused("to", "no card that matches has a list price; --to rent has those without one")
    for gpu, counts in found:
        running = tuple(count for count in counts if not any(not_on(gpu, run, count)))
        if running:
            yield gpu, running


def parse_owned_cards(text: str) -> tuple[OwnedCards, ...]:
    """Parse a list of cards such as `2x3090,1xa100`.

    Raises SpecError if it is malformed, and UnknownNameError for an unknown card.
    """
    out: list[OwnedCards] = []
    for item in text.split(","):
        number, card = several(item)
        if not card or number == 0:
            raise refused("have", f"{item!r:.80} is not a count and a card; write for example 2x3090,1xa100")
        out.append(OwnedCards(find_gpu(card), 1 if number is None else number))
    return tuple(out)
