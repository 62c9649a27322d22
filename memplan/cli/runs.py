"""Turns typed options into runs and an output format, and answers into an exit code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from memplan.cli.commands import COMMAND
from memplan.core.errors import SpecError, UnknownNameError, printable
from memplan.spec.options import FIELDS, flag

if TYPE_CHECKING:
    from memplan.estimate.answer import Estimate
    from memplan.frameworks.reading.run_file import RunFile
    from memplan.report.overview import CommandLine
    from memplan.report.stamp import Stamp
    from memplan.report.text import Screen
    from memplan.spec.run import RunSpec


def runs_of(given: Mapping[str, Any], file: RunFile | None = None) -> list[RunSpec]:
    """Return the run that options and a run's file describe, once per GPU. A file that is not read yet is read.

    Raises SpecError naming the wrong field.
    """
    from memplan.cli.gpu_names import typed_cards
    from memplan.cli.model_defaults import in_other_format, with_model_defaults
    from memplan.cli.run_files import companions, run_file
    from memplan.resolve.request import spec_of, unused_option_error, with_framework_config
    from memplan.spec.run import RunSpec

    file = file or run_file(given)
    if file is not None and "spec" not in given:
        given = {name: value for name, value in given.items() if name != "model"}
    if file is not None:
        given = {name: value for name, value in given.items() if FIELDS.get(name) not in file.typed}
    if file is None and "online" not in given:
        given = in_other_format(given)
    spec = with_framework_config(file.fields if file is not None else {}, companions(given, file))

    if "lengths" in given and "batching" not in given and file is not None and file.source:
        from memplan.planning.lengths import batching_of_file

        asked = batching_of_file(file.source.keys)
        given = {**given, "batching": asked} if asked else given

    def fields_of(count: int | None) -> dict[str, Any]:
        typed = given if count is None else {**given, "gpus": count}
        fields = spec_of(typed, spec, keeps_strategy=file is not None and not file.is_own)
        if "model" not in fields:
            raise _no_model(given, file)
        if "revision" in given:
            fields["model"] = revised(fields["model"], given["revision"])
        return fields if file is not None or "online" in given else with_model_defaults(fields)

    cards = [*typed_cards(given.get("gpu", ()))]
    counts = {card.number for card in cards} - {None, given.get("gpus")}
    if counts and "gpus" in given:
        raise SpecError(f"gpu: {counts.pop()} of a card, but --gpus {given['gpus']}; give one of the two", "gpu")
    fields = {count: fields_of(count) for count in dict.fromkeys(card.number for card in cards)} or {
        None: fields_of(None)
    }
    runs = [RunSpec.model_validate({**fields[card.number], "gpu": card.name}) for card in cards]
    runs = runs or [RunSpec.model_validate(fields[None])]
    unused = unused_option_error(given, runs[0].method)
    if unused is not None:
        raise unused
    return runs


def _no_model(given: Mapping[str, Any], file: RunFile | None) -> SpecError:
    if file is not None and not file.is_own:
        door = "-- COMMAND" if given.get("spec", [""])[0].startswith(COMMAND) else "--spec FILE"
        return SpecError(f"model: {file.name} names none; write memplan MODEL {door}", "model")
    return SpecError("model: name one, as in memplan qwen2-7b --method qlora --gpu 3090, or give --spec", "model")


def revised(model: object, revision: str) -> str:
    """Return a Hugging Face id with its revision."""
    if not isinstance(model, str) or "@" in model or not revision.strip():
        raise SpecError("revision: only applies to a Hugging Face id that has no @revision itself", "revision")
    return f"{model}@{revision}"


def format_of(given: Mapping[str, Any]) -> str:
    """Return the requested format, or the one that the output file's suffix implies."""
    from memplan.report import FORMATS

    if "json" in given and given.get("format", "json") != "json":
        raise SpecError(f"format: --json and --format {given['format']} exclude each other", "format")
    suffix = str(given.get("output", "")).rpartition(".")[2].lower()
    guessed = {"md": "markdown", "htm": "html"}.get(suffix, suffix if suffix in FORMATS else "table")
    format = "json" if "json" in given else given.get("format", guessed)
    if format not in FORMATS:
        raise UnknownNameError("format", format, FORMATS)
    return format


def stamp_of(given: Mapping[str, Any], format: str) -> Stamp | None:
    """Return the command that was typed, without where it writes to, and the date that was asked for, for a page."""
    if format not in ("html", "svg", "markdown"):
        if "date" in given:
            raise SpecError(f"date: only pages show it: html, svg and markdown, not {format}", "date")
        return None
    from datetime import date as day

    from memplan.cli.outcome import command_line
    from memplan.report.stamp import Stamp

    date: str = given.get("date", "")
    try:
        date = day.today().isoformat() if date.lower() == "today" else date and day.fromisoformat(date).isoformat()
    except ValueError:
        raise SpecError(f"date: {printable(date, 40)!r} is no date; write 2026-11-29 or today", "date") from None
    return Stamp(command_line(), date)


def check_count(name: str, number: int | None) -> None:
    """Raise SpecError if a number was given that is below 1."""
    if number is not None and number < 1:
        raise SpecError(f"{name}: must be at least 1, not {number}", name)


def screen_of(given: Mapping[str, Any]) -> Screen:
    """Return what a table is written for: the terminal, or a file of any width without colour."""
    from memplan.report.text import Screen, screen

    plain = "plain" in given
    return Screen(plain=plain) if "output" in given else screen(plain)


# Options of an answer that say nothing about the run.
_OF_OUTPUT = ("format", "json", "output", "date", "explain", "explain_run", "details", "plain", "ranks", "strict")


def typed_line(given: Mapping[str, Any]) -> CommandLine | None:
    """Return the options as they are typed; None if the run is from standard input or a command."""
    from memplan.report.overview import CommandLine

    words: list[str] = []
    cards: list[str] = []
    for name, value in given.items():
        if name in _OF_OUTPUT:
            continue
        if name == "spec" and any(file == "-" or file.startswith(COMMAND) for file in value):
            return None
        if isinstance(value, bool):
            words.append(flag(name) if value else f"--no-{flag(name)[2:]}")
        elif name == "model":
            words.insert(0, value)
        else:
            repeated = cast(list[object], value) if isinstance(value, list) else [value]
            (cards if name == "gpu" else words).extend(word for one in repeated for word in (flag(name), str(one)))
    return CommandLine(*(" ".join(map(_quoted, typed)) for typed in (words, cards)))


def _quoted(word: str) -> str:
    """Return a word as a shell reads it; the import of `shlex` takes as long as a report."""
    if word.isascii() and word.translate(_UNQUOTED).isalnum():
        return word
    from shlex import quote

    return quote(word)


_UNQUOTED = {ord(mark): None for mark in "-_./:=@,+"}


def exit_code(answers: Sequence[Estimate], strict: bool) -> int:
    """Return the exit code for all answers together."""
    if strict and any(answer.unsupported for answer in answers):
        return 4
    refused = ("does not fit", "does not start", *(("tight",) if strict else ()))
    return int(any(answer.verdict.answer in refused for answer in answers))
