"""`memplan card new`: a model card of any model whose facts can be read, ready to be committed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.main import get_command

from memplan.cli import answered, complete_model, show


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
            help="A Hugging Face id, owner/name or owner/name@revision, or the path of a config.json or its folder.",
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
    out: Annotated[
        str | None, typer.Option(help="Write to this file. Default standard output.", show_default=False)
    ] = None,
) -> int:
    """Print a model card, as model_cards/ has them: parameters as they are counted, what the checkpoint stores by its
    headers and which tensors make the difference, and the config.
    """
    given = [name for name, value in (("revision", revision), ("output", out)) if value is not None]
    return answered(lambda: _new(model, online, revision, out), given)


def _new(name: str, online: bool, revision: str | None, out: str | None) -> int:
    from memplan.cards import Facts, facts_of
    from memplan.cli import revised
    from memplan.models import ModelSpec
    from memplan.new_card import Facts as Said
    from memplan.new_card import card

    if revision is not None:
        name = revised(name, revision)
    found: Facts = facts_of(name, online)
    model = ModelSpec(found.config, name, checkpoint=found.checkpoint)
    show(card(model, found.config, Said(found.hf_id or name, found.source, _today(), found.licence)), output=out)
    return 0


def _today() -> str:
    from datetime import date

    return date.today().isoformat()
