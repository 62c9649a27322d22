"""Plain English: phrases that nobody searches for are in no docstring, comment, message or page."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each with what to write instead.
BANNED = {
    r"\bbeside\b": "next to, in addition to, with",
    r"\bso many\b": "n copies, that many",
    r"\bwhat of\b": "the noun",
    r"\bof which nothing\b": "without its own",
    r"\bthat is asked about\b": "this one",
    r"\bas (?:it|they) lies?\b": "in its layout",
    r"\b(?:is|are) had\b": "has",
    r"\bis there to\b": "that",
    r"\ball else\b": "everything else",
    r"\bthe same of\b": "the noun again",
    r"\braises nothing\b": "nothing at all",
    r"\banew\b": "again",
    r"\bsuch a one\b": "one",
    r"\btakes back\b": "overrides",
    r"\blacks?\b": "needs more, has no",
    r'^"""What\b': "a noun, or a verb, that says what it is",
}
# Keys of the JSON contract and a verdict of a trace, which other tools read.
CONTRACT = {"beside", "lacks"}
PATTERN = re.compile("|".join(BANNED), re.IGNORECASE)
MOST_WORDS = 12  # of a test's name


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of prose in a file: of Python its strings and comments, of a page all but its code."""
    text = path.read_text("utf-8")
    if path.suffix != ".py":
        fenced = False
        for number, line in enumerate(text.splitlines(), 1):
            fenced ^= line.startswith("```")
            if not fenced:
                yield number, re.sub(r"`[^`]*`", "", line)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            plain = re.sub(r"`[^`]*`", "", token.string)
            yield from enumerate(plain.splitlines(), token.start[0])


def found_in(path: Path) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for number, line in prose_of(path)
        if line.strip("rf'\"") not in CONTRACT
        for match in PATTERN.finditer(line)
    ]


FILES = [
    *(path for folder in ("memplan", "benchmarks", "tests") for path in sorted((ROOT / folder).rglob("*.py"))),
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")),
]


@pytest.mark.parametrize("kind", [".py", ".md"])
def test_no_file_has_a_banned_phrase(kind: str) -> None:
    files = [path for path in FILES if path.suffix == kind and path != Path(__file__).resolve()]
    assert len(files) > 10
    assert [line for path in files for line in found_in(path)] == []


def test_a_banned_phrase_is_found(tmp_path: Path) -> None:
    for name, text in (("a.py", 'def f():\n    """What of it."""  # anew\n'), ("a.md", "It lacks a `beside`.\n")):
        (tmp_path / name).write_text(text)
    found = [line for name in ("a.py", "a.md") for _, line in prose_of(tmp_path / name) if PATTERN.search(line)]
    assert len(found) == 3


def test_names_of_tests_are_short() -> None:
    names = [
        node.name
        for path in FILES
        if path.name.startswith("test_")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert [name for name in names if len(name.split("_")) - 1 > MOST_WORDS] == []
