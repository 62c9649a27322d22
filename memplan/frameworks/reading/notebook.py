"""A notebook's cells, and the shell script of the commands in them. Nothing is executed.

Source: IPython 9's magics: !command, %env, %%bash, %%writefile.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from memplan.core.errors import SpecError

MOST_BYTES = 16 * 2**20  # of a notebook, whose outputs are images
_MOST_NAME = 200
_SHELL_CELL = re.compile(r"%%(?:bash|sh|shell|script\s+(?:bash|sh))\b.*")
_FILE_CELL = re.compile(rf"%%(?:writefile|file)\s+(?:-a\s+)?(\S{{1,{_MOST_NAME}}})\s*")
_ENVIRONMENT = re.compile(
    r"\s*(?:%(?:set_)?env\s+(\w+)[\s=]\s*(.*)|os\.environ\[['\"](\w+)['\"]\]\s*=\s*(['\"][^'\"]*['\"])\s*(?:#.*)?)"
)
_LITERAL = re.compile(r"(\w+)\s*=\s*(f?)(\"[^\"]*\"|'[^']*'|\d[\w.]*)\s*(?:#.*)?")
_NAME = re.compile(r"(?<!\$)\{(\w+)\}")  # of Python, as `!command` and f-strings have it
_END = "END_OF_THE_CELL"


def code_cells(text: str, shown: str) -> Iterator[tuple[int, str]]:
    """Yield the number and code of each cell that has some. Raises SpecError if it is no notebook."""
    try:
        cells: object = json.loads(text).get("cells")
    except (ValueError, AttributeError, RecursionError):
        raise SpecError(f"{shown} is not a notebook: it is no JSON with cells") from None
    for number, cell in enumerate(cast("list[Any]", cells) if isinstance(cells, list) else [], 1):
        if not isinstance(cell, Mapping) or cast("Mapping[str, Any]", cell).get("cell_type") != "code":
            continue
        source: object = cast("Mapping[str, Any]", cell).get("source", "")
        yield number, "".join(map(str, cast("list[Any]", source))) if isinstance(source, list) else str(source)


def shell_script(text: str, shown: str) -> tuple[str, dict[int, str]]:
    """Return the commands in a notebook as a shell script, and the cell and line of each of its lines. Names that are
    set to a number or a text are its variables."""
    lines: list[str] = []
    places: dict[int, str] = {}
    for number, code in code_cells(text, shown):
        for line, command in _commands(code.splitlines()):
            lines.append(command)
            places[len(lines)] = f"cell {number}, line {line}"
    return "\n".join(lines), places


def _commands(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Yield the lines of a cell that a shell runs, and variables that it knows, each with its number."""
    first = lines[0].strip() if lines else ""
    file = _FILE_CELL.fullmatch(first)
    if file is not None:
        yield 1, f"cat > {file[1]} <<'{_END}'"
        yield from enumerate([*lines[1:], _END], 2)
    elif first.startswith("%%"):
        yield from enumerate(lines[1:] if _SHELL_CELL.fullmatch(first) else (), 2)
    else:
        yield from _of_python(lines)


def _of_python(lines: list[str]) -> Iterator[tuple[int, str]]:
    continues = False
    for number, line in enumerate(lines, 1):
        environment, literal = _ENVIRONMENT.fullmatch(line), _LITERAL.fullmatch(line)
        if continues or line.lstrip().startswith("!"):
            yield number, _NAME.sub(r"${\1}", line if continues else line.lstrip(" \t!"))
            continues = line.rstrip().endswith("\\")
        elif environment is not None:
            name, value = environment[1] or environment[3], environment[2] or environment[4]
            yield number, f"export {name}={value.strip()}"
        elif literal is not None:
            text = _NAME.sub(r"${\1}", literal[3]) if literal[2] else literal[3]
            yield number, f"{literal[1]}={text}"
