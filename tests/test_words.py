"""Plain English: phrases that nobody searches for are in no docstring, comment, message or page."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each with what to write instead.
BANNED = {
    "beside": "next to, in addition to, with",
    "so many": "n copies, that many",
    "what of": "the noun",
    "of which nothing": "without its own",
    "that is asked about": "this one",
    "as (?:it|they) lies?": "in its layout",
    "(?:is|are) had": "has",
    "is there to": "that",
    "all else": "everything else",
    "the same of": "the noun again",
    "raises nothing": "nothing at all",
    "anew": "again",
    "such a one": "one",
    "takes back": "overrides",
    "lacks?": "needs more, has no",
    '"""What': "a noun, or a verb, that says what it is",
}
# Keys of the JSON contract and a verdict of a trace, which other tools read.
CONTRACT = {"beside", "lacks"}
PATTERN = re.compile(rf"(?<!\w)(?:{'|'.join(BANNED)})\b", re.IGNORECASE)
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
    if path.suffix == ".py" and not PATTERN.search(path.read_text("utf-8")):  # to tell its prose takes long
        return []
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
    tests = [path.read_text("utf-8") for path in FILES if path.name.startswith("test_")]
    names = [name for text in tests for name in re.findall(r"^ *def (test_\w+)", text, re.MULTILINE)]
    assert [name for name in names if len(name.split("_")) - 1 > MOST_WORDS] == []
