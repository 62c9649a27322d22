"""The help texts in docs/cli.md: `python -m benchmarks.manual` writes them again from the commands."""

from __future__ import annotations

import re
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO
from itertools import pairwise
from pathlib import Path

from typer.main import get_command

from memplan.cli.app import app
from memplan.cli.plain import COMMANDS

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
_BLOCK = re.compile(r"(?<=^```text\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^\S.*:$", re.MULTILINE)


def written(page: str) -> str:
    """Return the page with each of its blocks of help as the command prints it, with the headings that it has."""
    return _BLOCK.sub(lambda block: _help_like(block[0]) or block[0], page)


def _help_like(block: str) -> str | None:
    """Return the sections of a command's help that a block has; None for a block of anything else."""
    headings = [block.splitlines()[0].partition(" [")[0], *_HEADING.findall(block)]
    for command in (*COMMANDS, "card new"):
        sections = _sections(command)
        wanted = [heading for heading in headings if heading in sections]
        if headings[0] in sections:
            return "\n".join(sections[heading] for heading in dict.fromkeys(wanted))
    return None


@cache
def _sections(command: str) -> dict[str, str]:
    """Return a command's help by heading; what precedes the first heading is under `Usage: memplan COMMAND`."""
    with redirect_stdout(StringIO()) as out, suppress(SystemExit):
        get_command(app).main([*command.split(), "--help"], terminal_width=78)  # click's for a terminal of 80
    text = out.getvalue()
    starts = [0, *(match.start() for match in _HEADING.finditer(text)), len(text)]
    parts = [text[start:end].rstrip("\n") + "\n" for start, end in pairwise(starts)]
    return {part.splitlines()[0].partition(" [")[0]: part for part in parts}


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")
