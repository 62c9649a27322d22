"""Reports about running a model: on one card, and on which cards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from memplan.core.units import gib
from memplan.estimate.answer import Estimate
from memplan.estimate.demand import Demand
from memplan.planning.inference import CardFit, Limit, Questions, Variant, lengths
from memplan.planning.roofline import DecodingPace, Seconds
from memplan.report import wording as words
from memplan.report.blocks import Block, Heading, Pairs, Table, Text
from memplan.report.plans.wording import conditions, figures, span
from memplan.report.table import COLOURS
from memplan.report.text import Column


class QuestionsReport(NamedTuple):
    """The questions about a run on its card, answered."""

    questions: Questions

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


class Places(NamedTuple):
    """Cards that hold a run."""

    answer: Estimate
    demand: Demand
    places: tuple[CardFit, ...]

    @property
    def found(self) -> list[Estimate]:
        return [placed.answer for placed in self.places]


def blocks(asked: QuestionsReport, explain: bool = False) -> Iterator[Block]:
    q = asked.questions
    answer = q.answer
    condition = conditions(q.demand)
    suffix = f" ({condition})" if condition else ""
    yield Text(f"{words.verdict(answer)}{suffix}", f"bold {COLOURS[answer.verdict.answer or '']}")
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
    yield from _speed(q, explain)
    yield from (Text(f"Note: {note}.") for note in answer.notes)


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


def _choices(title: str, choices: Sequence[Variant], explain: bool = False) -> Table:
    has_steps = any(choice.step for choice in choices)
    columns = [
        Column(title, wraps=True),
        Column("weights GiB", right=True, optional=True),
        Column("answer", wraps=True),
        Column("requests", right=True),
        Column("tokens/s", right=True, optional=True),
        *((Column("what is lost", wraps=True, optional=not explain),) if has_steps else ()),
    ]
    shown = [choice for choice in choices if choice.answer is not None]
    rows = [tuple(_cells(choice, has_steps, explain)) for choice in shown]
    styles = ["||" + COLOURS[str(c.answer.verdict.answer)] + "|" * (len(columns) - 3) for c in shown if c.answer]
    return Table(columns, rows, styles)


def _cells(choice: Variant, has_steps: bool, explain: bool) -> Iterator[str]:
    assert choice.answer is not None
    yield choice.name
    yield words.tenths(choice.weights)
    host = f", {gib(choice.answer.host_bytes)} on the host" if choice.answer.host_bytes else ""
    yield f"{choice.answer.verdict.answer}{host}"
    yield f"{choice.requests:,}"
    yield rate(choice.pace.tokens_per_second) if choice.pace else "–"
    if has_steps:
        step = choice.step
        yield "" if step is None else f"{step.quality} [{step.source}]" if explain else step.quality


def _speed(q: Questions, explain: bool) -> Iterator[Block]:
    """Yield the rates behind the speeds."""
    paces = [pace for pace in (q.decoding, q.full, q.prompt) if pace is not None]
    if not paces:
        return
    yield Heading("Speeds are ranges between these rates; none was measured on this machine")
    if q.decoding is not None:
        yield Text(_reads(q.decoding))
    assumed = list(dict.fromkeys(row for pace in paces for row in pace.assumed))
    columns = [Column("assumed", wraps=True), Column("low", right=True), Column("high", right=True)]
    rows = [(row.what, f"{row.low:g}", f"{row.high:g}") for row in assumed]
    if explain:
        columns.append(Column("source", wraps=True))
        rows = [(*cells, row.source) for cells, row in zip(rows, assumed, strict=True)]
    yield Table(columns, rows)
    yield from (Text(f"Note: {note}.") for note in (q.decoding.notes if q.decoding else ()))


def _reads(pace: DecodingPace) -> str:
    low, high = (gib(n) for n in pace.work.caches)
    caches = low if low == high else f"{low} to {high}"
    best, worst = pace.bound
    bound = best if best == worst else f"{best}, or at worst by {worst}"
    return f"A step reads {gib(pace.work.bytes)} of weights and {caches} of caches on each GPU; it is bound by {bound}."


def place_blocks(places: Places) -> Iterator[Block]:
    condition = conditions(places.demand)
    suffix = f" ({condition})" if condition else ""
    if not places.places:
        yield Text(f"None of the cards tried holds it{suffix}.", "bold red")
        return
    yield Text(f"Cards that hold it{suffix}, cheapest per hour first, those without a dated price last.", "bold green")
    columns = [
        Column("card", wraps=True),
        Column("GPUs", right=True),
        Column("GiB used", right=True, optional=True),
        Column("requests", right=True),
        Column("tokens/s", right=True),
        Column("USD/h", right=True, optional=True),
        Column("price date", optional=True),
    ]
    yield Table(columns, [tuple(_placed(placed)) for placed in places.places])
    yield Text(
        "With several GPUs, GiB are per GPU and prices are for all of them. Speeds are ranges; --gpu shows their rates."
    )


def _placed(placed: CardFit) -> Iterator[str]:
    yield placed.gpu.name
    yield str(placed.tp)
    yield words.tenths(placed.answer.bytes.used)
    yield f"{placed.requests:,}"
    pace, price = placed.pace, placed.price
    yield rate(pace.tokens_per_second) if pace else "–"
    yield span((price.low, price.high)) if price else "–"
    yield price.date if price else ""


# --- JSON ----------------------------------------------------------------------------------------------------


def dump(asked: QuestionsReport) -> dict[str, Any]:
    q = asked.questions
    return {
        "fits": q.fits,
        "requests": q.requests._asdict(),
        "context": q.context._asdict(),
        "degrees": [_choice(choice) for choice in q.degrees],
        "placed": [_choice(choice) for choice in q.placed],
        "formats": [_choice(choice) for choice in q.formats],
        "caches": [_choice(choice) for choice in q.caches],
        "mildest": q.mildest.name if q.mildest else None,
        "fewest": int(q.fewest.name) if q.fewest else None,
        "decoding": _pace(q.decoding),
        "full": _pace(q.full),
        "prompt": _pace(q.prompt),
        "unpaced": q.unpaced,
    }


def _choice(choice: Variant) -> dict[str, Any]:
    answer, step = choice.answer, choice.step
    return {
        "name": choice.name,
        "refused": choice.refused,
        "fits": choice.fits,
        "weights": choice.weights,
        "requests": choice.requests,
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
        "tokens": pace.tokens,
        "requests": pace.requests,
        "tokens_per_second": pace.tokens_per_second._asdict(),
        "per_request": pace.per_request._asdict(),
        "bound": list(pace.bound),
        "weight_bytes": pace.work.bytes,
        "cache_bytes": list(pace.work.caches),
        "operations": pace.work.operations + pace.work.attending,
        "experts": list(pace.work.experts),
        "assumed": [row._asdict() for row in pace.assumed],
        "notes": list(pace.notes),
    }


def place_dump(places: Places) -> dict[str, Any]:
    return {
        "places": [
            {
                "gpu": placed.gpu.name,
                "gpus": placed.tp,
                "price": placed.price._asdict() if placed.price else None,
                "requests": placed.requests,
                "tokens_per_second": placed.pace.tokens_per_second._asdict() if placed.pace else None,
                **figures(placed.answer),
            }
            for placed in places.places
        ]
    }


def titles() -> list[str]:
    return ["gpu", "gpus", "used", "verdict", "requests", "low", "high", "usd_per_hour"]


def rows(places: Places) -> list[dict[str, object]]:
    """Return a CSV row per card; `low` and `high` are tokens per second."""
    return [dict(zip(titles(), _row(placed), strict=True)) for placed in places.places]


def _row(placed: CardFit) -> Iterator[object]:
    pace, price = placed.pace.tokens_per_second if placed.pace else None, placed.price
    yield from (placed.gpu.name, placed.tp, placed.answer.bytes.used, placed.answer.verdict.answer, placed.requests)
    yield from (round(pace.low, 2), round(pace.high, 2)) if pace else ("", "")
    yield price.low if price else ""
