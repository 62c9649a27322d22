"""List the facts that memplan's rows name and that a new release of a package has moved.

    pip download --no-deps trl==1.15.0 && pip download --no-deps trl==1.16.0
    python -m benchmarks.moved trl-1.15.0-py3-none-any.whl trl-1.16.0-py3-none-any.whl

A source such as "trl 1.16.0 trainer/base_config.py gradient_checkpointing" names a file and a function, class, field or
constant in it. Both wheels are read without importing them; definitions are compared as syntax trees, without
docstrings and comments, so only code that changed is listed. Each line says what became of a definition, and which rows
of profiles.toml and which modules name it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

from memplan.catalogue.profiles.profiles import PROFILES

PACKAGE = Path(__file__).resolve().parents[1] / "memplan"
_FILE = re.compile(r"([\w/]+\.py)((?:,? [A-Za-z_][\w.]*(?![\w/]))*)")


class Fact(NamedTuple):
    """A definition that a source names: its file, and its name in the file, empty for the entire file."""

    file: str
    name: str


class Moved(NamedTuple):
    """A fact that a new release moved: changed, gone, or file gone."""

    status: str
    fact: Fact
    named_by: tuple[str, ...]


def facts_of(source: str, package: str) -> Iterator[Fact]:
    """Yield the facts that a source names in `package`."""
    for part in re.split(r"(?:^|[;,] |\bwith )(?=[A-Za-z][\w-]* v?\d)", source):
        if not re.match(rf"{re.escape(package)} v?\d", part):
            continue
        for file, words in _FILE.findall(part):
            names = [word for word in re.split(r",? ", words) if "_" in word or "." in word or word[:1].isupper()]
            yield from (Fact(file, name) for name in names or [""])


def sources() -> Iterator[tuple[str, str]]:
    """Yield the sources of all rows of profiles, and all texts in memplan's modules, with the name of each."""
    for profile in PROFILES:
        yield from ((row.source, f"{profile.name}: {row.field}") for row in profile.rows)
    for path in sorted(PACKAGE.rglob("*.py")):
        where = str(path.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and ".py" in node.value:
                yield node.value.strip(), where


def modules(wheel: Path) -> Mapping[str, str]:
    """Return the text of the wheel's modules by path."""
    with ZipFile(wheel) as archive:
        return {
            name: archive.read(name).decode("utf-8", "replace") for name in archive.namelist() if name[-3:] == ".py"
        }


def definition(texts: Mapping[str, str], fact: Fact) -> str | None:
    """Return a fact's definition as text of its syntax tree; None if the file or the name is missing."""
    found = [text for path, text in sorted(texts.items()) if f"/{path}".endswith(f"/{fact.file}")]
    if not found:
        return None
    node: ast.AST | None = ast.parse(found[0])
    for name in filter(None, fact.name.split(".")):
        node = None if node is None else _named(node, name)
    if node is None:
        return None
    for inner in ast.walk(node):
        body = getattr(inner, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            del body[0]
    return ast.dump(node)


def _named(tree: ast.AST, name: str) -> ast.AST | None:
    """Return the first function, class or assignment of that name; else the first call of it."""
    call: ast.AST | None = None
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)) and node.name == name:
            return node
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(getattr(target, "id", getattr(target, "attr", None)) == name for target in targets):
            return node
        if (
            call is None
            and isinstance(node, ast.Call)
            and name in (getattr(node.func, "id", ""), getattr(node.func, "attr", ""))
        ):
            call = node
    return call


def moved(old: Path, new: Path) -> list[Moved]:
    """Return the facts of the wheels' package whose definitions differ, in the order of files and names.

    Facts that the old release does not have either, because they were read in another one, are left out.
    """
    package = old.name.partition("-")[0]
    named: defaultdict[Fact, set[str]] = defaultdict(set)
    for source, where in sources():
        for fact in {fact for name in (package, package.replace("_", "-")) for fact in facts_of(source, name)}:
            named[fact].add(where)
    before, after = modules(old), modules(new)
    out: list[Moved] = []
    for fact, where in sorted(named.items()):
        was, now = definition(before, fact), definition(after, fact)
        if was is not None and was != now:
            has_file = definition(after, fact._replace(name="")) is not None
            status = "changed" if now else "gone" if has_file else "file gone"
            out.append(Moved(status, fact, tuple(sorted(where))))
    return out


def main() -> None:
    old, new = map(Path, sys.argv[1:])
    found = moved(old, new)
    for status, fact, where in found:
        print(f"{status:10}{fact.file} {fact.name}".rstrip())
        print(f"{'':10}  {', '.join(where)}")
    print(f"{len(found)} facts to read again in {new.name}")


if __name__ == "__main__":
    main()
