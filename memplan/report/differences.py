"""What a report of a comparison says: what the runs are called, their figures side by side, why they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from memplan.catalogue.methods.methods import ADAPTERS
from memplan.core.errors import printable
from memplan.core.units import GIB, decimal, gib
from memplan.estimate.answer import Estimate
from memplan.planning.comparison import Change, Comparison, tensors
from memplan.report import assumptions as assumptions_
from memplan.report import wording as words

# What fields are called at the head of a column. Those in `_BARE` say by their value alone what they are.
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
_BARE = ("model", "method", "GPU", "optimizer", "storage")
NUMBER = "run"  # the heading of numbers
_LONGEST_NAME = 24


class Heading(NamedTuple):
    """One thing in which the runs differ, and what it is in each."""

    title: str
    cells: tuple[str, ...]


def headings(answers: Sequence[Estimate]) -> list[Heading]:
    """What was asked differently of the runs; their numbers first, unless one short thing tells them apart."""
    asked = [_leaves(answer.asked.model_dump(mode="json")) for answer in answers]
    decided = [_leaves(answer.run.model_dump(mode="json")) for answer in answers]
    paths = dict.fromkeys(path for leaves in asked for path in leaves)
    found = [
        Heading(_title(path), cells)
        for path in sorted(paths, key=_rank)
        if _differs(path, asked, answers) and _differs(path, decided, answers)
        for cells in [tuple(_cell(path, *both) for both in zip(answers, decided, strict=True))]
        if len(set(cells)) > 1
    ]
    alone = len(found) == 1 and len(set(found[0].cells)) == len(answers)
    if not alone or max(map(len, found[0].cells)) > _LONGEST_NAME:
        found.insert(0, Heading(NUMBER, tuple(str(n) for n, _ in enumerate(answers, 1))))
    return found


def _rank(path: str) -> int:
    """What is usually compared comes first, the rest in the order of a run's fields."""
    known = list(_TITLES)
    return known.index(path) if path in known else len(known)


def _title(path: str) -> str:
    return _TITLES.get(path) or path.rpartition(".")[2].replace("_", " ")


def _leaves(values: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """Every value of a run by its path; a model given by its config is one."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and name not in ("model", "options"):
            out.update(_leaves(cast(Mapping[str, Any], value), f"{start}{name}."))
        else:
            out[f"{start}{name}"] = value
    return out


def _differs(path: str, leaves: Sequence[Mapping[str, Any]], answers: Sequence[Estimate]) -> bool:
    """Whether those of the runs that it means something for say different things of it."""
    said = [of[path] for of, answer in zip(leaves, answers, strict=True) if path in of and _applies(path, answer)]
    return any(value != said[0] for value in said)


def _applies(path: str, answer: Estimate) -> bool:
    """Whether the run's method has a use for it."""
    kind = answer.run.method.kind
    if path == "method.trainable_layers":
        return kind == "freeze"
    if path == "method.quantization":
        return False  # its fields say more, and the method that there is one
    return not path.startswith("method.") or path in ("method.kind", "method.frozen") or kind in ADAPTERS


def _cell(path: str, answer: Estimate, leaves: Mapping[str, Any]) -> str:
    """A value in words; empty where the run has none of it."""
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
    """What sentences call each run: what only it is, or its number."""
    title, cells = headings(answers)[0]
    if title in _BARE:
        return [cell if cell not in ("", "none") else f"no {title}" for cell in cells]
    return [f"{cell} {title}" if title == "tokens" else f"{title} {cell}" for cell in cells]


def together(told: Told, called: Sequence[str]) -> str:
    """The names of the runs that something is so in.

    >>> together(Told((0, 2), ""), ["run 1", "run 2", "run 3"]), together(Told((0, 1), ""), ["lora", "full"])
    ('runs 1, 3', 'lora, full')
    """
    of = [called[n] for n in told.runs]
    if len(of) > 1 and all(name.startswith(f"{NUMBER} ") for name in of):
        return f"{NUMBER}s {', '.join(name.removeprefix(f'{NUMBER} ') for name in of)}"
    return ", ".join(of)


class Row(NamedTuple):
    """One line of figures: in each run, and in bytes less those of the first run. None where a run has none.

    `kind` is that of a category. `better`: more of it is better, not worse.
    """

    label: str
    cells: tuple[str, ...]
    changes: tuple[int | None, ...] = ()
    kind: str = ""
    better: bool = False


class Group(NamedTuple):
    """Rows that belong together, and what is said above them."""

    title: str
    rows: list[Row]


def groups(answers: Sequence[Estimate]) -> list[Group]:
    """All figures: what the comparison is about, what is used at the peak, the peaks by phase, what is beside."""
    found = (
        Group("", _verdicts(answers)),
        Group("at the peak, GiB", categories(answers)),
        Group("by phase, GiB", _phases(answers)),
        Group("", _others(answers)),
        Group("keys and values", _served(answers)),
    )
    return [group for group in found if group.rows]


def _verdicts(answers: Sequence[Estimate]) -> list[Row]:
    """Whether each fits, and how much is used of how much."""
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
    alike = gpus.count(gpus[0]) == len(gpus)  # said once, with what is the same for all
    return [row for row in rows if any(row.cells) and not (row.label == "usable" and alike)]


def categories(answers: Sequence[Estimate]) -> list[Row]:
    """What is allocated at the peak and of what kinds it is, then what is used beside it."""
    held = [answer.bytes for answer in answers]
    kinds = {kind: [answer.categories[kind] for answer in answers] for kind in words.CATEGORIES}
    return [
        _row("allocated", [b.allocated for b in held]),
        *(_row(words.CATEGORIES[kind], of, kind) for kind, of in kinds.items() if any(of)),
        _row("allocator's cache", [b.reserved - b.allocated for b in held], "allocator"),
        _row("CUDA context", [b.used - b.reserved for b in held], "context"),
    ]


def _phases(answers: Sequence[Estimate]) -> list[Row]:
    """The peak of each phase, of the first step or of later ones, whichever is larger."""
    peaks = [{row.phase: max(row.first, row.later) for row in words.phase_rows(answer)} for answer in answers]
    return [_row(name, [of.get(name) for of in peaks]) for name in dict.fromkeys(name for of in peaks for name in of)]


def _others(answers: Sequence[Estimate]) -> list[Row]:
    """What the hosts hold, where they hold something."""
    host = [answer.host_bytes for answer in answers]
    return [_row("GiB on the host", host)] if any(host) else []


def _served(answers: Sequence[Estimate]) -> list[Row]:
    """What the pools of serving engines hold, where there are any."""
    found = [answer.serving or {} for answer in answers]
    if not any(found):
        return []
    return [
        Row("tokens", tuple(f"{s['tokens']:,}" if s else "" for s in found)),
        Row("requests at once", tuple(f"{s['concurrency']:,.2f}" if s else "" for s in found)),
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
    """A difference of bytes in GiB with two decimals and its sign, without the unit. Empty for none.

    >>> signed(GIB + GIB // 4), signed(-GIB), signed(512), signed(-512), signed(0)
    ('+1.25', '-1.00', '+<0.01', '-<0.01', '')
    """
    if not n:
        return ""
    text = decimal(abs(n), GIB, 2)
    return f"{'+' if n > 0 else '-'}{'<0.01' if text == '0.00' else text}"


def largest(rows: Sequence[Row], run: int) -> Row | None:
    """The category in which a run differs most from the first; None where it differs in none."""
    found = max(rows, key=lambda row: abs(_change(row, run)))
    return found if _change(found, run) else None


def _change(row: Row, run: int) -> int:
    return (row.changes[run] or 0) if row.kind else 0


class Told(NamedTuple):
    """What is so in some of the runs: their places, and the text."""

    runs: tuple[int, ...]
    text: str


def _grouped(texts: Sequence[str]) -> list[Told]:
    """Every text once, with the runs it is of."""
    return [Told(tuple(n for n, t in enumerate(texts) if t == text), text) for text in dict.fromkeys(texts) if text]


def same(answers: Sequence[Estimate]) -> list[tuple[str, str]]:
    """What all the runs rest on alike, as pairs of a name and a text."""
    out = [(label, "; ".join(alike)) for label, alike, _ in _assumptions(answers) if alike]
    cards = {answer.gpu.name: words.card(answer) for answer in answers if answer.gpu}
    if len(cards) == 1 and all(answer.gpu for answer in answers):
        gpu = next(iter(cards.values()))
        out.append(("GPU", f"{gpu.title}, {words.tenths(gpu.usable)} GiB usable" if gpu else ""))
    return out


def differ(answers: Sequence[Estimate]) -> list[tuple[str, list[Told]]]:
    """What else differs in what the runs rest on, beside what their headings say."""
    heads = dict(headings(answers))
    out: list[tuple[str, list[Told]]] = []
    for label, _, apart in _assumptions(answers):
        said = heads.get(label, ("",) * len(answers))
        left = ["; ".join(p for p in parts if p != cell) for parts, cell in zip(apart, said, strict=True)]
        if any(left):
            out.append((label, _grouped(left)))
    return out


def _assumptions(answers: Sequence[Estimate]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Of each assumption its name, the parts that all runs have, and of each run those that some have not.

    Where a run would be left with none, no part counts as one of all.
    """
    texts = [dict(assumptions_.assumptions(answer)) for answer in answers]
    for label in dict.fromkeys(label for of in texts for label in of):
        parts = [of.get(label, "none").split("; ") for of in texts]
        alike = [part for part in parts[0] if all(part in of for of in parts)]
        apart = [[part for part in of if part not in alike] for of in parts]
        if any(apart) and not all(apart):
            alike, apart = list[str](), parts
        yield label, alike, apart


def moments(answers: Sequence[Estimate]) -> list[Told]:
    """When the peaks are, those at the same moment together."""
    return _grouped([words.moment(answer) for answer in answers])


def notes(answers: Sequence[Estimate]) -> list[Told]:
    """What was left out and what to know, each once."""
    own = [words.notes([answer]) for answer in answers]
    return [
        Told(tuple(n for n, of in enumerate(own) if note in of), note)
        for note in dict.fromkeys(note for of in own for note in of)
    ]


_MOST = 3  # categories or tensors in a sentence
_ENOUGH = 0.9  # of all the differences between two runs: those named make up so much of them


def reasons(comparison: Comparison, called: Sequence[str]) -> list[str]:
    """For each run but the first a sentence or two: how much more it uses, and what makes the difference."""
    rows = categories(comparison.answers)
    return [_reason(comparison, d.run, called, rows) for d in comparison.differences]


def _reason(comparison: Comparison, run: int, called: Sequence[str], rows: Sequence[Row]) -> str:
    first, answer = comparison.answers[0], comparison.answers[run]
    name, than = called[run], called[0]
    start = _capital(name) if name.startswith(f"{NUMBER} ") else name  # a model's or method's is as it is
    n = comparison.differences[run - 1].bytes["used"]
    amount = f"uses {gib(abs(n))} {'more' if n > 0 else 'less'} than {than}" if n else f"uses as much as {than}"
    apart = sorted((row for row in rows if _change(row, run)), key=lambda row: -abs(_change(row, run)))
    if not apart:
        return f"{start} {amount}, category by category."
    named: list[Row] = []
    whole = sum(abs(_change(row, run)) for row in apart)
    while len(named) < min(_MOST, len(apart)) and sum(abs(_change(row, run)) for row in named) < _ENOUGH * whole:
        named.append(apart[len(named)])
    most = ", ".join(f"{row.label} {signed(_change(row, run))}" for row in named)
    text = f"{start} {amount}: {most} GiB."
    least = abs(_change(apart[0], run)) // 20  # a tensor that makes less than this of a category's difference is none
    changes = [change for change in tensors(first, answer) if abs(change.after - change.before) > least]
    ways: tuple[tuple[str, Callable[[Change], bool]], ...] = (
        (f"only {than} has", lambda c: not c.after),
        (f"only {name} has", lambda c: not c.before),
        ("both have, of different sizes,", lambda c: bool(c.before and c.after)),
    )
    told = [f"{way} {_tensors(of)}" for way, wanted in ways if (of := [c for c in changes if wanted(c)])]
    return f"{text} {_capital('; '.join(told))}." if told else text


def _capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def _tensors(changes: Sequence[Change]) -> str:
    shown = [f"{words.times(c.line)}{c.line.what} ({_size(c)})" for c in changes[:_MOST]]
    more = f" and {len(changes) - _MOST} more" if len(changes) > _MOST else ""
    return f"{', '.join(shown)}{more}"


def _size(change: Change) -> str:
    if change.before and change.after:
        return f"{gib(change.before)} and {gib(change.after)}"
    return gib(change.before or change.after)
