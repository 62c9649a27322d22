"""Reports about running a model: on one card, and on which cards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from memplan.catalogue.hardware.token_rates import Span
from memplan.core.records import NamedTuple
from memplan.core.units import gib
from memplan.estimate.answer import Estimate
from memplan.estimate.demand import Demand
from memplan.planning.inference import CardFit, Limit, Questions, Variant, lengths
from memplan.planning.roofline import DecodingPace, Seconds
from memplan.report import wording as words
from memplan.report.blocks import Block, Column, Heading, Pairs, Table, Text
from memplan.report.csv import CsvRows
from memplan.report.plans.changes import conditions, figures, picked, span
from memplan.report.plans.levers import patch_blocks, patch_dump
from memplan.report.plans.offers import LIST_PRICES, WITHOUT_PRICE, columns_to_own, facts_to_own, list_price

if TYPE_CHECKING:
    from memplan.planning.file_levers import FilePatch


class QuestionsReport(NamedTuple):
    """The questions about a run on its card, answered."""

    questions: Questions
    patch: FilePatch | None = None

    mode = "generate"

    @property
    def answer(self) -> Estimate:
        return self.questions.answer

    @property
    def demand(self) -> Demand:
        return self.questions.demand

    @property
    def found(self) -> list[Estimate]:
        """Answers that meet the demand: the run itself, or alternatives to it."""
        q = self.questions
        if q.fits:
            return [q.answer]
        choices = (*q.degrees, *q.placed, *q.formats, *q.caches)
        return [choice.answer for choice in choices if choice.fits and choice.answer]

    @property
    def named(self) -> list[tuple[str, Estimate]]:
        """The runs that it shows, with what it calls them."""
        return [(str(answer.run.gpu), answer) for answer in self.found if answer is not self.answer]

    def blocks(self, explain: bool = False) -> Iterator[Block]:
        q, answer = self.questions, self.answer
        yield Text(f"{words.verdict(answer)}{conditions(q.demand)}", f"bold {words.colour(answer)}")
        yield Pairs(list(_answers(q)))
        if any(choice.answer for choice in q.degrees[1:]):
            splits_layers = answer.run.profile.startswith("llama.cpp")
            yield Heading("Layers split over several GPUs" if splits_layers else "Tensor parallelism over several GPUs")
            yield _choices("GPUs", q.degrees)
        refused = [choice.refused for choice in q.degrees if choice.refused]
        if refused:
            yield Text(f"Not divided further: {refused[0]}.")
        if any(choice.answer for choice in q.placed):
            yield Heading("Layers placed on the GPUs of one process (device_map auto)")
            yield _choices("GPUs", q.placed)
        yield Heading("Weight formats, mildest first")
        yield _choices("format", q.formats, explain)
        if q.caches:
            yield Heading("Other caches, mildest first")
            yield _choices("cache", q.caches, explain)
        if self.patch is not None:
            yield from patch_blocks(self.patch)
        yield from _speed(q, explain)
        yield from (Text(f"Note: {note}.") for note in answer.notes)

    def dump(self) -> dict[str, Any]:
        q = self.questions
        return {
            **picked(q, "fits", "requests", "context"),
            **{name: [_choice(c) for c in getattr(q, name)] for name in ("degrees", "placed", "formats", "caches")},
            "mildest": q.mildest.name if q.mildest else None,
            "fewest": int(q.fewest.name) if q.fewest else None,
            "decoding": _pace(q.decoding),
            "full": _pace(q.full),
            "prompt": _pace(q.prompt),
            "unpaced": q.unpaced,
            **({"patch": patch_dump(self.patch)} if self.patch is not None else {}),
        }


class Places(NamedTuple):
    """Cards that hold a run."""

    answer: Estimate
    demand: Demand
    places: tuple[CardFit, ...]
    to: str = "rent"

    mode = "places"

    @property
    def found(self) -> list[Estimate]:
        return [placed.answer for placed in self.places]

    @property
    def named(self) -> list[tuple[str, Estimate]]:
        """The runs that it shows, with what it calls them."""
        return [(str(answer.run.gpu), answer) for answer in self.found if answer is not self.answer]

    def blocks(self, explain: bool = False) -> Iterator[Block]:
        condition = conditions(self.demand)
        if not self.places:
            yield Text(f"None of the cards tried holds it{condition}.", "bold red")
            return
        if self.to == "own":
            best = self.places[0]
            which = f"{best.tp} × {best.gpu.name}" if best.tp > 1 else best.gpu.name
            yield Text(f"To own{condition}: {which}{list_price(best.gpu, best.tp)}.", "bold green")
            yield Table([*_PLACES[:_HELD], *columns_to_own(lambda placed: (placed.gpu, placed.tp))], self.places)
            yield Text(f"GiB are per GPU; dollars, watts and slots are for all of them. {LIST_PRICES}{WITHOUT_PRICE}")
            return
        order = "cheapest per hour first, those without a dated price last"
        yield Text(f"Cards that hold it{condition}, {order}.", "bold green")
        yield Table(_PLACES, self.places)
        yield Text(
            "With several GPUs, GiB are per GPU and prices are for all of them. Speeds are ranges; --gpu shows their "
            "rates."
        )

    def dump(self) -> dict[str, Any]:
        return {
            "places": [
                {
                    "gpu": placed.gpu.name,
                    "gpus": placed.tp,
                    "price": placed.price._asdict() if placed.price else None,
                    "requests": placed.requests,
                    "tokens_per_second": placed.pace.tokens_per_second._asdict() if placed.pace else None,
                    **figures(placed.answer),
                    **({"each": facts_to_own(placed.gpu)} if self.to == "own" else {}),
                }
                for placed in self.places
            ]
        }

    def rows(self) -> CsvRows:
        """Return the cards; `low` and `high` are tokens per second."""
        return CsvRows([_row(placed) for placed in self.places], _TITLES)


_PLACES: tuple[Column[CardFit], ...] = (
    Column("card", lambda placed: placed.gpu.name, wraps=True),
    Column("GPUs", lambda placed: str(placed.tp), right=True),
    Column("GiB used", lambda placed: words.tenths(placed.answer.bytes.used), right=True, optional=True),
    Column("requests", lambda placed: f"{placed.requests:,}", right=True),
    Column("tokens/s", lambda placed: rate(placed.pace.tokens_per_second) if placed.pace else "–", right=True),
    Column("USD/h", lambda p: span((p.price.low, p.price.high)) if p.price else "–", right=True, optional=True),
    Column("price date", lambda placed: placed.price.date if placed.price else "", optional=True),
)
_HELD = 5  # columns that are not of a rent
_TITLES = ("gpu", "gpus", "used", "verdict", "requests", "low", "high", "usd_per_hour")


def _answers(q: Questions) -> Iterator[tuple[str, str]]:
    prompt, new = lengths(q.answer)
    yield "requests at once", _most(q.requests, f"of {prompt + new:,} tokens")
    longest = _most(q.context, "tokens in a single request")
    admitted = (q.answer.serving or {}).get("max_model_len", 0)
    if 0 < q.context.value < admitted:
        longest += f"; start the engine with --max-model-len {q.context.value}"
    yield "longest context", longest
    if not q.fits:
        if q.mildest:
            yield "mildest format", f"{q.mildest.name}: {words.tenths(q.mildest.weights)} GiB of weights"
        if q.fewest:
            most = " at most" if q.fewest in q.placed else " each"
            yield "fewest GPUs", f"{q.fewest.name}, with {words.tenths(q.fewest.weights)} GiB of weights{most}"
        cache = next((choice for choice in q.caches if choice.fits), None)
        if cache is not None:
            yield "mildest cache", cache.name
        if not (q.mildest or q.fewest or cache):
            yield "what would fit", "none of the formats and numbers of these GPUs that were tried"
    if q.prompt is not None:
        yield "first token", f"after {_seconds(q.prompt.step)}, for a prompt of {prompt:,} tokens"
    if q.decoding is not None:
        yield "tokens a second", _rate(q.decoding)
    if q.full is not None and q.full.requests != (q.decoding.requests if q.decoding else 0):
        yield "", _rate(q.full)
    if q.unpaced:
        yield "tokens a second", q.unpaced


def _most(most: Limit, what: str) -> str:
    limits = {
        "memory": "memory",
        "positions": "the model's positions",
        "max_num_seqs": "the engine's max_num_seqs",
        "assistant": "assisted generation, which takes one at a time",
        "nothing": "nothing: it takes no memory",
    }
    if not most.value:
        return "none fits"
    return f"{most.value:,} {what}, limited by {limits[most.binds]}"


def _rate(pace: DecodingPace) -> str:
    together = rate(pace.tokens_per_second)
    if pace.requests == 1:
        return f"{together} for one request"
    return f"{together} for {pace.requests:,} requests at once; {rate(pace.per_request)} each"


def rate(of: Seconds) -> str:
    """Format a range of tokens per second, rounded to its precision.

    >>> rate(Seconds(24.72, 59.63)), rate(Seconds(0.42, 1.9)), rate(Seconds(1234.5, 5678.9))
    ('25–60', '0.4–1.9', '1,234–5,679')
    """
    digits = 0 if of.low >= 10 else 1
    return f"{of.low:,.{digits}f}–{of.high:,.{digits}f}"


def _seconds(seconds: Seconds) -> str:
    if seconds.high < 1:
        return f"{1000 * seconds.low:,.0f}–{1000 * seconds.high:,.0f} ms"
    return f"{seconds.low:,.1f}–{seconds.high:,.1f} s"


def _choices(title: str, choices: Sequence[Variant], explain: bool = False) -> Table[Variant]:
    def loss(choice: Variant) -> str:
        step = choice.step
        return "" if step is None else f"{step.quality} [{step.source}]" if explain else step.quality

    columns: list[Column[Variant]] = [
        Column(title, lambda choice: choice.name, wraps=True),
        Column("weights GiB", lambda choice: words.tenths(choice.weights), right=True, optional=True),
        Column(
            "answer", _verdict, wraps=True, style=lambda choice: words.colour(choice.answer) if choice.answer else ""
        ),
        Column("requests", lambda choice: f"{choice.requests:,}", right=True),
        Column("tokens/s", lambda c: rate(c.pace.tokens_per_second) if c.pace else "–", right=True, optional=True),
    ]
    if any(choice.step for choice in choices):
        columns.append(Column("what is lost", loss, wraps=True, optional=not explain))
    return Table(columns, [choice for choice in choices if choice.answer is not None])


def _verdict(choice: Variant) -> str:
    answer = choice.answer
    assert answer is not None  # refused ones are not shown
    host = f", {gib(answer.host_bytes)} on the host" if answer.host_bytes else ""
    return f"{answer.verdict.answer}{host}"


def _speed(q: Questions, explain: bool) -> Iterator[Block]:
    """Yield the rates behind the speeds."""
    paces = [pace for pace in (q.decoding, q.full, q.prompt) if pace is not None]
    if not paces:
        return
    yield Heading("Speeds are ranges between these rates; none was measured on this machine")
    if q.decoding is not None:
        yield Text(_reads(q.decoding))
    columns: list[Column[Span]] = [
        Column("assumed", lambda row: row.what, wraps=True),
        Column("low", lambda row: f"{row.low:g}", right=True),
        Column("high", lambda row: f"{row.high:g}", right=True),
        *([Column("source", lambda row: row.source, wraps=True)] if explain else []),
    ]
    yield Table(columns, list(dict.fromkeys(row for pace in paces for row in pace.assumed)))
    yield from (Text(f"Note: {note}.") for note in (q.decoding.notes if q.decoding else ()))


def _reads(pace: DecodingPace) -> str:
    low, high = (gib(n) for n in pace.work.caches)
    caches = low if low == high else f"{low} to {high}"
    best, worst = pace.bound
    bound = best if best == worst else f"{best}, or at worst by {worst}"
    return f"A step reads {gib(pace.work.bytes)} of weights and {caches} of caches on each GPU; it is bound by {bound}."


# --- JSON and CSV ------------------------------------------------------------------------------------------


def _choice(choice: Variant) -> dict[str, Any]:
    answer, step = choice.answer, choice.step
    return {
        **picked(choice, "name", "refused", "fits", "weights", "requests"),
        "at": figures(answer) if answer else None,
        "tokens_per_second": choice.pace.tokens_per_second._asdict() if choice.pace else None,
        "quality": step.quality if step else None,
        "quality_source": step.source if step else None,
    }


def _pace(pace: DecodingPace | None) -> dict[str, Any] | None:
    if pace is None:
        return None
    return {
        "seconds": pace.step._asdict(),
        **picked(pace, "tokens", "requests", "tokens_per_second", "per_request"),
        "bound": list(pace.bound),
        "weight_bytes": pace.work.bytes,
        "cache_bytes": list(pace.work.caches),
        "operations": pace.work.operations + pace.work.attending,
        "experts": list(pace.work.experts),
        "assumed": [row._asdict() for row in pace.assumed],
        "notes": list(pace.notes),
    }


def _row(placed: CardFit) -> dict[str, object]:
    pace, price = placed.pace.tokens_per_second if placed.pace else None, placed.price
    card = (placed.gpu.name, placed.tp, placed.answer.bytes.used, placed.answer.verdict.answer, placed.requests)
    speed = (round(pace.low, 2), round(pace.high, 2)) if pace else ("", "")
    return dict(zip(_TITLES, (*card, *speed, price.low if price else ""), strict=True))
