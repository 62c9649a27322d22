"""The web page's questions: the options that its form shows, and the command that it asks for.

The page's engine is this module, in the browser or behind `memplan web`. A question is the words of a command, and the
texts of the files that these words name. It reads no other file and writes none. Some questions are for a part of the
page about the command's run, such as the bar that follows a slider: see `memplan.cli.page_parts`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import PurePath
from typing import Any, cast

from memplan.cli.commands import type_of
from memplan.cli.outcome import run_and_report, show
from memplan.core.errors import SpecError, UnknownNameError, printable
from memplan.core.files import given_files
from memplan.spec.option_values import listed
from memplan.spec.options import OPTIONS, Option, flag

VIEWS = ("estimate", "fit", "max", "advise", "buy", "explain")  # commands about one run that answer as a page
PARTS = ("bar", "map", "cards", "stacks")  # of the page, about a command's run
_NOT_SHOWN = ("FILE",)  # metavar of options that name another file
_OF_OUTPUT = ("format", "explain")
_NAMES = {flag(name) for group in OPTIONS.values() for name in (*group, *_OF_OUTPUT) if name != "model"}
_FILE_NAME = re.compile(r"\w[\w.-]{0,79}", re.ASCII)


def form() -> dict[str, Any]:
    """Return what the page's form shows: the models, the cards, and the options of a run by heading."""
    from memplan.cli.typer_commands import complete_gpu, complete_optimizer, complete_profile, described
    from memplan.core.version import __version__
    from memplan.models.cards import card_names, load_card

    known = {"gpu": complete_gpu, "optimizer": complete_optimizer, "profile": complete_profile}

    def row(name: str, option: Option) -> dict[str, Any]:
        help, choices = described(option)
        type = type_of(option)
        if name in known:
            choices = tuple(known[name](""))
        elif type is bool or (option.type and not option.choices):
            choices = ()
        is_number = type in (int, float) and not choices
        return {
            "name": name,
            "help": help,
            "type": "switch" if type is bool else "number" if is_number else "text",
            "choices": choices,
            "closed": bool(choices) and name not in known and option.parse is not listed,
        }

    return {
        "version": __version__,
        "views": VIEWS,
        "models": {name: load_card(name).card["hf_id"] for name in card_names()},
        "headings": {
            heading: [row(name, option) for name, option in group.items() if option.metavar not in _NOT_SHOWN]
            for heading, group in OPTIONS.items()
            if heading != "Model"
        },
    }


def answer(question: str) -> str:
    """Return the exit code, output and error of a question's command, as JSON, as the question is:

    >>> asked = {"words": ["gpt2", "--gpu=4090", "--format=csv"], "files": {}}
    >>> sorted(json.loads(answer(json.dumps(asked))))
    ['code', 'err', 'out']
    """
    out, err = (TextIOWrapper(BytesIO(), "utf-8", newline="") for _ in range(2))
    with redirect_stdout(out), redirect_stderr(err):
        code = run_and_report(lambda: _ask(question))
    texts = (stream.detach().getvalue().decode() for stream in (out, err) if stream.flush() is None)
    return json.dumps(dict(zip(("code", "out", "err"), (code, *texts), strict=True)))


def _ask(question: str) -> int:
    """Run the question's command, which reads its files and no others, and return the exit code."""
    words, files, part = _checked(question)
    with given_files(files):
        return _run(words, part)


def _run(words: list[str], part: str) -> int:
    if part:
        from memplan.cli.page_parts import part_of

        return show(part_of(part, words)) or 0
    from memplan.cli.plain import run_plain

    code = run_plain(words)
    if code is not None:
        return code
    from memplan.cli.app import app

    try:
        app(words)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def _checked(question: str) -> tuple[list[str], Mapping[str, str], str]:
    """Return the question's words, files and part. Raises SpecError for anything that the page's form cannot ask."""
    try:
        asked: Any = json.loads(question)
        words, files, part = asked["words"], asked["files"], asked.get("part", "")
        texts = (words, [*files.values(), part])
        if not _are_texts(files, dict) or not all(_are_texts(each, list) for each in texts):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise SpecError('question: not JSON as {"words": ["qwen2-7b", "--gpu=3090"], "files": {}}') from None
    for name in files:
        if not _FILE_NAME.fullmatch(name):
            raise SpecError(
                f"files: {printable(name, 40)!r} is no name of a file; use letters, digits, . and -", "files"
            )
    if words[:1] and words[0] in _commands() and words[0] not in VIEWS:
        raise UnknownNameError("command", words[0], VIEWS)
    for word in words:
        typed, _, value = word.partition("=") if word.startswith("-") else ("", "", word)
        if typed and not {typed, f"--{typed.removeprefix('--no-')}"} & _NAMES:
            raise SpecError(f"{printable(typed, 40)}: not an option of the page; its form lists them")
        if value.startswith("~") or PurePath(value).is_absolute() or ".." in PurePath(value).parts:
            raise SpecError(f"{printable(typed or 'model', 40)}: the page reads only files that are dropped or pasted")
    if part and part not in PARTS:
        raise UnknownNameError("part", part, PARTS)
    return words, files, part


def _commands() -> Iterable[str]:
    from memplan.cli.plain import COMMANDS, HELP, HELP_ALL, RESERVED_COMMANDS

    return (*COMMANDS, HELP, HELP_ALL, *RESERVED_COMMANDS)


def _are_texts(value: object, kind: type) -> bool:
    return isinstance(value, kind) and all(isinstance(text, str) for text in cast(Iterable[object], value))
