"""Why a run takes more or less than before: the changed value that, put back alone, takes most of the change away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeAlias, cast

from memplan.core.errors import MemplanError
from memplan.core.records import NamedTuple
from memplan.frameworks.reading.run_file import nested, read_as
from memplan.gate.origin import places
from memplan.gate.rows import CheckedRun, ReadRun, fields_of

Kind = Literal["value", "framework", "memplan", "limit"]
Flat: TypeAlias = dict[str, Any]  # dotted path of a field -> its value
_MISSING: Any = object()


class ValueChange(NamedTuple):
    """A key, or a field without one, whose value differs; None where it is not given. `line` is in the head's file, or
    in the base's for a key that is gone."""

    key: str
    before: Any
    after: Any
    file: str = ""
    line: int | None = None


class Cause(NamedTuple):
    """Something that changed, and the bytes of the change that are gone if it is put back alone."""

    kind: Kind
    changes: tuple[ValueChange, ...]
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "changes": [each._asdict() for each in self.changes]}


class _Candidate(NamedTuple):
    """Values that changed together, and the run's fields with these put back; a missing field is left out."""

    kind: Kind
    changes: tuple[ValueChange, ...]
    put_back: Mapping[str, Any]


class RowOfSide(NamedTuple):
    """A row, how its file was read, if it was, and the version of memplan that answered it."""

    row: CheckedRun
    read: ReadRun | None
    version: str
    number: int | None = None


def causes(base: RowOfSide, head: RowOfSide, peak: Callable[[Mapping[str, Any]], int | None]) -> tuple[Cause, ...]:
    """Return why the head takes another number of bytes, the cause of most of it first.

    peak  returns what a run with some fields takes, on the head's GPU and by its band; None if it cannot be answered
    """
    change = head.row.peak - base.row.peak
    has_reads = base.read is not None and head.read is not None
    before, after = (
        _flat(side.read.fields if has_reads and side.read is not None else side.row.fields) for side in (base, head)
    )
    found: list[Cause] = []
    candidates = list(_candidates(base, head, before, after))
    for each in candidates:
        put_back = {path: value for path, value in {**after, **each.put_back}.items() if value is not _MISSING}
        if put_back == before and base.version == head.version:
            found.append(Cause(each.kind, each.changes, change))
            continue
        without = peak(nested(put_back))
        if without is not None and without != head.row.peak:
            found.append(Cause(each.kind, each.changes, head.row.peak - without))
    if base.version != head.version:
        again = peak(nested(before)) if candidates else head.row.peak
        if again is not None and again != base.row.peak:
            versions = (ValueChange("memplan", base.version, head.version),)
            found.append(Cause("memplan", versions, again - base.row.peak))
    found = [cause for cause in found if cause.bytes]
    sign = 1 if change > 0 else -1
    found.sort(key=lambda cause: -cause.bytes * sign)
    if change and candidates and (not found or found[0].bytes * sign <= 0):  # only all of them together
        every = tuple(each for candidate in candidates for each in candidate.changes)
        found.insert(0, Cause("value", every, change))
    return _with_limit(found, base.row, head.row)


def _with_limit(found: list[Cause], base: CheckedRun, head: CheckedRun) -> tuple[Cause, ...]:
    """Return the causes with that of another limit: first if the base would not hold it."""
    if base.limit == head.limit:
        return tuple(found)
    limit = Cause("limit", (ValueChange("fail", base.limit_text, head.limit_text),), head.limit - base.limit)
    return (limit, *found) if base.peak > head.limit or not found else (*found, limit)


def _flat(fields: Mapping[str, Any], start: str = "") -> Flat:
    """Return fields by their dotted paths. A model is one value."""
    out: Flat = {}
    for name, value in fields.items():
        if isinstance(value, Mapping) and value and f"{start}{name}" != "model":
            out |= _flat(cast(Mapping[str, Any], value), f"{start}{name}.")
        else:
            out[f"{start}{name}"] = list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
    return out


def _differing(one: Flat, other: Flat) -> Flat:
    """Return the fields of `one` that are not those of `other`, and as missing those that `one` has not."""
    paths = dict.fromkeys((*one, *other))
    return {p: one.get(p, _MISSING) for p in paths if one.get(p, _MISSING) != other.get(p, _MISSING)}


def _candidates(base: RowOfSide, head: RowOfSide, before: Flat, after: Flat) -> Iterator[_Candidate]:
    """Yield what changed: keys, as the framework reads the file with one of them put back; then fields that no such key
    explains, in the groups that they are set in."""
    left = _differing(before, after)
    for each in _of_keys(base, head):
        left = {path: value for path, value in left.items() if path not in each.put_back}
        yield each
    yield from _of_fields(base.row, head.row, left, after)


def _of_keys(base: RowOfSide, head: RowOfSide) -> Iterator[_Candidate]:
    if base.read is None or head.read is None:
        return
    old, new = base.read.file.source, head.read.file.source
    if old is None or new is None or old.form.name != new.form.name:
        return
    was, now = old.keys, new.keys
    changed = [key for key in dict.fromkeys((*now, *was)) if was.get(key) != now.get(key)]
    if not changed and old.asked == new.asked:
        return
    as_read = _read_again(head, new)
    if as_read is None:
        return
    for key in changed:
        again = _read_again(head, new.with_key(key, was.get(key)))
        put_back = _differing(again, as_read) if again is not None else {}
        if put_back:
            document, run = (new.document, head.row.run) if key in now else (old.document, base.row.run)
            line = document.where(key).rpartition(":")[2]
            at = int(line) if line.isdecimal() and document.name == run.rpartition("/")[2] else None
            yield _Candidate("value", (ValueChange(key, was.get(key), now.get(key), run, at),), put_back)
    if old.asked != new.asked:
        again = _read_again(head, new._replace(asked=old.asked))
        put_back = _differing(again, as_read) if again is not None else {}
        if put_back:
            titles = ValueChange("framework", base.row.title, head.row.title)
            yield _Candidate("framework", (titles,), put_back)


def _read_again(head: RowOfSide, source: Any) -> Flat | None:
    """Return the fields of a file with other keys; None if the framework does not take them."""
    try:
        return _flat(fields_of(read_as(*source), head.number))
    except (MemplanError, ValueError):
        return None


def _of_fields(base: CheckedRun, head: CheckedRun, left: Flat, after: Flat) -> Iterator[_Candidate]:
    """Yield fields that changed together: those whose origins name the same key, or that a framework's version sets."""
    was = {each.key: each for each in base.keys}
    now = {each.key: each for each in head.keys}
    whys = [{origin.field: origin.why for origin in row.origins} for row in (base, head)]
    groups: list[tuple[set[str], list[str]]] = []
    for path in left:
        named = {place.key for why in whys for place in places(_origin(why, path), "")}
        changed = {key for key in named if _value(was, key) != _value(now, key)} or named
        names = changed or ({"framework"} if base.title != head.title else {path})
        near = [group for group in groups if group[0] & names]
        groups = [group for group in groups if group not in near]
        groups.append((names.union(*(group[0] for group in near)), [path, *(p for group in near for p in group[1])]))
    for names, paths in groups:
        put_back = {path: left[path] for path in paths}
        if names == {"framework"}:
            yield _Candidate("framework", (ValueChange("framework", base.title, head.title),), put_back)
            continue
        changes: list[ValueChange] = []
        for name in sorted(names):
            if name not in was and name not in now:
                changes.append(ValueChange(name, _shown(left.get(name)), after.get(name)))
                continue
            at = now.get(name) or was[name]
            changes.append(ValueChange(name, _value(was, name), _value(now, name), at.file, at.line))
        yield _Candidate("value", tuple(changes), put_back)


def _origin(whys: Mapping[str, str], path: str) -> str:
    """Return the origin of a field, or of a section that it is in or that has it."""
    if path in whys:
        return whys[path]
    near = (why for field, why in whys.items() if path.startswith(f"{field}.") or field.startswith(f"{path}."))
    return next(near, "")


def _value(keys: Mapping[str, Any], key: str) -> Any:
    return keys[key].value if key in keys else None


def _shown(value: Any) -> Any:
    return None if value is _MISSING else value


def similarity(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Return the share of two runs' fields that are equal."""
    a, b = _flat(one), _flat(other)
    paths: Iterable[str] = {*a, *b}
    return 1 - len(_differing(a, b)) / max(1, len({*paths}))
