"""Command lines that are parsed without typer: the options are those that typer reads from the same line."""

from __future__ import annotations

import subprocess
import sys
from random import Random

import pytest

from memplan.cli.commands import Subcommand, Switch, type_of
from memplan.cli.plain import COMMANDS, command_of
from memplan.cli.typer_commands import given_by_typer
from memplan.core.errors import SpecError
from memplan.spec.options import flag

ROWS = {name: command for name in COMMANDS if isinstance(command := command_of(name), Subcommand)}
TEXTS = (
    "1",
    "16",
    "007",
    "1.5",
    "0.25",
    "x",
    "a,b",
    "all-linear",
    "qwen2-7b",
    "3090",
    "-1",
    "",
    "é",
    "1e3",
    "5_0",
    " 7",
)


def line(random: Random, command: Subcommand) -> list[str]:
    """Return a command line, which may be wrong."""
    words = [random.choice(TEXTS[:11]) for _ in range(random.choice((0, 1, 1, 1, 2)))]
    options = {name: option for group in command.options.values() for name, option in group.items()}
    for name in random.sample(list(options), min(random.randrange(4), len(options))):
        typed, type_ = flag(name), type_of(options[name])
        if type_ in (bool, Switch):
            words.append(random.choice((typed, typed, f"--no-{typed[2:]}")))
        elif random.random() < 0.3:
            words.append(f"{typed}={random.choice(TEXTS)}")
        else:
            words += [typed, random.choice(TEXTS[:6] if type_ in (int, float) else TEXTS)]
    return words


@pytest.mark.parametrize("name", ROWS)
def test_a_plain_line_has_the_options_that_typer_reads(name: str) -> None:
    random, plain = Random(name), 0
    for _ in range(60):
        words = line(random, ROWS[name])
        given = ROWS[name].given(words)
        if given is None:
            continue
        plain += 1
        assert list(given.items()) == list(given_by_typer(ROWS[name], words).items()), words
    assert plain > 3


@pytest.mark.parametrize(
    "words", ["--unknown 1", "gpt2 other", "gpt2 --rank", "gpt2 --rank x", "gpt2 --json=1", "gpt2 --help", "gpt2 -- x"]
)
def test_a_wrong_line_is_left_to_typer(words: str) -> None:
    assert ROWS["estimate"].given(words.split()) is None
    if "--help" not in words:
        with pytest.raises(SpecError):
            given_by_typer(ROWS["estimate"], words.split() if "-- " not in words else ["--unknown"])


@pytest.mark.parametrize(
    "words",
    ["qwen2-7b --method qlora --gpu 3090", "qwen2-7b --method qlora --gpu=3090 --json", "gpus 3090", "models gpt2"],
)
def test_a_plain_line_imports_neither_typer_nor_pydantic(words: str) -> None:
    code = f"""
import sys
from memplan.cli.plain import run_plain
code = run_plain({words.split()!r})
print(code, *(name for name in ("typer", "pydantic", "rich", "yaml", "numpy") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines()[-1] == "0"
