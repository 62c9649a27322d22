"""`memplan card new`: a model card for any model whose config can be read, ready to commit."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.main import get_command

from memplan.cli.outcome import run_and_report, show
from memplan.cli.typer_commands import complete_model
from memplan.core.errors import SpecError, printable


def command(_: str) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback(help="Model cards: facts about a model, with their sources.")(lambda: None)
    app.command("new")(new)
    return get_command(app)


def new(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face id, owner/name or owner/name@revision, or the path of a config.json, "
            "its folder or a GGUF file.",
            autocompletion=complete_model,
        ),
    ],
    online: Annotated[
        bool,
        typer.Option("--online", help="Ask the Hugging Face Hub: config, headers, commit and licence. Default off."),
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="The id's branch, tag or commit. Default main.", show_default=False)
    ] = None,
    hf_id: Annotated[
        str | None,
        typer.Option(
            help="The model's id at Hugging Face, owner/name. Default the given id, or the one that a local config was "
            "saved from.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Write to this file. Default standard output.", show_default=False)
    ] = None,
) -> int:
    """Print a model card in the format of model_cards/: the counted parameters, those of the checkpoint's headers with
    the tensors that make the difference, and the config.
    """
    options = (("revision", revision), ("hf_id", hf_id), ("output", out))
    given = [name for name, value in options if value is not None]
    return run_and_report(lambda: _new(model, online, revision, hf_id, out), given)


def _new(name: str, online: bool, revision: str | None, hf_id: str | None, out: str | None) -> int:
    import re

    from memplan.cli.runs import revised
    from memplan.models.cards import PublishedModel, facts_of
    from memplan.models.model import ModelSpec
    from memplan.report.model_card import ID, CardFacts, card, id_in

    if revision is not None:
        name = revised(name, revision)
    if hf_id is not None and not re.fullmatch(ID, hf_id):
        raise SpecError(f"hf_id: {printable(hf_id, 80)!r} is not a Hugging Face id (owner/name)", "hf_id")
    facts: PublishedModel = facts_of(name, online)
    known_id = hf_id or facts.hf_id or id_in(facts.config)
    model = ModelSpec(facts.config, name, checkpoint=facts.checkpoint)
    show(card(model, facts.config, CardFacts(known_id, facts.source, _today(), facts.licence)), output=out)
    return 0


def _today() -> str:
    from datetime import date

    return date.today().isoformat()
