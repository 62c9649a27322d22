"""docs/reference: `python -m benchmarks.manual` writes the help texts in cli.md and the generated pages again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO
from itertools import pairwise
from pathlib import Path

from typer.main import get_command

from benchmarks import reference
from benchmarks.examples import examples_of, words_of
from memplan.catalogue.hardware.gpus import all_gpus
from memplan.cli.app import app
from memplan.cli.plain import COMMANDS
from memplan.models.cards import card_names

ROOT = Path(__file__).parents[1]
PICTURES = {  # file -> the command whose answer it draws, next to that of README's first command
    "full-step": "memplan llama-3.2-1b --method full --gpu 4090",
    "methods": "memplan compare 'qwen3-4b --method full' 'qwen3-4b --method lora' 'qwen3-4b --method qlora' --gpu 4090",
}
README, PAGE = ROOT / "README.md", ROOT / "docs" / "reference" / "cli.md"
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


def pages() -> Iterator[tuple[Path, str]]:
    """Yield every generated page of docs/reference, README and its picture, each with its text."""
    yield PAGE, written(PAGE.read_text("utf-8"))
    yield from reference.pages()
    yield README, _counted(README.read_text("utf-8"))
    for name, line in {"answer": examples_of(README)[0].text, **PICTURES}.items():
        yield ROOT / "docs" / "pictures" / f"{name}.svg", _picture(words_of(line))


def _counted(readme: str) -> str:
    """Return README with the numbers of models and GPUs that the catalogue has."""
    return re.sub(r"\d+ models and \d+ GPUs", f"{len(card_names())} models and {len(all_gpus())} GPUs", readme)


def _picture(words: list[str]) -> str:
    """Return the drawing of the answer to a command."""
    with redirect_stdout(StringIO()) as out, suppress(SystemExit):
        get_command(app).main([*words, "--format", "svg"])
    return out.getvalue()


if __name__ == "__main__":
    for path, text in pages():
        path.write_text(text, "utf-8")
