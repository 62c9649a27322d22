"""The frameworks whose files are read: the tables of `frameworks.toml`, with the rules of their modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from memplan.core.records import NamedTuple
from memplan.core.toml import read_tables
from memplan.frameworks import WRITERS
from memplan.frameworks.change_table import Framework, Key, field, is_
from memplan.frameworks.reading.config import Rule


class Signature(NamedTuple):
    """Keys and programs that tell a framework's files and commands, as `frameworks.toml` explains.

    `programs` maps each program to its subcommands.
    """

    needs: tuple[str, ...]
    any_of: tuple[str, ...]
    excludes: tuple[str, ...]
    is_general: bool
    programs: Mapping[str, tuple[str, ...]]

    def told_by(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the keys that tell that a file is this framework's; empty if it is not."""
        has = {key for key, value in values.items() if value is not None}
        some = [key for key in self.any_of if key in has]
        fits = some and has.issuperset(self.needs) and has.isdisjoint(self.excludes)
        return (*self.needs, *some[: 2 - len(self.needs[:1])]) if fits else ()


class RunFormat(NamedTuple):
    """A framework whose files are read. The fields are explained in `frameworks.toml`, except these:

    table   the rows of its keys, which also write them
    matter  key -> what it is about
    aliases old name -> name
    rules   functions that set fields from several keys, in order; of `format_named`
    """

    name: str
    title: str
    module: str
    signature: Signature
    table: Framework
    model: str
    defaults: tuple[str, ...]
    matter: Mapping[str, str]
    aliases: Mapping[str, str]
    replaces: Mapping[str, tuple[str, ...]] = {}
    refused: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    processes: tuple[str, ...] = ()
    environment: str | None = None
    profile: str = ""
    takes_model: bool = False
    trains: bool = True
    rules: tuple[Rule, ...] = ()

    @property
    def packages(self) -> tuple[str, ...]:
        """Names of its package and programs, by which an image or pip's command gives its version."""
        return (self.name, *self.signature.programs)


def _formats() -> Iterator[RunFormat]:
    tables = read_tables(Path(__file__).with_name("frameworks.toml"))
    writers = {framework.name: framework for framework in WRITERS}

    def by_key(name: str, part: str) -> dict[str, str]:
        """Return each key of a framework's part, in it or in the one that it is like, with what it stands under."""
        like = tables[name].get("like")
        own = {key: under for under, keys in tables[name].get(part, {}).items() for key in keys}
        return (by_key(like, part) if like else {}) | own

    for name, table in tables.items():
        own = {key: value for key, value in table.items() if key in RunFormat._fields}
        programs: dict[str, tuple[str, ...]] = {}
        for program, _, subcommand in (words.partition(" ") for words in table.get("programs", ())):
            programs[program] = (*programs.get(program, ()), *filter(None, (subcommand,)))
        if "writer" in table:
            keys = writers[table["writer"]]
        else:
            rows = [Key(key, (name,)) for key, name in table.get("keys", {}).items()]
            rows += [Key(key, (name,), field(name)) for key, name in table.get("written", {}).items()]
            rows += [Key(key, (name,), is_(name, *on)) for key, (name, *on) in table.get("switches", {}).items()]
            keys = Framework(name, table["title"], table["source"], tuple(rows))
        own |= {"matter": by_key(name, "matter"), "aliases": by_key(name, "aliases")}
        needs, any_of, excludes = (table.get(key, ()) for key in ("needs", "any_of", "excludes"))
        signature = Signature(needs, any_of, excludes, "is_general" in table, programs)
        yield RunFormat(name=name, signature=signature, table=keys, **own)


FORMATS = {each.name: each for each in _formats()}
PROGRAMS = {program: name for name, each in FORMATS.items() for program in each.signature.programs}


@cache
def format_named(name: str) -> RunFormat:
    """Return the framework with its rules, so that only its own are imported."""
    form = FORMATS[name]
    return form._replace(rules=import_module(f"memplan.frameworks.reading.{form.module}").RULES[name])
