"""Runs side by side: the answer of each, and what it differs in from the first.

Bytes of differences are subtractions of two answers, to the byte: those of categories sum to that of what is allocated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from memplan.core.errors import SpecError
from memplan.core.frozen import FrozenDict, frozen
from memplan.core.version import __version__
from memplan.estimate.answer import SCHEMA_VERSION, Estimate, Line
from memplan.estimate.estimate import estimate
from memplan.spec.run import RunSpec


class Difference(NamedTuple):
    """What the answer at place `run` of a comparison differs in from the one at place `against`; places start at 0.

    `fields` are those of the two runs that are not the same, every null filled in, by path: the value in `against`,
    then that in `run`. Bytes are those of `run` less those of `against`: allocated, reserved, used and host in `bytes`,
    what is allocated by kind of tensor in `categories`.
    """

    run: int
    against: int
    fields: dict[str, tuple[Any, Any]]
    bytes: dict[str, int]
    categories: dict[str, int]


class Comparison(NamedTuple):
    """Answers in the order asked, and the difference of each but the first from the first."""

    answers: tuple[Estimate, ...]
    differences: tuple[Difference, ...]

    def model_dump(self) -> dict[str, Any]:
        """The comparison as its published schema has it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "memplan_version": __version__,
            "answers": [answer.model_dump() for answer in self.answers],
            "differences": [
                {
                    "run": d.run,
                    "against": d.against,
                    "fields": {path: list(values) for path, values in d.fields.items()},
                    "bytes": dict(d.bytes),
                    "categories": dict(d.categories),
                }
                for d in self.differences
            ],
        }

    def model_dump_json(self, indent: int | None = None) -> str:
        return json.dumps(self.model_dump(), indent=indent, ensure_ascii=False)


def compare(runs: Sequence[RunSpec]) -> Comparison:
    """The runs' answers, and what each differs in from the first.

    Raises SpecError for fewer than two runs, and what `estimate` raises for a run that cannot be answered.
    """
    return compared([estimate(run) for run in runs])


def compared(answers: Sequence[Estimate]) -> Comparison:
    """The same of answers that are there already. Raises SpecError for fewer than two."""
    if len(answers) < 2:
        raise SpecError(f"runs: a comparison takes two or more, not {len(answers)}", "runs")
    first = answers[0]
    return Comparison(
        tuple(answers),
        tuple(
            Difference(
                place,
                0,
                frozen(dict(_fields(first.run.model_dump(mode="json"), answer.run.model_dump(mode="json")))),
                _less(_bytes(answer), _bytes(first)),
                _less(answer.categories, first.categories),
            )
            for place, answer in enumerate(answers)
            if place
        ),
    )


def _fields(one: Mapping[str, Any], other: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Values that differ in two nested mappings, by path."""
    for name in {**one, **other}:
        a: Any = one.get(name)
        b: Any = other.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            inner = cast(tuple[Mapping[str, Any], Mapping[str, Any]], (a, b))
            yield from _fields(*inner, f"{start}{name}.")
        elif a != b:
            yield f"{start}{name}", (a, b)


def _bytes(answer: Estimate) -> dict[str, int]:
    return {**answer.bytes.as_dict(), "host": answer.host_bytes}


def _less(these: Mapping[str, int], those: Mapping[str, int]) -> dict[str, int]:
    return FrozenDict({name: n - those[name] for name, n in these.items()})


class Change(NamedTuple):
    """One kind of tensor at the two peaks: its bytes in one answer and in the other, 0 where there is none.

    `line` is of the ledger that has it, of the other answer's where both have.
    """

    line: Line
    before: int
    after: int


def tensors(one: Estimate, other: Estimate) -> list[Change]:
    """The tensors that do not take the same at the two peaks, those that differ most first.

    Tensors are the same where their name, their place in the model and their kind are. Sums to the difference of what
    is allocated.
    """
    found: dict[tuple[str, str, str], Change] = {}
    for line in one.ledger:
        old = found.get(_key(line), Change(line, 0, 0))
        found[_key(line)] = old._replace(before=old.before + line.bytes)
    for line in other.ledger:
        old = found.get(_key(line), Change(line, 0, 0))
        found[_key(line)] = old._replace(line=old.line if old.after else line, after=old.after + line.bytes)
    changed = [change for change in found.values() if change.before != change.after]
    return sorted(changed, key=lambda c: (-abs(c.after - c.before), c.line.where, c.line.what))


def _key(line: Line) -> tuple[str, str, str]:
    return line.what, line.where, line.kind
