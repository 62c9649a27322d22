"""How refusals are written: a function for each concern yields an error for each thing that it refuses."""

from __future__ import annotations

from collections.abc import Iterable

from memplan.core.errors import SpecError, refused


def refuse(*concerns: Iterable[SpecError]) -> None:
    """Raise the first error of the first concern that has one."""
    for errors in concerns:
        for error in errors:
            raise error


def not_yet(field: str, value: object, supported: str) -> SpecError:
    """Return the error that a field's value is not supported yet."""
    shown = "true" if value is True else f"{value!r:.120}"
    return refused(field, f"{shown} is not supported yet; supported: {supported}")


def not_yet_with(field: str, setting: str, supported: str) -> SpecError:
    """Return the error that a field is not supported yet together with another setting."""
    return refused(field, f"is not supported yet with {setting}; supported: {supported}")
