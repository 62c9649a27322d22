"""Report of what to buy or rent: cards that hold a run, cheapest first, with prices and the rates behind the times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.rates import Rate
from memplan.core.records import NamedTuple
from memplan.core.units import gib
from memplan.estimate.answer import Estimate
from memplan.estimate.demand import Demand
from memplan.planning.offers import NearestMiss, Offer, Offers
from memplan.planning.step_time import Cost, Hourly, Range
from memplan.report import wording as words
from memplan.report.blocks import Block, Column, Heading, Pairs, Table, Text
from memplan.report.csv import CsvRows
from memplan.report.plans.changes import conditions, duration, figures, picked, span, state


class OffersReport(NamedTuple):
    """Offers of cards for a run.

    answer    the estimate of the run as given
    tokens    number of tokens to price, if given
    nearest   the estimate on the nearest miss, if there are no offers
    to        own or rent
    """

    answer: Estimate
    demand: Demand
    offers: Offers
    tokens: int | None
    nearest: Estimate | None = None
    to: str = "rent"

    mode = "buy"

    @property
    def found(self) -> list[Estimate]:
        return [offer.answer for offer in self.offers.offers]

    @property
    def named(self) -> list[tuple[str, Estimate]]:
        """The runs that it shows, with what it calls them."""
        return [(offer_title(offer), offer.answer) for offer in self.offers.offers]

    @property
    def considered(self) -> str:
        n, what = self.offers.considered, "of card, count and strategy"
        return f"{n:,} combinations {what}" if n > 1 else f"one combination {what}"

    def blocks(self, explain: bool = False) -> Iterator[Block]:
        offers, condition = self.offers.offers, conditions(self.demand)
        if self.answer.gpu is not None:
            yield Text(f"As asked: {words.verdict(self.answer)}.")
        if not offers:
            yield Text(f"Nothing holds it{condition} among {self.considered}.", "bold red")
            yield Text(missed(self))
            return
        if self.to == "own":
            yield from self._to_own(condition)
            return
        best = offers[0]
        cost, tokens = (best.whole, f"{self.tokens:,}") if self.tokens is not None else (best.million, "a million")
        price = f", {span(cost.usd)} US dollars for {tokens} tokens" if cost and cost.usd else ""
        which = f"{'Cheapest' if price else 'Fastest'} of {self.considered}"
        yield Text(f"{which}{condition}: {offer_title(best)}{price}.", "bold green")
        yield _table(self)
        if any(offer.count > 1 for offer in offers):
            yield Text("With several cards, GiB are per card, and prices and times are for all of them together.")
        yield Text(_basis(offers))
        yield Text(_prices(offers))
        for note in dict.fromkeys(offer.pace.note for offer in offers if offer.pace and offer.pace.note):
            yield Text(f"Note: {note}.")
        if explain:
            yield Heading("Sources")
            yield Pairs(list(_sources(offers)))

    def _to_own(self, condition: str) -> Iterator[Block]:
        offers = self.offers.offers
        best = offers[0]
        other = "" if any(offer.gpu.launch_usd is None for offer in offers) else WITHOUT_PRICE
        which = f"{offer_title(best)}{list_price(best.gpu, best.count)}"
        yield Text(f"To own, of {self.considered}{condition}: {which}.", "bold green")
        columns: list[Column[Offer]] = [
            Column("card", offer_title, wraps=True),
            Column("GiB used", lambda offer: words.tenths(offer.answer.bytes.used), right=True),
            Column("free", _free, right=True),
            *columns_to_own(lambda offer: (offer.gpu, offer.count)),
            Column("time/M", lambda offer: _time(offer.million), right=True, optional=True),
        ]
        yield Table(columns, offers)
        yield Text(f"GiB are per card; dollars, watts, slots and times are for all of them. {LIST_PRICES}{other}")

    def dump(self) -> dict[str, Any]:
        miss, answer = self.offers.nearest, self.nearest
        nearest = {**_cards(miss), **figures(answer), "lacks": missing_bytes(self)} if miss and answer else None
        return {
            "offers": [{**_offer(offer), **self._each(offer)} for offer in self.offers.offers],
            "considered": self.offers.considered,
            "nearest": nearest,
            "tokens": self.tokens,
        }

    def _each(self, offer: Offer) -> dict[str, Any]:
        return {"each": facts_to_own(offer.gpu)} if self.to == "own" else {}

    def rows(self) -> CsvRows:
        """Return the offers, or the nearest miss if there is none."""
        offers, miss = self.offers.offers, self.offers.nearest
        if not offers and miss is not None and self.nearest is not None:
            offers = (Offer(miss.gpu, miss.count, miss.strategy, self.nearest, None, None, None, None),)
        total = ("whole_seconds", "whole_usd") if self.tokens is not None else ()
        ranges = ("usd_per_hour", "step_seconds", "million_seconds", "million_usd", *total)
        titles = ["gpu", "count", "strategy", "verdict", "used", "headroom", "priced"]
        titles += [f"{name}_{end}" for name in ranges for end in ("low", "high")]
        return CsvRows([_row(offer, ranges) for offer in offers], titles)


def missed(bought: OffersReport) -> str:
    """Return a sentence that says what comes nearest and by how much it misses."""
    miss, answer = bought.offers.nearest, bought.nearest
    if miss is not None and answer is not None:
        text = f"The nearest is {_card(miss.gpu.name, miss.count, miss.strategy)}: {state(answer)}"
        if not missing_bytes(bought):
            return f"{text}; --tight accepts it."
        return f"{text}; {gib(missing_bytes(bought))} too little." if bought.demand.headroom else f"{text}."
    if not bought.offers.considered:
        return "No such card has a dated price that low; raise --max-price or leave it out."
    return "None of them can run it, however much memory they have."


def missing_bytes(bought: OffersReport) -> int:
    """Return the bytes by which the nearest misses, on each card."""
    headroom = bought.nearest.verdict.headroom if bought.nearest else None
    return max(0, bought.demand.headroom - (headroom or 0))


def offer_title(offer: Offer) -> str:
    return _card(offer.gpu.name, offer.count, offer.strategy)


def _card(name: str, count: int, strategy: str) -> str:
    return name if count == 1 else f"{count} × {name}, {strategy}"


def _table(bought: OffersReport) -> Table[Offer]:
    with_total = bought.tokens is not None

    def colour(offer: Offer) -> str:
        return words.colour(offer.answer)

    total: list[Column[Offer]] = [
        Column("total USD", lambda offer: _usd(offer.whole), right=True),
        Column("total time", lambda offer: _time(offer.whole), right=True, optional=True),
    ]
    columns: list[Column[Offer]] = [
        Column("card", offer_title, wraps=True),
        Column("GiB used", lambda offer: words.tenths(offer.answer.bytes.used), right=True, style=colour),
        Column("free", _free, right=True, optional=with_total, style=colour),
        *(total if with_total else []),
        Column("USD/M tokens", lambda offer: _usd(offer.million), right=True, optional=with_total),
        Column("time/M", lambda offer: _time(offer.million), right=True, optional=True),
        Column("USD/h", lambda o: span((o.price.low, o.price.high)) if o.price else "", right=True, optional=True),
        Column("step", lambda offer: duration(offer.pace.seconds) if offer.pace else "", right=True, optional=True),
        Column("price date", lambda offer: offer.price.date if offer.price else "", optional=True),
    ]
    return Table(columns, bought.offers.offers)


LIST_PRICES = "Prices are list prices when a card was first sold; check what it costs now."
WITHOUT_PRICE = " Cards without one are left out: --to rent has them."


def facts_to_own(gpu: GPU) -> dict[str, Any]:
    """Return what a buyer of a card asks for, as JSON has it."""
    facts = {"launch_usd": gpu.launch_usd, "launch_date": gpu.launch_date, "watts": gpu.tdp_watts}
    return {**facts, "slots": gpu.slots}


def columns_to_own(cards: Callable[[Any], tuple[GPU, int]]) -> list[Column[Any]]:
    """Return columns of what the cards of a row cost and need, all of them together."""

    def of_all(each: str) -> Callable[[Any], str]:
        return lambda row: _of_all(getattr(cards(row)[0], each), cards(row)[1])

    return [
        Column("USD", of_all("launch_usd"), right=True),
        Column("list price of", lambda row: cards(row)[0].launch_date or "", optional=True),
        Column("watts", of_all("tdp_watts"), right=True),
        Column("slots", of_all("slots"), right=True),
    ]


def list_price(gpu: GPU, count: int) -> str:
    """Return the list price of `count` cards, as it follows their name; "" without one."""
    return f", {_of_all(gpu.launch_usd, count)} US dollars" if gpu.launch_usd is not None else ""


def _of_all(each: float | None, count: int) -> str:
    return f"{each * count:,.0f}" if each is not None else ""


def _free(offer: Offer) -> str:
    return words.tenths(offer.answer.verdict.headroom or 0)


def _usd(cost: Cost | None) -> str:
    return span(cost.usd) if cost and cost.usd else ""


def _time(cost: Cost | None) -> str:
    return duration(cost.seconds) if cost else ""


def _basis(offers: Sequence[Offer]) -> str:
    """Return a sentence with the rates behind all times."""
    named_paces = [(offer.gpu.name, offer.pace) for offer in offers if offer.pace]
    if not named_paces:
        return "The catalogue has no rate for these cards, so there is no time and no cost per token."
    paces = [pace for _, pace in named_paces]
    measured = list(dict.fromkeys(name for name, pace in named_paces if pace.basis == "measured"))
    all_measured = len(measured) == len({name for name, _ in named_paces})
    basis = "measured" if all_measured else (f"assumed ({', '.join(measured)}: measured)" if measured else "assumed")
    products, attention = _share([p.products for p in paces]), _share([p.attention for p in paces])
    launch = paces[0].launch
    return (
        f"Times are counted operations and bytes at {basis} rates: {products} of the card's peak for matrix products, "
        f"{attention} for attention, {_share([p.bandwidth for p in paces])} of its bandwidth for everything else, "
        f"{launch.low} to {launch.high} µs of the host per kernel."
    )


def _share(rates: Sequence[Rate]) -> str:
    return f"{min(r.low for r in rates)} to {max(r.high for r in rates)} %"


def _prices(offers: Sequence[Offer]) -> str:
    dates = sorted(offer.price.date for offer in offers if offer.price)
    if not dates:
        return "The catalogue has no dated price for these cards."
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"Prices are list prices of {when}, in US dollars; check them before you rent."


def _sources(offers: Sequence[Offer]) -> Iterator[tuple[str, str]]:
    """Yield every rate with its basis, and every price."""
    for name in ("products", "attention", "bandwidth", "launch", "bus", "host"):
        of_offers: list[Rate | None] = [getattr(offer.pace, name) for offer in offers if offer.pace]
        rates = dict.fromkeys(rate for rate in of_offers if rate is not None)
        for n, rate in enumerate(rates):
            yield "" if n else name, f"{rate.low} to {rate.high} ({rate.what}); {rate.basis}: {rate.source}"
    for gpu in dict.fromkeys(offer.gpu for offer in offers):
        for n, price in enumerate(p for p in gpu.prices if p.date):
            yield (
                "" if n else gpu.name,
                f"{price.usd_per_hour:g} an hour, {price.provider}, {price.date}; {price.source}",
            )


# --- JSON and CSV ------------------------------------------------------------------------------------------


def _cards(cards: Offer | NearestMiss) -> dict[str, Any]:
    return {"gpu": cards.gpu.name, "count": cards.count, "strategy": cards.strategy}


def _offer(offer: Offer) -> dict[str, Any]:
    return {
        **_cards(offer),
        **figures(offer.answer),
        "price": offer.price._asdict() if offer.price else None,
        "step": picked(offer.pace, "seconds", "tokens", "bound", "basis", "note") if offer.pace else None,
        "million": picked(offer.million, *Cost._fields) if offer.million else None,
        "whole": picked(offer.whole, *Cost._fields) if offer.whole else None,
    }


def _row(offer: Offer, ranges: Sequence[str]) -> dict[str, object]:
    """Return one offer as a flat row without unknown values."""
    values: dict[str, Hourly | Range | None] = {
        "usd_per_hour": offer.price,
        "step_seconds": offer.pace.seconds if offer.pace else None,
        "million_seconds": offer.million.seconds if offer.million else None,
        "million_usd": offer.million.usd if offer.million else None,
        "whole_seconds": offer.whole.seconds if offer.whole else None,
        "whole_usd": offer.whole.usd if offer.whole else None,
    }
    known = {name: value for name in ranges if (value := values[name]) is not None}
    return {
        **_cards(offer),
        "verdict": offer.answer.verdict.answer,
        "used": offer.answer.bytes.used,
        "headroom": offer.answer.verdict.headroom,
        "priced": offer.price.date if offer.price else "",
        **{f"{name}_{end}": getattr(value, end) for name, value in known.items() for end in ("low", "high")},
    }
