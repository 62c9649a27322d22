"""Report of what to buy or rent: cards that hold a run, cheapest first, with prices and the rates behind the times."""

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
from memplan.report.plans.wording import conditions, duration, figures, span, state
from memplan.report.table import COLOURS
from memplan.report.text import Column


class OffersReport(NamedTuple):
    """Offers of cards for a run.

    answer    the estimate of the run as given
    tokens    number of tokens to price, if given
    nearest   the estimate on the nearest miss, if there are no offers
    """

    answer: Estimate
    demand: Demand
    offers: Offers
    tokens: int | None
    nearest: Estimate | None = None

    @property
    def found(self) -> list[Estimate]:
        return [offer.answer for offer in self.offers.offers]


def _considered(bought: OffersReport) -> str:
    n = bought.offers.considered
    return f"{n:,} combinations of card, count and strategy" if n > 1 else "one combination of card, count and strategy"


def blocks(bought: OffersReport, explain: bool = False) -> Iterator[Block]:
    offers = bought.offers.offers
    if bought.answer.gpu is not None:
        yield Text(f"As asked: {words.verdict(bought.answer)}.")
    condition = conditions(bought.demand)
    suffix = f" ({condition})" if condition else ""
    if not offers:
        yield Text(f"Nothing holds it{suffix} among {_considered(bought)}.", "bold red")
        yield Text(missed(bought))
        return
    best = offers[0]
    cost, tokens = (best.whole, f"{bought.tokens:,}") if bought.tokens is not None else (best.million, "a million")
    price = f", {span(cost.usd)} US dollars for {tokens} tokens" if cost and cost.usd else ""
    which = f"{'Cheapest' if price else 'Fastest'} of {_considered(bought)}"
    yield Text(f"{which}{suffix}: {_title(best)}{price}.", "bold green")
    yield _table(bought)
    if any(offer.count > 1 for offer in offers):
        yield Text("With several cards, GiB are per card, and prices and times are for all of them together.")
    yield Text(_basis(offers))
    yield Text(_prices(offers))
    for note in dict.fromkeys(offer.pace.note for offer in offers if offer.pace and offer.pace.note):
        yield Text(f"Note: {note}.")
    if explain:
        yield Heading("Sources")
        yield Pairs(list(_sources(offers)))


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


def _title(offer: Offer) -> str:
    return _card(offer.gpu.name, offer.count, offer.strategy)


def _card(name: str, count: int, strategy: str) -> str:
    return name if count == 1 else f"{count} × {name}, {strategy}"


def _table(bought: OffersReport) -> Table:
    offers, with_total = bought.offers.offers, bought.tokens is not None
    total = (Column("total USD", right=True), Column("total time", right=True, optional=True))
    columns = [
        Column("card", wraps=True),
        Column("GiB used", right=True),
        Column("free", right=True, optional=with_total),
        *(total if with_total else ()),
        Column("USD/M tokens", right=True, optional=with_total),
        Column("time/M", right=True, optional=True),
        Column("USD/h", right=True, optional=True),
        Column("step", right=True, optional=True),
        Column("price date", optional=True),
    ]
    colours = [COLOURS[str(offer.answer.verdict.answer)] for offer in offers]
    styles = ["|".join(("", colour, colour, *[""] * (len(columns) - 3))) for colour in colours]
    return Table(columns, [tuple(_cells(offer, with_total)) for offer in offers], styles)


def _cells(offer: Offer, with_total: bool) -> Iterator[str]:
    yield _title(offer)
    yield words.tenths(offer.answer.bytes.used)
    yield words.tenths(offer.answer.verdict.headroom or 0)
    for cost in (offer.whole, offer.million) if with_total else (offer.million,):
        yield span(cost.usd) if cost and cost.usd else ""
        yield duration(cost.seconds) if cost else ""
    yield span((offer.price.low, offer.price.high)) if offer.price else ""
    yield duration(offer.pace.seconds) if offer.pace else ""
    yield offer.price.date if offer.price else ""


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


def dump(bought: OffersReport) -> dict[str, Any]:
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
            "lacks": missing_bytes(bought),
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


def rows(bought: OffersReport) -> tuple[list[str], list[dict[str, object]]]:
    """Return CSV titles and a row per offer, or the nearest miss if there is none."""
    offers, miss = bought.offers.offers, bought.offers.nearest
    if not offers and miss is not None and bought.nearest is not None:
        offers = (Offer(miss.gpu, miss.count, miss.strategy, bought.nearest, None, None, None, None),)
    total = ("whole_seconds", "whole_usd") if bought.tokens is not None else ()
    ranges = ("usd_per_hour", "step_seconds", "million_seconds", "million_usd", *total)
    titles = ["gpu", "count", "strategy", "verdict", "used", "headroom", "priced"]
    titles += [f"{name}_{end}" for name in ranges for end in ("low", "high")]
    return titles, [_row(offer, ranges) for offer in offers]


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
        "gpu": offer.gpu.name,
        "count": offer.count,
        "strategy": offer.strategy,
        "verdict": offer.answer.verdict.answer,
        "used": offer.answer.bytes.used,
        "headroom": offer.answer.verdict.headroom,
        "priced": offer.price.date if offer.price else "",
        **{f"{name}_low": value.low for name, value in known.items()},
        **{f"{name}_high": value.high for name, value in known.items()},
    }
