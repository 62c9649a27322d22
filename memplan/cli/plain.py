"""The commands, and running one whose line is plain: parsed without typer."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from memplan.cli.commands import Subcommand
from memplan.cli.outcome import TYPED
from memplan.spec.option_values import is_method

# Command -> module whose function `command` makes it.
COMMANDS = {
    "estimate": "estimate",
    "models": "lists",
    "gpus": "lists",
    "profiles": "lists",
    "schema": "schema",
    "compare": "compare",
    "check": "check",
    "diff": "check",
    "init": "lock",
    "lock": "lock",
    "explain": "explain",
    "fit": "plan",
    "max": "plan",
    "buy": "plan",
    "advise": "plan",
    "plan": "plan",
    "probe": "probe",
    "calibrate": "calibrate",
    "card": "card",
    "serve": "serve",
    "webhook": "serve",
    "web": "web",
}
HELP = "help"  # `memplan help plan` is `memplan plan --help`
HELP_ALL = "--help-all"
RESERVED_COMMANDS = ("emit",)  # names reserved for future commands, so not taken as models


def command_of(name: str) -> Any:
    """Return a command: a `Subcommand`, or typer's."""
    return import_module(f"memplan.cli.{COMMANDS[name]}").command(name)


def with_method(words: Sequence[str]) -> Sequence[str]:
    """Return the words with methods that are in front of the model as its options: `dpo qlora qwen2-7b` means `qwen2-7b
    --method dpo --method qlora`."""
    if len(words) < 2 or words[0] in COMMANDS or words[1].startswith("-") or not is_method(words[0]):
        return words
    model, *others = with_method(words[1:])
    return (model, "--method", words[0], *others)


def run_plain(words: Sequence[str]) -> int | None:
    """Run a command line and return its exit code; None if typer has to parse it: for help, or to explain an error."""
    words = with_method(words)
    if not words or words[0] in (HELP, HELP_ALL, *RESERVED_COMMANDS):
        return None
    TYPED.set(tuple(words))
    name, typed = (words[0], words[1:]) if words[0] in COMMANDS else ("estimate", words)
    command = command_of(name)
    given = command.given(typed) if isinstance(command, Subcommand) else None
    return None if given is None else command.run(given)
