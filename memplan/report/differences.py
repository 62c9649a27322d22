"""Content of comparison reports: the names of the runs, their figures side by side, and why they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from memplan.catalogue.methods.methods import ADAPTERS
from memplan.core.errors import printable
from memplan.core.records import NamedTuple
from memplan.core.units import GIB, decimal, gib
from memplan.estimate.answer import Estimate
from memplan.planning.comparison import Change, Comparison, changed_tensors
from memplan.report import assumptions as assumptions_
from memplan.report import wording as words

# Column headings by field. Values of those in `_SELF_EXPLANATORY` need no heading.
_TITLES = {
    "model": "model",
    "method.kind": "method",
    "gpu": "GPU",
    "batch.micro": "batch",
    "batch.sequence": "tokens",
    "optimizer.name": "optimizer",
    "precision.weights": "weights",
    "precision.grads": "gradients in",
    "precision.master": "master weights",
    "method.trainable_layers": "layers trained",
    "method.quantization.format": "storage",
}
_SELF_EXPLANATORY = ("model", "method", "GPU", "optimizer", "storage")
NUMBER = "run"  # heading of the runs' numbers
_MAX_NAME_LENGTH = 24


class ComparisonHeading(NamedTuple):
    """A field in which the runs differ, and its value in each run."""

    title: str
    cells: tuple[str, ...]


def headings(answers: Sequence[Estimate]) -> list[ComparisonHeading]:
    """Return the fields that the user set differently; the runs' numbers come first unless one short field suffices."""
    asked = [_leaves(answer.asked.model_dump(mode="json")) for answer in answers]
    decided = [_leaves(answer.run.model_dump(mode="json")) for answer in answers]
    paths = dict.fromkeys(path for leaves in asked for path in leaves)
    heads = [
        ComparisonHeading(_title(path), cells)
        for path in sorted(paths, key=_rank)
        if _differs(path, asked, answers) and _differs(path, decided, answers)
        for cells in [tuple(_cell(path, *both) for both in zip(answers, decided, strict=True))]
        if len(set(cells)) > 1
    ]
    suffices = len(heads) == 1 and len(set(heads[0].cells)) == len(answers)
    if not suffices or max(map(len, heads[0].cells)) > _MAX_NAME_LENGTH:
        heads.insert(0, ComparisonHeading(NUMBER, tuple(str(n) for n, _ in enumerate(answers, 1))))
    return heads


def _rank(path: str) -> int:
    """Sort key: what is usually compared comes first, the rest keeps the order of a run's fields."""
    known = list(_TITLES)
    return known.index(path) if path in known else len(known)


def _title(path: str) -> str:
    return _TITLES.get(path) or path.rpartition(".")[2].replace("_", " ")


def _leaves(values: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """Return every value of a run by its path; a model given by its config counts as one value."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and name not in ("model", "options"):
            out.update(_leaves(cast(Mapping[str, Any], value), f"{start}{name}."))
        else:
            out[f"{start}{name}"] = value
    return out


def _differs(path: str, leaves: Sequence[Mapping[str, Any]], answers: Sequence[Estimate]) -> bool:
    """Whether the field differs among the runs it applies to."""
    values = [
        by_path[path]
        for by_path, answer in zip(leaves, answers, strict=True)
        if path in by_path and _applies(path, answer)
    ]
    return any(value != values[0] for value in values)


def _applies(path: str, answer: Estimate) -> bool:
    """Whether the run's method uses the field."""
    kind = answer.run.method.kind
    if path == "method.trainable_layers":
        return kind == "freeze"
    if path == "method.quantization":
        return False  # its fields and the method say more
    return not path.startswith("method.") or path in ("method.kind", "method.frozen") or kind in ADAPTERS


def _cell(path: str, answer: Estimate, leaves: Mapping[str, Any]) -> str:
    """Format a value; empty if it does not apply to the run."""
    if path == "model":
        return words.model(answer)
    if path not in leaves or not _applies(path, answer):
        return ""
    value: object = leaves[path]
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return printable(", ".join(map(str, cast(list[object], value))))
    return printable(str(value), 200)


def names(answers: Sequence[Estimate]) -> list[str]:
    """Return a name for each run in sentences: its distinguishing value, or its number."""
    title, cells = headings(answers)[0]
    if title in _SELF_EXPLANATORY:
        return [cell if cell not in ("", "none") else f"no {title}" for cell in cells]
    return [f"{cell} {title}" if title == "tokens" else f"{title} {cell}" for cell in cells]


def together(told: SharedText, called: Sequence[str]) -> str:
    """Join the names of the runs that a text applies to.

    >>> together(SharedText((0, 2), ""), ["run 1", "run 2", "run 3"])
    'runs 1, 3'
    >>> together(SharedText((0, 1), ""), ["lora", "full"])
    'lora, full'
    """
    names = [called[n] for n in told.runs]
    if len(names) > 1 and all(name.startswith(f"{NUMBER} ") for name in names):
        return f"{NUMBER}s {', '.join(name.removeprefix(f'{NUMBER} ') for name in names)}"
    return ", ".join(names)


class Row(NamedTuple):
    """One line of figures.

    cells     the figure of each run
    changes   bytes of each run minus those of the first; None if a run has none
    kind      the category's kind, if it is one
    better    whether more is better
    """

    label: str
    cells: tuple[str, ...]
    changes: tuple[int | None, ...] = ()
    kind: str = ""
    better: bool = False


class Group(NamedTuple):
    """Rows that belong together, and their title."""

    title: str
    rows: list[Row]


def groups(answers: Sequence[Estimate]) -> list[Group]:
    """Return all figures: verdicts, memory at the peak, peaks by phase, host memory, and serving pools."""
    all_groups = (
        Group("", _verdicts(answers)),
        Group("at the peak, GiB", categories(answers)),
        Group("by phase, GiB", _phases(answers)),
        Group("", _others(answers)),
        Group("keys and values", _served(answers)),
    )
    return [group for group in all_groups if group.rows]


def _verdicts(answers: Sequence[Estimate]) -> list[Row]:
    """Return whether each run fits, and how much it uses of how much."""
    gpus = [answer.gpu.usable if answer.gpu else None for answer in answers]
    coverage = {f"{answer.band.coverage:.0%} of runs" for answer in answers}
    rows = [
        Row("answer", tuple(answer.verdict.answer or "" for answer in answers)),
        _row("GiB used", [answer.bytes.used for answer in answers]),
        _row("usable", gpus, better=True),
        _row("headroom", [answer.verdict.headroom for answer in answers], better=True),
        Row(
            coverage.pop() if len(coverage) == 1 else "most runs",
            tuple(f"{words.tenths(answer.band.low)} to {words.tenths(answer.band.high)}" for answer in answers),
        ),
    ]
    same_gpu = gpus.count(gpus[0]) == len(gpus)  # then it is listed under what is the same for all
    return [row for row in rows if any(row.cells) and not (row.label == "usable" and same_gpu)]


def categories(answers: Sequence[Estimate]) -> list[Row]:
    """Return what is allocated at the peak, by kind, then the allocator's cache and the CUDA context."""
    held = [answer.bytes for answer in answers]
    kinds = {kind: [answer.categories[kind] for answer in answers] for kind in words.CATEGORIES}
    return [
        _row("allocated", [b.allocated for b in held]),
        *(_row(words.CATEGORIES[kind], values, kind) for kind, values in kinds.items() if any(values)),
        _row("allocator's cache", [b.reserved - b.allocated for b in held], "allocator"),
        _row("CUDA context", [b.used - b.reserved for b in held], "context"),
    ]


def _phases(answers: Sequence[Estimate]) -> list[Row]:
    """Return the peak of each phase, in the first step or in later ones, whichever is larger."""
    peaks = [{row.phase: max(row.first, row.later) for row in words.phase_rows(answer)} for answer in answers]
    phases = dict.fromkeys(phase for by_phase in peaks for phase in by_phase)
    return [_row(phase, [by_phase.get(phase) for by_phase in peaks]) for phase in phases]


def _others(answers: Sequence[Estimate]) -> list[Row]:
    """Return the host memory, if any is used."""
    host = [answer.host_bytes for answer in answers]
    return [_row("GiB on the host", host)] if any(host) else []


def _served(answers: Sequence[Estimate]) -> list[Row]:
    """Return what the pools of serving engines hold, if there are any."""
    pools = [answer.serving or {} for answer in answers]
    if not any(pools):
        return []
    return [
        Row("tokens", tuple(f"{s['tokens']:,}" if s else "" for s in pools)),
        Row("requests at once", tuple(f"{s['concurrency']:,.2f}" if s else "" for s in pools)),
    ]


def _row(label: str, values: Sequence[int | None], kind: str = "", better: bool = False) -> Row:
    first = values[0]
    return Row(
        label,
        tuple("" if n is None else words.hundredths(n) for n in values),
        tuple(None if n is None or first is None else n - first for n in values),
        kind,
        better,
    )


def signed(n: int | None) -> str:
    """Format a difference of bytes in GiB with two decimals and its sign, without the unit; empty for none.

    >>> signed(GIB + GIB // 4), signed(-GIB), signed(512), signed(-512), signed(0)
    ('+1.25', '-1.00', '+<0.01', '-<0.01', '')
    """
    if not n:
        return ""
    text = decimal(abs(n), GIB, 2)
    return f"{'+' if n > 0 else '-'}{'<0.01' if text == '0.00' else text}"


def largest(rows: Sequence[Row], run: int) -> Row | None:
    """Return the category in which a run differs most from the first; None if it differs in none."""
    row = max(rows, key=lambda row: abs(_change(row, run)))
    return row if _change(row, run) else None


def _change(row: Row, run: int) -> int:
    return (row.changes[run] or 0) if row.kind else 0


class SharedText(NamedTuple):
    """A text that applies to some of the runs, given by their indices."""

    runs: tuple[int, ...]
    text: str


def _grouped(texts: Sequence[str]) -> list[SharedText]:
    """Return every text once, with the runs it applies to."""
    return [
        SharedText(tuple(n for n, t in enumerate(texts) if t == text), text) for text in dict.fromkeys(texts) if text
    ]


def same(answers: Sequence[Estimate]) -> list[tuple[str, str]]:
    """Return the assumptions that all runs share, as pairs of a name and a text."""
    out = [(label, "; ".join(alike)) for label, alike, _ in _assumptions(answers) if alike]
    cards = {answer.gpu.name: words.card(answer) for answer in answers if answer.gpu}
    if len(cards) == 1 and all(answer.gpu for answer in answers):
        gpu = next(iter(cards.values()))
        out.append(("GPU", f"{gpu.title}, {words.tenths(gpu.usable)} GiB usable" if gpu else ""))
    return out


def differ(answers: Sequence[Estimate]) -> list[tuple[str, list[SharedText]]]:
    """Return the other assumptions that differ, without what the headings already show."""
    heads = dict(headings(answers))
    out: list[tuple[str, list[SharedText]]] = []
    for label, _, apart in _assumptions(answers):
        shown = heads.get(label, ("",) * len(answers))
        rest = ["; ".join(p for p in parts if p != cell) for parts, cell in zip(apart, shown, strict=True)]
        if any(rest):
            out.append((label, _grouped(rest)))
    return out


def _assumptions(answers: Sequence[Estimate]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield each assumption's name, the parts that all runs share, and the other parts of each run.

    If a run would have no other parts, none count as shared.
    """
    texts = [dict(assumptions_.assumptions(answer)) for answer in answers]
    for label in dict.fromkeys(label for by_label in texts for label in by_label):
        parts = [by_label.get(label, "none").split("; ") for by_label in texts]
        alike = [part for part in parts[0] if all(part in of_run for of_run in parts)]
        apart = [[part for part in of_run if part not in alike] for of_run in parts]
        if any(apart) and not all(apart):
            alike, apart = list[str](), parts
        yield label, alike, apart


def moments(answers: Sequence[Estimate]) -> list[SharedText]:
    """Return the moments of the peaks, grouping runs that share one."""
    return _grouped([words.moment(answer) for answer in answers])


def notes(answers: Sequence[Estimate]) -> list[SharedText]:
    """Return every note once, with the runs it applies to."""
    by_run = [words.notes([answer]) for answer in answers]
    return [
        SharedText(tuple(n for n, notes_ in enumerate(by_run) if note in notes_), note)
        for note in dict.fromkeys(note for notes_ in by_run for note in notes_)
    ]


_MAX_NAMED = 3  # categories or tensors in a sentence
_NAMED_SHARE = 0.9  # share of all differences that the named categories explain


def reasons(comparison: Comparison, called: Sequence[str]) -> list[str]:
    """Return a sentence or two per later run: how much more than the first it uses, and why."""
    rows = categories(comparison.answers)
    return [_reason(comparison, d.run, called, rows) for d in comparison.differences]


def _reason(comparison: Comparison, run: int, called: Sequence[str], rows: Sequence[Row]) -> str:
    first, answer = comparison.answers[0], comparison.answers[run]
    name, than = called[run], called[0]
    start = _capital(name) if name.startswith(f"{NUMBER} ") else name  # names of models and methods keep their case
    n = comparison.differences[run - 1].bytes["used"]
    amount = f"uses {gib(abs(n))} {'more' if n > 0 else 'less'} than {than}" if n else f"uses as much as {than}"
    apart = sorted((row for row in rows if _change(row, run)), key=lambda row: -abs(_change(row, run)))
    if not apart:
        return f"{start} {amount}, category by category."
    named: list[Row] = []
    total = sum(abs(_change(row, run)) for row in apart)
    while (
        len(named) < min(_MAX_NAMED, len(apart)) and sum(abs(_change(row, run)) for row in named) < _NAMED_SHARE * total
    ):
        named.append(apart[len(named)])
    most = ", ".join(f"{row.label} {signed(_change(row, run))}" for row in named)
    text = f"{start} {amount}: {most} GiB."
    least = abs(_change(apart[0], run)) // 20  # smaller differences of tensors are not worth naming
    changes = [change for change in changed_tensors(first, answer) if abs(change.after - change.before) > least]
    ways: tuple[tuple[str, Callable[[Change], bool]], ...] = (
        (f"only {than} has", lambda c: not c.after),
        (f"only {name} has", lambda c: not c.before),
        ("both have, of different sizes,", lambda c: bool(c.before and c.after)),
    )
    clauses = [f"{way} {_tensors(matching)}" for way, wanted in ways if (matching := [c for c in changes if wanted(c)])]
    return f"{text} {_capital('; '.join(clauses))}." if clauses else text


def _capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def _tensors(changes: Sequence[Change]) -> str:
    shown = [f"{words.times(c.line)}{c.line.what} ({_size(c)})" for c in changes[:_MAX_NAMED]]
    more = f" and {len(changes) - _MAX_NAMED} more" if len(changes) > _MAX_NAMED else ""
    return f"{', '.join(shown)}{more}"


def _size(change: Change) -> str:
    if change.before and change.after:
        return f"{gib(change.before)} and {gib(change.after)}"
    return gib(change.before or change.after)
