"""Runs side by side: the answer of each, and its differences from the first.

Differences in bytes are exact subtractions of two answers: those of the categories sum to that of `allocated`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from memplan.core.errors import refused
from memplan.core.frozen import FrozenDict, frozen
from memplan.core.records import NamedTuple
from memplan.core.version import __version__
from memplan.estimate.answer import SCHEMA_VERSION, Estimate, Line
from memplan.estimate.estimate import estimate
from memplan.spec.run import RunSpec


class Difference(NamedTuple):
    """The differences between two answers of a comparison. Bytes are those of `run` minus those of `against`.

    run         index of the answer, from 0
    against     index of the answer it is compared with
    fields      the decided fields that differ, by path: the value in `against`, then in `run`
    bytes       allocated, reserved, used and host bytes
    categories  allocated bytes by kind of tensor
    """

    run: int
    against: int
    fields: dict[str, tuple[Any, Any]]
    bytes: dict[str, int]
    categories: dict[str, int]


class Comparison(NamedTuple):
    """Answers in the given order, and the difference of each later answer from the first."""

    answers: tuple[Estimate, ...]
    differences: tuple[Difference, ...]

    def model_dump(self) -> dict[str, Any]:
        """Return the comparison as a dict that follows its published schema."""
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
    """Estimate the runs and compare each with the first.

    Raises SpecError for fewer than two runs, and whatever `estimate` raises.
    """
    return compare_answers([estimate(run) for run in runs])


def compare_answers(answers: Sequence[Estimate]) -> Comparison:
    """Compare existing answers with the first of them. Raises SpecError for fewer than two."""
    if len(answers) < 2:
        raise refused("runs", f"a comparison takes two or more, not {len(answers)}")
    first = answers[0]
    return Comparison(
        tuple(answers),
        tuple(
            Difference(
                place,
                0,
                frozen(dict(_fields(first.run.model_dump(mode="json"), answer.run.model_dump(mode="json")))),
                _difference(_bytes(answer), _bytes(first)),
                _difference(answer.categories, first.categories),
            )
            for place, answer in enumerate(answers)
            if place
        ),
    )


def _fields(one: Mapping[str, Any], other: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the values that differ between two nested mappings, by path."""
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


def _difference(minuend: Mapping[str, int], subtrahend: Mapping[str, int]) -> dict[str, int]:
    return FrozenDict({name: n - subtrahend[name] for name, n in minuend.items()})


class Change(NamedTuple):
    """One kind of tensor at the peaks of two answers.

    line     its ledger line, from the second answer if that has one
    before   bytes in the first answer, 0 if absent
    after    bytes in the second answer, 0 if absent
    """

    line: Line
    before: int
    after: int


def changed_tensors(one: Estimate, other: Estimate) -> list[Change]:
    """Return the tensors whose bytes differ between the two peaks, largest difference first.

    Tensors are matched by name, place in the model and kind. The changes sum to the difference in allocated bytes.
    """
    changes: dict[tuple[str, str, str], Change] = {}
    for line in one.ledger:
        old = changes.get(_key(line), Change(line, 0, 0))
        changes[_key(line)] = old._replace(before=old.before + line.bytes)
    for line in other.ledger:
        old = changes.get(_key(line), Change(line, 0, 0))
        changes[_key(line)] = old._replace(line=old.line if old.after else line, after=old.after + line.bytes)
    changed = [change for change in changes.values() if change.before != change.after]
    return sorted(changed, key=lambda c: (-abs(c.after - c.before), c.line.where, c.line.what))


def _key(line: Line) -> tuple[str, str, str]:
    return line.what, line.where, line.kind
