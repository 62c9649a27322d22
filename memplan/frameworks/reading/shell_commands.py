"""The commands that a shell script runs: its loops, functions and branches followed, and its variables resolved."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path, PurePath
from typing import TypeAlias

from memplan.core.errors import SpecError
from memplan.core.files import expanded, is_file
from memplan.frameworks.reading.document import is_there
from memplan.frameworks.reading.shell_branches import Branches
from memplan.frameworks.reading.shell_lines import LONG, LONGEST_LINE, WRITTEN, joined_lines
from memplan.frameworks.reading.shell_words import ARGUMENT, COUNTING, with_loop, without_commands
from memplan.spec.file import read_text

# $A, ${A}, ${A[@]}, ${A:-text}; bounded: braces may never be closed
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?:\[[@*]\])?(?::?[-=]((?:[^{}]|\{[^{}]*\}){0,1000}))?\})")
_DEFAULT = re.compile(r"\$\{(\w+):?=([^{}]{0,1000})\}")  # ${A:=text}, which sets it
# $((A * B)), $(expr 16 / $A)
_ARITHMETIC = re.compile(r"\$(?:\(\((.{1,200}?)\)\)(?!\))|\(expr +([^()]{1,200})\))")
ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)
_ARRAY = re.compile(r"\s*(?:(?:export|local|declare(?: -\w+)?) +)?(\w+)(\+?)=\((.*?)\)\s*(?:#[^\n]*)?", re.DOTALL)
_REDIRECTION = re.compile(r"[&\d]?>>?(.*)|<")  # > a.log, 2>&1, < a
_MOST_DIGITS = 10
# A quoted text, or a comment; a hash inside a word, such as data#500, begins none, as it does for shlex.
_COMMENT = re.compile(r"""(\\.|'[^']*'|"(?:\\.|[^"\\])*")|(?<![^\s;&|()])#[^\n]*""", re.DOTALL)
_MOST_TEXT = 2**22  # characters of all words, with variables resolved
_LONGEST_VALUE = 65_536  # characters; a variable may hold another one twice, and that the one before
_ENDS = ("&&", "||", "|", ";", "&", "then", "do")
_FUNCTION = re.compile(r"(\s*)(?:function\s+)?([\w-]+)\s*(?:\(\s*\))?\s*\{\s*(?:#.*)?")
_ARGUMENTS = re.compile(r"\"?\$(?:\{[@*](?::(\d))?\}|[@*])\"?")  # "$@", "${@:2}"
_MOST_CALLS = 50  # of functions, which may call each other
_split = lru_cache(maxsize=4)(shlex.split)  # a script may name a long array again and again
_Line: TypeAlias = "tuple[int, str]"
_Command: TypeAlias = "tuple[int, list[str], dict[str, str]]"


def commands_of(
    text: str, name: str, variables: Mapping[str, str], folder: Path | None = None
) -> Iterator[tuple[int, list[str], dict[str, str]]]:
    """Yield the commands of a script: line, words with variables resolved, and the environment."""
    yield from _Shell(name, variables, folder).script(text)


class _Shell:
    """A shell that reads a script and runs nothing.

    name       the script's name in messages
    variables  those that are set
    folder     where files of variables that it sources are
    """

    def __init__(self, name: str, variables: Mapping[str, str], folder: Path | None) -> None:
        self.name = name
        self.variables = dict(variables)
        self.folder = folder
        self._spent = self._calls = 0
        self._branches = Branches()
        self._functions: dict[str, list[_Line]] = {}
        self._called: set[str] = set()

    def script(self, text: str) -> Iterator[_Command]:
        """Yield its commands: those of functions where they are called, or else last."""
        yield from self._run(self._without_functions(joined_lines(text)))
        for name in [name for name in self._functions if name not in self._called]:
            yield from self._run(self._functions[name])

    def _without_functions(self, lines: Iterable[_Line]) -> Iterator[_Line]:
        """Yield the lines outside of functions, and keep those inside."""
        body, end = None, ""
        for line, joined in lines:
            match = _FUNCTION.fullmatch(joined)
            if body is None and match is not None:
                body, end = self._functions.setdefault(match[2], []), f"{match[1]}}}"
            elif body is not None and joined.rstrip() == end:
                body = None
            elif body is not None:
                body.append((line, joined))
            else:
                yield line, joined

    def _run(self, lines: Iterable[_Line]) -> Iterator[_Command]:
        for line, joined in lines:
            if joined == LONG:
                yield line, [LONG], dict(self.variables)
            elif joined.startswith(WRITTEN):
                self._write(joined)
            else:
                yield from self._line(line, joined)

    def _write(self, joined: str) -> None:
        """Keep the text of a file that the script writes."""
        path, _, written = joined.partition("\n")
        self._spent += len(written)
        if not self._branches.is_skipping and self._spent < _MOST_TEXT:
            path, written = (_VARIABLE.sub(partial(_set, self.variables), each) for each in (path, written))
            self.variables[f"{WRITTEN}{PurePath(path.removeprefix(WRITTEN))}"] = written

    def _line(self, line: int, joined: str) -> Iterator[_Command]:
        variables = self.variables
        variables |= {match[1]: match[2] for match in _DEFAULT.finditer(joined) if not variables.get(match[1])}
        counting, array = COUNTING.fullmatch(joined), _ARRAY.fullmatch(joined)
        try:
            text = array[3] if array is not None else joined
            words = _words(without_commands(_ARITHMETIC.sub(partial(_computed, variables), text)))
        except ValueError:
            raise SpecError(f"{self.name}:{line}: a quote is not closed") from None
        if counting is not None:
            variables[counting[1]] = counting[2]
        elif array is None:
            for simple in _simple(words):
                yield from self._command(line, simple)
        elif not self._branches.is_skipping:
            self._set_array(array[1], bool(array[2]), words)

    def _set_array(self, name: str, adds: bool, words: list[str]) -> None:
        """Set an array: NAME=(a b), NAME+=(c)."""
        before = self.variables.get(name, "") if adds else ""
        parts = shlex.join(part for word in words for part in resolved(word, self.variables))
        self._spent += len(parts)
        if len(before) + len(parts) < min(_LONGEST_VALUE, _MOST_TEXT - self._spent):
            self.variables[name] = f"{before} {parts}".strip()
        elif self._spent > _MOST_TEXT:
            self.variables[name] = ""

    def _command(self, line: int, simple: list[str]) -> Iterator[_Command]:
        command = self._branches.followed([part for word in simple for part in resolved(word, self.variables)])
        self._spent += sum(map(len, command))
        if self._spent > _MOST_TEXT:
            raise SpecError(f"{self.name}:{line}: the variables of the script hold too much text")
        if command[:1] in (["export"], ["set"], ["local"], ["readonly"]):
            command = command[1:]
        own, start = dict(self.variables), 0
        while start < len(command) and (match := ASSIGNMENT.fullmatch(command[start])):
            if not ARGUMENT.fullmatch(match[2]):
                own[match[1]] = match[2]
            start += 1
        command = command[start:]
        if command[:1] in (["source"], ["."]) and len(command) > 1:
            self.variables |= variables_of(command[1], self.folder)
        elif command[:1] == ["for"] and command[2:3] == ["in"]:
            self.variables = with_loop(self.variables, command[1], command[3:])
        elif command and command[0] in self._functions:
            yield from self._call(command[0], command[1:])
        elif command:
            yield line, command, own
        else:
            self.variables = own

    def _call(self, name: str, arguments: list[str]) -> Iterator[_Command]:
        """Yield the commands of a function with its arguments, `$1` and `"$@"`."""

        def given(match: re.Match[str]) -> str:
            return shlex.join(arguments[int(match[1] or 1) - 1 :])

        self._called.add(name)
        self._calls += 1
        if self._calls > _MOST_CALLS or sum(map(len, arguments)) > LONGEST_LINE // 4:
            return
        numbers = {str(number): value for number, value in enumerate(arguments, 1)}
        outer = {key: value for key, value in self.variables.items() if key.isdecimal()}
        self.variables |= numbers
        yield from self._run([(line, _ARGUMENTS.sub(given, joined)) for line, joined in self._functions[name]])
        self.variables = {key: value for key, value in self.variables.items() if key not in numbers} | outer


def variables_of(name: str, folder: Path | None) -> dict[str, str]:
    """Return the variables that a `.env` file in the folder, or the working directory, sets; none if it is not read."""
    out: dict[str, str] = {}
    for line in near_text(name, folder).splitlines():
        with suppress(ValueError):  # a quote that is not closed
            for match in filter(None, map(ASSIGNMENT.fullmatch, _words(line))):
                out[match[1]] = " ".join(resolved(match[2], out))
    return out


def _words(text: str) -> list[str]:
    """Return the words of a command, without comments. Raises ValueError for a quote that is not closed."""
    return shlex.split(_COMMENT.sub(lambda match: match[1] or "", text))


def near_text(name: str, folder: Path | None) -> str:
    """Return the text of a file in the folder, or the working directory; empty if it is not read."""
    for path in (place / expanded(name) for place in (folder or Path(), Path())):
        with suppress(SpecError, OSError):
            if is_there(path) and is_file(path):
                return read_text(str(path))
    return ""


def _simple(words: list[str]) -> Iterator[list[str]]:
    """Yield the words of each command in a line, without redirections, `> a.log 2>&1`, and the script's own words."""
    command: list[str] = []
    is_file = False
    for word in words:
        redirection = _REDIRECTION.fullmatch(word)
        is_word = redirection is None and not is_file and not word.startswith(("$@", "$*", "${@"))
        is_file = redirection is not None and not redirection[1]
        if word.endswith(";;"):  # of a case
            command += [word[:-2]] * (is_word and len(word) > 2)
            yield from filter(None, (command, [";;"]))
            command = []
        elif word in _ENDS or word.endswith(";") or (redirection is not None and "|" in word):  # 2>&1|tee a.log
            command += [word[:-1]] if is_word and word.endswith(";") and len(word) > 1 else []
            if command:
                yield command
            command = []
        elif is_word:
            command.append(word)
    if command:
        yield command


def resolved(word: str, variables: Mapping[str, str]) -> list[str]:
    """Return a word with the variables that the script sets; a variable alone is split into words."""

    def value(match: re.Match[str]) -> str:
        default = match[0] if match[3] is None else _VARIABLE.sub(value, match[3])
        return variables.get(match[1] or match[2], default)

    word = _ARITHMETIC.sub(partial(_computed, variables), word) if "$((" in word else word
    text = _VARIABLE.sub(value, word)
    if len(text) > max(_LONGEST_VALUE, len(word)):
        return [word]
    if "[@]}" in word and _VARIABLE.fullmatch(word) and text != word:
        with suppress(ValueError):
            return [*_split(text)]
    return text.split() if _VARIABLE.fullmatch(word) and text != word else [text]


def _set(variables: Mapping[str, str], match: re.Match[str]) -> str:
    """Return the variable that is meant, or what stands there if it is not set."""
    return variables.get(match[1] or match[2], match[0])


def _computed(variables: Mapping[str, str], match: re.Match[str]) -> str:
    """Return what a shell would compute of whole numbers and variables, as text; else what it is."""
    from memplan.frameworks.reading.python_calls import arithmetic

    text = re.sub(r"\$\{?(\w+)\}?|\\", r"\1", match[1] or match[2]).replace("/", "//")
    value = arithmetic(text, {name: number_of(each) for name, each in variables.items() if each.isdecimal()})
    return match[0] if value is None else str(value)


def number_of(text: str) -> int:
    """Return the number that a text of at most nine digits is; 0 for any other."""
    return int(text) if text.isdecimal() and len(text) < _MOST_DIGITS else 0
