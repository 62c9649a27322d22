"""A change's saving, time and effect on the result, as text and for JSON, and the lines that write it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import floor, log10
from typing import Any

from memplan.catalogue.profiles.costs import LeverCost
from memplan.core.units import GIB, gib
from memplan.estimate.answer import Estimate
from memplan.estimate.demand import Demand
from memplan.frameworks import Lines, lines
from memplan.planning.levers import Lever
from memplan.planning.plan import SEVERITIES, Effect, Proposal, Time
from memplan.planning.step_time import Range
from memplan.report.blocks import Block, Heading, Pairs, Paste
from memplan.report.wording import hundredths, on_host, tenths
from memplan.spec.run import RunSpec

BASIS = {"derived": "counted", "measured": "measured", "assumed": "assumed"}


def state(answer: Estimate) -> str:
    """Return a short verdict: "fits, 11.0 of 11.7 GiB used, 0.7 free"."""
    used, headroom = tenths(answer.bytes.used), answer.verdict.headroom
    if answer.gpu is None or headroom is None:
        return f"{used} GiB used"
    left = f"{tenths(headroom)} free" if headroom >= 0 else f"{tenths(-headroom)} too much"
    each = " on each" if answer.gpu.count > 1 else ""
    return f"{answer.verdict.answer}, {used} of {tenths(answer.gpu.usable)} GiB used, {left}{each}"


def conditions(demand: Demand, start: str = "") -> str:
    """Return the conditions other than fitting in parentheses; empty if there are none."""
    conditions = [f"{gib(demand.headroom)} free"] if demand.headroom else []
    conditions += ["tight counts as fitting"] if demand.tight else []
    return f" ({start}{', '.join(conditions)})" if conditions else ""


def times(time: Time | None) -> str:
    """Return the change in step time as text.

    >>> times(Time(1.018, 1.2, "derived")), times(Time(1.001, 1.004, "assumed")), times(Time(1.0, 12.34, "assumed"))
    ('1.02 to 1.20 times as long (counted)', 'unchanged (assumed)', '1.0 to 12.3 times as long (assumed)')
    """
    if time is None:
        return "unknown: the catalogue has no rate for this card"
    span = factors(time)
    text = "unchanged" if span == "1.00" else f"{span} times as long"
    return f"{text} ({BASIS[time.basis]})"


def factors(time: Time | None, between: str = " to ") -> str:
    """Return the change in step time as a range of factors; empty if unknown."""
    if time is None:
        return ""
    digits = 2 if time.high < 10 else 1
    low, high = (f"{n:.{digits}f}" for n in time[:2])
    return low if low == high else f"{low}{between}{high}"


def saved(effect: Effect) -> str:
    """Return the savings in used bytes and by phase: "1.50 GiB used; allocated in loss 1.96, backward 1.50"."""
    by_phase = [f"{phase} {signed(n)}" for phase, n in effect.phases.items() if abs(n) >= GIB // 100]
    text = f"{signed(freed(effect))} GiB used"
    return f"{text}; allocated in {', '.join(by_phase)}" if by_phase else text


def freed(effect: Effect) -> int:
    """Return the used bytes that a change saves; negative if it needs more."""
    return effect.before.bytes.used - effect.after.bytes.used


def signed(n: int) -> str:
    """Format signed bytes in GiB."""
    return hundredths(n) if n >= 0 else f"-{hundredths(-n)}"


def titles(levers: Sequence[Lever]) -> str:
    """Return the names of levers as one: "a chunked loss and rank 8"."""
    *others, last = [lever.title for lever in levers]
    return f"{', '.join(others)} and {last}" if others else last


def proposed(
    proposal: Proposal, asked: RunSpec, number: str, *, explain: bool, full: bool, to_paste: bool = True
) -> Iterator[Block]:
    """Yield what a proposal changes, saves and costs; `explain` adds sources.

    to_paste  whether to show each framework's lines, which are blocks to paste if `full`
    """
    yield Heading(f"{number}{titles(proposal.levers)}: {state(proposal.answer)}")
    are_several = len(proposal.levers) > 1
    saves = [f"{e.lever.title}: {saved(e)}" if are_several else saved(e) for e in proposal.effects]
    rows = [("" if n else "saves", text) for n, text in enumerate(saves)]
    host, ranks = proposal.answer.host_bytes, proposal.answer.host.ranks
    of_each = f", {gib(host)} of each of {ranks} processes" if ranks > 1 else ""
    rows += [("host", f"{gib(on_host(proposal.answer))} in the host's memory{of_each}")] if host else []
    rows += [("time", times(proposal.time)), ("result", SEVERITIES[proposal.severity])]
    rows += [("", text) for text in qualities(proposal.levers, explain=explain)]
    if explain:
        sources = [cost.time_source for cost in _costs(proposal.levers)]
        rows += [("" if n else "time's source", source) for n, source in enumerate(sources)]
    own, *frameworks = lines(asked, proposal.run)
    frameworks = frameworks if to_paste else []
    rows += option_rows(own, without=own.note)
    yield Pairs(rows)
    if full:
        yield from (Paste(config.title, config.lines, config.note) for config in frameworks)


def option_rows(own: Lines, without: str = "") -> list[tuple[str, str]]:
    """Return memplan's options for a change, or `without` if it needs none, and the note on them."""
    text = " ".join(own.lines) or without
    return [("options", text), *([("", own.note)] if own.note and own.note != text else [])]


def _costs(levers: Iterable[Lever]) -> Iterable[LeverCost]:
    return dict.fromkeys(cost for lever in levers for cost in lever.costs)


def qualities(levers: Iterable[Lever], *, explain: bool) -> list[str]:
    """Return a sentence per change about its effect on the result, with the source if `explain` is true."""
    return [f"{cost.quality} [{cost.quality_source}]" if explain else cost.quality for cost in _costs(levers)]


def span(of: Range | tuple[float, float]) -> str:
    """Format a range of amounts; small ones keep two significant digits.

    >>> span((0.0056, 0.0095)), span((1, 2.5)), span((120, 3000)), span((0, 0.5)), span((2, 2))
    ('0.0056–0.0095', '1.00–2.50', '120–3,000', '0.00–0.50', '2.00')
    """
    high = of[-1]
    digits = 0 if high >= 100 else (2 if high >= 1 or high <= 0 else max(2, 1 - floor(log10(high))))
    low, high = (f"{n:,.{digits}f}" for n in (of[0], of[-1]))
    return low if low == high else f"{low}–{high}"


_UNITS = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"))


def duration(seconds: Range) -> str:
    """Format a range of seconds in the unit that suits its usual figure.

    >>> duration(Range(133.4, 172.1, 228.3)), duration(Range(2e5, 3e5, 4e5)), duration(Range(0.2, 0.35, 0.5))
    ('2.2–3.8 min', '2.3–4.6 days', '200–500 ms')
    """
    size, unit = next((pair for pair in _UNITS if seconds.usual >= pair[0]), _UNITS[-1])
    low, high = seconds.low / size, seconds.high / size
    digits = 0 if high >= 100 else 1
    first, last = f"{low:,.{digits}f}", f"{high:,.{digits}f}"
    return f"{first if first == last else f'{first}–{last}'} {unit}"


# --- JSON ----------------------------------------------------------------------------------------------------


def picked(record: object, *names: str) -> dict[str, Any]:
    """Return some fields of a record by name, those that are records themselves as dicts."""
    values = {name: getattr(record, name) for name in names}
    return {name: value._asdict() if hasattr(value, "_asdict") else value for name, value in values.items()}


def figures(answer: Estimate) -> dict[str, Any]:
    """Return the decided run, its bytes and its verdict."""
    return {
        "run": answer.run.model_dump(mode="json"),
        "bytes": answer.bytes.as_dict(),
        "verdict": answer.verdict.as_dict(),
    }


def lever_dump(effect: Effect) -> dict[str, Any]:
    lever = effect.lever
    return {
        "keys": list(lever.keys),
        "title": lever.title,
        "saves": effect.saves,
        "phases": effect.phases,
        "time": time_dump(effect.time),
        "severity": lever.severity,
        "quality": "; ".join(cost.quality for cost in lever.costs),
        "quality_source": "; ".join(dict.fromkeys(cost.quality_source for cost in lever.costs)),
    }


def time_dump(time: Time | None) -> dict[str, Any] | None:
    return None if time is None else time._asdict()


def change_dump(asked: RunSpec, changed: RunSpec) -> dict[str, Any]:
    """Return how to write a change: memplan's options, each framework's lines, and notes on them."""
    own, *frameworks = lines(asked, changed)
    return {
        "options": " ".join(own.lines),
        "lines": {config.framework: list(config.lines) for config in frameworks},
        "notes": {config.framework: config.note for config in (own, *frameworks) if config.note},
    }


def proposal_dump(proposal: Proposal, asked: RunSpec) -> dict[str, Any]:
    return {
        "levers": [lever_dump(effect) for effect in proposal.effects],
        **change_dump(asked, proposal.run),
        **figures(proposal.answer),
        "saves": proposal.saves,
        "host_bytes": on_host(proposal.answer),
        "time": time_dump(proposal.time),
        "severity": proposal.severity,
    }
