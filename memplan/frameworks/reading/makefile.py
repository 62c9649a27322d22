"""Makefiles, as the shell scripts of their recipes. Nothing is made.

Source: GNU make 4.4's manual, Using Variables, Writing Rules and Writing Recipes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

_NAMES = ("makefile", "gnumakefile")
_ASSIGNMENT = re.compile(r"\s*(?:(?:override|export) +)*([\w.-]+)\s*([?+!]|:{1,3})?=\s*(.*?)(?:\s#.*)?")
_RULE = re.compile(r"([^\s:=#][^:=#]*):{1,2}(?!=)([^;#=]*)(?:;(.*))?(?:#.*)?")
_REFERENCE = re.compile(r"\$[({]([\w.-]+)[)}]")
_MOST_RULES = 1000


def is_makefile(name: str) -> bool:
    """Whether a file's name is that of a Makefile."""
    lowered = Path(name).name.lower()
    return lowered in _NAMES or lowered.endswith(".mk")


def recipes_of(text: str, targets: Collection[str] = (), given: Collection[str] = ()) -> str:
    """Return the shell script of a Makefile's recipes, in the lines where they are, after its variables.

    targets  those whose recipes are wanted, with what they depend on; all if there are none
    given    variables that make's command line sets, which replace the Makefile's
    """
    logical = list(_logical_lines(text))
    wanted = _with_needs(logical, set(targets))
    out: list[str] = []
    runs = True
    for line, more in logical:
        rule = None if line.startswith("\t") else _RULE.fullmatch(line)
        assignment = None if line.startswith("\t") or rule else _ASSIGNMENT.fullmatch(line)
        script = ""
        if rule is not None:
            runs = not wanted or not wanted.isdisjoint(rule[1].split())
            script = rule[3] or ""
        elif assignment is not None:
            script = "" if assignment[1] in given else _assigned(*assignment.groups())
        elif line.startswith("\t"):
            script = line
        out += [_of_shell(script.lstrip("\t @+-")) if runs or assignment is not None else "", *[""] * more]
    return "\n".join(out)


def _logical_lines(text: str) -> Iterator[tuple[str, int]]:
    """Yield each line with those that continue it, and how many these are."""
    joined, more = "", 0
    for line in text.splitlines():
        if line.rstrip().endswith("\\"):
            joined, more = f"{joined}{line.rstrip()[:-1]} ", more + 1
            continue
        yield joined + line, more
        joined, more = "", 0
    yield joined, 0


def _with_needs(lines: list[tuple[str, int]], targets: set[str]) -> set[str]:
    """Return the targets and what they depend on."""
    rules = [match for line, _ in lines if targets and (match := _RULE.fullmatch(line)) is not None][:_MOST_RULES]
    before = -1
    while len(targets) > before:
        before = len(targets)
        targets |= {need for rule in rules if not targets.isdisjoint(rule[1].split()) for need in rule[2].split()}
    return targets


def _assigned(name: str, how: str | None, value: str) -> str:
    quoted = value.rstrip().replace('"', '\\"')
    match how:
        case "?":
            return f'{name}="${{{name}:-{quoted}}}"'
        case "+":
            return f'{name}="${{{name}:-}} {quoted}"'
        case "!":
            return f'{name}="$({quoted})"'
        case _:
            return f'{name}="{quoted}"'


def _of_shell(text: str) -> str:
    """Return a recipe as the shell gets it, with make's variables as the shell's."""
    parts = text.split("$$")  # as make writes a dollar of the shell
    return "$".join(_REFERENCE.sub(r"${\1}", part).replace("$(shell ", "$(") for part in parts)
