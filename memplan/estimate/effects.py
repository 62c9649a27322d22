"""The bytes that each value of a run's file changes, compared with the field's plain default."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from memplan.catalogue.profiles.engines import EngineDefaults, find_engine
from memplan.catalogue.profiles.engines import rows as engine_rows
from memplan.catalogue.profiles.profiles import find_profile, rows
from memplan.core.errors import MemplanError
from memplan.core.records import NamedTuple
from memplan.estimate.answer import Estimate
from memplan.spec.run import RunSpec

_TOGETHER = ("precision", "parallelism", "also")  # sections whose fields only make sense together


class ValueEffect(NamedTuple):
    """A field's value, where it is from, and by how much it changes the bytes used; None if that cannot be said."""

    field: str
    value: Any
    why: str
    bytes: int | None


def effects(answer: Estimate, estimate: Callable[[RunSpec], Estimate]) -> list[ValueEffect]:
    """Return the effect of each value, the largest first; then the values that change nothing.

    A value is compared with the run that has the field's default instead. Fields of precision, parallelism and side
    tasks are put back together, and their first has the effect; a method is put back with all of its fields. Fields
    that the profile decides are listed last.
    """
    alone: dict[str, int | None] = {}
    found: list[ValueEffect] = []
    for origin in answer.origins:
        part = origin.field.partition(".")[0]
        path = part if part in _TOGETHER or origin.field == "method.kind" else origin.field
        if path not in alone:
            alone[path] = _change(answer, path, estimate) if origin.field not in ("model", "profile") else None
        found.append(ValueEffect(origin.field, origin.value, origin.why, alone[path]))
    found.sort(key=lambda effect: -abs(effect.bytes or 0))
    for index, effect in enumerate(found):
        part = effect.field.partition(".")[0]
        if part in _TOGETHER and any(other.field.startswith(f"{part}.") for other in found[:index]):
            found[index] = effect._replace(bytes=None)
    said = {effect.field for effect in found}
    return [*found, *(effect for effect in _decided_by_profile(answer) if effect.field not in said)]


def _change(answer: Estimate, path: str, estimate: Callable[[RunSpec], Estimate]) -> int | None:
    """Return the bytes used minus those with a field, or a section, at its default; None if that run is refused."""
    fields = answer.asked.model_dump(exclude_unset=True)
    *parts, name = path.split(".")
    inner: Any = fields
    for part in parts:
        inner = cast(Mapping[str, Any], inner).get(part) or {}
    if name not in inner:
        return None
    del inner[name]
    try:
        return answer.bytes.used - estimate(RunSpec.model_validate(fields)).bytes.used
    except MemplanError:
        return None


def _decided_by_profile(answer: Estimate) -> list[ValueEffect]:
    """Return the fields that the run leaves to its profile, with the source of each."""
    out: dict[str, ValueEffect] = {}
    engine = find_engine(answer.run.profile)
    if engine is not None:
        for row in engine_rows(engine):
            if row.field in EngineDefaults._fields:
                out[row.field] = ValueEffect(f"serving.{row.field}", row.value, f"{engine.name}: {row.source}", None)
        return list(out.values())
    for row in rows(find_profile(answer.run.profile)):
        value: Any = answer.run
        for part in row.field.split(".") if "." in row.field and not row.model_types and not row.when else ():
            value = getattr(value, part, None)
        if value is not answer.run and value is not None:
            value = list(cast("tuple[str, ...]", value)) if isinstance(value, tuple) else value
            out[row.field] = ValueEffect(row.field, value, f"{answer.run.profile}: {row.source}", None)
    return list(out.values())
