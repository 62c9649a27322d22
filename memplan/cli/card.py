"""`memplan card new`: a model card of any model whose facts can be read, ready to be committed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.main import get_command

from memplan.cli.answering import answered, show
from memplan.cli.options import complete_model


def command(_: Sequence[Any]) -> Any:
    """The command; it takes none of the options of a run."""
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
            help="The model's id at Hugging Face, owner/name. Default the id asked for, or the one that a local config "
            "was saved from.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Write to this file. Default standard output.", show_default=False)
    ] = None,
) -> int:
    """Print a model card, as model_cards/ has them: parameters as they are counted, what the checkpoint stores by its
    headers and which tensors make the difference, and the config.
    """
    said = (("revision", revision), ("hf_id", hf_id), ("output", out))
    given = [name for name, value in said if value is not None]
    return answered(lambda: _new(model, online, revision, hf_id, out), given)


def _new(name: str, online: bool, revision: str | None, hf_id: str | None, out: str | None) -> int:
    import re

    from memplan.cli.runs import revised
    from memplan.core.errors import SpecError, printable
    from memplan.models.cards import Facts, facts_of
    from memplan.models.model import ModelSpec
    from memplan.report.model_card import ID, card, id_in
    from memplan.report.model_card import Facts as Said

    if revision is not None:
        name = revised(name, revision)
    if hf_id is not None and not re.fullmatch(ID, hf_id):
        raise SpecError(f"hf_id: {printable(hf_id, 80)!r} is no id at Hugging Face, owner/name", "hf_id")
    found: Facts = facts_of(name, online)
    known = hf_id or found.hf_id or id_in(found.config)
    model = ModelSpec(found.config, name, checkpoint=found.checkpoint)
    show(card(model, found.config, Said(known, found.source, _today(), found.licence)), output=out)
    return 0


def _today() -> str:
    from datetime import date

    return date.today().isoformat()
