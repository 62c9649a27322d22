"""The package's NamedTuple behaves as typing's."""

from __future__ import annotations

import copy
import pickle
import typing
from collections.abc import Callable
from typing import Any

import pytest

from memplan.core.records import NamedTuple
from tests.test_floors import FILES


class Standard(typing.NamedTuple):
    """A record."""

    size: int
    name: str = "x"
    parts: tuple[int, ...] = ()

    @property
    def twice(self) -> int:
        return 2 * self.size


class Record(NamedTuple):
    """A record."""

    size: int
    name: str = "x"
    parts: tuple[int, ...] = ()

    @property
    def twice(self) -> int:
        return 2 * self.size


class Narrower(Record):
    pass


USES: tuple[Callable[[Any], Any], ...] = (
    lambda kind: (kind(1), kind(2)),
    lambda kind: kind(1, parts=(2,)),
    lambda kind: kind(1)._replace(name="y"),
    lambda kind: kind(1)._asdict(),
    lambda kind: kind._make([1, "z", ()]),
    lambda kind: (kind._fields, kind._field_defaults, kind.__match_args__, kind.__doc__),
    lambda kind: (kind(3).twice, kind(3).size, kind(3)[0], hash(kind(3)), kind(3) == (3, "x", ())),
    lambda kind: pickle.loads(pickle.dumps(kind(1))) == copy.deepcopy(kind(1)) == kind(1),
)


@pytest.mark.parametrize("use", USES)
def test_a_record_is_a_named_tuple(use: Callable[[Any], Any]) -> None:
    assert repr(use(Record)) == repr(use(Standard)).replace("Standard", "Record")


@pytest.mark.parametrize(
    "use",
    [lambda kind: kind(), lambda kind: kind(1, 2, 3, 4), lambda kind: kind(1, other=2), lambda kind: kind._make([])],
)
def test_a_record_with_the_wrong_values_is_refused(use: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError):
        use(Record)
    with pytest.raises(TypeError):
        Record(1)._replace(unknown=2)  # pyright: ignore[reportCallIssue]


def test_a_subclass_has_the_fields() -> None:
    assert repr(Narrower(1)) == "Narrower(size=1, name='x', parts=())"
    assert type(Narrower(1)._replace(size=2)) is Narrower


def test_modules_define_named_tuples_the_cheap_way() -> None:
    texts = {name: path.read_text("utf-8") for name, path in FILES.items() if name != "core.records"}
    slow = {
        name for name, text in texts.items() if "(NamedTuple" in text and "core.records import NamedTuple" not in text
    }
    assert slow == set()
