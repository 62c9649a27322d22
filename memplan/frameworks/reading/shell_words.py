"""The words that a shell puts in place of others: the values of loops, and the output of a few plain commands.

Source: bash 5.2's manual, Brace Expansion and Command Substitution; NVIDIA's nvidia-smi -L, which has a line for a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice

from memplan.core.errors import printable

# Names among a script's variables, which no shell has: the loop over one, and the loop that is in its second run.
LOOP, SECOND = "the loop over ", "the second run"
_MOST_VALUES = 64  # of a loop
_LONGEST_WORD = 200
_MOST_SHOWN = 60  # characters
# $(command), also with one in it, and `command`; bounded: parentheses may never be closed
_COMMAND = re.compile(r"\$\(((?:[^()]|\((?:[^()]|\([^()]{0,200}\)){0,200}\)){1,400})\)|(?<!\\)`([^`]{1,400})`")
_COUNTS_GPUS = re.compile(
    r"(?:nvidia-smi|rocm-smi|CUDA_VISIBLE_DEVICES|/dev/nvidia).{0,200}(?:\bwc -l|grep -c|count|awk .{0,20}NF)"
    r"|device_count"
)
_HERE = re.compile(r"\bdirname\b|\bpwd\b|\$PWD|git rev-parse --show-toplevel")
_ECHO = re.compile(r"\s*(?:echo|printf) ([^|;&<>`]{1,200})")
_SEQ = re.compile(r"\s*seq (?:-w )?(-?\d{1,6})(?: (-?\d{1,6}))?(?: (-?\d{1,6}))?\s*")
_BRACES = re.compile(r"(.*?)\{(?:(\d{1,6})\.\.(\d{1,6})(?:\.\.(\d{1,6}))?|([^{},]*(?:,[^{},]*)+))\}(.*)")
# An argument of the script, of which there are none.
ARGUMENT = re.compile(r"\$(?:[1-9]|OPTARG|\{(?:[1-9]|OPTARG)(?:[#%/:][^{}]*)?\})")
COUNTING = re.compile(r"\s*for\s*\(\(\s*(\w+)\s*=\s*(\d{1,9})\s*;.*")  # for ((i=0; i<4; i++)); do


def without_commands(text: str) -> str:
    """Return a line with the output of its commands, `$(seq 1 3)`: `gpu` of one that counts the machine's GPUs, as
    torchrun writes it, and `.` of one that tells the script's folder. Others keep their name, `$(date)`."""
    return _COMMAND.sub(_output, text) if "`" in text or "$(" in text else text


def _output(match: re.Match[str]) -> str:
    command = match[1] or match[2]
    if command.startswith("(") or not command.strip():  # arithmetic that is not known
        return "$" + re.sub(r"\s", "", f"({command})")
    if _COUNTS_GPUS.search(command):
        return "gpu"
    if _HERE.search(command):
        return "."
    numbers, echo = _SEQ.fullmatch(command), _ECHO.fullmatch(command)
    if numbers is not None:
        return " ".join(_numbers(*(each for each in numbers.groups() if each)))
    return echo[1].strip() if echo is not None else f"$({re.sub(r'[^a-zA-Z0-9_.-].*', '', command.split()[0])})"


def _numbers(*said: str) -> Iterator[str]:
    """Yield what `seq LAST`, `seq FIRST LAST` or `seq FIRST STEP LAST` prints."""
    first, step, last = (1, 1, *map(int, said)) if len(said) == 1 else (int(said[0]), 1, int(said[1]))
    if len(said) > 2:
        step, last = int(said[1]), int(said[2])
    return islice(map(str, range(first, last + (1 if step > 0 else -1), step or 1)), _MOST_VALUES)


def with_loop(variables: Mapping[str, str], name: str, words: list[str]) -> dict[str, str]:
    """Return the variables in the first run of `for NAME in WORDS`, or in the second if `SECOND` says so. NAME is not
    set if the words are files, or variables that are not known."""
    out = {key: value for key, value in variables.items() if key not in (name, LOOP + name)}
    values = [value for word in words for value in _expanded(word)][:_MOST_VALUES]
    if values and not any(mark in value for value in values for mark in "$*?`"):
        out[name] = values[min(len(values) - 1, variables.get(SECOND) == name)]
        out |= {LOOP + name: ", ".join(values)} if len(values) > 1 else {}
    return out


def _expanded(word: str) -> list[str]:
    """Return the words that `{1..3}` or `{a,b}` stand for."""
    match = _BRACES.fullmatch(word) if len(word) < _LONGEST_WORD else None
    if match is None:
        return [word]
    start, first, last, step, choices, end = match.groups()
    inner = choices.split(",") if choices is not None else [*_numbers(first, step or "1", last)]
    return [f"{start}{each}{rest}" for each in inner for rest in _expanded(end)][:_MOST_VALUES]


def loops_of(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the loops around a command with such variables: variable -> its values."""
    return {
        key.removeprefix(LOOP): printable(text, _MOST_SHOWN) for key, text in variables.items() if key.startswith(LOOP)
    }
