"""Options of commands: rows become typer's parameters, and the options that were given become a mapping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, Signature, getdoc
from typing import Annotated, Any, Literal, get_origin

import typer
from typer.core import TyperCommand
from typer.main import get_command

from memplan.cli.answering import run_and_report
from memplan.spec.options import Option, flag

Options = Mapping[str, Mapping[str, Option]]  # heading in help -> name -> option
Switch = Literal[True]  # the type of a flag without a --no- form


class OptionsCommand(TyperCommand):
    """A command with rows for options, which its help groups under headings. Its work gets the options given."""

    def __init__(self, name: str, work: Callable[[dict[str, Any]], int], options: Options, **more: Any) -> None:
        super().__init__(name, help=getdoc(work), rich_markup_mode=None, **more)
        self.work, self.options = work, options

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse with parameters of only the options that are typed, if these exist: typer takes long for many."""
        typed = {word.partition("=")[0] for word in args if word.startswith("-")}
        options = {name: option for group in self.options.values() for name, option in group.items()}
        unused = [name for name, option in options.items() if not option.is_argument and flag(name) not in typed]
        all_exist = typed <= {flag(name) for name in options}
        self.params = parameters(without(self.options, *unused) if all_exist else self.options)
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        self.params = parameters(self.options)
        return super().shell_complete(ctx, incomplete)

    def invoke(self, ctx: Any) -> int:
        given = given_options(ctx)
        return run_and_report(lambda: self.work(given), given)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                heading = getattr(param, "rich_help_panel", None) or "Other"
                groups.setdefault(heading, []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def own(help: str, type: Any = str, **more: Any) -> Option:
    """Return an option of one command, which sets no field of a run."""
    return Option("", help, type, **more)


def typer_command(function: Callable[..., Any], name: str) -> Any:
    """Return the command that typer makes of a function."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name)(function)
    return get_command(app)


def without(options: Options, *names: str) -> Options:
    """Return the options without some, and without headings that have no others."""
    return {
        heading: {name: option for name, option in group.items() if name not in names}
        for heading, group in options.items()
        if not group.keys() <= set(names)
    }


def given_options(ctx: Any) -> dict[str, Any]:
    """Return the options that are on the command line. A default means that it is not."""
    return {name: v for name, v in ctx.params.items() if ctx.get_parameter_source(name).name == "COMMANDLINE"}


def parameters(options: Options) -> list[Any]:
    """Return typer's parameters for the options."""

    def command(**_: object) -> None: ...

    rows = [(name, option, heading) for heading, group in options.items() for name, option in group.items()]
    command.__signature__ = Signature([_parameter(*row) for row in rows])  # pyright: ignore[reportFunctionMemberAccess]
    return typer_command(command, "").params


def _parameter(name: str, option: Option, heading: str) -> Parameter:
    """Return the parameter of a function that typer makes an option or argument of."""
    value, choices, help = option.type or str, option.choices, option.help
    if option.field and not option.is_argument:
        from memplan.spec.fields import field_of

        field = field_of(option.field)
        value = option.type or (str if option.parse else field.type)
        choices = choices or field.choices
        help = help.replace("{choices}", ", ".join(choices))
        help = help if "Default " in help else f"{help} Default {field.default}."
    shown: dict[str, Any] = {"help": help, "metavar": option.metavar, "show_default": False, "rich_help_panel": heading}
    shown["autocompletion"] = _COMPLETIONS.get(name) or (completion(*choices) if choices else None)
    default = None
    if value is Switch:
        info, value, default = typer.Option(flag(name), **shown), bool, False
    elif option.is_argument:
        info = typer.Argument(**shown)
        default = Parameter.empty if get_origin(value) is list else None
    else:
        info = typer.Option(**shown)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[value, info])


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


def _complete_optimizer(incomplete: str) -> list[str]:
    from memplan.catalogue.optimizers.states import optimizer_names

    return [name for name in optimizer_names() if name.startswith(incomplete)]


_COMPLETIONS = {  # of options whose choices are catalogues
    "model": complete_model,
    "runs": complete_model,
    "gpu": complete_gpu,
    "have": complete_gpu,
    "optimizer": _complete_optimizer,
    "profile": complete_profile,
}
