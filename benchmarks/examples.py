"""The examples in the docs: `python -m benchmarks.examples [PAGE ...]` writes the outputs that pages quote again.

An example is a block of commands, or of Python.
"""

from __future__ import annotations

import doctest
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

from typer.main import get_command

from memplan.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TESTS = "pip install '.[test]' && pytest"  # .ci/run reads and runs this line, which runs the tests of the docs
_COMMAND = get_command(app)
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CONFIG = (
    '{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, '
    '"num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000}'
)


class Example(NamedTuple):
    """A fenced block of a page: its language and lines, and the text block with its output, if one follows."""

    page: Path
    language: str
    text: str
    quoted: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text.splitlines()[0][:60]}"


class Printed(NamedTuple):
    """The output of a block of commands, and the exit codes of its lines."""

    out: str
    err: str
    codes: tuple[int, ...]


def examples_of(page: Path) -> list[Example]:
    """Return the blocks of a page, in order."""
    text = page.read_text("utf-8")
    blocks = [*_FENCED.finditer(text)]
    return [
        Example(page, block[1], block[2], after[2] if after is not None and _is_output(text, block, after) else None)
        for block, after in zip(blocks, [*blocks[1:], None], strict=False)
    ]


def _is_output(text: str, block: re.Match[str], after: re.Match[str]) -> bool:
    """Whether the block after another has its output: text, with nothing in between."""
    return after[1] == "text" and text[block.end() : after.start()].isspace()


def words_of(line: str) -> list[str]:
    """Return the arguments after `memplan` in a line of a shell block; CI runs full lines, including `pip install`."""
    name, *words = shlex.split(line.rpartition("&&")[2], comments=True)
    assert name == "memplan", line
    return words


def printed(example: Example, folder: Path) -> Printed:
    """Run a block of commands in a folder with the files that pages name: those of the page, and a few others."""
    config = folder / "path" / "to" / "config.json"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(_CONFIG, "utf-8")
    (folder / "run.yaml").write_text("model: qwen2-7b\nmethod: qlora\ngpu: 3090\n", "utf-8")
    (folder / "run.json").write_text('{"model": "qwen2-7b", "method": "qlora", "gpu": "3090"}', "utf-8")
    page = example.page.read_text("utf-8")
    for name, text in re.findall(r"^```\w+\n(?=# (\S+\.\w+)$)(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        (folder / name).write_text(text, "utf-8")
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    out, err = (TextIOWrapper(BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    codes: list[int] = []
    with chdir(folder), patch.dict(os.environ, {**plain, "COLUMNS": "100"}, clear=True):
        for line in example.text.splitlines():
            if line != TESTS:
                with redirect_stdout(out), redirect_stderr(err):
                    try:
                        _COMMAND.main(words_of(line))
                    except SystemExit as left:
                        codes.append(int(left.code or 0))
    return Printed(_text(out), _text(err), tuple(codes))


def _text(of: TextIOWrapper) -> str:
    of.seek(0)
    return of.read()


class _Outputs(doctest.DocTestRunner):
    """Collects what examples print that is not what they are said to."""

    def __init__(self) -> None:
        super().__init__(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
        self.found: list[tuple[doctest.Example, str]] = []

    def report_failure(self, out: Any, test: Any, example: doctest.Example, got: str) -> None:
        self.found.append((example, got))


def recomputed(text: str) -> str:
    """Return a page with what its Python examples print now."""
    runner, lines = _Outputs(), text.splitlines(keepends=True)
    runner.run(doctest.DocTestParser().get_doctest(text, {}, "page", None, 0), out=lambda _: None)
    for example, got in reversed(runner.found):
        start = example.lineno + example.source.count("\n")
        lines[start : start + example.want.count("\n")] = [got]
    return "".join(lines)


def requoted(page: Path) -> str:
    """Return a page with its outputs as the commands and the Python examples print them now."""
    text = recomputed(page.read_text("utf-8"))
    for example in examples_of(page):
        if example.language == "sh" and example.quoted is not None:
            with TemporaryDirectory() as folder:
                now = printed(example, Path(folder)).out
            block = f"```sh\n{example.text}```\n\n```text\n"
            assert block + example.quoted in text, f"{example}: the output does not follow the commands"
            text = text.replace(block + example.quoted, block + now)
    return text


def _changed(pages: list[Path]) -> Iterator[Path]:
    for page in pages:
        text = requoted(page)
        if text != page.read_text("utf-8"):
            page.write_text(text, "utf-8")
            yield page


if __name__ == "__main__":
    for path in _changed([Path(name).resolve() for name in sys.argv[1:]] or PAGES):
        print(path.relative_to(ROOT))
