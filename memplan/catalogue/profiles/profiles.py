"""Profiles: what a framework's version decides, by name.

A profile's rows set defaults of the run's fields (`kernels.loss`), and fields that describe the version's code
(`memplan.catalogue.profiles.behaviour`). A profile inherits the rows of the one it is `like`, and overrides them with
its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from memplan.catalogue.profiles.behaviour import LibraryBehaviour
from memplan.catalogue.profiles.engines import engine_names, find_engine
from memplan.catalogue.profiles.profile_table import (
    Profile,
    Setting,
    check_values,
    field_types,
    known_name,
    nearest_versions,
    profiles,
)
from memplan.core.errors import UnknownNameError, refused

PROFILES = tuple(profiles())
_BY_NAME = {profile.name: profile for profile in PROFILES}


def find_profile(name: str) -> Profile:
    """Return the profile named `name`, or of the nearest version at or below.

    Raises SpecError for a serving engine, UnknownNameError if there is none.
    """
    profile = _BY_NAME.get(known_name(name))
    if profile is None and find_engine(name) is not None:
        raise refused("profile", f"{name} is a serving engine, which needs --method generate")
    if profile is None and (versions := nearest_versions(name)):
        raise UnknownNameError("profile", name, versions, ranked=True)
    if profile is None:
        engines = [engine for engine in engine_names() if engine[:3] == name.lower()[:3]]
        raise UnknownNameError("profile", name, (*_BY_NAME, *engines))
    return profile


def without(profile: Profile, field: str) -> Profile:
    """Return the profile without its own rows for a field, and so with its base profile's; `find_profile` knows it."""
    name = f"{profile.name} without {field}"
    if name not in _BY_NAME:
        _BY_NAME[name] = profile._replace(name=name, rows=tuple(row for row in profile.rows if row.field != field))
    return _BY_NAME[name]


def rows(profile: Profile) -> Iterator[Setting]:
    """Yield the inherited rows, then the profile's own; later rows override earlier ones."""
    if profile.like:
        yield from rows(_BY_NAME[profile.like])
    yield from profile.rows


def holds(row: Setting, model_type: str, quantised: bool) -> bool:
    """Whether a row holds for a family, with quantised weights or without."""
    return (not row.model_types or model_type in row.model_types) and (not row.when or quantised)


@lru_cache(maxsize=1024)
def library_behaviour(name: str, model_type: str, quantised: bool) -> LibraryBehaviour:
    """Return everything that a profile decides for a run. Raises UnknownNameError."""
    return _decided(name, tuple(row for row in rows(find_profile(name)) if holds(row, model_type, quantised)))


@lru_cache(maxsize=256)  # most families have the same rows
def _decided(name: str, chosen: tuple[Setting, ...]) -> LibraryBehaviour:
    return behaviour_of({row.field.replace(".", "_"): row.value for row in chosen}, name)


def behaviour_of(values: dict[str, Any], owner: str) -> LibraryBehaviour:
    """Return the record of these values. Raises ValueError for a field that is missing or unknown, or a wrong type."""
    records = field_types(LibraryBehaviour)
    types = {field: hint for record in records.values() for field, hint in field_types(record).items()}
    check_values(values.items(), types, owner)
    missing = types.keys() - values.keys()
    if missing:
        raise ValueError(f"profile {owner}: does not set {', '.join(sorted(missing))}")
    return LibraryBehaviour(
        **{name: record(*(values[field] for field in record._fields)) for name, record in records.items()}
    )
