"""What to buy or rent: cards that run it, cheapest first, with what they cost and on what that rests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from memplan.catalogue.hardware.rates import Rate
from memplan.core.units import gib
from memplan.estimate.answer import Estimate
from memplan.estimate.demand import Demand
from memplan.planning.offers import Offer, Offers
from memplan.planning.step_time import Cost, Hourly, Range
from memplan.report import wording as words
from memplan.report.blocks import Block, Heading, Pairs, Table, Text
from memplan.report.plans.wording import duration, figures, span, state, wish
from memplan.report.table import COLOURS
from memplan.report.text import Column


class Bought(NamedTuple):
    """The answer as asked, what is offered for it, and the tokens whose time and price are asked.

    Where nothing is offered, `nearest` is the run on what comes nearest, estimated.
    """

    answer: Estimate
    demand: Demand
    offers: Offers
    tokens: int | None
    nearest: Estimate | None = None

    @property
    def found(self) -> list[Estimate]:
        return [offer.answer for offer in self.offers.offers]


def _choices(bought: Bought) -> str:
    """How many were looked at."""
    n = bought.offers.considered
    return f"{n:,} choices of card, count and strategy" if n > 1 else "one choice of card, count and strategy"


def blocks(bought: Bought, explain: bool = False) -> Iterator[Block]:
    offers = bought.offers.offers
    if bought.answer.gpu is not None:
        yield Text(f"As asked: {words.verdict(bought.answer)}.")
    asked = wish(bought.demand)
    if not offers:
        nothing = f"Nothing offered runs it{f' ({asked})' if asked else ''}: {_choices(bought)}."
        yield Text(nothing, "bold red")
        yield Text(missed(bought))
        return
    best = offers[0]
    cost, tokens = (best.whole, f"{bought.tokens:,}") if bought.tokens is not None else (best.million, "a million")
    price = f", {span(cost.usd)} US dollars for {tokens} tokens" if cost and cost.usd else ""
    which = f"{'Cheapest' if price else 'Fastest'} of {_choices(bought)}"
    yield Text(f"{which}{f' ({asked})' if asked else ''}: {_named(best)}{price}.", "bold green")
    yield _table(bought)
    if any(offer.count > 1 for offer in offers):
        yield Text("Of several cards, GiB are of each, prices and times of all together.")
    yield Text(_basis(offers))
    yield Text(_prices(offers))
    for note in dict.fromkeys(offer.pace.note for offer in offers if offer.pace and offer.pace.note):
        yield Text(f"Note: {note}.")
    if explain:
        yield Heading("Sources")
        yield Pairs(list(_sources(offers)))


def missed(bought: Bought) -> str:
    """What comes nearest, and by how much it misses."""
    miss, answer = bought.offers.nearest, bought.nearest
    if miss is not None and answer is not None:
        text = f"The nearest is {_card(miss.gpu.name, miss.count, miss.strategy)}: {state(answer)}"
        if not lacks(bought):
            return f"{text}; --tight would take it."
        return f"{text}; {gib(lacks(bought))} too few." if bought.demand.headroom else f"{text}."
    if not bought.offers.considered:
        return "No such card has a dated price that low; raise --max-price or leave it out."
    return "None of them can run it, whatever memory they have."


def lacks(bought: Bought) -> int:
    """The bytes by which the nearest misses, on each card."""
    headroom = bought.nearest.verdict.headroom if bought.nearest else None
    return max(0, bought.demand.headroom - (headroom or 0))


def _named(offer: Offer) -> str:
    return _card(offer.gpu.name, offer.count, offer.strategy)


def _card(name: str, count: int, strategy: str) -> str:
    return name if count == 1 else f"{count} × {name}, {strategy}"


def _table(bought: Bought) -> Table:
    offers, asked = bought.offers.offers, bought.tokens is not None
    whole = (Column("USD in all", right=True), Column("time in all", right=True, optional=True))
    columns = [
        Column("card", wraps=True),
        Column("GiB used", right=True),
        Column("free", right=True, optional=asked),
        *(whole if asked else ()),
        Column("USD/M tokens", right=True, optional=asked),
        Column("time/M", right=True, optional=True),
        Column("USD/h", right=True, optional=True),
        Column("a step", right=True, optional=True),
        Column("priced", optional=True),
    ]
    colours = [COLOURS[str(offer.answer.verdict.answer)] for offer in offers]
    styles = ["|".join(("", colour, colour, *[""] * (len(columns) - 3))) for colour in colours]
    return Table(columns, [tuple(_cells(offer, asked)) for offer in offers], styles)


def _cells(offer: Offer, asked: bool) -> Iterator[str]:
    yield _named(offer)
    yield words.tenths(offer.answer.bytes.used)
    yield words.tenths(offer.answer.verdict.headroom or 0)
    for cost in (offer.whole, offer.million) if asked else (offer.million,):
        yield span(cost.usd) if cost and cost.usd else ""
        yield duration(cost.seconds) if cost else ""
    yield span((offer.price.low, offer.price.high)) if offer.price else ""
    yield duration(offer.pace.seconds) if offer.pace else ""
    yield offer.price.date if offer.price else ""


def _basis(offers: Sequence[Offer]) -> str:
    """The shares that all times rest on, in a sentence."""
    paced = [(offer.gpu.name, offer.pace) for offer in offers if offer.pace]
    if not paced:
        return "The catalogue has no rate for these cards, so no time and no cost a token."
    paces = [pace for _, pace in paced]
    measured = list(dict.fromkeys(name for name, pace in paced if pace.basis == "measured"))
    every = len(measured) == len({name for name, _ in paced})
    basis = "measured" if every else (f"assumed ({', '.join(measured)}: measured)" if measured else "assumed")
    products, attention = _share([p.products for p in paces]), _share([p.attention for p in paces])
    launch = paces[0].launch
    return (
        f"Times are counted operations and bytes at {basis} rates: {products} of the card's peak for products, "
        f"{attention} for attention, {_share([p.bandwidth for p in paces])} of its bandwidth for all else, "
        f"{launch.low} to {launch.high} µs of the host for a kernel."
    )


def _share(rates: Sequence[Rate]) -> str:
    return f"{min(r.low for r in rates)} to {max(r.high for r in rates)} %"


def _prices(offers: Sequence[Offer]) -> str:
    dates = sorted(offer.price.date for offer in offers if offer.price)
    if not dates:
        return "The catalogue has no dated price for these cards."
    when = f"on {dates[0]}" if dates[0] == dates[-1] else f"from {dates[0]} to {dates[-1]}"
    return f"Prices are list prices as they stood {when}, in US dollars, and change: ask before you rent."


def _sources(offers: Sequence[Offer]) -> Iterator[tuple[str, str]]:
    """Every rate with its basis, and every price."""
    for name in ("products", "attention", "bandwidth", "launch", "bus", "host"):
        every: list[Rate | None] = [getattr(offer.pace, name) for offer in offers if offer.pace]
        rates = dict.fromkeys(rate for rate in every if rate is not None)
        for n, rate in enumerate(rates):
            yield "" if n else name, f"{rate.low} to {rate.high} ({rate.what}); {rate.basis}: {rate.source}"
    for offer in dict.fromkeys(offer.gpu for offer in offers):
        for n, price in enumerate(p for p in offer.prices if p.date):
            yield (
                "" if n else offer.name,
                f"{price.usd_per_hour:g} an hour, {price.provider}, {price.date}; {price.source}",
            )


# --- JSON and CSV ------------------------------------------------------------------------------------------


def dump(bought: Bought) -> dict[str, Any]:
    miss = bought.offers.nearest
    return {
        "offers": [_offer(offer) for offer in bought.offers.offers],
        "considered": bought.offers.considered,
        "nearest": None
        if miss is None or bought.nearest is None
        else {
            "gpu": miss.gpu.name,
            "count": miss.count,
            "strategy": miss.strategy,
            **figures(bought.nearest),
            "lacks": lacks(bought),
        },
        "tokens": bought.tokens,
    }


def _offer(offer: Offer) -> dict[str, Any]:
    pace = offer.pace
    return {
        "gpu": offer.gpu.name,
        "count": offer.count,
        "strategy": offer.strategy,
        **figures(offer.answer),
        "price": offer.price._asdict() if offer.price else None,
        "step": None
        if pace is None
        else {
            "seconds": pace.seconds._asdict(),
            "tokens": pace.tokens,
            "bound": pace.bound,
            "basis": pace.basis,
            "note": pace.note,
        },
        "million": _cost(offer.million),
        "whole": _cost(offer.whole),
    }


def _cost(cost: Cost | None) -> dict[str, Any] | None:
    if cost is None:
        return None
    return {
        "tokens": cost.tokens,
        "seconds": cost.seconds._asdict(),
        "usd": cost.usd._asdict() if cost.usd else None,
    }


def rows(bought: Bought) -> tuple[list[str], list[dict[str, object]]]:
    """For CSV: titles, and a row an offer; where there is none, what comes nearest."""
    offers, miss = bought.offers.offers, bought.offers.nearest
    if not offers and miss is not None and bought.nearest is not None:
        offers = (Offer(miss.gpu, miss.count, miss.strategy, bought.nearest, None, None, None, None),)
    whole = ("whole_seconds", "whole_usd") if bought.tokens is not None else ()
    ranges = ("usd_per_hour", "step_seconds", "million_seconds", "million_usd", *whole)
    titles = ["gpu", "count", "strategy", "verdict", "used", "headroom", "priced"]
    titles += [f"{name}_{end}" for name in ranges for end in ("low", "high")]
    return titles, [_row(offer, ranges) for offer in offers]


def _row(offer: Offer, ranges: Sequence[str]) -> dict[str, object]:
    """One offer, flat. What is not known is left out."""
    found: dict[str, Hourly | Range | None] = {
        "usd_per_hour": offer.price,
        "step_seconds": offer.pace.seconds if offer.pace else None,
        "million_seconds": offer.million.seconds if offer.million else None,
        "million_usd": offer.million.usd if offer.million else None,
        "whole_seconds": offer.whole.seconds if offer.whole else None,
        "whole_usd": offer.whole.usd if offer.whole else None,
    }
    known = {name: of for name in ranges if (of := found[name]) is not None}
    return {
        "gpu": offer.gpu.name,
        "count": offer.count,
        "strategy": offer.strategy,
        "verdict": offer.answer.verdict.answer,
        "used": offer.answer.bytes.used,
        "headroom": offer.answer.verdict.headroom,
        "priced": offer.price.date if offer.price else "",
        **{f"{name}_low": of.low for name, of in known.items()},
        **{f"{name}_high": of.high for name, of in known.items()},
    }
