"""`RunFormat`: a framework whose files are read. What tells them is in `signatures.py`."""

from __future__ import annotations

from collections.abc import Mapping

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
    rules       functions that set fields from several keys, in order
    refused     keys that must be off
    matter      keys that take memory and are not supported, and what they are about
    silent      keys and sections, missing from `defaults`, that memory does not depend on
    aliases     old names of keys
    processes   variables of the environment that say how many processes train, if no launcher does
    environment the beginning of the environment's variables that are flags too; None if none are
    profile     its profile, if versions do not tell it
    takes_model whether a word of a command that is no flag is the model's name
    trains      whether it trains rather than serves
    replaces    key -> keys that it may not stand next to
    """

    name: str
    title: str
    table: Framework
    defaults: tuple[str, ...]
    model: str
    rules: tuple[Rule, ...]
    refused: tuple[str, ...] = ()
    matter: Mapping[str, str] = {}
    silent: tuple[str, ...] = ()
    aliases: Mapping[str, str] = {}
    processes: tuple[str, ...] = ()
    environment: str | None = None
    profile: str = ""
    takes_model: bool = False
    trains: bool = True
    replaces: Mapping[str, tuple[str, ...]] = {}
