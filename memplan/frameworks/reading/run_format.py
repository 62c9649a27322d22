"""`RunFormat`: a framework whose files are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.core.records import NamedTuple
from memplan.frameworks.change_table import Framework
from memplan.frameworks.reading.config import Rule


class RunFormat(NamedTuple):
    """A framework whose files are read.

    name        its name, as in `--framework NAME`
    title       its name as shown
    table       the rows of its keys, which also write them
    defaults    the frameworks in `defaults/` whose keys and defaults it has; the first has its versions
    model       the key that names the model
    needs       keys that all of its files have
    any_of      keys of which its files have some
    excludes    keys that none of its files have
    rules       functions that set fields from several keys, in order
    refused     keys that must be off
    matter      keys that take memory and are not supported, and what they are about
    aliases     old names of keys
    is_general  whether other frameworks' files have its keys too, so that theirs come first
    """

    name: str
    title: str
    table: Framework
    defaults: tuple[str, ...]
    model: str
    needs: tuple[str, ...]
    any_of: tuple[str, ...]
    rules: tuple[Rule, ...]
    refused: tuple[str, ...] = ()
    matter: Mapping[str, str] = {}
    excludes: tuple[str, ...] = ()
    aliases: Mapping[str, str] = {}
    is_general: bool = False

    def told_by(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the keys that tell that a file is this framework's; empty if it is not."""
        has = {key for key, value in values.items() if value is not None}
        some = [key for key in self.any_of if key in has]
        fits = some and has.issuperset(self.needs) and has.isdisjoint(self.excludes)
        return (*self.needs, *some[: 2 - len(self.needs[:1])]) if fits else ()
