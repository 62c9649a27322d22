"""Commands as typer's: rows become its parameters, for help, completion and errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from inspect import Parameter, Signature, cleandoc
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

from memplan.cli.commands import Options, Subcommand, Switch, type_of
from memplan.cli.outcome import TYPED
from memplan.core.errors import SpecError
from memplan.core.identity import Identity
from memplan.spec.option_values import INSTEAD, is_method
from memplan.spec.options import OPTIONS, Option, flag

# click's error about wrong usage, wherever this typer keeps its click
UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class OptionsCommand(TyperCommand):
    """A command with rows for options, which its help groups under headings."""

    def __init__(self, command: Subcommand, **more: Any) -> None:
        help = command.help or cleandoc(command.work.__doc__ or "")
        super().__init__(command.name, help=help, rich_markup_mode=None, **more)
        self.command = command

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        self.params = parameters(Identity(self.command.options))
        return super().parse_args(ctx, self.command.rewritten(args))

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        self.params = parameters(Identity(self.command.options))
        return super().shell_complete(ctx, incomplete)

    def invoke(self, ctx: Any) -> int:
        return self.command.run(_given_options(ctx))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        others = "Options" if "Options" in self.command.options else "Other"
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(param, "rich_help_panel", None) or others, []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def given_by_typer(command: Subcommand, words: Sequence[str]) -> dict[str, Any]:
    """Return the options on a command line inside a command. Raises SpecError if it is wrong."""
    typed = OptionsCommand(command, add_help_option=False)
    try:
        return _given_options(typed.make_context(command.name, [*words]))
    except UsageError as error:
        raise SpecError(usage(error)) from None


def usage(error: Any) -> str:
    """Return a line that says what typer found wrong with the arguments."""
    param, text = getattr(error, "param", None), error.format_message()
    if param is not None and error.__cause__ is not None:
        from memplan.spec.failures import message_of

        text = f"{param.opts[0]}: {message_of(error.__cause__)}"
    typed = getattr(error, "option_name", None) or ""
    instead = INSTEAD.get(typed.strip("-").replace("_", "-"))
    if text.startswith(_EXTRA):
        text = _instead_of(text.removeprefix(_EXTRA).strip("()").partition(" ")[0]) or text
    elif text.endswith(_LACKS):
        text = f"{text.removesuffix('.')}{_values_of(typed)}"
    elif instead is not None:
        text = f"No such option: {typed}; {f'write {instead}' if instead else 'leave it out, it takes no memory'}"
    return " ".join(text.split())


_EXTRA, _LACKS = "Got unexpected extra argument(s) ", "requires an argument."


def _values_of(typed: str) -> str:
    """Return the words that a run's option accepts, "" if it accepts numbers, or names without a list."""
    name = typed.strip("-").replace("-", "_")
    option = next((group[name] for group in OPTIONS.values() if name in group), None)
    choices = described(option)[1] if option is not None else ()
    return f": {', '.join(choices)}" if choices else ""


def _instead_of(word: str) -> str:
    """Return what to type for a word after the model that is no option, "" if it is not known."""
    first, model = (*TYPED.get(), "", "")[:2]
    if first in INSTEAD:
        return f"{first!r} takes no model; write {model} {INSTEAD[first]}"
    if is_method(word):
        return f"{word!r} is no option; write --method {word}"
    from memplan.catalogue.hardware.gpus import find_gpu
    from memplan.cli.gpu_names import typed_cards
    from memplan.core.errors import MemplanError

    try:
        for card in typed_cards((word,)):
            find_gpu(card.name)
    except MemplanError:
        return ""
    return f"{word!r} is no option; write --gpu {word}"


def typer_command(function: Callable[..., Any], name: str) -> Any:
    """Return the command that typer makes of a function."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name)(function)
    return get_command(app)


def _given_options(ctx: Any) -> dict[str, Any]:
    """Return the options that are on the command line. A default means that it is not."""
    return {name: v for name, v in ctx.params.items() if ctx.get_parameter_source(name).name == "COMMANDLINE"}


@lru_cache(maxsize=4)  # making them takes most of the time of parsing
def parameters(options: Identity[Options]) -> list[Any]:
    """Return typer's parameters for the options."""

    def command(**_: object) -> None: ...

    rows = [(name, option, heading) for heading, group in options.value.items() for name, option in group.items()]
    command.__signature__ = Signature([_parameter(*row) for row in rows])  # pyright: ignore[reportFunctionMemberAccess]
    return typer_command(command, "").params


def _parameter(name: str, option: Option, heading: str) -> Parameter:
    """Return the parameter of a function that typer makes an option or argument of."""
    value, (help, choices) = type_of(option), described(option)
    shown: dict[str, Any] = {"help": help, "metavar": option.metavar, "show_default": False, "rich_help_panel": heading}
    shown["autocompletion"] = _COMPLETIONS.get(option.completes or name) or (completion(*choices) if choices else None)
    default = None
    if value is Switch:
        info, value, default = typer.Option(flag(name), **shown), bool, False
    elif option.is_argument:
        info = typer.Argument(**shown)
        default = Parameter.empty if option.is_required else None
    else:
        info = typer.Option(**shown)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[value, info])


def described(option: Option) -> tuple[str, tuple[str, ...]]:
    """Return an option's help, with its default, and the words that it accepts, if it has such words."""
    if not option.field or option.is_argument:
        return option.help, option.choices
    from memplan.spec.fields import field_of

    field = field_of(option.field)
    choices = option.choices or field.choices
    help = option.help.replace("{choices}", ", ".join(choices))
    return help if "Default " in help else f"{help} Default {field.default}.", choices


def completion(*words: str) -> Callable[[str], list[str]]:
    """Return what completes a word to one of `words`."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    from memplan.models.cards import card_names, load_card

    cards = [load_card(name).card for name in card_names()] if "/" in incomplete else []
    ids = [str(name) for card in cards for name in (card["hf_id"], *card.get("aliases", ()))]
    return [name for name in (*card_names(), *ids) if name.startswith(incomplete)]


def complete_gpu(incomplete: str) -> list[str]:
    from memplan.catalogue.hardware.gpus import all_gpus

    names = [name for gpu in all_gpus() for name in (gpu.name, *gpu.aliases)]
    return [name for name in names if name.startswith(incomplete)]


def complete_profile(incomplete: str) -> list[str]:
    from memplan.catalogue.profiles.engines import ENGINES
    from memplan.catalogue.profiles.profiles import PROFILES

    return [profile.name for profile in (*PROFILES, *ENGINES) if profile.name.startswith(incomplete)]


def complete_optimizer(incomplete: str) -> list[str]:
    from memplan.catalogue.optimizers.states import optimizer_names

    return [name for name in optimizer_names() if name.startswith(incomplete)]


_COMPLETIONS = {  # of options whose choices are catalogues
    "model": complete_model,
    "runs": complete_model,
    "gpu": complete_gpu,
    "have": complete_gpu,
    "optimizer": complete_optimizer,
    "profile": complete_profile,
}
