"""The rows of profiles and serving engines in `profiles.toml`, and the check that they set fields that exist."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from memplan.core.package_data import data_path
from memplan.core.records import NamedTuple
from memplan.core.toml import read_tables

# Conditions under which a row holds.
WHEN = {"": "always", "quantised": "for quantised weights"}


class Setting(NamedTuple):
    """One row of a profile.

    field        a field of the run, or of a record in `memplan.catalogue.profiles.behaviour`
    value        its value
    source       where the value was read
    when         a key of `WHEN`
    model_types  the families it holds for; empty for all
    """

    field: str
    value: Any
    source: str
    when: str = ""
    model_types: tuple[str, ...] = ()


class Profile(NamedTuple):
    """A framework at a version.

    name   value of `profile`
    title  the framework and its version, as shown
    read   the library versions that were read
    like   the profile whose rows it inherits
    rows   its own rows
    waits  what the framework does that is not counted yet
    """

    name: str
    title: str
    read: str
    like: str
    rows: tuple[Setting, ...]
    waits: tuple[str, ...] = ()


class EngineSetting(NamedTuple):
    """One setting of an engine.

    field   a field of `EngineDefaults` or `EngineBehaviour`
    value   its value
    source  where the value was read
    basis   `derived` if it was read in the engine's code, else `assumed`
    """

    field: str
    value: Any
    source: str
    basis: str = "derived"


Kind = Literal["vllm", "sglang", "tgi", "llama.cpp"]


class ServingEngine(NamedTuple):
    """A serving engine at a version.

    name   value of `profile`
    title  the engine and its version, as shown
    kind   the module of `memplan.program.serving` that lays out its pool
    read   the files that were read
    like   the engine whose rows it inherits
    rows   its own rows
    waits  what the engine does that is not counted yet
    """

    name: str
    title: str
    kind: Kind
    read: str
    like: str
    rows: tuple[EngineSetting, ...]
    waits: tuple[str, ...] = ()


@cache
def tables() -> Mapping[str, Mapping[str, Any]]:
    """Return the file's tables by kind (profile, engine, families) and name."""
    return read_tables(data_path("profiles.toml"))


def profiles() -> Iterator[Profile]:
    """Yield the profiles of the file."""
    groups = tables()["families"]
    for name, table in tables()["profile"].items():
        rows: list[Setting] = []
        for field, value, source, *conditions in table["rows"]:
            when = "quantised" if "quantised" in conditions else ""
            families = [f for c in conditions if c != when for f in groups.get(c, (c,))]
            rows.append(Setting(field, value, source, when, tuple(families)))
        yield Profile(name, table["title"], table["read"], table.get("like", ""), tuple(rows), table.get("waits", ()))


def engines() -> Iterator[ServingEngine]:
    """Yield the serving engines of the file."""
    for name, table in tables()["engine"].items():
        rows = tuple(EngineSetting(*row) for row in table["rows"])
        kind, read, like, waits = table["kind"], table["read"], table.get("like", ""), table.get("waits", ())
        yield ServingEngine(name, table["title"], kind, read, like, rows, waits)


@cache
def known_name(name: str) -> str:
    """Return the name of the profile or engine that counts for a version: the nearest at or below.

    Return `name` itself if it is one of a profile, or if no profile can count for it: there is none of the framework,
    the version is below all of them, or it is none that can exist.
    """
    if any(name in tables()[kind] for kind in ("profile", "engine")):
        return name
    framework, _, version = name.rpartition("-")
    numbers, versions = _numbers(version), sorted(_versions(framework))
    if not numbers or not versions or numbers[0] > versions[-1][0][0] + 1:
        return name
    if numbers[0] >= _FIRST_YEAR and len(numbers) > 1 and not 1 <= numbers[1] <= 12:  # a year and a month
        return name
    return next((known for since, known in reversed(versions) if since <= numbers), name)


def nearest_versions(name: str) -> tuple[str, ...]:
    """Return the profiles of the framework that `name` begins with, the nearest version first; empty if it has none."""
    framework, _, version = name.lower().rpartition("-")
    versions = sorted(_versions(framework))
    numbers = _numbers(version)
    is_below = bool(versions and numbers) and numbers < versions[0][0]
    return tuple(known for _, known in (versions if is_below else reversed(versions)))


_FIRST_YEAR = 2000


def _versions(framework: str) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield the first version that each of a framework's profiles stands for, and its name."""
    for kind in ("profile", "engine"):
        for name, table in tables()[kind].items():
            owner, _, version = name.rpartition("-")
            if not _numbers(version):
                owner, version = name, ""
            numbers = _numbers(str(table.get("since", version)))
            if owner == framework and numbers:
                yield numbers, name


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version; nothing if it is none."""
    parts = version.split(".")
    return tuple(map(int, parts)) if all(part.isascii() and part.isdigit() for part in parts) else ()


@cache
def field_types(record: type[Any]) -> Mapping[str, Any]:
    """Return the types of a record's fields."""
    return {name: hint for name, hint in get_type_hints(record).items() if name in record._fields}


def check_values(values: Iterable[tuple[str, object]], types: Mapping[str, Any], owner: str) -> None:
    """Raise ValueError for a (field, value) pair that has no type in `types`, or whose value is not of that type."""
    for field, value in values:
        if field not in types:
            raise ValueError(f"profile {owner}: {field} is no field that a profile sets")
        if not _is_of(value, types[field]):
            raise ValueError(f"profile {owner}: {field} cannot be {value!r}; it is {types[field]}")


def _is_of(value: object, hint: Any) -> bool:
    """Whether the value is of the type, of one of a union's types, or one of a Literal's words."""
    if get_origin(hint) is Literal:
        return any(type(value) is type(word) and value == word for word in get_args(hint))
    if hint == tuple[str, ...]:
        return isinstance(value, tuple) and all(isinstance(part, str) for part in cast(tuple[object, ...], value))
    return type(value) in (get_args(hint) or (hint,))
